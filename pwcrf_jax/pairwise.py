"""Pairwise potentials: scores z_pq[k, l] of the ordered label pair (y_p = k, y_q = l) on every edge.

Two encodings of one meaning:

* `PairwiseTable`: the scores themselves, one K x K table per edge, on any graph.
* `FactoredPairwise`: the last two layers of the Pairwise-Net on a grid, not expanded into tables.

The first layer is linear in [x_p ; x_q], so W1 [x_p ; x_q] + b1 = A_p + B_q with A and B computed once per *node*, and

    z_pq[k, l] = b2[k, l] + sum_m relu(A_p + B_q)[m] W2[m, k, l]   (+ evidence_p[k] + evidence_q[l], see below).

Memory of the factored form does not grow with the size of the box (docs/math.md, "Full range"):

* the likelihood walks the edges in chunks, and its gradient is made in the same pass (`edge_log_likelihood`);
* a message needs sum_l z_pq[k, l] Q_q(l) only, so Q is folded into the last layer first (`messages`), unless
  `prepare_messages` finds it cheaper to store the scores (`GridScores`, for inference alone).

The paper's energies are V = -z (section 3). z is not symmetric: z_pq[k, l] is not z_qp[l, k].

Two parameterisations of the scores. *free*: the net alone, as in the paper. *residual*: `evidence` holds
log P_U(y | x), the unary's log-softmax with its gradient stopped, and is added for both ends; the net then models what
the unary cannot know. The evidence counts in the likelihood but sends no messages: what node i would receive with it
is its own evidence once per neighbour (that of the neighbour is a constant, sum_l e_q[l] Q_q(l)), and mean field has
node i's unary already.
"""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import costs, relations
from pwcrf_jax.arrays import as_array, batch_spec, compiled, einsum, level, matmul, of_arrays
from pwcrf_jax.edge_likelihood import sum_over_edges
from pwcrf_jax.labels import checked, split

RULED_OUT = -1e9
"""What a pair score of -inf counts as where it is multiplied: with a marginal of 0 it then makes 0, not NaN."""

ROUTES = ("auto", "folded", "table")
"""How messages can be computed; see `prepare_messages`."""


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

    @property
    def num_classes(self) -> int:
        """K."""
        return self.scores.shape[-1]


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

    @property
    def num_classes(self) -> int:
        """K."""
        return self.b2.shape[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W)."""
        return self.a.shape[-3:-1]


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class GridScores:
    """A factored potential whose scores are stored, for inference alone; made by `prepare_messages`.

    Attributes:
      scores: float32 [..., num_offsets, H, W, K, K], z of the edge from each node p to p + offset.
      offsets: as in `FactoredPairwise`.
    """

    scores: jax.Array
    offsets: tuple[tuple[int, int], ...] = dataclasses.field(metadata=dict(static=True))

    @property
    def num_classes(self) -> int:
        """K."""
        return self.scores.shape[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W)."""
        return self.scores.shape[-4:-2]


