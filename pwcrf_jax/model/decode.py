"""Decoding, the only way from potentials to labels.

    potentials -> mean field -> a finer unary or refinement convolutions, where there are -> log marginals of cells
               -> bilinear interpolation -> log-probabilities and labels of pixels

Where an image lies inside its frame is its valid box, int32 [4]: top, left, bottom and right in pixels, the last two
exclusive. Cells beyond it are padding: they send and receive no message and lend nothing to any pixel.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import mean_field
from pwcrf_jax.arrays import as_array, level
from pwcrf_jax.model.segmenter import Potentials

Array = jax.Array | np.ndarray
"""Of a device or of the host, on which images of any size are put together."""

Taps = tuple[np.ndarray, np.ndarray]
"""Positions along an axis of a map: (index int32 [n], fraction float32 [n]) of `taps`."""

# Stands for minus infinity while `read` interpolates; and less than any share of a cell that is not 0, of two axes.
_LOWEST, _LEAST_SHARE = -1e30, 1e-15


class Decoded(NamedTuple):
    """Log marginals of cells, those of one image without its axis B.

    Attributes:
      log_marginals: float32 [B, h, w, K]; after refinement convolutions on their finer grid, and not normalised.
      mask: bool [B, h, w], cells on the image, of `grid_mask`.
      change: float32 [num_iterations, B], the largest change of a marginal in each iteration; None: not known.
    """

    log_marginals: Array
    mask: Array
    change: jax.Array | None = None


def decode(potentials: Potentials, valid_box: Array, size: Sequence[int], settings: mean_field.Settings) -> Decoded:
    """Mean field over the unary and the relations, then the finer unary, then the refinement convolutions.

    Args:
      potentials: of a `pwcrf_jax.model.segmenter.Segmenter`; with refinement_logits None nothing is refined.
      valid_box: int [B, 4].
      size: (height, width) of the frame in pixels; static.
      settings: `pwcrf_jax.mean_field.Settings`; weights by name of the relations whose messages count, or one number,
        or None (1), for all relations of the potentials.

    Returns:
      `Decoded`. Without relations: the log softmax of the unary.

    Raises:
      KeyError: a relation that the potentials do not have.
      ValueError: as `pwcrf_jax.mean_field.run`.
    """
    mask = grid_mask(valid_box, potentials.unary.shape[1:3], size)
    chosen = potentials.pairwise
    if isinstance(settings.weights, Mapping):
        chosen = {name: chosen[name] for name in settings.weights}
    log_marginals, info = mean_field.run(potentials.unary, chosen, settings, node_mask=mask)
    decoded = Decoded(log_marginals, mask, info.change)
    if potentials.fine_unary is not None:
        decoded = with_fine_unary(decoded, potentials, valid_box, size, settings)
    return with_refinement_convs(decoded, potentials.refinement_logits, valid_box, size)


def with_fine_unary(
    decoded: Decoded, potentials: Potentials, valid_box: Array, size: Sequence[int], settings: mean_field.Settings
) -> Decoded:
    """Adds what relations said of the cells to the scores of a finer grid, so that no detail of these is lost.

        log q = log softmax(s / T + up(log q_cells - log softmax(z / T)))

    z: unary; s: fine_unary. Without messages the labels are those of s.

    Args:
      decoded: `Decoded` of the unary's grid.
      potentials: with fine_unary, float32 [B, h', w', K].
      valid_box, size, settings: of `decode`.

    Returns:
      `Decoded` of the finer grid, float32 [B, h', w', K].
    """
    assert potentials.fine_unary is not None
    alone, given = (mean_field.tempered(x, settings)[0] for x in (potentials.unary, potentials.fine_unary))
    said = decoded.log_marginals - jax.nn.log_softmax(alone, axis=-1)
    grid = given.shape[1:3]
    log_marginals = jax.nn.log_softmax(given + upsample(said, grid, decoded.mask), axis=-1)
    return decoded._replace(log_marginals=log_marginals, mask=grid_mask(valid_box, grid, size))


def with_refinement_convs(
    decoded: Decoded, refinement_logits: Array | None, valid_box: Array, size: Sequence[int]
) -> Decoded:
    """Adds refinement convolutions to the outcome of mean field.

    Args:
      decoded: `Decoded` of the unary's grid.
      refinement_logits: float32 [B, h', w', K], of `Potentials`, or None.
      valid_box, size: of `decode`.

    Returns:
      `Decoded` of the finer grid, float32 [B, h', w', K]; without refinement_logits what was given.
    """
    if refinement_logits is None:
        return decoded
    log_marginals = apply_refinement(decoded.log_marginals, refinement_logits, decoded.mask)
    mask = grid_mask(valid_box, refinement_logits.shape[1:3], size)
    return decoded._replace(log_marginals=log_marginals, mask=mask)


def apply_refinement(log_marginals: Array, refinement_logits: Array, node_mask: Array | None = None) -> jax.Array:
    """Log marginals upsampled to the finer grid of refinement convolutions, plus what these say.

    Args:
      log_marginals: float32 [B, h, w, K].
      refinement_logits: float32 [B, h', w', K], of `Potentials`.
      node_mask: of `upsample`.

    Returns:
      float32 [B, h', w', K], not normalised.
    """
    return upsample(log_marginals, refinement_logits.shape[1:3], node_mask) + refinement_logits


def log_probs(decoded: Decoded, rows: Taps, cols: Taps) -> jax.Array:
    """Log-probabilities at pixels.

    Args:
      decoded: `Decoded`, of a batch or of one image.
      rows, cols: of `read`, as `frame_taps` gives them.

    Returns:
      float32 [..., n, m, K].
    """
    return jax.nn.log_softmax(read(decoded.log_marginals, decoded.mask, rows, cols), axis=-1)


def labels(decoded: Decoded, rows: Taps, cols: Taps) -> jax.Array:
    """The best label at pixels, the first of equals.

    It is taken of what is interpolated, without normalising: that would change no label, but its rounding may tie two.

    Args:
      decoded: `Decoded`, of a batch or of one image.
      rows, cols: of `read`, as `frame_taps` gives them.

    Returns:
      uint8 [..., n, m].
    """
    return jnp.argmax(read(decoded.log_marginals, decoded.mask, rows, cols), axis=-1).astype(jnp.uint8)


def frame_labels(decoded: Decoded, size: Sequence[int]) -> jax.Array:
    """`labels` at all pixels of a frame.

    Args:
      decoded: `Decoded`, of a batch or of one image.
      size: (height, width) of the frame in pixels; static.

    Returns:
      uint8 [..., height, width].
    """
    return labels(decoded, *frame_taps(decoded.log_marginals.shape[-3:-1], size))


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
      valid_box: int [B, 4], top, left, bottom and right of each image in its frame, the last two exclusive.
      grid: (h, w) of the map; static.
      size: (height, width) of the frame in pixels; static.

    Returns:
      bool [B, h, w]: true where the cell's centre lies inside. An image so thin that it meets no centre has the row or
      column of cells that its first pixel lies in, unless it is empty.
    """
    axes = []
    for axis, (cells, pixels) in enumerate(zip(grid, size, strict=True)):
        first, end = valid_box[:, axis, None], valid_box[:, 2 + axis, None]
        centres = (jnp.arange(cells) + 0.5) * (pixels / cells)
        inside = (centres >= first) & (centres < end)
        thin = ~jnp.any(inside, axis=1, keepdims=True) & (end > first)
        axes.append(inside | (thin & (jnp.arange(cells) == first * cells // pixels)))
    return axes[0][:, :, None] & axes[1][:, None, :]
