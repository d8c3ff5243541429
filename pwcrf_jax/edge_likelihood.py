"""The sum of edge log-likelihoods of a factored pairwise potential, and its gradient in the same pass.

`pwcrf_jax.pairwise.edge_log_likelihood` is the way in; equations in docs/math.md, "Full range". Everything here has
one batch axis: arrays [B, H, W, ...].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import costs
from pwcrf_jax.arrays import matmul, vary_together


def sum_over_edges(a, b, w2, b2, evidence, weight, labels, mask, offsets, chunk_edges=None, sample=None):
    """sum over edges of w_p w_q log P_V(y_p, y_q), float32 scalar; differentiable in the first six.

    Args:
      a, b: float [B, H, W, M], of one dtype; w2: [M, K, K]; b2: [K, K]; evidence: [B, H, W, K] or None.
      weight: float32 [B, H, W], 0 where masked; labels: int32 [B, H, W], 0 .. K - 1; mask: bool [B, H, W].
      offsets: static pairs, at least one of which has an edge; chunk_edges, sample: of `edge_log_likelihood`.
    """
    num_images, height, width, hidden = a.shape
    if chunk_edges is None:
        chunk_edges = costs.default_chunk_edges(b2.shape[-1], hidden)
    box, row_edges = np.array(offsets, np.int32), num_images * width
    if sample is None:
        rows, _ = costs.chunk_rows(offsets, height, row_edges, chunk_edges)
        chunks = _static_chunks(box, height, rows)
    else:
        chunks = _sampled_chunks(box, sample, height, min(height, max(1, chunk_edges // row_edges)))
    reach = int(np.abs(box[:, 1]).max())
    dtypes = tuple(None if x is None else x.dtype for x in (a, b, w2, b2, evidence, weight))
    arrays = vary_together(a, b, w2, b2, evidence, weight, labels, mask, chunks)
    total = _chunked_sum((reach, dtypes), *arrays)
    return total if sample is None else total * (len(box) / sample.shape[0])


class _Chunks(NamedTuple):
    """Edges in chunks of one column offset and whole rows of p, so that reading q is one slice and one row gather.

    col: int32 [num_chunks]; p, q: int32 [num_chunks, rows], the map's rows; valid: float32 [num_chunks, rows].
    """

    col: jax.Array
    p: jax.Array
    q: jax.Array
    valid: jax.Array


def _static_chunks(box, height, rows):
    """All edges but those that leave the map sideways, which weigh 0."""
    groups = []
    for col in np.unique(box[:, 1]):
        down = box[box[:, 1] == col, 0]
        pairs = [(p, p + r) for r in down for p in range(max(0, -r), min(height, height - r))]
        groups += [(col, np.array(pairs, np.int32))] if pairs else []
    chunks = []
    for col, pairs in groups:
        for i in range(0, len(pairs), rows):
            part = pairs[i : i + rows]
            fill = np.zeros((rows - len(part), 2), np.int32)
            p, q = np.concatenate([part, fill]).T
            chunks.append((col, p, q, np.arange(rows) < len(part)))
    col, p, q, valid = (np.stack(x) for x in zip(*chunks, strict=True))
    return _Chunks(*(jnp.asarray(x, jnp.int32) for x in (col, p, q)), jnp.asarray(valid, jnp.float32))


def _sampled_chunks(box, sample, height, rows):
    """The same for offsets that are traced: every row of p, those without a q weigh 0."""
    blocks = -(-height // rows)
    p = jnp.arange(blocks * rows, dtype=jnp.int32).reshape(1, blocks, rows)
    offset = jnp.asarray(box)[sample]
    q = p + offset[:, 0, None, None]
    valid = (p < height) & (q >= 0) & (q < height)
    p, q = (jnp.broadcast_to(jnp.clip(x, 0, height - 1), q.shape).reshape(-1, rows) for x in (p, q))
    return _Chunks(jnp.repeat(offset[:, 1], blocks), p, q, valid.reshape(-1, rows).astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_sum(static, a, b, w2, b2, evidence, weight, labels, mask, chunks):
    """sum over edges of w_p w_q log P_V(y_p, y_q); arrays [B, H, W, ...].

    static: the largest |column offset|, and the dtypes of what is differentiated, (a, b, w2, b2, evidence, weight).
    """
    return _walk_chunks(static[0], a, b, w2, b2, evidence, weight, labels, mask, chunks, gradient=False)[0]


def _chunked_sum_forward(static, a, b, w2, b2, evidence, weight, labels, mask, chunks):
    return _walk_chunks(static[0], a, b, w2, b2, evidence, weight, labels, mask, chunks, gradient=True)


def _chunked_sum_backward(static, gradients, cotangent):
    # The sum is a scalar, so its gradient, made on the way forward, only needs scaling. That comes before rounding: the
    # gradient of a sum over many edges may overflow half precision where that of a mean does not.
    scaled = (None if g is None else (cotangent * g).astype(t) for g, t in zip(gradients, static[1], strict=True))
    return *scaled, None, None, None


_chunked_sum.defvjp(_chunked_sum_forward, _chunked_sum_backward)


def _walk_chunks(reach, a, b, w2, b2, evidence, weight, labels, mask, chunks, gradient):
    """Returns (sum, gradients): float32 gradients of (a, b, w2, b2, evidence, weight), or None."""
    num_images, height, width, m = a.shape
    k = b2.shape[-1]
    matrix, bias = w2.reshape(m, k * k).astype(a.dtype), b2.reshape(k * k).astype(jnp.float32)
    border = lambda x: jnp.pad(x, ((0, 0), (0, 0), (reach, reach), (0, 0)))
    # What is read at q, with a border so that a slice of columns is a shift; weights in it are 0.
    at_q = {"b": b, "label": labels[..., None], "mask": mask[..., None], "weight": weight[..., None]}
    if evidence is not None:
        evidence = evidence.astype(jnp.float32)
        at_q["evidence"] = evidence
    at_q = {name: border(x) for name, x in at_q.items()}

    def add_rows(total, rows, x):
        # A scatter as a product with zeros and ones: always summed in one order, on any device.
        select = jax.nn.one_hot(rows, height, axis=0, dtype=jnp.float32)
        select = jnp.broadcast_to(select, (num_images, *select.shape))
        flat = matmul(select, x.reshape(num_images, len(rows), -1))
        return total + flat.reshape(total.shape)

    def body(state, chunk):
        shift = lambda x: jax.lax.dynamic_slice_in_dim(x, reach + chunk.col, width, axis=2)
        edges = lambda x: x.reshape(num_images * len(chunk.p) * width, *x.shape[3:])
        q = {name: shift(x)[:, chunk.q] for name, x in at_q.items()}
        weight_p = weight[:, chunk.p] * chunk.valid[None, :, None]
        edge_weight = edges(weight_p * q["weight"][..., 0])
        # What masked nodes hold, NaN and infinities too, reaches neither the sum nor gradients; nor do rows beyond.
        counts = edges(mask[:, chunk.p] & q["mask"][..., 0] & (chunk.valid[None, :, None] > 0))[:, None]
        hidden = jax.nn.relu(jnp.where(counts, edges(a[:, chunk.p] + q["b"]), 0))
        scores = matmul(hidden, matrix) + bias[None]
        if evidence is not None:
            at_p, at_q_end = (jnp.where(counts, edges(e), 0) for e in (evidence[:, chunk.p], q["evidence"]))
            scores = scores + (at_p[:, :, None] + at_q_end[:, None, :]).reshape(scores.shape)
        index = edges(labels[:, chunk.p] * k + q["label"][..., 0])[:, None]
        # Spelt out because the gradient below reuses the exponentials.
        highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        exp = jnp.exp(scores - highest)
        norm = jnp.sum(exp, axis=-1, keepdims=True)
        value = jnp.take_along_axis(scores, index, axis=-1) - highest - jnp.log(norm)
        value = jnp.where(counts, value, 0.0)[:, 0]
        # Labels that are ruled out have -inf, and an edge that weighs nothing may have them.
        total = state["total"] + jnp.sum(jnp.where(edge_weight == 0, 0.0, edge_weight * value))
        if not gradient:
            return {"total": total}
        picked = index == jnp.arange(k * k, dtype=jnp.int32)[None]
        d_scores = jnp.where(picked, edge_weight[:, None], 0.0) - exp * (edge_weight[:, None] / norm)
        narrow = d_scores.astype(a.dtype)
        d_hidden = matmul(narrow, matrix.T)
        d_hidden = jnp.where(hidden > 0, d_hidden, 0.0)
        new = dict(total=total, bias=state["bias"] + jnp.sum(d_scores, axis=0))
        new["matrix"] = state["matrix"] + matmul(hidden.T, narrow)

        def add(name, at_p, at_q):
            """Adds what flows to p, and to q through the shift."""
            new[name + "_p"] = add_rows(state[name + "_p"], chunk.p, at_p)
            old = jax.lax.dynamic_slice_in_dim(state[name + "_q"], reach + chunk.col, width, axis=2)
            shifted = add_rows(old, chunk.q, at_q)
            new[name + "_q"] = jax.lax.dynamic_update_slice_in_dim(
                state[name + "_q"], shifted, reach + chunk.col, axis=2
            )

        add("hidden", d_hidden, d_hidden)
        value = value.reshape(weight_p.shape)
        to_p = value * q["weight"][..., 0] * chunk.valid[None, :, None]
        add("weight", to_p[..., None], (value * weight_p)[..., None])
        if evidence is not None:
            pair = d_scores.reshape(-1, k, k)
            add("evidence", jnp.sum(pair, axis=2), jnp.sum(pair, axis=1))
        return new

    zeros = lambda *shape: jnp.zeros_like(a, shape=shape, dtype=jnp.float32)
    state = {"total": zeros()}
    if gradient:
        state |= {"matrix": zeros(*matrix.shape), "bias": zeros(*bias.shape)}
        for name, channels in (("hidden", m), ("weight", 1), *([] if evidence is None else [("evidence", k)])):
            of_nodes = zeros(num_images, height, width, channels)
            state |= {name + "_p": of_nodes, name + "_q": border(of_nodes)}
    # Rematerialised for the sake of second derivatives.
    step = jax.checkpoint(lambda state, chunk: (body(state, chunk), None))
    state, _ = jax.lax.scan(step, state, chunks)
    if not gradient:
        return state["total"], None
    crop = lambda x: x[:, :, reach : reach + width]
    gradients = (
        state["hidden_p"],
        crop(state["hidden_q"]),
        state["matrix"].reshape(w2.shape),
        state["bias"].reshape(b2.shape),
        None if evidence is None else state["evidence_p"] + crop(state["evidence_q"]),
        (state["weight_p"] + crop(state["weight_q"]))[..., 0],
    )
    return state["total"], gradients
