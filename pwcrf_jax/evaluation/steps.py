"""The evaluation step, per device (see `pwcrf_jax.runtime.parallel`), without jit."""

import dataclasses

import jax
import jax.numpy as jnp

from pwcrf_jax.model import segmenter
from pwcrf_jax.model.counts import confusions
from pwcrf_jax.model.losses import piecewise_terms
from pwcrf_jax.runtime.parallel import AXIS


def make_eval_step(
    model,
    rows,
    crf,
    balance_power=0.0,
    loss_chunk_edges=None,
    marginals_of=None,
    labels_of=(),
    pairwise_balance_power=-1.0,
):
    """Builds step(params, batch) -> sums over all devices.

    rows: {row of the table: names of the relations whose messages count}.
    crf: `mean_field.Settings`, with the weights of all of these by name.
    batch: image, label as in training and valid_size int32 [B, 2].
    A model with refinement convolutions has one row more, "convs": what "all" says, sharpened.
    Returns {"confusion": {row: int32 [1 + bands, K, K], see `confusions`}, "terms": {kind of factor: (sum, count)},
    "change": {row: float32 [num_iterations], the largest change of a marginal in each iteration}}.
    marginals_of: a row; the step then returns (sums, that row's log marginals float32 [B, h, w, K], of "convs" on the
      finer grid and not normalised).
    labels_of: rows; the step then returns (sums, {row: predicted labels uint8 [B, H, W]}). One of both.
    """

    def step(params, batch):
        potentials = model.apply({"params": params}, batch["image"])
        size = batch["label"].shape[1:3]
        mask = segmenter.grid_mask(batch["valid_size"], potentials.unary.shape[1:3], size)
        valid = segmenter.grid_mask(batch["valid_size"], size, size)
        confusion, change, kept, shown = {}, {}, None, {}
        for row, names in rows.items():
            settings = dataclasses.replace(crf, weights={name: crf.weights[name] for name in names})
            log_marginals, info = segmenter.infer(potentials, settings, node_mask=mask)
            labels = jnp.argmax(segmenter.upsample(log_marginals, *size, mask), axis=-1)
            confusion[row] = confusions(labels, batch["label"], valid, model.num_classes)
            shown[row] = labels
            change[row] = jax.lax.pmax(jnp.max(info.change, axis=-1), AXIS)
            kept = log_marginals if row == marginals_of else kept
            if row == "all" and potentials.correction is not None:
                sharp = segmenter.sharpen(log_marginals, potentials.correction, mask)
                fine = segmenter.grid_mask(batch["valid_size"], sharp.shape[1:3], size)
                labels = jnp.argmax(segmenter.upsample(sharp, *size, fine), axis=-1)
                confusion["convs"] = confusions(labels, batch["label"], valid, model.num_classes)
                shown["convs"] = labels
                kept = sharp if marginals_of == "convs" else kept
        terms = piecewise_terms(
            potentials,
            batch["label"],
            balance_power,
            loss_chunk_edges,
            pairwise_balance_power=pairwise_balance_power,
        )
        confusion, terms = jax.lax.psum((confusion, terms), AXIS)
        sums = {"confusion": confusion, "terms": terms, "change": change}
        if labels_of:
            return sums, {row: shown[row].astype(jnp.uint8) for row in labels_of}
        return sums if marginals_of is None else (sums, kept)

    return step
