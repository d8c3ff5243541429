"""The piecewise likelihood against enumerated joints, and void, balancing and grid labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pwcrf_jax as pw
from pwcrf_jax import piecewise
from pwcrf_jax.relations import ABOVE_BELOW, SURROUNDING, offsets
from reference import crf_oracle, random_problems

GRIDS = [(2, 2), (2, 3)]
ll_unary = jax.jit(piecewise.unary_log_likelihood, static_argnames="void")
ll_pairwise = jax.jit(pw.pairwise_log_likelihood, static_argnames="void")


def relation_potential(x, relation, residual=False):
    box = offsets(relation, *x.hidden_p.shape[:2])
    potential = pw.factored_pairwise(*x.parts, box, x.unary_log_probs if residual else None)
    edges = crf_oracle.grid_edges(*x.parts, box)
    if residual:
        edges = crf_oracle.with_unary(edges, x.unary_log_probs.reshape(-1, x.unary_log_probs.shape[-1]))
    return potential, edges


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_piecewise_bounds_the_enumerated_likelihood(size, residual):
    """Z = sum_y prod_f psi_f <= prod_f sum psi_f, so over *all* factors -log P_piecewise >= -log P."""
    x = random_problems.grid_problem(11, *size)
    unary, labels = x.unary.reshape(-1, 3), x.labels.ravel()
    terms, all_edges = [ll_unary(x.unary, x.labels)], []
    np.testing.assert_allclose(terms[0], crf_oracle.unary_log_likelihood(unary, labels), rtol=1e-5)
    for relation in (SURROUNDING, ABOVE_BELOW):
        potential, edges = relation_potential(x, relation, residual)
        terms.append(ll_pairwise(potential, x.labels))
        np.testing.assert_allclose(terms[-1], crf_oracle.pairwise_log_likelihood(edges, labels), rtol=1e-5)
        assert terms[-1][1] == len(edges) > 0
        all_edges += edges
    exact = crf_oracle.exact_log_likelihood(labels, unary, all_edges)
    assert -sum(float(t) for t, _ in terms) > -exact + 0.1  # strictly: these factors share variables


def test_piecewise_bound_is_tight_for_no_labelling_only_by_luck():
    """The gap, sum_f log Z_f - log Z, is one number for all labellings: check it for each of them."""
    x = random_problems.grid_problem(12, 2, 2, classes=2)
    potential, edges = relation_potential(x, SURROUNDING)
    unary = x.unary.reshape(4, 2)
    local = sum(crf_oracle.log_sum_exp(s) for *_, s in edges) + sum(map(crf_oracle.log_sum_exp, unary))
    gap = local - crf_oracle.log_partition(unary, edges)
    assert gap > 0
    for y in crf_oracle.labellings(unary, edges)[0]:
        labels = jnp.array(y).reshape(2, 2)
        got = ll_unary(x.unary, labels)[0] + ll_pairwise(potential, labels)[0]
        np.testing.assert_allclose(got, crf_oracle.exact_log_likelihood(y, unary, edges) - gap, rtol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_factors_that_share_no_variable_are_exact(residual):
    """Isolated edges without a unary, or a unary without edges: then piecewise is the likelihood itself."""
    x = random_problems.grid_problem(13, 3, 2)
    # Three edges that share no node: each cell of the left column with its right neighbour.
    potential = pw.factored_pairwise(*x.parts, np.array([[0, 1]]), x.unary_log_probs if residual else None)
    edges = crf_oracle.grid_edges(*x.parts, [(0, 1)])
    assert sorted([e.p for e in edges] + [e.q for e in edges]) == list(range(6))
    if residual:
        edges = crf_oracle.with_unary(edges, x.unary_log_probs.reshape(6, 3))
    labels, zeros = x.labels.ravel(), np.zeros((6, 3))
    exact = crf_oracle.exact_log_likelihood(labels, zeros, edges)
    np.testing.assert_allclose(ll_pairwise(potential, x.labels)[0], exact, rtol=1e-5)
    table = pw.to_table(potential)
    np.testing.assert_allclose(ll_pairwise(table, labels)[0], exact, rtol=1e-5)
    # The graph's unary and pairwise factors together share variables: strictly above.
    unary = x.unary.reshape(6, 3)
    both = ll_unary(x.unary, x.labels)[0] + ll_pairwise(potential, x.labels)[0]
    assert -both > -crf_oracle.exact_log_likelihood(labels, unary, edges) + 0.1


@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_unary_alone_is_exact(size):
    x = random_problems.grid_problem(14, *size)
    exact = crf_oracle.exact_log_likelihood(x.labels.ravel(), x.unary.reshape(-1, 3), [])
    np.testing.assert_allclose(ll_unary(x.unary, x.labels)[0], exact, rtol=1e-5)


def test_parallel_edges_on_one_pair_are_factors_of_their_own():
    """Edges (0,1) twice and (1,0) once share variables: three softmaxes, not one."""
    x = random_problems.graph_problem(15, nodes=2, edges=3)
    p, q = np.array([0, 0, 1]), np.array([1, 1, 0])
    table = pw.PairwiseTable(jnp.asarray(x.scores), p, q)
    edges = crf_oracle.table_edges(x.scores, p, q)
    got, count = ll_pairwise(table, x.labels)
    np.testing.assert_allclose(got, crf_oracle.pairwise_log_likelihood(edges, x.labels)[0], rtol=1e-5)
    assert count == 3
    assert -got > -crf_oracle.exact_log_likelihood(x.labels, np.zeros((2, 3)), edges)


@pytest.mark.parametrize("void", [255, -1, 3])
def test_void_and_weights_match_the_oracle(void):
    x = random_problems.grid_problem(16, 3, 4)
    rng = np.random.default_rng(17)
    labels = np.where(rng.random((3, 4)) < 0.3, void, x.labels)
    weights = rng.uniform(0.1, 3, (3, 4)).astype(np.float32)
    assert 0 < (labels == void).sum() < 12
    flat, w = labels.ravel(), weights.ravel()
    got = ll_unary(x.unary, labels, void=void, node_weights=weights)
    expected = crf_oracle.unary_log_likelihood(x.unary.reshape(12, 3), flat, w, void)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    potential, edges = relation_potential(x, SURROUNDING, residual=True)
    expected = crf_oracle.pairwise_log_likelihood(edges, flat, w, void)
    for pot, shape in ((potential, (3, 4)), (pw.to_table(potential), (12,))):
        got = ll_pairwise(pot, labels.reshape(shape), void=void, node_weights=weights.reshape(shape))
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_all_void_is_zero_of_nothing_with_a_zero_gradient():
    x = random_problems.grid_problem(18, 2, 3)
    labels = np.full((2, 3), 255)
    box = offsets(SURROUNDING, 2, 3)

    @jax.jit
    @jax.grad
    def gradient(parts):
        unary, a = parts
        potential = pw.factored_pairwise(a, x.hidden_q, x.kernel, x.bias, box)
        return ll_unary(unary, labels)[0] + ll_pairwise(potential, labels)[0]

    potential = pw.factored_pairwise(*x.parts, box)
    assert ll_unary(x.unary, labels) == ll_pairwise(potential, labels) == (0, 0)
    assert not any(g.any() for g in gradient((x.unary, x.hidden_p)))


def test_batch_sums_over_images():
    x = random_problems.grid_problem(19, 2, 3, batch=(3,))
    labels = x.labels.copy()
    labels[1, 0, :2] = 255
    box = offsets(SURROUNDING, 2, 3)
    make = lambda a, b, e: pw.factored_pairwise(a, b, x.kernel, x.bias, box, e)
    for got, single in (
        (ll_unary(x.unary, labels), [ll_unary(x.unary[i], labels[i]) for i in range(3)]),
        (
            ll_pairwise(make(x.hidden_p, x.hidden_q, x.unary_log_probs), labels),
            [ll_pairwise(make(x.hidden_p[i], x.hidden_q[i], x.unary_log_probs[i]), labels[i]) for i in range(3)],
        ),
    ):
        np.testing.assert_allclose(got, np.sum(single, axis=0), rtol=1e-5)


def test_bfloat16_unary_takes_its_softmax_in_float32():
    rng = np.random.default_rng(20)
    scores = jnp.asarray(40 + rng.normal(size=(50, 21)), jnp.bfloat16)
    labels = rng.integers(0, 21, 50)
    got = ll_unary(scores, labels)
    expected = crf_oracle.unary_log_likelihood(np.asarray(scores, np.float64), labels)
    assert got[0].dtype == got[1].dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_large_scores_do_not_overflow():
    labels = np.array([0, 1])
    total, _ = ll_unary(np.array([[1e4, -1e4], [1e4, -1e4]], np.float32), labels)
    assert total == -2e4
    table = pw.PairwiseTable(np.array([[[1e4, 0], [0, -1e4]]], np.float32), np.array([0]), np.array([1]))
    assert ll_pairwise(table, labels)[0] == -1e4


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (np.zeros((2, 3), np.float32), "integer labels, got float32"),
        (np.zeros((3, 2), np.int32), r"shape .*2, 3\)"),
        (np.zeros((6,), np.int32), r"shape .*2, 3\)"),
    ],
    ids=["float", "transposed", "flat"],
)
def test_refused_labels(labels, match):
    x = random_problems.grid_problem(21, 2, 3)
    potential, _ = relation_potential(x, SURROUNDING)
    with pytest.raises(ValueError, match=match):
        piecewise.unary_log_likelihood(x.unary, labels)
    with pytest.raises(ValueError, match=match):
        pw.pairwise_log_likelihood(potential, labels)
    if labels.dtype == np.float32:
        with pytest.raises(ValueError, match=match):
            pw.pairwise_log_likelihood(pw.to_table(potential), labels.ravel())


# --- balancing -------------------------------------------------------------------------------------

balance = jax.jit(piecewise.balance_weights, static_argnums=1, static_argnames="void")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0, 1, 2, 3, 255]), min_size=12, max_size=12), st.sampled_from([0.0, 0.5, 1.0]))
def test_balance_weights_match_the_oracle(values, power):
    labels = np.array(values).reshape(3, 4)
    got = balance(labels, 4, power=power)
    np.testing.assert_allclose(got, crf_oracle.balance_weights(labels, 4, power=power), rtol=1e-5)
    np.testing.assert_allclose(got.sum(), (labels != 255).sum(), rtol=1e-5)
    assert not got[labels == 255].any()
    if power == 0:
        np.testing.assert_allclose(got, labels != 255, rtol=1e-6)
    if power == 1:
        per_class = [got[labels == k].sum() for k in range(4) if (labels == k).any()]
        np.testing.assert_allclose(per_class, per_class[:1] * len(per_class), rtol=1e-5)


def test_balance_weights_are_per_image():
    rng = np.random.default_rng(22)
    labels = rng.integers(0, 3, (2, 2, 4, 5))
    labels[0, 1] = 255
    labels[1, 0, 0] = 255
    got = piecewise.balance_weights(labels, 3)
    assert got.shape == labels.shape and got.dtype == jnp.float32
    for i in np.ndindex(2, 2):
        np.testing.assert_allclose(got[i], crf_oracle.balance_weights(labels[i], 3), rtol=1e-5)
    assert not got[0, 1].any()


def test_balance_weights_with_another_void_label():
    labels = np.array([[-1, 0, 1, 2, 2, 2]])
    np.testing.assert_allclose(
        piecewise.balance_weights(labels, 3, void=-1), crf_oracle.balance_weights(labels, 3, void=-1), rtol=1e-6
    )


# --- labels of the grid ----------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
def test_grid_labels_are_those_of_the_centres(height, width, image_height, image_width):
    labels = np.arange(image_height * image_width).reshape(image_height, image_width)
    got = piecewise.grid_labels(labels, height, width)
    assert got.shape == (height, width)
    for r, c in np.ndindex(height, width):
        row, col = int((r + 0.5) * image_height / height), int((c + 0.5) * image_width / width)
        assert got[r, c] == labels[row, col]


def test_grid_labels_by_hand():
    image = np.arange(6 * 8).reshape(6, 8)
    # Cells of 3 x 2 pixels: centres in row 1 and 4, columns 1, 3, 5, 7.
    assert piecewise.grid_labels(image, 2, 4).tolist() == [[9, 11, 13, 15], [33, 35, 37, 39]]
    # Odd cells have a centre pixel: 3 x 3 pixels.
    assert piecewise.grid_labels(np.arange(27).reshape(3, 9), 1, 3).tolist() == [[10, 13, 16]]


def test_grid_labels_keep_void_batch_and_dtype():
    labels = np.full((2, 3, 8, 8), 255, np.uint8)
    labels[:, 1] = 7
    got = piecewise.grid_labels(jnp.asarray(labels), 2, 3)
    assert got.dtype == jnp.uint8 and got.shape == (2, 3, 2, 3)
    assert (got[:, 1] == 7).all() and (got[:, ::2] == 255).all()
    same = np.random.default_rng(23).integers(0, 5, (4, 6))
    np.testing.assert_array_equal(piecewise.grid_labels(same, 4, 6), same)
