"""Multiply-adds and memory of nets, read from the jaxprs of the model and of its gradient.

`pwcrf_jax.model.plan` says what the figures mean. A walk along a jaxpr follows in which buffer each value lies, and of
what it is made; nothing is computed.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_VIEWS = {"reshape", "squeeze", "expand_dims", "transpose", "slice", "copy", "stop_gradient"}
_ORDER = {"max", "min", "clamp", "select_n"}
_ARITHMETIC = {"add", "sub", "mul", "div", "convert_element_type", "broadcast_in_dim"}


def multiply_adds(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> int:
    """Multiply-adds of a jaxpr (module docstring), int: a scan's by its length, of a `cond` the dearest branch.

    The body of a `while` loop counts once, as its number of rounds is not known.
    """
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        out: Any = eqn.outvars[0].aval if eqn.outvars else None
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left: Any = eqn.invars[0].aval
            total += out.size * math.prod(left.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            total += _convolution(eqn)
        elif name == "mul":
            total += out.size
        else:
            inner = [multiply_adds(sub) for sub in _sub_jaxprs(eqn)]
            times = eqn.params["length"] if name == "scan" else 1
            total += times * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def _convolution(eqn) -> int:
    """Output values times input channels of a group, times the pairs of output and tap that meet the input."""
    spec = eqn.params["dimension_numbers"]
    lhs, rhs, out = (v.aval.shape for v in (*eqn.invars, eqn.outvars[0]))
    count = out[spec.out_spec[0]] * out[spec.out_spec[1]] * rhs[spec.rhs_spec[1]]
    windows = zip(
        *(eqn.params[key] for key in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")), strict=True
    )
    for i, (stride, (low, _), spread, dilation) in enumerate(windows, start=2):
        size, taps, places = lhs[spec.lhs_spec[i]], rhs[spec.rhs_spec[i]], out[spec.out_spec[i]]
        at = np.arange(places)[:, None] * stride + np.arange(taps) * dilation - low
        count *= int(np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)))
    return count


def _sub_jaxprs(eqn) -> list[core.Jaxpr]:
    found: list[Any] = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.ClosedJaxpr, core.Jaxpr)):
                found.append(getattr(item, "jaxpr", item))
    return found


def num_bytes(aval) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


class Nets(NamedTuple):
    """out: the model's output, abstract. forward, total: multiply-adds, without and with the backward pass.

    kept, largest_layer, widest: bytes of "activations", "largest layer" and "features" of `plan`.
    """

    out: Any
    forward: int
    total: int
    kept: int
    largest_layer: int
    widest: int


def trace_nets(apply, params, images) -> Nets:
    """Three traces: of the model, of what its backward pass keeps, and of its gradient."""
    jaxpr, out = jax.make_jaxpr(apply, return_shape=True)(params, images)
    passes = {"forward": multiply_adds(jaxpr)}
    flat = lambda p, x: jax.tree.leaves(apply(p, x))

    def forward(p, x):
        out, backward = jax.vjp(lambda p: flat(p, x), p)
        return out, jax.tree.leaves(backward)  # the function is a tree of what it keeps

    def both(p, x, cotangents):
        return jax.vjp(lambda p: flat(p, x), p)[1](cotangents)

    jaxpr = jax.make_jaxpr(forward)(params, images)
    passes["total"] = multiply_adds(jax.make_jaxpr(both)(params, images, jax.tree.leaves(out)))
    num_params, num_outputs = len(jax.tree.leaves(params)), len(jax.tree.leaves(out))
    results, layers = _trace(jaxpr, num_params)
    kept = _kept(results[num_outputs:])
    sums, peak, largest = 0, 0, 0
    pending = sorted(kept, key=lambda value: value.position, reverse=True)
    for layer in layers:
        while pending and pending[-1].position < layer.position:
            sums += num_bytes(pending.pop().aval)
        peak = max(peak, sums + layer.backward)
        largest = max(largest, layer.forward)
    everything = sum(num_bytes(value.aval) for value in kept)
    return Nets(out, **passes, kept=everything, largest_layer=max(peak - everything, 0), widest=largest)


@dataclasses.dataclass(eq=False)
class _Value:
    """A value of a jaxpr: the primitive it comes from ("" for inputs), its place in the order, what it is made of.

    source: the value whose memory it views, itself if none. constant: follows from no input. mask: follows from
    comparisons alone. parameter: an input of that kind, or a view or conversion of one.
    """

    aval: Any
    position: int
    primitive: str = ""
    inputs: tuple["_Value", ...] = ()
    constant: bool = False
    parameter: bool = False

    def __post_init__(self):
        self.source, self.mask = self, self.aval.dtype == jnp.bool_
        if not self.inputs:
            return
        first = self.inputs[0]
        if self.primitive in _VIEWS or (self.primitive == "pad" and self.aval.shape == first.aval.shape):
            self.source = first.source
        self.constant = all(x.constant for x in self.inputs)
        self.parameter = first.parameter and (self.source is not self or self.primitive == "convert_element_type")
        if self.primitive in _VIEWS | _ORDER | _ARITHMETIC and not self.constant:
            self.mask |= all(x.mask or x.constant for x in self.inputs)


class _Layer(NamedTuple):
    """A product of activations and a parameter, or padding; bytes held by its passes beside what is kept."""

    position: int
    forward: int
    backward: int


def _trace(closed: core.ClosedJaxpr, num_params: int) -> tuple[list[_Value], list[_Layer]]:
    """The outputs of a jaxpr whose first inputs are parameters, and its layers in order; calls are inlined."""
    layers, count = [], 0

    def walk(jaxpr, arguments):
        nonlocal count
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        values |= {var: _Value(var.aval, -1, constant=True) for var in jaxpr.constvars}
        read = lambda x: _Value(x.aval, -1, constant=True) if isinstance(x, core.Literal) else values[x]
        for eqn in jaxpr.eqns:
            inputs = tuple(map(read, eqn.invars))
            if body := _call(eqn):
                values |= zip(eqn.outvars, walk(body, inputs), strict=True)
                continue
            count += 1
            name = eqn.primitive.name
            outputs = [_Value(var.aval, count, name, inputs, constant=not inputs) for var in eqn.outvars]
            values |= zip(eqn.outvars, outputs, strict=True)
            moved = sum(num_bytes(x.aval) for x in (*inputs, *outputs) if not x.parameter)
            if name == "pad" and outputs[0].source is outputs[0]:
                layers.append(_Layer(count, moved, 0))
            elif name in ("dot_general", "conv_general_dilated") and any(x.parameter for x in inputs):
                # Reversed for the input's gradient, and the gradient in the layout of the product.
                copies = 2 * sum(num_bytes(x.aval) for x in inputs if x.parameter) if name != "dot_general" else 0
                layers.append(_Layer(count, moved, moved + copies))
        return [read(x) for x in jaxpr.outvars]

    inputs = [_Value(v.aval, 0, parameter=i < num_params) for i, v in enumerate(closed.jaxpr.invars)]
    return walk(closed.jaxpr, inputs), layers


def _call(eqn) -> core.Jaxpr | None:
    """The jaxpr that an equation only calls, such as another `jit`; None for loops and all else."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    shapes = lambda variables: [v.aval.shape for v in variables]
    for body in _sub_jaxprs(eqn):
        if shapes(body.invars) == shapes(eqn.invars) and shapes(body.outvars) == shapes(eqn.outvars):
            return body
    return None


def _kept(residuals: list[_Value]) -> set[_Value]:
    """The buffers behind a backward pass's residuals, as the module's docstring has it."""
    plain = lambda value: value.primitive and not value.constant
    kept = {x.source for x in residuals if not x.mask and plain(x.source)}
    pending, seen = [x for x in residuals if x.mask], set()
    while pending:
        value = pending.pop().source
        if value in kept or value in seen or not plain(value):
            continue
        seen.add(value)
        if value.mask or value.primitive in _ORDER:
            pending.extend(value.inputs)
        else:
            kept.add(value)
    return kept
