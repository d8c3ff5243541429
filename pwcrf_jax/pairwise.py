"""Pairwise potentials: scores z_pq[k, l] of the ordered label pair (y_p = k, y_q = l) on every edge.

Two encodings of one meaning:

* `PairwiseTable`: the scores themselves, one K x K table per edge, on any graph.
* `FactoredPairwise`: the last two layers of the Pairwise-Net on a grid, never expanded into tables. The first layer
  is linear in [x_p ; x_q], so W1 [x_p ; x_q] + b1 = A_p + B_q with A and B computed once per *node*, and

      z_pq[k, l] = b2[k, l] + sum_m relu(A_p + B_q)[m] W2[m, k, l]   (+ evidence_p[k] + evidence_q[l], see below).

  All work walks the offsets of the relation's box with one rematerialised `lax.scan`, so that training keeps the
  scores of one offset at a time: memory does not grow with the size of the box.

The paper's energies are V = -z (section 3). z is not symmetric: z_pq[k, l] is not z_qp[l, k].

Two parameterisations of the scores. *free*: the net alone, as in the paper. *residual*: `evidence` holds
log P_U(y | x), the unary's log-softmax with its gradient stopped, and is added for both ends; the net then models what
the unary cannot know. The evidence counts in the likelihood but sends no messages: what node i would receive with it
is its own evidence once per neighbour (that of the neighbour is a constant, sum_l e_q[l] Q_q(l)), and mean field has
node i's unary already.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import relations


class PairwiseTable(NamedTuple):
    """Scores per edge of any graph.

    Attributes:
      scores: float [..., num_edges, K, K], the net's part z_pq; second-to-last axis is the label of p, last that of q.
      p, q: int [num_edges], node indices of both ends.
      evidence: float [..., num_nodes, K] or None, see the module docstring.
    """

    scores: jax.Array
    p: jax.Array
    q: jax.Array
    evidence: jax.Array | None = None


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class FactoredPairwise:
    """The factored form on an H x W grid.

    Attributes:
      a: float [..., H, W, M], the first layer's part of p, bias included.
      b: float [..., H, W, M], the first layer's part of q.
      w2: float [M, K, K], the last layer.
      b2: float [K, K].
      evidence: float [..., H, W, K] or None, see the module docstring.
      offsets: static tuple of (row, column) pairs, q - p, from `pwcrf_jax.relations.offsets`; make the potential with
        `factored_pairwise`, which takes any array of them.
    """

    a: jax.Array
    b: jax.Array
    w2: jax.Array
    b2: jax.Array
    evidence: jax.Array | None
    offsets: tuple[tuple[int, int], ...] = dataclasses.field(metadata=dict(static=True))


def factored_pairwise(a, b, w2, b2, offsets, evidence=None) -> FactoredPairwise:
    """Checks shapes and builds a `FactoredPairwise`; arguments are its attributes, offsets any int [num_offsets, 2].

    Raises:
      ValueError: shapes that do not belong together, with expected and got.
    """
    if a.shape != b.shape or a.ndim < 3:
        raise ValueError(f"expected a and b of one shape [..., H, W, M], got {a.shape} and {b.shape}")
    num_classes = b2.shape[-1]
    if w2.shape != (a.shape[-1], num_classes, num_classes) or b2.shape != (num_classes, num_classes):
        raise ValueError(f"expected w2 [M, K, K] and b2 [K, K] with M = {a.shape[-1]}, got {w2.shape} and {b2.shape}")
    if evidence is not None and evidence.shape != (*a.shape[:-1], num_classes):
        raise ValueError(f"expected evidence {(*a.shape[:-1], num_classes)}, got {evidence.shape}")
    box = np.asarray(offsets)
    if box.ndim != 2 or box.shape[1] != 2 or not np.issubdtype(box.dtype, np.integer):
        raise ValueError(f"expected integer offsets [num_offsets, 2], got {box.dtype} {box.shape}")
    return FactoredPairwise(a, b, w2, b2, evidence, tuple((int(r), int(c)) for r, c in box))


def to_table(potential: FactoredPairwise) -> PairwiseTable:
    """Expands the factored form into a table, edges ordered as `relations.edge_list` (by offset, then by p).

    Memory grows with num_edges * (M + K^2): for small graphs, oracles and inspection.
    """
    a, b = potential.a, potential.b
    height, width = a.shape[-3:-1]
    box = np.array(potential.offsets, np.int32).reshape(-1, 2)
    which, row, col = np.nonzero(relations.validity_mask(box, height, width))
    p = row * width + col
    q = (row + box[which, 0]) * width + col + box[which, 1]
    nodes = lambda x: x.reshape(*x.shape[:-3], height * width, x.shape[-1])
    hidden = jax.nn.relu(nodes(a)[..., p, :] + nodes(b)[..., q, :])
    return PairwiseTable(
        scores=_last_layer(hidden, potential.w2, potential.b2),
        p=jnp.asarray(p, jnp.int32),
        q=jnp.asarray(q, jnp.int32),
        evidence=None if potential.evidence is None else nodes(potential.evidence),
    )


def _last_layer(hidden, w2, b2):
    """[..., M] -> float32 [..., K, K]; products in the dtype of `hidden`, sums in float32."""
    m, k, _ = w2.shape
    flat = jnp.matmul(hidden, w2.reshape(m, k * k).astype(hidden.dtype), preferred_element_type=jnp.float32)
    return flat.reshape(*hidden.shape[:-1], k, k) + b2.astype(jnp.float32)


class _Shift:
    """Reads node arrays at q = p + offset for an offset that is traced: one zero border, then a dynamic slice."""

    def __init__(self, offsets, height: int, width: int):
        self.offsets = np.array(offsets, np.int32).reshape(-1, 2)
        self.pad = tuple(int(np.abs(self.offsets[:, i]).max(initial=0)) for i in (0, 1))
        self.size = (height, width)

    def border(self, x, fill=0):
        """x [..., H, W, C] with a border wide enough for every offset in both directions."""
        (r, c), lead = self.pad, [(0, 0)] * (x.ndim - 3)
        return jnp.pad(x, [*lead, (r, r), (c, c), (0, 0)], constant_values=fill)

    def _start(self, lead, offset):
        # One integer type for all: a plain 0 is int64 under jax_enable_x64, the offset int32.
        zero = jnp.int32(0)
        return [zero] * lead + [self.pad[0] + offset[0], self.pad[1] + offset[1], zero]

    def at(self, bordered, offset):
        """The value at p + offset for every p: [..., H, W, C]."""
        lead = bordered.ndim - 3
        start = self._start(lead, offset)
        return jax.lax.dynamic_slice(bordered, start, (*bordered.shape[:lead], *self.size, bordered.shape[-1]))

    def add_at(self, bordered, x, offset):
        """Adds x [..., H, W, C], given per p, to the cells p + offset."""
        lead = bordered.ndim - 3
        start = self._start(lead, offset)
        here = jax.lax.dynamic_slice(bordered, start, x.shape)
        return jax.lax.dynamic_update_slice(bordered, here + x, start)

    def crop(self, bordered):
        (r, c), (h, w) = self.pad, self.size
        return bordered[..., r : r + h, c : c + w, :]

    def scan(self, body, carry):
        """Walks the offsets; each step is rematerialised, so the backward pass stores carries only."""
        if not len(self.offsets):
            return carry
        step = jax.checkpoint(lambda state, offset: (body(state, offset), None))
        return jax.lax.scan(step, carry, jnp.asarray(self.offsets))[0]


def edge_log_likelihood(potential, labels, node_mask=None, node_weights=None):
    """Sum and count of log P_V(y_p, y_q | x) over the edges of one relation (Lin et al., CVPR 2016, section 4).

        log P_V(y_p, y_q | x) = s_pq[y_p, y_q] - log sum_{k,l} exp s_pq[k, l],   s = z + evidence_p + evidence_q.

    Args:
      potential: `PairwiseTable` or `FactoredPairwise`; leading batch axes allowed in both.
      labels: int, [..., num_nodes] or [..., H, W]; only read where node_mask is true, any value elsewhere.
      node_mask: bool, same shape; false for void and padded nodes. An edge counts only if both its ends do. None: all.
      node_weights: float, same shape: class balancing. An edge weighs w_p w_q. None: 1.

    Returns:
      (sum, count), float32 scalars: the weighted sum of log-likelihoods over batch and edges, and the sum of weights.

    Differentiable in the potential; the sum over a factored potential stores no scores (module docstring).
    """
    num_classes = potential.b2.shape[-1] if isinstance(potential, FactoredPairwise) else potential.scores.shape[-1]
    weight = jnp.ones(labels.shape, jnp.float32) if node_weights is None else node_weights.astype(jnp.float32)
    if node_mask is not None:
        weight = jnp.where(node_mask, weight, 0.0)
    labels = jnp.clip(labels.astype(jnp.int32), 0, num_classes - 1)
    if isinstance(potential, FactoredPairwise):
        return _factored_log_likelihood(potential, labels, weight)
    p, q = potential.p, potential.q
    scores = potential.scores.astype(jnp.float32)
    if potential.evidence is not None:
        evidence = potential.evidence.astype(jnp.float32)
        scores = scores + evidence[..., p, :, None] + evidence[..., q, None, :]
    value = _pick_log_prob(scores, labels[..., p], labels[..., q])
    edge_weight = weight[..., p] * weight[..., q]
    return jnp.sum(edge_weight * value), jnp.sum(jnp.broadcast_to(edge_weight, value.shape))


def _pick_log_prob(scores, label_p, label_q):
    """log softmax over all K^2 pairs, read at (label_p, label_q); scores [..., K, K] -> [...]."""
    k = scores.shape[-1]
    flat = scores.reshape(*scores.shape[:-2], k * k)
    index = (label_p * k + label_q)[..., None]
    index = jnp.broadcast_to(index, (*flat.shape[:-1], 1))
    return jnp.take_along_axis(flat, index, axis=-1)[..., 0] - jax.nn.logsumexp(flat, axis=-1)


def _factored_log_likelihood(potential, labels, weight):
    shift = _Shift(potential.offsets, *potential.a.shape[-3:-1])
    b = shift.border(potential.b)
    label_q, weight_q = shift.border(labels[..., None]), shift.border(weight[..., None])
    evidence = None if potential.evidence is None else potential.evidence.astype(jnp.float32)
    evidence_q = None if evidence is None else shift.border(evidence)

    def body(carry, offset):
        total, count = carry
        scores = _last_layer(jax.nn.relu(potential.a + shift.at(b, offset)), potential.w2, potential.b2)
        if evidence is not None:
            scores = scores + evidence[..., :, None] + shift.at(evidence_q, offset)[..., None, :]
        # The border's weight is 0: edges that leave the map count for nothing.
        edge_weight = weight * shift.at(weight_q, offset)[..., 0]
        value = _pick_log_prob(scores, labels, shift.at(label_q, offset)[..., 0])
        edge_weight = jnp.broadcast_to(edge_weight, value.shape)
        return total + jnp.sum(edge_weight * value), count + jnp.sum(edge_weight)

    return shift.scan(body, (jnp.float32(0), jnp.float32(0)))


def messages(potential, marginals, node_mask=None):
    """Mean-field messages of one relation to every node, as p and as q (method: Lin et al., CVPR 2016, section 3).

        message_i[k] = sum_{(p,q): p=i} sum_l z_pq[k, l] Q_q(l)  +  sum_{(p,q): q=i} sum_l z_pq[l, k] Q_p(l)

    Only the net's part z sends messages, never the evidence (module docstring).

    Args:
      potential: `PairwiseTable` or `FactoredPairwise`.
      marginals: float [..., num_nodes, K] or [..., H, W, K], Q.
      node_mask: bool [..., num_nodes] or [..., H, W]; a false node neither sends nor receives. None: all.

    Returns:
      (message, num_messages): float32, the shape of marginals; and the number of messages summed in each node,
      [..., num_nodes] or [..., H, W] (without batch axes where there is no mask).
    """
    marginals = marginals.astype(jnp.float32)
    grid = isinstance(potential, FactoredPairwise)
    node_shape = marginals.shape[-3:-1] if grid else marginals.shape[-2:-1]
    mask = jnp.ones(node_shape, jnp.float32) if node_mask is None else node_mask.astype(jnp.float32)
    sent = marginals * mask[..., None]  # a masked node sends nothing
    message, count = (_factored_messages if grid else _table_messages)(potential, sent, mask)
    return message * mask[..., None], count * mask


def _table_messages(potential, sent, mask):
    p, q = potential.p, potential.q
    scores = potential.scores.astype(jnp.float32)
    to_p = jnp.einsum("...ekl,...el->...ek", scores, sent[..., q, :])
    to_q = jnp.einsum("...ekl,...ek->...el", scores, sent[..., p, :])
    message = jnp.zeros(to_p.shape[:-2] + sent.shape[-2:], jnp.float32)
    message = message.at[..., p, :].add(to_p).at[..., q, :].add(to_q)
    count = jnp.zeros_like(mask).at[..., p].add(mask[..., q]).at[..., q].add(mask[..., p])
    return message, count


def _factored_messages(potential, sent, mask):
    shift = _Shift(potential.offsets, *potential.a.shape[-3:-1])
    b, sent_q, mask_q = shift.border(potential.b), shift.border(sent), shift.border(mask[..., None])

    def body(carry, offset):
        to_p, count_p, to_q, count_q = carry
        scores = _last_layer(jax.nn.relu(potential.a + shift.at(b, offset)), potential.w2, potential.b2)
        to_p = to_p + jnp.einsum("...kl,...l->...k", scores, shift.at(sent_q, offset))
        count_p = count_p + shift.at(mask_q, offset)
        # What p says to q lands in q's cell; beyond the map it lands in the border and is cropped away.
        to_q = shift.add_at(to_q, jnp.einsum("...kl,...k->...l", scores, sent), offset)
        count_q = shift.add_at(count_q, mask[..., None], offset)
        return to_p, count_p, to_q, count_q

    shape = jnp.broadcast_shapes(potential.a.shape[:-1], sent.shape[:-1]) + sent.shape[-1:]
    zeros, zero_count = jnp.zeros(shape, jnp.float32), jnp.zeros_like(mask)[..., None]
    carry = (zeros, zero_count, shift.border(zeros), shift.border(zero_count))
    to_p, count_p, to_q, count_q = shift.scan(body, carry)
    return to_p + shift.crop(to_q), (count_p + shift.crop(count_q))[..., 0]