def factored_pairwise(a, b, w2, b2, offsets, evidence=None) -> FactoredPairwise:
    """Checks shapes and builds a `FactoredPairwise`.

    Args:
      a, b: float [..., H, W, M], the first layer's parts of p and of q.
      w2: float [M, K, K], the last layer.
      b2: float [K, K].
      offsets: int [num_offsets, 2], (row, column) of q - p, from `pwcrf_jax.relations.offsets`; static.
      evidence: float [..., H, W, K] or None.

    Returns:
      `FactoredPairwise`.

    Raises:
      ValueError: shapes that do not belong together, with expected and got.

    Examples:
      >>> a, b = jnp.ones((3, 4, 5)), jnp.zeros((3, 4, 5))  # a map of 3 x 4 nodes, 5 hidden units
      >>> w2 = jnp.broadcast_to(jnp.eye(2), (5, 2, 2))  # each unit favours equal labels
      >>> above = pw.factored_pairwise(a, b, w2, jnp.zeros((2, 2)), pw.offsets(pw.ABOVE_BELOW, 3, 4))
      >>> above.grid, above.num_classes, len(above.offsets)
      ((3, 4), 2, 3)
      >>> pw.to_table(above).scores[0].tolist()  # of the first edge
      [[5.0, 0.0], [0.0, 5.0]]
    """
    a, b, w2, b2, evidence = map(as_array, (a, b, w2, b2, evidence))
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

    Args:
      potential: the `FactoredPairwise`.

    Returns:
      `PairwiseTable` with float32 scores [..., num_edges, K, K].

    Raises:
      TypeError: another encoding.
    """
    if not isinstance(potential, FactoredPairwise):
        raise TypeError(f"expected a FactoredPairwise, got {type(potential).__name__}")
    return _to_table(potential)


def _table_layout(potential):
    batch = batch_spec(potential.a, 3)
    evidence = None if potential.evidence is None else jax.P(*batch_spec(potential.evidence, 3))
    return PairwiseTable(jax.P(*batch), jax.P(), jax.P(), evidence)


@compiled(_table_layout)
def _to_table(potential):
    a, b = potential.a, potential.b
    height, width = potential.grid
    box = np.array(potential.offsets, np.int32).reshape(-1, 2)
    which, row, col = np.nonzero(relations.validity_mask(box, height, width))
    p = row * width + col
    q = (row + box[which, 0]) * width + col + box[which, 1]
    nodes = lambda x: x.reshape(*x.shape[:-3], height * width, x.shape[-1])
    hidden = jax.nn.relu(nodes(a)[..., p, :] + nodes(b)[..., q, :])
    return PairwiseTable(
        scores=_guarded_last_layer(hidden, potential.w2, potential.b2),
        p=jnp.asarray(p, jnp.int32),
        q=jnp.asarray(q, jnp.int32),
        evidence=None if potential.evidence is None else nodes(potential.evidence),
    )


def _last_layer(hidden, w2, b2):
    """[..., M] -> float32 [..., K, K]; products in the dtype of `hidden`, sums in float32."""
    m, k, _ = w2.shape
    flat = matmul(hidden, w2.reshape(m, k * k).astype(hidden.dtype)).reshape(*hidden.shape[:-1], k, k)
    flat, bias = level(flat, b2.astype(jnp.float32))
    return flat + bias


def _guarded_last_layer(hidden, w2, b2):
    """NaN without a gradient where a node holds NaN or infinities: a mask may hide them later, and 0 NaN is NaN."""
    sound = jnp.isfinite(jnp.max(hidden, axis=-1, initial=0))
    scores = _last_layer(jnp.where(sound[..., None], hidden, 0), w2, b2)
    return jnp.where(sound[..., None, None], scores, jnp.nan)


# --------------------------------------------------------------------------------------------- likelihood


def sample_offsets(key, num_offsets: int, num_sampled: int):
    """A uniform random subset of a relation's offsets, for `edge_log_likelihood`.

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


def edge_log_likelihood(potential, labels, node_mask=None, node_weights=None, chunk_edges=None, sample=None, void=None):
    """Sum and count of log P_V(y_p, y_q | x) over the edges of one relation (Lin et al., CVPR 2016, section 4).

        log P_V(y_p, y_q | x) = s_pq[y_p, y_q] - log sum_{k,l} exp s_pq[k, l],   s = z + evidence_p + evidence_q.

    Args:
      potential: `PairwiseTable` or `FactoredPairwise`; leading batch axes allowed in both.
      labels: int, [..., num_nodes] or [..., H, W], 0..K-1 or `void`; only read where node_mask is true, any value
        elsewhere. Other values are refused where they can be seen; under `jit` they are as void.
      node_mask: bool, same shape; false for void and padded nodes. An edge counts only if both its ends do. None: all.
      node_weights: float, same shape: class balancing. An edge weighs w_p w_q. None: 1.
      chunk_edges: static int; a factored potential holds the scores of about so many edges at a time, in whole rows of
        the map. None: chosen from the shapes (`pwcrf_jax.costs.default_chunk_edges`). The value does not depend on it.
      sample: int [n], positions in the offsets of a factored potential (0 .. num_offsets - 1, the caller sees to that),
        from `sample_offsets`; may be traced. The sum
        is then over those offsets, scaled by num_offsets / n: over random samples its expectation, and that of its
        gradient, are those of the full sum. The count is always that of the full sum.
      void: the label of nodes that count for nothing, static and outside 0..K-1, or None.

    Returns:
      (sum, count), float32 scalars: the weighted sum of log-likelihoods over batch and edges, and the sum of weights.

    Differentiable in the potential and the weights, in reverse mode and any number of times; a factored potential makes
    the gradient in the same pass as the sum, chunk by chunk, so that no scores are kept or formed twice.

    Raises:
      ValueError: labels that are not integers, not of the shape of the nodes, or neither class nor void; chunk_edges
        below 1; a sample for a table, or an empty one.
      TypeError: `GridScores`, which do not hold what the likelihood needs.
    """
    if isinstance(potential, GridScores):
        raise TypeError("GridScores are for messages: give the FactoredPairwise that they were made from")
    _check_chunk(chunk_edges)
    factored = isinstance(potential, FactoredPairwise)
    if sample is not None and not factored:
        raise ValueError("offsets can be sampled on a grid alone: give a FactoredPairwise, or a table of fewer edges")
    sample = as_array(sample)
    if sample is not None and (sample.ndim != 1 or not sample.size):
        raise ValueError(f"expected a sample of shape [n], n at least 1, got {sample.shape}")
    node_mask = None if node_mask is None else as_array(node_mask).astype(bool)
    if not factored:
        potential = of_arrays(potential)
    labels = checked(labels, potential.num_classes, void, mask=node_mask)
    _check_nodes(potential, labels)
    return _edge_sums(potential, labels, node_mask, as_array(node_weights), sample, chunk_edges=chunk_edges)


