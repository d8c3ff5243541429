"""Gaussian filters and the dense CRF in other people's programs: meshes, strict flags, odd arguments, accelerators."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from rows import full_but, full_row

from pwcrf_jax import dense_crf, gaussian, permutohedral

B, H, W, K = 2, 4, 2, 3
PARAMS = dense_crf.Params(3, (np.float32(2), 1), np.array([1.5, 2.0, 0.5]), jnp.float32(20), [13.0, 15, 17.0])
SETTINGS = dict(num_iterations=2, capacity=6 * H * W)


def problem(seed, dtype=np.float32, image_dtype=np.uint8):
    rng = np.random.default_rng(seed)
    log_p = np.asarray(jax.nn.log_softmax(2 * rng.normal(size=(B, H, W, K)).astype(np.float32)))
    image = rng.integers(0, 256, (B, H, W, 3)).astype(np.uint8)
    mask = rng.random((B, H, W)) > 0.2
    return jnp.asarray(log_p, dtype), jnp.asarray(image, image_dtype), mask


def flat(x, *more):
    return x.reshape(B, H * W, *x.shape[3:])


def lattice(log_p, image, mask):
    built = permutohedral.build(flat(log_p), flat(mask), 4 * B * H * W)
    return permutohedral.apply(built, flat(image))


CALLS = {
    "refine-exact": lambda p, x, m: dense_crf.refine(p, x, PARAMS, method="exact", mask=m, **SETTINGS)[0],
    "refine-lattice": lambda p, x, m: dense_crf.refine(p, x, PARAMS, method="lattice", **SETTINGS)[0],
    "refine-matrix": lambda p, x, m: dense_crf.refine(
        p, x, PARAMS._replace(smoothness_compat=np.eye(K), smoothness_sxy=9), method="exact", **SETTINGS
    )[0],
    "pixel_features": lambda p, x, m: dense_crf.pixel_features(x, (2, 3.0), 13),
    "exact": lambda p, x, m: gaussian.exact(flat(p), flat(m), flat(x)),
    "prepare-apply": lambda p, x, m: gaussian.apply(gaussian.prepare(flat(p), None, "exact"), flat(x)),
    "spatial-taps": lambda p, x, m: gaussian.spatial(p, 1, m),
    "spatial-matrix": lambda p, x, m: gaussian.spatial(p, [9.0, 8], m),
    "lattice": lattice,
}
EVERY = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def some(*names):
    """These calls here, the others by `make test-full`."""
    return pytest.mark.parametrize("call", full_but(CALLS.values(), *(CALLS[name] for name in names)), ids=CALLS)


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def loss_of(call):
    return lambda p, x, m: jnp.sum(jnp.square(call(p, x, m)))


@pytest.mark.parametrize(
    ("dtype", "image_dtype"), [("float32", "uint8"), full_row(("bfloat16", "float32")), ("float16", "bfloat16")]
)
@EVERY
def test_strict_flags_of_jax_raise_nothing(call, dtype, image_dtype):
    p, x, mask = problem(1, dtype, image_dtype)
    wanted = jax.eval_shape(call, p, x, mask)
    with strict():
        assert jax.eval_shape(call, p, x, mask) == wanted
        argument = 1 if call is CALLS["pixel_features"] else 0
        x = x.astype("float32") if argument else x
        gradient = jax.eval_shape(jax.grad(loss_of(call), argument), p, x, mask)
    assert gradient.shape == (p, x)[argument].shape and wanted.dtype == jnp.float32


@some("refine-exact", "refine-lattice", "pixel_features", "exact", "spatial-taps", "lattice")
def test_a_second_call_compiles_nothing(call, caplog):
    said = lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]
    with strict(), jax.log_compiles(True):
        first = np.asarray(call(*problem(2)))
        assert said()  # that it is counted at all
        caplog.clear()
        second = np.asarray(call(*problem(3)))
    assert not said() and np.abs(first - second).max() > 0


def test_other_numbers_as_parameters_compile_nothing(caplog):
    p, x, _ = problem(4)
    run = lambda w: dense_crf.refine(p, x, PARAMS._replace(appearance_compat=w), method="exact", **SETTINGS)[0]
    run(2)
    with jax.log_compiles(True):
        for other in (3.5, np.float64(1), np.int64(4), np.float32(0.25)):
            run(other).block_until_ready()
    assert not [r for r in caplog.records if r.getMessage().startswith("Compiling")]


LAYOUTS = {
    "batch": ((2,), jax.P("x"), jax.P("x")),
    "rows": ((2,), jax.P(None, "x"), jax.P(None, "x")),
    "batch-and-rows": ((2, 2), jax.P("x", "y"), jax.P("x", "y")),
    "scores-whole": ((2,), jax.P(), jax.P("x")),
    "image-whole": ((2,), jax.P(("x",)), jax.P()),
}


def laid_out(layout, kinds, *arrays):
    sizes, of_scores, of_image = LAYOUTS[layout]
    mesh = jax.make_mesh(sizes, ("x", "y")[: len(sizes)], axis_types=(kinds,) * len(sizes))
    return mesh, [
        jax.device_put(a, jax.NamedSharding(mesh, s))
        for a, s in zip(arrays, (of_scores, of_image, of_scores), strict=True)
    ]


OF_IMAGES = [name for name in CALLS if name.startswith(("refine", "pixel", "spatial"))]  # others reshape for themselves
MESHES = [("batch", name) for name in CALLS] + [
    ("rows", "refine-exact"),
    ("rows", "spatial-taps"),
    ("batch-and-rows", "refine-lattice"),
    ("batch-and-rows", "pixel_features"),
    ("scores-whole", "refine-lattice"),
    ("scores-whole", "exact"),
    ("image-whole", "refine-exact"),
    ("image-whole", "lattice"),
]


KEPT = [("batch", name) for name in ("refine-exact", "spatial-matrix", "lattice")] + MESHES[len(CALLS) :: 3]


@pytest.mark.parametrize(("layout", "name"), full_but(MESHES, *KEPT), ids=str)
def test_arrays_may_lie_on_an_explicit_mesh(layout, name):
    arrays, call = problem(5), CALLS[name]
    _, there = laid_out(layout, AxisType.Explicit, *arrays)
    np.testing.assert_allclose(call(*there), call(*arrays), rtol=1e-5, atol=1e-5)


@some("pixel_features")
def test_gradients_on_an_explicit_mesh(call):
    p, x, mask = problem(6, image_dtype=np.float32)
    gradient = jax.grad(loss_of(call), (0, 1))
    expected = jax.jit(gradient)(p, x, mask)
    mesh, there = laid_out("batch", AxisType.Explicit, p, x, mask)
    got = jax.jit(gradient)(*there)
    with jax.set_mesh(mesh):
        eager = gradient(*there)
    for a, b, wanted, given in zip(got, eager, expected, there[:2], strict=True):
        np.testing.assert_allclose(a, wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(b, wanted, rtol=1e-4, atol=1e-4)
        assert a.sharding.is_equivalent_to(given.sharding, a.ndim)


def test_marginals_lie_as_the_batch_does():
    _, there = laid_out("batch", AxisType.Explicit, *problem(7))
    log_q, info = dense_crf.refine(*there[:2], PARAMS, method="lattice", **SETTINGS)
    assert log_q.sharding.is_equivalent_to(there[0].sharding, 4)
    assert info.change.sharding.spec == jax.P(None, "x") and info.num_vertices.shape == ()


@some("refine-lattice", "spatial-matrix")
def test_shard_map_with_its_check_of_what_varies(call):
    arrays = problem(8)
    mesh, there = laid_out("batch", AxisType.Auto, *arrays)
    one = lambda *a: call(*(jnp.concatenate([x, x]) for x in a))[:1]  # calls reshape to B images
    mapped = jax.shard_map(one, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"))
    got = jax.jit(mapped)(*there)
    for i in range(B):
        alone = call(*(jnp.stack([x[i], x[i]]) for x in arrays))[0]
        np.testing.assert_allclose(got[i], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", ["refine-exact", "refine-matrix", "exact", "spatial-matrix"])
def test_float32_products_stay_float32_on_accelerators(name, platform):
    call, (p, x, mask) = CALLS[name], problem(9, image_dtype=np.float32)
    program = jax.jit(jax.grad(loss_of(call), (0, 1))).trace(p, x, mask).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert products
    for line in products:
        assert re.search(r"precision = \[HIGHEST, HIGHEST\]", line), line


@functools.cache  # compiled once for all contents
def gradient_under_a_mask(method, normalization):
    def loss(p, x, params, mask):
        settings = dict(method=method, mask=mask, normalization=normalization)
        log_q, _ = dense_crf.refine(p, x, params, **settings, **SETTINGS)
        return jnp.sum(jnp.square(jnp.where(mask[..., None], log_q, 0.0)))

    return jax.jit(jax.grad(loss, (0, 1, 2)))


@pytest.mark.parametrize("content", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("normalization", full_but(["before", "after"], "before"))
@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_what_lies_under_the_mask_reaches_no_gradient(method, normalization, content):
    p, x, mask = problem(10, image_dtype=np.float32)
    params = jax.tree.map(jnp.float32, dense_crf.Params(2.0, 3.0, 4.0, 20.0, 30.0))
    gradient = gradient_under_a_mask(method, normalization)
    full = lambda a: jnp.where(mask[..., None], a, content)
    got, expected = gradient(full(p), full(x), params, mask), gradient(p, x, params, mask)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(a).all() and np.any(a)
        np.testing.assert_array_equal(a, b)


def test_an_infinite_cotangent_of_a_masked_point_stays_there():
    features, values = np.random.default_rng(11).normal(size=(2, 6, 3)).astype(np.float32)
    mask = np.arange(6) > 1
    for method in ("exact", "lattice"):
        sums = lambda v, m=method: gaussian.apply(gaussian.prepare(features, mask, m), v)
        gradient = jax.grad(lambda v: jnp.sum(jnp.where(mask[:, None], 1 / (sums(v) + 1e-30), 0)))(values)  # noqa: B023
        assert np.isfinite(gradient).all() and not np.any(gradient[:2]) and np.any(gradient[2:])


@pytest.mark.parametrize("method", ["exact", "lattice"])
@pytest.mark.parametrize("labels", [[0], [2], [0, 1], [1, 2]], ids=str)
def test_labels_ruled_out_leave_numbers_and_gradients(labels, method):
    p, x, _ = problem(12)
    p = p.at[:, 1:3, :, jnp.array(labels)].set(-jnp.inf)
    p = jax.nn.log_softmax(p)
    run = lambda p: dense_crf.refine(p, x, PARAMS, method=method, **SETTINGS)[0]
    q = jnp.exp(run(p))
    assert not np.any(q[:, 1:3, :, jnp.array(labels)]) and np.isfinite(q).all()
    np.testing.assert_allclose(q.sum(-1), 1, atol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(jnp.exp(run(p))[..., 0] ** 2))(p)
    assert np.isfinite(gradient).all() and np.any(gradient)


class Foreign:
    """An array of another library."""

    def __init__(self, x):
        self.x = np.asarray(x)

    def __array__(self, dtype=None, copy=None):
        return self.x if dtype is None else self.x.astype(dtype)


@pytest.mark.parametrize("form", [np.ndarray.tolist, lambda x: tuple(x.tolist()), list, Foreign])
@pytest.mark.parametrize("name", ["refine-exact", "pixel_features", "spatial-taps", "exact"])
def test_lists_tuples_and_foreign_arrays_are_arrays(name, form):
    arrays, call = [np.asarray(x) for x in problem(13, image_dtype=np.float32)], CALLS[name]
    if name == "exact":
        arrays, call = [flat(x) for x in arrays], lambda p, x, m: gaussian.exact(p, m, x)
    np.testing.assert_allclose(call(*map(form, arrays)), call(*arrays), rtol=1e-6, atol=1e-6)


POINTS = np.zeros((5, 2), np.float32)
GRID = np.zeros((2, 3, 1), np.float32)


def with_(array, value):
    array = np.array(array)
    array.flat[-1] = value
    return array


REFUSED = {
    "features-nan": (lambda: gaussian.prepare(with_(POINTS, np.nan)), "finite and within 1e[+]06 .* got nan"),
    "features-inf": (lambda: permutohedral.build(with_(POINTS, -np.inf)), "finite and within .* got inf"),
    "features-far": (lambda: permutohedral.build(with_(POINTS, 3e9)), "finite and within .* got 3e[+]09"),
    "features-exact": (lambda: gaussian.exact(with_(POINTS, np.nan), None, POINTS), "finite and within"),
    "features-ragged": (lambda: permutohedral.build([[0.0], [1.0, 2.0]]), "features: expected an array; got list"),
    "no-points": (lambda: permutohedral.build(POINTS[:0]), r"at least one point .* got shape \(0, 2\)"),
    "no-dimensions": (lambda: gaussian.prepare(POINTS[:, :0]), r"at least one point .* got shape \(5, 0\)"),
    "capacity-float": (lambda: permutohedral.build(POINTS, capacity=2.5), "capacity: expected an integer, .* got 2.5"),
    "exact-mask": (lambda: gaussian.exact(POINTS, np.ones(4, bool), POINTS), r"mask bool \(5,\), got bool \(4,\)"),
    "values-string": (lambda: gaussian.exact(POINTS, None, "values"), "values: expected an array; got str"),
    "sigma-zero": (lambda: gaussian.spatial(GRID, 0), "sigma: expected positive standard deviations; got 0"),
    "sigma-nan": (lambda: gaussian.spatial(GRID, (1.0, np.nan)), "sigma: expected finite numbers; got"),
    "sigma-string": (lambda: gaussian.spatial(GRID, "wide"), "sigma: expected an array; got str"),
    "sigma-three": (lambda: gaussian.spatial(GRID, [1, 2, 3]), r"sigma: expected a number or 2 .* got shape \(3,\)"),
    "radius-float": (lambda: gaussian.spatial(GRID, 1, None, 2.0), "radius: expected an integer, 0 or more, or None"),
    "grid-flat": (lambda: gaussian.spatial(GRID[0], 1), r"expected values \[..., H, W, C\].* got \(3, 1\)"),
    "colours-grey": (lambda: dense_crf.pixel_features(GRID, 1, 1), r"expected RGB, .* got shape \(2, 3, 1\)"),
    "compat-string": (lambda: refine(smoothness_compat="3"), "params.smoothness_compat: expected an array; got str"),
    "compat-bool": (lambda: refine(appearance_compat=True), "params.appearance_compat: expected a number.* got bool"),
    "compat-complex": (lambda: refine(appearance_compat=1j), "params.appearance_compat: .* got complex128"),
    "compat-ragged": (lambda: refine(appearance_compat=[[1], [2, 3]]), "expected an array; got list"),
    "compat-huge": (lambda: refine(appearance_compat=10**400), "params.appearance_compat: expected an array; got int"),
    "sxy-none": (lambda: refine(smoothness_sxy=None), "params.smoothness_sxy: expected an array; got NoneType"),
    "sxy-underflow": (lambda: refine(smoothness_sxy=1e-60), "params.smoothness_sxy: expected positive .* got 1e-60"),
    "srgb-overflow": (lambda: refine(appearance_srgb=1e60), "params.appearance_srgb: expected finite .* got 1e"),
}


def refine(**changes):
    p, x, _ = problem(14)
    return dense_crf.refine(p, x, PARAMS._replace(**changes), num_iterations=1)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name):
    call, match = REFUSED[name]
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_features_under_the_mask_are_not_looked_at_and_traced_ones_not_at_all():
    mask = np.arange(5) < 4
    assert np.isfinite(gaussian.exact(with_(POINTS, np.nan), mask, POINTS)).all()
    assert jax.jit(lambda x: permutohedral.build(x).weight)(with_(POINTS, np.nan)).shape == (3, 5)
