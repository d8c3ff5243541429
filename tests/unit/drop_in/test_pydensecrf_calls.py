"""The drop-in for pydensecrf: every call against loops in NumPy, and against pydensecrf itself if it is there."""

import concurrent.futures
import functools
import importlib
import sys
import types
import unittest.mock

import numpy as np
import pytest

from pwcrf_jax import dense_points
from pwcrf_jax import pydensecrf as drop_in
from pwcrf_jax.pydensecrf import densecrf as dcrf
from pwcrf_jax.pydensecrf import eigen, utils
from reference import dense_crf_oracle as oracle

H, W, K = 7, 11, 3  # 77 points: pydensecrf adds 3 at the origin
SXY, SRGB = (4.3, 3.3), (61.0, 47.0, 72.0)
MATRIX = np.array([[0.2, 1.3, 2.1], [0.4, -0.9, 0.8], [0.7, 1.9, -0.3]], np.float32)
COMPATS = {"number": 3, "vector": np.array([-0.6, -1.7, -2.4], np.float32), "matrix": MATRIX}
NORMALIZATIONS = {
    "none": dcrf.NO_NORMALIZATION,
    "before": dcrf.NORMALIZE_BEFORE,
    "after": dcrf.NORMALIZE_AFTER,
    "symmetric": dcrf.NORMALIZE_SYMMETRIC,
}


def problem(seed, height=H, width=W, labels=K):
    """Energies [K, H W] and an image of a few colours with noise."""
    rng = np.random.default_rng(seed)
    place = rng.integers(0, labels, (height, width))
    scores = rng.normal(size=(labels, height * width)) + (np.arange(labels)[:, None] == place.reshape(-1))
    image = rng.integers(60, 200, (labels, 3))[place] + rng.integers(-50, 50, (height, width, 3))
    image[0, 0] = 0  # beside the points at the origin
    energies = -np.log(oracle.softmax(scores.T).T)
    return energies.astype(np.float32), image.astype(np.uint8)


@functools.cache
def kernel(kind, normalization, seed):
    """Of the oracle: [N, N], normalised, with pydensecrf's further points."""
    _, image = problem(seed)
    places = oracle.features(image, SXY, SRGB)[:, : {"gaussian": 2, "bilateral": 5}[kind]]
    count = len(places)
    extra = np.zeros((-count % 4, places.shape[1]))
    values = np.eye(count + len(extra))[:, :count]
    return oracle.normalized(oracle.lattice(np.vstack([places, extra]), values)[0][:count], normalization)


def mean_field(energies, terms, num_iterations):
    """Marginals [N, K] and the sum of the terms' energies [N, K] that led to them."""
    marginals, sums = oracle.softmax(-energies.T.astype(np.float64)), 0.0
    for _ in range(num_iterations):
        sums = sum(matrix @ marginals @ oracle.energies(compat, energies.shape[0]) for matrix, compat in terms)
        marginals = oracle.softmax(-energies.T - sums)
    return marginals, sums


def crf(energies, image, module=dcrf, **settings):
    made = module.DenseCRF2D(image.shape[1], image.shape[0], len(energies))
    made.setUnaryEnergy(energies)
    made.addPairwiseGaussian(sxy=SXY, compat=settings.get("smooth", 1.5))
    normalization = getattr(module, dcrf.NormalizationType(settings.get("normalization", 3)).name)
    compat = settings.get("compat", 3)
    made.addPairwiseBilateral(sxy=SXY, srgb=SRGB, rgbim=image, compat=compat, normalization=normalization)
    return made


@pytest.mark.parametrize(
    ("compat", "normalization"),
    [("number", "symmetric"), ("vector", "before"), ("matrix", "after"), ("number", "none")],
)
def test_marginals_of_both_kernels(compat, normalization):
    energies, image = problem(1)
    value = COMPATS[compat] if normalization != "none" else 0.1
    terms = [(kernel("gaussian", "symmetric", 1), 1.5), (kernel("bilateral", normalization, 1), value)]
    expected, _ = mean_field(energies, terms, 4)
    got = np.array(crf(energies, image, compat=value, normalization=NORMALIZATIONS[normalization]).inference(4))
    assert got.shape == (K, H * W) and got.dtype == np.float32 and got.flags.f_contiguous and got.flags.writeable
    np.testing.assert_allclose(got, expected.T, atol=2e-4)
    assert np.abs(got - oracle.softmax(-energies.T).T).max() > 0.1


def test_step_by_step_is_inference_and_the_divergence_is_the_sum_itself():
    energies, image = problem(2)
    terms = [(kernel("gaussian", "symmetric", 2), 1.5), (kernel("bilateral", "symmetric", 2), MATRIX)]
    made = crf(energies, image, compat=MATRIX)
    q, tmp1, tmp2 = made.startInference()
    shared = np.asarray(q)
    for i in range(3):
        marginals, _ = mean_field(energies, terms, i)
        np.testing.assert_allclose(np.array(q).T, marginals, atol=2e-4)
        pairs = sum(m @ marginals @ oracle.energies(c, K) for m, c in terms)
        divergence = (marginals * (np.log(marginals) + energies.T + pairs)).sum()
        assert made.klDivergence(q) == pytest.approx(divergence, rel=1e-3, abs=1e-2)
        made.stepInference(q, tmp1, tmp2)
    assert np.array_equal(shared, np.array(q)) and np.shares_memory(shared, np.asarray(q))
    np.testing.assert_allclose(np.array(made.inference(3)), shared, atol=1e-5)


