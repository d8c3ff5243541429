"""pydensecrf's classes: a dense CRF of any points, and one of the pixels of an image.

Energies and marginals are [labels, points], points of an image row by row; energies are -log p. The equations are those
of `pwcrf_jax.dense_points`, which computes them.
"""

import enum
import operator
from numbers import Number
from typing import Any

import numpy as np

from pwcrf_jax import arguments, dense_points
from pwcrf_jax.pydensecrf import buffers
from pwcrf_jax.pydensecrf.eigen import MatrixXf


class NormalizationType(enum.IntEnum):
    """How a kernel's filter K is normalised, with n = K 1: not, K n^-1, n^-1 K, n^-1/2 K n^-1/2."""

    NO_NORMALIZATION = 0
    NORMALIZE_BEFORE = 1
    NORMALIZE_AFTER = 2
    NORMALIZE_SYMMETRIC = 3


class KernelType(enum.IntEnum):
    """What learning would learn of a kernel. pydensecrf has no learning, so all give the same marginals, as there."""

    CONST_KERNEL = 0
    DIAG_KERNEL = 1
    FULL_KERNEL = 2


NO_NORMALIZATION = NormalizationType.NO_NORMALIZATION
NORMALIZE_BEFORE = NormalizationType.NORMALIZE_BEFORE
NORMALIZE_AFTER = NormalizationType.NORMALIZE_AFTER
NORMALIZE_SYMMETRIC = NormalizationType.NORMALIZE_SYMMETRIC
CONST_KERNEL = KernelType.CONST_KERNEL
DIAG_KERNEL = KernelType.DIAG_KERNEL
FULL_KERNEL = KernelType.FULL_KERNEL

_NORMALIZATIONS = {
    NO_NORMALIZATION: "none",
    NORMALIZE_BEFORE: "before",
    NORMALIZE_AFTER: "after",
    NORMALIZE_SYMMETRIC: "symmetric",
}


class Unary:
    """Energies that `DenseCRF.setUnary` takes over; an object is for one CRF."""

    def __init__(self) -> None:
        """None yet."""
        self._energies: np.ndarray | None = None

    def move(self) -> np.ndarray:
        """float32 [labels, points], which are its CRF's from here on.

        Raises:
          ValueError: there are none, or they are another CRF's.
        """
        if self._energies is None:
            raise ValueError("u: expected a ConstUnary or LogisticUnary of this CRF alone; got one without energies")
        energies, self._energies = self._energies, None
        return energies


class ConstUnary(Unary):
    """Energies u, float32 [labels, points]."""

    def __init__(self, u: Any) -> None:
        """A copy of u."""
        self._energies = buffers.typed("u", u, np.float32, "labels, points").copy()


class LogisticUnary(Unary):
    """Energies L f of weights L, float32 [labels, features], and features f, float32 [features, points]."""

    def __init__(self, L: Any, f: Any) -> None:
        """Their product."""
        self._energies = _product("L", L, f)


class _Pairwise:
    """A kernel and its compatibility."""

    def __init__(self, features: np.ndarray, compat: np.ndarray, normalization: str, num_points: int) -> None:
        """Begins to compute the kernel's filter; features are framed."""
        self.compat = compat
        self._features, self._normalization, self._num_points = features, normalization, num_points
        self._kernel = self._prepared(None)
        self._known_to_fit = False

    def kernel(self) -> dense_points.Kernel:
        """The filter, with room for all vertices."""
        if not self._known_to_fit:
            corners, room = self._features.shape[0] + 1, self._features.shape[1]
            for capacity in (room, corners * room):
                if not self._kernel.lattice.exceeded:
                    break
                self._kernel = self._prepared(capacity)
            self._known_to_fit = True
        return self._kernel

    def _prepared(self, capacity: int | None) -> dense_points.Kernel:
        return dense_points.prepare(self._features, np.int32(self._num_points), self._normalization, capacity)


