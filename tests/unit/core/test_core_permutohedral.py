"""The permutohedral lattice against a dictionary of vertices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import full_but

from pwcrf_jax import permutohedral
from reference import dense_crf_oracle as oracle

N, D, C = 14, 3, 2


@functools.partial(jax.jit, static_argnames="capacity")
def build(features, mask=None, capacity=None):
    return permutohedral.build(features, mask, capacity)


apply = jax.jit(permutohedral.apply)


def run(features, values, mask=None, capacity=None):
    lattice = build(features, mask, capacity)
    return apply(lattice, values), lattice.num_vertices, lattice.exceeded


def points(seed, n=N, d=D, spread=1.0, channels=C):
    rng = np.random.default_rng(seed)
    return (spread * rng.normal(size=(n, d))).astype(np.float32), rng.normal(size=(n, channels)).astype(np.float32)


def enough(features):
    """Room for any vertices of points [..., N, d]."""
    return int(np.prod(features.shape[:-1])) * (features.shape[-1] + 1)


def matches(features, values, mask=None, capacity=None, atol=2e-5):
    got, count, exceeded = run(features, values, mask, capacity or enough(features))
    expected, expected_count = oracle.lattice(features, values, mask)
    assert count == expected_count and not exceeded
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)
    return np.asarray(got)


@pytest.mark.parametrize("d", full_but(range(1, 8), 1, 2, 5))
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_matches_a_dictionary_of_vertices(d, spread):
    matches(*points(100 + d, n=25, d=d, spread=spread))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.floats(0.05, 5), st.lists(st.integers(0, N - 1), max_size=N), st.integers(0, N))
def test_matches_whatever_the_scale_duplicates_and_mask(seed, spread, copies, masked):
    features, values = points(seed, spread=spread)
    features[: len(copies)] = features[copies]
    matches(features, values, np.arange(N) >= masked)


def test_one_point_receives_the_weight_of_its_own_splat():
    matches(*points(110, n=1))


def test_duplicates_receive_the_same():
    features, values = points(111)
    got = matches(np.repeat(features[:1], N, axis=0), values)
    np.testing.assert_allclose(got, np.broadcast_to(got[0], got.shape), rtol=1e-6)


def test_points_of_one_cell_share_its_vertices():
    features, values = points(112, spread=1e-3)
    features += np.float32([0.21, 0.34, 0.13])
    assert run(features, values, None, enough(features))[1] == D + 1
    matches(features, values)


def test_far_apart_points_receive_only_from_themselves():
    features, values = points(113)
    far = features + 100 * np.arange(N, dtype=np.float32)[:, None]
    got = matches(far, values, atol=2e-4)
    for i in range(N):
        np.testing.assert_allclose(got[i : i + 1], oracle.lattice(far[i : i + 1], values[i : i + 1])[0], atol=2e-4)


def test_noise_needs_a_vertex_for_every_corner_of_every_point():
    features, values = points(114, n=60, d=5, spread=300)
    assert build(features, capacity=360).num_vertices == 360
    matches(features, values, capacity=360, atol=2e-3)


def test_noise_of_many_points_loses_no_vertex():
    """The hash table is as full as it gets: a vertex not found would show in the count or as a filter of zero."""
    features, _ = points(115, n=20_000, d=5, spread=3000)
    lattice = build(features, capacity=120_000)
    assert lattice.num_vertices == len(np.unique(lattice.vertex)) <= 120_000 and lattice.vertex.max() < 120_000
    assert lattice.num_vertices > 110_000 and not lattice.exceeded


@pytest.mark.parametrize("d", [1, 2, 5])
def test_barycentric_weights_are_a_convex_combination(d):
    features, _ = points(116, n=200, d=d, spread=3)
    weight = build(features, capacity=enough(features)).weight
    assert weight.shape == (d + 1, 200) and weight.min() >= -1e-6
    np.testing.assert_allclose(weight.sum(0), 1, atol=1e-5)


def test_neighbours_are_each_others():
    features, _ = points(117, n=40)
    lattice = build(features, capacity=enough(features))
    before, after = np.asarray(lattice.neighbours).transpose(1, 0, 2)
    none, pairs = lattice.capacity, 0
    for direction in range(D + 1):
        for vertex in range(int(lattice.num_vertices)):
            next_one = after[direction, vertex]
            if next_one != none:
                assert before[direction, next_one] == vertex
                pairs += 1
    assert pairs > 10


@pytest.mark.parametrize("masked", [False, True])
def test_images_do_not_see_one_another(masked):
    """Two images of a batch lie in the same place, the third elsewhere."""
    features, values = points(118, n=3 * N)
    features, values = features.reshape(3, N, D), values.reshape(3, N, C)
    features[1] = features[0]
    mask = np.random.default_rng(118).random((3, N)) > 0.3 if masked else None
    got, count, _ = run(features, values, mask, enough(features))
    one_mask = lambda i: None if mask is None else mask[i]
    alone = [oracle.lattice(features[i], values[i], one_mask(i)) for i in range(3)]
    assert count == sum(n for _, n in alone)
    np.testing.assert_allclose(got, [v for v, _ in alone], rtol=1e-5, atol=2e-5)


def test_leading_axes_are_images():
    features, values = points(119, n=4 * N)
    shape = lambda x, *lead: x.reshape(*lead, N, x.shape[-1])
    got = run(shape(features, 2, 2), shape(values, 2, 2))[0]
    np.testing.assert_array_equal(got.reshape(4, N, C), run(shape(features, 4), shape(values, 4))[0])


@pytest.mark.parametrize("garbage", [1e4, np.inf, np.nan])
def test_masked_points_are_as_if_left_out(garbage):
    features, values = points(120)
    mask = np.random.default_rng(120).random(N) > 0.4
    dirty = np.where(mask[:, None], features, garbage).astype(np.float32)
    got, count, _ = run(dirty, np.where(mask[:, None], values, garbage).astype(np.float32), mask, enough(features))
    expected, expected_count = oracle.lattice(features[mask], values[mask])
    assert count == expected_count
    np.testing.assert_allclose(got[mask], expected, rtol=1e-5, atol=2e-5)
    assert not np.any(got[~mask])


def test_all_masked():
    features, values = points(121)
    got, count, exceeded = run(features, values, np.zeros(N, bool))
    assert not np.any(got) and count == 0 and not exceeded


@pytest.fixture(scope="module")
def spread_out():
    features, values = points(122, spread=2)
    expected, count = oracle.lattice(features, values)
    assert N < count < enough(features)
    return features, values, expected, count


def test_exactly_enough_capacity_is_enough(spread_out):
    features, values, expected, count = spread_out
    np.testing.assert_allclose(matches(features, values, capacity=count), expected, atol=2e-5)


def test_one_vertex_too_few_is_reported(spread_out):
    features, values, _, count = spread_out
    _, needed, exceeded = run(features, values, None, count - 1)
    assert exceeded and needed > count - 1


@pytest.mark.parametrize("capacity", [1, 5])
def test_tiny_capacities_are_reported_and_compute_something_finite(spread_out, capacity):
    features, values, _, _ = spread_out
    got, needed, exceeded = run(features, values, None, capacity)
    assert exceeded and needed > capacity and np.isfinite(got).all()


def test_a_vertex_given_up_by_the_hash_table_is_reported(spread_out, monkeypatch):
    features, _, _, count = spread_out
    with monkeypatch.context() as patch:
        patch.setattr(permutohedral, "_PROBES", 1)
        jax.clear_caches()  # it is read where programs are traced
        lattice = permutohedral.build(features, capacity=count)
    jax.clear_caches()
    assert np.any(lattice.vertex == count) and lattice.exceeded and lattice.num_vertices > count


def test_spare_capacity_changes_nothing(spread_out):
    features, values, _, count = spread_out
    np.testing.assert_array_equal(run(features, values, None, count)[0], run(features, values, None, 5000)[0])


def test_capacities_larger_than_a_block():
    """Vertices are blurred and looked up in blocks of 4096; the last one overlaps that before."""
    features, values = points(123, n=1500, d=3, spread=6)
    got, count, _ = run(features, values, None, 5000)
    assert 4096 < count <= 5000
    expected, expected_count = oracle.lattice(features, values)
    assert count == expected_count
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "d", "capacity"), [(10, 3, 40), (5461, 5, 32_766), (5462, 5, 32_768), (32_769, 5, 32_769)]
)
def test_default_capacity_is_the_number_of_points_or_all_that_few_can_need(n, d, capacity):
    assert jax.eval_shape(permutohedral.build, jnp.zeros((n, d))).capacity == capacity


def dense(features, mask=None):
    return oracle.lattice_kernel(features, mask)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_of_values_is_the_transpose(masked):
    features, values = points(125)
    mask = np.random.default_rng(125).random(N) > 0.3 if masked else None
    u = points(126)[1]
    lattice = build(features, mask, enough(features))
    matrix = dense(features, mask)
    assert np.abs(matrix - matrix.T).max() > 1e-2
    out, pull = jax.vjp(lambda v: permutohedral.apply(lattice, v), values)
    (got,) = pull(u if mask is None else np.where(mask[:, None], u, np.nan).astype(u.dtype))  # nor does NaN come back
    np.testing.assert_allclose(got, matrix.T @ u, rtol=1e-5, atol=2e-5)
    assert np.vdot(u, out) == pytest.approx(np.vdot(got, values), rel=1e-4)


def test_second_derivative_of_values():
    features, values = points(127)
    u = points(128)[1]
    lattice = build(features, None, enough(features))
    loss = lambda v: jnp.sum(permutohedral.apply(lattice, v) ** 3)
    got = jax.jit(jax.grad(lambda v: jnp.vdot(jax.grad(loss)(v), u)))(values)
    matrix = dense(features)
    np.testing.assert_allclose(got, matrix.T @ (6 * (matrix @ values) * (matrix @ u)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("d", full_but([1, 2, 5], 2))
def test_gradient_of_features(d):
    features, values = points(129, n=8, d=d)
    u = points(130, n=8, d=d)[1]
    loss = lambda f: jnp.vdot(u, permutohedral.apply(permutohedral.build(f, capacity=enough(features)), values))
    got = jax.jit(jax.grad(loss))(features)
    expected = oracle.derivative(lambda f: np.vdot(u, oracle.lattice(f, values)[0]), features, 1e-6)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_masked_points_have_no_gradient():
    features, values = points(131)
    mask = np.arange(N) % 3 > 0
    loss = lambda f, v: jnp.sum(permutohedral.apply(permutohedral.build(f, mask, enough(features)), v) ** 2)
    for g in jax.jit(jax.grad(loss, (0, 1)))(features, values):
        assert not np.any(g[~mask]) and np.all(np.any(g[mask], axis=-1))


def test_vmap_is_one_lattice_an_image():
    features, values = points(132, n=2 * N)
    features, values = features.reshape(2, N, D), values.reshape(2, N, C)
    got, count, _ = jax.vmap(lambda f, v: run(f, v, None, enough(f)))(features, values)
    alone = [run(f, v, None, enough(f)) for f, v in zip(features, values, strict=True)]
    np.testing.assert_allclose(got, [v for v, _, _ in alone], rtol=1e-5, atol=1e-6)
    assert count.tolist() == [int(n) for _, n, _ in alone]


def test_narrow_floats_are_computed_in_float32():
    features, values = (jnp.asarray(x, jnp.bfloat16) for x in points(133))
    got = run(features, values, None, enough(features))[0]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, oracle.lattice(features, values)[0], rtol=1e-5, atol=2e-5)


def theirs(features, values):
    """pydensecrf's filter without normalisation: one iteration of mean field adds K Q to the unary."""
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    n, classes = values.shape
    crf = densecrf.DenseCRF(n, classes)
    crf.setUnaryEnergy(np.ascontiguousarray(-np.log(values.T), np.float32))
    kernel, normalization = densecrf.DIAG_KERNEL, densecrf.NO_NORMALIZATION
    crf.addPairwiseEnergy(np.ascontiguousarray(features.T), compat=1.0, kernel=kernel, normalization=normalization)
    q = np.array(crf.inference(1)).T.astype(np.float64)
    # Marginals of a point sum to 1, and so its messages to the number that it receives of ones.
    messages = np.log(q) - np.log(values)
    return messages - messages.mean(axis=1, keepdims=True)


