"""Mean field against loops over edges, its free energy against enumeration, its argument checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pwcrf_jax as pw
from pwcrf_jax import mean_field
from pwcrf_jax.mean_field import Settings
from pwcrf_jax.relations import ABOVE_BELOW, SURROUNDING, offsets
from reference import crf_oracle, random_problems

compiled_run, compiled_step = jax.jit(mean_field.run), jax.jit(mean_field.step)
messages = jax.jit(pw.compute_messages)


def run(unary, potentials, node_mask=None, **settings):
    return compiled_run(unary, potentials, Settings(**settings), node_mask=node_mask)


def step(state, unary, potentials, node_mask=None, **settings):
    return compiled_step(state, unary, potentials, Settings(**settings), node_mask=node_mask)


def grid_model(seed, height, width, classes=3, scale=1.0, residual=True):
    """Two relations on one grid: unary [H, W, K], factored potentials, edge lists of the oracle."""
    potentials, relations = [], []
    for i, relation in enumerate((SURROUNDING, ABOVE_BELOW)):
        x = random_problems.grid_problem(seed + i, height, width, classes, scale=scale)
        box = offsets(relation, height, width)
        potentials.append(pw.factored_pairwise(*x.parts, box, x.unary_log_probs if residual else None))
        relations.append(crf_oracle.grid_edges(*x.parts, box))
    return x.unary, potentials, relations


@pytest.mark.parametrize("encoding", ["factored", "table"])
@pytest.mark.parametrize(
    ("weights", "damping", "average", "masked"),
    [
        (None, 0.0, False, False),
        ((0.3, -0.7), 0.0, False, True),
        (None, 0.5, True, True),
        ((0.1, 0.2), 0.25, False, False),
    ],
    ids=["plain", "weighted-masked", "averaged-damped-masked", "weighted-damped"],
)
def test_step_and_run_match_the_oracle(weights, damping, average, masked, encoding):
    height, width, classes = 3, 4, 3
    unary, potentials, relations = grid_model(30, height, width)
    mask = np.random.default_rng(31).random((height, width)) > 0.3 if masked else None
    nodes = (height, width)
    if encoding == "table":
        nodes = (height * width,)
        potentials = [pw.to_table(v) for v in potentials]
    reshape = lambda v: None if v is None else jnp.asarray(v).reshape(*nodes, *v.shape[2:])
    w = None if weights is None else jnp.array(weights)
    settings = dict(damping=damping, average_messages=average)
    oracle = dict(damping=damping, normalize=average, weights=weights, mask=None if mask is None else mask.ravel())
    flat = unary.reshape(-1, classes)

    log_q, info = run(reshape(unary), potentials, num_iterations=3, weights=w, node_mask=reshape(mask), **settings)
    expected, changes = crf_oracle.mean_field(flat, relations, 3, **oracle)
    np.testing.assert_allclose(log_q.reshape(-1, classes), expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(info.change, changes, rtol=1e-4, atol=1e-6)
    assert log_q.dtype == info.change.dtype == jnp.float32 and log_q.shape == (*nodes, classes)
    assert max(changes) > 0.05

    # One step from a state that is not the unary's.
    start = crf_oracle.log_softmax(np.random.default_rng(32).normal(size=flat.shape))
    got, change = step(
        reshape(start.reshape(unary.shape).astype(np.float32)),
        reshape(unary),
        potentials,
        node_mask=reshape(mask),
        weights=w,
        **settings,
    )
    expected, expected_change = crf_oracle.mean_field_step(start, flat, relations, **oracle)
    np.testing.assert_allclose(got.reshape(-1, classes), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(change, expected_change, rtol=1e-4)


def test_masked_nodes_keep_their_unary_and_influence_nobody():
    unary, potentials, _ = grid_model(33, 3, 4)
    mask = np.ones((3, 4), bool)
    mask[1, 1:3] = False
    log_q, _ = run(unary, potentials, node_mask=mask)
    alone = jax.nn.log_softmax(unary)
    np.testing.assert_allclose(log_q[~mask], alone[~mask], atol=1e-6)
    assert np.abs(log_q[mask] - alone[mask]).max() > 0.1
    other = np.where(mask[..., None], unary, 50 * unary[::-1])
    np.testing.assert_array_equal(run(other, potentials, node_mask=mask)[0][mask], log_q[mask])


def test_change_leaves_masked_nodes_out():
    x = random_problems.graph_problem(45, nodes=3, edges=4)
    table = pw.PairwiseTable(0.1 * x.scores, x.p, x.q)
    start = np.log(np.float32([[0.3, 0.3, 0.4], [0.3, 0.3, 0.4], [1 - 2e-6, 1e-6, 1e-6]]))
    unary = np.where(np.arange(3)[:, None] == 2, np.float32([0, 9, 0]), start)
    mask = np.array([True, True, False])
    assert step(start, unary, [table])[1] > 0.9
    assert step(start, unary, [table], node_mask=mask)[1] < 0.5


@pytest.mark.parametrize("sender", [0, 1])
def test_messages_go_both_ways(sender):
    """One edge (0, 1). The receiver hears sum_l z[k, l] Q(l) as p, sum_k z[k, l] Q(k) as q, by hand."""
    z = np.array([[[0.0, 1.0], [2.0, 5.0]]], np.float32)
    table = pw.PairwiseTable(z, np.array([0]), np.array([1]))
    marginals = np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)
    message, count = messages(table, marginals)
    np.testing.assert_allclose(message[0], [0.5, 3.5])
    np.testing.assert_allclose(message[1], [1.5, 4.0])
    assert count.tolist() == [1, 1]
    mask = np.array([True, True])
    mask[sender] = False
    message, count = messages(table, marginals, node_mask=mask)
    assert not message.any() and not count.any()
    # The same on a grid of one row: q is right of p.
    a = np.zeros((1, 2, 1), np.float32)
    grid = pw.factored_pairwise(a, a, np.zeros((1, 2, 2), np.float32), z[0], np.array([[0, 1]]))
    message, count = messages(grid, marginals[None])
    np.testing.assert_allclose(message[0], [[0.5, 3.5], [1.5, 4.0]])
    assert count.tolist() == [[1, 1]]


@pytest.mark.parametrize("size", [(2, 2), (2, 3)], ids=str)
def test_free_energy_is_above_minus_log_z(size):
    unary, potentials, relations = grid_model(34, *size, scale=0.5, residual=False)
    edges, flat = relations[0] + relations[1], unary.reshape(-1, 3)
    log_z = crf_oracle.log_partition(flat, edges)
    start = np.float64(mean_field.init(unary).reshape(-1, 3))
    energies = [crf_oracle.free_energy(start, flat, edges)]
    assert energies[0] >= -log_z
    for iterations, damping in ((3, 0.0), (40, 0.0), (40, 0.5)):
        log_q, _ = run(unary, potentials, num_iterations=iterations, damping=damping)
        energies.append(crf_oracle.free_energy(np.float64(log_q.reshape(-1, 3)), flat, edges))
        assert energies[-1] >= -log_z - 1e-5
    assert energies[-1] < energies[0] - 0.01


def test_marginals_approach_the_enumerated_ones_for_weak_couplings():
    unary, potentials, relations = grid_model(35, 2, 3, scale=0.05)
    edges, flat = relations[0] + relations[1], unary.reshape(-1, 3)
    exact = crf_oracle.marginals(flat, edges)
    log_q, info = run(unary, potentials, num_iterations=20)
    error = np.abs(np.exp(log_q).reshape(-1, 3) - exact).max()
    alone = np.abs(np.exp(crf_oracle.log_softmax(flat)) - exact).max()
    assert info.change[-1] < 1e-6
    assert error < 0.01 and error < alone / 5


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_zero_pairwise_is_the_softmax_of_the_unary(damping):
    x = random_problems.grid_problem(36, 3, 3)
    zero = pw.factored_pairwise(
        x.hidden_p, x.hidden_q, 0 * x.kernel, 0 * x.bias, offsets(SURROUNDING, 3, 3), x.unary_log_probs
    )
    expected = crf_oracle.log_softmax(x.unary)
    table = pw.to_table(zero)
    for unary, potentials in (
        (x.unary, [zero]),
        (x.unary, []),
        (x.unary.reshape(9, 3), [table]),
        (x.unary.reshape(9, 3), []),
    ):
        log_q, info = run(unary, potentials, damping=damping)
        np.testing.assert_allclose(log_q, expected.reshape(unary.shape), atol=1e-6)
        assert info.change.shape == (3,) and info.change.max() < 1e-6
    np.testing.assert_allclose(mean_field.init(x.unary), expected, atol=1e-6)


def test_constant_scores_and_zero_weights_change_nothing():
    x = random_problems.grid_problem(37, 3, 3)
    box = offsets(SURROUNDING, 3, 3)
    constant = pw.factored_pairwise(x.hidden_p, x.hidden_q, 0 * x.kernel, 0 * x.bias + 7, box)
    strong = pw.factored_pairwise(*x.parts, box)
    expected = jax.nn.log_softmax(x.unary)
    np.testing.assert_allclose(run(x.unary, [constant])[0], expected, atol=1e-4)
    np.testing.assert_allclose(run(x.unary, [strong], weights=jnp.zeros(1))[0], expected, atol=1e-6)


def test_averages_make_the_weight_independent_of_the_number_of_neighbours():
    """All edges alike and all nodes alike: with `average_messages` any box gives one node's worth of message."""
    unary = np.zeros((5, 5, 2), np.float32) + np.float32([0.3, 0.0])
    a = np.zeros((5, 5, 1), np.float32)
    bias = np.float32([[0.1, 0.0], [0.0, 0.1]])
    results = []
    for radius in (1, 4):
        box = [(r, c) for r in range(-radius, radius + 1) for c in range(-radius, radius + 1) if (r, c) != (0, 0)]
        potential = pw.factored_pairwise(a, a, np.zeros((1, 2, 2), np.float32), bias, np.array(box))
        results.append(run(unary, [potential], num_iterations=2, average_messages=True)[0])
    assert np.ptp(run(unary, [potential], num_iterations=2)[0] - results[0]) > 0.1
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)


