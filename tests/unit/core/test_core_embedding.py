"""The core in other people's programs: their meshes, their strictness, their lists and mappings, no compiling twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import full_but, full_row
from test_core_transforms import BOX, CASES, MORE, H, K, M, W, inputs, nodes, table

import pwcrf_jax as pw
from pwcrf_jax import mean_field, metrics, objectives, piecewise
from pwcrf_jax.mean_field import Settings
from reference import random_problems

PARTS = ("hidden_p", "hidden_q", "kernel", "bias")
# What belongs to the dense CRF has its own.
OWN = [
    name
    for name in CASES
    if not name.startswith(("build", "apply", "prepare-", "exact", "spatial", "pair-", "pixel", "refine"))
    and name not in ("prepare", "pair")
]
OWN += ["exact_log_likelihood"]
each = pytest.mark.parametrize("name", [full_row(name) if name in MORE else name for name in OWN])


def equal(got, expected, atol=1e-5):
    """atol: of the largest entry, where that is above 1, as sums of large terms round by it."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        scale = max(1.0, np.abs(other[np.isfinite(other)]).max(initial=0.0))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol * scale)


# --- strictness ------------------------------------------------------------------------------------


@pytest.fixture
def strict():
    """What is compiled in here once serves all tests that are strict, here and below."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@each
def test_no_promotion_is_left_to_jax(name, strict):
    CASES[name](inputs(101))


def batch(seed, dtype=np.float32, count=2):
    x = random_problems.grid_problem(seed, H, W, K, M, batch=(count,))
    rng = np.random.default_rng(seed)
    arrays = {name: jnp.asarray(getattr(x, name), dtype) for name in ("unary", *PARTS, "unary_log_probs")}
    labels = np.where(rng.random((count, H, W)) < 0.2, 255, x.labels)
    return arrays | dict(labels=jnp.asarray(labels, jnp.int32), mask=jnp.asarray(rng.random((count, H, W)) > 0.2))


def potential(v):
    return pw.factored_pairwise(*(v[name] for name in PARTS), BOX, v["unary_log_probs"])


def of_graph(v):
    """The same as a graph: unary, potential, and what brings maps into the shape of its nodes."""
    at_nodes = lambda x: x.reshape(x.shape[0], H * W, *x.shape[3:])
    return at_nodes(v["unary"]), pw.to_table(potential(v)), at_nodes


def graph_marginals(v):
    unary, edges, at_nodes = of_graph(v)
    return mean_field.run(unary, edges, Settings(num_iterations=2), node_mask=at_nodes(v["mask"]))


weights_of = lambda v: pw.balance_weights(v["labels"], K, power=0.5)
of = lambda **changes: Settings(**dict(num_iterations=2, weights=0.5, damping=0.2) | changes)
run = lambda v, **changes: mean_field.run(v["unary"], potential(v), of(**changes), node_mask=v["mask"])
BATCHED = {
    "unary": lambda v: pw.unary_log_likelihood(v["unary"], v["labels"], node_weights=weights_of(v)),
    "pairs": lambda v: pw.pairwise_log_likelihood(
        potential(v), v["labels"], node_weights=weights_of(v), chunk_edges=30
    ),
    "sampled": lambda v: pw.pairwise_log_likelihood(
        potential(v), v["labels"], sample=pw.sample_offsets(jax.random.key(0), len(BOX), 3)
    ),
    "pairs-graph": lambda v: pw.pairwise_log_likelihood(of_graph(v)[1], of_graph(v)[2](v["labels"])),
    "pseudo": lambda v: pw.pseudo_log_likelihood(
        v["unary"], potential(v), v["labels"], of(average_messages=True, algorithm="factored")
    ),
    "unrolled": lambda v: pw.unrolled_log_likelihood(v["unary"], potential(v), v["labels"], of(average_messages=True)),
    "run-factored": lambda v: run(v, algorithm="factored", average_messages=True),
    "run-table": lambda v: run(v, algorithm="table"),
    "run-graph": graph_marginals,
    "step": lambda v: mean_field.step(
        mean_field.init(v["unary_log_probs"]), v["unary"], [potential(v)], of(algorithm="factored")
    ),
    "messages": lambda v: pw.compute_messages(
        potential(v), jax.nn.softmax(v["unary"]), node_mask=v["mask"], chunk_edges=30
    ),
    "messages-stored": lambda v: pw.compute_messages(
        pw.prepare_messages(potential(v), 2, algorithm="table"), jax.nn.softmax(v["unary"]), node_mask=v["mask"]
    ),
    "messages-no-mask": lambda v: pw.compute_messages(potential(v), jax.nn.softmax(v["unary"])),
    "to_table": lambda v: pw.to_table(potential(v)).scores,
    "prepare_messages": lambda v: pw.prepare_messages(potential(v), 2, algorithm="table").scores,
    "init": lambda v: mean_field.init(v["unary"]),
}
OF_LABELS = {
    "balance_weights": weights_of,
    "grid_labels": lambda v: pw.grid_labels(v["labels"], 2, 2),
    "boundary_band": lambda v: metrics.boundary_band(v["labels"], 1, v["mask"]),
    "confusion_matrix": lambda v: pw.confusion_matrix(jnp.argmax(v["unary"], -1), v["labels"], K),
}


def gradient(function):
    floats = lambda v: {k: x for k, x in v.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    number = lambda x: sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(x))
    return lambda v: jax.grad(lambda f: number(function(v | f)))(floats(v))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BATCHED)
def test_no_promotion_is_left_to_jax_in_gradients_of_batches(name, dtype, strict):
    jax.eval_shape(gradient(BATCHED[name]), batch(102, dtype))  # which traces: promotion is refused there


@pytest.mark.full
@pytest.mark.parametrize("name", BATCHED)
def test_gradients_of_batches_in_bfloat16_are_finite(name):
    got = jax.jit(gradient(BATCHED[name]))(batch(102, jnp.bfloat16))
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(got))


# --- meshes ----------------------------------------------------------------------------------------


def laid_out(v, mesh, *axes):
    """Batches over the mesh, parameters on all of it."""
    spec = lambda name: jax.P() if name in ("kernel", "bias") else jax.P(*axes)
    return {name: jax.device_put(x, jax.NamedSharding(mesh, spec(name))) for name, x in v.items()}


ALL = (*BATCHED, *OF_LABELS)
OF_ROWS = ("unary", "balance_weights", "confusion_matrix", "grid_labels", "boundary_band", "init")
KEPT = ("sampled", "pairs-graph", "unrolled", "messages", "balance_weights", "boundary_band")


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        *full_but([(("data",), name) for name in ALL], *((("data",), name) for name in KEPT)),
        *full_but([((("data", "model"),), name) for name in ALL], ((("data", "model"),), "pairs")),
        *full_but(
            [((None, "data"), name) for name in OF_ROWS], *(((None, "data"), x) for x in ("unary", "grid_labels"))
        ),
    ],
    ids=str,
)
def test_batches_lie_on_meshes_of_explicit_axes(name, axes):
    function, v = (BATCHED | OF_LABELS)[name], batch(103, count=4)
    if axes == (None, "data"):  # rows of the map
        v = {k: x[:, :2] if x.ndim > 2 and k != "kernel" else x for k, x in v.items()}
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    on_mesh = laid_out(v, mesh, *axes)
    expected = function(v)
    got = function(on_mesh)
    equal(got, expected)
    equal(jax.jit(function)(on_mesh), expected)
    if axes[0] is not None:
        for leaf in jax.tree.leaves(got):
            if 4 in leaf.shape[:1] and name != "confusion_matrix":  # images, which are 4, as nothing else is in front
                assert tuple(jax.typeof(leaf).sharding.spec)[0] == axes[0]
            if name.startswith("run") and leaf.ndim == 2:
                assert tuple(jax.typeof(leaf).sharding.spec) == (None, axes[0])  # changes of each iteration
    if name in BATCHED:
        expected = gradient(function)(v)
        with jax.set_mesh(mesh):
            equal(jax.jit(gradient(function))(on_mesh), expected, 1e-4)


@pytest.mark.parametrize(
    "name",
    full_but(["unary", "pairs", "sampled", "pseudo", "unrolled", "run-factored", "run-table"], "sampled", "unrolled"),
)
def test_devices_map_over_images_with_shard_map(name):
    """With its own checks on: parameters that all devices share, loops whose carry begins as zeros."""
    v = batch(104, count=2)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {key: jax.P() if key in ("kernel", "bias") else jax.P("data") for key in v}
    number = lambda v: jax.tree.leaves(BATCHED[name](v))[0].sum()

    def of_device(v):
        value, change = jax.value_and_grad(lambda kernel: number(v | {"kernel": kernel}))(v["kernel"])
        return jax.lax.psum(value, "data"), change  # of shared parameters JAX sums by itself

    got = jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=(specs,), out_specs=(jax.P(), jax.P())))(v)
    equal(got, jax.value_and_grad(lambda kernel: number(v | {"kernel": kernel}))(v["kernel"]), 1e-5)


# --- lists, mappings, one of a kind ----------------------------------------------------------------


TAKING_POTENTIALS = {
    "run": lambda v, p, w: mean_field.run(v["unary"], p, Settings(num_iterations=2, weights=w)),
    "step": lambda v, p, w: mean_field.step(mean_field.init(v["unary"]), v["unary"], p, Settings(weights=w)),
    "pseudo": lambda v, p, w: objectives.pseudo_log_likelihood(v["unary"], p, v["labels"], Settings(weights=w)),
    "unrolled": lambda v, p, w: objectives.unrolled_log_likelihood(
        v["unary"], p, v["labels"], Settings(num_iterations=2, weights=w)
    ),
    "exact": lambda v, p, w: objectives.exact_log_likelihood(
        v["unary"][0, :2, :2],
        jax.tree.map(corner, p, is_leaf=is_potential),
        v["labels"][0, :2, :2],
        Settings(weights=w),
    ),
}


@pytest.mark.parametrize("name", full_but(TAKING_POTENTIALS, "run", "pseudo"))
def test_potentials_and_weights_come_in_any_form(name):
    call = TAKING_POTENTIALS[name]
    v = batch(104)
    one, other = potential(v), potential(batch(105))
    both = call(v, [one, other], [0.5, 0.25])
    mapping = {"a": one, "b": other}
    for potentials, weights in [
        ((one, other), (0.5, 0.25)),
        ([one, other], np.float64([0.5, 0.25])),
        ((one, other), jnp.array([0.5, 0.25], jnp.bfloat16)),
        (mapping, [0.5, 0.25]),
        (mapping, {"b": 0.25, "a": 0.5}),
        (mapping, {"a": np.float32(0.5), "b": jnp.float32(0.25)}),
    ]:
        equal(call(v, potentials, weights), both)
    same = call(v, [one, other], [0.5, 0.5])
    for weight in (0.5, np.float32(0.5), jnp.float32(0.5), np.array(0.5)):
        equal(call(v, mapping, weight), same)
    alone = call(v, [one], [2.0])
    for potentials, weights in [(one, 2), (one, [2]), ({"a": one}, {"a": 2.0}), ((one,), jnp.array([2]))]:
        equal(call(v, potentials, weights), alone)
    for weights in ({"a": 1.0}, {"a": 1.0, "c": 2.0}, {"a": 1, "b": 2, "c": 3}):
        with pytest.raises(ValueError, match=r"of the potentials' names \['a', 'b'\], got those of"):
            call(v, mapping, weights)
    with pytest.raises(ValueError, match="one a potential, in order"):
        call(v, [one, other], {"a": 1.0, "b": 2.0})


def is_potential(x):
    return isinstance(x, pw.FactoredPairwise)


def corner(p):
    return pw.factored_pairwise(p.hidden_p[0, :2, :2], p.hidden_q[0, :2, :2], p.kernel, p.bias, ((0, 1), (1, 0)))


def test_arrays_may_be_nested_lists():
    listed = lambda v: jax.tree.map(lambda x: x.tolist(), v)
    v = batch(106)
    scores, mask = listed(v["unary"]), listed(v["mask"])
    p = pw.factored_pairwise(*(listed(v[n]) for n in PARTS), BOX.tolist(), listed(v["unary_log_probs"]))
    expected = mean_field.run(v["unary"], potential(v), node_mask=v["mask"])
    equal(mean_field.run(scores, p, node_mask=mask), expected)
    weights = weights_of(v)
    got = piecewise.unary_log_likelihood(scores, v["labels"], node_weights=listed(weights))
    equal(got, piecewise.unary_log_likelihood(v["unary"], v["labels"], node_weights=weights))
    edges = pw.PairwiseTable([[[1.0, 0.0], [0.0, 2.0]]], [0], [1])
    assert pw.compute_messages(edges, [[1.0, 0.0], [0.5, 0.5]])[0].tolist() == [[0.5, 1.0], [1.0, 0.0]]
    assert pw.pairwise_log_likelihood(edges, (1, 1))[1] == 1


@pytest.mark.parametrize("yes", [1, np.bool_(True), np.array(True), jnp.bool_(True)], ids=lambda x: type(x).__name__)
def test_any_truth_says_whether_to_average(yes):
    """A static setting, which arrays cannot be."""
    v = batch(112)
    call = lambda yes: mean_field.run(v["unary"], potential(v), Settings(num_iterations=1, average_messages=yes))
    equal(call(yes), call(True))


@pytest.mark.parametrize("wrong", ["surrounding", None, 3.0, np.zeros(3)], ids=repr)
def test_what_is_no_potential_is_named(wrong):
    v = batch(107)
    with pytest.raises(TypeError, match=f"PairwiseTable or FactoredPairwise or GridScores, got {type(wrong).__name__}"):
        mean_field.run(v["unary"], [potential(v), wrong])


# --- compiling -------------------------------------------------------------------------------------

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: COMPILED.append(name) if "backend_compile" in name else None
)


def test_the_counter_counts():
    COMPILED.clear()
    jax.jit(lambda x: x * 3 + 7)(jnp.arange(13)).block_until_ready()
    assert COMPILED


@each
def test_a_second_call_compiles_nothing(name, strict):
    first, second = inputs(108), inputs(109)
    CASES[name](first)
    COMPILED.clear()
    jax.block_until_ready(CASES[name](second))
    assert not COMPILED


@pytest.mark.parametrize(
    "name",
    full_but([n for n in BATCHED if n not in ("init", "to_table")], "pairs", "pseudo", "run-factored", "messages"),
)
def test_a_second_gradient_compiles_nothing(name):
    first, second = batch(110), batch(111)
    gradient(BATCHED[name])(first)
    COMPILED.clear()
    jax.block_until_ready(gradient(BATCHED[name])(second))
    assert not COMPILED


def test_other_numbers_compile_nothing():
    v = batch(112)
    edges = table(inputs(113))
    calls = [
        lambda x: mean_field.run(v["unary"], potential(v), Settings(weights=[x], damping=x)),
        lambda x: mean_field.run(v["unary"], [potential(v)] * 2, Settings(weights=x, damping=x)),
        lambda x: mean_field.run(nodes(inputs(113), "unary"), {"a": edges}, Settings(weights={"a": x}, damping=x)),
        lambda x: mean_field.step(
            mean_field.init(v["unary"]), v["unary"], potential(v), Settings(weights=x, damping=x)
        ),
        lambda x: objectives.unrolled_log_likelihood(
            v["unary"], potential(v), v["labels"], Settings(weights=x, damping=x)
        ),
        lambda x: objectives.pseudo_log_likelihood(v["unary"], potential(v), v["labels"], Settings(weights=x)),
        lambda x: piecewise.balance_weights(v["labels"], K, power=x),
    ]
    for call in calls:
        one = call(0.25)
        COMPILED.clear()
        other = call(0.75)
        assert not COMPILED
        pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
        assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs)
