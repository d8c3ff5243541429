"""Should a hand-written kernel send the messages on a GPU: `messages._send` by XLA against a Pallas kernel.

    python benchmarks/fused_messages.py [--quick]

XLA writes the hidden layer of the edges, relu(S_s + R_r), and reads it back for a batched product with K columns: some
12 bytes a hidden unit against 2 K flops. In the kernel it never leaves the chip. To enter the package it must be more
than 1.3 times as fast. One direction of one relation, in a loop of mean-field iterations, interleaved repeats in one
process, medians. Each tile size is a candidate of its own, and so is each chunk size of XLA's; the ratio is that of the
fastest of both. A candidate that fails, or disagrees, is reported and does not stop the run. Products are of default
precision in both (TF32 where the GPU has it); agreement is also checked with the highest.

On a CPU only agreement is checked, in interpret mode, on tiny shapes. Ends with one line of JSON.

Pallas' Triton backend, which the kernel is written for, is deprecated as of jax 0.11: to be weighed with the ratio.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from pwcrf_jax import costs, relations
from pwcrf_jax.messages import _send

WORTH = 1.3
"""The ratio above which the kernel would enter the package."""

G_BYTES = 2**29
"""The most of G, N M K in float32 (338 MB for 29 x 38 nodes, M = 512, K = 150), that is formed at a time."""


class Tile(NamedTuple):
    """What one program holds at a time; offsets and hidden are powers of two, at least 16 (Triton's products)."""

    offsets: int = 64
    hidden: int = 64
    warps: int = 4
    stages: int = 2


TILES = (
    Tile(),
    Tile(64, 32, 4, 3),
    Tile(64, 128, 8, 2),
    Tile(128, 32, 4, 3),
    Tile(128, 32, 8, 3),
    Tile(128, 64, 8, 2),
    Tile(32, 64, 4, 2),
)


def column_parts(k: int) -> tuple[tuple[int, int], ...]:
    """K rounded up to a multiple of 16, as (start, size) of columns, sizes powers of two: 150 is 128 + 32."""
    parts, start, rest = [], 0, -(-k // 16) * 16
    while rest:
        size = 1 << (rest.bit_length() - 1)
        parts.append((start, size))
        start, rest = start + size, rest - size
    return tuple(parts)


def fused_send(sender, receiver, sent, box, kernel, bias, interpret=False, tile=None, g_bytes=G_BYTES):
    """`messages._send` with the hidden layer kept on the chip; arguments and result are its own.

    sender, receiver: [B, H, W, M]; sent: float32 [B, H, W, K]; box: static int [num_offsets, 2]; kernel: [K, M, K] and
    bias [K, K], the sender's label first. Returns float32 [B, H, W, K].

    XLA forms G and sums up the messages, [nodes, offsets, K] in float32; the kernel makes the messages from G.
    tile: a `Tile`, None for the default. g_bytes: nodes are taken in blocks whose G is at most so large.
    """
    num_images, height, width, m = sender.shape
    k, nodes, box = sent.shape[-1], num_images * height * width, np.asarray(box, np.int32)
    power = lambda size: max(16, pl.next_power_of_2(size))
    tile = Tile() if tile is None else tile
    tile = tile._replace(offsets=min(tile.offsets, power(len(box))), hidden=min(tile.hidden, power(m)))
    parts = column_parts(k)
    to = lambda size, multiple: -(-size // multiple) * multiple
    wide_k, wide_m, wide_box = sum(parts[-1]), to(m, tile.hidden), to(len(box), tile.offsets)
    blocks = -(-nodes * wide_m * wide_k * 4 // g_bytes)
    block = -(-nodes // min(blocks, nodes))
    blocks = -(-nodes // block)

    # Everything is padded with zeros beforehand, so the kernel has no masks: hidden units beyond M are relu(0), what
    # leaves the map is read from the border, and offsets beyond the box are the node itself; nobody reads the messages
    # of the last two.
    reach_row, reach_col = (int(x) for x in np.abs(box).max(axis=0))
    pad_to = lambda x, axis, size: jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])
    border = ((0, 0), (reach_row, reach_row), (reach_col, reach_col), (0, wide_m - m))
    rows = jnp.pad(receiver, border).reshape(-1, wide_m)
    full_width = width + 2 * reach_col
    image, row, col = jnp.unravel_index(jnp.arange(nodes, dtype=jnp.int32), (num_images, height, width))
    base = (image * (height + 2 * reach_row) + row + reach_row) * full_width + col + reach_col
    base = jnp.pad(base, (0, blocks * block - nodes), mode="edge")  # what fills up a block reads where a node does
    shift = np.zeros(wide_box, np.int32)
    shift[: len(box)] = box[:, 0] * full_width + box[:, 1]
    # G is [nodes, K, M]: TF32 products read both factors along M.
    kernel = jnp.swapaxes(pad_to(pad_to(kernel, 1, wide_m), 2, wide_k), 1, 2)
    bias = pad_to(bias, 1, wide_k)
    cut = lambda x: x.reshape(blocks, block, *x.shape[1:])
    per_block = lambda x: cut(pad_to(x, 0, blocks * block))

    def send(nodes_of_block):
        base, sender, sent = nodes_of_block
        gathered = jnp.einsum("nl,lkm->nkm", sent, kernel).astype(sender.dtype)
        constant = jnp.einsum("nl,lk->nk", sent, bias)
        # One program per sender and tile of offsets. By receiver there would be nothing left to sum up, but every edge
        # would read a G of its own, a product of one row: M K floats for 2 M K flops. By sender G serves the whole box.
        return pl.pallas_call(
            functools.partial(_send_kernel, hidden_tile=tile.hidden, parts=parts),
            out_shape=jax.ShapeDtypeStruct((block, wide_box, wide_k), jnp.float32),
            grid=(block, wide_box // tile.offsets),
            in_specs=[
                pl.BlockSpec((1,), lambda s, t: (s,)),
                pl.BlockSpec((tile.offsets,), lambda s, t: (t,)),
                pl.BlockSpec((None, wide_m), lambda s, t: (s, 0)),
                pl.BlockSpec(rows.shape, lambda s, t: (0, 0)),
                pl.BlockSpec((None, wide_k, wide_m), lambda s, t: (s, 0, 0)),
                pl.BlockSpec((None, wide_k), lambda s, t: (s, 0)),
            ],
            out_specs=pl.BlockSpec((None, tile.offsets, wide_k), lambda s, t: (s, t, 0)),
            compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=interpret,
            name="fused_send",
        )(base, jnp.asarray(shift), sender, rows, gathered, constant)

    sender = pad_to(sender, 3, wide_m).reshape(nodes, wide_m)
    message = jax.lax.map(send, (cut(base), per_block(sender), per_block(sent.reshape(nodes, k))))
    # No scatter: every node reads what the nodes r - offset sent to it, and sums it up in a fixed order.
    from_row, from_col = (x[:, None] - box[:, i] for i, x in ((0, row), (1, col)))
    inside = (from_row >= 0) & (from_row < height) & (from_col >= 0) & (from_col < width)
    source = (image[:, None] * height + from_row) * width + from_col
    source = jnp.where(inside, source * wide_box + np.arange(len(box), dtype=np.int32), blocks * block * wide_box)
    message = jnp.take(message.reshape(-1, wide_k), source, axis=0, mode="fill", fill_value=0)
    return jnp.sum(message, axis=1)[:, :k].reshape(num_images, height, width, k)


def _send_kernel(base, shift, sender, receiver, gathered, constant, message, *, hidden_tile, parts):
    """Messages of one sender to a tile of offsets; refs in the order of `in_specs`, then the result's."""
    ends = base[0] + shift[...]

    def step(i, sums):
        units = pl.ds(i * hidden_tile, hidden_tile)
        # Summed in float32: not every GPU adds bfloat16.
        hidden = receiver[ends, units].astype(jnp.float32) + sender[units].astype(jnp.float32)[None]
        hidden = jnp.maximum(hidden, 0.0).astype(sender.dtype)
        return tuple(
            total + jnp.dot(hidden, gathered[pl.ds(*part), units].T, preferred_element_type=jnp.float32)
            for total, part in zip(sums, parts, strict=True)
        )

    start = tuple(jnp.broadcast_to(constant[pl.ds(*part)][None], (len(ends), part[1])) for part in parts)
    steps = sender.shape[0] // hidden_tile
    for part, total in zip(parts, jax.lax.fori_loop(0, steps, step, start), strict=True):
        message[:, pl.ds(*part)] = total


# --------------------------------------------------------------------------------------------------- the run


def problem(height, width, k, hidden, dtype, box=None, num_images=1, seed=0):
    """Random arguments of `fused_send`; box None: all of `relations.SURROUNDING`."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    box = relations.offsets(relations.SURROUNDING, height, width) if box is None else np.asarray(box)
    sender, receiver = (draw(num_images, height, width, hidden).astype(dtype) for _ in range(2))
    sent = jax.nn.softmax(draw(num_images, height, width, k))
    return sender, receiver, sent, box, draw(k, hidden, k) / hidden**0.5, draw(k, k)


def error(got, expected):
    """Largest difference, as a part of the largest value."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def reference(sender, receiver, sent, box, kernel, bias):
    wide = (x.astype(jnp.float32) for x in (sender, receiver))
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda a, b, *rest: _send(a, b, rest[0], box, *rest[1:], 4096))(*wide, sent, kernel, bias)


def close_enough(dtype):
    """Of the reference, for products of default precision: 8 bits of bfloat16, 11 of TF32."""
    return 2e-2 if dtype == jnp.bfloat16 else 5e-3


def check_on_cpu(quick):
    """Interpret mode against XLA on tiny shapes."""
    print("no GPU: agreement alone, in interpret mode; times there mean nothing")
    sizes = [(5, 6, 3, 64), (4, 5, 21, 24)] + ([] if quick else [(6, 7, 60, 64), (3, 4, 21, 512)])
    for height, width, k, hidden in sizes:
        for dtype in (jnp.float32, jnp.bfloat16):
            box = [(r, c) for r in range(-2, 3) for c in range(-2, 3) if (r, c) != (0, 0)]
            sender, receiver, sent, box, kernel, bias = problem(height, width, k, hidden, dtype, box)
            got = fused_send(sender, receiver, sent, box, kernel, bias, interpret=True, tile=Tile(16, 32))
            expected = _send(sender, receiver, sent, box, kernel, bias, 4096)
            worst, allowed = error(got, expected), 1e-5 if dtype == jnp.float32 else 1e-3
            print(f"{height} x {width}, {hidden:3d} hidden, {k:2d} classes, {dtype.__name__:8s}: error {worst:.1e}")
            if not worst <= allowed:
                raise SystemExit(f"the kernel and XLA differ by {worst:.1e}, more than {allowed:.0e}")


def iterate(send, iterations):
    """Mean-field iterations, in which each message depends on the one before it; gives all messages."""

    def run(sender, receiver, sent, kernel, bias):
        def body(sent, _):
            message = send(sender, receiver, sent, kernel, bias)
            return jax.nn.softmax(message), message

        return jax.lax.scan(body, sent, None, length=iterations)[1]

    return jax.jit(run)


def first_line(exception):
    return (str(exception).strip().splitlines() or [type(exception).__name__])[0][:200]


def measure(size, k, dtype, tiles, chunks, repeats, iterations):
    """Rows of every candidate of both for one problem; "exact" is a kernel at the highest precision, not timed."""
    sender, receiver, sent, box, kernel, bias = problem(*size[:2], k, size[2], dtype)
    arrays, expected = (sender, receiver, sent, kernel, bias), reference(sender, receiver, sent, box, kernel, bias)
    kernel = lambda tile: lambda a, b, sent, kernel, bias: fused_send(a, b, sent, box, kernel, bias, tile=tile)
    xla = lambda chunk: lambda a, b, sent, kernel, bias: _send(a, b, sent, box, kernel, bias, chunk)
    default = costs.default_chunk_edges(k, size[2], messages=True)
    sends = [({"method": "xla", "chunk_edges": chunk}, xla(chunk)) for chunk in dict.fromkeys((default, *chunks))]
    if dtype == jnp.float32:
        sends.append(({"method": "exact", "tile": list(tiles[0])}, kernel(tiles[0])))
    sends += [({"method": "kernel", "tile": list(tile)}, kernel(tile)) for tile in tiles]
    rows, runs = [], {}
    for row, send in sends:
        rows.append(row | {"classes": k, "dtype": dtype.__name__, "seconds": None, "error": None, "failed": None})
        exact = row["method"] == "exact"
        try:
            run = iterate(send, iterations)
            with jax.default_matmul_precision("highest" if exact else None):
                rows[-1]["error"] = worst = error(run(*arrays)[0], expected)
            if not worst <= (1e-5 if exact else close_enough(dtype)):
                raise ValueError(f"disagrees by {worst:.1e}")
            if not exact:
                runs[len(rows) - 1] = run
        except Exception as e:  # of any kind: compilers, memory, disagreement
            rows[-1]["failed"] = first_line(e)
    seconds = {i: [] for i in runs}
    for _ in range(repeats):
        for i, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            seconds[i].append((time.perf_counter() - start) / iterations)
    for i, values in seconds.items():
        rows[i]["seconds"] = statistics.median(values)
    for row in rows:
        what = f"chunks of {row['chunk_edges']}" if row["method"] == "xla" else f"tile {tuple(row['tile'])}"
        time_ms = "       -" if row["seconds"] is None else f"{1e3 * row['seconds']:8.3f}"
        result = f"failed: {row['failed']}" if row["failed"] else f"{time_ms}  {row['error']:.1e}"
        print(f"{k:7d} {row['dtype']:8s} {row['method']:6s} {what:22s} {result}", flush=True)
    return rows


def best_ratio(rows):
    """The fastest of XLA's over the fastest kernel; None where either has no time."""
    best = {
        method: min((row["seconds"] for row in rows if row["method"] == method and row["seconds"]), default=None)
        for method in ("xla", "kernel")
    }
    return None if None in best.values() else round(best["xla"] / best["kernel"], 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small map, two tiles, three repeats")
    args = parser.parse_args()
    out, dtypes, classes = {"device": jax.devices()[0].device_kind}, (jnp.float32, jnp.bfloat16), (21, 60, 150)
    ratios, rows = {(k, dtype): None for k in classes for dtype in dtypes}, []
    if jax.default_backend() != "gpu":
        check_on_cpu(args.quick)
    else:
        size, tiles, chunks, repeats = (29, 38, 512), TILES, (2**14, 2**16, 2**18), 20
        if args.quick:
            size, tiles, chunks, repeats = (12, 16, 64), TILES[:2], (2**14,), 3
        print("classes dtype    method candidate              ms a message, error")
        for k, dtype in ratios:
            found = measure(size, k, dtype, tiles, chunks, repeats, iterations=10)
            ratios[k, dtype] = best_ratio(found)
            print(f"{k:7d} {dtype.__name__:8s} best ratio {ratios[k, dtype]}", flush=True)
            rows += found
    name = lambda k, dtype: f"k{k}" + ("" if dtype == jnp.float32 else "_bfloat16")
    out |= {f"best_ratio_{name(*key)}": ratio for key, ratio in ratios.items()}
    worth = {name(*key): ratio is not None and ratio > WORTH for key, ratio in ratios.items()}
    exact = not any(row["failed"] for row in rows if row["method"] == "exact")
    out |= {
        "adopt": all(worth.values()) and exact if rows else None,
        "adopt_where": [key for key, is_worth in worth.items() if is_worth],
    }
    print(json.dumps(out | {"rows": rows}))


if __name__ == "__main__":
    main()
