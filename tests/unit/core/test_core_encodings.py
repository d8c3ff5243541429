"""One meaning, two encodings: tables and factored potentials, and what reversing an edge does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pwcrf_jax as pw
from pwcrf_jax.relations import SURROUNDING, Relation, edge_list, offsets
from reference import crf_oracle, random_problems

H, W, K, M = 4, 5, 3, 6
pairwise_log_likelihood = jax.jit(pw.likelihood.pairwise_log_likelihood)
messages = jax.jit(pw.compute_messages)
RELATION = Relation("skewed", rows=(-2, 1), cols=(-1, 2), unit="cells")
BOX = offsets(RELATION, H, W)


def close(got, expected, tolerance=1e-5):
    """Equal to `tolerance` of the largest entry."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(initial=0), 1e-3))


def build(hidden_p, hidden_q, kernel, bias, unary_log_probs, box=BOX):
    return pw.factored_pairwise(hidden_p, hidden_q, kernel, bias, box, unary_log_probs)


def flat(x):
    """[..., H, W, *rest] of a node array -> [..., H * W]."""
    return x.reshape(*x.shape[:-2], H * W)


CASES = [
    pytest.param(batch, residual, mask, id=f"{batch}-{'residual' if residual else 'free'}-{'mask' if mask else 'all'}")
    for batch, residual, mask in [
        ((), False, False),
        ((), True, True),
        ((2,), False, True),
        ((2, 3), True, True),
    ]
]


@pytest.mark.parametrize(("batch", "residual", "masked"), CASES)
def test_table_equals_factored(batch, residual, masked):
    x = random_problems.grid_problem(1, H, W, K, M, batch)
    rng = np.random.default_rng(2)
    mask = jnp.asarray(rng.random((*batch, H, W)) > 0.3) if masked else None
    weights = jnp.asarray(rng.uniform(0.5, 2, (*batch, H, W)).astype(np.float32)) if masked else None
    probe = jnp.asarray(rng.normal(size=x.unary.shape).astype(np.float32))
    marginals = jax.nn.softmax(x.unary)
    per_node = lambda v: None if v is None else flat(v)

    def outputs(parts, table):
        potential = build(*parts)
        if table:
            labels, m, w = flat(x.labels), per_node(mask), per_node(weights)
            q = marginals.reshape(*batch, H * W, K)
            potential = pw.to_table(potential)
        else:
            labels, m, w, q = x.labels, mask, weights, marginals
        total, count = pairwise_log_likelihood(potential, jnp.asarray(labels), node_mask=m, node_weights=w)
        message, number = messages(potential, q, node_mask=m)
        message = message.reshape(x.unary.shape)
        number = jnp.broadcast_to(number.reshape(number.shape[: -1 if table else -2] + (H, W)), (*batch, H, W))
        return total + jnp.sum(probe * message), (total, count, message, number)

    parts = tuple(map(jnp.asarray, x.parts)) + (jnp.asarray(x.unary_log_probs) if residual else None,)
    run = jax.jit(jax.grad(outputs, has_aux=True), static_argnums=1)
    (table_grads, table_out), (grads, out) = run(parts, True), run(parts, False)
    for got, expected in zip(jax.tree.leaves((out, grads)), jax.tree.leaves((table_out, table_grads)), strict=True):
        close(got, expected)
        assert np.abs(expected).max() > 0


