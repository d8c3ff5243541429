"""The dense CRF against dense kernel matrices, and against pydensecrf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import full_but

from pwcrf_jax import dense_crf
from reference import dense_crf_oracle as oracle

H, W, K = 8, 11, 3
ROOM = 6 * H * W
# Reaches across the image: at four standard deviations no tap is left out.
PARAMS = dense_crf.Params(1.5, (2.7, 3.1), 2.5, (4.3, 3.3), (61.0, 47.0, 72.0))
MATRIX = np.array([[0.2, 1.3, 2.1], [0.4, -0.9, 0.8], [0.7, 1.9, -0.3]])
COMPATS = {"potts": 3.5, "labels": np.array([-0.6, -1.7, -2.4]), "matrix": MATRIX}
APPEARANCE = PARAMS._replace(smoothness_compat=None)
SMOOTHNESS = PARAMS._replace(appearance_compat=None)


def problem(seed, *lead, height=H, width=W, classes=K):
    """log P and an image of a few colours with noise."""
    rng = np.random.default_rng(seed)
    parts = rng.integers(60, 200, (*lead, 3, 3))
    place = rng.integers(0, 3, (*lead, height, width))
    scores = rng.normal(size=(*lead, height, width, classes)) + (place[..., None] == np.arange(classes))
    image = np.take_along_axis(parts[..., None, :, :], place[..., None], axis=-2)
    image = image + rng.integers(-50, 50, image.shape)
    return np.log(oracle.softmax(scores)).astype(np.float32), image.astype(np.uint8)


def agree(got, expected, atol=2e-5):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)


EXACT = [
    *(("potts", normalization) for normalization in dense_crf.NORMALIZATIONS),
    ("labels", "before"),
    ("matrix", "after"),
    ("matrix", "symmetric"),
]
LATTICE = [("potts", "before"), ("potts", "none"), ("labels", "after"), ("matrix", "symmetric")]


@pytest.mark.parametrize(
    ("method", "compat", "normalization"),
    full_but([("exact", *x) for x in EXACT], *(("exact", *x) for x in EXACT[-3:]))
    + full_but([("lattice", *x) for x in LATTICE], *(("lattice", *x) for x in LATTICE[1::2])),
)
def test_matches_dense_kernel_matrices(method, compat, normalization):
    unary, image = problem(170)
    scale = 0.1 if normalization == "none" else 1.0
    params = PARAMS._replace(smoothness_compat=-scale * MATRIX.T, appearance_compat=scale * COMPATS[compat])
    if compat == "matrix":
        params = params._replace(smoothness_compat=scale * COMPATS["labels"])
    settings = dict(normalization=normalization, method=method, capacity=ROOM)
    log_q, info = dense_crf.refine(unary, image, params, 3, **settings)
    kernel = dict(exact=oracle.exact_kernel, lattice=oracle.lattice_kernel)[method]
    expected, changes = oracle.refine(unary, image, params, 3, None, normalization, kernel)
    assert log_q.dtype == jnp.float32 and np.abs(expected - unary).max() > 0.3
    agree(log_q, expected)
    agree(info.change, changes)


@pytest.mark.parametrize("num_iterations", [0, 1, 8])
def test_iterations(num_iterations):
    unary, image = problem(171)
    log_q, info = dense_crf.refine(unary, image, PARAMS, num_iterations, method="exact")
    expected, changes = oracle.refine(unary, image, PARAMS, num_iterations)
    agree(log_q, expected)
    assert info.change.shape == (num_iterations,)
    agree(info.change, changes)


@pytest.mark.parametrize("params", [SMOOTHNESS, APPEARANCE], ids=["smoothness", "appearance"])
def test_one_kernel_alone(params):
    unary, image = problem(172)
    log_q, info = dense_crf.refine(unary, image, params, 3, method="exact")
    expected, changes = oracle.refine(unary, image, params, 3)
    agree(log_q, expected)
    agree(info.change, changes)


def test_no_kernel_leaves_the_unary():
    unary, image = problem(173)
    log_q, info = dense_crf.refine(unary, image, dense_crf.Params(None, 1.0, None), 3)
    agree(log_q, unary)
    agree(info.change, np.zeros(3))


def test_defaults():
    """The parameters of pydensecrf's example; ten iterations, symmetric normalisation."""
    unary, image = problem(175)
    log_q, info = dense_crf.refine(unary, image)
    expected, changes = oracle.refine(unary, image, dense_crf.Params(3, 3, 10, 80, 13), 10)
    agree(log_q, expected, 2e-4)
    assert info.change.shape == (10,)


