"""Pairwise potentials: scores z_pq[k, l] of the ordered label pair (y_p = k, y_q = l) on every edge.

Two encodings of one meaning:

* `PairwiseTable`: the scores themselves, one K x K table per edge, on any graph.
* `FactoredPairwise`: the last two layers of the Pairwise-Net on a grid, not expanded into tables.

The first layer is linear in [x_p ; x_q], so W1 [x_p ; x_q] + b1 = A_p + B_q with A (`hidden_p`) and B (`hidden_q`)
computed once per *node*, and

    z_pq[k, l] = bias[k, l] + sum_m relu(A_p + B_q)[m] kernel[m, k, l].

Memory of the factored form does not grow with the size of the box (docs/math.md, "Full range"):

* `pwcrf_jax.likelihood` walks the edges in chunks, and makes its gradient in the same pass;
* a message needs sum_l z_pq[k, l] Q_q(l) only, so `pwcrf_jax.messages` multiplies Q with the last layer first, unless
  storing the scores (`GridScores`, for inference alone) is cheaper.

The paper's energies are V = -z (section 3). z is not symmetric: z_pq[k, l] is not z_qp[l, k].

Two parameterisations of the scores. *free*: the net alone, as in the paper. *residual*: `unary_log_probs` holds
log P_U(y | x), the unary's log-softmax with its gradient stopped, and is added for both ends; the net then models what
the unary cannot know. These log-probabilities count in the likelihood but send no messages: what node i would receive
with them is its own once per neighbour (those of the neighbour make a constant, sum_l e_q[l] Q_q(l)), and mean field
has node i's unary already.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pwcrf_jax import relations
from pwcrf_jax.arrays import as_array, batch_spec, compiled, level, matmul

RULED_OUT = -1e9
"""Stands for a pair score of -inf where it is multiplied: with a marginal of 0 it then makes 0, not NaN."""

Offsets = tuple[tuple[int, int], ...]
"""Static offsets q - p of a relation in cells: pairs of integers, (row, column)."""


class PairwiseTable(NamedTuple):
    """Scores per edge of any graph.

    Attributes:
      scores: float [..., num_edges, K, K], the net's part z_pq; second-to-last axis is the label of p, last that of q.
      p, q: int [num_edges], node indices of both ends.
      unary_log_probs: float [..., num_nodes, K] or None, see the module docstring.
    """

    scores: jax.Array
    p: jax.Array
    q: jax.Array
    unary_log_probs: jax.Array | None = None

    @property
    def num_classes(self) -> int:
        """K."""
        return self.scores.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredPairwise:
    """The factored form on an H x W grid.

    Attributes:
      hidden_p: float [..., H, W, M], the first layer's part of p, bias included.
      hidden_q: float [..., H, W, M], the first layer's part of q.
      kernel: float [M, K, K], the last layer.
      bias: float [K, K].
      unary_log_probs: float [..., H, W, K] or None, see the module docstring.
      offsets: static tuple of (row, column) pairs, q - p, from `pwcrf_jax.relations.offsets`; make the potential with
        `factored_pairwise`, which takes any array of them.
    """

    hidden_p: jax.Array
    hidden_q: jax.Array
    kernel: jax.Array
    bias: jax.Array
    unary_log_probs: jax.Array | None
    offsets: Offsets = dataclasses.field(metadata=dict(static=True))

    @property
    def num_classes(self) -> int:
        """K."""
        return self.bias.shape[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W)."""
        height, width = self.hidden_p.shape[-3:-1]
        return height, width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GridScores:
    """A factored potential whose scores are stored, for inference alone; from `pwcrf_jax.messages.prepare_messages`.

    Attributes:
      scores: float32 [..., num_offsets, H, W, K, K], z of the edge from each node p to p + offset.
      offsets: as in `FactoredPairwise`.
    """

    scores: jax.Array
    offsets: Offsets = dataclasses.field(metadata=dict(static=True))

    @property
    def num_classes(self) -> int:
        """K."""
        return self.scores.shape[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W)."""
        height, width = self.scores.shape[-4:-2]
        return height, width


Potential = PairwiseTable | FactoredPairwise | GridScores
"""Any encoding of the scores of one relation; float arrays in each."""


def factored_pairwise(
    hidden_p: ArrayLike,
    hidden_q: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike,
    offsets: ArrayLike,
    unary_log_probs: ArrayLike | None = None,
) -> FactoredPairwise:
    """Checks shapes and builds a `FactoredPairwise`.

    Args:
      hidden_p, hidden_q: float [..., H, W, M], the first layer's parts of p and of q.
      kernel: float [M, K, K], the last layer.
      bias: float [K, K].
      offsets: int [num_offsets, 2], (row, column) of q - p, from `pwcrf_jax.relations.offsets`; static.
      unary_log_probs: float [..., H, W, K] or None.

    Returns:
      `FactoredPairwise`.

    Raises:
      ValueError: shapes that do not belong together, with expected and got.

    Examples:
      >>> hidden_p, hidden_q = jnp.ones((3, 4, 5)), jnp.zeros((3, 4, 5))  # a map of 3 x 4 nodes, 5 hidden units
      >>> kernel = jnp.broadcast_to(jnp.eye(2), (5, 2, 2))  # each unit favours equal labels
      >>> box = pw.offsets(pw.ABOVE_BELOW, 3, 4)
      >>> above = pw.factored_pairwise(hidden_p, hidden_q, kernel, jnp.zeros((2, 2)), box)
      >>> above.grid, above.num_classes, len(above.offsets)
      ((3, 4), 2, 3)
      >>> pw.to_table(above).scores[0].tolist()  # of the first edge
      [[5.0, 0.0], [0.0, 5.0]]
    """
    p, q, kernel, bias = map(as_array, (hidden_p, hidden_q, kernel, bias))
    unary = None if unary_log_probs is None else as_array(unary_log_probs)
    if p.shape != q.shape or p.ndim < 3:
        raise ValueError(f"expected hidden_p and hidden_q of one shape [..., H, W, M], got {p.shape} and {q.shape}")
    m, k = p.shape[-1], bias.shape[-1]
    if kernel.shape != (m, k, k) or bias.shape != (k, k):
        raise ValueError(f"expected kernel [M, K, K] and bias [K, K] with M = {m}, got {kernel.shape} and {bias.shape}")
    if unary is not None and unary.shape != (*p.shape[:-1], k):
        raise ValueError(f"expected unary_log_probs {(*p.shape[:-1], k)}, got {unary.shape}")
    box = np.asarray(offsets)
    if box.ndim != 2 or box.shape[1] != 2 or not np.issubdtype(box.dtype, np.integer):
        raise ValueError(f"expected integer offsets [num_offsets, 2], got {box.dtype} {box.shape}")
    return FactoredPairwise(p, q, kernel, bias, unary, tuple((int(row), int(col)) for row, col in box))


def weighted(potential: Potential, weights: ArrayLike) -> Potential:
    """The potential with a weight for each pair of labels.

        z'_pq[k, l] = weights[k, l] z_pq[k, l]

    Args:
      potential: any encoding.
      weights: float [K, K], the label of p first. May be traced. A pair that a score of -inf rules out stays ruled out.

    Returns:
      The same encoding; `unary_log_probs` are what they were.

    Raises:
      ValueError: weights of another shape.
    """
    array, k = as_array(weights), potential.num_classes
    if array.shape != (k, k):
        raise ValueError(f"expected weights of pairs of labels {(k, k)}, got {array.shape}")

    def weigh(scores: jax.Array) -> jax.Array:
        scores, each = level(scores, array.astype(scores.dtype))
        possible = scores != -jnp.inf
        return jnp.where(possible, jnp.where(possible, scores, 0) * each, -jnp.inf)

    if isinstance(potential, FactoredPairwise):
        return dataclasses.replace(potential, kernel=weigh(potential.kernel), bias=weigh(potential.bias))
    if isinstance(potential, PairwiseTable):
        return potential._replace(scores=weigh(potential.scores))
    return dataclasses.replace(potential, scores=weigh(potential.scores))


def to_table(potential: Potential) -> PairwiseTable:
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


def _table_layout(potential: FactoredPairwise) -> PairwiseTable:
    spec: Any = jax.P  # in place of arrays
    batch = batch_spec(potential.hidden_p, 3)
    unary = None if potential.unary_log_probs is None else spec(*batch_spec(potential.unary_log_probs, 3))
    return PairwiseTable(spec(*batch), spec(), spec(), unary)


@compiled(_table_layout)
def _to_table(potential: FactoredPairwise) -> PairwiseTable:
    height, width = potential.grid
    box = np.array(potential.offsets, np.int32).reshape(-1, 2)
    which, row, col = np.nonzero(relations.validity_mask(box, height, width))
    p = row * width + col
    q = (row + box[which, 0]) * width + col + box[which, 1]
    nodes = lambda x: x.reshape(*x.shape[:-3], height * width, x.shape[-1])
    hidden = jax.nn.relu(nodes(potential.hidden_p)[..., p, :] + nodes(potential.hidden_q)[..., q, :])
    return PairwiseTable(
        scores=guarded_last_layer(hidden, potential.kernel, potential.bias),
        p=jnp.asarray(p, jnp.int32),
        q=jnp.asarray(q, jnp.int32),
        unary_log_probs=None if potential.unary_log_probs is None else nodes(potential.unary_log_probs),
    )


def last_layer(hidden: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Scores of hidden units; products in the dtype of `hidden`, sums in float32.

    Args:
      hidden: float [..., M].
      kernel, bias: float [M, K, K] and [K, K].

    Returns:
      float32 [..., K, K].
    """
    m, k, _ = kernel.shape
    flat = matmul(hidden, kernel.reshape(m, k * k).astype(hidden.dtype)).reshape(*hidden.shape[:-1], k, k)
    flat, bias = level(flat, bias.astype(jnp.float32))
    return flat + bias