def test_strong_couplings_flip_for_ever_unless_damped():
    """Two nodes that want to agree and start apart exchange their labels in each parallel update."""
    unary = np.float32([[1.0, 0.0], [0.0, 1.0]])
    table = pw.PairwiseTable(4 * np.eye(2, dtype=np.float32)[None], np.array([0]), np.array([1]))
    _, wild = run(unary, [table], num_iterations=40)
    assert wild.change[-1] > 0.9
    # Damping settles: with a nudge to break the tie, on the label that the nudge prefers.
    nudged = unary + np.float32([0.1, 0])
    assert run(nudged, [table], num_iterations=40)[1].change[-1] > 0.9
    log_q, calm = run(nudged, [table], num_iterations=40, damping=0.5)
    assert calm.change[-1] < 1e-4
    np.testing.assert_array_equal(log_q.argmax(-1), [0, 0])


def test_batches_equal_single_images():
    x = random_problems.grid_problem(38, 3, 4, batch=(2,))
    mask = np.random.default_rng(39).random((2, 3, 4)) > 0.2
    box = offsets(SURROUNDING, 3, 4)
    make = lambda a, b: pw.factored_pairwise(a, b, x.kernel, x.bias, box)
    log_q, info = run(x.unary, [make(x.hidden_p, x.hidden_q)], node_mask=mask, average_messages=True)
    assert info.change.shape == (3, 2)
    for i in range(2):  # the second image reuses the first's compilation
        single, one = run(x.unary[i], [make(x.hidden_p[i], x.hidden_q[i])], node_mask=mask[i], average_messages=True)
        np.testing.assert_allclose(log_q[i], single, atol=1e-5)
        np.testing.assert_allclose(info.change[:, i], one.change, atol=1e-6)