def test_parameters_may_be_traced():
    unary, image = problem(176)
    run = jax.jit(lambda *args: dense_crf.refine(*args, 2, method="exact")[0])
    for params in (PARAMS, dense_crf.Params(MATRIX, 0.5, COMPATS["labels"], 2.0, 30.0)):
        arrays = dense_crf.Params(*(jnp.asarray(x, jnp.float32) for x in params))
        agree(run(unary, image, arrays), oracle.refine(unary, image, params, 2)[0])


def test_traced_parameters_may_stand_in_tuples_and_lists():
    unary, image = problem(195)
    params = PARAMS._replace(appearance_compat=MATRIX.tolist())
    run = jax.jit(lambda *args: dense_crf.refine(*args, 2, method="exact")[0])
    agree(run(unary, image, params), oracle.refine(unary, image, params, 2)[0])


def test_inside_jit_images_may_be_constants():
    unary, image = problem(195)
    run = jax.jit(lambda w: dense_crf.refine(unary, image, PARAMS._replace(appearance_compat=w), 2, method="exact")[0])
    agree(run(2.5), oracle.refine(unary, image, PARAMS, 2)[0])


def test_own_tap_alone_adds_the_own_marginal():
    unary, image = problem(177)
    log_q, _ = dense_crf.refine(unary, image, SMOOTHNESS._replace(smoothness_compat=1.5), 1, radius=0)
    agree(log_q, jax.nn.log_softmax(unary + 1.5 * np.exp(unary)))


def test_taps_of_known_standard_deviations_stop_at_four_of_them():
    unary, image = problem(178, height=1, width=40)
    params = SMOOTHNESS._replace(smoothness_sxy=(2.0, 1.0))
    run = lambda **radius: np.asarray(dense_crf.refine(unary, image, params, 1, **radius)[0])
    np.testing.assert_array_equal(run(), run(radius=8))
    assert np.abs(run() - run(radius=39)).max() > 1e-5


def test_features_are_positions_and_colours_in_standard_deviations():
    _, image = problem(179, 2)
    got = dense_crf.pixel_features(image, (2.0, 4.0), (5.0, 10.0, 20.0))
    assert got.shape == (2, H, W, 5) and got.dtype == jnp.float32
    for i in range(2):
        expected = oracle.features(image[i], (2.0, 4.0), (5.0, 10.0, 20.0))
        np.testing.assert_allclose(got[i].reshape(-1, 5), expected, rtol=1e-6)
    one = dense_crf.pixel_features(image[0].astype(np.float32), 2.0, 5.0)
    np.testing.assert_allclose(one.reshape(-1, 5), oracle.features(image[0], 2.0, 5.0), rtol=1e-6)


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_each_image_of_a_batch_is_as_if_alone(method):
    unary, image = problem(180, 2, 2)
    mask = np.random.default_rng(180).random(unary.shape[:-1]) > 0.3
    settings = dict(method=method, capacity=ROOM)
    log_q, info = dense_crf.refine(unary, image, PARAMS, 3, mask=mask, **settings)
    assert info.change.shape == (3, 2, 2)
    needed = 0
    for i in np.ndindex(2, 2):
        alone, one = dense_crf.refine(unary[i], image[i], PARAMS, 3, mask=mask[i], **settings)
        agree(log_q[i], alone)
        agree(info.change[:, *i], one.change)
        needed += one.num_vertices
    assert info.num_vertices == needed


PADDING = ((0, 3), (0, 2), (0, 0))


