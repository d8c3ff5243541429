"""The plan of memory and multiply-adds: against XLA's own figures, and against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from rows import full_but

from pwcrf_jax.mean_field import Settings
from pwcrf_jax.model import plan as planning
from pwcrf_jax.model.jaxprs import multiply_adds
from pwcrf_jax.model.plan import plan
from pwcrf_jax.model.segmenter import Segmenter
from pwcrf_jax.nets import FeatMapNet
from pwcrf_jax.relations import ABOVE_BELOW, SURROUNDING, offsets

PLAIN = {"scales": (1.0,), "block6": (), "pyramid_windows": ()}
CASES = {
    "tiny": ({"backbone": "tiny", **PLAIN}, (192, 256), 1),
    "tiny, two images": ({"backbone": "tiny", **PLAIN}, (192, 256), 2),
    "mobilenet_v2": ({"backbone": "mobilenet_v2", "scales": (1.0,), "block6": ((3, 192),)}, (240, 320), 4),
    "vgg16 of two scales": ({"backbone": "vgg16", "scales": (1.0, 0.5), "block6": ((3, 512),)}, (192, 256), 2),
}
FORWARD = ("features", "unary head", "first layers surrounding", "first layers above_below")


@pytest.fixture(autouse=True)
def quick_compilation():
    """Full optimisation: the numbers are the compiler's."""


def segmenter(featmap=None, relations=(SURROUNDING, ABOVE_BELOW), **settings):
    boxes = {r.name: offsets(r, 12, 16) for r in relations}
    return Segmenter(11, featmap or {"backbone": "tiny", **PLAIN}, boxes, hidden=64, **settings)


def near(ours, theirs):
    return abs(ours - theirs) < 0.2 * theirs


def shapes(model, size, batch):
    images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"], images


def compiled(fn, *arguments):
    return jax.jit(fn).lower(*arguments).compile()


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def count(fn, *sizes):
    return multiply_adds(jax.make_jaxpr(fn)(*(shape(*size) for size in sizes)))


# --- against XLA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", full_but(CASES, "tiny, two images"))
def test_nets_are_as_xla_has_them(name):
    featmap, size, batch = CASES[name]
    model = segmenter(featmap)
    params, images = shapes(model, size, batch)
    planned = plan(model, size, batch)
    scores = lambda p, x: jax.tree.leaves(model.apply({"params": p}, x))
    flops = jax.jit(scores).lower(params, images).cost_analysis()["flops"]
    assert near(sum(planned[row].multiply_adds for row in FORWARD), flops / 2)

    gradient = compiled(jax.grad(lambda p, x: sum(jnp.sum(y**2) for y in scores(p, x))), params, images)
    flops = gradient.cost_analysis()["flops"]
    assert near(sum(planned[row].multiply_adds for row in (*FORWARD, "backward pass")), flops / 2)
    memory = gradient.memory_analysis()
    assert near(planned["parameters"].bytes, memory.argument_size_in_bytes - images.size)
    assert near(planned["gradients"].bytes, memory.output_size_in_bytes)
    temporaries = sum(planned[row].bytes for row in ("activations", "potentials", "largest layer"))
    assert near(temporaries, memory.temp_size_in_bytes)


@pytest.mark.full
def test_training_step_and_inference_are_as_xla_has_them():
    optax = pytest.importorskip("optax")
    from pwcrf_jax import mean_field
    from pwcrf_jax.model import losses
    from pwcrf_jax.runtime import parallel
    from pwcrf_jax.training import steps

    model, size, batch, optimizer = segmenter(), (192, 256), 4, optax.adam(1e-3)
    params, images = shapes(model, size, batch)
    planned = plan(model, size, batch, optimizer=optimizer)
    state = steps.TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
    step = parallel.pmap_train(steps.make_train_step(model, optimizer, losses.Piecewise()), jax.devices()[:1])
    data = {"image": (1, *images.shape), "label": (1, *images.shape[:-1])}
    data = {key: jax.ShapeDtypeStruct(value, jnp.uint8) for key, value in data.items()}
    memory = step.lower(state, data).compile().memory_analysis()
    # The state is donated: its output lies where its input was.
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert near(planned["training step"].bytes, used)

    def infer(params, images):
        potentials = model.apply({"params": params}, images)
        return mean_field.run(potentials.unary, list(potentials.pairwise.values()))[0]

    memory = compiled(infer, params, images).memory_analysis()
    assert near(planned["inference"].bytes, memory.argument_size_in_bytes + memory.temp_size_in_bytes)


# --- counts by hand --------------------------------------------------------------------------------


def test_products_by_hand():
    assert count(jnp.dot, (2, 3), (3, 4)) == 2 * 3 * 4
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (5, 2, 3), (5, 3, 4)) == 5 * 2 * 3 * 4
    assert count(lambda a: jnp.sum(a * a + a), (6, 7)) == 6 * 7