def _check_nodes(potential, labels):
    """ValueError: labels of other nodes; a table without evidence does not know its own."""
    nodes = potential.grid if isinstance(potential, FactoredPairwise) else ()
    if not nodes and potential.evidence is not None:
        nodes = potential.evidence.shape[-2:-1]
    if nodes and labels.shape[-len(nodes) :] != nodes:
        raise ValueError(f"expected labels of shape {('...', *nodes)}, one a node, got {labels.shape}")


@compiled()
def _edge_sums(potential, labels, node_mask, node_weights, sample, *, chunk_edges):
    labels, mask = split(labels, potential.num_classes)
    if node_mask is not None:
        mask = operator.and_(*level(mask, node_mask))
    weight = jnp.ones((), jnp.float32) if node_weights is None else node_weights.astype(jnp.float32)
    weight = jnp.where(*level(mask, weight), 0.0)
    if isinstance(potential, FactoredPairwise):
        return _factored_log_likelihood(potential, labels, mask, weight, chunk_edges, sample)
    return _table_log_likelihood(potential, labels, mask, weight)


def _table_log_likelihood(potential, labels, mask, weight):
    p, q, num_classes = potential.p, potential.q, potential.num_classes
    scores = potential.scores.astype(jnp.float32)
    evidence = jnp.zeros((1, 1)) if potential.evidence is None else potential.evidence.astype(jnp.float32)
    batch = jnp.broadcast_shapes(scores.shape[:-3], evidence.shape[:-2], weight.shape[:-1])
    whole = lambda x, own: jnp.broadcast_to(x, (*batch, *x.shape[x.ndim - own :]))
    scores, labels, mask, weight = whole(scores, 3), whole(labels, 1), whole(mask, 1), whole(weight, 1)
    if potential.evidence is not None:
        evidence = whole(evidence, 2)
        scores = scores + evidence[..., p, :, None] + evidence[..., q, None, :]
    scores = jnp.where((mask[..., p] & mask[..., q])[..., None, None], scores, 0.0)
    flat = scores.reshape(*scores.shape[:-2], num_classes**2)
    index = (labels[..., p] * num_classes + labels[..., q])[..., None]
    value = jnp.take_along_axis(flat, index, axis=-1)[..., 0] - jax.nn.logsumexp(flat, axis=-1)
    edge_weight = weight[..., p] * weight[..., q]
    return jnp.sum(edge_weight * value), jnp.sum(edge_weight)


def _floored(scores):
    """`RULED_OUT` for -inf; in float32 where they come in float16, which has no room for it."""
    scores = scores.astype(jnp.float32) if scores.dtype == jnp.float16 else scores
    return jnp.where(scores == -jnp.inf, jnp.asarray(RULED_OUT, scores.dtype), scores)


