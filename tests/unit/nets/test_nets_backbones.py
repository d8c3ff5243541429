"""ResNet, ConvNeXt and ViT: shapes, options, and what they compute, on nets of few blocks and channels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import full_but, full_row

from pwcrf_jax import nets
from pwcrf_jax.nets.convnext import ConvNeXtTiny
from pwcrf_jax.nets.depthwise import depthwise_grouped, depthwise_shifted
from pwcrf_jax.nets.layers import Layers
from pwcrf_jax.nets.pooling import max_pool_3x3_stride_2
from pwcrf_jax.nets.resnet import ResNet50, ResNet101
from pwcrf_jax.nets.vit import Block, ViTBase, ViTSmall, resize_positions

RESNET = functools.partial(ResNet50, depths=(1, 1, 2, 1), width=4)
CONVNEXT = functools.partial(ConvNeXtTiny, depths=(1, 1, 2, 1), width=4, depthwise="grouped")  # compiled sooner
VIT = functools.partial(ViTSmall, depth=3, width=12, heads=3, grid=2, registers=2, layer_scale=True)
SMALL = {"resnet": RESNET, "convnext": CONVNEXT, "vit": VIT}


def image(height, width, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (1, height, width, 3)), jnp.float32)


def shapes(net, *size):
    """Of output and of parameters."""
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    out, variables = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), images)
    return jax.tree.map(lambda leaf: leaf.shape, out), variables["params"]


def random_params(net, seed=1):
    """No parameter at a value from which a mistake would not show, such as the tiny layer scales of a start."""
    rng = np.random.default_rng(seed)
    _, params = shapes(net, 32, 32)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), params)
    if "embed" in params:
        params["embed"]["epsilon"] = jnp.float32(1e-6)
    return params


def apply(net, params, x):
    return jax.jit(net.apply)({"params": params}, x)


@pytest.mark.parametrize("height, width", full_but([(32, 48), (33, 47), (20, 65)], (33, 47)))
@pytest.mark.parametrize(
    "net, stride, channels",
    [
        full_row((ResNet50(), 16, 2048)),
        full_row((ResNet101(stride=8), 8, 2048)),
        full_row((ResNet50(output="layer3"), 16, 1024)),
        (ResNet50(output="layer2_3", stride=8), 8, 512),
        full_row((ConvNeXtTiny(), 16, 768)),
        (ConvNeXtTiny(stride=8), 8, 768),
        full_row((ConvNeXtTiny(output="stages.2"), 16, 384)),
        full_row((ViTSmall(), 16, 384)),
        (ViTBase(patch=14, registers=4, layer_scale=True), 14, 768),
        (ViTSmall(patch=8, output="blocks_1"), 8, 384),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "output") else str(value),
)
def test_shapes(net, stride, channels, height, width):
    out, params = shapes(net, height, width)
    assert out == (1, -(-height // stride), -(-width // stride), channels)
    assert net.stride == stride and set(params) == set(net.layer_names())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "net, published, width, folded",
    [
        # BatchNorm has two values for each output of all convolutions, of which one is left.
        (ResNet50(), 25_557_032, 2048, 26_560),
        full_row((ResNet101(), 44_549_160, 2048, 52_672)),
        # The norm after the mean, before the classifier.
        full_row((ConvNeXtTiny(), 28_589_128, 768, 2 * 768)),
        # The class token's position is part of the token; one epsilon.
        full_row((ViTSmall(), 22_050_664, 384, 384 - 1)),
        (ViTBase(), 86_567_656, 768, 768 - 1),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "output") else "",
)
def test_sizes_are_those_published_without_classifier(net, published, width, folded):
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes(net, 32, 32)[1]))
    assert count == published - (width + 1) * 1000 - folded


@pytest.mark.parametrize(
    "net, freeze_until, first",
    [
        (RESNET, "layer2", "layer2_0"),
        full_row((CONVNEXT, "stages.1", "stages_1_downsample")),
        (VIT, "blocks.1", "blocks_1"),
    ],
    ids=SMALL,
)
def test_freeze_until_stops_the_gradient_below(net, freeze_until, first):
    x, frozen = image(16, 32), net(freeze_until=freeze_until)
    params = random_params(frozen)
    names = frozen.layer_names()
    assert frozen.frozen_layers == names[: names.index(first)] and not net().frozen_layers
    grads = jax.jit(jax.grad(lambda params: (frozen.apply({"params": params}, x) ** 2).sum()))(params)
    for name, layer in grads.items():
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(layer))
        assert (largest == 0) == (name in frozen.frozen_layers), name


def test_epsilon_is_not_trained_and_is_used():
    x, net = image(16, 32), VIT()
    params = random_params(net)
    loss = jax.jit(jax.value_and_grad(lambda params: (net.apply({"params": params}, x) ** 2).sum()))
    value, grads = loss(params)
    assert grads["embed"]["epsilon"] == 0 and np.abs(grads["embed"]["class_token"]).max() > 0
    params["embed"]["epsilon"] = jnp.float32(0.1)
    assert abs(loss(params)[0] - value) > 1e-3 * value


@pytest.mark.parametrize(
    "net, layers, same",
    [
        (RESNET, ("layer3.0", "conv1"), "layer3_0"),
        full_row((CONVNEXT, ("stages_2_0", "stages_0"), "stages_2_0")),
        (VIT, ("blocks_1", "blocks_0"), "blocks_1"),
    ],
    ids=SMALL,
)
def test_skip_layers_are_what_these_layers_give(net, layers, same):
    x, whole = image(16, 33), net(skip_layers=layers)
    params = random_params(whole)
    out, kept = apply(whole, params, x)
    assert set(kept) == set(layers)
    np.testing.assert_array_equal(out, apply(net(), params, x))
    short = net(output=same)
    assert set(shapes(short, 16, 33)[1]) == set(short.layer_names()) < set(params)
    np.testing.assert_allclose(
        kept[layers[0]], apply(short, {name: params[name] for name in short.layer_names()}, x), rtol=1e-5, atol=1e-5
    )
    # The largest map that there is.
    assert kept[layers[1]].shape[1] == {"conv1": 8, "stages_0": 4, "blocks_0": 1}[layers[1]]


@pytest.mark.parametrize("net, output", [(RESNET, "layer4"), (CONVNEXT, "stages_2")], ids=["resnet", "convnext"])
def test_half_the_stride_gives_cells_between(net, output):
    """Spread kernels see at every second cell what strided ones saw; borders and odd sizes too."""
    x = image(50, 67) if net is RESNET else image(48, 80)  # ConvNeXt pads to multiples of the stride
    fine, coarse = net(output=output, stride=8), net(output=output)
    params = random_params(fine)
    out = apply(fine, params, x)
    np.testing.assert_allclose(out[:, ::2, ::2], apply(coarse, params, x), rtol=1e-4, atol=1e-5)
    assert out.shape == ((1, 7, 9, 128) if net is RESNET else (1, 6, 10, 16))


def test_first_convolution_and_pooling_have_the_padding_of_pytorch():
    x, net = image(6, 9), RESNET(output="layer4", skip_layers=("conv1",))
    params = random_params(net)
    _, kept = apply(net, params, x)
    kernel, padded = np.asarray(params["conv1"]["kernel"]), np.pad(x[0], ((3, 3), (3, 3), (0, 0)))
    windows = [[padded[r : r + 7, c : c + 7] for c in range(0, 9, 2)] for r in range(0, 6, 2)]
    expected = np.array([[np.tensordot(w, kernel, 3) for w in row] for row in windows]) + params["conv1"]["bias"]
    np.testing.assert_allclose(kept["conv1"][0], np.maximum(expected, 0), atol=1e-5)


@pytest.mark.parametrize("height, width", full_but([(6, 8), (7, 5), (1, 2)], (7, 5)))
def test_max_pool_3x3_equals_reduce_window(height, width):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, height, width, 3)) - 5.0, jnp.float32)
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    reference = lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)
    values_and_gradients = lambda f: jax.jit(lambda x: (f(x), jax.grad(lambda x: (f(x) ** 2).sum())(x)))(x)
    for ours, theirs in zip(*map(values_and_gradients, (max_pool_3x3_stride_2, reference)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("dilation, size", [full_row((1, (9, 6))), (2, (5, 16))])
def test_depthwise_7x7_equals_the_grouped_one(dilation, size):
    rng = np.random.default_rng(0)
    x, kernel, weight = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, *size, 3), (7, 7, 1, 3), 3))
    loss = lambda f: lambda x, kernel: ((out := f(x, kernel, 1, dilation)) ** 2 * weight).sum() + out.sum()
    ours, theirs = (jax.jit(jax.grad(loss(f), (0, 1)))(x, kernel) for f in (depthwise_shifted, depthwise_grouped))
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-3)


def numpy_norm(x, layer, epsilon):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * layer["scale"] + layer["bias"]


def numpy_gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def test_attention_block_equals_numpy():
    rng = np.random.default_rng(0)
    tokens, channels, heads, epsilon = 5, 12, 3, 1e-2
    x = rng.standard_normal((2, tokens, channels)).astype(np.float32)
    net = Block(heads, layer_scale=True)
    shape = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.asarray(x), jnp.float32(epsilon)))["params"]
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shape)
    dense = lambda x, name: x @ params[name]["kernel"] + params[name]["bias"]
    expected = []
    for row in x.astype(np.float64):
        qkv = dense(numpy_norm(row, params["norm1"], epsilon), "qkv")
        q, k, v = (qkv[:, i * channels : (i + 1) * channels] for i in range(3))
        parts = []
        for h in range(heads):
            own = slice(h * channels // heads, (h + 1) * channels // heads)
            scores = np.exp(q[:, own] @ k[:, own].T / np.sqrt(channels // heads))
            parts.append(scores / scores.sum(1, keepdims=True) @ v[:, own])
        row = row + params["scale1"] * dense(np.concatenate(parts, 1), "out")
        inner = numpy_gelu(dense(numpy_norm(row, params["norm2"], epsilon), "expand"))
        expected.append(row + params["scale2"] * dense(inner, "project"))
    out = net.apply({"params": params}, jnp.asarray(x), jnp.float32(epsilon))
    assert np.abs(out - np.array(expected)).max() < 1e-5 * np.abs(expected).max()


def cubic(x):
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def resized(old, new):
    """[new, old]: Keys' cubic (a = -1/2), widened where it shrinks; what lies outside has no weight."""
    step = old / new
    at = (np.arange(new)[:, None] + 0.5) * step - 0.5 - np.arange(old)
    weights = cubic(at / max(step, 1))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("cells", [(3, 9), (7, 4), (5, 5)])