def test_batched_unary_without_potentials_has_one_change_per_image():
    unary = random_problems.grid_problem(40, 3, 4, batch=(2,)).unary
    log_q, info = mean_field.run(unary, [])
    assert log_q.shape == unary.shape and info.change.shape == (3, 2)


def test_zero_iterations_give_the_unary():
    unary, potentials, _ = grid_model(41, 2, 3)
    log_q, info = run(unary, potentials, num_iterations=0)
    np.testing.assert_allclose(log_q, jax.nn.log_softmax(unary), atol=1e-6)
    assert info.change.shape == (0,)


def test_state_stays_in_log_space_for_huge_scores():
    unary, potentials, _ = grid_model(42, 2, 3, scale=300.0)
    log_q, info = run(1000 * unary, potentials)
    assert np.isfinite(log_q).all() and np.isfinite(info.change).all()
    np.testing.assert_allclose(np.exp(log_q).sum(-1), 1, atol=1e-5)


def test_bfloat16_unary_gives_a_float32_state():
    unary, potentials, _ = grid_model(43, 2, 3)
    half = jnp.asarray(unary, jnp.bfloat16)
    log_q, info = run(half, potentials)
    assert log_q.dtype == info.change.dtype == mean_field.init(half).dtype == jnp.float32
    np.testing.assert_allclose(log_q, run(half.astype(jnp.float32), potentials)[0], atol=1e-5)


