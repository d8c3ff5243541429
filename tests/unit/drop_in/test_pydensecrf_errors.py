"""What pydensecrf refuses is refused with the same kind of exception; where it goes on with garbage there is one too.

Rows with `theirs` are held against pydensecrf itself, where it is installed.
"""

import numpy as np
import pytest

from pwcrf_jax import dense_points
from pwcrf_jax.pydensecrf import densecrf as dcrf
from pwcrf_jax.pydensecrf import eigen

H, W, K = 3, 4, 2
U = np.ones((K, H * W), np.float32)
IMAGE = np.zeros((H, W, 3), np.uint8)
FEATURES = np.zeros((2, H * W), np.float32)


@pytest.fixture(autouse=True)
def nothing_compiles(monkeypatch, request):
    """Whatever is refused is refused before anything is computed."""
    fail = lambda *_: pytest.fail("it came to computing")
    if request.node.name.startswith("test_refused["):
        for name in ("prepare", "step"):
            monkeypatch.setattr(dense_points, name, fail)
    if request.node.name == "test_what_is_taken":
        monkeypatch.setattr(dense_points, "prepare", lambda *_: None)


def crf(module=dcrf):
    made = module.DenseCRF2D(W, H, K)
    made.setUnaryEnergy(U)
    return made


def changed(array, value):
    array = array.copy()
    array.flat[1] = value
    return array


def stepped(module, q, tmp1=None):
    made = crf(module)
    _, *rest = made.startInference()
    made.stepInference(q, tmp1 if tmp1 is not None else rest[0], rest[1])


def bilateral(module, sxy=3, srgb=3, rgbim=IMAGE, compat=3, **settings):
    crf(module).addPairwiseBilateral(sxy, srgb, rgbim, compat, **settings)


def gaussian(module, sxy=3, compat=3, **settings):
    crf(module).addPairwiseGaussian(sxy, compat, **settings)


def energy(module, features=FEATURES, compat=3, **settings):
    module.DenseCRF(H * W, K).addPairwiseEnergy(features, compat, **settings)


def unary(module, u, *f):
    module.DenseCRF(H * W, K).setUnaryEnergy(u, *f)