def _finite(potential, node_mask):
    """What may be multiplied by zero: zeros for what masked nodes hold, NaN and infinities too, `RULED_OUT` for -inf.

    Neither then reaches messages or gradients of other nodes.
    """
    if isinstance(potential, FactoredPairwise):
        if node_mask is None:
            return dataclasses.replace(potential, b2=_floored(potential.b2))
        quiet = lambda x: jnp.where(*level(node_mask[..., None], x), 0)
        return dataclasses.replace(potential, a=quiet(potential.a), b=quiet(potential.b), b2=_floored(potential.b2))
    stored = isinstance(potential, GridScores)  # of scores that were finite when `prepare_messages` made them
    scores = potential.scores if stored else _floored(potential.scores)
    if node_mask is not None:
        if stored:
            shift = _Shift(potential.offsets, *potential.grid)
            bordered = shift.border(node_mask[..., None])
            with_q = lambda offset: node_mask & shift.at(bordered, offset)[..., 0]
            both = jax.vmap(with_q, out_axes=-3)(jnp.asarray(shift.offsets))
        else:
            both = node_mask[..., potential.p] & node_mask[..., potential.q]
        scores = jnp.where(*level(both[..., None, None], scores), 0)
    return dataclasses.replace(potential, scores=scores) if stored else potential._replace(scores=scores)


def _factored_log_likelihood(potential, labels, mask, weight, chunk_edges, sample):
    """Flattens the batch, and adds the count, for which no scores are needed."""
    height, width = potential.grid
    exist = relations.validity_mask(np.array(potential.offsets).reshape(-1, 2), height, width)
    if not exist.any() or 0 in potential.a.shape:
        return jnp.float32(0), jnp.float32(0)
    grids = lambda x, *tail: jnp.broadcast_to(x, (*potential.a.shape[:-3], *x.shape[-2 - len(tail) :])).reshape(
        -1, height, width, *tail
    )
    dtype = jnp.result_type(potential.a, potential.b)
    a, b = (jnp.asarray(x, dtype).reshape(-1, height, width, x.shape[-1]) for x in (potential.a, potential.b))
    labels, mask, weight = grids(labels), grids(mask), grids(weight)
    evidence = None if potential.evidence is None else grids(potential.evidence, potential.num_classes)
    count = jnp.sum(weight * _neighbours(weight, potential.offsets)[0])
    arrays = (a, b, potential.w2, potential.b2, evidence, weight, labels, mask)
    return sum_over_edges(*arrays, potential.offsets, chunk_edges, sample), count


def _check_chunk(chunk_edges):
    if chunk_edges is not None and chunk_edges < 1:
        raise ValueError(f"chunk_edges must be at least 1, or None to choose it, got {chunk_edges}")


def _neighbours(x, offsets):
    """(sum of x over p + offset, sum of x over p - offset), both [..., H, W]; what lies beyond the map counts 0."""
    box = np.array(offsets, np.int32).reshape(-1, 2)
    reach = np.abs(box).max(axis=0, initial=0)
    kernel = np.zeros(2 * reach + 1, np.float32)
    np.add.at(kernel, tuple((box + reach).T), 1)
    both = jnp.asarray(np.stack([kernel, kernel[::-1, ::-1]])[:, None])
    images = x.reshape(-1, 1, *x.shape[-2:]).astype(jnp.float32)
    out = jax.lax.conv_general_dilated(images, both, (1, 1), [(r, r) for r in reach], precision="highest")
    return tuple(out[:, i].reshape(x.shape) for i in (0, 1))


# ------------------------------------------------------------------------------------------------- messages


