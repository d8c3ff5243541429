"""The likelihood of edges, log P_V(y_p, y_q | x), of tables and of factored potentials.

Those of factored potentials are walked in chunks by `pwcrf_jax.edge_likelihood`; equations in docs/math.md, "Full
range".
"""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pwcrf_jax import relations
from pwcrf_jax.arrays import as_array, as_mask, compiled, level, of_arrays
from pwcrf_jax.edge_likelihood import Differentiable, sum_over_edges
from pwcrf_jax.inputs import check_chunk_edges
from pwcrf_jax.labels import VOID, checked, split
from pwcrf_jax.potentials import FactoredPairwise, GridScores, PairwiseTable, Potential, sum_over_neighbours

Sums = tuple[jax.Array, jax.Array]
"""(sum, count): float32 scalars, a weighted sum of log-likelihoods and the sum of the weights."""


def sample_offsets(key: jax.Array, num_offsets: int, num_sampled: int) -> jax.Array:
    """A uniform random subset of a relation's offsets, for `pairwise_log_likelihood`.

    Args:
      key: a JAX random key.
      num_offsets: of the relation, `len(potential.offsets)`.
      num_sampled: size of the subset, static, 1 .. num_offsets.

    Returns:
      int32 [num_sampled], positions in `potential.offsets`, all different.

    Raises:
      ValueError: a size outside 1 .. num_offsets.
    """
    if not 1 <= num_sampled <= num_offsets:
        raise ValueError(f"cannot sample {num_sampled} of {num_offsets} offsets without repeating one")
    return jax.random.choice(key, num_offsets, (num_sampled,), replace=False).astype(jnp.int32)


def pairwise_log_likelihood(
    potential: Potential,
    labels: ArrayLike,
    *,
    void: int | None = VOID,
    node_mask: ArrayLike | None = None,
    node_weights: ArrayLike | None = None,
    chunk_edges: int | None = None,
    sample: ArrayLike | None = None,
) -> Sums:
    """Sum and count of log P_V(y_p, y_q | x) over the edges of one relation (Lin et al., CVPR 2016, section 4).

        log P_V(y_p, y_q | x) = s_pq[y_p, y_q] - log sum_{k,l} exp s_pq[k, l],
        s_pq[k, l] = z_pq[k, l] + e_p[k] + e_q[l],   e: the potential's `unary_log_probs`, or 0.

    An edge weighs w_p w_q: a softmax trained with class weights w models w(k) P(k), so only with the product do the
    weighted pair and the two weighted unaries agree where there is no interaction; with any other weight each message
    would carry a prior for or against rare classes.

    Args:
      potential: `PairwiseTable` or `FactoredPairwise`; leading batch axes allowed in both.
      labels: int, [..., num_nodes] for a table, [..., H, W] for a factored potential, 0..K-1 or `void`; only read where
        node_mask is true, any value elsewhere. Other values are refused where they can be seen; under `jit` they are as
        void.
      void: the label of nodes that count for nothing, static and outside 0..K-1, or None; an edge with a void end
        counts for nothing.
      node_mask: bool, same shape; false for void and padded nodes. An edge counts only if both its ends do. None: all.
      node_weights: float, same shape, or None (1): class balancing, from `pwcrf_jax.balance_weights`.
      chunk_edges: static int; a factored potential holds the scores of about so many edges at a time, in whole rows of
        the map. None: chosen from the shapes (`pwcrf_jax.costs.default_chunk_edges`). The value does not depend on it.
      sample: int [n], positions in the offsets of a factored potential (0 .. num_offsets - 1, the caller sees to that),
        from `sample_offsets`; may be traced. The sum is then over those offsets, scaled by num_offsets / n: over random
        samples its expectation, and that of its gradient, are those of the full sum. The count is always that of the
        full sum.

    Returns:
      (sum, count), float32 scalars: the weighted sum of log-likelihoods over batch and edges, and the sum of weights.

    Differentiable in the potential and the weights, in reverse mode and any number of times; a factored potential makes
    the gradient in the same pass as the sum, chunk by chunk, so that no scores are kept or formed twice.

    Raises:
      ValueError: labels that are not integers, not of the shape of the nodes, or neither class nor void; chunk_edges
        below 1; a sample for a table, or an empty one.
      TypeError: `GridScores`, which do not hold what the likelihood needs.

    Examples:
      >>> chain = pw.PairwiseTable(jnp.zeros((2, 3, 3)), p=jnp.array([0, 1]), q=jnp.array([1, 2]))
      >>> total, count = pw.pairwise_log_likelihood(chain, jnp.array([0, 2, 255]))
      >>> round(float(total), 3), float(count)  # log 1/9; the second edge has a void end
      (-2.197, 1.0)
    """
    if isinstance(potential, GridScores):
        raise TypeError("GridScores are for messages: give the FactoredPairwise that they were made from")
    check_chunk_edges(chunk_edges)
    factored = isinstance(potential, FactoredPairwise)
    if sample is not None and not factored:
        raise ValueError("offsets can be sampled on a grid alone: give a FactoredPairwise, or a table of fewer edges")
    chosen = None if sample is None else as_array(sample)
    if chosen is not None and (chosen.ndim != 1 or not chosen.size):
        raise ValueError(f"expected a sample of shape [n], n at least 1, got {chosen.shape}")
    mask, weights = as_mask(node_mask), None if node_weights is None else as_array(node_weights)
    if isinstance(potential, PairwiseTable):
        potential = of_arrays(potential)
    labels = checked(labels, potential.num_classes, void, mask=mask)
    _check_nodes(potential, labels)
    if isinstance(potential, PairwiseTable):
        return _table_sums(potential, labels, mask, weights)
    return _factored_sums(potential, labels, mask, weights, chosen, chunk_edges=chunk_edges)