def convolve(**settings):
    spec = ("NHWC", "HWIO", "NHWC")
    settings = {"window_strides": (1, 1), "padding": "SAME", **settings}
    return lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, dimension_numbers=spec, **settings)


@pytest.mark.parametrize(
    "settings, sizes, expected",
    [
        (dict(padding="VALID"), [(2, 5, 6, 3), (3, 3, 3, 4)], 2 * (3 * 4) * 9 * 3 * 4),
        # Of 3 taps at 5 places, the first and the last place miss one each: 13; at 6 places 16.
        ({}, [(2, 5, 6, 3), (3, 3, 3, 4)], 2 * (13 * 16) * 3 * 4),
        (dict(feature_group_count=2), [(1, 5, 6, 4), (3, 3, 2, 6)], (13 * 16) * 2 * 6),
        (dict(feature_group_count=4), [(1, 5, 6, 4), (3, 3, 1, 4)], (13 * 16) * 4),
        # Every second place of 5, padded 1 at both ends: 2 + 3 + 2; of 6, padded at the end: 3 + 3 + 2.
        (dict(window_strides=(2, 2)), [(1, 5, 6, 3), (3, 3, 3, 4)], (7 * 8) * 3 * 4),
        # Taps two apart: 5 places see 2, 2, 3, 2, 2; 6 see 2, 2, 3, 3, 2, 2.
        (dict(rhs_dilation=(2, 2)), [(1, 5, 6, 3), (3, 3, 3, 4)], (11 * 14) * 3 * 4),
    ],
    ids=["valid", "same", "two groups", "depthwise", "strided", "dilated"],
)
def test_convolutions_by_hand(settings, sizes, expected):
    apply = convolve(**settings)
    assert count(apply, *sizes) == expected
    # The gradients of kernel and input pair the same places and taps.
    out = jax.eval_shape(apply, *(shape(*size) for size in sizes)).shape
    pull = lambda x, kernel: jax.vjp(apply, x, kernel)[1](jnp.ones(out))
    assert count(pull, *sizes) == 3 * expected


def test_loops_and_calls_by_hand():
    product = lambda x, w: x @ w
    one = 2 * 3 * 3
    assert count(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0], (2, 3), (3, 3)) == 5 * one
    assert count(jax.jit(jax.checkpoint(product)), (2, 3), (3, 3)) == one
    twice = lambda x, w: jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w @ w, lambda: x @ w)
    assert count(twice, (2, 3), (3, 3)) == 2 * one
    own = jax.custom_jvp(product)
    own.defjvp(lambda primals, tangents: (own(*primals), tangents[0] @ primals[1]))
    assert count(own, (2, 3), (3, 3)) == one
    own = jax.custom_vjp(product)
    own.defvjp(lambda x, w: (own(x, w), w), lambda w, out: (out @ w.T, w))
    assert count(own, (2, 3), (3, 3)) == one


# --- the plan itself -------------------------------------------------------------------------------


def test_features_grow_with_the_batch_and_parameters_do_not():
    one, two = (plan(segmenter(), (96, 128), batch) for batch in (1, 2))
    for name in ("features", "unary head", "backward pass", "activations", "potentials"):
        assert two[name].multiply_adds == 2 * one[name].multiply_adds
        assert two[name].bytes == 2 * one[name].bytes
    assert one["parameters"] == two["parameters"]


def test_the_largest_batch_of_a_chip_fits_and_one_more_does_not(monkeypatch):
    model, tx = segmenter(), pytest.importorskip("optax").adam(1e-3)
    of = lambda n: plan(model, (64, 96), n, optimizer=tx)
    monkeypatch.setitem(planning.CHIPS, "v5e", of(6)["training step"].bytes + 10)
    assert 4 <= of(2).largest_batch("v5e") <= of(6).largest_batch("v5e") == 6
    assert "v5e   fits" in of(6).chips() and "v5e   does not fit" in of(7).chips()
    assert list(planning.CHIPS) == [line.split()[0] for line in of(1).chips().splitlines()]
    monkeypatch.setitem(planning.CHIPS, "v5e", 1000)  # less than the parameters
    assert of(1).largest_batch("v5e") == 0
    with pytest.raises(KeyError, match="v9.*known: v4, v5e"):
        of(1).largest_batch("v9")


def test_without_relations_there_are_no_pairwise_rows():
    planned = plan(segmenter(relations=()), (96, 128))
    names = " ".join(row.name for row in planned.rows)
    assert "pairwise" not in names and "messages" not in names and "first layers" not in names
    forward = planned["features"].multiply_adds + planned["unary head"].multiply_adds
    assert planned["inference"].multiply_adds == forward
    assert planned["training step"].multiply_adds == forward + planned["backward pass"].multiply_adds
    assert "pairwise" not in planned.summary()