@pytest.mark.parametrize("method", ["exact", "lattice"])
@pytest.mark.parametrize("content", full_but([0.0, 1e4, -np.inf, np.nan], 1e4, np.nan))
def test_padding_of_any_content_changes_nothing(method, content):
    unary, image = problem(181)
    rng = np.random.default_rng(181)
    mask = np.pad(np.ones((H, W), bool), PADDING[:2])
    padded = np.pad(unary, PADDING, constant_values=content)
    if content == 1e4:
        padded[~mask] *= rng.normal(size=padded[~mask].shape)
    bigger = np.where(mask[..., None], np.pad(image, PADDING), rng.integers(0, 256, (*mask.shape, 3))).astype(np.uint8)
    settings = dict(method=method, capacity=ROOM)
    log_q, info = dense_crf.refine(padded, bigger, PARAMS, 3, mask=mask, **settings)
    expected, without = dense_crf.refine(unary, image, PARAMS, 3, **settings)
    agree(log_q[:H, :W], expected, 1e-5)
    agree(info.change, without.change, 1e-5)
    assert info.num_vertices == without.num_vertices


@pytest.mark.parametrize("method", ["exact", "lattice"])
@pytest.mark.parametrize("content", full_but([-1e4, np.inf, np.nan], np.inf))
def test_padding_of_the_image_may_hold_anything(method, content):
    unary, image = problem(182)
    mask = np.pad(np.ones((H, W), bool), PADDING[:2])
    bigger = np.pad(image.astype(np.float32), PADDING, constant_values=content)
    settings = dict(method=method, capacity=ROOM)
    log_q, _ = dense_crf.refine(np.pad(unary, PADDING), bigger, PARAMS, 3, mask=mask, **settings)
    agree(log_q[:H, :W], dense_crf.refine(unary, image, PARAMS, 3, **settings)[0], 1e-5)


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_masked_pixels_keep_log_p_and_the_others_are_as_if_they_were_not_there(method):
    unary, image = problem(183)
    mask = np.random.default_rng(183).random((H, W)) > 0.4
    log_q, info = dense_crf.refine(unary, image, PARAMS, 3, mask=mask, method=method, capacity=ROOM)
    kernel = dict(exact=oracle.exact_kernel, lattice=oracle.lattice_kernel)[method]
    expected, changes = oracle.refine(unary, image, PARAMS, 3, mask, appearance_kernel=kernel)
    agree(log_q, expected)
    agree(log_q[~mask], unary[~mask])
    agree(info.change, changes)


def test_nothing_changes_where_all_is_masked():
    unary, image = problem(184)
    mask = np.zeros((H, W), bool)
    log_q, info = dense_crf.refine(unary, image, PARAMS, 2, mask=mask, method="exact")
    agree(log_q, unary)
    agree(info.change, np.zeros(2))


def test_a_lattice_too_small_is_reported():
    unary, image = problem(185)
    places = oracle.features(image, APPEARANCE.appearance_sxy, APPEARANCE.appearance_srgb)
    _, count = oracle.lattice(places, np.zeros((H * W, 1)))
    for capacity, exceeded in ((count, False), (count - 1, True)):
        log_q, info = dense_crf.refine(unary, image, APPEARANCE, 1, method="lattice", capacity=capacity)
        assert bool(info.exceeded) is exceeded and np.isfinite(log_q).all()
        assert info.num_vertices == count or exceeded


