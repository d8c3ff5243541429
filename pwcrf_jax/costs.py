"""Costs of the pairwise parts, from shapes alone: multiply-adds, bytes of temporaries, and the choices made by them.

Everything here is plain Python arithmetic on static shapes. Bytes are those of the temporaries of the compiled program
in float32, checked against XLA's `memory_analysis` on a CPU; multiply-adds are those carried out, masked and padded
edges included, checked against its `cost_analysis`. Both agree within 20 % where the work takes several steps; maps so
small that all fits one step, some MB, take up to twice the bytes. In bfloat16 a CPU needs more: it computes in float32.

Notation: N nodes of all images, O offsets, M hidden units, K classes, C edges of a chunk, S senders of a step.
Arguments that the functions share, all of them Python integers:

* offsets: the (row, column) pairs of a relation, O of them; height, width: the map's, in cells; batch: images.
* num_classes: K; hidden: M; itemsize: bytes of a number of the first layer's parts, 4 for float32.
* chunk_edges: edges held at a time; None: chosen by `default_chunk_edges`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Offsets = Sequence[tuple[int, int]] | np.ndarray

CHUNK_BYTES = 2**23
"""Size of the arrays of one chunk; some MiB, which a CPU's cache holds, were the fastest there."""

TABLE_BYTES = 2**29
"""The most that the algorithm "auto" stores as scores of one relation."""

# Constants of the cost model of `algorithm`, in multiply-adds of a large matrix product (some 7 ps); fitted to
# measurements on two CPU cores, benchmarks/algorithms.py.
_HIDDEN = 20.0  # one hidden unit, relu(A_p + B_q)
_SMALL_PRODUCT = 2.5  # one multiply-add of the product of [O, M] and [M, K]
_EDGE = 4500.0  # reading and adding up at both ends of an edge
_WRITE = 100.0  # storing a score
_READ_ROW, _READ = 430.0, 17.0  # a label's row of stored scores, and each score in it


CHUNK_OVERHEAD = 64
"""The cost of a chunk by itself, in edges: starting it, and adding to the gradient of the last layer."""


class Cost(NamedTuple):
    """Cost of a computation.

    Attributes:
      multiply_adds: int, carried out.
      temp_bytes: int, bytes of its temporaries.
    """

    multiply_adds: int
    temp_bytes: int