def _check_nodes(potential: PairwiseTable | FactoredPairwise, labels: jax.Array) -> None:
    """ValueError: labels of other nodes; a table without unary_log_probs does not know its own."""
    nodes: tuple[int, ...] = potential.grid if isinstance(potential, FactoredPairwise) else ()
    if not nodes and potential.unary_log_probs is not None:
        nodes = potential.unary_log_probs.shape[-2:-1]
    if nodes and labels.shape[-len(nodes) :] != nodes:
        raise ValueError(f"expected labels of shape {('...', *nodes)}, one a node, got {labels.shape}")


def _weighed(
    labels: jax.Array, num_classes: int, node_mask: jax.Array | None, node_weights: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(labels without void, mask, weights): bool and float32 of the shape of the nodes, 0 where masked or void."""
    labels, mask = split(labels, num_classes)
    if node_mask is not None:
        mask = operator.and_(*level(mask, node_mask))
    weight = jnp.ones((), jnp.float32) if node_weights is None else node_weights.astype(jnp.float32)
    return labels, mask, jnp.where(*level(mask, weight), 0.0)


@compiled()
def _table_sums(
    potential: PairwiseTable, labels: jax.Array, node_mask: jax.Array | None, node_weights: jax.Array | None
) -> Sums:
    p, q, num_classes = potential.p, potential.q, potential.num_classes
    labels, mask, weight = _weighed(labels, num_classes, node_mask, node_weights)
    scores, unary = potential.scores.astype(jnp.float32), jnp.zeros((1, 1))
    if potential.unary_log_probs is not None:
        unary = potential.unary_log_probs.astype(jnp.float32)
    batch = jnp.broadcast_shapes(scores.shape[:-3], unary.shape[:-2], weight.shape[:-1])
    whole = lambda x, own: jnp.broadcast_to(x, (*batch, *x.shape[x.ndim - own :]))
    scores, labels, mask, weight = whole(scores, 3), whole(labels, 1), whole(mask, 1), whole(weight, 1)
    if potential.unary_log_probs is not None:
        unary = whole(unary, 2)
        scores = scores + unary[..., p, :, None] + unary[..., q, None, :]
    scores = jnp.where((mask[..., p] & mask[..., q])[..., None, None], scores, 0.0)
    flat = scores.reshape(*scores.shape[:-2], num_classes**2)
    index = (labels[..., p] * num_classes + labels[..., q])[..., None]
    value = jnp.take_along_axis(flat, index, axis=-1)[..., 0] - jax.nn.logsumexp(flat, axis=-1)
    edge_weight = weight[..., p] * weight[..., q]
    return jnp.sum(edge_weight * value), jnp.sum(edge_weight)


@compiled()
def _factored_sums(
    potential: FactoredPairwise,
    labels: jax.Array,
    node_mask: jax.Array | None,
    node_weights: jax.Array | None,
    sample: jax.Array | None,
    *,
    chunk_edges: int | None,
) -> Sums:
    """Flattens the batch, and adds the count, for which no scores are needed."""
    labels, mask, weight = _weighed(labels, potential.num_classes, node_mask, node_weights)
    height, width = potential.grid
    lead, unary = potential.hidden_p.shape[:-3], potential.unary_log_probs
    exist = relations.validity_mask(np.array(potential.offsets).reshape(-1, 2), height, width)
    if not exist.any() or 0 in potential.hidden_p.shape:
        return jnp.float32(0), jnp.float32(0)
    grids = lambda x, *tail: jnp.broadcast_to(x, (*lead, *x.shape[-2 - len(tail) :])).reshape(-1, height, width, *tail)
    dtype = jnp.result_type(potential.hidden_p, potential.hidden_q)
    hidden = lambda x: jnp.asarray(x, dtype).reshape(-1, height, width, x.shape[-1])
    labels, mask, weight = grids(labels), grids(mask), grids(weight)
    count = jnp.sum(weight * sum_over_neighbours(weight, potential.offsets)[0])
    arrays = Differentiable(
        hidden_p=hidden(potential.hidden_p),
        hidden_q=hidden(potential.hidden_q),
        kernel=potential.kernel,
        bias=potential.bias,
        unary_log_probs=None if unary is None else grids(unary, potential.num_classes),
        weight=weight,
    )
    return sum_over_edges(arrays, labels, mask, potential.offsets, sample, chunk_edges), count