def test_heads_by_hand():
    planned = plan(segmenter(), (96, 128))  # 6 x 8 cells of 64 features
    assert planned.grid == (6, 8)
    assert planned["unary head"].multiply_adds == 48 * (64 * 64 + 64 * 11)
    assert planned["first layers surrounding"].multiply_adds == 48 * 2 * 64 * 64
    # Unary and its log-probabilities; hidden_p and hidden_q of both relations.
    assert planned["potentials"].bytes == 4 * 48 * (2 * 11 + 4 * 64)


def test_heads_of_several_scales_by_hand():
    model = segmenter({"backbone": "tiny", **PLAIN, "scales": (0.5, 1.0)})
    planned = plan(model, (96, 128))  # 3 x 4 and 6 x 8 cells of 64 features each
    assert planned["unary head"].multiply_adds == (12 + 48) * 64 * 64 + 48 * 64 * 11
    assert planned["first layers surrounding"].multiply_adds == (12 + 48) * 2 * 64 * 64
    net = FeatMapNet(**dict(model.featmap), joined=False)
    images = jax.ShapeDtypeStruct((1, 96, 128, 3), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), images)
    counted = multiply_adds(jax.make_jaxpr(net.apply)(params, images))
    assert planned["features"].multiply_adds == pytest.approx(counted, rel=0.01)


def test_what_is_not_trained_needs_no_backward_pass():
    featmap = CASES["mobilenet_v2"][0]
    frozen = featmap | {"backbone_options": {"freeze_until": "block_6"}}
    whole, part = (plan(segmenter(f, ()), (96, 128)) for f in (featmap, frozen))
    assert part["features"].multiply_adds == whole["features"].multiply_adds
    assert part["backward pass"].multiply_adds < whole["backward pass"].multiply_adds
    assert part["activations"].bytes < 0.6 * whole["activations"].bytes


def test_settings_of_the_pairwise_parts_reach_their_costs():
    inference = Settings(num_iterations=5, algorithm="factored", chunk_edges=256)
    planned = plan(segmenter(), (192, 256), 2, inference=inference, num_sampled_offsets=2, chunk_edges=512)
    shapes = (offsets(SURROUNDING, 12, 16), 12, 16, 11, 64, 2)
    loss = planning.costs.pairwise_loss(*shapes, chunk_edges=512, num_sampled_offsets=2)
    assert planned["pairwise loss surrounding"][1:] == tuple(loss)
    once = planning.costs.factored_messages(*shapes, itemsize=4, chunk_edges=256)
    assert planned["messages surrounding, one iteration"].multiply_adds == once.multiply_adds
    every = planned["messages surrounding, 5 iterations, factored"]
    assert every[1:] == (5 * once.multiply_adds, once.temp_bytes)
    planned = plan(segmenter(), (192, 256), 2, inference=Settings(algorithm="table"))
    table = planned["messages surrounding, 3 iterations, table"]
    assert table[1:] == tuple(planning.costs.table_messages(*shapes))


def test_only_relations_of_inference_send_messages():
    weights = None, {"surrounding": 1.0}
    every, one = (plan(segmenter(), (96, 128), inference=Settings(weights=of)) for of in weights)
    assert "above_below" in " ".join(row.name for row in every.rows if row.name.startswith("messages"))
    assert "above_below" not in " ".join(row.name for row in one.rows if row.name.startswith("messages"))
    assert one["training step"] == every["training step"]
    assert one["inference"].multiply_adds < every["inference"].multiply_adds


def test_table_is_readable():
    planned = plan(segmenter(), (96, 128), 2)
    head, *lines = str(planned).splitlines()
    assert head.split("  ")[0] == "2 x 96 x 128, grid 6 x 8"
    assert len(lines) == len(planned.rows) and len({len(line) for line in [head, *lines]}) == 1
    assert [line.split("  ")[0] for line in lines] == [row.name for row in planned.rows]
    assert planning._short(planned["parameters"].bytes, "B") in lines[0]
    assert "training step" in planned.summary() and "\n" not in planned.summary()
    with pytest.raises(KeyError, match="training step"):
        planned["training"]


def test_short_numbers():
    numbers = {0: "-", 999: "999", 1000: "1 k", 999_700: "1 M", 24_310_000: "24.3 M", 1_594_000_000: "1.59 G"}
    assert {n: planning._short(n) for n in numbers} == numbers
    assert planning._short(512, "B") == "512 B"


@pytest.mark.parametrize("changes", [{"image_size": (0, 8)}, {"batch_size": 0}, {"num_sampled_offsets": -1}], ids=str)
def test_plan_refuses(changes):
    with pytest.raises(ValueError, match="got"):
        plan(**{"model": segmenter(), "image_size": (32, 32), **changes})


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(inference=Settings(weights={"suround": 1.0})), "'suround'.*not among the model's.*'surrounding'"),
        (dict(chunk_edges=0), "chunk_edges must be at least 1.*got 0"),
        (dict(image_size=64), r"expected image_size \(height, width\), got 64"),
    ],
)
def test_plans_of_what_cannot_be_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        plan(segmenter(), **{"image_size": (96, 128)} | settings)