@pytest.mark.parametrize("masked", [False, True])
def test_table_holds_the_scores_of_the_oracle_in_the_order_of_edge_list(masked):
    x = random_problems.grid_problem(3, H, W, K, M)
    table = pw.to_table(build(*x.parts, x.unary_log_probs))
    edges = crf_oracle.grid_edges(*x.parts, BOX)
    close(table.scores, [e.scores for e in edges])
    np.testing.assert_array_equal(table.p, [e.p for e in edges])
    np.testing.assert_array_equal(table.q, [e.q for e in edges])
    np.testing.assert_array_equal((table.p, table.q), edge_list(RELATION, H, W))
    close(table.unary_log_probs, x.unary_log_probs.reshape(H * W, K))

    mask = np.random.default_rng(4).random((H, W)) > 0.3 if masked else np.ones((H, W), bool)
    marginals = np.array(jax.nn.softmax(x.unary))
    message, count = messages(build(*x.parts, x.unary_log_probs), marginals, node_mask=jnp.asarray(mask))
    expected, number = crf_oracle.messages(edges, marginals.reshape(-1, K), mask.ravel())
    close(message.reshape(-1, K), expected)
    np.testing.assert_array_equal(count.ravel(), number)


@pytest.mark.parametrize("kind", ["table", "factored"])
def test_swapping_p_and_q_transposes(kind):
    """The reversed relation, a and b swapped, the last layer transposed: the same model."""
    x = random_problems.grid_problem(5, H, W, K, M)
    forward = build(*x.parts, x.unary_log_probs)
    reverse = lambda kernel, bias: build(x.hidden_q, x.hidden_p, kernel, bias, x.unary_log_probs, box=-BOX)
    backward = reverse(x.kernel.transpose(0, 2, 1), x.bias.T)
    untransposed = reverse(x.kernel, x.bias)
    labels, q = x.labels, jax.nn.softmax(x.unary)
    if kind == "table":
        labels, q = flat(labels), q.reshape(H * W, K)
        forward = pw.to_table(forward)
        backward = forward._replace(scores=forward.scores.swapaxes(-1, -2), p=forward.q, q=forward.p)
        untransposed = backward._replace(scores=forward.scores)
    run = jax.jit(lambda v: (pairwise_log_likelihood(v, labels), messages(v, q)))
    expected = run(forward)
    for got, want in zip(jax.tree.leaves(run(backward)), jax.tree.leaves(expected), strict=True):
        close(got, want)
    # The scores are not symmetric: forgetting the transposition shows.
    (total, _), (message, _) = run(untransposed)
    assert abs(total - expected[0][0]) > 1e-2 * abs(expected[0][0])
    assert np.abs(message - expected[1][0]).max() > 0.1


def test_scores_are_not_symmetric_in_the_direction_of_an_edge():
    x = random_problems.grid_problem(6, 1, 2, K, M)
    table = pw.to_table(build(*x.parts, None, box=offsets(SURROUNDING, 1, 2)))
    there, back = (table.scores[int(np.flatnonzero(np.array(table.p) == i)[0])] for i in (0, 1))
    assert np.abs(there - back.T).max() > 0.1


def test_log_probs_of_the_unary_count_in_the_likelihood_and_send_no_messages():
    x = random_problems.grid_problem(7, H, W, K, M)
    with_it, without = build(*x.parts, x.unary_log_probs), build(*x.parts, None)
    q = jax.nn.softmax(x.unary)
    for encode, shape in ((lambda v: v, (H, W)), (pw.to_table, (H * W,))):
        one, other = encode(with_it), encode(without)
        np.testing.assert_array_equal(messages(one, q.reshape(*shape, K))[0], messages(other, q.reshape(*shape, K))[0])
        values = [pairwise_log_likelihood(v, x.labels.reshape(shape))[0] for v in (one, other)]
        assert abs(values[0] - values[1]) > 1
    # Numbers that are constant over the classes of a node say nothing.
    constant = build(*x.parts, np.broadcast_to(x.unary[..., :1], x.unary.shape))
    close(pairwise_log_likelihood(constant, x.labels)[0], values[1])


