"""Decoding, the only way from potentials to labels.

    potentials -> mean field -> a finer unary or refinement convolutions, where there are -> log marginals of cells
               -> bilinear interpolation -> log-probabilities and labels of pixels

Where an image lies inside its frame is its valid box, int32 [4]: top, left, bottom and right in pixels, the last two
exclusive. Cells beyond it are padding: they send and receive no message and lend nothing to any pixel. What reads
cells at pixels is `pwcrf_jax.pixels`, for networks of your own too.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pwcrf_jax import mean_field
from pwcrf_jax.model.segmenter import Potentials
from pwcrf_jax.pixels import Array, Taps, frame_taps, grid_mask, read, upsample


class Decoded(NamedTuple):
    """Log marginals of cells, those of one image without its axis B.

    Attributes:
      log_marginals: float32 [B, h, w, K]; after refinement convolutions on their finer grid, and not normalised.
      mask: bool [B, h, w], cells on the image, of `pwcrf_jax.pixels.grid_mask`.
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
      node_mask: of `pwcrf_jax.pixels.upsample`.

    Returns:
      float32 [B, h', w', K], not normalised.
    """
    return upsample(log_marginals, refinement_logits.shape[1:3], node_mask) + refinement_logits


def log_probs(decoded: Decoded, rows: Taps, cols: Taps) -> jax.Array:
    """Log-probabilities at pixels.

    Args:
      decoded: `Decoded`, of a batch or of one image.
      rows, cols: of `pwcrf_jax.pixels.read`, as `frame_taps` of that module gives them.

    Returns:
      float32 [..., n, m, K].
    """
    return jax.nn.log_softmax(read(decoded.log_marginals, decoded.mask, rows, cols), axis=-1)


def labels(decoded: Decoded, rows: Taps, cols: Taps) -> jax.Array:
    """The best label at pixels, the first of equals.

    It is taken of what is interpolated, without normalising: that would change no label, but its rounding may tie two.

    Args:
      decoded: `Decoded`, of a batch or of one image.
      rows, cols: of `pwcrf_jax.pixels.read`, as `frame_taps` of that module gives them.

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
