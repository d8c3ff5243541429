"""Segmentation metrics from one integer confusion matrix.

Rows are true classes, columns predicted ones. Counts are integers: a float32 matrix stops counting at 16,777,216.
On a device a matrix is int32 (2^31 pixels); add matrices of many batches on the host in int64.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pwcrf_jax.arrays import as_mask, batch_spec, compiled, level, seen
from pwcrf_jax.labels import VOID, checked, integers, narrow, split


def confusion_matrix(
    predictions: ArrayLike, labels: ArrayLike, num_classes: int, *, void: int | None = VOID
) -> jax.Array:
    """Counts of (true class, predicted class).

    Args:
      predictions: int [...], 0..num_classes-1 where the label counts. Others are refused where they can be seen; under
        `jit` their pixels count for nothing.
      labels: int [...], same shape, 0..num_classes-1; pixels whose label is `void` count for nothing. Others as in
        predictions.
      num_classes: static.
      void: the void label, static and outside 0..num_classes-1; -1 in much other code.

    Returns:
      int32 [num_classes, num_classes]; [t, p] is the number of pixels of class t that were given class p.

    Raises:
      ValueError: shapes that differ; values that are not integers, or neither class nor void; a void that is a class.

    Examples:
      >>> pw.confusion_matrix(jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 1, 255]), num_classes=2).tolist()
      [[1, 0], [1, 1]]
    """
    predictions, labels = integers(predictions, "predictions"), integers(labels)
    if predictions.shape != labels.shape:
        raise ValueError(f"expected predictions and labels of one shape, got {predictions.shape} and {labels.shape}")
    labels = checked(labels, num_classes, void)
    if seen(labels):
        values = np.asarray(jax.device_get(labels)).astype(np.int64)
        counts = (values >= 0) & (values < num_classes)
        remedy = f"set labels to {void} where there is no prediction"
        checked(predictions, num_classes, None, mask=counts, name="predictions", remedy=remedy)
    return _counts(predictions, labels, num_classes=num_classes)


@compiled()
def _counts(predictions: jax.Array, labels: jax.Array, *, num_classes: int) -> jax.Array:
    (row, labelled), (column, predicted) = split(labels, num_classes), split(predictions, num_classes)
    index = row * num_classes + column
    counts = (labelled & predicted).ravel().astype(jnp.int32)
    flat = jnp.zeros(num_classes * num_classes, jnp.int32).at[index.ravel()].add(counts)
    return flat.reshape(num_classes, num_classes)


def boundary_band(labels: ArrayLike, width: int, mask: ArrayLike | None = None) -> jax.Array:
    """The pixels near a boundary of the truth: the trimap of Kohli, Ladicky and Torr (IJCV 2009).

    Scores over this band alone (labels outside it set to void) measure how well outlines are met.

    Args:
      labels: int [..., H, W]; void is a label like any other, as it lies along outlines in many data sets.
      width: static; a pixel is in the band if another label lies within `width` pixels of it, in rows and columns.
      mask: bool [..., H, W]; false pixels (padding) are in no band and make none.

    Returns:
      bool [..., H, W].
    """
    return _band(narrow(integers(labels)), as_mask(mask), width=width)


@compiled(lambda labels, mask, width: jax.P(*batch_spec(labels, 2)))
def _band(labels: jax.Array, mask: jax.Array | None, *, width: int) -> jax.Array:
    labels, valid = level(labels.astype(jnp.int32), jnp.ones(labels.shape, bool) if mask is None else mask)
    limits = jnp.iinfo(jnp.int32)
    highest = _pool(jnp.where(valid, labels, limits.min), width, jax.lax.max, limits.min)
    lowest = _pool(jnp.where(valid, labels, limits.max), width, jax.lax.min, limits.max)
    return valid & (highest != lowest)


def _pool(x: jax.Array, width: int, reduce: Callable[..., Any], start: int) -> jax.Array:
    """Over windows of 2 width + 1 rows and columns, one axis after the other."""
    for axis in (-2, -1):
        window = [1] * x.ndim
        window[axis] = 2 * width + 1
        x = jax.lax.reduce_window(x, jnp.int32(start), reduce, window, (1,) * x.ndim, "SAME")
    return x


class Scores(NamedTuple):
    """Figures as fractions of 1.

    Attributes:
      mean_iou, pixel_accuracy, mean_accuracy, frequency_weighted_iou: Python floats.
      iou_per_class, accuracy_per_class: float64 [K], NaN where a class has no figure.
    """

    mean_iou: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float
    iou_per_class: np.ndarray
    accuracy_per_class: np.ndarray


def scores(confusion: ArrayLike, classes: Sequence[int] | np.ndarray | None = None) -> Scores:
    """Standard figures of a confusion matrix, on the host.

        IoU_k = n_kk / (t_k + p_k - n_kk),  accuracy_k = n_kk / t_k,  t_k = sum_j n_kj,  p_k = sum_j n_jk
        frequency-weighted IoU = sum_k t_k IoU_k / sum_k t_k

    A class that is neither in the truth nor predicted has no IoU (NaN) and is left out of the mean. A class that is
    absent from the truth but predicted somewhere has IoU 0 and *does* count in the mean IoU; it has no accuracy (NaN)
    and is left out of the mean accuracy. With no valid pixel at all every figure is NaN.

    Args:
      confusion: integers [K, K], rows true classes; of NumPy or JAX.
      classes: indices of the classes that mean IoU, mean accuracy and frequency-weighted IoU are taken over; None: all.
        Every class counts as a prediction all the same: a sheep called "bird" is wrong even where birds are not scored.

    Returns:
      `Scores`, float64.

    Raises:
      ValueError: a matrix that is not square.

    Examples:
      >>> figures = pw.scores(np.array([[1, 0], [1, 2]]))
      >>> figures.mean_iou == (1 / 2 + 2 / 3) / 2, figures.pixel_accuracy
      (True, 0.75)
    """
    n = np.asarray(confusion, np.float64)
    if n.ndim != 2 or n.shape[0] != n.shape[1]:
        raise ValueError(f"expected a square confusion matrix, got shape {n.shape}")
    hit, true, predicted = np.diag(n), n.sum(1), n.sum(0)
    iou = _ratio(hit, true + predicted - hit)
    accuracy = _ratio(hit, true)
    of = slice(None) if classes is None else np.asarray(classes, None if len(classes) else int)
    return Scores(
        mean_iou=_mean(iou[of]),
        pixel_accuracy=float(_ratio(hit.sum(), true.sum())),
        mean_accuracy=_mean(accuracy[of]),
        frequency_weighted_iou=float(_ratio(np.nansum((true * iou)[of]), true[of].sum())),
        iou_per_class=iou,
        accuracy_per_class=accuracy,
    )


def _ratio(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    a, b = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def _mean(x: np.ndarray) -> float:
    return float(np.mean(x[~np.isnan(x)])) if not np.isnan(x).all() else float("nan")
