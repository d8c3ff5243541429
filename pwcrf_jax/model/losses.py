"""Objectives of training: potentials and labels in, (sum, count) of log-likelihoods out."""

import jax
import jax.numpy as jnp

from pwcrf_jax import objectives, piecewise
from pwcrf_jax.likelihood import sample_offsets
from pwcrf_jax.model import segmenter

OBJECTIVES = (
    "piecewise",
    "piecewise_staged",
    "pseudo_likelihood",
    "unrolled_mean_field",
    "unrolled_mean_field_staged",
)
STAGED = "_staged"  # how the names of objectives end that train the unary first, then what stands on it


def piecewise_terms(
    potentials, labels, balance_power=0.0, chunk_edges=None, sampled_offsets=0, key=None, pairwise_balance_power=-1.0
):
    """(sum, count) of the log-likelihood of every kind of factor: {"unary": ..., relation name: ...}.

    And of "refinement_convs", of models that have them: of the unary's own marginals, sharpened, at the cells of the
    finer grid. No inference runs for them either.

    labels: int [B, H, W] of the image; read at the centres of the grid's cells.
    balance_power: of `pwcrf_jax.piecewise.balance_weights`, 0 for none; pairwise_balance_power: that of the relations,
      -1: the same.
    sampled_offsets: of each relation, drawn with `key`; 0, or as many as there are: all.
    """
    grid = piecewise.grid_labels(labels, *potentials.unary.shape[1:3])
    balance = lambda grid, power: piecewise.balance_weights(grid, num_classes, power=power) if power else None
    num_classes = potentials.unary.shape[-1]
    weights = balance(grid, balance_power)
    terms = {"unary": piecewise.unary_log_likelihood(potentials.unary, grid, node_weights=weights)}
    if pairwise_balance_power >= 0:
        weights = balance(grid, pairwise_balance_power)
    for i, (name, potential) in enumerate(potentials.pairwise.items()):
        sample = None
        if 0 < sampled_offsets < len(potential.offsets):
            sample = sample_offsets(jax.random.fold_in(key, i), len(potential.offsets), sampled_offsets)
        terms[name] = piecewise.pairwise_log_likelihood(
            potential, grid, node_weights=weights, chunk_edges=chunk_edges, sample=sample
        )
    if potentials.correction is not None:
        log_marginals = jax.lax.stop_gradient(jax.nn.log_softmax(potentials.unary, axis=-1))
        scores = segmenter.sharpen(log_marginals, potentials.correction)
        fine = piecewise.grid_labels(labels, *scores.shape[1:3])
        weights = balance(fine, balance_power)
        terms["refinement_convs"] = piecewise.unary_log_likelihood(scores, fine, node_weights=weights)
    return terms


def joint_term(potentials, labels, name, crf, balance_power=0.0, inside=None):
    """(sum, count) of one of the objectives of `pwcrf_jax.objectives`, with the settings that inference would have.

    name: "pseudo_likelihood" or "unrolled_mean_field". crf: `mean_field.Settings`, with the weights of the relations
      that take part, by name. Others as in `piecewise_terms`.
    inside: int [B, 4], top, left, bottom and right of the image in its crop: cells beyond it are padding; None: all is
      image.
    """
    unary = potentials.unary
    grid = piecewise.grid_labels(labels, *unary.shape[1:3])
    chosen = {name: potentials.pairwise[name] for name in crf.weights}
    node_weights = piecewise.balance_weights(grid, unary.shape[-1], power=balance_power) if balance_power else None
    if name == "pseudo_likelihood":
        return objectives.pseudo_log_likelihood(unary, chosen, grid, crf, node_weights=node_weights)
    mask = None if inside is None else _cells_inside(inside, unary.shape[1:3], labels.shape[1:3])
    return objectives.unrolled_log_likelihood(unary, chosen, grid, crf, node_mask=mask, node_weights=node_weights)


def _cells_inside(inside, grid, size):
    """bool [B, h, w]: cells whose centre lies in the box inside [B, 4] of a crop of a size."""
    axes = []
    for axis in (0, 1):
        centres = (jnp.arange(grid[axis]) + 0.5) * (size[axis] / grid[axis])
        axes.append((centres >= inside[:, axis, None]) & (centres < inside[:, 2 + axis, None]))
    return axes[0][:, :, None] & axes[1][:, None, :]


def objective(terms, num_images, weights, reduction="mean"):
    """Negative log-likelihood of one device's terms, counts already summed over the devices.

    weights: {term: weight}; terms that it does not name are there to be watched.
    mean: each kind of factor by its own count. sum: all factors, by the number of images. The sum over devices of
    this is the loss, and so the sum of its gradients is the gradient.
    """
    loss = 0.0
    for name, weight in weights.items():
        total, count = terms[name]
        loss -= weight * total / (jnp.maximum(count, 1.0) if reduction == "mean" else num_images)
    return loss


KINDS = ("unary", "pairwise")  # of factors; with the second go the refinement convolutions