def test_features_of_utils_in_the_other_class_give_the_same():
    energies, image = problem(1)
    made = dcrf.DenseCRF(H * W, K)
    made.setUnary(dcrf.ConstUnary(energies))
    made.addPairwiseEnergy(utils.create_pairwise_gaussian(sdims=SXY[::-1], shape=(H, W))[::-1].copy(), compat=1.5)
    features = utils.create_pairwise_bilateral(sdims=SXY[::-1], schan=SRGB, img=image, chdim=2)[[1, 0, 2, 3, 4]]
    made.addPairwiseEnergy(features, 3, dcrf.FULL_KERNEL, dcrf.NORMALIZE_SYMMETRIC)
    np.testing.assert_array_equal(np.array(made.inference(4)), np.array(crf(energies, image).inference(4)))


def test_kernel_types_are_for_learning_alone():
    energies, image = problem(1)
    marginals = []
    for kind in (dcrf.CONST_KERNEL, dcrf.DIAG_KERNEL, dcrf.FULL_KERNEL, 1):
        made = dcrf.DenseCRF2D(W, H, K)
        made.setUnaryEnergy(energies)
        made.addPairwiseBilateral(SXY, SRGB, image, 3, kind)
        marginals.append(np.array(made.inference(2)))
    assert all(np.array_equal(marginals[0], m) for m in marginals[1:])


def test_no_kernels_no_unary_and_no_iterations():
    energies, image = problem(3)
    made = dcrf.DenseCRF2D(W, H, K)
    np.testing.assert_allclose(np.array(made.inference(2)), 1 / K, rtol=1e-6)
    made.setUnaryEnergy(energies)
    softmax = oracle.softmax(-energies.T).T
    np.testing.assert_allclose(np.array(made.inference(5)), softmax, atol=1e-6)
    made.addPairwiseBilateral(SXY, SRGB, image, 3)  # after an inference, as programs do
    np.testing.assert_allclose(np.array(made.inference(0)), softmax, atol=1e-6)
    assert np.abs(np.array(made.inference(1)) - softmax).max() > 0.05


def test_logistic_unaries_are_products():
    rng = np.random.default_rng(4)
    weights, features = (rng.normal(size=s).astype(np.float32) for s in ((K, 5), (5, H * W)))
    made = dcrf.DenseCRF(H * W, K)
    made.setUnary(dcrf.LogisticUnary(weights, features))
    np.testing.assert_allclose(np.array(made.inference(0)).T, oracle.softmax(-(weights @ features).T), atol=1e-5)
    square = rng.normal(size=(K, 4)).astype(np.float32), rng.normal(size=(4, 4)).astype(np.float32)
    small = dcrf.DenseCRF(4, K)
    small.setUnaryEnergy(*square)
    np.testing.assert_allclose(np.array(small.inference(0)).T, oracle.softmax(-(square[0] @ square[1]).T), atol=1e-5)


def test_labels_ruled_out_by_an_infinite_energy_stay_so():
    energies, image = problem(5)
    energies[1, ::3] = np.inf
    made = crf(energies, image)
    q, tmp1, tmp2 = made.startInference()
    assert np.isfinite(made.klDivergence(q))
    made.stepInference(q, tmp1, tmp2)
    for marginals in (np.array(q), np.array(made.inference(3))):
        assert np.isfinite(marginals).all() and not marginals[1, ::3].any()


def test_what_was_given_may_change_afterwards():
    energies, image = problem(6)
    made, expected = crf(energies, image), np.array(crf(energies, image).inference(2))
    energies[...], image[...] = 0, 0
    np.testing.assert_array_equal(np.array(made.inference(2)), expected)


@pytest.mark.full
def test_a_lattice_of_more_vertices_than_expected_gets_room(monkeypatch):
    """Noise of tiny standard deviations: each point has vertices of its own."""
    rng = np.random.default_rng(7)
    features = (30 * rng.normal(size=(5, 200))).astype(np.float32)
    energies = rng.normal(size=(K, 200)).astype(np.float32)
    made = dcrf.DenseCRF(200, K)
    made.setUnaryEnergy(energies)
    prepared = dense_points.prepare
    small = lambda f, n, norm, capacity: prepared(f, n, norm, 64 if capacity is None else capacity)
    monkeypatch.setattr(dense_points, "prepare", small)
    made.addPairwiseEnergy(features, 2.0)
    got = np.array(made.inference(1))
    n = oracle.lattice_kernel(features.T)
    expected, _ = mean_field(energies, [(oracle.normalized(n, "symmetric"), 2.0)], 1)
    np.testing.assert_allclose(got, expected.T, atol=2e-4)


