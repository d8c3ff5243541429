"""The sum of edge log-likelihoods of a factored pairwise potential, and its gradient in the same pass.

`pwcrf_jax.likelihood.pairwise_log_likelihood` is the way in; equations in docs/math.md, "Full range". Everything has
one batch axis: arrays [B, H, W, ...].
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import costs
from pwcrf_jax.arrays import matmul, vary_together
from pwcrf_jax.potentials import Offsets


class Differentiable(NamedTuple):
    """Arrays that the sum is differentiated in; or their gradients, in float32.

    hidden_p, hidden_q: float [B, H, W, M], of one dtype; kernel: [M, K, K]; bias: [K, K]; unary_log_probs:
    [B, H, W, K] or None; weight: float32 [B, H, W], 0 where masked.
    """

    hidden_p: Any
    hidden_q: Any
    kernel: Any
    bias: Any
    unary_log_probs: Any
    weight: Any


class _Chunks(NamedTuple):
    """Edges in chunks of one column offset and whole rows of p, so that reading q is one slice and one row gather.

    col: int32 [num_chunks]; p, q: int32 [num_chunks, rows], the map's rows; valid: float32 [num_chunks, rows].
    """

    col: jax.Array
    p: jax.Array
    q: jax.Array
    valid: jax.Array


def sum_over_edges(
    arrays: Differentiable,
    labels: jax.Array,
    mask: jax.Array,
    offsets: Offsets,
    sample: jax.Array | None,
    chunk_edges: int | None,
) -> jax.Array:
    """sum over edges of w_p w_q log P_V(y_p, y_q), float32 scalar.

    labels: int32 [B, H, W], 0 .. K - 1; mask: bool [B, H, W]; offsets: static pairs, at least one has an edge.
    """
    num_images, height, width, hidden = arrays.hidden_p.shape
    if chunk_edges is None:
        chunk_edges = costs.default_chunk_edges(arrays.bias.shape[-1], hidden)
    box, row_edges = np.array(offsets, np.int32), num_images * width
    if sample is None:
        rows, _ = costs.chunk_rows(offsets, height, row_edges, chunk_edges)
        chunks = _static_chunks(box, height, rows)
    else:
        chunks = _sampled_chunks(box, sample, height, min(height, max(1, chunk_edges // row_edges)))
    reach = int(np.abs(box[:, 1]).max())
    dtypes = tuple(None if x is None else x.dtype for x in arrays)
    total = _chunked_sum((reach, dtypes), *vary_together(arrays, labels, mask, chunks))
    return total if sample is None else total * (len(box) / sample.shape[0])


def _static_chunks(box: np.ndarray, height: int, rows: int) -> _Chunks:
    """All edges but those that leave the map sideways, which weigh 0."""
    groups = []
    for col in np.unique(box[:, 1]):
        down = box[box[:, 1] == col, 0]
        pairs = [(p, p + r) for r in down for p in range(max(0, -r), min(height, height - r))]
        groups += [(col, np.array(pairs, np.int32))] if pairs else []
    chunks = []
    for col, edges in groups:
        for i in range(0, len(edges), rows):
            part = edges[i : i + rows]
            fill = np.zeros((rows - len(part), 2), np.int32)
            p, q = np.concatenate([part, fill]).T
            chunks.append((col, p, q, np.arange(rows) < len(part)))
    col, p, q, valid = (np.stack(x) for x in zip(*chunks, strict=True))
    col, p, q = (jnp.asarray(x, jnp.int32) for x in (col, p, q))
    return _Chunks(col, p, q, jnp.asarray(valid, jnp.float32))


def _sampled_chunks(box: np.ndarray, sample: jax.Array, height: int, rows: int) -> _Chunks:
    """The same for offsets that are traced: every row of p, those without a q weigh 0."""
    blocks = -(-height // rows)
    p = jnp.arange(blocks * rows, dtype=jnp.int32).reshape(1, blocks, rows)
    offset = jnp.asarray(box)[sample]
    q = p + offset[:, 0, None, None]
    valid = (p < height) & (q >= 0) & (q < height)
    p, q = (jnp.broadcast_to(jnp.clip(x, 0, height - 1), q.shape).reshape(-1, rows) for x in (p, q))
    return _Chunks(jnp.repeat(offset[:, 1], blocks), p, q, valid.reshape(-1, rows).astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_sum(
    static: tuple[int, tuple[Any, ...]], arrays: Differentiable, labels: jax.Array, mask: jax.Array, chunks: _Chunks
) -> jax.Array:
    """sum over edges of w_p w_q log P_V(y_p, y_q); static: the largest |column offset|, and the dtypes of `arrays`."""
    return _Walk(static[0], arrays, labels, mask).sum(chunks)


def _chunked_sum_forward(
    static: tuple[int, tuple[Any, ...]], arrays: Differentiable, labels: jax.Array, mask: jax.Array, chunks: _Chunks
) -> tuple[jax.Array, Differentiable]:
    return _Walk(static[0], arrays, labels, mask).sum_and_gradient(chunks)


def _chunked_sum_backward(
    static: tuple[int, tuple[Any, ...]], gradients: Differentiable, cotangent: jax.Array
) -> tuple[Differentiable, None, None, None]:
    # The sum is a scalar, so its gradient, made on the way forward, only needs scaling. That comes before rounding: the
    # gradient of a sum over many edges may overflow half precision where that of a mean does not.
    scaled = (None if g is None else (cotangent * g).astype(t) for g, t in zip(gradients, static[1], strict=True))
    return Differentiable(*scaled), None, None, None


_chunked_sum.defvjp(_chunked_sum_forward, _chunked_sum_backward)


class _Edges(NamedTuple):
    """One chunk's edges, E = B rows W of them.

    hidden: [E, M], hidden units; scores: float32 [E, K^2]; label_pair: int32 [E, 1], (y_p, y_q) as one number; counts:
    bool [E, 1], both ends are in the mask; weight: float32 [E]; weight_p, weight_q: float32 [B, rows, W], of the ends.
    """

    hidden: jax.Array
    scores: jax.Array
    label_pair: jax.Array
    counts: jax.Array
    weight: jax.Array
    weight_p: jax.Array
    weight_q: jax.Array


class _Walk:
    """Walks the chunks: the sum over their edges, and its gradient."""

    def __init__(self, reach: int, arrays: Differentiable, labels: jax.Array, mask: jax.Array) -> None:
        m, k = arrays.kernel.shape[:2]
        self.reach, self.arrays, self.labels, self.mask = reach, arrays, labels, mask
        self.matrix = arrays.kernel.reshape(m, k * k).astype(arrays.hidden_p.dtype)
        self.bias = arrays.bias.reshape(k * k).astype(jnp.float32)
        self.unary = None if arrays.unary_log_probs is None else arrays.unary_log_probs.astype(jnp.float32)
        at_q = {"hidden": arrays.hidden_q, "label": labels, "mask": mask, "weight": arrays.weight}
        at_q = {name: x.reshape(*labels.shape, -1) for name, x in at_q.items()}
        if self.unary is not None:
            at_q["unary"] = self.unary
        self.at_q = {name: self._border(x) for name, x in at_q.items()}

    def _border(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] with a border, so that a slice of columns is a shift; weights in it are 0."""
        return jnp.pad(x, ((0, 0), (0, 0), (self.reach, self.reach), (0, 0)))

    def _crop(self, x: jax.Array) -> jax.Array:
        return x[:, :, self.reach : self.reach + self.labels.shape[2]]

    def sum(self, chunks: _Chunks) -> jax.Array:
        """float32 scalar."""

        def body(state: dict[str, jax.Array], chunk: _Chunks) -> tuple[dict[str, jax.Array], None]:
            total, *_ = self._add(state["total"], self._read(chunk))
            return {"total": total}, None

        # Rematerialised for the sake of second derivatives.
        return jax.lax.scan(jax.checkpoint(body), {"total": self._zeros()}, chunks)[0]["total"]

    def sum_and_gradient(self, chunks: _Chunks) -> tuple[jax.Array, Differentiable]:
        """float32 scalar, and its gradients in float32."""
        num_images, height, width, m = self.arrays.hidden_p.shape
        k = self.arrays.bias.shape[-1]
        state = {"total": self._zeros(), "matrix": self._zeros(*self.matrix.shape), "bias": self._zeros(k * k)}
        for name, channels in (("hidden", m), ("weight", 1), *([] if self.unary is None else [("unary", k)])):
            of_nodes = self._zeros(num_images, height, width, channels)
            state |= {name + "_p": of_nodes, name + "_q": self._border(of_nodes)}

        def body(state: dict[str, jax.Array], chunk: _Chunks) -> tuple[dict[str, jax.Array], None]:
            edges = self._read(chunk)
            total, value, exp, norm = self._add(state["total"], edges)
            picked = edges.label_pair == jnp.arange(k * k, dtype=jnp.int32)[None]
            d_scores = jnp.where(picked, edges.weight[:, None], 0.0) - exp * (edges.weight[:, None] / norm)
            return {"total": total} | self._add_gradients(state, chunk, edges, d_scores, value), None

        state, _ = jax.lax.scan(jax.checkpoint(body), state, chunks)
        return state["total"], Differentiable(
            hidden_p=state["hidden_p"],
            hidden_q=self._crop(state["hidden_q"]),
            kernel=state["matrix"].reshape(self.arrays.kernel.shape),
            bias=state["bias"].reshape(self.arrays.bias.shape),
            unary_log_probs=None if self.unary is None else state["unary_p"] + self._crop(state["unary_q"]),
            weight=(state["weight_p"] + self._crop(state["weight_q"]))[..., 0],
        )

    def _zeros(self, *shape: int) -> jax.Array:
        return jnp.zeros_like(self.arrays.hidden_p, shape=shape, dtype=jnp.float32)

    def _read(self, chunk: _Chunks) -> _Edges:
        (num_images, _, width), k = self.labels.shape, self.arrays.bias.shape[-1]
        shift = lambda x: jax.lax.dynamic_slice_in_dim(x, self.reach + chunk.col, width, axis=2)
        edges = lambda x: x.reshape(num_images * len(chunk.p) * width, *x.shape[3:])
        q = {name: shift(x)[:, chunk.q] for name, x in self.at_q.items()}
        weight_p = self.arrays.weight[:, chunk.p] * chunk.valid[None, :, None]
        weight = edges(weight_p * q["weight"][..., 0])
        # What masked nodes hold, NaN and infinities too, reaches neither the sum nor gradients; nor do rows beyond.
        counts = edges(self.mask[:, chunk.p] & q["mask"][..., 0] & (chunk.valid[None, :, None] > 0))[:, None]
        hidden = jax.nn.relu(jnp.where(counts, edges(self.arrays.hidden_p[:, chunk.p] + q["hidden"]), 0))
        scores = matmul(hidden, self.matrix) + self.bias[None]
        if self.unary is not None:
            at_p, at_q = (jnp.where(counts, edges(e), 0) for e in (self.unary[:, chunk.p], q["unary"]))
            scores = scores + (at_p[:, :, None] + at_q[:, None, :]).reshape(scores.shape)
        label_pair = edges(self.labels[:, chunk.p] * k + q["label"][..., 0])[:, None]
        return _Edges(hidden, scores, label_pair, counts, weight, weight_p, q["weight"][..., 0])

    def _add(self, total: jax.Array, edges: _Edges) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(new total, log-likelihoods [E], exp of the scores less the highest [E, K^2], their sum [E, 1])."""
        # Spelt out because the gradient reuses the exponentials.
        highest = jax.lax.stop_gradient(jnp.max(edges.scores, axis=-1, keepdims=True))
        exp = jnp.exp(edges.scores - highest)
        norm = jnp.sum(exp, axis=-1, keepdims=True)
        value = jnp.take_along_axis(edges.scores, edges.label_pair, axis=-1) - highest - jnp.log(norm)
        value = jnp.where(edges.counts, value, 0.0)[:, 0]
        # Labels that are ruled out have -inf, and an edge that weighs nothing may have them.
        return total + jnp.sum(jnp.where(edges.weight == 0, 0.0, edges.weight * value)), value, exp, norm

    def _add_gradients(
        self, state: dict[str, jax.Array], chunk: _Chunks, edges: _Edges, d_scores: jax.Array, value: jax.Array
    ) -> dict[str, jax.Array]:
        narrow = d_scores.astype(self.arrays.hidden_p.dtype)
        d_hidden = jnp.where(edges.hidden > 0, matmul(narrow, self.matrix.T), 0.0)
        new = {"bias": state["bias"] + jnp.sum(d_scores, axis=0)}
        new["matrix"] = state["matrix"] + matmul(edges.hidden.T, narrow)

        def add(name: str, at_p: jax.Array, at_q: jax.Array) -> None:
            """Adds what flows to p, and to q through the shift."""
            new[name + "_p"] = _add_rows(state[name + "_p"], chunk.p, at_p)
            start, width = self.reach + chunk.col, self.labels.shape[2]
            old = jax.lax.dynamic_slice_in_dim(state[name + "_q"], start, width, axis=2)
            shifted = _add_rows(old, chunk.q, at_q)
            new[name + "_q"] = jax.lax.dynamic_update_slice_in_dim(state[name + "_q"], shifted, start, axis=2)

        add("hidden", d_hidden, d_hidden)
        value = value.reshape(edges.weight_p.shape)
        to_p = value * edges.weight_q * chunk.valid[None, :, None]
        add("weight", to_p[..., None], (value * edges.weight_p)[..., None])
        if self.unary is not None:
            pair = d_scores.reshape(-1, *self.arrays.bias.shape)
            add("unary", jnp.sum(pair, axis=2), jnp.sum(pair, axis=1))
        return new


def _add_rows(total: jax.Array, rows: jax.Array, x: jax.Array) -> jax.Array:
    """total [B, H, W, C] plus x, given per row of a chunk, at these rows."""
    # A scatter as a product with zeros and ones: always summed in one order, on any device.
    select = jax.nn.one_hot(rows, total.shape[1], axis=0, dtype=jnp.float32)
    select = jnp.broadcast_to(select, (total.shape[0], *select.shape))
    return total + matmul(select, x.reshape(total.shape[0], len(rows), -1)).reshape(total.shape)