def messages(potential, marginals, node_mask=None, chunk_edges=None):
    """Mean-field messages of one relation to every node, as p and as q (method: Lin et al., CVPR 2016, section 3).

        message_i[k] = sum_{(p,q): p=i} sum_l z_pq[k, l] Q_q(l)  +  sum_{(p,q): q=i} sum_l z_pq[l, k] Q_p(l)

    Only the net's part z sends messages, never the evidence (module docstring). A factored potential forms no scores:

        sum_l z_pq[k, l] Q_q(l) = sum_m relu(A_p + B_q)[m] G_q[m, k] + sum_l b2[k, l] Q_q(l),
        G_q[m, k] = sum_l W2[m, k, l] Q_q(l)   once per node q, and likewise in the other direction.

    Args:
      potential: `PairwiseTable`, `FactoredPairwise` or `GridScores`.
      marginals: float [..., num_nodes, K] or [..., H, W, K], Q.
      node_mask: bool [..., num_nodes] or [..., H, W]; a false node neither sends nor receives, and may hold anything.
        None: all.
      chunk_edges: static int; a factored potential holds the hidden units of about so many edges at a time. None:
        chosen from the shapes (`pwcrf_jax.costs.default_chunk_edges`). The value does not depend on it.

    Returns:
      (message, num_messages): float32, the shape of marginals; and the number of messages summed in each node,
      [..., num_nodes] or [..., H, W] (without batch axes where there is no mask).

    Raises:
      ValueError: chunk_edges below 1.

    Examples:
      >>> scores = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])  # one edge, two labels
      >>> table = pw.PairwiseTable(scores, p=jnp.array([0]), q=jnp.array([1]))
      >>> message, count = pw.messages(table, jnp.array([[1.0, 0.0], [0.5, 0.5]]))
      >>> message.tolist(), count.tolist()
      ([[0.5, 1.0], [1.0, 0.0]], [1.0, 1.0])
    """
    _check_chunk(chunk_edges)
    if isinstance(potential, PairwiseTable):
        potential = of_arrays(potential)
    node_mask = None if node_mask is None else as_array(node_mask).astype(bool)
    return _messages(potential, as_array(marginals), node_mask, chunk_edges=chunk_edges)


def _messages_layout(potential, marginals, node_mask, chunk_edges):
    own = 2 if isinstance(potential, PairwiseTable) else 3
    count = () if node_mask is None else batch_spec(node_mask, own - 1)
    return jax.P(*batch_spec(marginals, own)), jax.P(*count)


@compiled(_messages_layout)
def _messages(potential, marginals, node_mask, *, chunk_edges):
    return prepared_messages(_finite(potential, node_mask), marginals, node_mask, chunk_edges)


def prepared_messages(potential, marginals, node_mask, chunk_edges=None):
    """`messages` within a loop, of a potential that `prepare_messages` was given the same mask for.

    What masked nodes hold is gone already, and is not looked for again in each iteration.

    Args:
      potential, marginals, node_mask, chunk_edges: as in `messages`; arrays, or None for the mask.

    Returns:
      (message, count): as `messages`, float32 [..., K] of the nodes and float32 of the nodes.

    Raises:
      ValueError: chunk_edges below 1.
    """
    _check_chunk(chunk_edges)
    return _prepared_messages(potential, marginals, node_mask, chunk_edges=chunk_edges)


@compiled(_messages_layout)
def _prepared_messages(potential, marginals, node_mask, *, chunk_edges):
    marginals = marginals.astype(jnp.float32)
    table = isinstance(potential, PairwiseTable)
    node_shape = marginals.shape[-2:-1] if table else marginals.shape[-3:-1]
    mask = jnp.ones(node_shape, jnp.float32) if node_mask is None else node_mask.astype(jnp.float32)
    only_sound = lambda x: x if node_mask is None else jnp.where(*level(node_mask[..., None], x), 0.0)
    sent = only_sound(marginals)
    if table:
        message, count = _table_messages(potential, sent, mask)
    else:
        count = sum(_neighbours(mask, potential.offsets))
        if isinstance(potential, GridScores):
            message = _stored_messages(potential, sent)
        else:
            message = _folded_messages(potential, sent, chunk_edges)
    return only_sound(message), count * mask


def prepare_messages(potential, num_iterations, route="auto", node_mask=None):
    """What `messages` of one relation reads fastest, when it is called `num_iterations` times.

    Args:
      potential: `FactoredPairwise`; other encodings keep theirs.
      num_iterations: static, how many times messages will be computed.
      route: "folded": the potential itself. "table": a `GridScores`, whose scores are formed once: cheaper where K is
        small or iterations are many, in memory of num_offsets * nodes * K^2. "auto": the cheaper by the cost model
        `pwcrf_jax.costs.route`, from shapes alone.
      node_mask: of `messages`. What masked nodes hold is then replaced by zeros here, as `prepared_messages` needs it.

    Returns:
      The potential, or `GridScores` of float32 scores [..., num_offsets, H, W, K, K].

    Raises:
      ValueError: unknown route.
    """
    if route not in ROUTES:
        raise ValueError(f"route must be one of {ROUTES}, got {route!r}")
    if node_mask is not None:
        node_mask = as_array(node_mask).astype(bool)
        potential = _finite(potential, node_mask)
    if not isinstance(potential, FactoredPairwise):
        return potential
    if route == "auto":
        num_images = int(np.prod(potential.a.shape[:-3]))
        shapes = (*potential.grid, potential.num_classes, potential.a.shape[-1], num_images)
        route = costs.route(potential.offsets, *shapes, num_iterations)
    if route == "folded" or not potential.offsets:
        return potential
    return _store_scores(potential, guarded=node_mask is None)