def test_positions_are_resized_as_numpy_does(cells):
    positions = np.random.default_rng(0).standard_normal((5, 5, 3)).astype(np.float32)
    expected = np.einsum("ia,jb,abc->ijc", resized(5, cells[0]), resized(5, cells[1]), positions)
    np.testing.assert_allclose(resize_positions(jnp.asarray(positions), cells), expected, atol=1e-5)


def test_tokens_of_a_vit_see_the_whole_image_and_its_padding_is_black():
    x, net = image(16, 40), VIT()
    params = random_params(net)
    out = apply(net, params, x)
    changed = apply(net, params, x.at[:, :8, :8].add(0.1)) != out
    assert changed.any(-1).all()
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, 8), (0, 0)))
    np.testing.assert_array_equal(out, apply(net, params, padded))


@pytest.mark.parametrize("name", full_but(SMALL, "resnet", "vit"))
def test_bfloat16_comes_close(name):
    x = image(32, 32)
    net, low = SMALL[name](), SMALL[name](dtype=jnp.bfloat16)
    params = random_params(net)
    exact, rough = apply(net, params, x), apply(low, params, x)
    assert rough.dtype == jnp.bfloat16
    assert np.abs(rough.astype(jnp.float32) - exact).mean() < 0.05 * np.abs(exact).mean()