@pytest.mark.parametrize("encode", [lambda v: v, pw.to_table], ids=["factored", "table"])
def test_potentials_without_edges(encode):
    x = random_problems.grid_problem(8, H, W, K, M)
    potential = encode(build(*x.parts, x.unary_log_probs, box=np.zeros((0, 2), np.int32)))
    shape = (H, W) if isinstance(potential, pw.FactoredPairwise) else (H * W,)
    total, count = pairwise_log_likelihood(potential, x.labels.reshape(shape))
    message, number = messages(potential, jax.nn.softmax(x.unary).reshape(*shape, K))
    assert total == 0 and count == 0
    assert not message.any() and not number.any()
    assert message.shape == (*shape, K) and number.shape == shape


def test_bfloat16_features_keep_the_loss():
    """Products may be in bfloat16; softmax, sums over edges and counts are float32."""
    classes, hidden = 40, 32
    x = random_problems.grid_problem(9, 10, 12, classes, hidden)
    box = offsets(SURROUNDING, 10, 12)
    # One hidden unit adds 256 to all scores: nothing to a softmax, but bfloat16 scores would be even numbers.
    x.hidden_p[..., 0], x.hidden_q[..., 0], x.kernel[0] = 16, 0, 16
    half = [jnp.asarray(v, jnp.bfloat16) for v in x.parts]
    total, count = pairwise_log_likelihood(build(*half, x.unary_log_probs, box=box), x.labels)
    full = [v.astype(jnp.float32) for v in half]
    expected, number = pairwise_log_likelihood(build(*full, x.unary_log_probs, box=box), x.labels)
    assert total.dtype == count.dtype == jnp.float32
    assert count == number == len(edge_list(SURROUNDING, 10, 12).p) > 256
    assert abs(total - expected) < 1e-3 * abs(expected)
    q = jax.nn.softmax(x.unary)
    message = messages(build(*half, None, box=box), q)[0]
    assert message.dtype == jnp.float32
    exact = messages(build(*full, None, box=box), q)[0]
    close(message, exact, 1e-2)


@pytest.mark.parametrize("residual", [False, True])
def test_bfloat16_tables_lose_nothing_beyond_their_own_rounding(residual):
    x = random_problems.graph_problem(10, 30, 700, classes=20)
    half = jnp.asarray(x.scores, jnp.bfloat16)
    extra = jnp.asarray(x.unary_log_probs, jnp.bfloat16) if residual else None
    table = pw.PairwiseTable(half, x.p, x.q, extra)
    full = jax.tree.map(lambda v: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v, table)
    for got, expected in zip(
        pairwise_log_likelihood(table, x.labels), pairwise_log_likelihood(full, x.labels), strict=True
    ):
        assert got.dtype == jnp.float32
        close(got, expected)
    for got, expected in zip(messages(table, x.unary), messages(full, x.unary), strict=True):
        close(got, expected)


def parts(**changes):
    shapes = dict(hidden_p=(H, W, M), hidden_q=(H, W, M), kernel=(M, K, K), bias=(K, K), unary_log_probs=(H, W, K))
    arrays = {name: np.zeros(changes.pop(name, shape), np.float32) for name, shape in shapes.items()}
    return arrays | dict(offsets=BOX) | changes


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(hidden_q=(H, W, M + 1)), "hidden_p and hidden_q of one shape"),
        (dict(hidden_p=(W, M), hidden_q=(W, M)), "hidden_p and hidden_q of one shape"),
        (dict(kernel=(M + 1, K, K)), r"kernel \[M, K, K\]"),
        (dict(kernel=(M, K, K + 1)), r"kernel \[M, K, K\]"),
        (dict(bias=(K + 1, K)), r"bias \[K, K\]"),
        (dict(unary_log_probs=(H, W, K + 1)), "expected unary_log_probs"),
        (dict(unary_log_probs=(H * W, K)), "expected unary_log_probs"),
        (dict(offsets=BOX.astype(np.float32)), "integer offsets"),
        (dict(offsets=BOX.ravel()), "integer offsets"),
    ],
    ids=str,
)
def test_refused_shapes(changes, match):
    pw.factored_pairwise(**parts())
    with pytest.raises(ValueError, match=match):
        pw.factored_pairwise(**parts(**changes))