def test_capacity_is_an_average_over_the_batch():
    """One image of one colour and one of many: together they need less than twice what the second does."""
    unary, image = problem(186, 2)
    image[0] = 100
    places = [oracle.features(x, PARAMS.appearance_sxy, PARAMS.appearance_srgb) for x in image]
    few, many = (oracle.lattice(x, np.zeros((H * W, 1)))[1] for x in places)
    assert few < many / 2
    run = lambda capacity: dense_crf.refine(unary, image, APPEARANCE, 1, method="lattice", capacity=capacity)[1]
    assert not run(-(-(few + many) // 2)).exceeded and run((few + many - 1) // 2).exceeded


@pytest.mark.parametrize("params", [PARAMS, SMOOTHNESS], ids=["both", "smoothness"])
def test_other_filters_have_no_vertices(params):
    _, info = dense_crf.refine(*problem(187), params, 1, method="exact")
    assert info.num_vertices == 0 and not info.exceeded


def scalar_problem(seed):
    """A loss of log Q that weighs each pixel and label differently."""
    unary, image = problem(seed, height=3, width=4)
    return unary, image, np.random.default_rng(seed).normal(size=unary.shape)


@pytest.mark.parametrize(
    "params",
    [
        dense_crf.Params(1.5, 2.3, 2.5, 3.1, 55.0),
        dense_crf.Params(COMPATS["labels"], (2.3, 1.4), MATRIX, 2.7, (55.0, 70.0, 40.0)),
        dense_crf.Params(MATRIX, 1.9, COMPATS["labels"], (2.3, 1.4), 55.0),
    ],
    ids=["numbers", "labels-matrix", "matrix-labels"],
)
def test_gradients_of_parameters(params):
    unary, image, u = scalar_problem(188)
    loss = lambda params: jnp.vdot(u, dense_crf.refine(unary, image, params, 2, method="exact")[0])
    got = jax.grad(loss)(dense_crf.Params(*(jnp.asarray(x, jnp.float32) for x in params)))
    for name, value in params._asdict().items():
        reference = lambda x, name: np.vdot(u, oracle.refine(unary, image, params._replace(**{name: x}), 2)[0])
        expected = oracle.derivative(functools.partial(reference, name=name), value)
        assert np.abs(expected).max() > 1e-3, name
        np.testing.assert_allclose(getattr(got, name), expected, rtol=2e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_gradient_of_unary(method):
    unary, image, u = scalar_problem(189)
    loss = lambda x: jnp.vdot(u, dense_crf.refine(x, image, PARAMS, 3, method=method, capacity=72)[0])
    kernel = dict(exact=oracle.exact_kernel, lattice=oracle.lattice_kernel)[method]
    matrix = kernel(oracle.features(image, PARAMS.appearance_sxy, PARAMS.appearance_srgb))
    reference = lambda x: np.vdot(u, oracle.refine(x, image, PARAMS, 3, appearance_kernel=lambda *_: matrix)[0])
    np.testing.assert_allclose(jax.grad(loss)(unary), oracle.derivative(reference, unary), rtol=1e-3, atol=1e-4)


def test_gradients_through_the_lattice_are_those_of_its_own_function():
    unary, image, u = scalar_problem(190)
    put = lambda x: PARAMS._replace(appearance_sxy=x[:2], appearance_srgb=x[2:])
    at = np.array([2.3, 1.4, 55.0, 70.0, 40.0])
    loss = lambda x: jnp.vdot(u, dense_crf.refine(unary, image, put(x), 2, method="lattice", capacity=72)[0])
    kernel = dict(appearance_kernel=oracle.lattice_kernel)
    expected = oracle.derivative(lambda x: np.vdot(u, oracle.refine(unary, image, put(x), 2, **kernel)[0]), at, 1e-6)
    assert np.abs(expected[:2]).min() > 1e-2
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(at, jnp.float32)), expected, rtol=2e-3, atol=2e-4)


def test_gradients_of_a_padded_image_are_finite():
    unary, image = problem(191)
    mask = np.arange(W) < np.full((H, 1), W - 3)
    loss = lambda x, params: jnp.sum(dense_crf.refine(x, image, params, 2, mask=mask, method="lattice")[0][..., 0])
    for g in jax.tree.leaves(jax.grad(loss, (0, 1))(unary, dense_crf.Params(*map(jnp.asarray, PARAMS)))):
        assert np.isfinite(g).all() and np.any(g)


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_a_label_ruled_out_stays_so(method):
    unary, image = problem(192)
    unary[..., 2] = np.where(np.arange(W) < 5, -np.inf, unary[..., 2])
    unary = np.asarray(jax.nn.log_softmax(unary))
    log_q, info = dense_crf.refine(unary, image, PARAMS, 3, method=method, capacity=ROOM)
    assert np.all(log_q[:, :5, 2] == -np.inf) and np.isfinite(log_q[:, :5, :2]).all()
    assert np.isfinite(log_q[:, 5:]).all() and np.isfinite(info.change).all()
    kernel = dict(exact=oracle.exact_kernel, lattice=oracle.lattice_kernel)[method]
    agree(np.exp(log_q), np.exp(oracle.refine(unary, image, PARAMS, 3, appearance_kernel=kernel)[0]))


def test_gradients_where_a_label_is_ruled_out_are_finite():
    unary, image = problem(193)
    unary[:, :5, 2] = -np.inf
    loss = lambda x: jnp.sum(dense_crf.refine(x, image, PARAMS, 2, method="exact")[0][..., 0])
    assert np.isfinite(jax.grad(loss)(unary)).all()


@pytest.mark.parametrize("dtype", full_but([jnp.bfloat16, jnp.float16], jnp.bfloat16))
def test_narrow_floats_are_computed_in_float32(dtype):
    unary, image = problem(194)
    unary = jnp.asarray(unary, dtype)
    log_q, _ = dense_crf.refine(unary, jnp.asarray(image, dtype), PARAMS, 2, method="exact")
    assert log_q.dtype == jnp.float32 and np.isfinite(log_q).all()
    expected = oracle.refine(
        np.asarray(unary, np.float64), np.asarray(jnp.asarray(image, dtype), np.float64), PARAMS, 2
    )
    agree(log_q, expected[0])


def test_bfloat16_of_many_classes_is_not_refused():
    """log(1 / 150) is off by 0.011 in bfloat16."""
    unary = jnp.full((2, 3, 150), -np.log(150), jnp.bfloat16)
    log_q, _ = dense_crf.refine(unary, np.zeros((2, 3, 3), np.uint8), PARAMS, 1)
    agree(log_q, np.full(unary.shape, -np.log(150)))


def theirs(unary, image, params, num_iterations, normalization):
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    height, width, classes = unary.shape
    crf = densecrf.DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(np.ascontiguousarray(-unary.reshape(-1, classes).T))
    names = dict(
        symmetric="NORMALIZE_SYMMETRIC", before="NORMALIZE_BEFORE", after="NORMALIZE_AFTER", none="NO_NORMALIZATION"
    )
    single = lambda x: x if np.ndim(x) == 0 else np.asarray(x, np.float32)
    settings = dict(kernel=densecrf.DIAG_KERNEL, normalization=getattr(densecrf, names[normalization]))
    if params.smoothness_compat is not None:
        crf.addPairwiseGaussian(sxy=params.smoothness_sxy, compat=single(params.smoothness_compat), **settings)
    if params.appearance_compat is not None:
        sigmas = dict(sxy=params.appearance_sxy, srgb=params.appearance_srgb)
        crf.addPairwiseBilateral(rgbim=image, compat=single(params.appearance_compat), **sigmas, **settings)
    return np.array(crf.inference(num_iterations)).T.reshape(unary.shape)


@pytest.mark.parametrize(
    ("compat", "normalization"),
    [
        ("potts", "symmetric"),
        ("potts", "none"),
        ("labels", "before"),
        ("labels", "symmetric"),
        ("matrix", "after"),
        ("matrix", "symmetric"),
    ],
)
def test_appearance_kernel_is_pydensecrfs(compat, normalization):
    """H W is a multiple of 4: else they add points at the origin, which touch vertices."""
    unary, image = problem(196)
    scale = 0.1 if normalization == "none" else 1.0
    params = APPEARANCE._replace(appearance_compat=scale * COMPATS[compat])
    expected = theirs(unary, image, params, 5, normalization)
    settings = dict(normalization=normalization, method="lattice", capacity=ROOM)
    log_q, _ = dense_crf.refine(unary, image, params, 5, **settings)
    assert np.abs(expected - np.exp(unary)).max() > 0.05
    np.testing.assert_allclose(np.exp(log_q), expected, atol=1e-4)


@pytest.mark.parametrize("normalization", ["symmetric", "before", "after"])
def test_smoothness_kernel_is_close_to_pydensecrfs(normalization):
    """They approximate it on a lattice of two dimensions."""
    unary, image = problem(197)
    unary += np.arange(W)[:, None] * K // W == np.arange(K)
    unary = np.asarray(jax.nn.log_softmax(unary))
    log_q, _ = dense_crf.refine(unary, image, SMOOTHNESS, 5, normalization=normalization)
    expected = theirs(unary, image, SMOOTHNESS, 5, normalization)
    difference, moved = np.abs(np.exp(log_q) - expected), np.abs(expected - np.exp(unary))
    assert difference.max() < 0.2 * moved.max() and difference.mean() < 0.2 * moved.mean()


def test_their_lattice_instead_of_the_separable_filter_gives_their_smoothness():
    """What remains between the two is the approximation of the filter."""
    unary, image = problem(198)
    places = oracle.features(image, SMOOTHNESS.smoothness_sxy, 1.0)[:, :2]
    kernel = oracle.normalized(oracle.lattice_kernel(places), "symmetric")
    log_p = unary.reshape(-1, K).astype(np.float64)
    scores = log_p
    for _ in range(3):
        scores = log_p + SMOOTHNESS.smoothness_compat * kernel @ oracle.softmax(scores)
    expected = theirs(unary, image, SMOOTHNESS, 3, "symmetric")
    np.testing.assert_allclose(oracle.softmax(scores).reshape(H, W, K), expected, atol=1e-4)


GOOD_UNARY, GOOD_IMAGE = problem(199, height=2, width=3)
GOOD_MASK = np.ones((2, 3), bool)


def changed(array, value):
    array = np.array(array)
    array.flat[0] = value
    return array


REFUSED = {
    "unary-list": (dict(unary_log_probs=[[[0.0], [0.0, 1.0]]]), "unary_log_probs: expected an array; got list"),
    "image-list": (dict(image=[[[0, 0, 0], None]]), "image: expected an array; got list"),
    "unary-ndim": (dict(unary_log_probs=GOOD_UNARY[0]), r"expected \[..., H, W, K\], classes last; got shape \(3, 3\)"),
    "unary-int": (dict(unary_log_probs=np.zeros((2, 3, 3), np.int32)), "unary_log_probs: expected floats; got int32"),
    "image-size": (dict(image=np.zeros((3, 2, 3), np.uint8)), r"shape \(2, 3, 3\); got shape \(3, 2, 3\)"),
    "image-grey": (dict(image=np.zeros((2, 3), np.uint8)), r"image: expected RGB .* \(2, 3, 3\); got shape \(2, 3\)"),
    "image-one-channel": (dict(image=np.zeros((2, 3, 1), np.uint8)), r"expected RGB .*; got shape \(2, 3, 1\)"),
    "image-rgba": (dict(image=np.zeros((2, 3, 4), np.uint8)), r"expected RGB .*; got shape \(2, 3, 4\)"),
    "image-batch": (dict(image=np.zeros((1, 2, 3, 3), np.uint8)), r"expected RGB .*; got shape \(1, 2, 3, 3\)"),
    "image-int32": (dict(image=GOOD_IMAGE.astype(np.int32)), r"image: expected uint8, or floats 0..255; got int32"),
    "mask-shape": (dict(mask=np.ones((2, 3, 1), bool)), r"mask: expected shape \(2, 3\); got shape \(2, 3, 1\)"),
    "mask-float": (dict(mask=np.ones((2, 3), np.float32)), "mask: expected bool; got float32"),
    "normalization": (dict(normalization="both"), r"normalization: expected one of \('symmetric', .*\); got 'both'"),
    "iterations-negative": (dict(num_iterations=-1), "num_iterations: expected an integer, 0 or more; got -1"),
    "iterations-float": (dict(num_iterations=2.0), "num_iterations: expected an integer, 0 or more; got 2.0"),
    "method": (dict(method="fast"), r"method: expected one of \('auto', 'lattice', 'exact'\); got 'fast'"),
    "mask-list": (dict(mask=[[True] * 3, [True]]), "mask: expected an array; got list"),
    "no-rows": (
        dict(unary_log_probs=np.zeros((0, 3, 3), np.float32), image=np.zeros((0, 3, 3), np.uint8)),
        r"expected images, pixels and classes; got shape \(0, 3, 3\)",
    ),
    "no-images": (
        dict(unary_log_probs=np.zeros((0, 2, 3, 3), np.float32), image=np.zeros((0, 2, 3, 3), np.uint8)),
        r"expected images, pixels and classes; got shape \(0, 2, 3, 3\)",
    ),
    "params-dict": (dict(params=PARAMS._asdict()), r"expected dense_crf.Params\(smoothness_compat, .*; got dict"),
    "scores-float64": (dict(unary_log_probs=np.float64(GOOD_UNARY) + 0.03), "got a sum off by 0.03"),
    "capacity-zero": (dict(capacity=0), "capacity: expected an integer, 1 or more, or None; got 0"),
    "capacity-float": (dict(capacity=2.5), "capacity: expected an integer, 1 or more, or None; got 2.5"),
    "radius-negative": (dict(radius=-1), "radius: expected an integer, 0 or more, or None; got -1"),
    "unary-nan": (dict(unary_log_probs=changed(GOOD_UNARY, np.nan)), "exp sums to 1 .*; got NaN, or infinite scores"),
    "unary-inf": (dict(unary_log_probs=changed(GOOD_UNARY, np.inf)), "exp sums to 1 .*; got "),
    "probabilities": (dict(unary_log_probs=np.exp(GOOD_UNARY)), "values .* to .*, which look like probabilities"),
    "one-hot": (dict(unary_log_probs=np.eye(3, dtype=np.float32)[GOOD_IMAGE[..., 0] % 3]), "look like probabilities"),
    "energies": (dict(unary_log_probs=-3 * GOOD_UNARY), "none below 0: energies .* must be negated"),
    "scores": (dict(unary_log_probs=GOOD_UNARY - 1), "got a sum off by 0.632: apply jax.nn.log_softmax to scores"),
    "no-label-left": (dict(unary_log_probs=np.full((2, 3, 3), -np.inf, np.float32)), "got a sum off by 1: "),
    "image-nan": (dict(image=changed(np.float32(GOOD_IMAGE), np.nan)), "expected colours 0..255; got NaN"),
    "image-negative": (dict(image=changed(np.float32(GOOD_IMAGE), -1)), "0..255; got -1 to .*: undo any normalisation"),
    "image-above": (dict(image=changed(np.float32(GOOD_IMAGE), 256)), "0..255; got .* to 256: undo any normalisation"),
    "image-scaled": (dict(image=np.full((2, 3, 3), 0.7, np.float32)), "0..255; got floats up to 0.7: multiply by 255"),
}
REFUSED_PARAMS = {
    "compat-length": (
        dict(smoothness_compat=np.ones(2)),
        r"expected a number, \[K\] or \[K, K\], K = 3; got shape \(2,\)",
    ),
    "compat-matrix": (
        dict(appearance_compat=np.ones((3, 2))),
        r"params.appearance_compat: .* K = 3; got shape \(3, 2\)",
    ),
    "compat-ndim": (dict(appearance_compat=np.ones((1, 3, 3))), r"K = 3; got shape \(1, 3, 3\)"),
    "compat-nan": (dict(appearance_compat=np.nan), "params.appearance_compat: expected finite numbers; got nan"),
    "compat-inf": (
        dict(smoothness_compat=[0.0, np.inf, 0.0]),
        "params.smoothness_compat: expected finite numbers; got",
    ),
    "sxy-three": (
        dict(smoothness_sxy=(1.0, 1.0, 1.0)),
        r"params.smoothness_sxy: expected a number or 2 .*; got .*\(3,\)",
    ),
    "sxy-one": (dict(appearance_sxy=[1.0]), r"params.appearance_sxy: expected a number or 2 of them; got shape \(1,\)"),
    "srgb-two": (
        dict(appearance_srgb=(1.0, 2.0)),
        r"params.appearance_srgb: expected a number or 3 .*; got shape \(2,\)",
    ),
    "sxy-zero": (dict(smoothness_sxy=0.0), "params.smoothness_sxy: expected positive standard deviations; got 0.0"),
    "sxy-negative": (dict(appearance_sxy=(3.0, -1.0)), "params.appearance_sxy: expected positive .*; got .*-1"),
    "srgb-zero": (dict(appearance_srgb=(3.0, 0.0, 1.0)), "params.appearance_srgb: expected positive"),
    "sxy-nan": (dict(smoothness_sxy=np.nan), "params.smoothness_sxy: expected finite numbers; got nan"),
    "srgb-inf": (dict(appearance_srgb=np.inf), "params.appearance_srgb: expected finite numbers; got inf"),
}


def refine(unary_log_probs=GOOD_UNARY, image=GOOD_IMAGE, params=PARAMS, **settings):
    return dense_crf.refine(unary_log_probs, image, params, **{"num_iterations": 1, **settings})


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    arguments, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        refine(**arguments)


@pytest.mark.parametrize("name", REFUSED_PARAMS)
def test_refused_parameters(name):
    arguments, match = REFUSED_PARAMS[name]
    with pytest.raises(ValueError, match=match):
        refine(params=PARAMS._replace(**arguments))


LEGAL = {
    "mask": dict(mask=GOOD_MASK),
    "black": dict(image=np.zeros((2, 3, 3), np.float32)),
    "dark": dict(image=np.ones((2, 3, 3), np.uint8)),
    "white": dict(image=np.full((2, 3, 3), 255.0, np.float32)),
    "certain": dict(unary_log_probs=np.log(np.eye(3, dtype=np.float32)[np.zeros((2, 3), int)] + 1e-30)),
    "one-class": dict(unary_log_probs=np.zeros((2, 3, 1), np.float32)),
    "integer-parameters": dict(params=dense_crf.Params(3, 3, 10, 80, (13, 13, 13))),
}


@pytest.mark.parametrize("name", LEGAL)
def test_not_refused(name):
    log_q, _ = refine(**LEGAL[name])
    np.testing.assert_allclose(np.exp(log_q).sum(-1), 1, atol=1e-5)


def test_values_under_the_mask_are_not_looked_at():
    mask = changed(GOOD_MASK, False)
    assert np.isfinite(refine(changed(GOOD_UNARY, 7.0), changed(np.float32(GOOD_IMAGE), -9), mask=mask)[0]).all()
    with pytest.raises(ValueError, match="undo any normalisation"):
        refine(image=changed(np.float32(GOOD_IMAGE), -9), mask=GOOD_MASK)


def test_inside_jit_values_are_not_looked_at_but_shapes_are():
    run = jax.jit(functools.partial(refine, method="exact"))
    params = dense_crf.Params(None, 1.0, 2.5, 3.0, 9.0)
    assert np.isfinite(run(np.exp(GOOD_UNARY), -np.float32(GOOD_IMAGE), params)[0]).all()
    assert np.isnan(run(GOOD_UNARY, GOOD_IMAGE, params._replace(appearance_sxy=0.0))[0]).any()
    with pytest.raises(ValueError, match="expected RGB"):
        run(GOOD_UNARY, GOOD_IMAGE[..., :2], params)
    with pytest.raises(ValueError, match=r"K = 3; got shape \(2,\)"):
        run(GOOD_UNARY, GOOD_IMAGE, params._replace(appearance_compat=np.ones(2)))
    with pytest.raises(ValueError, match="num_iterations: expected an integer"):
        jax.jit(lambda n: refine(num_iterations=n))(3)


def test_bandwidths_of_a_kernel_that_is_left_out_are_not_read():
    unary, image = problem(197)
    without = dense_crf.Params(None, None, 2.0, 3.0, 30.0)
    agree(
        dense_crf.refine(unary, image, without, 2)[0],
        dense_crf.refine(unary, image, without._replace(smoothness_sxy=3.0), 2)[0],
    )


@pytest.mark.parametrize("method", full_but(["lattice", "exact"], "lattice"))
def test_refine_with_64_bit_types(method):
    unary, image = problem(198)
    expected = dense_crf.refine(unary, image, PARAMS, 2, method=method, capacity=ROOM)[0]
    with jax.enable_x64(True):
        agree(dense_crf.refine(unary, image, PARAMS, 2, method=method, capacity=ROOM)[0], expected)
