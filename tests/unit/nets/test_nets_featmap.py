"""Backbones and FeatMapNet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from rows import full_row

from pwcrf_jax import nets
from pwcrf_jax.nets import mobilenet_v2, vgg16


def image(height, width, batch=1, seed=0):
    values = np.random.default_rng(seed).uniform(-1, 1, (batch, height, width, 3))
    return jnp.asarray(values, jnp.float32)


def init(net, x):
    return jax.jit(net.init)(jax.random.key(0), x)


def apply(net, variables, x):
    """Compiled as one: op by op, the large networks take long."""
    return jax.jit(net.apply)(variables, x)


def tiny_net(**changes):
    settings = {"backbone": "tiny", "backbone_options": {"features": (4, 4, 4, 6)}, "block6": ((3, 5),)}
    return nets.FeatMapNet(**{**settings, **changes})


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (20, 65)])
@pytest.mark.parametrize("backbone, channels", [(nets.Tiny(), 64), (nets.MobileNetV2(), 576), (nets.VGG16(), 512)])
def test_backbone_shapes(backbone, channels, size):
    shape = jax.eval_shape(
        lambda x: backbone.init_with_output(jax.random.key(0), x)[0],
        jax.ShapeDtypeStruct((2, *size, 3), jnp.float32),
    ).shape
    assert shape == (2, -(-size[0] // 16), -(-size[1] // 16), channels)


@pytest.mark.parametrize(
    "output, channels",
    [
        ("block_6_project", 64),
        ("block_12", 96),
        ("block_16_expand", 960),
        ("block_16", 320),
        ("Conv_1", 1280),
    ],
)
def test_mobilenet_outputs(output, channels):
    x = jax.ShapeDtypeStruct((1, 33, 40, 3), jnp.float32)
    net = nets.MobileNetV2(output=output)
    out, variables = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), x)
    assert out.shape == (1, 3, 3, channels)
    names = mobilenet_v2.layer_names()
    last = output if output in names else f"{output}_project"
    assert set(variables["params"]) == set(names[: names.index(last) + 1])  # nothing past the output


def direct_conv(x, kernel, bias):
    height, width, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.empty((height, width, kernel.shape[3]))
    for row in range(height):
        for col in range(width):
            out[row, col] = np.tensordot(padded[row : row + 3, col : col + 3], kernel, 3) + bias
    return out


@pytest.fixture
def narrow_vgg(monkeypatch):
    """VGG-16 of an eighth of its width."""
    blocks = tuple(tuple(width // 8 for width in widths) for widths in vgg16.BLOCKS)
    monkeypatch.setattr(vgg16, "BLOCKS", blocks)


def test_vgg_first_layers_equal_direct_convolution(narrow_vgg):
    x = image(5, 6)
    net = nets.VGG16(skip_layers=("block1_conv1", "block1_conv2"))
    variables = init(net, x)
    _, kept = apply(net, variables, x)
    expected = np.asarray(x[0])
    for name in ("block1_conv1", "block1_conv2"):
        layer = variables["params"][name]
        expected = direct_conv(expected, np.asarray(layer["kernel"]), np.asarray(layer["bias"]))
        expected = np.maximum(expected, 0)
        np.testing.assert_allclose(kept[name][0], expected, atol=1e-4)
    assert len(variables["params"]) == 13


def test_tiny_cells_see_only_their_own_pixels():
    x = image(32, 48)
    net = nets.Tiny(mix=True)
    variables = init(net, x)
    changed = apply(net, variables, x.at[:, 16:32, 16:32].add(1.0)) != apply(net, variables, x)
    cells = np.asarray(changed.any(-1)[0])
    assert cells[1, 1] and cells.sum() == 1


@pytest.fixture
def narrow_mobilenet(monkeypatch):
    """MobileNetV2 of an eighth of its width; its first layer stays."""
    narrow = lambda block: block._replace(expand=block.expand // 8, project=block.project // 8)
    monkeypatch.setattr(mobilenet_v2, "BLOCKS", tuple(map(narrow, mobilenet_v2.BLOCKS)))


def test_mobilenet_depthwise_methods_agree(narrow_mobilenet):
    """Strides of 1 and 2 and, in block 14, a dilation of 2."""
    x = image(33, 40)
    variables = init(nets.MobileNetV2(output="block_14"), x)
    outs = [
        apply(nets.MobileNetV2(output="block_14", depthwise=method), variables, x) for method in ("shifted", "grouped")
    ]
    assert np.abs(outs[0]).max() > 1e-2
    np.testing.assert_allclose(*outs, atol=1e-5)


def test_freeze_until_stops_the_gradient_below(narrow_mobilenet):
    x = image(32, 32)
    net = nets.MobileNetV2(output="block_7_expand", freeze_until="block_6")
    variables = init(net, x)

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.grad, has_aux=True)
    def loss(variables, net):
        out = net.apply(variables, x)
        return (out**2).sum(), out

    (grads, out), (free_grads, free_out) = (
        loss(variables, n) for n in (net, nets.MobileNetV2(output="block_7_expand"))
    )
    grads = grads["params"]
    for name, layer in grads.items():
        below = name in mobilenet_v2.layer_names()[: mobilenet_v2.layer_names().index("block_6_expand")]
        assert (np.abs(layer["kernel"]).max() == 0) == below, name
    assert np.abs(free_grads["params"]["Conv1"]["kernel"]).max() > 0
    np.testing.assert_allclose(out, free_out, rtol=1e-6)


def test_featmap_output_and_parameters():
    x = image(50, 67, batch=2)
    net = tiny_net(block6=((3, 5), (1, 7)))
    out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x)
    assert out.shape == (2, *nets.grid_size((50, 67), net.scales), 3 * 3 * 7) == (2, 4, 5, 63)
    params = variables["params"]
    assert list(params) == ["backbone", "block6_0", "block6_1", "block6_2"]
    assert list(params["block6_1"]) == ["conv1", "conv2"]
    assert params["block6_0"]["conv2"]["kernel"].shape == (1, 1, 5, 7)


def test_each_part_can_be_left_out():
    x = image(48, 64)
    sizes = {}
    for name, changes in {
        "all": {},
        "no pyramid": {"pyramid_windows": ()},
        "one scale": {"scales": (1.0,)},
        "no block 6": {"block6": ()},
        "bare": {"pyramid_windows": (), "scales": (1.0,), "block6": ()},
    }.items():
        net = tiny_net(**changes)
        sizes[name] = jax.eval_shape(net.init_with_output, jax.random.key(0), x)[0].shape[-1]
    assert sizes == {"all": 45, "no pyramid": 15, "one scale": 15, "no block 6": 54, "bare": 6}
    variables = init(net, x)
    backbone = apply(nets.Tiny(features=(4, 4, 4, 6)), {"params": variables["params"]["backbone"]}, x)
    np.testing.assert_allclose(apply(net, variables, x), backbone, atol=1e-6)


def test_scales_may_stand_in_any_order():
    x = image(48, 64)
    net, turned = (tiny_net(block6=(), pyramid_windows=(3,), scales=s) for s in ((1.2, 0.4), (0.4, 1.2)))
    variables = init(net, x)
    first, second = apply(net, variables, x), apply(turned, variables, x)
    half = first.shape[-1] // 2
    np.testing.assert_allclose(first[..., :half], second[..., half:], atol=1e-6)
    np.testing.assert_allclose(first[..., half:], second[..., :half], atol=1e-6)


def test_grid_size():
    assert nets.grid_size((360, 480), (1.2, 0.8, 0.4)) == (27, 36)
    assert nets.grid_size((33, 31), (1.0,)) == (3, 2)
    assert nets.grid_size((1, 1), (0.4,)) == (1, 1)
    assert nets.grid_size((360, 480), (1.2, 0.8, 0.4), 8) == (54, 72)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone": "mobilenet_v2", "backbone_options": {"output": "block_6_project"}, "scales": (1.0,), "block6": ()},
        full_row({"backbone": "vgg16", "backbone_options": {}, "scales": (1.0,)}),
    ],
    ids=lambda changes: changes.get("backbone", "tiny"),
)
def test_bfloat16_keeps_float32_parameters_and_comes_close(changes, narrow_mobilenet, narrow_vgg):
    x = image(32, 32)
    net, low = tiny_net(**changes), tiny_net(**changes, dtype=jnp.bfloat16)
    variables = init(low, x)
    assert {leaf.dtype for leaf in flatten_dict(variables).values()} == {jnp.dtype("float32")}
    exact, rough = apply(net, variables, x), apply(low, variables, x)
    assert rough.dtype == jnp.bfloat16
    error = np.abs(rough.astype(jnp.float32) - exact).mean() / np.abs(exact).mean()
    assert error < 0.05


def test_eager_equals_jit():
    x = image(40, 33)
    net = tiny_net(scales=(1.0, 0.5), pyramid_windows=(3,))
    variables = init(net, x)
    np.testing.assert_allclose(net.apply(variables, x), apply(net, variables, x), atol=1e-5)


def test_lowers_for_every_platform():
    x = image(32, 32)
    for changes in ({}, {"backbone": "mobilenet_v2", "backbone_options": {}, "scales": (1.0,)}):
        net = tiny_net(**changes)
        variables = jax.eval_shape(lambda x, net=net: net.init(jax.random.key(0), x), x)
        grad = jax.jit(jax.grad(lambda variables, x, net=net: net.apply(variables, x).sum()))
        exported = jax.export.export(grad, platforms=("cpu", "cuda", "tpu"))(variables, x)
        assert exported.platforms == ("cpu", "cuda", "tpu")


def test_lists_and_mappings_make_the_same_hashable_net():
    net = tiny_net(backbone_options={"mix": True, "features": [4, 4, 4, 6]}, scales=[1.0], block6=[[3, 5]])
    same = tiny_net(backbone_options=(("features", (4, 4, 4, 6)), ("mix", True)), scales=(1.0,), block6=((3, 5),))
    assert net == same and hash(net) == hash(same)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"backbone": "vgg"}, "unknown backbone 'vgg'; did you mean 'vgg16'"),
        ({"backbone_options": {"output": "x"}}, "'tiny' has no option 'output'; known: features, mix"),
        ({"backbone_options": {"features": (1, 2)}}, "features must be four positive numbers"),
        ({"backbone": "vgg16"}, "'vgg16' has no option 'features'; known: -"),
        ({"scales": ()}, "scales must not be empty"),
        ({"scales": (1.0, -0.5)}, "scales must be positive numbers, got -0.5"),
        ({"scales": (float("nan"),)}, "scales must be positive numbers, got nan"),
        ({"block6": ((4, 8),)}, "kernel sizes must be odd and positive, got 4"),
        ({"block6": ((3, 0),)}, "block6 features must be positive, got 0"),
        ({"block6": ((3,),)}, "block6 must hold pairs"),
        ({"pyramid_windows": (5, 8)}, "windows must be odd and positive, got 8"),
        ({"dtype": jnp.int32}, "dtype must be float32 or bfloat16, got int32"),
    ],
)
def test_featmap_refuses_at_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_net(**changes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output": "block_3_expand"}, "output 'block_3_expand' is not a layer at stride 16"),
        ({"depthwise": "fast"}, "depthwise must be auto, shifted or grouped, got 'fast'"),
        ({"freeze_until": "block_17"}, "freeze_until 'block_17' is not a block"),
        ({"freeze_until": "block_14"}, "freeze_until 'block_14' lies past the output 'block_13_expand'"),
        ({"freeze_until": "Conv_1"}, "freeze_until 'Conv_1' lies past the output"),
        ({"freeze_until": "block_16", "output": "block_1"}, "is not a layer at stride 16"),
    ],
)
def test_mobilenet_refuses_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        nets.MobileNetV2(**options)
    with pytest.raises(ValueError, match=message):
        nets.FeatMapNet(backbone="mobilenet_v2", backbone_options=options)
