"""Mean-field inference over a unary and any number of pairwise potentials (Lin et al., CVPR 2016, section 3).

    log Q_i(k) = z_i[k] + sum_relations w_r message_{r,i}[k] - const          (messages: `pwcrf_jax.pairwise.messages`)

The schedule is parallel: all nodes are updated at once from the marginals of the iteration before. That is fast on
wide hardware but it is *not* a descent method: with strong couplings the free energy can rise and labels can flip for
ever. Damping mixes the old log marginals into the new ones; 0.5 converged in every random small graph tried. The
returned change per iteration shows which case one is in.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pwcrf_jax import pairwise


class MeanFieldInfo(NamedTuple):
    """change: float32 [num_iterations, ...batch], the largest |Q_new - Q_old| over nodes and classes."""

    change: jax.Array


def init(unary):
    """Log marginals before any message: the log softmax of the unary scores.

    Args:
      unary: scores z, float [..., K].

    Returns:
      float32, the shape of unary.
    """
    return jax.nn.log_softmax(unary.astype(jnp.float32), axis=-1)


def step(
    log_marginals, unary, potentials, weights=None, damping=0.0, normalize=False, node_mask=None, chunk_edges=None
):
    """One parallel update of all nodes.

        log Q_new = (1 - damping) log_softmax(z + sum_r w_r m_r(Q)) + damping log Q_old, normalised

    Args:
      log_marginals: float32 [..., num_nodes, K] or [..., H, W, K].
      unary: scores z, float, same shape.
      potentials: sequence of `PairwiseTable`, or of `FactoredPairwise` and `GridScores`, one a relation. May be empty:
        then a unary of three axes or more is read as [..., H, W, K].
      weights: sequence or array of one weight a relation; None: 1 (the paper). Piecewise-trained potentials over-count,
        so weights below 1 are worth choosing on held-out data. Differentiable.
      damping: 0 (none) to below 1, the share of the old log marginals.
      normalize: divide each node's messages by their number, relation by relation, so that one weight serves maps and
        boxes of any size; False: plain sums (the paper).
      node_mask: bool [..., num_nodes] or [..., H, W]; false nodes (void, padding) neither send nor receive.
      chunk_edges: of `pairwise.messages`.

    Returns:
      (log_marginals, change): the new state, float32, and the largest |Q_new - Q_old| of each image, float32
      [...batch].

    Raises:
      ValueError: as `run`.
    """
    _check(unary, potentials, 1, weights, damping)
    marginals = jnp.exp(log_marginals)
    total = unary.astype(jnp.float32)
    for i, potential in enumerate(potentials):
        message, count = pairwise.messages(potential, marginals, node_mask, chunk_edges)
        if normalize:
            message = message / jnp.maximum(count, 1.0)[..., None]
        total = total + (1.0 if weights is None else weights[i]) * message
    updated = jax.nn.log_softmax(total, axis=-1)
    updated = jax.nn.log_softmax((1.0 - damping) * updated + damping * log_marginals, axis=-1)
    change = jnp.abs(jnp.exp(updated) - marginals)
    if node_mask is not None:
        change = jnp.where(node_mask[..., None], change, 0.0)
    return updated, jnp.max(change, axis=_image_axes(unary, potentials))


def run(
    unary,
    potentials,
    num_iterations=3,
    weights=None,
    damping=0.0,
    normalize=False,
    node_mask=None,
    route="auto",
    chunk_edges=None,
):
    """Mean field from the unary, `num_iterations` parallel updates with `lax.scan`.

    Args:
      unary: scores z (= -U), float [..., num_nodes, K] for tables or [..., H, W, K] for factored potentials.
      potentials: as in `step`. Tables of graphs and potentials on grids do not mix.
      num_iterations: static, at least 0; the paper uses 3.
      weights, damping, normalize, node_mask, chunk_edges: as in `step`.
      route: how messages of a factored potential are computed, "auto", "folded" or "table"; see
        `pairwise.prepare_messages`. The marginals are the same, time and memory are not.

    Returns:
      (log_marginals, MeanFieldInfo): float32, the shape of unary; changes [num_iterations, ...batch].

    Raises:
      ValueError: mixed encodings, an unknown route, a number of weights other than the number of potentials, damping
        outside [0, 1) where it is a Python number, a negative number of iterations, other classes or another grid in
        a potential than in the unary.

    Examples:
      >>> unary = jnp.array([[0.0, 2.0], [0.0, 0.0]])  # node 0 is for class 1, node 1 undecided
      >>> agree = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])  # one edge, on which equal labels score higher
      >>> table = pw.PairwiseTable(agree, p=jnp.array([0]), q=jnp.array([1]))
      >>> log_marginals, info = pw.mean_field.run(unary, [table])
      >>> [round(p, 2) for p in jnp.exp(log_marginals)[1].tolist()]  # of node 1
      [0.3, 0.7]
      >>> info.change.shape
      (3,)
    """
    potentials = list(potentials)
    _check(unary, potentials, num_iterations, weights, damping)
    if not potentials:
        batch = unary.shape[: len(_image_axes(unary, potentials)) * -1]
        return init(unary), MeanFieldInfo(jnp.zeros((num_iterations, *batch), jnp.float32))

    potentials = [pairwise.prepare_messages(p, num_iterations, route) for p in potentials]

    def body(state, _):
        return step(state, unary, potentials, weights, damping, normalize, node_mask, chunk_edges)

    # Rematerialised: else the scan keeps the hidden units of all edges, as they are the same in each iteration.
    state, change = jax.lax.scan(jax.checkpoint(body), init(unary), None, length=num_iterations)
    return state, MeanFieldInfo(change)


def _image_axes(unary, potentials: Sequence) -> tuple[int, ...]:
    """The axes of one image, nodes and classes."""
    grid = unary.ndim > 2 if not potentials else not isinstance(potentials[0], pairwise.PairwiseTable)
    return (-3, -2, -1) if grid else (-2, -1)


def _check(unary, potentials, num_iterations, weights, damping):
    if len({isinstance(p, pairwise.PairwiseTable) for p in potentials}) > 1:
        raise ValueError("potentials mix PairwiseTable and FactoredPairwise: expand with `pairwise.to_table` first")
    if num_iterations < 0:
        raise ValueError(f"num_iterations must be at least 0, got {num_iterations}")
    if weights is not None and len(weights) != len(potentials):
        raise ValueError(f"expected {len(potentials)} weights, one a potential, got {len(weights)}")
    if isinstance(damping, (int, float)) and not 0 <= damping < 1:
        raise ValueError(f"damping must lie in [0, 1), got {damping}")
    for p in potentials:
        if p.num_classes != unary.shape[-1]:
            raise ValueError(f"unary scores have {unary.shape[-1]} classes, a potential has {p.num_classes}")
        if not isinstance(p, pairwise.PairwiseTable) and p.grid != unary.shape[-3:-1]:
            raise ValueError(f"unary grid is {unary.shape[-3:-1]}, a potential's is {p.grid}")
