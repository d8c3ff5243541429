"""Exact and separable Gaussian filters against loops, and the choice between methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pwcrf_jax import gaussian, permutohedral
from reference import dense_crf_oracle as oracle

N, D, C = 13, 3, 2
H, W = 7, 5
exact = jax.jit(gaussian.exact, static_argnums=3)
spatial = jax.jit(gaussian.spatial, static_argnames="radius")
known_sigma = jax.jit(gaussian.spatial, static_argnames="sigma")


def points(seed, *lead, d=D):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(*lead, N, d)).astype(np.float32)
    return features, rng.random((*lead, N)) > 0.3, rng.normal(size=(*lead, N, C)).astype(np.float32)


def pixels(seed, *lead, height=H, width=W):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(*lead, height, width, C)).astype(np.float32)
    return values, rng.random((*lead, height, width)) > 0.3


def spatial_loops(values, sxy, mask=None):
    height, width, channels = values.shape
    return (oracle.spatial_kernel(height, width, sxy, mask) @ values.reshape(-1, channels)).reshape(values.shape)


@pytest.mark.parametrize("tile", [(512, 2048), (13, 13), (4, 5), (5, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_exact_is_the_sum_whatever_the_tiles(tile, masked):
    features, mask, values = points(140)
    mask = mask if masked else np.ones(N, bool)
    got = exact(features, mask, values, tile)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, oracle.exact_kernel(features, mask) @ values, atol=1e-5)


@pytest.mark.parametrize("d", [1, 5])
def test_exact_in_other_dimensions(d):
    features, mask, values = points(141, d=d)
    np.testing.assert_allclose(exact(features, mask, values), oracle.exact_kernel(features, mask) @ values, atol=1e-5)


def test_exact_keeps_the_digits_of_points_close_together_and_far_from_the_origin():
    features, mask, values = points(142)
    features = np.float32(4096 + np.round(features * 64) / 64)
    np.testing.assert_allclose(exact(features, mask, values), oracle.exact_kernel(features, mask) @ values, atol=1e-5)


def test_exact_images_do_not_see_one_another():
    features, mask, values = points(143, 2, 2)
    got = exact(features, mask, values, (4, 5))
    for i in np.ndindex(2, 2):
        np.testing.assert_allclose(got[i], oracle.exact_kernel(features[i], mask[i]) @ values[i], atol=1e-5)


@pytest.mark.parametrize("garbage", [1e4, np.inf, np.nan])
def test_exact_masked_points_may_hold_anything(garbage):
    features, mask, values = points(144)
    dirty = lambda x: np.where(mask[:, None], x, garbage).astype(np.float32)
    got = exact(dirty(features), mask, dirty(values))
    np.testing.assert_allclose(got, oracle.exact_kernel(features, mask) @ values, atol=1e-5)


def test_exact_gradients():
    features, mask, values = points(145)
    u = points(146)[2]
    loss = lambda f, v: jnp.vdot(u, gaussian.exact(f, mask, v, (4, 5)))
    by_features, by_values = jax.jit(jax.grad(loss, (0, 1)))(features, values)
    kernel = oracle.exact_kernel(features, mask)
    np.testing.assert_allclose(by_values, kernel.T @ u, atol=1e-5)
    expected = oracle.derivative(lambda f: np.vdot(u, oracle.exact_kernel(f, mask) @ values), features)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(by_features, expected, rtol=1e-4, atol=1e-5)


def test_exact_second_derivative_of_features():
    features, mask, values = points(147)
    u, t = points(148)[2], points(149)[0]
    grad = jax.grad(lambda f: jnp.vdot(u, gaussian.exact(f, mask, values, (4, 5))))
    got = jax.jit(jax.grad(lambda f: jnp.vdot(grad(f), t)))(features)

    def loss(f):
        return np.vdot(u, oracle.exact_kernel(f, mask) @ values)

    along = lambda f: (loss(f + 1e-4 * t) - loss(f - 1e-4 * t)) / 2e-4
    np.testing.assert_allclose(got, oracle.derivative(along, features, 1e-4), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(N,), (N - 1, C), (2, N, C)], ids=str)
def test_exact_refuses_values_of_other_points(shape):
    features, mask, _ = points(150)
    with pytest.raises(ValueError, match=r"expected values \(13,\) and a channel axis, got"):
        gaussian.exact(features, mask, np.zeros(shape, np.float32))


SIGMAS = [1.0, 0.4, (0.7, 1.6), (1.6, 0.7), 9.0, (20.0, 0.5)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sigma", SIGMAS, ids=str)
def test_spatial_with_known_sigma_stops_at_four_of_them(sigma, masked):
    """9 and 20 take the matrix of the kernel in place of taps."""
    values, mask = pixels(151)
    mask = mask if masked else None
    got = known_sigma(values, sigma, mask)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, spatial_loops(values, sigma, mask), atol=1e-3)
    if not masked:
        assert np.abs(got - spatial_loops(values, 1.05 * np.array(sigma))).max() > 1e-2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sigma", SIGMAS, ids=str)
def test_spatial_with_traced_sigma_covers_the_image(sigma, masked):
    values, mask = pixels(152)
    mask = mask if masked else None
    np.testing.assert_allclose(spatial(values, sigma, mask), spatial_loops(values, sigma, mask), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(1, 40), (40, 1), (3, 20), (1, 1)])
def test_spatial_with_few_rows_or_columns(height, width):
    values, mask = pixels(153, height=height, width=width)
    for sigma in ((1.5, 0.6), (9.0, 8.5)):
        np.testing.assert_allclose(known_sigma(values, sigma, mask), spatial_loops(values, sigma, mask), atol=2e-3)


@pytest.mark.parametrize("radius", [0, 1, 3, 40])
def test_spatial_radius_leaves_out_the_taps_beyond(radius):
    values, _ = pixels(154, height=45, width=4)
    got = spatial(values, (2.0, 30.0), radius=radius)
    weights = [
        np.where(abs(k) <= radius, np.exp(-0.5 * (k / sigma) ** 2), 0)
        for size, sigma in ((45, 30.0), (4, 2.0))
        for k in [np.arange(size)[:, None] - np.arange(size)]
    ]
    np.testing.assert_allclose(got, np.einsum("ij,kl,jlc->ikc", *weights, values), atol=2e-5)


def test_spatial_first_sigma_is_along_the_columns():
    impulse = np.zeros((9, 9, 1), np.float32)
    impulse[4, 4] = 1
    got = known_sigma(impulse, (2.0, 0.5))
    assert got[4, 6, 0] == pytest.approx(np.exp(-0.5), rel=1e-5)
    assert got[5, 4, 0] == pytest.approx(np.exp(-2), rel=1e-5)


@pytest.mark.parametrize("sigma", [1.0, 9.0])
@pytest.mark.parametrize("garbage", [1e4, np.nan])
def test_spatial_border_of_masked_pixels_changes_nothing(sigma, garbage):
    values, mask = pixels(155)
    border = ((1, 3), (2, 1))
    bigger = np.pad(values, (*border, (0, 0)), constant_values=garbage)
    got = known_sigma(bigger, sigma, np.pad(mask, border))
    inside = got[1 : 1 + H, 2 : 2 + W]
    np.testing.assert_allclose(inside, known_sigma(values, sigma, mask), atol=1e-5)
    assert np.abs(got).sum() == pytest.approx(np.abs(inside).sum())
    assert not np.any(inside[~mask])


@pytest.mark.parametrize("sigma", [(1.0, 2.0), (9.0, 2.0)])
def test_spatial_leading_axes_are_images(sigma):
    values, mask = pixels(156, 2, 3)
    got = known_sigma(values, sigma, mask)
    for i in np.ndindex(2, 3):
        np.testing.assert_allclose(got[i], known_sigma(values[i], sigma, mask[i]), atol=1e-6)


@pytest.mark.parametrize("radius", [None, 12])
def test_spatial_gradients(radius):
    values, mask = pixels(157)
    u = pixels(158)[0]
    sigma = np.float32([1.3, 2.1])
    loss = lambda v, s: jnp.vdot(u, gaussian.spatial(v, s, mask, radius))
    by_values, by_sigma = jax.jit(jax.grad(loss, (0, 1)))(values, sigma)
    np.testing.assert_allclose(by_values, spatial_loops(u, sigma, mask), atol=1e-5)
    expected = oracle.derivative(lambda s: np.vdot(u, spatial_loops(values, s, mask)), sigma)
    assert np.abs(expected).min() > 0.1
    np.testing.assert_allclose(by_sigma, expected, rtol=1e-4)
    one = jax.jit(jax.grad(loss, 1))(values, np.float32(1.3))
    expected = oracle.derivative(lambda s: np.vdot(u, spatial_loops(values, s, mask)), 1.3)
    np.testing.assert_allclose(one, expected, rtol=1e-4)


def test_radius_is_four_of_the_larger_sigma_where_known():
    assert gaussian.radius_of(1.1) == 5
    assert gaussian.radius_of((0.5, 2.0)) == 8
    assert gaussian.radius_of(jnp.array([3.0, 1.0])) == 12
    seen = []
    jax.jit(lambda s: seen.extend([gaussian.radius_of(s), gaussian.radius_of((1.0, s))]))(1.0)
    assert seen == [None, None]


@pytest.mark.parametrize("sigma", [(1.0, 2.0), [1.0, 2.0], np.array([1.0, 2.0])], ids=["tuple", "list", "array"])
def test_pair_of_two(sigma):
    assert gaussian.pair(sigma) == (1.0, 2.0)


def test_pair_of_one():
    assert gaussian.pair(3.0) == (3.0, 3.0) and gaussian.pair(np.float32(3)) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("method", "kind"),
    [("exact", gaussian.Points), ("auto", gaussian.Points), ("lattice", permutohedral.Lattice)],
)
def test_prepare_and_apply_filter_by_the_method(method, kind):
    features, mask, values = points(159, 2)
    prepared = jax.jit(functools.partial(gaussian.prepare, method=method, capacity=2 * N * (D + 1)))(features, mask)
    assert type(prepared) is kind
    got = jax.jit(gaussian.apply)(prepared, values)
    if kind is gaussian.Points:
        expected = [oracle.exact_kernel(f, m) @ v for f, m, v in zip(features, mask, values, strict=True)]
    else:
        assert prepared.capacity == 2 * N * (D + 1)
        expected = [oracle.lattice(f, v, m)[0] for f, m, v in zip(features, mask, values, strict=True)]
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert not np.any(got[~mask])


def test_prepare_without_mask_takes_all_points():
    features, _, values = points(160)
    for method, expected in (
        ("exact", oracle.exact_kernel(features) @ values),
        ("lattice", oracle.lattice(features, values)[0]),
    ):
        prepared = jax.jit(functools.partial(gaussian.prepare, method=method, capacity=N * (D + 1)))(features)
        np.testing.assert_allclose(gaussian.apply(prepared, values), expected, atol=2e-5)


def test_auto_is_exact_up_to_a_number_of_points(monkeypatch):
    monkeypatch.setitem(gaussian.EXACT_POINTS, jax.default_backend(), N)
    kind = lambda *shape: type(jax.eval_shape(gaussian.prepare, jnp.zeros(shape)))
    assert kind(2, N, D) is gaussian.Points and kind(N + 1, D) is permutohedral.Lattice


@pytest.mark.parametrize("method", gaussian.METHODS)
@pytest.mark.parametrize(
    ("features", "mask", "match"),
    [
        (np.zeros((N, D), np.int32), None, r"float \[..., N, d\], got int32 \(13, 3\)"),
        (np.zeros((N, D), np.float32), np.ones(D, bool), r"mask bool \(13,\), got bool \(3,\)"),
        (np.zeros((N, D), np.float32), np.ones(N, np.int32), r"mask bool \(13,\), got int32 \(13,\)"),
    ],
    ids=["dtype", "mask-shape", "mask-dtype"],
)
def test_refused_points(method, features, mask, match):
    with pytest.raises(ValueError, match=match):
        gaussian.prepare(features, mask, method)


@pytest.mark.parametrize("method", gaussian.METHODS)
def test_refused_features_of_one_axis(method):
    with pytest.raises(ValueError, match=r"float \[..., N, d\], got float32 \(13,\)"):
        gaussian.prepare(np.zeros(N, np.float32), None, method)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be one of auto, lattice, exact, got 'fast'"):
        gaussian.prepare(np.zeros((N, D), np.float32), method="fast")


@pytest.mark.parametrize("mask", [np.ones((3, 4, 1), bool), np.ones((3, 4), np.float32)], ids=["shape", "dtype"])
def test_refused_masks_of_the_grid(mask):
    with pytest.raises(ValueError, match=r"expected mask bool \(3, 4\), got"):
        gaussian.spatial(np.zeros((3, 4, 2), np.float32), 1.0, mask)
