"""Depthwise and pointwise convolutions, poolings, input scaling and the heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pwcrf_jax import nets
from pwcrf_jax.nets.convs import PointwiseConv
from pwcrf_jax.nets.depthwise import DepthwiseConv, depthwise_grouped, depthwise_shifted


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("size, window", [((8, 6), 3), ((7, 9), 3), ((7, 6), 3), ((1, 2), 3), ((7, 6), 5), ((2, 9), 5)])
def test_shifted_equals_grouped_in_values_and_gradients(stride, dilation, size, window):
    x, kernel = normal(0, 2, *size, 5), normal(1, window, window, 1, 5)
    rows, cols = -(-size[0] // stride), -(-size[1] // stride)
    weight = normal(2, 2, rows, cols, 5)
    results = []
    for convolve in (depthwise_shifted, depthwise_grouped):

        def loss(x, kernel, convolve=convolve):
            out = convolve(x, kernel, stride, dilation)
            return (out * weight).sum(), out

        gradients, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, kernel)
        results.append((out, *gradients))
    for ours, reference in zip(*results, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-4)


def test_shifted_refuses_other_strides():
    with pytest.raises(ValueError, match="stride 2, dilation 2"):
        depthwise_shifted(normal(0, 1, 4, 4, 2), normal(1, 3, 3, 1, 2), 2, 2)


def test_depthwise_methods_share_parameters_and_auto_is_one_of_them():
    x = normal(0, 1, 6, 5, 4)
    variables = DepthwiseConv(method="grouped").init(jax.random.key(0), x)
    assert variables["params"]["kernel"].shape == (3, 3, 1, 4)
    outs = [DepthwiseConv(method=method).apply(variables, x) for method in ("auto", "shifted", "grouped")]
    np.testing.assert_allclose(outs[0], outs[2], atol=1e-6)
    np.testing.assert_allclose(outs[1], outs[2], atol=1e-6)


def test_pointwise_is_a_1x1_convolution():
    x = normal(0, 2, 3, 4, 5)
    variables = PointwiseConv(6).init(jax.random.key(0), x)
    params = {"kernel": variables["params"]["kernel"], "bias": normal(1, 6)}
    expected = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    out = PointwiseConv(6).apply({"params": params}, x)
    np.testing.assert_allclose(out, expected + params["bias"], atol=1e-5)


def loop_pool(x, window):
    radius = window // 2
    out = np.empty_like(x)
    for row in range(x.shape[1]):
        for col in range(x.shape[2]):
            part = x[:, max(row - radius, 0) : row + radius + 1, max(col - radius, 0) : col + radius + 1]
            out[:, row, col] = part.max((1, 2))
    return out


@pytest.mark.parametrize("windows", [(5, 9), (9, 5), (3,), (), (1,)])
def test_sliding_pyramid_equals_loops_including_borders(windows):
    x = np.asarray(normal(0, 2, 11, 7, 3)) - 5.0  # negative: a zero padding would win
    expected = np.concatenate([x, *(loop_pool(x, window) for window in windows)], axis=-1)
    np.testing.assert_array_equal(nets.sliding_pyramid(jnp.asarray(x), windows), expected)


def test_max_pool_gradient_goes_to_the_maxima():
    x, weight = normal(0, 1, 6, 8, 2), normal(1, 1, 6, 8, 2)

    def reference(x):
        pooled = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 5, 5, 1), (1, 1, 1, 1), "SAME")
        return (pooled * weight).sum()

    ours = jax.grad(lambda x: (nets.max_pool_same(x, 5) * weight).sum())(x)
    np.testing.assert_allclose(ours, jax.grad(reference)(x), atol=1e-5)


def test_max_pool_gradient_is_shared_by_ties_and_sums_up():
    grad = jax.grad(lambda x: nets.max_pool_same(x, 5).sum())(jnp.zeros((1, 6, 7, 1)))
    assert np.isfinite(grad).all() and (grad > 0).all()
    np.testing.assert_allclose(grad.sum(), 42.0, rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)])
def test_max_pool_2x2_equals_reduce_window(stride, size):
    x = normal(0, 2, *size, 3) - 5.0

    def reference(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, stride, stride, 1), "SAME")

    np.testing.assert_array_equal(nets.max_pool_2x2(x, stride), reference(x))
    ours = jax.grad(lambda x: (nets.max_pool_2x2(x, stride) ** 2).sum())(x)
    np.testing.assert_allclose(ours, jax.grad(lambda x: (reference(x) ** 2).sum())(x), atol=1e-5)


def test_poolings_refuse_what_they_cannot():
    x = jnp.zeros((1, 4, 4, 1))
    with pytest.raises(ValueError, match="odd and positive, got 4"):
        nets.max_pool_same(x, 4)
    with pytest.raises(ValueError, match="odd and positive, got 2"):
        nets.sliding_pyramid(x, (5, 2))
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        nets.max_pool_2x2(x, 3)


def test_scalings():
    image = np.array([[[255, 0, 51]]], np.uint8)
    np.testing.assert_allclose(nets.scale_input(image, "tf")[0, 0], [1, -1, -0.6], atol=1e-6)
    caffe = [51 - 103.939, 0 - 116.779, 255 - 123.68]
    np.testing.assert_allclose(nets.scale_input(image, "caffe")[0, 0], caffe, rtol=1e-5)
    torch = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(nets.scale_input(image.astype(np.float32), "torch")[0, 0], torch, rtol=1e-4)
    assert nets.scale_input(image, "tf", jnp.bfloat16).dtype == jnp.bfloat16
    for name, scaling in nets.INPUT_SCALINGS.items():
        mean_colour = np.array(scaling.mean, np.float32)
        np.testing.assert_allclose(nets.scale_input(mean_colour, name), 0, atol=1e-5)


def test_scaling_refuses():
    with pytest.raises(ValueError, match="'imagenet'; known: caffe, efficientnet_lite, tf, torch"):
        nets.scale_input(np.zeros((2, 2, 3)), "imagenet")
    with pytest.raises(ValueError, match="3 channels"):
        nets.scale_input(np.zeros((2, 2, 4)), "tf")


def test_unary_net():
    x = normal(0, 2, 3, 4, 5)
    net = nets.UnaryNet(num_classes=7, hidden=6)
    variables = net.init(jax.random.key(0), x)
    params = variables["params"]
    hidden = np.maximum(x @ params["first"]["kernel"] + params["first"]["bias"], 0)
    scores = net.apply(variables, x)
    np.testing.assert_allclose(scores, hidden @ params["last"]["kernel"] + params["last"]["bias"], atol=1e-5)
    assert scores.dtype == jnp.float32
    assert nets.UnaryNet(7, 6, jnp.bfloat16).apply(variables, x).dtype == jnp.float32


def test_pairwise_parts_equal_a_dense_layer_over_both_nodes():
    x = normal(0, 2, 3, 4, 5)
    net = nets.PairwiseNet(num_classes=7, hidden=6)
    params = net.init(jax.random.key(0), x)["params"]
    params["first_p"]["bias"] = normal(1, 6)
    parts = net.apply({"params": params}, x)
    w1 = np.concatenate([params["first_p"]["kernel"], params["first_q"]["kernel"]])
    both = np.concatenate([x[:, 0, 1], x[:, 2, 3]], axis=-1)
    expected = both @ w1 + params["first_p"]["bias"]
    np.testing.assert_allclose(parts.hidden_p[:, 0, 1] + parts.hidden_q[:, 2, 3], expected, atol=1e-5)
    assert set(params) == {"first_p", "first_q", "last_kernel", "last_bias"}
    assert "bias" not in params["first_q"]
    assert parts.kernel.shape == (6, 7, 7) and parts.bias.shape == (7, 7)


def test_pairwise_first_layer_starts_like_one_over_both_nodes():
    x = jnp.zeros((1, 1, 1, 200))
    params = nets.PairwiseNet(2, hidden=300).init(jax.random.key(0), x)["params"]
    for part in ("first_p", "first_q"):
        np.testing.assert_allclose(np.var(params[part]["kernel"]), 1 / 400, rtol=0.05)


def test_pairwise_zero_last_gives_zero_scores():
    x = normal(0, 1, 2, 2, 5)
    parts, _ = nets.PairwiseNet(3, hidden=4, zero_last=True).init_with_output(jax.random.key(0), x)
    scores = (
        jnp.einsum("m,mkl->kl", jax.nn.relu(parts.hidden_p[0, 0, 0] + parts.hidden_q[0, 1, 1]), parts.kernel)
        + parts.bias
    )
    np.testing.assert_array_equal(scores, 0)
    parts, _ = nets.PairwiseNet(3, hidden=4).init_with_output(jax.random.key(0), x)
    assert np.abs(parts.kernel).max() > 0


@pytest.mark.parametrize("net", [nets.UnaryNet(3, 8), nets.PairwiseNet(3, 8)])
def test_heads_on_maps_of_several_grids_are_those_on_their_concatenation(net):
    maps = [normal(0, 2, 3, 4, 5), normal(1, 2, 6, 7, 5), normal(2, 2, 2, 2, 5)]
    enlarge = lambda x: jax.image.resize(x, (2, 6, 7, 5), "bilinear")
    join = lambda maps: jnp.concatenate([enlarge(x) for x in maps], axis=-1)
    variables = net.init(jax.random.key(0), maps)
    alike = net.init(jax.random.key(0), join(maps))
    jax.tree.map(np.testing.assert_array_equal, variables, alike)  # the same start of the same parameters

    def both(of):
        apply = jax.jit(lambda variables, maps: net.apply(variables, of(maps)))
        total = lambda *args: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(apply(*args)))
        return apply(variables, maps), jax.grad(total, (0, 1))(variables, maps)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), both(lambda maps: maps), both(join))


def test_featmap_net_gives_its_maps_apart():
    settings = dict(backbone="tiny", scales=(0.5, 1.0), block6=((3, 4),), pyramid_windows=(5,))
    joined, apart = nets.FeatMapNet(**settings), nets.FeatMapNet(**settings, joined=False)
    x = normal(0, 1, 64, 96, 3)
    variables = joined.init(jax.random.key(0), x)
    small, large = apart.apply(variables, x)
    assert small.shape == (1, 2, 3, 8) and large.shape == (1, 4, 6, 8)
    whole = jnp.concatenate([jax.image.resize(small, large.shape, "bilinear"), large], axis=-1)
    np.testing.assert_allclose(joined.apply(variables, x), whole, atol=1e-6)


@pytest.mark.parametrize("net", [nets.UnaryNet(3, 8), nets.PairwiseNet(3, 8)])
def test_heads_eager_equals_jit_and_bfloat16_keeps_float32_parameters(net):
    x = normal(0, 1, 3, 4, 6)
    low = net.copy(dtype=jnp.bfloat16)
    variables = low.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in flatten_dict(variables).values()} == {jnp.dtype("float32")}
    eager, jitted = net.apply(variables, x), jax.jit(net.apply)(variables, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), eager, jitted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b.astype(jnp.float32), atol=0.1),
        eager,
        low.apply(variables, x),
    )