@compiled(lambda potential, guarded: jax.P(*batch_spec(potential.a, 3)))
def _store_scores(potential, *, guarded):
    potential = _finite(potential, None)
    last_layer = _guarded_last_layer if guarded else _last_layer
    shift = _Shift(potential.offsets, *potential.grid)
    box = jnp.asarray(shift.offsets)
    lead = potential.a.shape[:-3]
    a, b = (jnp.reshape(x, (-1, *x.shape[-3:])) for x in (potential.a, potential.b))
    b = shift.border(b)

    @jax.checkpoint
    def scores(offset):
        return last_layer(jax.nn.relu(a + shift.at(b, offset)), potential.w2, potential.b2)

    def fill(stored, number):
        return jax.lax.dynamic_update_index_in_dim(stored, scores(box[number]), number, axis=1), None

    shape = (a.shape[0], len(box), *potential.grid, *potential.b2.shape)
    empty = jnp.zeros_like(a, shape=shape, dtype=jnp.float32)
    stored, _ = jax.lax.scan(fill, empty, jnp.arange(len(box), dtype=jnp.int32))
    return GridScores(stored.reshape(*lead, *stored.shape[1:]), potential.offsets)


def _table_messages(potential, sent, mask):
    p, q = potential.p, potential.q
    scores = potential.scores.astype(jnp.float32)
    to_p = einsum("...ekl,...el->...ek", scores, sent[..., q, :])
    to_q = einsum("...ekl,...ek->...el", scores, sent[..., p, :])
    message = jnp.zeros(to_p.shape[:-2] + sent.shape[-2:], jnp.float32)
    message = message.at[..., p, :].add(to_p).at[..., q, :].add(to_q)
    count = jnp.zeros_like(mask).at[..., p].add(mask[..., q]).at[..., q].add(mask[..., p])
    return message, count


class _Shift:
    """Reads node arrays at q = p + offset for an offset that is traced: one zero border, then a dynamic slice."""

    def __init__(self, offsets, height: int, width: int):
        self.offsets = np.array(offsets, np.int32).reshape(-1, 2)
        self.pad = tuple(int(np.abs(self.offsets[:, i]).max(initial=0)) for i in (0, 1))
        self.size = (height, width)

    def border(self, x):
        """x [..., H, W, C] with a border wide enough for every offset in both directions."""
        (r, c), lead = self.pad, [(0, 0)] * (x.ndim - 3)
        return jnp.pad(x, [*lead, (r, r), (c, c), (0, 0)])

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
        start = self._start(bordered.ndim - 3, offset)
        here = jax.lax.dynamic_slice(bordered, start, x.shape)
        return jax.lax.dynamic_update_slice(bordered, here + x, start)

    def crop(self, bordered):
        (r, c), (h, w) = self.pad, self.size
        return bordered[..., r : r + h, c : c + w, :]


def _stored_messages(potential, sent):
    shift = _Shift(potential.offsets, *potential.grid)
    sent_q = shift.border(sent)

    box = jnp.asarray(shift.offsets)

    def body(carry, number):
        to_p, to_q = carry
        scores = jax.lax.dynamic_index_in_dim(potential.scores, number, axis=-5 % potential.scores.ndim, keepdims=False)
        offset = box[number]
        # Scores of edges that leave the map meet marginals of 0 at q; what p sends there is cropped away.
        to_p = to_p + einsum("...kl,...l->...k", scores, shift.at(sent_q, offset))
        to_q = shift.add_at(to_q, einsum("...kl,...k->...l", scores, sent), offset)
        return (to_p, to_q), None

    lead = jnp.broadcast_shapes(potential.scores.shape[:-5], sent.shape[:-3])
    zeros = jnp.zeros_like(sent, shape=(*lead, *sent.shape[-3:]), dtype=jnp.float32)
    numbers = jnp.arange(len(shift.offsets), dtype=jnp.int32)
    (to_p, to_q), _ = jax.lax.scan(jax.checkpoint(body), (zeros, shift.border(zeros)), numbers)
    return to_p + shift.crop(to_q)


