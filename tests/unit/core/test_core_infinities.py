"""NaN and infinities of masked and void nodes reach no others; scores of minus infinity rule out a label, or a pair."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import full_but

import pwcrf_jax as pw
from pwcrf_jax import mean_field
from pwcrf_jax.mean_field import Settings
from reference import crf_oracle, random_problems

H, W, K = 3, 4, 3
BOXES = (pw.offsets(pw.SURROUNDING, H, W), pw.offsets(pw.ABOVE_BELOW, H, W))
MASK = np.ones((H, W), bool)
MASK[1, 1] = MASK[0, 3] = False
LABELS = np.where(MASK, random_problems.grid_problem(95, H, W, K).labels, 255)
WEIGHTS = np.float32([0.3, 0.5])
OF_NODES = ("unary", "hidden_p", "hidden_q", "unary_log_probs")
PARTS = ("hidden_p", "hidden_q", "kernel", "bias")
ALGORITHMS = ("factored", "table", "auto", "graph")
algorithms = pytest.mark.parametrize("algorithm", full_but(ALGORITHMS, "factored", "table"))
GARBAGE = {
    "nan": np.nan,
    "inf": np.inf,
    "-inf": -np.inf,
    "mixed": np.where(np.arange(5) % 2, np.nan, np.inf),
}
garbage = pytest.mark.parametrize("held", GARBAGE)


def parts(held=None, seed=95):
    """Arrays of a model; what masked nodes hold is replaced by `held`."""
    x = random_problems.grid_problem(seed, H, W, K, 5)
    arrays = {name: jnp.asarray(getattr(x, name)) for name in (*OF_NODES, "kernel", "bias")}
    if held is not None:
        fill = lambda v: jnp.where(MASK[..., None], v, np.broadcast_to(GARBAGE[held], 5)[: v.shape[-1]])
        arrays |= {name: fill(arrays[name]) for name in OF_NODES}
    return arrays


def make(v, algorithm):
    """(unary, potentials, algorithm, what brings a map into the shape of the nodes)."""
    parts = [v[name] for name in PARTS]
    potentials = [pw.factored_pairwise(*parts, box, v["unary_log_probs"]) for box in BOXES]
    if algorithm != "graph":
        return v["unary"], potentials, algorithm, lambda x: x
    return v["unary"].reshape(-1, K), [pw.to_table(p) for p in potentials], "auto", lambda x: x.reshape(-1)


def infer(v, weights, damping, algorithm, mask=MASK, **changes):
    unary, potentials, algorithm, nodes = make(v, algorithm)
    mask = None if mask is None else nodes(mask)
    of = dict(num_iterations=2, weights=weights, damping=damping, average_messages=True, algorithm=algorithm)
    log_q, info = mean_field.run(unary, potentials, Settings(**of | changes), node_mask=mask)
    return log_q.reshape(H, W, K), info.change


OBJECTIVES = {
    "unary": lambda v, w, algorithm: pw.unary_log_likelihood(v["unary"], LABELS),
    "pairs": lambda v, w, algorithm: of_pairs(v, algorithm),
    "pseudo": lambda v, w, algorithm: of_model(pw.pseudo_log_likelihood, v, w, algorithm),
    "unrolled": lambda v, w, algorithm: of_model(pw.unrolled_log_likelihood, v, w, algorithm, node_mask=MASK),
}


def of_pairs(v, algorithm):
    _, potentials, _, nodes = make(v, algorithm)
    terms = [pw.pairwise_log_likelihood(p, nodes(LABELS)) for p in potentials]
    return jax.tree.map(lambda *x: sum(x), *terms)


def of_model(objective, v, weights, algorithm, **masks):
    unary, potentials, algorithm, nodes = make(v, algorithm)
    masks = {name: nodes(mask) for name, mask in masks.items()}
    return objective(unary, potentials, nodes(LABELS), Settings(weights=weights, algorithm=algorithm), **masks)


def equal(got, expected, atol=1e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol)


# Programs are compiled once for all rows of a test: these have other values, not other shapes.
@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
def of_marginals(v, weights, damping, algorithm):
    log_q, change = infer(v, weights, damping, algorithm)
    return jnp.sum(jnp.where(MASK[..., None], jnp.exp(log_q), 0.0) * jnp.arange(K)), (log_q[MASK], change)


@garbage
@algorithms
def test_what_masked_nodes_hold_reaches_no_marginal_and_no_gradient(algorithm, held):
    got, expected = (of_marginals(parts(h), WEIGHTS, jnp.float32(0.25), algorithm) for h in (held, None))
    equal(got, expected)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(got))


@functools.partial(jax.jit, static_argnums=(2, 3))
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def of_objective(v, weights, name, algorithm):
    return OBJECTIVES[name](v, weights, algorithm)


@garbage
@pytest.mark.parametrize(
    ("name", "algorithm"),
    [("unary", "factored"), ("pairs", "factored"), ("pairs", "graph")]
    + full_but(
        [(name, algorithm) for name in ("pseudo", "unrolled") for algorithm in ("factored", "table", "graph")],
        ("pseudo", "factored"),
        ("unrolled", "table"),
    ),
)
def test_what_void_nodes_hold_reaches_no_likelihood_and_no_gradient(algorithm, name, held):
    got, expected = (of_objective(parts(h), WEIGHTS, name, algorithm) for h in (held, None))
    equal(got[0], expected[0])
    of_void = lambda g: {k: x[MASK] if k in OF_NODES else x for k, x in g.items()}
    equal(of_void(got[1][0]), of_void(expected[1][0]), 1e-4)
    equal(got[1][1], expected[1][1])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(got))


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def of_messages(q, kernel, v, prepared_with_mask):
    mask = MASK if prepared_with_mask else None
    stored = pw.prepare_messages(make(v | {"kernel": kernel}, "table")[1][0], 1, algorithm="table", node_mask=mask)
    sent = pw.compute_messages(stored, jnp.where(MASK[..., None], q, jnp.nan), node_mask=MASK)
    return jnp.sum(sent[0] ** 2), sent


@garbage
@pytest.mark.parametrize("prepared_with_mask", full_but([False, True], True))
def test_messages_of_stored_scores_hide_what_masked_nodes_hold(held, prepared_with_mask):
    q, kernel = jax.nn.softmax(parts()["unary"]), parts()["kernel"]
    got, expected = (of_messages(q, kernel, parts(h), prepared_with_mask) for h in (held, None))
    equal(got[0][1], expected[0][1])
    equal(got[1], expected[1], 1e-4)


def ruled_out(v, *labels):
    """A label ruled out everywhere, others at single nodes."""
    unary = v["unary"].at[..., labels[0]].set(-jnp.inf)
    for i, label in enumerate(labels[1:]):
        unary = unary.at[i, i, label].set(-jnp.inf)
    return v | {"unary": unary}


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
def without_mask(v, weights, damping, algorithm):
    log_q, change = infer(v, weights, damping, algorithm, mask=None)
    return jnp.sum(jnp.exp(log_q) * jnp.arange(K) ** 2), (log_q, change)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("labels", [(2,), (0,), (1, 0), (1, 2, 0)], ids=str)
@algorithms
def test_a_label_ruled_out_has_marginal_0(algorithm, labels, damping):
    v = ruled_out(parts(), *labels)
    low = v | {"unary": jnp.maximum(v["unary"], -1e4)}
    (got, (log_q, change)), grads = without_mask(v, WEIGHTS, jnp.float32(damping), algorithm)
    (expected, (low_q, low_change)), low_grads = without_mask(low, WEIGHTS, jnp.float32(damping), algorithm)
    out = np.isneginf(v["unary"])
    np.testing.assert_array_equal(np.isneginf(log_q), out)
    equal((got, log_q[~out], change), (expected, low_q[~out], low_change))
    equal(grads, low_grads, 1e-4)
    # And not by way of an oracle alone that has the same number in it.
    unary, relations = np.asarray(low["unary"], np.float64).reshape(-1, K), []
    for box in BOXES:
        relations.append(crf_oracle.grid_edges(*(np.asarray(v[n], np.float64) for n in PARTS), box))
    oracle, _ = crf_oracle.mean_field(unary, relations, 2, weights=WEIGHTS, damping=damping, normalize=True)
    np.testing.assert_allclose(np.exp(log_q), np.exp(oracle).reshape(H, W, K), atol=1e-4)


@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def of_all(v, weights, algorithm):
    log_q = infer(v, weights, 0.0, algorithm)[0]
    return jnp.sum(jnp.exp(log_q)[MASK] * jnp.arange(K)), log_q


@pytest.mark.parametrize("pairs", [[(0, 0)], [(2, 1)], [(0, 1), (1, 0)], [(0, 0), (1, 1), (2, 2)]], ids=str)
@algorithms
def test_a_pair_ruled_out_makes_no_nan(algorithm, pairs):
    """A class that meets a forbidden partner of probability above 0 is ruled out; of probability 0, it is not."""
    at = tuple(np.transpose(pairs))
    v = parts()
    v |= {"bias": v["bias"].at[at].set(-jnp.inf)}
    (value, _), grads = of_all(v, WEIGHTS, algorithm)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    # Where the partner's label is ruled out too, forbidding its pairs changes nothing.
    silent = ruled_out(parts(), 2)
    for pair in [(2, 0), (0, 2), (1, 2), (2, 2)]:
        forbidden = silent | {"bias": silent["bias"].at[pair].set(-jnp.inf)}
        got, expected = (of_all(v, WEIGHTS, algorithm)[0][1][..., :2] for v in (forbidden, silent))
        equal(got, expected, 1e-4)


@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jax.value_and_grad, has_aux=True)
def of_labels(v, labels, algorithm):
    _, potentials, _, nodes = make(v, algorithm)
    return pw.pairwise_log_likelihood(potentials[0], nodes(labels))


@pytest.mark.parametrize("dtype", full_but(map(jnp.dtype, ("float16", "bfloat16")), jnp.dtype("float16")), ids=str)
@algorithms
def test_a_pair_ruled_out_in_half_precision_is_ruled_out(algorithm, dtype):
    """float16 has no room for `RULED_OUT`: it became -inf again."""
    v = ruled_out({name: x.astype(dtype) for name, x in parts().items()}, 2)
    v |= {"bias": v["bias"].at[0, 1].set(-jnp.inf)}
    unary, potentials, algorithm, _ = make(v, algorithm)
    if isinstance(potentials[0], pw.PairwiseTable):
        potentials = [p._replace(scores=p.scores.astype(dtype)) for p in potentials]

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True, allow_int=True)
    def loss(unary, potentials, algorithm):
        settings = Settings(num_iterations=2, weights=WEIGHTS, average_messages=True, algorithm=algorithm)
        q = jnp.exp(mean_field.run(unary, potentials, settings)[0])
        return jnp.sum(q * jnp.arange(K)), q

    (_, got), grads = loss(unary, potentials, algorithm)
    assert all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(grads) if x.dtype == dtype)
    widen = lambda x: x.astype(jnp.float32) if x.dtype == dtype else x
    (_, expected), _ = loss(*jax.tree.map(widen, (unary, potentials)), algorithm)
    assert float(jnp.max(jnp.abs(got - expected))) < 0.1 and not got[..., 2].any()


@pytest.mark.parametrize("pair", [(0, 0), (2, 1), (1, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("algorithm", ["factored", "graph"])
def test_a_pair_ruled_out_has_likelihood_0(algorithm, pair):
    v = parts()
    v |= {"bias": v["bias"].at[pair].set(-jnp.inf)}
    low = v | {"bias": v["bias"].at[pair].set(-1e4)}
    other = ({0, 1, 2} - set(pair)).pop()
    fine = np.where(MASK, other, 255)
    equal(of_labels(v, fine, algorithm), of_labels(low, fine, algorithm), 1e-4)
    for p, q in (((0, 0), (0, 1)), ((2, 2), (1, 2))):  # neighbours in both directions
        truth = fine.copy()
        truth[p], truth[q] = pair
        (total, count), _ = of_labels(v, truth, algorithm)
        assert total == -np.inf and count > 0


@pytest.mark.parametrize("average", full_but([False, True], True))
@pytest.mark.parametrize("masked", full_but([False, True], True))
@algorithms
def test_a_node_without_any_label_left_is_as_a_masked_one(algorithm, masked, average):
    mask = MASK if masked else np.ones((H, W), bool)
    without = mask.copy()
    without[2, 1] = False
    v = parts()
    v |= {"unary": v["unary"].at[2, 1].set(-jnp.inf)}

    @functools.partial(jax.jit, static_argnums=3)
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(v, weights, mask, algorithm):
        log_q, change = infer(v, weights, 0.0, algorithm, mask, num_iterations=3, average_messages=average)
        return jnp.sum(log_q[without] ** 2), (log_q, change)

    (_, (log_q, change)), grads = loss(v, WEIGHTS, mask if masked else None, algorithm)
    (_, (expected, expected_change)), _ = loss(parts(), WEIGHTS, without, algorithm)
    assert np.isnan(log_q[2, 1]).all()
    equal((log_q[without], change), (expected[without], expected_change))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_nan_that_no_mask_hides_is_not_swept_under():
    v = parts()
    v |= {"unary": v["unary"].at[2, 1, 0].set(jnp.nan)}
    for algorithm in ("factored", "table"):
        assert np.isnan(infer(v, WEIGHTS, 0.0, algorithm, None)[0]).sum() > K


@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_step_takes_states_with_zeros(damping):
    """From certain marginals: log 0 in the state."""
    v = parts()
    unary, potentials, _, _ = make(v, "factored")
    state = jnp.where(jax.nn.one_hot(np.arange(H * W).reshape(H, W) % K, K) > 0, 0.0, -jnp.inf)
    settings = Settings(weights=WEIGHTS, damping=damping)
    got, change = mean_field.step(state, unary, potentials, settings)
    expected, expected_change = mean_field.step(jnp.maximum(state, -1e6), unary, potentials, settings)
    np.testing.assert_allclose(np.exp(got), np.exp(expected), atol=1e-6)
    np.testing.assert_allclose(change, expected_change, atol=1e-6)
    assert np.isneginf(got).any() == (damping > 0)


@pytest.mark.parametrize("weights", [None, [0.0], [0.7], 0.5])
def test_exact_likelihood_with_labels_and_pairs_ruled_out(weights):
    unary = jnp.array([[0.3, -jnp.inf, 1.0], [0.1, 0.2, -0.4]])
    table = pw.PairwiseTable(jnp.zeros((1, 3, 3)).at[0, 0, 0].set(-jnp.inf), np.array([0]), np.array([1]))
    low = [jnp.maximum(x, -1e5) for x in (unary, table.scores)]

    def value(unary, scores, weights):
        settings = Settings(weights=weights)
        return pw.exact_log_likelihood(unary, table._replace(scores=scores), np.array([2, 255]), settings)[0]

    got = jax.value_and_grad(value, argnums=(0, 1))(unary, table.scores, weights)
    equal(got, jax.value_and_grad(value, argnums=(0, 1))(*low, weights))
    if weights is not None:
        assert np.isfinite(jax.grad(value, argnums=2)(unary, table.scores, jnp.asarray(weights)).all())
