"""Boundary refinement of a split: each image in a frame of its own size class, spread over this host's devices."""

import functools

import jax
import numpy as np

from pwcrf_jax import dense_crf, gaussian, segmenter
from pwcrf_jax.training import steps

MODES = ("off", "spatial", "full")
BUCKET = 64  # frames are multiples of it, so that images of many sizes share few compiled programs


def params_of(settings, mode) -> dense_crf.Params:
    """The kernels of config.refine that a mode uses: "spatial" the smoothness kernel alone, "full" both."""
    params = dense_crf.Params(*(settings[name] for name in dense_crf.Params._fields))
    return params._replace(appearance_compat=None) if mode == "spatial" else params


def frame_of(height: int, width: int, largest) -> tuple[int, int]:
    """The frame an image is refined in: its size rounded up to multiples of `BUCKET`, `largest` at most."""
    return tuple(min(-(-n // BUCKET) * BUCKET, most) for n, most in zip((height, width), largest, strict=True))


@functools.partial(jax.jit, static_argnames=("size", "frame", "num_iterations", "method", "radius", "capacity"))
def _refine(log_marginals, image, label, valid_size, params, *, size, frame, num_iterations, method, radius, capacity):
    """One image: marginals of the grid over a frame `size`, refined and counted inside `frame`."""
    node_mask = segmenter.grid_mask(valid_size[None], log_marginals.shape[:2], size)
    log_probs = segmenter.upsample(log_marginals[None], *size, node_mask)[0, : frame[0], : frame[1]]
    valid = segmenter.grid_mask(valid_size[None], frame, frame)[0]
    refined, info = dense_crf.refine(
        jax.nn.log_softmax(log_probs),
        image,
        params,
        num_iterations,
        mask=valid,
        method=method,
        capacity=capacity,
        radius=radius,
    )
    confusion = steps.confusions(refined.argmax(-1), label, valid, refined.shape[-1])
    return confusion, info.change, info.exceeded


def refine_batch(log_marginals, batch, settings, mode):
    """Refines and scores the images of a host's batch.

    Args:
      log_marginals: float32 [b, h, w, K] of the grid.
      batch: of `pwcrf_jax.data.eval_batches`.
      settings: config.refine, or a mapping of its names.
      mode: "spatial" or "full".

    Returns:
      (confusion int32 [1 + bands, K, K] of `steps.confusions`, change float32 [num_iterations], the largest).
    """
    params = params_of(settings, mode)
    size = batch["label"].shape[1:]
    devices = jax.local_devices()
    options = dict(
        size=size,
        num_iterations=settings["num_iterations"],
        method=settings["method"],
        radius=gaussian.radius_of(params.smoothness_sxy),
    )

    def start(i, capacity=None):
        height, width = frame = frame_of(*batch["valid_size"][i].tolist(), size)
        image, label = (batch[name][i, :height, :width] for name in ("image", "label"))
        arrays = log_marginals[i], image, label, batch["valid_size"][i]
        arrays = jax.device_put(arrays, devices[i % len(devices)])
        return _refine(*arrays, params, **options, frame=frame, capacity=capacity)

    wanted = [i for i, size_ in enumerate(batch["valid_size"]) if size_[0]]
    running = {i: start(i) for i in wanted}  # not waited for: devices work side by side
    for i, (_, _, exceeded) in running.items():
        if exceeded:  # a lattice with room for the worst case always suffices
            height, width = frame_of(*batch["valid_size"][i].tolist(), size)
            running[i] = start(i, capacity=6 * height * width)
    num_classes = log_marginals.shape[-1]
    confusion = np.zeros((1 + len(steps.BAND_WIDTHS), num_classes, num_classes), np.int32)
    change = np.zeros(settings["num_iterations"], np.float32)
    for counts, largest, _ in running.values():
        confusion += np.asarray(counts)
        change = np.maximum(change, largest)
    return confusion, change