def test_settings_are_a_pytree_of_weights_and_damping():
    unary, potentials, _ = grid_model(47, 2, 3)
    settings = Settings(weights=(0.5, 0.2), damping=0.3, num_iterations=2)
    leaves, tree = jax.tree.flatten(settings)
    assert leaves == [0.5, 0.2, 0.3] and jax.tree.unflatten(tree, leaves) == settings
    loss = lambda settings: jnp.sum(mean_field.run(unary, potentials, settings)[0][..., 0])
    grads = jax.grad(loss)(settings)  # a tree of `Settings`, whatever its numbers
    assert type(grads) is Settings and grads.num_iterations == 2 and all(jax.tree.leaves(grads))
    damping = jnp.array([0.0, 0.4])
    many = jax.vmap(lambda d: loss(Settings(damping=d)))(damping)
    np.testing.assert_allclose(many, [loss(Settings(damping=d)) for d in (0.0, 0.4)], rtol=1e-5)


def test_refused_arguments():
    unary, potentials, _ = grid_model(44, 2, 3)
    table = pw.to_table(potentials[0])
    for arguments, match in (
        (dict(potentials=[potentials[0], table]), "mix PairwiseTable and FactoredPairwise"),
        (dict(weights=[1.0]), "expected 2 weights, one a potential, got 1"),
        (dict(weights=jnp.ones(3)), "expected 2 weights, one a potential, got 3"),
        (dict(damping=1.0), r"damping must lie in \[0, 1\), got 1.0"),
        (dict(damping=-0.1), "damping must lie"),
        (dict(damping=1), "damping must lie"),
        (dict(unary=unary[..., :2]), "2 classes, a potential has 3"),
        (dict(unary=unary.reshape(6, 3)[:, :2], potentials=[table]), "2 classes, a potential has 3"),
        (dict(unary=unary.transpose(1, 0, 2)), r"unary grid is \(3, 2\), a potential's is \(2, 3\)"),
    ):
        given = dict(unary=unary, potentials=potentials) | arguments
        with pytest.raises(ValueError, match=match):
            mean_field.run(given.pop("unary"), given.pop("potentials"), Settings(**given))


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        (dict(num_iterations=-1), "at least 0, got -1"),
        (dict(algorithm="tables"), r"algorithm must be one of .*'tables'"),
        (dict(chunk_edges=0), "chunk_edges must be at least 1.*got 0"),
    ],
    ids=str,
)
def test_static_settings_are_refused_where_they_are_made(setting, match):
    with pytest.raises(ValueError, match=match):
        Settings(**setting)


def test_fields_by_name_are_those_of_settings():
    unary, (table,) = (
        jnp.array([[0.0, 2.0], [0.0, 0.0]]),
        [pw.PairwiseTable(jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), p=jnp.array([0]), q=jnp.array([1]))],
    )
    settings = pw.mean_field.Settings(weights=0.5, num_iterations=4, damping=0.25)
    for call in (pw.mean_field.run, lambda *args, **more: pw.mean_field.step(pw.mean_field.init(unary), *args, **more)):
        whole, by_name = call(unary, table, settings), call(unary, table, weights=0.5, num_iterations=4, damping=0.25)
        mixed = call(unary, table, pw.mean_field.Settings(weights=2.0, num_iterations=4, damping=0.25), weights=0.5)
        for other in (by_name, mixed):
            np.testing.assert_array_equal(whole[0], other[0])
    by_jit = jax.jit(lambda weight, damping: pw.mean_field.run(unary, table, weights=weight, damping=damping)[0])
    of = pw.mean_field.Settings(weights=0.5, damping=0.25)
    np.testing.assert_allclose(by_jit(0.5, 0.25), pw.mean_field.run(unary, table, of)[0], rtol=1e-6)
    assert jnp.isfinite(jax.grad(lambda weight: by_jit(weight, 0.25)[1, 1])(0.5))
    labels, weak = jnp.array([1, 0]), pw.mean_field.Settings(weights=0.5)
    for objective in (pw.pseudo_log_likelihood, pw.unrolled_log_likelihood, pw.exact_log_likelihood):
        assert objective(unary, table, labels, weights=0.5) == objective(unary, table, labels, weak)
        assert objective(unary, table, labels, weights=0.5) != objective(unary, table, labels)
    with pytest.raises(TypeError, match="'iterations' is no field of mean_field.Settings; it has num_iterations"):
        pw.mean_field.run(unary, table, iterations=3)