def _folded_messages(potential, sent, chunk_edges):
    lead = jnp.broadcast_shapes(potential.a.shape[:-3], sent.shape[:-3])
    flat = lambda x: jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(-1, *x.shape[-3:])
    if not potential.offsets or 0 in lead:
        return jnp.zeros((*lead, *sent.shape[-3:]), jnp.float32)
    dtype = jnp.result_type(potential.a, potential.b)
    a, b, sent = flat(jnp.asarray(potential.a, dtype)), flat(jnp.asarray(potential.b, dtype)), flat(sent)
    if chunk_edges is None:
        chunk_edges = costs.default_chunk_edges(potential.num_classes, a.shape[-1], folded=True)
    box = np.array(potential.offsets, np.int32)
    w2, b2 = (x.astype(jnp.float32) for x in (potential.w2, potential.b2))
    # The first axis of both is the label summed over: that of the sender.
    to_p = _send(b, a, sent, -box, jnp.moveaxis(w2, 2, 0), b2.T, chunk_edges)
    to_q = _send(a, b, sent, box, jnp.moveaxis(w2, 1, 0), b2, chunk_edges)
    return (to_p + to_q).reshape(*lead, *sent.shape[1:])


def _send(sender, receiver, sent, box, w2, b2, chunk_edges):
    """What every node s sends to the nodes s + offset: sum_m relu(S_s + R_r)[m] G_s[m, k] + sum_l b2[l, k] Q_s(l).

    sender, receiver: [B, H, W, M], the first layer's parts of both ends; sent: [B, H, W, K]; w2: [K, M, K] and
    b2 [K, K], the sender's label first. Returns float32 [B, H, W, K].

    Walks runs of senders, cells of one row: then G is formed once per sender and serves its whole box, one product of
    [num_offsets, M] and [M, K] for each.
    """
    num_images, height, width, m = sender.shape
    k = sent.shape[-1]
    run, runs = costs.sender_runs(len(box), num_images * height, width, chunk_edges)
    per_row = -(-width // run)
    total = num_images * height * per_row
    fill = per_row * run - width
    reach_row, reach_col = (int(x) for x in np.abs(box).max(axis=0))
    widen = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, fill), (0, 0)))
    border = lambda x: jnp.pad(x, ((0, 0), (reach_row, reach_row), (reach_col, reach_col + fill), (0, 0)))
    sender, sent, receiver = widen(sender), widen(sent), border(receiver)
    out = jnp.zeros_like(receiver, shape=(*receiver.shape[:-1], k), dtype=jnp.float32)
    windows = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(0, 1), scatter_dims_to_operand_dims=(0, 1, 2)
    )
    at = jax.lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(0, 1), start_index_map=(0, 1, 2))
    read = lambda x, start: jax.lax.gather(x, start, at, (1, 1, run, x.shape[-1]), mode="promise_in_bounds")

    def body(out, step):
        number = step * runs + jnp.arange(runs, dtype=jnp.int32)
        real = (number < total).astype(jnp.float32)
        number = jnp.minimum(number, total - 1)
        start = jnp.stack([number // (height * per_row), number // per_row % height, number % per_row * run], axis=-1)
        q = read(sent, start) * real[:, None, None]
        folded = einsum("rtl,lmk->rtmk", q, w2).astype(sender.dtype)
        shifts = jnp.asarray(np.concatenate([np.zeros((len(box), 1), np.int32), box + (reach_row, reach_col)], axis=1))
        ends = (start[:, None] + shifts.astype(jnp.int32)[None]).reshape(-1, 3)
        ends_part = read(receiver, ends).reshape(runs, len(box), run, m)
        hidden = jax.nn.relu(jnp.moveaxis(ends_part, 1, 2) + read(sender, start)[:, :, None])
        message = einsum("rtcm,rtmk->rtck", hidden, folded)
        message = message + einsum("rtl,lk->rtk", q, b2)[:, :, None]
        updates = jnp.moveaxis(message, 2, 1).reshape(-1, run, k)
        return jax.lax.scatter_add(out, ends, updates, windows, mode="promise_in_bounds"), None

    out, _ = jax.lax.scan(jax.checkpoint(body), out, jnp.arange(-(-total // runs), dtype=jnp.int32))
    return out[:, reach_row : reach_row + height, reach_col : reach_col + width]