@pytest.mark.parametrize("name", full_but(SMALL, "vit"))
def test_lowers_for_every_platform_and_is_mapped(name):
    net, x = SMALL[name](), jnp.zeros((2, 16, 16, 3))
    params = random_params(net)
    grad = jax.jit(jax.grad(lambda params, x: net.apply({"params": params}, x).sum()))
    exported = jax.export.export(grad, platforms=("cpu", "cuda", "tpu"))(params, x)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    one = jax.vmap(lambda x: net.apply({"params": params}, x[None])[0])
    (batch,) = jax.export.symbolic_shape("b")
    symbolic = jax.ShapeDtypeStruct((batch, 16, 16, 3), jnp.float32)
    assert jax.export.export(jax.jit(one))(symbolic).out_avals[0].shape[1:3] == (1, 1)


@pytest.mark.parametrize(
    "backbone, options, message",
    [
        ("resnet50", {"stride": 32}, "resnet50: stride must be 16 or 8, got 32"),
        (
            "resnet101",
            {"output": "layer2"},
            "resnet101: output 'layer2' is not a layer that it may name; known: layer3",
        ),
        ("resnet50", {"output": "layer5"}, "known: layer3, layer4, or one block of them, such as layer4_2"),
        ("resnet50", {"freeze_until": "conv1"}, "freeze_until 'conv1' is not a layer that it may name"),
        ("resnet50", {"freeze_until": "layer4", "output": "layer3"}, "freeze_until 'layer4' is not a layer"),
        ("convnext_tiny", {"stride": 4}, "convnext_tiny: stride must be 16 or 8, got 4"),
        ("convnext_tiny", {"depthwise": "fast"}, "convnext_tiny: depthwise must be auto, shifted or grouped"),
        ("convnext_tiny", {"output": "stages_1"}, "output 'stages_1' is not a layer that it may name; known: stages_2"),
        ("convnext_tiny", {"output": "stages_2_downsample"}, "output 'stages_2_downsample' is not a layer"),
        ("convnext_tiny", {"freeze_until": "stages_4"}, "freeze_until 'stages_4' is not a layer"),
        ("vit_small", {"patch": 12}, "vit_small: patch must be one of 8, 14, 16, got 12"),
        ("vit_base", {"registers": -1}, "vit_base: registers must not be negative, got -1"),
        ("vit_base", {"grid": -1}, "vit_base: grid must not be negative, got -1"),
        ("vit_base", {"output": "blocks_12"}, "vit_base: output 'blocks_12' is not a layer"),
        ("vit_small", {"freeze_until": "blocks_9", "output": "blocks_8"}, "freeze_until 'blocks_9' is not a layer"),
        ("vit_small", {"stride": 8}, "backbone 'vit_small' has no option 'stride'; known: output, patch"),
    ],
)
def test_refused_in_one_line(backbone, options, message):
    with pytest.raises(ValueError) as told:
        nets.FeatMapNet(backbone=backbone, backbone_options=options)
    assert message in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "backbone, layer", [("resnet50", "layer4_2"), ("convnext_tiny", "stem2"), ("vit_base", "norm")]
)
def test_skip_layers_past_the_output_are_refused(backbone, layer):
    with pytest.raises(ValueError, match=f"^{backbone}: no layer '{layer}' before the output; known: "):
        nets.FeatMapNet(backbone=backbone, skip_layers=(layer,))


def test_layers_are_found_by_name_and_by_stage():
    layers = Layers("net", ("stem", "a_0", "a_1", "b_downsample", "b_0"))
    assert (layers.first("x", "a"), layers.last("x", "a"), layers.last("x", "a.0")) == ("a_0", "a_1", "a_0")
    assert (layers.first("x", "b"), layers.last("x", "b")) == ("b_downsample", "b_0")
    assert layers.frozen("b") == ("stem", "a_0", "a_1") and layers.frozen("") == ()
    assert layers.kept({"a_0": 0, "a_1": 1}, ("a",)) == {"a": 1}