def default_chunk_edges(num_classes: int, hidden: int, *, messages: bool = False) -> int:
    """How many edges to hold at a time where the caller does not say.

    Likelihood: C (K^2 + M) float32 make CHUNK_BYTES, but at least 1024 edges, below which matrix products are slow, and
    at most 16384. Messages: C (K + M) make half of it.

    Args:
      num_classes, hidden: K and M.
      messages: whether it is messages that are walked.

    Returns:
      int, edges.
    """
    if messages:
        return int(np.clip(CHUNK_BYTES // 2 // (4 * (num_classes + hidden)), 256, 16384))
    return int(np.clip(CHUNK_BYTES // (4 * (num_classes**2 + hidden)), 1024, 16384))


def sender_runs(num_offsets: int, rows: int, width: int, chunk_edges: int) -> tuple[int, int]:
    """How messages are walked; see `pwcrf_jax.messages.compute_messages`.

    Args:
      num_offsets: O.
      rows: of all images together.
      width: cells of a row.
      chunk_edges: the most edges of a step.

    Returns:
      (cells of a row that send together, such runs in one step), int. Runs and steps are of nearly equal size, so that
      few are padding.
    """
    even = lambda total, most: -(-total // -(-total // most))
    run = even(width, int(np.clip(chunk_edges // num_offsets, 1, width)))
    runs = chunk_edges // (num_offsets * width) if run == width else 1
    return run, even(rows, int(np.clip(runs, 1, rows)))


def chunk_rows(offsets: _Offsets, height: int, row_edges: int, chunk_edges: int) -> tuple[int, int]:
    """How the likelihood is walked.

    A chunk holds pairs of rows (that of p, that of q) of one column offset. Its size is that with the least to do,
    where an edge that only fills up a chunk costs as much as any, and a chunk as much as CHUNK_OVERHEAD edges.

    Args:
      offsets: (row, column) pairs.
      height: rows of the map.
      row_edges: edges of a pair of rows, images times width.
      chunk_edges: the most edges of a chunk.

    Returns:
      (rows of the map in a chunk, number of chunks), int.
    """
    groups: dict[int, int] = {}
    for down, right in offsets:
        groups[int(right)] = groups.get(int(right), 0) + max(0, height - abs(int(down)))
    chunks = lambda rows: sum(-(-pairs // rows) for pairs in groups.values())
    most = int(np.clip(chunk_edges // row_edges, 1, max(1, *groups.values(), 1)))
    rows = min(range(1, most + 1), key=lambda rows: chunks(rows) * (rows * row_edges + CHUNK_OVERHEAD))
    return rows, chunks(rows)


def pairwise_loss(
    offsets: _Offsets,
    height: int,
    width: int,
    num_classes: int,
    hidden: int,
    batch: int = 1,
    *,
    itemsize: int = 4,
    chunk_edges: int | None = None,
    num_sampled_offsets: int = 0,
) -> Cost:
    """Likelihood and gradient of one relation, `likelihood.pairwise_log_likelihood` of a factored potential.

    multiply_adds: edges walked * (3 M K^2 + 2 M H): the last layer, its two products backwards, and the summing of
    the gradient into the rows of both ends. temp_bytes: 4 (2 C K^2 + 3.25 C M), the gradient of the last layer before
    it is scaled, q's part of the first layer with its border of columns, and its gradient; flat in the number of
    offsets, but for the border.

    Args:
      offsets, height, width, num_classes, hidden, batch, itemsize, chunk_edges: see the module's docstring.
      num_sampled_offsets: how many of the offsets each step draws; 0: all of them.

    Returns:
      `Cost`.
    """
    if not len(offsets):
        return Cost(0, 0)
    if chunk_edges is None:
        chunk_edges = default_chunk_edges(num_classes, hidden)
    if num_sampled_offsets:
        rows = min(height, max(1, chunk_edges // (batch * width)))
        chunks = num_sampled_offsets * -(-height // rows)
    else:
        rows, chunks = chunk_rows(offsets, height, batch * width, chunk_edges)
    edges = rows * width * batch
    reach = max(abs(int(right)) for _, right in offsets)
    border = batch * height * (width + 2 * reach) * hidden * (itemsize + 4)
    return Cost(
        multiply_adds=chunks * edges * hidden * (3 * num_classes**2 + 2 * height),
        temp_bytes=edges * (8 * num_classes**2 + 13 * hidden) + 4 * hidden * num_classes**2 + border,
    )


def factored_messages(
    offsets: _Offsets,
    height: int,
    width: int,
    num_classes: int,
    hidden: int,
    batch: int = 1,
    *,
    itemsize: int = 4,
    chunk_edges: int | None = None,
) -> Cost:
    """Messages of one relation, once, both directions, without scores: algorithm "factored".

    multiply_adds: 2 N O M K + 2 N M K^2 (the products with G, and G). temp_bytes: S O (M + K) of a step, its G, the
    last layer once per direction, the first layer's parts and the messages with their borders; flat in the number of
    offsets, but for the border.

    Args:
      offsets, height, width, num_classes, hidden, batch, itemsize, chunk_edges: see the module's docstring.

    Returns:
      `Cost`.
    """
    if not len(offsets):
        return Cost(0, 0)
    if chunk_edges is None:
        chunk_edges = default_chunk_edges(num_classes, hidden, messages=True)
    run, runs = sender_runs(len(offsets), batch * height, width, chunk_edges)
    padded = -(-width // run) * run
    nodes, senders = batch * height * padded, run * runs
    reach_row, reach_col = (max(abs(int(offset[axis])) for offset in offsets) for axis in (0, 1))
    bordered = batch * (height + 2 * reach_row) * (padded + 2 * reach_col)
    copies = 2 if padded == width else 4
    return Cost(
        multiply_adds=2 * nodes * hidden * num_classes * (len(offsets) + num_classes),
        temp_bytes=senders * (len(offsets) * (hidden * itemsize + num_classes * 4) + hidden * num_classes * 4)
        + 8 * hidden * num_classes**2
        + (bordered + copies * nodes) * hidden * itemsize
        + (bordered + 2 * nodes) * num_classes * 4,
    )


def table_messages(
    offsets: _Offsets,
    height: int,
    width: int,
    num_classes: int,
    hidden: int,
    batch: int = 1,
    *,
    num_iterations: int = 3,
) -> Cost:
    """Messages of one relation, `num_iterations` times, from stored scores: `messages.prepare_messages`, "table".

    multiply_adds: N O M K^2 once, and 2 N O K^2 an iteration. temp_bytes: 4 N O K^2, the scores in float32.

    Args:
      offsets, height, width, num_classes, hidden, batch: see the module's docstring.
      num_iterations: how many times messages are computed.

    Returns:
      `Cost`.
    """
    scores = batch * height * width * len(offsets) * num_classes**2
    return Cost(scores * (hidden + 2 * num_iterations), 4 * scores)


def algorithm(
    offsets: _Offsets,
    height: int,
    width: int,
    num_classes: int,
    hidden: int,
    batch: int = 1,
    *,
    num_iterations: int = 3,
) -> str:
    """The cheaper way to messages, "factored" or "table", for `num_iterations` of them.

    Cost model, in multiply-adds of a large matrix product, with E = N O edges:

        factored: iterations * (2 E (4500 + 20 M + 2.5 M K) + 2 N M K^2)
        table:  E (20 M + M K^2 + 100 K^2) + iterations * 2 E (430 K + 17 K^2)

    The terms: what an edge costs by itself, its hidden units, the small product with G; G itself. Then forming the
    scores and storing them; reading them for both directions. Fitted on CPU cores alone; other devices have other
    ratios. Tables above TABLE_BYTES are never chosen.

    Args:
      offsets, height, width, num_classes, hidden, batch: see the module's docstring.
      num_iterations: how many times messages are computed.

    Returns:
      str, the name of the algorithm.

    Examples:
      >>> box = pw.offsets(pw.SURROUNDING, 29, 38)
      >>> [pw.costs.algorithm(box, 29, 38, num_classes, hidden=512) for num_classes in (2, 60)]
      ['table', 'factored']
    """
    if not len(offsets) or not num_iterations:
        return "factored"
    nodes, k, m = batch * height * width, num_classes, hidden
    edges = nodes * len(offsets)
    factored = 2 * edges * (_EDGE + m * (_HIDDEN + _SMALL_PRODUCT * k)) + 2 * nodes * m * k**2
    formed = edges * (_HIDDEN * m + m * k**2 + _WRITE * k**2)
    table = formed + num_iterations * 2 * edges * (_READ_ROW * k + _READ * k**2)
    fits = 4 * edges * k**2 <= TABLE_BYTES
    return "table" if fits and table < num_iterations * factored else "factored"