@pytest.mark.parametrize(("d", "n"), [(2, 32), (5, 32), (5, 30)])
def test_is_pydensecrfs_lattice(d, n):
    """It fills up its points to a multiple of 4 with some at the origin, whose vertices pass values on."""
    features, _ = points(134, n=n, d=d)
    values = oracle.softmax(np.random.default_rng(134).normal(size=(n, 3)))
    expected = theirs(features, values)
    fill = lambda x: np.pad(x, ((0, -n % 4), (0, 0)))
    got = np.asarray(run(fill(features), fill(values), None, enough(features) + 4 * d)[0], np.float64)[:n]
    centred = lambda x: x - x.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centred(got), expected, atol=1e-4)
    true = centred(oracle.exact_kernel(features) @ values)
    assert np.abs(centred(got) - true).max() <= np.abs(expected - true).max() + 1e-4


def test_approximates_the_gaussian():
    """Points as dense as pixels: the relative error of the filter of ones is some percent."""
    grid = np.stack(np.meshgrid(np.arange(24), np.arange(24)), -1).reshape(-1, 2).astype(np.float32) / 5
    got = np.asarray(run(grid, np.ones((576, 1), np.float32))[0])[:, 0]
    distance = np.sum((grid[:, None] - grid) ** 2, -1)
    true = np.exp(-distance / 2).sum(1)
    assert np.abs(got / true - 1).mean() < 0.15