@pytest.mark.full
def test_frames_change_nothing(monkeypatch):
    energies, _ = problem(8)
    found = []
    for room in (256, 512):
        monkeypatch.setattr(dense_points, "frame_size", lambda n, room=room: room)
        made = dcrf.DenseCRF2D(W, H, K)
        made.setUnaryEnergy(energies)
        made.addPairwiseGaussian(SXY, 3)
        found.append(np.array(made.inference(3)))
    np.testing.assert_allclose(*found, atol=1e-6)
    assert np.abs(found[0] - oracle.softmax(-energies.T).T).max() > 0.1


def test_frames_are_few():
    sizes = np.arange(1, 300_000, 53)
    frames = np.array([dense_points.frame_size(int(n)) for n in sizes])
    assert (frames >= sizes).all() and (np.diff(frames) >= 0).all()
    photographs = sizes >= 90_000
    assert (frames < 2 * sizes)[sizes > 256].all()
    assert len(set(frames[photographs & (sizes <= 250_000)])) == 2


def test_several_threads():
    problems = [problem(seed) for seed in range(8)]
    alone = [np.array(crf(*p).inference(3)) for p in problems]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda p: np.array(crf(*p).inference(3)), problems))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_marginals_go_wherever_arrays_go():
    made = crf(*problem(9))
    q = made.inference(1)
    array = np.array(q)
    assert type(np.argmax(q, axis=0)) is np.ndarray and np.argmax(q, axis=0).shape == (H * W,)
    np.testing.assert_array_equal(np.asarray(q, np.float64), array.astype(np.float64))
    np.testing.assert_array_equal(q, array)
    if sys.version_info >= (3, 12):
        np.testing.assert_array_equal(memoryview(q), array)
    with pytest.raises(ValueError, match="copy=False"):
        q.__array__(np.float64, copy=False)


def test_matrices_of_eigen():
    vector, matrix = np.arange(3, dtype=np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(np.array(eigen.vectorXf(vector)), vector)
    np.testing.assert_array_equal(np.array(eigen.matrixXf(matrix)), matrix)
    assert np.array(eigen.MatrixXf()).shape == (0, 0) and np.array(eigen.VectorXf()).shape == (0,)
    for make, wrong in ((eigen.vectorXf, matrix), (eigen.matrixXf, vector), (eigen.matrixXf, matrix.astype(float))):
        with pytest.raises(ValueError, match="expected"):
            make(wrong)
    for make in (eigen.vectorXf, eigen.matrixXf):
        with pytest.raises(TypeError, match="must not be None"):
            make(None)


def test_installed_it_is_what_other_programs_import():
    with unittest.mock.patch.dict(sys.modules):
        for name in [n for n in sys.modules if n.partition(".")[0] == "pydensecrf"]:
            del sys.modules[name]
        for _ in range(2):
            drop_in.install()
        found = [importlib.import_module(n) for n in ("pydensecrf", "pydensecrf.densecrf", "pydensecrf.eigen")]
        assert found == [drop_in, dcrf, eigen]
        assert importlib.import_module("pydensecrf.utils").unary_from_labels is utils.unary_from_labels
        sys.modules["pydensecrf"] = types.ModuleType("pydensecrf")
        with pytest.raises(RuntimeError, match="expected to come before `import pydensecrf`; got it imported already"):
            drop_in.install()


# --- against pydensecrf itself --------------------------------------------------------------------


@pytest.fixture
def theirs():
    return pytest.importorskip(
        "pydensecrf.densecrf", reason="pydensecrf2 needs a compiler, so no extra of tests has it"
    )


@pytest.mark.parametrize(("height", "width"), [(40, 60), (39, 61)])
@pytest.mark.parametrize(
    ("compat", "normalization"),
    [("number", "symmetric"), ("vector", "before"), ("matrix", "after"), ("number", "none"), ("matrix", "symmetric")],
)
def test_against_pydensecrf(theirs, compat, normalization, height, width):
    rng = np.random.default_rng(10)
    coarse = rng.uniform(0, 255, (height // 8 + 1, width // 8 + 1, 3))
    image = np.repeat(np.repeat(coarse, 8, 0), 8, 1)[:height, :width] + rng.normal(0, 4, (height, width, 3))
    energies, _ = problem(10, height, width)
    value = COMPATS[compat] if normalization != "none" else 0.1
    settings = dict(compat=value, normalization=NORMALIZATIONS[normalization])
    both = [crf(energies, image.clip(0, 255).astype(np.uint8), m, **settings) for m in (dcrf, theirs)]
    ours, other = (np.array(c.inference(10)) for c in both)
    assert np.abs(ours - other).max() < 1e-3 and (ours.argmax(0) == other.argmax(0)).mean() >= 0.999
    matrices = [c.startInference() for c in both]
    for _ in range(3):
        ours, other = (c.klDivergence(m[0]) for c, m in zip(both, matrices, strict=True))
        assert ours == pytest.approx(other, rel=1e-2)
        for c, m in zip(both, matrices, strict=True):
            c.stepInference(*m)
        for a, b in zip(*matrices, strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-3)