class DenseCRF:
    """The dense CRF of points with any features."""

    def __init__(self, nvar: int, nlabels: int, *_: Any, **__: Any) -> None:
        """A CRF without energies.

        Args:
          nvar: number of points.
          nlabels: number of labels. What comes behind is for subclasses.

        Raises:
          TypeError: no integers.
          ValueError: less than 1.
        """
        self._nvar, self._nlabel = _count("nvar", nvar), _count("nlabels", nlabels)
        self._room = dense_points.frame_size(self._nvar)
        self._energies: np.ndarray | None = None
        self._pairwise: list[_Pairwise] = []

    def addPairwiseEnergy(
        self,
        features: Any,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds the energies mu(x_i, x_j) exp(-|f_i - f_j|^2 / 2) of all pairs of points.

        Args:
          features: float32 [features, points], C-contiguous.
          compat: a number w, energies -w where labels are the same (Potts); float32 [labels], energies of the same
            label; float32 [labels, labels], energies mu of all pairs, made symmetric.
          kernel: one of `KernelType`.
          normalization: one of `NormalizationType`.

        Raises:
          TypeError: no array.
          ValueError: another shape, dtype or layout, values that are not finite or that no lattice can hold.
        """
        given = buffers.typed("features", features, np.float32, "features, points")
        if given.shape[1] != self._nvar:
            expected, got = (given.shape[0], self._nvar), given.shape
            hint = "; the array is the wrong way round: features.T" if got[0] == self._nvar else ""
            raise ValueError(f"Bad shape for pairwise energy (Need {expected}, [features, points], got {got}){hint}")
        self._add(dense_points.in_frame(given, self._room), compat, kernel, normalization)

    def setUnary(self, u: Unary) -> None:
        """Takes over a ConstUnary or LogisticUnary; TypeError for others, ValueError for another shape or NaN."""
        if not isinstance(u, Unary):
            raise TypeError(f"Argument 'u' has incorrect type (expected Unary, got {type(u).__name__})")
        self._set(u.move())

    def setUnaryEnergy(self, u: Any, f: Any = None) -> None:
        """The energies of each point's labels, in place of those there were.

        Args:
          u: float32 [labels, points], C-contiguous, -log p.
          f: float32 [points, points]; with it the energies are u f. `LogisticUnary` takes any number of features.

        Raises:
          TypeError: no array.
          ValueError: another shape, dtype or layout, NaN, or a point whose labels are all ruled out.
        """
        given = buffers.typed("u", u, np.float32, "labels, points")
        self._check_unary(given)
        self._set(given if f is None else _product("u", given, f))

    def inference(self, niter: int) -> MatrixXf:
        """Marginals [labels, points] after niter iterations of mean field, at least 0."""
        count = _count("niter", niter, 0)
        marginals = dense_points.infer(self._unary(), *self._terms(), np.int32(self._nvar), np.int32(count))
        made = MatrixXf()
        made.values = np.array(np.asarray(marginals)[: self._nvar]).T
        return made

    def startInference(self) -> tuple[MatrixXf, MatrixXf, MatrixXf]:
        """(Q, tmp1, tmp2): the marginals before the first iteration, and two matrices for `stepInference`."""
        return self.inference(0), MatrixXf(), MatrixXf()

    def stepInference(self, Q: MatrixXf, tmp1: MatrixXf, tmp2: MatrixXf) -> None:
        """One iteration of mean field, in place.

        Args:
          Q: of `startInference`; becomes the new marginals.
          tmp1, tmp2: of `startInference`. pydensecrf works in them and shows nothing of it; here they stay empty.

        Raises:
          TypeError: no MatrixXf.
          ValueError: Q of another shape, or with NaN.
        """
        for name, matrix in (("tmp1", tmp1), ("tmp2", tmp2)):
            _check_matrix(name, matrix)
        marginals = self._step(Q).marginals
        Q.fill(np.asarray(marginals)[: self._nvar].T)

    def klDivergence(self, Q: MatrixXf) -> float:
        """sum_i,x Q_i(x) (log Q_i(x) + U_i(x) + sum_k (mu_k K_k Q)_i(x)); errors as in `stepInference`."""
        return float(np.asarray(self._step(Q).divergence)[: self._nvar].sum(dtype=np.float64))

    def _step(self, marginals: MatrixXf) -> dense_points.Step:
        _check_matrix("Q", marginals)
        values = marginals.values
        if values.shape != (self._nlabel, self._nvar):
            raise ValueError(f"Q: expected shape {(self._nlabel, self._nvar)}, [labels, points]; got {values.shape}")
        framed = np.zeros((self._room, self._nlabel), np.float32)
        framed[: self._nvar] = buffers.finite("Q", values).T
        return dense_points.step(framed, self._unary(), *self._terms(), np.int32(self._nvar))

    def _terms(self) -> tuple[tuple[dense_points.Kernel, ...], tuple[np.ndarray, ...]]:
        return tuple(p.kernel() for p in self._pairwise), tuple(p.compat for p in self._pairwise)

    def _unary(self) -> np.ndarray:
        return np.zeros((self._nlabel, self._room), np.float32) if self._energies is None else self._energies

    def _check_unary(self, energies: np.ndarray) -> None:
        expected = (self._nlabel, self._nvar)
        if energies.shape != expected:
            raise ValueError(f"Bad shape for unary energy (Need {expected}, [labels, points], got {energies.shape})")

    def _set(self, energies: np.ndarray) -> None:
        self._check_unary(energies)
        low, high = energies.min(), energies.max()
        if np.isnan(low):
            raise ValueError("u: expected energies, -log p; got NaN")
        if low == -np.inf or (high == np.inf and np.isinf(energies).all(0).any()):
            raise ValueError("u: expected a label of finite energy at each point, and none of -inf; got infinite ones")
        self._energies = dense_points.in_frame(energies, self._room)

    def _add(self, features: np.ndarray, compat: Any, kernel: Any, normalization: Any) -> None:
        """features: framed."""
        energies = _compatibility(compat, self._nlabel)
        _member("kernel", KernelType, kernel)
        which = _NORMALIZATIONS[_member("normalization", NormalizationType, normalization)]
        furthest = np.abs(buffers.finite("features", features)).max()
        if furthest > arguments.FURTHEST:
            raise ValueError(
                f"features: expected them within {arguments.FURTHEST:.0e} standard deviations of 0; got {furthest:.3g}"
            )
        self._pairwise.append(_Pairwise(features, energies, which, self._nvar))


class DenseCRF2D(DenseCRF):
    """The dense CRF of the pixels of an image."""

    def __init__(self, w: int, h: int, nlabels: int, *_: Any, **__: Any) -> None:
        """A CRF without energies. Mind the order: width before height, while images are [height, width, 3]."""
        self._w, self._h = _count("w", w), _count("h", h)
        super().__init__(self._w * self._h, nlabels)

    def addPairwiseGaussian(
        self,
        sxy: Any,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds a smoothness kernel, of positions in pixels alone.

        Args:
          sxy: standard deviation in pixels, one or (x, y).
          compat, kernel, normalization: of `addPairwiseEnergy`.

        Raises:
          TypeError: as there.
          ValueError: as there; a standard deviation that is not positive.
        """
        features = np.zeros((2, self._room), np.float32)
        self._put_positions(features, sxy)
        self._add(features, compat, kernel, normalization)

    def addPairwiseBilateral(
        self,
        sxy: Any,
        srgb: Any,
        rgbim: Any,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds an appearance kernel, of positions and colours.

        Args:
          sxy: standard deviation in pixels, one or (x, y).
          srgb: standard deviation of colours 0..255, one or three.
          rgbim: uint8 [height, width, 3], C-contiguous.
          compat, kernel, normalization: of `addPairwiseEnergy`.

        Raises:
          TypeError: as there.
          ValueError: as there; an image of another size; a standard deviation that is not positive.
        """
        image = buffers.typed("rgbim", rgbim, np.uint8, "height, width, channels")
        size = (self._h, self._w)
        if image.shape[:2] != size:
            swapped = f"; width comes before height: DenseCRF2D({size[0]}, {size[1]}, ...)"
            hint = swapped if image.shape[1::-1] == size else ""
            raise ValueError(f"Bad shape for pairwise bilateral (Need {(*size, 3)}, got {image.shape}){hint}")
        if image.shape[2] != 3:
            raise ValueError(
                f"addPairwiseBilateral takes RGB images; expected {(*size, 3)}, got {image.shape}. For other images, "
                "`utils.create_pairwise_bilateral` makes features for `addPairwiseEnergy`"
            )
        features = np.zeros((5, self._room), np.float32)
        self._put_positions(features, sxy)
        for i, sigma in enumerate(_sigmas("srgb", srgb, 3)):
            np.divide(image[..., i].reshape(-1), sigma, out=features[2 + i, : self._nvar], dtype=np.float32)
        self._add(features, compat, kernel, normalization)

    def _put_positions(self, features: np.ndarray, sxy: Any) -> None:
        x, y = _sigmas("sxy", sxy, 2)
        over = lambda row: row[: self._nvar].reshape(self._h, self._w)
        over(features[0])[...] = np.arange(self._w, dtype=np.float32) / x
        over(features[1])[...] = (np.arange(self._h, dtype=np.float32) / y)[:, None]


def _count(name: str, x: Any, least: int = 1) -> int:
    """An integer, or a float that is one: pydensecrf takes any float, and cuts it off."""
    whole = isinstance(x, (float, np.floating)) and float(x).is_integer()
    count = int(x) if whole else _index(name, x)
    if count < least:
        raise ValueError(f"{name}: expected {least} or more; got {count}")
    return count


def _index(name: str, x: Any) -> int:
    try:
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{name}: expected an integer; got {x!r}") from None


def _member(name: str, kind: type[enum.IntEnum], x: Any) -> Any:
    try:
        return kind(_index(name, x))
    except ValueError:
        known = ", ".join(kind.__members__)
        raise ValueError(f"{name}: expected one of {known}; got {x}") from None


def _sigmas(name: str, x: Any, count: int) -> np.ndarray:
    """float32 [count], of one for all or of as many."""
    values: list[Any] = [x] * count if isinstance(x, Number) else list(x)
    if len(values) != count:
        raise ValueError(f"{name}: expected a number or {count} of them; got {len(values)}")
    made = np.array([float(v) for v in values], np.float32)
    if not (np.isfinite(made).all() and (made > 0).all()):
        raise ValueError(f"{name}: expected positive standard deviations; got {x}")
    return made


def _compatibility(compat: Any, num_labels: int) -> np.ndarray:
    """Energies, float32 [K] or [K, K] symmetric."""
    if isinstance(compat, Number):
        weight = float(compat)  # type: ignore[arg-type]  # complex ones raise TypeError
        return buffers.finite("compat", np.full(num_labels, -weight, np.float32))
    ndim = getattr(compat, "ndim", None)
    if ndim is not None and ndim not in (1, 2):
        raise ValueError(
            f"LabelCompatibility of dimension >2 not meaningful; expected a number, [{num_labels}] or "
            f"[{num_labels}, {num_labels}], got shape {compat.shape}"
        )
    axes = "labels" if ndim == 1 else "labels, labels"
    energies = buffers.finite("compat", buffers.typed("compat", compat, np.float32, axes))
    expected = (num_labels,) * energies.ndim
    if energies.shape != expected:
        raise ValueError(f"compat: expected shape {expected}; got {energies.shape}")
    return energies.copy() if energies.ndim == 1 else 0.5 * (energies + energies.T)


def _product(name: str, weights: Any, features: Any) -> np.ndarray:
    left = buffers.typed(name, weights, np.float32, "labels, features")
    right = buffers.typed("f", features, np.float32, "features, points")
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"f: expected shape ({left.shape[1]}, points), for {name} {left.shape}; got {right.shape}")
    return left @ right


def _check_matrix(name: str, x: Any) -> None:
    if not isinstance(x, MatrixXf):
        raise TypeError(f"Argument '{name}' has incorrect type (expected MatrixXf, got {type(x).__name__})")