@pytest.mark.parametrize(
    ("features", "mask", "capacity", "match"),
    [
        (np.zeros(3, np.float32), None, None, r"float \[..., N, d\], got float32 \(3,\)"),
        (np.zeros((3, 2), np.int32), None, None, r"float \[..., N, d\], got int32 \(3, 2\)"),
        (np.zeros((3, 2), np.float32), np.ones(2, bool), None, r"mask bool \(3,\), got bool \(2,\)"),
        (np.zeros((3, 2), np.float32), np.ones(3, np.float32), None, r"mask bool \(3,\), got float32 \(3,\)"),
        (np.zeros((3, 2), np.float32), None, 0, "capacity: expected an integer, 1 or more, or None; got 0"),
    ],
    ids=["ndim", "dtype", "mask-shape", "mask-dtype", "capacity"],
)
def test_refused_points(features, mask, capacity, match):
    with pytest.raises(ValueError, match=match):
        permutohedral.build(features, mask, capacity)


def test_too_many_points_for_32_bits_are_refused():
    features = jax.ShapeDtypeStruct((2**28, 7), jnp.float32)
    with pytest.raises(ValueError, match="268435456 points in 7 dimensions are too many"):
        jax.eval_shape(permutohedral.build, features)


@pytest.mark.parametrize("shape", [(N,), (N - 1, C), (2, N, C)], ids=str)
def test_refused_values(shape):
    lattice = build(points(135)[0])
    with pytest.raises(ValueError, match=rf"values \[..., N, C\] of {N} points in all, got"):
        permutohedral.apply(lattice, np.zeros(shape, np.float32))