THEIRS = {
    "u-double": (lambda m: unary(m, U.astype(np.float64)), ValueError, "dtype mismatch, expected 'float'.*got float64"),
    "u-shape": (lambda m: unary(m, U.reshape(K, H, W)), ValueError, r"expected 2, \[labels, points\]; got 3, shape"),
    "u-labels": (lambda m: unary(m, U[:1]), ValueError, r"Need \(2, 12\), \[labels, points\], got \(1, 12\)"),
    "u-points": (lambda m: unary(m, U[:, :-1].copy()), ValueError, r"Need \(2, 12\), .*got \(2, 11\)"),
    "u-strides": (lambda m: unary(m, np.asfortranarray(U)), ValueError, "not C-contiguous"),
    "u-none": (lambda m: unary(m, None), TypeError, "must not be None"),
    "u-list": (lambda m: unary(m, U.tolist()), TypeError, "expected an array .* float32; got list"),
    "const-unary": (lambda m: m.ConstUnary(U.astype(int)), ValueError, "expected 'float'.*got int64"),
    "set-unary": (lambda m: crf(m).setUnary(U), TypeError, "expected Unary, got ndarray"),
    "features-shape": (lambda m: energy(m, FEATURES[:, 1:].copy()), ValueError, r"Need \(2, 12\), .*got \(2, 11\)"),
    "features-turned": (lambda m: energy(m, FEATURES.T.copy()), ValueError, r"got \(12, 2\)\); .*features.T"),
    "features-double": (lambda m: energy(m, FEATURES.astype(np.float64)), ValueError, "got float64"),
    "image-double": (lambda m: bilateral(m, rgbim=IMAGE * 1.0), ValueError, "expected 'unsigned char'.*got float64"),
    "image-grey": (lambda m: bilateral(m, rgbim=IMAGE[..., 0].copy()), ValueError, r"expected 3.*; got 2"),
    "image-rgba": (lambda m: bilateral(m, rgbim=np.zeros((H, W, 4), np.uint8)), ValueError, r"got \(3, 4, 4\)"),
    "image-swapped": (
        lambda m: bilateral(m, rgbim=np.zeros((W, H, 3), np.uint8)),
        ValueError,
        r"Need \(3, 4, 3\), got \(4, 3, 3\)\); width comes before height: DenseCRF2D\(3, 4, ...\)",
    ),
    "image-size": (lambda m: bilateral(m, rgbim=np.zeros((H, W + 1, 3), np.uint8)), ValueError, r"got \(3, 5, 3\)\)$"),
    "compat-double": (lambda m: bilateral(m, compat=np.ones(K)), ValueError, "compat: Buffer dtype mismatch"),
    "compat-ndim": (lambda m: gaussian(m, compat=np.ones((1, K, K), np.float32)), ValueError, "dimension >2"),
    "compat-list": (lambda m: gaussian(m, compat=[1.0, 2.0]), TypeError, "compat: expected an array.*got list"),
    "compat-none": (lambda m: gaussian(m, compat=None), TypeError, "compat"),
    "sxy-text": (lambda m: gaussian(m, sxy=("a", "b")), (TypeError, ValueError), "a"),
    "step-array": (lambda m: stepped(m, np.zeros((K, H * W), np.float32)), TypeError, "expected .*MatrixXf, got"),
    "kl-array": (lambda m: crf(m).klDivergence(U), TypeError, "expected .*MatrixXf, got"),
}
OURS = {
    "u-nan": (lambda m: unary(m, changed(U, np.nan)), ValueError, "expected energies, -log p; got NaN"),
    "u-minus-infinity": (lambda m: unary(m, changed(U, -np.inf)), ValueError, "none of -inf"),
    "u-no-label-left": (lambda m: unary(m, np.full_like(U, np.inf)), ValueError, "a label of finite energy"),
    "f-shape": (lambda m: unary(m, U, np.ones((5, H * W), np.float32)), ValueError, r"\(12, points\).*got \(5, 12\)"),
    "const-unary-shape": (lambda m: crf(m).setUnary(m.ConstUnary(U[:1])), ValueError, r"Need \(2, 12\)"),
    "unary-of-nothing": (lambda m: crf(m).setUnary(m.Unary()), ValueError, "got one without energies"),
    "features-nan": (lambda m: energy(m, changed(FEATURES, np.nan)), ValueError, "features: expected finite.*got NaN"),
    "features-far": (lambda m: energy(m, changed(FEATURES, 2e6)), ValueError, "within 1e.06 standard dev.*got 2e.06"),
    "compat-length": (lambda m: gaussian(m, compat=np.ones(K + 1, np.float32)), ValueError, r"\(2,\); got \(3,\)"),
    "compat-matrix": (lambda m: gaussian(m, compat=np.ones((K, 1), np.float32)), ValueError, r"\(2, 2\); got \(2, 1\)"),
    "compat-nan": (lambda m: gaussian(m, compat=np.nan), ValueError, "compat: expected finite numbers; got NaN"),
    "sxy-zero": (lambda m: gaussian(m, sxy=0), ValueError, "sxy: expected positive standard deviations; got 0"),
    "sxy-nan": (lambda m: gaussian(m, sxy=(3, np.nan)), ValueError, "sxy: expected positive"),
    "sxy-three": (lambda m: gaussian(m, sxy=(3, 3, 3)), ValueError, "sxy: expected a number or 2 of them; got 3"),
    "srgb-four": (lambda m: bilateral(m, srgb=(3, 3, 3, 3)), ValueError, "srgb: expected a number or 3 .*got 4"),
    "srgb-negative": (lambda m: bilateral(m, srgb=-1), ValueError, "srgb: expected positive"),
    "kernel": (lambda m: gaussian(m, kernel=7), ValueError, "kernel: expected one of CONST_KERNEL, .*; got 7"),
    "normalization": (lambda m: gaussian(m, normalization=-1), ValueError, "one of NO_NORMALIZATION, .*; got -1"),
    "iterations-float": (lambda m: crf(m).inference(2.5), TypeError, "niter: expected an integer; got 2.5"),
    "labels-float": (lambda m: m.DenseCRF(12, 2.5), TypeError, "nlabels: expected an integer; got 2.5"),
    "width-text": (lambda m: m.DenseCRF2D("3", 4, 2), TypeError, "w: expected an integer; got '3'"),
    "no-points": (lambda m: m.DenseCRF(0, K), ValueError, "nvar: expected 1 or more; got 0"),
    "no-labels": (lambda m: m.DenseCRF2D(W, H, 0), ValueError, "nlabels: expected 1 or more; got 0"),
    "no-width": (lambda m: m.DenseCRF2D(-2, -3, 2), ValueError, "w: expected 1 or more; got -2"),
    "iterations-negative": (lambda m: crf(m).inference(-1), ValueError, "niter: expected 0 or more; got -1"),
    "step-shape": (lambda m: stepped(m, eigen.matrixXf(U[:, 1:].copy())), ValueError, r"\(2, 12\), .*; got \(2, 11\)"),
    "step-nan": (lambda m: stepped(m, eigen.matrixXf(changed(U, np.nan))), ValueError, "Q: expected finite.*got NaN"),
    "step-none": (lambda m: stepped(m, None), TypeError, "expected MatrixXf, got NoneType"),
    "empty": (lambda m: eigen.matrixXf(np.zeros((0, 3), np.float32)), ValueError, r"expected values, .*\(0, 3\)"),
}


@pytest.mark.parametrize("name", [*THEIRS, *OURS])
def test_refused(name):
    call, kind, match = (THEIRS | OURS)[name]
    with pytest.raises(kind, match=match):
        call(dcrf)


@pytest.mark.parametrize("name", THEIRS)
def test_refused_by_pydensecrf(name):
    theirs = pytest.importorskip(
        "pydensecrf.densecrf", reason="pydensecrf2 needs a compiler, so no extra of tests has it"
    )
    call, kind, _ = THEIRS[name]
    with pytest.raises(kind):
        call(theirs)


def test_a_unary_is_for_one_crf():
    given = dcrf.ConstUnary(U)
    crf().setUnary(given)
    with pytest.raises(ValueError, match="of this CRF alone"):
        crf().setUnary(given)


def test_what_is_taken():
    read_only = U.copy()
    read_only.flags.writeable = False
    for u in (read_only, memoryview(U)):
        unary(dcrf, u)
    for compat in (3, 2.5, np.float32(1), np.int64(2), True):
        gaussian(dcrf, compat=compat)
    for sxy in (3, np.float32(2), (3, 4), [3.5, 1], np.array([1, 2])):
        gaussian(dcrf, sxy=sxy)
    for sizes in ((np.int64(12), np.int32(2)), (12, 2, "more"), (12.0, np.float32(2))):
        dcrf.DenseCRF(*sizes)

    class Own(dcrf.DenseCRF2D):
        def __init__(self, w, h, nlabels, extra):
            super().__init__(w, h, nlabels)

    Own(W, H, K, 5).setUnaryEnergy(U)
