"""Figures of each image that a report shows, computed beside the evaluation's sums, and the last messages."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import inputs, mean_field, piecewise
from pwcrf_jax.messages import compute_messages
from pwcrf_jax.model import decode
from pwcrf_jax.potentials import factored_pairwise


class Pixels(NamedTuple):
    """One stage's answer at the pixels of an image, [H, W].

    labels: uint8. confidence: float32, the best probability. entropy: float32, as a share of log K.
    """

    labels: np.ndarray
    confidence: np.ndarray
    entropy: np.ndarray


def pixels_of(log_probs: np.ndarray) -> Pixels:
    """`Pixels` of log-probabilities float32 [H, W, K], in NumPy."""
    probs = np.exp(log_probs)
    entropy = -(probs * np.where(probs > 0, log_probs, 0)).sum(-1) / np.log(max(2, probs.shape[-1]))
    return Pixels(log_probs.argmax(-1).astype(np.uint8), probs.max(-1), entropy)


def make_figures(rows, names):
    """Builds figures(potentials, batch, decoded) of each image, for `evaluation.steps.make_eval_step`.

    rows: of the table, whose pixels are looked at. names: of the relations whose messages are.
    """

    def figures(potentials, batch, decoded):
        size, grid = batch["label"].shape[1:3], potentials.unary.shape[1:3]
        mask = decode.grid_mask(batch["valid_box"], grid, size)
        pairs = {name: potentials.pairwise[name] for name in names}
        scores = {row: decode.upsample(decoded[row].log_marginals, size, decoded[row].mask) for row in rows}
        return dict(
            pixels={row: _pixels(x) for row, x in scores.items()},
            hidden={name: _sum_of_hidden(pair, mask) for name, pair in pairs.items()},
            nodes=(potentials.unary, {name: (pair.hidden_p, pair.hidden_q) for name, pair in pairs.items()}, mask),
            truth=piecewise.grid_labels(batch["label"], *grid),
        )

    return figures


def _pixels(scores):
    """`Pixels` of scores [..., K] that are the log-probabilities up to a constant."""
    log_probs = jax.nn.log_softmax(scores, axis=-1)
    probs = jnp.exp(log_probs)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1) / np.log(max(2, scores.shape[-1]))
    return Pixels(jnp.argmax(scores, axis=-1).astype(jnp.uint8), jnp.max(probs, axis=-1), entropy)


def _sum_of_hidden(potential, mask):
    """Over the edges of each image, both ends in the mask: (sum of the hidden units float32 [B, M], number int32 [B]).

    The last layer is linear, so the mean score of the edges is that of the mean hidden units: no scores are formed.
    """
    box = np.array(potential.offsets, np.int32)
    reach = np.abs(box).max(axis=0)
    border = lambda x: jnp.pad(x, [(0, 0), *((n, n) for n in reach), *[(0, 0)] * (x.ndim - 3)])
    at_q, ends = border(potential.hidden_q), border(mask)

    def body(carry, start):
        total, count = carry
        here = lambda x, like: jax.lax.dynamic_slice(x, [jnp.int32(0), *start, jnp.int32(0)][: x.ndim], like.shape)
        both = mask & here(ends, mask)
        hidden = jax.nn.relu(potential.hidden_p + here(at_q, potential.hidden_p)).astype(jnp.float32)
        total = total + jnp.sum(jnp.where(both[..., None], hidden, 0.0), axis=(1, 2))
        return (total, count + jnp.sum(both, axis=(1, 2), dtype=jnp.int32)), None

    empty = jnp.zeros((at_q.shape[0], at_q.shape[-1]), jnp.float32), jnp.zeros(at_q.shape[0], jnp.int32)
    return jax.lax.scan(body, empty, jnp.asarray(box + reach, jnp.int32))[0]


def last_update(unary, parts, mask, last_layers, boxes, crf):
    """The last update of mean field on one image [h, w]: (log marginals before it, after it, {relation: what is added
    to the scores}, {relation: number of messages of each cell}).
    """
    unary, mask = unary[None], mask[None]
    if not crf.num_iterations or not crf.weights:
        alone = mean_field.init(mean_field.tempered(unary, crf)[0])[0]
        return alone, alone, {}, {}
    chosen = {n: factored_pairwise(*(x[None] for x in parts[n]), *last_layers[n], boxes[n]) for n in crf.weights}
    earlier = dataclasses.replace(crf, num_iterations=crf.num_iterations - 1)
    before, _ = mean_field.run(unary, chosen, earlier, node_mask=mask)
    after, _ = mean_field.step(before, unary, chosen, crf, node_mask=mask)
    added, counts = {}, {}
    potentials, weights = inputs.relations(chosen, crf.weights)
    for name, potential, weight in zip(chosen, potentials, weights, strict=True):
        message, count = compute_messages(potential, jnp.exp(before), node_mask=mask, chunk_edges=crf.chunk_edges)
        message = message / jnp.maximum(count, 1.0)[..., None] if crf.average_messages else message
        added[name], counts[name] = weight * message[0], count[0]
    return before[0], after[0], added, counts
