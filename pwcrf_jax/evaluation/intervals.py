"""Intervals of mean IoU and pixel accuracy over images, by a paired bootstrap (Efron, Annals of Statistics 1979).

A draw takes as many images as there are, each as often as it comes, adds their counts, and computes both figures of it;
the interval is that between the percentiles 2.5 and 97.5 of the draws. Of a gain both rows see the same draws.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000
_BLOCK = 64  # draws at once


class Interval(NamedTuple):
    """A figure of all images as a fraction of 1, and its 95 % interval over images; NaN where there is none."""

    value: float
    low: float
    high: float


def reduced(confusion: np.ndarray) -> np.ndarray:
    """int64 [3, K] of a confusion matrix [K, K]: pixels of each class that are right, in the truth, and predicted."""
    counts = np.asarray(confusion, np.int64)
    return np.stack([np.diag(counts), counts.sum(1), counts.sum(0)])


def mean_iou(counts: np.ndarray, scored: Sequence[int] | None = None) -> np.ndarray:
    """Mean IoU of counts [..., 3, K] of `reduced`, as `pwcrf_jax.metrics.scores` has it; scored: classes, None: all."""
    right, true, predicted = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    union = true + predicted - right
    iou = np.divide(right, union, out=np.full(union.shape, np.nan), where=union > 0)
    iou = iou if scored is None else iou[..., list(scored)]
    there = ~np.isnan(iou)
    number = there.sum(-1)
    return np.divide(np.where(there, iou, 0).sum(-1), number, out=np.full(number.shape, np.nan), where=number > 0)


def pixel_accuracy(counts: np.ndarray, scored: Sequence[int] | None = None) -> np.ndarray:
    """Share of all pixels that are right, of counts [..., 3, K] of `reduced`; every class counts."""
    del scored
    right, true, _ = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    return np.divide(right.sum(-1), true.sum(-1), out=np.full(true.shape[:-1], np.nan), where=true.sum(-1) > 0)


FIGURES = {"miou": mean_iou, "pixel_accuracy": pixel_accuracy}


def paired(
    before: np.ndarray, after: np.ndarray, scored: Sequence[int] | None = None, draws: int = DRAWS, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """{figure of `FIGURES`: {"before", "after", "gain": interval}}.

    Args:
      before, after: int [images, 3, K] of `reduced`, of the same images.
      scored: indices of the classes that mean IoU is over; None: all.
      draws, seed: of the bootstrap.

    Raises:
      ValueError: other shapes, or no image.
    """
    if before.shape != after.shape or before.ndim != 3 or not len(before):
        raise ValueError(f"expected counts of the same images, [images, 3, K]; got {before.shape} and {after.shape}")
    rng, number = np.random.default_rng(seed), len(before)
    times = np.stack([np.bincount(rng.integers(number, size=number), minlength=number) for _ in range(draws)])
    out = {}
    for name, figure in FIGURES.items():
        whole = [figure(counts.sum(0)[None], scored)[0] for counts in (before, after)]
        drawn = [_drawn(counts, times, figure, scored) for counts in (before, after)]
        values = {"before": (whole[0], drawn[0]), "after": (whole[1], drawn[1])}
        values["gain"] = (whole[1] - whole[0], drawn[1] - drawn[0])
        out[name] = {key: _interval(value, several) for key, (value, several) in values.items()}
    return out


def _drawn(counts, times, figure, scored):
    flat = counts.reshape(len(counts), -1).astype(np.float64)
    blocks = (times[i : i + _BLOCK] @ flat for i in range(0, len(times), _BLOCK))
    return np.concatenate([figure(block.reshape(-1, *counts.shape[1:]), scored) for block in blocks])


def _interval(value, drawn) -> Interval:
    drawn = drawn[~np.isnan(drawn)]  # draws without a pixel of any class
    low, high = np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))
