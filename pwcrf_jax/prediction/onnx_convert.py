"""A JAX function of fixed shapes as an ONNX model: its jaxpr walked once, an equation at a time.

Functions within are written out, scans become loops, and what hangs on no input is computed here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

from pwcrf_jax.prediction.onnx_graph import Body, Graph, Value, evaluated, model
from pwcrf_jax.prediction.onnx_indices import RULES
from pwcrf_jax.prediction.onnx_rules import ELEMENTWISE, KEEPING, NoRule, dtype_of, rule, shape_of

_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_SMALL = 4096  # elements; a constant may be so large, or as large as what it is made of


def convert(
    function: Callable[..., dict[str, Any]],
    arguments: dict[str, jax.ShapeDtypeStruct],
    defaults: dict[str, np.ndarray] | None = None,
) -> Any:
    """A function as an onnx.ModelProto.

    Args:
      function: of arrays in the order of the arguments; returns {name of an output: array}.
      arguments: their shapes and dtypes by name.
      defaults: values of arguments that users need not give.

    Raises:
      NoRule: an operation that has no rule.
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(*arguments.values())
    graph = Graph()
    inputs = [Value(name, tuple(x.shape), np.dtype(x.dtype)) for name, x in arguments.items()]
    found = _walk(graph, closed.jaxpr, [graph.constant(x) for x in closed.consts], inputs)
    # A dict's leaves come in the order of its keys.
    ends = [graph.full(x, shape_of(v)) for x, v in zip(found, closed.jaxpr.outvars, strict=True)]
    return model(graph, inputs, dict(zip(sorted(out), ends, strict=True)), defaults or {})


def _walk(graph: Graph, jaxpr: Any, constants: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
    """The outputs of a jaxpr."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def read(atom: Any) -> Value:
        return graph.constant(atom.val, dtype_of(atom)) if isinstance(atom, jax_core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        values |= zip(eqn.outvars, _of_equation(graph, eqn, [read(x) for x in eqn.invars]), strict=True)
    return [read(x) for x in jaxpr.outvars]


def _of_equation(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    inner = next((eqn.params[key] for key in _INNER if key in eqn.params), None)
    if name not in RULES and inner is not None and name not in ("while", "cond"):
        closed = hasattr(inner, "consts")
        constants = [graph.constant(x) for x in inner.consts] if closed else []
        return _walk(graph, inner.jaxpr if closed else inner, constants, inputs)
    if name not in KEEPING and all(x.constant is not None for x in inputs):
        if (known := _computed(graph, eqn, inputs)) is not None:
            return known
    if name not in RULES:
        raise NoRule(name)
    return RULES[name](graph, eqn, inputs)


def _computed(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    """The outputs of an equation of constants; None: they are better left to the file."""
    arrays = [np.asarray(x.constant) for x in inputs]
    if eqn.primitive.name in ELEMENTWISE:
        common = np.broadcast_shapes(*(x.shape for x in arrays))
        scalars = eqn.primitive.name in ("clamp", "select_n")  # these take some as they are
        arrays = [x if scalars and not x.shape else np.broadcast_to(x, common) for x in arrays]
    else:
        made = sum(int(np.prod(shape_of(x), dtype=int)) for x in eqn.outvars)
        if inputs and made > max(_SMALL, sum(x.size for x in arrays)):
            return None
        arrays = [np.broadcast_to(x, shape_of(v)) for x, v in zip(arrays, eqn.invars, strict=True)]
    return [graph.constant(x) for x in evaluated(eqn.primitive, arrays, eqn.params)]


@rule("scan")
def _scan(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    params, length = eqn.params, eqn.params["length"]
    if params["reverse"]:
        raise NoRule("scan in reverse")
    jaxpr, (num_outer, num_state) = params["jaxpr"], _numbers(params, len(inputs))
    inner = jaxpr.jaxpr
    outer, state, rows = inputs[:num_outer], inputs[num_outer:][:num_state], inputs[num_outer + num_state :]
    shapes = [shape_of(v) for v in eqn.invars]
    state = [graph.full(x, shape) for x, shape in zip(state, shapes[num_outer:], strict=False)]
    rows = [graph.full(x, shape) for x, shape in zip(rows, shapes[num_outer + num_state :], strict=True)]
    number, going = graph.new((), np.int64), graph.new((), bool)
    within = [graph.new(x.shape, x.dtype) for x in state]
    with graph.inside() as nodes:
        row = [graph.add("Gather", [x, number], x.shape[1:], x.dtype, axis=0) for x in rows]
        found = _walk(graph, inner, [graph.constant(x) for x in jaxpr.consts], [*outer, *within, *row])
        found = [graph.full(x, shape_of(v)) for x, v in zip(found, inner.outvars, strict=True)]
        # What a body gives must be made in it.
        ends = [graph.add("Identity", [x], x.shape, x.dtype) for x in (going, *found)]
    return graph.loop(length, state, Body(nodes, [number, going, *within], ends, num_state))


def _numbers(params: dict[str, Any], number: int) -> tuple[int, int]:
    """How many of a scan's inputs are the same each time, and how many are its state."""
    if "ft_in" not in params:  # JAX 0.10
        return params["num_consts"], params["num_carry"]
    outer, state, _ = params["ft_in"].update(list(range(number))).unpack()
    return len(list(outer)), len(list(state))
