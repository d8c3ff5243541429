"""Boundary refinement of a split: images in frames of few sizes, one on each of this host's devices at a time.

And of a single image, of any size.
"""

import functools

import jax
import numpy as np

from pwcrf_jax import dense_crf, gaussian
from pwcrf_jax.config import RefineSettings
from pwcrf_jax.model import decode
from pwcrf_jax.model.counts import BAND_WIDTHS, confusions

MODES = ("off", "spatial", "full")
BUCKET = 64  # frames are multiples of it, so that images of many sizes share few compiled programs


def frame_of(height: int, width: int, largest) -> tuple[int, int]:
    """The frame an image is refined in: its size rounded up to multiples of `BUCKET`, `largest` at most."""
    return tuple(min(-(-n // BUCKET) * BUCKET, most) for n, most in zip((height, width), largest, strict=True))


def _capacities(frame):
    """Rooms for the lattice to try in turn; the last suffices for any image."""
    return None, 2 * frame[0] * frame[1], 6 * frame[0] * frame[1]


@functools.cache
def _compiled(size, frame, num_iterations, method, radius, capacity):
    """fn(log_marginals, image, label, valid_box, params) over this host's devices, an image on each."""

    def refine(log_marginals, image, label, valid_box, params):
        """Marginals of the grid over a frame `size`, refined and counted inside `frame`."""
        mask = decode.grid_mask(valid_box[None], log_marginals.shape[:2], size)[0]
        rows, cols = decode.frame_taps(mask.shape, size)
        rows, cols = (tuple(x[:n] for x in axis) for axis, n in zip((rows, cols), frame, strict=True))
        valid = decode.grid_mask(valid_box[None], frame, frame)[0]
        refined, info = dense_crf.refine(
            decode.log_probs(decode.Decoded(log_marginals, mask), rows, cols),
            image,
            params,
            num_iterations,
            mask=valid,
            method=method,
            capacity=capacity,
            radius=radius,
        )
        confusion = confusions(refined.argmax(-1), label, valid, refined.shape[-1])
        return confusion, info.change, info.exceeded

    return jax.pmap(refine, in_axes=(0, 0, 0, 0, None), devices=jax.local_devices())


def refine_batch(
    log_marginals: np.ndarray, batch: dict[str, np.ndarray], settings: RefineSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Refines and scores the images of a host's batch.

    Args:
      log_marginals: float32 [b, h, w, K] of the grid.
      batch: of `pwcrf_jax.data.eval_batches`.
      settings: of `pwcrf_jax.config.refine_settings`.

    Returns:
      (confusion int32 [1 + bands, K, K] of `confusions`, change float32 [num_iterations], the largest).
    """
    params, num_iterations, method = settings
    size = batch["label"].shape[1:]
    num_classes = log_marginals.shape[-1]
    confusion = np.zeros((1 + len(BAND_WIDTHS), num_classes, num_classes), np.int32)
    change = np.zeros(num_iterations, np.float32)
    boxes = batch["valid_box"]
    wanted = np.flatnonzero(boxes[:, 2])
    for first in range(0, len(wanted), jax.local_device_count()):
        chosen = wanted[first : first + jax.local_device_count()]
        bottom, right = boxes[chosen, 2:].max(0).tolist()
        frame = height, width = frame_of(bottom, right, size)
        arrays = [log_marginals, *(batch[name][:, :height, :width] for name in ("image", "label")), boxes]
        # Devices without an image of their own work on the last one again.
        chosen = np.pad(chosen, (0, jax.local_device_count() - len(chosen)), "edge")
        arrays = [x[chosen] for x in arrays]
        options = size, frame, num_iterations, method, gaussian.radius_of(params.smoothness_sxy)
        for capacity in _capacities(frame):
            counts, largest, exceeded = _compiled(*options, capacity)(*arrays, params)
            if not np.any(exceeded):
                break
        real = min(len(wanted) - first, jax.local_device_count())
        confusion = confusion + np.asarray(counts[:real]).sum(0)
        change = np.maximum(change, np.max(largest[:real], axis=0))
    return confusion, change


def refine_image(log_probs: np.ndarray, image: np.ndarray, settings: RefineSettings) -> tuple[np.ndarray, np.ndarray]:
    """Refines one image of any size, on one device.

    Args:
      log_probs: float32 [H, W, K], log-probabilities of its pixels.
      image: uint8 [H, W, 3].
      settings: of `pwcrf_jax.config.refine_settings`.

    Returns:
      (log-probabilities float32 [H, W, K], change float32 [num_iterations], the largest of each iteration).
    """
    params, num_iterations, method = settings
    frame = [dense_crf.frame_side(side) for side in image.shape[:2]]  # not the image's: capacities are static too
    for capacity in _capacities(frame):
        refined, info = dense_crf.refine(log_probs, image, params, num_iterations, method=method, capacity=capacity)
        if not np.any(info.exceeded):
            break
    return np.asarray(refined), np.asarray(info.change)
