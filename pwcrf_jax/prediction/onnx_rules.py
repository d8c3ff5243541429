"""JAX's operations as ONNX's: a rule for each primitive that the networks, mean field and decoding are made of.

A rule takes the graph, an equation of a jaxpr and its inputs, and returns its outputs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pwcrf_jax.prediction.onnx_graph import Graph, Shape, Value

Rule = Callable[[Graph, Any, list[Value]], list[Value]]
RULES: dict[str, Rule] = {}
"""By the name of a primitive. Those of gathers and scatters are in `onnx_indices`."""

SAME = ("stop_gradient", "copy", "copy_p", "optimization_barrier", "name", "reduce_precision", "sharding_constraint")
UNARY = {"neg": "Neg", "exp": "Exp", "log": "Log", "abs": "Abs", "sign": "Sign", "floor": "Floor", "ceil": "Ceil",
         "sqrt": "Sqrt", "tanh": "Tanh", "logistic": "Sigmoid", "erf": "Erf"}  # fmt: skip
BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow",
          "add_any": "Add"}  # fmt: skip
COMPARISON = {"lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "eq": "Equal"}
LOGICAL = {"and": "And", "or": "Or", "xor": "Xor"}
ELEMENTWISE = {*UNARY, *BINARY, *COMPARISON, *LOGICAL, "ne", "not", "rem", "select_n", "clamp", "is_finite", "rsqrt",
               "erfc", "square", "integer_pow", "log1p", "convert_element_type"}  # fmt: skip
"""These take values as they are stored, with axes of 1."""
KEEPING = {*SAME, "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "convert_element_type"}
"""Rules that make constants of constants."""
REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin",
              "reduce_prod": "ReduceProd", "reduce_or": "ReduceMax", "reduce_and": "ReduceMin"}  # fmt: skip


class NoRule(ValueError):
    """An operation that has no rule here; the message names it."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def shape_of(variable: Any) -> Shape:
    """Of a variable of a jaxpr."""
    return tuple(map(int, variable.aval.shape))


def dtype_of(variable: Any) -> np.dtype:
    """Of a variable or a literal of a jaxpr."""
    return np.dtype(variable.aval.dtype)


