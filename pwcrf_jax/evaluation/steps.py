"""The evaluation step, per device (see `pwcrf_jax.runtime.parallel`), without jit."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pwcrf_jax import mean_field
from pwcrf_jax.model import decode
from pwcrf_jax.model.counts import confusions
from pwcrf_jax.model.losses import piecewise_terms
from pwcrf_jax.model.segmenter import Potentials, potentials_of
from pwcrf_jax.runtime.parallel import AXIS


class Sums(NamedTuple):
    """Sums over all devices of one batch.

    Attributes:
      confusion: {row of the table: int32 [1 + bands, K, K] of `confusions`}.
      terms: {kind of factor: (sum, count) of its log-likelihood}.
      change: {row: float32 [num_iterations], the largest change of a marginal in each iteration}.
    """

    confusion: dict[str, jax.Array]
    terms: dict[str, tuple[jax.Array, jax.Array]]
    change: dict[str, jax.Array]


class Row(NamedTuple):
    """One row's answer for each image: labels uint8 [B, H, W], log marginals as in `decode.Decoded`."""

    labels: jax.Array
    log_marginals: jax.Array


class PerImage(NamedTuple):
    """Results of each image of a batch: {row: `Row`} of the rows that are kept, and what `figures` made."""

    rows: dict[str, Row]
    figures: Any


def make_eval_step(
    model: Any,
    rows: Mapping[str, Sequence[str]],
    settings: mean_field.Settings,
    *,
    keep: Sequence[str] = (),
    terms: Callable[..., dict] = piecewise_terms,
    figures: Callable[[Potentials, dict, dict[str, decode.Decoded]], Any] | None = None,
) -> Callable[[Any, dict], tuple[Sums, PerImage]]:
    """Builds step(params, batch) -> (`Sums`, `PerImage`).

    batch: image, label, valid_box and, where they are given, scores as of `pwcrf_jax.data.eval_batches`.

    Args:
      model: a `Segmenter`. With refinement convolutions there is one row more, "convs": "all" with these on top.
      rows: {row of the table: names of the relations whose messages count}; "all" is one of them.
      settings: `pwcrf_jax.mean_field.Settings` with the weights of all these relations, by name.
      keep: the rows that `PerImage` has.
      terms: (potentials, labels) -> `Sums.terms` of one device.
      figures: (potentials, batch, {row: `decode.Decoded`}) -> tree of arrays with a leading axis of images.
    """

    def step(params, batch):
        potentials = potentials_of(model, params, batch)
        size = batch["label"].shape[1:3]
        decoded = decode_rows(potentials, rows, settings, batch["valid_box"], size)
        labels = {row: decode.frame_labels(found, size) for row, found in decoded.items()}
        valid = decode.grid_mask(batch["valid_box"], size, size)
        confusion = {row: confusions(x, batch["label"], valid, model.num_classes) for row, x in labels.items()}
        confusion, sums = jax.lax.psum((confusion, terms(potentials, batch["label"])), AXIS)
        change = {row: jax.lax.pmax(jnp.max(decoded[row].change, axis=-1), AXIS) for row in rows}
        kept = {row: Row(labels[row], decoded[row].log_marginals) for row in keep}
        more = figures(potentials, batch, decoded) if figures else ()
        return Sums(confusion, sums, change), PerImage(kept, more)

    return step


def decode_rows(potentials, rows, settings, valid_box, size) -> dict[str, decode.Decoded]:
    """`decode.decode` with the relations of each row; and "convs", if the potentials are of such a model."""
    coarse = potentials._replace(refinement_logits=None)
    of = lambda names: dataclasses.replace(settings, weights={name: settings.weights[name] for name in names})
    apart = dict.fromkeys(map(tuple, rows.values()))  # with one relation its row and "all" are the same
    by_relations = {names: decode.decode(coarse, valid_box, size, of(names)) for names in apart}
    decoded = {row: by_relations[tuple(names)] for row, names in rows.items()}
    if potentials.refinement_logits is not None:
        logits = potentials.refinement_logits
        decoded["convs"] = decode.with_refinement_convs(decoded["all"], logits, valid_box, size)
    return decoded
