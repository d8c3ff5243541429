"""Mean-field messages of one relation, from any encoding of its scores (method: Lin et al., CVPR 2016, section 3).

    message_i[k] = sum_{(p,q): p=i} sum_l z_pq[k, l] Q_q(l)  +  sum_{(p,q): q=i} sum_l z_pq[l, k] Q_p(l)

A factored potential has two algorithms, of one result. "factored": the marginals are multiplied with the last layer
once a sender, and no scores are formed. "table": the scores are formed once, stored (`GridScores`), and read in every
iteration.
"""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pwcrf_jax import costs
from pwcrf_jax.arrays import as_array, as_mask, batch_spec, compiled, einsum, level, of_arrays
from pwcrf_jax.inputs import check_chunk_edges
from pwcrf_jax.potentials import (
    RULED_OUT,
    FactoredPairwise,
    GridScores,
    Offsets,
    PairwiseTable,
    Potential,
    guarded_last_layer,
    last_layer,
    sum_over_neighbours,
)

ALGORITHMS = ("auto", "factored", "table")
"""Names of the ways to messages; see `prepare_messages`."""


def compute_messages(
    potential: Potential,
    marginals: ArrayLike,
    *,
    node_mask: ArrayLike | None = None,
    chunk_edges: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mean-field messages of one relation to every node, as p and as q (Lin et al., CVPR 2016, section 3).

        message_i[k] = sum_{(p,q): p=i} sum_l z_pq[k, l] Q_q(l)  +  sum_{(p,q): q=i} sum_l z_pq[l, k] Q_p(l)

    Only the net's part z sends messages, never `unary_log_probs` (`pwcrf_jax.potentials`). A factored potential forms
    no scores:

        sum_l z_pq[k, l] Q_q(l) = sum_m relu(A_p + B_q)[m] G_q[m, k] + sum_l bias[k, l] Q_q(l),
        G_q[m, k] = sum_l kernel[m, k, l] Q_q(l)   once per node q, and likewise in the other direction.

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
      >>> message, count = pw.compute_messages(table, jnp.array([[1.0, 0.0], [0.5, 0.5]]))
      >>> message.tolist(), count.tolist()
      ([[0.5, 1.0], [1.0, 0.0]], [1.0, 1.0])
    """
    check_chunk_edges(chunk_edges)
    if isinstance(potential, PairwiseTable):
        potential = of_arrays(potential)
    return _compute(potential, as_array(marginals), as_mask(node_mask), chunk_edges=chunk_edges)


def _layout(potential: Potential, marginals: jax.Array, node_mask: jax.Array | None, chunk_edges: int | None) -> Any:
    own = 2 if isinstance(potential, PairwiseTable) else 3
    count = () if node_mask is None else batch_spec(node_mask, own - 1)
    return jax.P(*batch_spec(marginals, own)), jax.P(*count)


@compiled(_layout)
def _compute(
    potential: Potential, marginals: jax.Array, node_mask: jax.Array | None, *, chunk_edges: int | None
) -> tuple[jax.Array, jax.Array]:
    return compute_prepared_messages(_quiet(potential, node_mask), marginals, node_mask, chunk_edges=chunk_edges)


def compute_prepared_messages(
    potential: Potential, marginals: jax.Array, node_mask: jax.Array | None, *, chunk_edges: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """`compute_messages` within a loop, of a potential that `prepare_messages` was given the same mask for.

    What masked nodes hold is gone already, and is not looked for again in each iteration.

    Args:
      potential, marginals, node_mask, chunk_edges: as in `compute_messages`; arrays, or None for the mask.

    Returns:
      (message, count): as `compute_messages`, float32 [..., K] of the nodes and float32 of the nodes.

    Raises:
      ValueError: chunk_edges below 1.
    """
    check_chunk_edges(chunk_edges)
    return _compute_prepared(potential, marginals, node_mask, chunk_edges=chunk_edges)


@compiled(_layout)
def _compute_prepared(
    potential: Potential, marginals: jax.Array, node_mask: jax.Array | None, *, chunk_edges: int | None
) -> tuple[jax.Array, jax.Array]:
    marginals = marginals.astype(jnp.float32)
    table = isinstance(potential, PairwiseTable)
    node_shape = marginals.shape[-2:-1] if table else marginals.shape[-3:-1]
    mask = jnp.ones(node_shape, jnp.float32) if node_mask is None else node_mask.astype(jnp.float32)
    only_sound = lambda x: x if node_mask is None else jnp.where(*level(node_mask[..., None], x), 0.0)
    sent = only_sound(marginals)
    if isinstance(potential, PairwiseTable):
        message, count = _table_messages(potential, sent, mask)
    else:
        count = operator.add(*sum_over_neighbours(mask, potential.offsets))
        if isinstance(potential, GridScores):
            message = _stored_messages(potential, sent)
        else:
            message = _factored_messages(potential, sent, chunk_edges)
    return only_sound(message), count * mask


def prepare_messages(
    potential: Potential, num_iterations: int, *, algorithm: str = "auto", node_mask: ArrayLike | None = None
) -> Potential:
    """The potential in the encoding from which `num_iterations` messages are computed fastest.

    Args:
      potential: `FactoredPairwise`; other encodings keep theirs.
      num_iterations: static, how many times messages will be computed.
      algorithm: "factored": the potential itself. "table": a `GridScores`, whose scores are formed once: cheaper where
        K is small or iterations are many, in memory of num_offsets * nodes * K^2. "auto": the cheaper by the cost model
        `pwcrf_jax.costs.algorithm`, from shapes alone.
      node_mask: of `compute_messages`. What masked nodes hold is then replaced by zeros here, as
        `compute_prepared_messages` needs it.

    Returns:
      The potential, or `GridScores` of float32 scores [..., num_offsets, H, W, K, K].

    Raises:
      ValueError: unknown algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
    mask = as_mask(node_mask)
    if mask is not None:
        potential = _quiet(potential, mask)
    if not isinstance(potential, FactoredPairwise):
        return potential
    if algorithm == "auto":
        num_images = int(np.prod(potential.hidden_p.shape[:-3]))
        shapes = (*potential.grid, potential.num_classes, potential.hidden_p.shape[-1], num_images)
        algorithm = costs.algorithm(potential.offsets, *shapes, num_iterations=num_iterations)
    if algorithm == "factored" or not potential.offsets:
        return potential
    return _store_scores(potential, guarded=mask is None)


@compiled(lambda potential, guarded: jax.P(*batch_spec(potential.hidden_p, 3)))
def _store_scores(potential: FactoredPairwise, *, guarded: bool) -> GridScores:
    potential = _quiet_factored(potential, None)
    layer = guarded_last_layer if guarded else last_layer
    shift = _Shift(potential.offsets, *potential.grid)
    box = jnp.asarray(shift.offsets)
    lead = potential.hidden_p.shape[:-3]
    at_p, at_q = (jnp.reshape(x, (-1, *x.shape[-3:])) for x in (potential.hidden_p, potential.hidden_q))
    at_q = shift.border(at_q)

    @jax.checkpoint
    def scores(offset: jax.Array) -> jax.Array:
        return layer(jax.nn.relu(at_p + shift.at(at_q, offset)), potential.kernel, potential.bias)

    def fill(stored: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.dynamic_update_index_in_dim(stored, scores(box[number]), number, axis=1), None

    shape = (at_p.shape[0], len(box), *potential.grid, *potential.bias.shape)
    empty = jnp.zeros_like(at_p, shape=shape, dtype=jnp.float32)
    stored, _ = jax.lax.scan(fill, empty, jnp.arange(len(box), dtype=jnp.int32))
    return GridScores(stored.reshape(*lead, *stored.shape[1:]), potential.offsets)


def _floored(scores: jax.Array) -> jax.Array:
    """`RULED_OUT` for -inf; in float32 where they come in float16, which has no room for it."""
    scores = scores.astype(jnp.float32) if scores.dtype == jnp.float16 else scores
    return jnp.where(scores == -jnp.inf, jnp.asarray(RULED_OUT, scores.dtype), scores)


def _quiet(potential: Potential, node_mask: jax.Array | None) -> Potential:
    """Scores that may be multiplied by zero: 0 for what masked nodes hold, NaN and infinities too; no -inf.

    Neither then reaches messages or gradients of other nodes.
    """
    if isinstance(potential, FactoredPairwise):
        return _quiet_factored(potential, node_mask)
    if isinstance(potential, PairwiseTable):
        scores = _floored(potential.scores)
        if node_mask is not None:
            both = node_mask[..., potential.p] & node_mask[..., potential.q]
            scores = jnp.where(*level(both[..., None, None], scores), 0)
        return potential._replace(scores=scores)
    if node_mask is None:  # of scores that were finite when `prepare_messages` made them
        return potential
    shift = _Shift(potential.offsets, *potential.grid)
    bordered = shift.border(node_mask[..., None])
    with_q = lambda offset: node_mask & shift.at(bordered, offset)[..., 0]
    both = jax.vmap(with_q, out_axes=-3)(jnp.asarray(shift.offsets))
    return dataclasses.replace(potential, scores=jnp.where(*level(both[..., None, None], potential.scores), 0))


def _quiet_factored(potential: FactoredPairwise, node_mask: jax.Array | None) -> FactoredPairwise:
    bias = _floored(potential.bias)
    if node_mask is None:
        return dataclasses.replace(potential, bias=bias)
    zeroed = lambda x: jnp.where(*level(node_mask[..., None], x), 0)
    hidden_p, hidden_q = zeroed(potential.hidden_p), zeroed(potential.hidden_q)
    return dataclasses.replace(potential, hidden_p=hidden_p, hidden_q=hidden_q, bias=bias)


def _table_messages(potential: PairwiseTable, sent: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
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

    def __init__(self, offsets: Offsets, height: int, width: int) -> None:
        self.offsets = np.array(offsets, np.int32).reshape(-1, 2)
        self.pad = tuple(int(np.abs(self.offsets[:, i]).max(initial=0)) for i in (0, 1))
        self.size = (height, width)

    def border(self, x: jax.Array) -> jax.Array:
        """x [..., H, W, C] with a border wide enough for every offset in both directions."""
        (r, c), lead = self.pad, [(0, 0)] * (x.ndim - 3)
        return jnp.pad(x, [*lead, (r, r), (c, c), (0, 0)])

    def _start(self, lead: int, offset: jax.Array) -> list[jax.Array]:
        # One integer type for all: a plain 0 is int64 under jax_enable_x64, the offset int32.
        zero = jnp.int32(0)
        return [zero] * lead + [self.pad[0] + offset[0], self.pad[1] + offset[1], zero]

    def at(self, bordered: jax.Array, offset: jax.Array) -> jax.Array:
        """The value at p + offset for every p: [..., H, W, C]."""
        lead = bordered.ndim - 3
        start = self._start(lead, offset)
        return jax.lax.dynamic_slice(bordered, start, (*bordered.shape[:lead], *self.size, bordered.shape[-1]))

    def add_at(self, bordered: jax.Array, x: jax.Array, offset: jax.Array) -> jax.Array:
        """Adds x [..., H, W, C], given per p, to the cells p + offset."""
        start = self._start(bordered.ndim - 3, offset)
        here = jax.lax.dynamic_slice(bordered, start, x.shape)
        return jax.lax.dynamic_update_slice(bordered, here + x, start)

    def crop(self, bordered: jax.Array) -> jax.Array:
        """`bordered` [..., H, W, C] without its border."""
        (r, c), (h, w) = self.pad, self.size
        return bordered[..., r : r + h, c : c + w, :]


def _stored_messages(potential: GridScores, sent: jax.Array) -> jax.Array:
    shift = _Shift(potential.offsets, *potential.grid)
    sent_q = shift.border(sent)

    box = jnp.asarray(shift.offsets)

    def body(carry: tuple[jax.Array, jax.Array], number: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
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


def _factored_messages(potential: FactoredPairwise, sent: jax.Array, chunk_edges: int | None) -> jax.Array:
    lead = jnp.broadcast_shapes(potential.hidden_p.shape[:-3], sent.shape[:-3])
    flat = lambda x: jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(-1, *x.shape[-3:])
    if not potential.offsets or 0 in lead:
        return jnp.zeros((*lead, *sent.shape[-3:]), jnp.float32)
    dtype = jnp.result_type(potential.hidden_p, potential.hidden_q)
    hidden_p, hidden_q = (flat(jnp.asarray(x, dtype)) for x in (potential.hidden_p, potential.hidden_q))
    sent = flat(sent)
    if chunk_edges is None:
        chunk_edges = costs.default_chunk_edges(potential.num_classes, hidden_p.shape[-1], messages=True)
    box = np.array(potential.offsets, np.int32)
    kernel, bias = (x.astype(jnp.float32) for x in (potential.kernel, potential.bias))
    # The first axis of both is the label summed over: that of the sender.
    to_p = _send(hidden_q, hidden_p, sent, -box, jnp.moveaxis(kernel, 2, 0), bias.T, chunk_edges)
    to_q = _send(hidden_p, hidden_q, sent, box, jnp.moveaxis(kernel, 1, 0), bias, chunk_edges)
    return (to_p + to_q).reshape(*lead, *sent.shape[1:])


def _send(
    sender: jax.Array,
    receiver: jax.Array,
    sent: jax.Array,
    box: np.ndarray,
    kernel: jax.Array,
    bias: jax.Array,
    chunk_edges: int,
) -> jax.Array:
    """Messages of every node s to the nodes s + offset: sum_m relu(S_s + R_r)[m] G_s[m, k] + sum_l bias[l, k] Q_s(l).

    sender, receiver: [B, H, W, M], the first layer's parts of both ends; sent: [B, H, W, K]; kernel: [K, M, K] and
    bias [K, K], the sender's label first. Returns float32 [B, H, W, K].

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

    def body(out: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        number = step * runs + jnp.arange(runs, dtype=jnp.int32)
        real = (number < total).astype(jnp.float32)
        number = jnp.minimum(number, total - 1)
        start = jnp.stack([number // (height * per_row), number // per_row % height, number % per_row * run], axis=-1)
        q = read(sent, start) * real[:, None, None]
        kernel_q = einsum("rtl,lmk->rtmk", q, kernel).astype(sender.dtype)
        shifts = jnp.asarray(np.concatenate([np.zeros((len(box), 1), np.int32), box + (reach_row, reach_col)], axis=1))
        ends = (start[:, None] + shifts.astype(jnp.int32)[None]).reshape(-1, 3)
        ends_part = read(receiver, ends).reshape(runs, len(box), run, m)
        hidden = jax.nn.relu(jnp.moveaxis(ends_part, 1, 2) + read(sender, start)[:, :, None])
        message = einsum("rtcm,rtmk->rtck", hidden, kernel_q)
        message = message + einsum("rtl,lk->rtk", q, bias)[:, :, None]
        updates = jnp.moveaxis(message, 2, 1).reshape(-1, run, k)
        return jax.lax.scatter_add(out, ends, updates, windows, mode="promise_in_bounds"), None

    out, _ = jax.lax.scan(jax.checkpoint(body), out, jnp.arange(-(-total // runs), dtype=jnp.int32))
    return out[:, reach_row : reach_row + height, reach_col : reach_col + width]