def guarded_last_layer(hidden: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`last_layer`, NaN without a gradient where a node holds NaN or infinities: a mask may hide them later.

    Zero times NaN, in the gradient of a product, would be NaN.

    Args:
      hidden, kernel, bias: as in `last_layer`, float [..., M], [M, K, K] and [K, K].

    Returns:
      float32 [..., K, K].
    """
    sound = jnp.isfinite(jnp.max(hidden, axis=-1, initial=0))
    scores = last_layer(jnp.where(sound[..., None], hidden, 0), kernel, bias)
    return jnp.where(sound[..., None, None], scores, jnp.nan)


def sum_over_neighbours(x: jax.Array, offsets: Offsets) -> tuple[jax.Array, jax.Array]:
    """The sums over the q of each node and over its p; what lies beyond the map counts 0.

    Args:
      x: float or bool [..., H, W].
      offsets: static pairs (row, column) of q - p.

    Returns:
      (sum of x over p + offset, sum of x over p - offset), float32 [..., H, W].
    """
    box = np.array(offsets, np.int32).reshape(-1, 2)
    reach = np.abs(box).max(axis=0, initial=0)
    kernel = np.zeros(2 * reach + 1, np.float32)
    np.add.at(kernel, tuple((box + reach).T), 1)
    both = jnp.asarray(np.stack([kernel, kernel[::-1, ::-1]])[:, None])
    images = x.reshape(-1, 1, *x.shape[-2:]).astype(jnp.float32)
    out = jax.lax.conv_general_dilated(images, both, (1, 1), [(r, r) for r in reach], precision="highest")
    return out[:, 0].reshape(x.shape), out[:, 1].reshape(x.shape)
