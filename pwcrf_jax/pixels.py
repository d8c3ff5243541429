"""Labels of pixels: mean field on the cells of a grid, read at the pixels that the grid covers.

    log Q of cells (`pwcrf_jax.mean_field`)  ->  bilinear interpolation  ->  log-probabilities and labels of pixels

The grid covers the image evenly: the centre of cell i of n is at pixel (i + 1/2) size / n - 1/2. Models of ours are
decoded by the same functions (`pwcrf_jax.model.decode`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pwcrf_jax import inputs, mean_field
from pwcrf_jax.arrays import as_array, batch_spec, compiled, level
from pwcrf_jax.potentials import PairwiseTable

Array = jax.Array | np.ndarray
"""Of a device or of the host, on which images of any size are put together."""

Taps = tuple[np.ndarray, np.ndarray]
"""Positions along an axis of a map: (index int32 [n], fraction float32 [n]) of `taps`."""

DEFAULT_SETTINGS = mean_field.Settings(average_messages=True)
"""Settings of `decode`, those of `pwcrf train`: 3 iterations, weight 1 (float), no damping, messages averaged."""

# Stands for minus infinity while `read` interpolates; and less than any share of a cell that is not 0, of two axes.
_LOWEST, _LEAST_SHARE = -1e30, 1e-15


class Decoded(NamedTuple):
    """What `decode` returns.

    Attributes:
      labels: int32 [..., height, width], the best label of each pixel, the first of equals.
      log_probs: float32 [..., height, width, K], log-probabilities of pixels, as `pwcrf_jax.dense_crf.refine` takes.
      log_marginals: float32 [..., h, w, K], those of the cells, of mean field.
      change: float32 [num_iterations, ...], the largest change of a marginal in each iteration: where it does not
        fall, give damping.
    """

    labels: jax.Array
    log_probs: jax.Array
    log_marginals: jax.Array
    change: jax.Array


def decode(
    unary: ArrayLike,
    potentials: inputs.Potentials,
    settings: mean_field.Settings = DEFAULT_SETTINGS,
    size: Sequence[int] | None = None,
    *,
    valid_box: ArrayLike | None = None,
    **fields: Any,
) -> Decoded:
    """Mean field over a unary and relations on a grid, and the labels of the pixels that the grid covers.

        log Q_i(k) = z_i[k] / T + sum_r w_r m_{r,i}[k] - const        (Lin et al., CVPR 2016, section 3)

    Args:
      unary: scores z, float [..., h, w, K]; leading axes are images.
      potentials: of relations on the grid, a sequence, a mapping of names, or one alone; may be empty.
      settings: `pwcrf_jax.mean_field.Settings`; those of `pwcrf train` unless given, which average messages.
      size: (height, width) of the image in pixels; static. None: that of the grid, a pixel a cell.
      valid_box: int [..., 4], top, left, bottom and right of each image inside of `size`, the last two exclusive, where
        it was padded; cells beyond send nothing, receive nothing and lend nothing to pixels. None: all is image.
      fields: of `Settings` by name, in place of those of settings, such as num_iterations=10.

    Returns:
      `Decoded`.

    Raises:
      TypeError: as `pwcrf_jax.mean_field.run`.
      ValueError: as there; scores without a grid; tables of edges, whose graphs have no pixels; a size of other than
        two numbers of at least 1; boxes that are not one an image.

    Examples:
      >>> unary = np.float32([[[0, 1], [3, 0]]])  # a map of 1 x 2 cells, 2 classes
      >>> pw.decode(unary, [], size=(1, 6)).labels.tolist()  # [] has no relations
      [[1, 1, 0, 0, 0, 0]]
    """
    scores = as_array(unary)
    if scores.ndim < 3:
        raise ValueError(f"expected unary scores of a grid [..., h, w, K], got {scores.shape}")
    if any(isinstance(p, PairwiseTable) for p in inputs.relations(potentials)[0]):
        raise ValueError("decode is for grids: pass tables of edges to pwcrf_jax.mean_field.run")
    grid = scores.shape[-3:-1]
    pixels = grid if size is None else tuple(size)
    if len(pixels) != 2 or min(pixels) < 1:
        raise ValueError(f"expected a size (height, width) in pixels, got {size}")
    mask = jnp.ones(grid, bool)
    if valid_box is not None:
        box = as_array(valid_box)
        if box.shape != (*scores.shape[:-3], 4):
            raise ValueError(f"expected valid_box {(*scores.shape[:-3], 4)}, one an image, got {box.shape}")
        mask = grid_mask(box, grid, pixels)
    node_mask = None if valid_box is None else mask
    log_marginals, info = mean_field.run(scores, potentials, settings, node_mask=node_mask, **fields)
    labels, log_probs = _at_pixels(log_marginals, mask, size=pixels)
    return Decoded(labels, log_probs, log_marginals, info.change)


def _at_pixels_layout(log_marginals: jax.Array, *_: jax.Array, size: Sequence[int]) -> Any:
    spec: Any = jax.P  # in place of arrays
    batch = batch_spec(log_marginals, 3)
    return spec(*batch), spec(*batch)


@compiled(_at_pixels_layout)
def _at_pixels(log_marginals: jax.Array, mask: jax.Array, *, size: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """(labels, log-probabilities) of all pixels; labels before normalising, whose rounding may tie two."""
    mixed = upsample(log_marginals, size, mask)
    return jnp.argmax(mixed, axis=-1).astype(jnp.int32), jax.nn.log_softmax(mixed, axis=-1)


def upsample(log_marginals: Array, size: Sequence[int], node_mask: Array | None = None) -> jax.Array:
    """Bilinear upsampling of a map to a frame: `read` at all its pixels.

    Args:
      log_marginals: float32 [..., h, w, K].
      size: (height, width) of the frame; static.
      node_mask: of `read`; None: all valid.

    Returns:
      float32 [..., height, width, K].
    """
    grid = log_marginals.shape[-3:-1]
    mask = jnp.ones(grid, bool) if node_mask is None else node_mask
    return read(log_marginals, mask, *frame_taps(grid, size))


def frame_taps(grid: Sequence[int], size: Sequence[int]) -> tuple[Taps, Taps]:
    """The taps of all pixels of a frame.

    Args:
      grid: (h, w) in cells of the map that covers the frame.
      size: (height, width) of the frame in pixels.

    Returns:
      (rows, cols) for `read`, each (int32 [n], float32 [n]) of `taps`.
    """
    rows, cols = (taps((np.arange(n) + 0.5) * (cells / n) - 0.5, cells) for n, cells in zip(size, grid, strict=True))
    return rows, cols


def taps(positions: np.ndarray, num_cells: int) -> Taps:
    """Where `read` reads along an axis.

    Args:
      positions: float [n], in cells; the centre of cell i is i.
      num_cells: of the map along this axis.

    Returns:
      (index int32 [n], fraction float32 [n]): between which cells a position lies, and where between them.
    """
    index = np.clip(np.floor(positions), -1, num_cells - 1)
    return (index + 1).astype(np.int32), (positions - index).astype(np.float32)


def read(log_marginals: Array, node_mask: Array, rows: Taps, cols: Taps) -> jax.Array:
    """Log marginals of cells, bilinearly interpolated at pixels; all labels of pixels are read by it.

    Args:
      log_marginals: float32 [..., h, w, K].
      node_mask: bool [..., h, w]; masked cells (padding) lend nothing to the pixels beside them: the weights of the
        others are scaled up, as at the border of the map.
      rows, cols: of `taps`, n and m positions.

    Returns:
      float32 [..., n, m, K]. Pixels that no valid cell reaches get zeros; a label that a cell rules out (-inf) is
      ruled out at all pixels that it reaches.
    """
    border = lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 3) + ((1, 1), (1, 1), (0, 0)))  # weights are 0 there

    def mix(x: jax.Array) -> jax.Array:
        for axis, (index, fraction), rest in ((-3, rows, (1, 2)), (-2, cols, (0, 2))):
            near, far = jnp.take(x, index, axis), jnp.take(x, index + 1, axis)
            near, far, share = level(near, far, jnp.expand_dims(fraction, rest))
            x = near * (1 - share) + far * share
        return x

    log_marginals, valid = level(as_array(log_marginals), as_array(node_mask)[..., None])
    # Minus infinity times a share of 0 would be NaN. A select within `mix` would make programs round differently.
    finite = jnp.maximum(log_marginals, _LOWEST)
    weight = mix(border(valid.astype(jnp.float32)))
    out = mix(border(jnp.where(valid, finite, 0.0))) / jnp.maximum(weight, 1e-6)
    return jnp.where(out < _LOWEST * _LEAST_SHARE, -jnp.inf, out)


def grid_mask(valid_box: Array, grid: Sequence[int], size: Sequence[int]) -> jax.Array:
    """Which cells lie on the image and not on its padding.

    Args:
      valid_box: int [..., 4], top, left, bottom and right of each image in its frame, the last two exclusive.
      grid: (h, w) of the map; static.
      size: (height, width) of the frame in pixels; static.

    Returns:
      bool [..., h, w]: true where the cell's centre lies inside. An image so thin that it meets no centre has the row
      or column of cells that its first pixel lies in, unless it is empty.
    """
    axes = []
    for axis, (cells, pixels) in enumerate(zip(grid, size, strict=True)):
        first, end = valid_box[..., axis, None], valid_box[..., 2 + axis, None]
        centres = (jnp.arange(cells, dtype=jnp.float32) + 0.5) * (pixels / cells)
        inside = (centres >= first.astype(jnp.float32)) & (centres < end.astype(jnp.float32))
        thin = ~jnp.any(inside, axis=-1, keepdims=True) & (end > first)
        own = jnp.arange(cells, dtype=jnp.int32) == (first * cells // pixels).astype(jnp.int32)
        axes.append(inside | (thin & own))
    return axes[0][..., :, None] & axes[1][..., None, :]