def written_out(graph: Graph, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
    """The inputs of an equation with all axes written out."""
    return [graph.full(x, shape_of(v)) for x, v in zip(inputs, eqn.invars, strict=True)]


@rule(*SAME)
def _same(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    if eqn.primitive.name == "reduce_precision" and eqn.params["mantissa_bits"] < 23:
        raise NoRule("reduce_precision below float32")
    return inputs


@rule(*UNARY)
def _unary(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    return [graph.levelled(UNARY[eqn.primitive.name], inputs)]


@rule(*BINARY)
def _binary(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    return [graph.levelled(BINARY[eqn.primitive.name], inputs)]


@rule(*COMPARISON, "ne")
def _comparison(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name != "ne":
        return [graph.levelled(COMPARISON[name], inputs, bool)]
    return [graph.levelled("Not", [graph.levelled("Equal", inputs, bool)])]


@rule(*LOGICAL, "not")
def _logical(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if inputs[0].dtype != bool:
        raise NoRule(f"{name} of {inputs[0].dtype}")
    return [graph.levelled("Not" if name == "not" else LOGICAL[name], inputs)]


@rule("rem")
def _rem(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    return [graph.levelled("Mod", inputs, fmod=1)]  # the sign of the dividend, as XLA has it


@rule("select_n")
def _select(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    which, *cases = inputs
    if len(cases) != 2:
        raise NoRule(f"select_n of {len(cases)} cases")
    which, (no, yes) = graph.cast(which, bool), cases
    if yes.dtype != bool:
        return [graph.levelled("Where", [which, yes, no], yes.dtype)]
    here = graph.levelled("And", [which, yes])  # runtimes choose between numbers, not between truths
    there = graph.levelled("And", [graph.levelled("Not", [which]), no])
    return [graph.levelled("Or", [here, there])]


@rule("clamp")
def _clamp(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    low, x, high = inputs
    return [graph.levelled("Min", [graph.levelled("Max", [x, low]), high])]


@rule("is_finite")
def _is_finite(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    infinite, nan = (graph.levelled(kind, inputs, bool) for kind in ("IsInf", "IsNaN"))
    return [graph.levelled("Not", [graph.levelled("Or", [infinite, nan])])]


@rule("rsqrt")
def _rsqrt(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    return [graph.levelled("Reciprocal", [graph.levelled("Sqrt", inputs)])]


@rule("erfc")
def _erfc(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    one = graph.constant(1, inputs[0].dtype)
    return [graph.levelled("Sub", [one, graph.levelled("Erf", inputs)])]


@rule("log1p")
def _log1p(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    return [graph.levelled("Log", [graph.levelled("Add", [*inputs, graph.constant(1, inputs[0].dtype)])])]


@rule("square")
def _square(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    return [graph.levelled("Mul", [inputs[0], inputs[0]])]


@rule("integer_pow")
def _integer_pow(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    return [graph.levelled("Pow", [inputs[0], graph.constant(eqn.params["y"], inputs[0].dtype)])]


@rule("convert_element_type")
def _cast(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    return [graph.cast(inputs[0], dtype_of(eqn.outvars[0]))]


# --- layout ------------------------------------------------------------------------------------------


@rule("broadcast_in_dim")
def _broadcast(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    """Axes of length 1 where there were none; nothing is repeated yet."""
    kept = dict(zip(eqn.params["broadcast_dimensions"], inputs[0].shape, strict=True))
    return [graph.reshape(inputs[0], [kept.get(i, 1) for i in range(len(eqn.params["shape"]))])]


@rule("reshape", "squeeze", "expand_dims")
def _reshape(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        raise NoRule("reshape with another order of axes")
    (x,) = written_out(graph, eqn, inputs)
    return [graph.reshape(x, shape_of(eqn.outvars[0]))]


@rule("transpose")
def _transpose(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    return [graph.transpose(inputs[0], eqn.params["permutation"])]


@rule("concatenate")
def _concatenate(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    values, axis = written_out(graph, eqn, inputs), eqn.params["dimension"]
    return [graph.add("Concat", values, shape_of(eqn.outvars[0]), values[0].dtype, axis=axis)]


@rule("stack")
def _stack(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    axis, shape = eqn.params["axis"], shape_of(eqn.outvars[0])
    each = [*shape[:axis], 1, *shape[axis + 1 :]]
    values = [graph.reshape(x, each) for x in written_out(graph, eqn, inputs)]
    return [graph.add("Concat", values, shape, values[0].dtype, axis=axis)]


@rule("slice")
def _slice(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    (x,) = written_out(graph, eqn, inputs)
    params = eqn.params
    return [sliced(graph, x, params["start_indices"], params["limit_indices"], params["strides"])]


@rule("split")
def _split(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    (x,), axis, outputs, first = written_out(graph, eqn, inputs), eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        starts, ends = [0] * len(x.shape), list(x.shape)
        starts[axis], ends[axis] = first, first + size
        outputs.append(sliced(graph, x, starts, ends))
        first += size
    return outputs


def sliced(graph: Graph, x: Value, starts: Sequence[int], ends: Sequence[int], strides: Any = None) -> Value:
    """x[starts:ends:strides] along all axes; x is stored in full."""
    strides = [1] * len(x.shape) if strides is None else strides
    axes = [i for i, n in enumerate(x.shape) if (starts[i], ends[i], strides[i]) != (0, n, 1)]
    if not axes:
        return x
    limits = [graph.constant([y[i] for i in axes], np.int64) for y in (starts, ends, range(len(x.shape)), strides)]
    shape = [-(-(end - start) // stride) for start, end, stride in zip(starts, ends, strides, strict=True)]
    return graph.add("Slice", [x, *limits], shape, x.dtype)


@rule("rev")
def _rev(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    (x,), axes = written_out(graph, eqn, inputs), list(eqn.params["dimensions"])
    ends = [-x.shape[i] - 1 for i in axes]  # before the first
    limits = [graph.constant(y, np.int64) for y in ([-1] * len(axes), ends, axes, [-1] * len(axes))]
    return [graph.add("Slice", [x, *limits], x.shape, x.dtype)]


@rule("pad")
def _pad(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    (x, fill), widths = written_out(graph, eqn, inputs), eqn.params["padding_config"]
    if any(between for *_, between in widths):
        raise NoRule("padding between elements")
    before, after = ([max(w[i], 0) for w in widths] for i in (0, 1))
    shape = [n + a + b for n, a, b in zip(x.shape, before, after, strict=True)]
    if any(before + after):
        pads = graph.constant(before + after, np.int64)
        x = graph.add("Pad", [x, pads, fill], shape, x.dtype)
    cut = [(max(-low, 0), n - max(-high, 0)) for n, (low, high, _) in zip(shape, widths, strict=True)]
    return [sliced(graph, x, [low for low, _ in cut], [high for _, high in cut])]


# --- sums and products -------------------------------------------------------------------------------


@rule(*REDUCTIONS)
def _reduce(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    (x,) = written_out(graph, eqn, inputs)
    axes, truths = graph.constant(eqn.params["axes"], np.int64), x.dtype == bool
    if not eqn.params["axes"]:
        return [x]
    x = graph.cast(x, np.int32) if truths else x
    out = graph.add(REDUCTIONS[eqn.primitive.name], [x, axes], shape_of(eqn.outvars[0]), x.dtype, keepdims=0)
    return [graph.cast(out, bool) if truths else out]


@rule("argmax", "argmin")
def _argmax(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    (x,), (axis,) = written_out(graph, eqn, inputs), eqn.params["axes"]
    kind = "ArgMax" if eqn.primitive.name == "argmax" else "ArgMin"
    out = graph.add(kind, [x], shape_of(eqn.outvars[0]), np.int64, axis=axis, keepdims=0)  # the first of equals
    return [graph.cast(out, eqn.params["index_dtype"])]


@rule("dot_general")
def _dot(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    (x, y), out = written_out(graph, eqn, inputs), eqn.outvars[0].aval
    ((sum_x, sum_y), (batch_x, batch_y)) = eqn.params["dimension_numbers"]
    rest_x, rest_y = (
        [i for i in range(len(v.shape)) if i not in (*s, *b)] for v, s, b in ((x, sum_x, batch_x), (y, sum_y, batch_y))
    )
    size = lambda v, axes: int(np.prod([v.shape[i] for i in axes], dtype=int))
    lead = [x.shape[i] for i in batch_x]
    left = graph.reshape(graph.transpose(x, [*batch_x, *rest_x, *sum_x]), [*lead, size(x, rest_x), size(x, sum_x)])
    right = graph.reshape(graph.transpose(y, [*batch_y, *sum_y, *rest_y]), [*lead, size(y, sum_y), size(y, rest_y)])
    left, right = graph.cast(left, out.dtype), graph.cast(right, out.dtype)
    product = graph.add("MatMul", [left, right], [*lead, size(x, rest_x), size(y, rest_y)], out.dtype)
    return [graph.reshape(product, out.shape)]


@rule("conv_general_dilated")
def _conv(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    (x, kernel), params, out = written_out(graph, eqn, inputs), eqn.params, eqn.outvars[0].aval
    layout = params["dimension_numbers"]
    if any(n != 1 for n in params["lhs_dilation"]) or params["batch_group_count"] != 1:
        raise NoRule("a transposed convolution")
    channels_first = [out.shape[i] for i in layout.out_spec]
    product = graph.add(
        "Conv",
        [graph.transpose(x, layout.lhs_spec), graph.transpose(kernel, layout.rhs_spec)],
        channels_first,
        out.dtype,
        strides=list(params["window_strides"]),
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
        pads=[*(low for low, _ in params["padding"]), *(high for _, high in params["padding"])],
    )
    return [graph.transpose(product, np.argsort(layout.out_spec).tolist())]
