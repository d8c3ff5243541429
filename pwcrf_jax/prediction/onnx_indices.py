"""Rules for reading and writing at indices: gathers, scatters, dynamic slices.

Arrays are looked at as rows: the axes that are indexed, flattened, before those that are taken whole.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pwcrf_jax.prediction import onnx_rules
from pwcrf_jax.prediction.onnx_graph import Graph, Value
from pwcrf_jax.prediction.onnx_rules import NoRule, rule, shape_of, written_out

RULES = onnx_rules.RULES
"""All rules, those of this file among them."""

_CLIP, _DROP = jax.lax.GatherScatterMode.CLIP, jax.lax.GatherScatterMode.FILL_OR_DROP


class Rows(NamedTuple):
    """Where windows of an array lie in it.

    Attributes:
      number: of the row of each element of each window, int [...windows, ...window], of the axes before `lead`.
      lead: axes that are indexed or not taken whole, and those before them.
      inner: elements of a row.
    """

    number: Value
    lead: int
    inner: int


def _rows(graph: Graph, shape: Sequence[int], window: Sequence[int], axes: Sequence[int], at: Value, mode: Any) -> Rows:
    """`Rows` of windows [len(shape)] that begin at `at` int [..., len(axes)]."""
    last = np.array([shape[i] - window[i] for i in axes], np.int32)
    if mode == _CLIP:
        at = _clipped(graph, at, last)
    elif mode == _DROP and (at.constant is None or (at.constant < 0).any() or (at.constant > last).any()):
        raise NoRule("indices that may lie outside of an array")
    lead = 1 + max([i for i, n in enumerate(shape) if i in axes or window[i] != n], default=-1)
    strides = np.array([int(np.prod(shape[i + 1 : lead], dtype=int)) for i in range(lead)], np.int32)
    first = _summed(graph, at, strides[list(axes)])
    grid = np.zeros((1,) * lead, np.int32)
    for i in range(lead):
        steps = strides[i] * np.arange(window[i], dtype=np.int32)
        grid = grid + steps.reshape(-1, *[1] * (lead - 1 - i))
    first = graph.reshape(first, [*first.shape, *[1] * lead])
    number = _sum(graph, first, graph.constant(grid))
    return Rows(number, lead, int(np.prod(shape[lead:], dtype=int)))


def _sum(graph: Graph, x: Value, y: Value) -> Value:
    if x.constant is not None and y.constant is not None:
        return graph.constant(x.constant + y.constant)
    if y.constant is not None and not y.constant.any() and np.broadcast_shapes(x.shape, y.shape) == x.shape:
        return x
    return graph.levelled("Add", [x, y])


def _clipped(graph: Graph, at: Value, last: np.ndarray) -> Value:
    if at.constant is not None:
        return graph.constant(np.clip(at.constant, 0, last), at.dtype)
    zero, last_value = graph.constant(0, at.dtype), graph.constant(last, at.dtype)
    return graph.levelled("Min", [graph.levelled("Max", [at, zero]), last_value])


def _summed(graph: Graph, at: Value, strides: np.ndarray) -> Value:
    if at.constant is not None:
        return graph.constant((at.constant.astype(np.int32) * strides).sum(-1, dtype=np.int32))
    product = graph.levelled("Mul", [graph.cast(at, np.int32), graph.constant(strides)])
    axes = graph.constant([-1], np.int64)
    return graph.add("ReduceSum", [product, axes], at.shape[:-1], np.int32, keepdims=0)


@rule("gather")
def _gather(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    (x, at), params, shape = written_out(graph, eqn, inputs), eqn.params, shape_of(eqn.outvars[0])
    numbers, window, mode = params["dimension_numbers"], params["slice_sizes"], params["mode"]
    if numbers.operand_batching_dims:
        raise NoRule("gather with batches in the indexed array")
    axes, num = list(numbers.start_index_map), len(at.shape) - 1
    (axis, *others), last = axes, x.shape[axes[0]] - 1
    whole = all(window[i] == n for i, n in enumerate(x.shape) if i != axis)
    if not others and whole and numbers.collapsed_slice_dims == (axis,):
        # Along one axis: ONNX's own form.
        rows = _rows(graph, (last + 1,), (1,), (0,), at, mode).number
        rows = graph.reshape(rows, rows.shape[:num])
        taken = graph.add("Gather", [x, rows], [*x.shape[:axis], *rows.shape, *x.shape[axis + 1 :]], x.dtype, axis=axis)
        windows = range(axis, axis + num)
        inside = iter([i for i in range(len(taken.shape)) if i not in windows])
    else:
        found = _rows(graph, x.shape, window, axes, at, mode)
        flat = graph.reshape(x, [int(np.prod(x.shape[: found.lead], dtype=int)), found.inner])
        taken = graph.add("Gather", [flat, found.number], [*found.number.shape, found.inner], x.dtype, axis=0)
        kept = [n for i, n in enumerate(window) if i not in numbers.collapsed_slice_dims]
        taken = graph.reshape(taken, [*at.shape[:-1], *kept])
        windows = range(num)
        inside = iter(range(num, len(taken.shape)))
    outside = iter(windows)
    order = [next(inside) if i in numbers.offset_dims else next(outside) for i in range(len(shape))]
    return [graph.transpose(taken, order)]


@rule("scatter", "scatter-add")
def _scatter(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    (x, at, updates), params = written_out(graph, eqn, inputs), eqn.params
    numbers, adds = params["dimension_numbers"], eqn.primitive.name == "scatter-add"
    if numbers.operand_batching_dims or not (adds or params["unique_indices"] or np.prod(at.shape[:-1]) == 1):
        raise NoRule("scatter with batches, or to places that may be the same")
    sizes = iter(updates.shape[i] for i in numbers.update_window_dims)
    window = [1 if i in numbers.inserted_window_dims else next(sizes) for i in range(len(x.shape))]
    found = _rows(graph, x.shape, window, numbers.scatter_dims_to_operand_dims, at, params["mode"])
    outside = [i for i in range(len(updates.shape)) if i not in numbers.update_window_dims]
    updates = graph.transpose(updates, [*outside, *numbers.update_window_dims])
    return [_written(graph, x, found, updates, adds=adds)]


def _written(graph: Graph, x: Value, found: Rows, updates: Value, *, adds: bool) -> Value:
    """x with updates [...windows, ...window] in these rows, or added to them."""
    count = int(np.prod(found.number.shape, dtype=int))
    flat = graph.reshape(x, [int(np.prod(x.shape[: found.lead], dtype=int)), found.inner])
    rows, updates = graph.reshape(found.number, [count, 1]), graph.reshape(updates, [count, found.inner])
    if adds:
        # Not ScatterND: runtimes may share its rows among threads, and rows that are the same would lose sums.
        rows = graph.full(rows, [count, found.inner])
        out = graph.add("ScatterElements", [flat, rows, updates], flat.shape, x.dtype, axis=0, reduction="add")
    else:
        out = graph.add("ScatterND", [flat, graph.cast(rows, np.int64), updates], flat.shape, x.dtype)
    return graph.reshape(out, x.shape)


def _starts(graph: Graph, starts: Sequence[Value]) -> Value:
    """int32 [n] of n numbers."""
    if all(x.constant is not None for x in starts):
        return graph.constant([int(np.asarray(x.constant)) for x in starts], np.int32)
    each = [graph.reshape(graph.cast(x, np.int32), [1]) for x in starts]
    return graph.add("Concat", each, [len(each)], np.int32, axis=0)


@rule("dynamic_slice")
def _dynamic_slice(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    (x, *starts), sizes = written_out(graph, eqn, inputs), eqn.params["slice_sizes"]
    axes = [i for i, n in enumerate(x.shape) if sizes[i] != n]
    if not axes:
        return [x]
    at = _clipped(graph, _starts(graph, [starts[i] for i in axes]), np.array([x.shape[i] - sizes[i] for i in axes]))
    ends = _sum(graph, at, graph.constant([sizes[i] for i in axes], np.int32))
    return [graph.add("Slice", [x, at, ends, graph.constant(axes, np.int32)], sizes, x.dtype)]


@rule("dynamic_update_slice")
def _dynamic_update_slice(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    x, updates, *starts = written_out(graph, eqn, inputs)
    axes = [i for i, n in enumerate(x.shape) if updates.shape[i] != n]
    if not axes:
        return [updates]
    found = _rows(graph, x.shape, updates.shape, axes, _starts(graph, [starts[i] for i in axes]), _CLIP)
    return [_written(graph, x, found, updates, adds=False)]
