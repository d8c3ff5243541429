"""Energies and features for pydensecrf's classes, with the names, defaults and values of its `utils`."""

import logging
from collections.abc import Sequence
from numbers import Number
from typing import Any

import numpy as np


def unary_from_labels(labels: Any, n_labels: int, gt_prob: float, zero_unsure: bool = True) -> np.ndarray:
    """Energies of a label map that is right with probability gt_prob; the other labels share the rest.

    Args:
      labels: int of any shape; 1..n_labels and 0 for "could be anything" or, without zero_unsure, 0..n_labels - 1.
      n_labels: number of labels, 0 not counted where it means "unsure".
      gt_prob: in (0, 1).
      zero_unsure: whether all labels are equally likely where `labels` is 0.

    Returns:
      float32 [n_labels, number of labels], -log p.

    Raises:
      AssertionError: gt_prob outside (0, 1).
      ZeroDivisionError: fewer than two labels.
      IndexError: labels that are no integers, or larger than there are labels.
      ValueError: labels below 0.
    """
    if not 0 < gt_prob < 1:
        raise AssertionError(f"gt_prob must be in (0, 1); got {gt_prob}")
    if n_labels < 2:
        raise ZeroDivisionError(f"n_labels: expected 2 or more, which share 1 - gt_prob; got {n_labels}")
    given = np.asarray(labels).reshape(-1)
    if given.dtype.kind not in "iub":
        raise IndexError(f"labels: expected integers; got {given.dtype}")
    largest = n_labels if zero_unsure else n_labels - 1
    if given.size and given.max() > largest:
        raise IndexError(f"labels: expected 0 to {largest}; got {given.max()}")
    if given.size and given.min() < 0:
        raise ValueError(f"labels: expected 0 to {largest}; got {given.min()}")
    given = given.astype(np.int64)  # 0 - 1 of an unsigned label would be its largest one
    energies = np.full((n_labels, given.size), -np.log((1.0 - gt_prob) / (n_labels - 1)), np.float32)
    energies[given - int(zero_unsure), np.arange(given.size)] = -np.log(gt_prob)
    if zero_unsure:
        energies[:, given == 0] = -np.log(1.0 / n_labels)
    return energies


def compute_unary(labels: Any, M: int, GT_PROB: float = 0.5) -> np.ndarray:
    """`unary_from_labels` by its old name; logs a warning, as pydensecrf does."""
    logging.warning("pydensecrf.compute_unary is deprecated, use unary_from_labels instead.")
    return unary_from_labels(labels, M, GT_PROB)


def unary_from_softmax(sm: Any, scale: float | None = None, clip: float | None = 1e-5) -> np.ndarray:
    """Energies of probabilities.

    Args:
      sm: [classes, ...], of a softmax over the first axis.
      scale: certainty of the softmax in (0, 1]: scale * sm + (1 - scale) / classes. None: as they are.
      clip: the least probability; smaller ones are raised to it, as log 0 is infinite. None: as they are.

    Returns:
      float32 [classes, points], -log p, C-contiguous.

    Raises:
      AssertionError: scale outside (0, 1].
      ValueError: NaN.
    """
    probs = np.asarray(sm)
    classes = probs.shape[0]
    if np.isnan(probs).any():
        raise ValueError("sm: expected probabilities; got NaN")
    if scale is not None:
        if not 0 < scale <= 1:
            raise AssertionError(f"scale needs to be in (0, 1]; got {scale}")
        probs = scale * probs + (1 - scale) * (np.ones(probs.shape) / classes)
    if clip is not None:
        probs = np.clip(probs, clip, 1.0)
    with np.errstate(divide="ignore"):  # without `clip`, a label ruled out has an infinite energy
        # C-contiguous also where the classes are the last axis in memory, as `setUnaryEnergy` wants it.
        return -np.ascontiguousarray(np.log(probs).reshape(classes, -1), np.float32)


def softmax_to_unary(sm: Any, GT_PROB: float = 1) -> np.ndarray:
    """`unary_from_softmax` by its old name, without clipping; logs a warning, as pydensecrf does."""
    logging.warning("pydensecrf.softmax_to_unary is deprecated, use unary_from_softmax instead.")
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB, clip=None)


def create_pairwise_gaussian(sdims: Sequence[float], shape: Sequence[int]) -> np.ndarray:
    """Features of a kernel of positions alone, for `addPairwiseEnergy`: index / standard deviation, axis by axis.

    Args:
      sdims: standard deviation along each axis. Mind the order: of an image [H, W], down first, then across.
      shape: of the image.

    Returns:
      float32 [axes, points].

    Raises:
      IndexError: more standard deviations than axes.
      ValueError: fewer, or one that is 0 or no finite number.
    """
    scales = _scales("sdims", sdims, len(shape), "axes of shape")
    grid = np.indices(tuple(shape), np.float32)
    for axis, scale in zip(grid, scales, strict=True):
        axis /= scale
    return grid.reshape(len(scales), -1)


def create_pairwise_bilateral(
    sdims: Sequence[float], schan: float | Sequence[float], img: Any, chdim: int = -1
) -> np.ndarray:
    """Features of a kernel of positions and channels, for `addPairwiseEnergy`, of an image of any number of both.

    Args:
      sdims: standard deviation along each axis but that of the channels; of [H, W], down first, then across.
      schan: standard deviation of each channel, or one for all.
      img: the image.
      chdim: its axis of channels; -1: it has none, being one channel.

    Returns:
      float32 [axes + channels, points], positions first.

    Raises:
      IndexError: more standard deviations than there are axes or channels.
      ValueError: fewer, or one that is 0 or no finite number; an axis that img does not have.
    """
    image = np.asarray(img)
    channels = (image[None] if chdim == -1 else np.moveaxis(image, chdim, 0)).astype(np.float32)
    shape = channels.shape[1:]
    every = [schan] * len(channels) if isinstance(schan, Number) else schan
    for channel, scale in zip(channels, _scales("schan", every, len(channels), "channels of img"), strict=True):
        channel /= scale
    positions = create_pairwise_gaussian(sdims, shape).reshape(-1, *shape)
    return np.concatenate([positions, channels]).reshape(len(shape) + len(channels), -1)


def _create_pairwise_gaussian_2d(sx: float, sy: float, shape: Sequence[int]) -> np.ndarray:
    """`create_pairwise_gaussian` of an image, divided in float64: pydensecrf's own tests hold the two together."""
    rows, cols = np.indices((shape[0], shape[1]))
    return np.stack([rows / sx, cols / sy]).reshape(2, -1).astype(np.float32)


def _create_pairwise_bilateral_2d(sx: float, sy: float, sr: float, sg: float, sb: float, img: Any) -> np.ndarray:
    """`create_pairwise_bilateral` of an RGB image, likewise."""
    colours = np.moveaxis(np.asarray(img)[..., :3] / np.array([sr, sg, sb], np.float64), -1, 0)
    positions = _create_pairwise_gaussian_2d(sx, sy, colours.shape[1:])
    return np.concatenate([positions, colours.reshape(3, -1).astype(np.float32)])


def _scales(name: str, given: Any, count: int, what: str) -> list[float]:
    scales = list(given)
    if len(scales) != count:
        kind = IndexError if len(scales) > count else ValueError
        raise kind(f"{name}: expected {count} standard deviations, one for each of the {what}; got {len(scales)}")
    if not all(np.isfinite(s) and s != 0 for s in scales):
        raise ValueError(f"{name}: expected finite standard deviations other than 0; got {scales}")
    return scales
