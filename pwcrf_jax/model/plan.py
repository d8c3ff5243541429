"""What a model costs at an image size, before anything is compiled: multiply-adds, and bytes of memory on one device.

The nets' figures are read from the jaxprs of the model and of its gradient, those of the pairwise parts come from
`pwcrf_jax.costs`; nothing is computed, and no array of the model's size is made. A multiply-add is one product and one
sum, half of what XLA counts as operations: matrix products, convolutions and elementwise products count, and taps of a
convolution that fall on padding do not.

What memory means here, and how near it is (tests/nets/test_nets_plan.py, against XLA on a CPU, float32):

* activations: what JAX keeps for the backward pass, each buffer once. Parameters, images and constants are left out. A
  mask (where a ReLU was positive, which of two values a maximum took) is not kept but compared again, so what it
  compares is kept in its place; of values, ReLUs and maxima made of each other, only the first.
* potentials: scores of the unary, its log-probabilities, the first layers' parts: the input of the pairwise parts.
* the largest layer's backward pass: cotangents of its input and output; for a convolution also its kernel reversed, and
  the kernel's gradient before it is laid out as the parameter. The layer is that which, added to the activations kept
  before it, makes the most.

Against XLA's arguments and temporaries, the training step of every shipped config, with 1 to 16 images in float32,
was 0.94 to 1.03 of them when it was measured (tests hold tiny ones), with heads on the concatenated features; on each
scale's own map, as they are now, that is not yet measured. Activations, potentials and the largest layer, against the
temporaries of the nets' gradient, lie within 20 % for tiny of one scale, MobileNetV2 (three scales: 0.97) and VGG-16 at
240 x 320 pixels and more. Known to be farther off: few images of small maps under large kernels, whose copies XLA
places as it likes (MobileNetV2 of one scale 1.2 to 1.4 up to 192 x 256, VGG-16 of three scales 0.75 at 96 x 128), and
tiny of several scales (0.57). The backward pass of sliding pyramids is not counted. Inference, 0.8 to 1.02, is the
rougher figure. Other backends fuse differently, and convolution libraries add workspace of their own. In bfloat16 a
CPU needs half as much again: it computes convolutions in float32.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from pwcrf_jax import costs
from pwcrf_jax.messages import ALGORITHMS

_VIEWS = {"reshape", "squeeze", "expand_dims", "transpose", "slice", "copy", "stop_gradient"}
_ORDER = {"max", "min", "clamp", "select_n"}
_ARITHMETIC = {"add", "sub", "mul", "div", "convert_element_type", "broadcast_in_dim"}


class Row(NamedTuple):
    """One line of a plan.

    Attributes:
      name: what it is of.
      multiply_adds, bytes: int; 0 where a figure does not apply.
    """

    name: str
    multiply_adds: int = 0
    bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows by topic, of one device; `plan[name]` is a row, `str(plan)` a table, `plan.summary()` a line.

    Attributes:
      batch_size, image_size, grid: images on the device, (H, W) of an image in pixels, (h, w) of the map in cells.
      rows: see `plan`. "training step" and "inference" are the totals.

    Raises:
      KeyError: `plan[name]` of a row that is not there, with the names of all.
    """

    batch_size: int
    image_size: tuple[int, int]
    grid: tuple[int, int]
    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"the plan has no row {name!r}; it has {', '.join(repr(row.name) for row in self.rows)}")

    def __str__(self) -> str:
        size, grid = (f"{h} x {w}" for h, w in (self.image_size, self.grid))
        lines = [[f"{self.batch_size} x {size}, grid {grid}", "multiply-adds", "memory"]]
        lines += [[r.name, _short(r.multiply_adds), _short(r.bytes, "B")] for r in self.rows]
        name, *widths = (max(len(line[i]) for line in lines) for i in range(3))
        return "\n".join(f"{a:<{name}}  {b:>{widths[0]}}  {c:>{widths[1]}}" for a, b, c in lines)

    def summary(self) -> str:
        """One line: parameters, activations, the largest pairwise loss, both totals."""
        loss = [row for row in self.rows if row.name.startswith("pairwise loss ")]
        memory = {name: self[name].bytes for name in ("parameters", "activations")}
        if loss:
            memory["pairwise loss"] = max(row.bytes for row in loss)
        parts = [f"{name} {_short(size, 'B')}" for name, size in memory.items()]
        totals = [
            f"{name} {_short(row.multiply_adds)} multiply-adds, {_short(row.bytes, 'B')}"
            for name in ("training step", "inference")
            for row in [self[name]]
        ]
        size = " x ".join(map(str, self.image_size))
        return f"planned for {self.batch_size} images of {size} a device: {'; '.join([', '.join(parts), *totals])}"


def plan(
    model: Any,
    image_size: tuple[int, int],
    batch_size: int = 1,
    num_iterations: int = 3,
    num_sampled_offsets: int = 0,
    chunk_edges: int | None = None,
    message_chunk_edges: int | None = None,
    algorithm: str = "auto",
    message_relations: Sequence[str] | None = None,
    optimizer: Any = None,
) -> Plan:
    """Multiply-adds and bytes of a model's training step and of its inference, on one device.

    Args:
      model: a `pwcrf_jax.model.segmenter.Segmenter`, or what has its `init`, `apply`, `grids`, `num_classes`,
        `relations` and parameter names.
      image_size: (H, W) in pixels.
      batch_size: images a device.
      num_iterations: of mean field.
      num_sampled_offsets, chunk_edges: of the pairwise loss; 0: all offsets, None: chosen from the shapes.
      message_chunk_edges, algorithm: of the messages, as in `pwcrf_jax.mean_field.Settings`.
      message_relations: names of the relations that inference uses; None: all.
      optimizer: an optax transformation, for its state; None: none is planned.

    Returns:
      A `Plan` with the rows
        parameters, gradients, optimizer state: bytes;
        features, unary head, first layers NAME of each relation: multiply-adds forward; bytes of features are the input
          and the output of the largest layer or padding;
        backward pass: multiply-adds of the nets' gradient, without the forward pass;
        activations, potentials, largest layer: bytes, see the module's docstring;
        pairwise loss NAME: likelihood and gradient together; bytes are temporaries;
        messages NAME, one iteration; messages NAME, N iterations, ALGORITHM: multiply-adds; bytes of scores or
          temporaries;
        training step: all multiply-adds; bytes of parameters, gradients, optimizer state and activations, of the
          potentials twice, as they have a gradient, and the larger of the largest layer and the largest loss;
        inference: all multiply-adds; bytes of parameters, potentials and stored scores, and the largest of features
          and messages.

    Raises:
      ValueError: a size, number, algorithm or relation that cannot be.

    Examples:
      >>> from pwcrf_jax.model.segmenter import Segmenter
      >>> featmap = dict(backbone="tiny", scales=(1.0,), block6=(), pyramid_windows=())
      >>> relations = {"above_below": pw.offsets(pw.ABOVE_BELOW, 4, 4)}
      >>> model = Segmenter(num_classes=3, featmap=featmap, relations=relations, hidden=8)
      >>> plan = pw.plan(model, image_size=(64, 64))
      >>> plan.grid, plan["unary head"].multiply_adds  # 16 cells, 64 features to 8 hidden units to 3 classes
      ((4, 4), 8576)
    """
    if np.shape(image_size) != (2,):
        raise ValueError(f"expected image_size (height, width), got {image_size!r}")
    height, width = image_size
    if min(height, width, batch_size) < 1 or min(num_iterations, num_sampled_offsets) < 0:
        raise ValueError(
            f"expected positive image_size and batch_size, and no negative number, got image_size {image_size}, "
            f"batch_size {batch_size}, num_iterations {num_iterations}, num_sampled_offsets {num_sampled_offsets}"
        )
    for name, chunk in (("chunk_edges", chunk_edges), ("message_chunk_edges", message_chunk_edges)):
        if chunk is not None and chunk < 1:
            raise ValueError(f"{name} must be at least 1, or None to choose it, got {chunk}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
    known = [name for name, _ in model.relations]
    if unknown := set(message_relations or ()) - set(known):
        raise ValueError(f"message_relations: {sorted(unknown)} are not among the model's, {known}")
    images = jax.ShapeDtypeStruct((batch_size, height, width, 3), jnp.uint8)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    nets = _nets(lambda p, x: model.apply({"params": p}, x), params, images)
    grid = tuple(nets.out.unary.shape[1:3])
    potentials = {name: nets.out.pairwise[name] for name in known}

    state = [Row("parameters", bytes=_bytes(params)), Row("gradients", bytes=_bytes(params))]
    if optimizer is not None:
        state.append(Row("optimizer state", bytes=_bytes(jax.eval_shape(optimizer.init, params))))
    grids = model.grids((height, width))
    heads = [Row("unary head", _head(params["unary"], batch_size, grids))]
    heads += [Row(f"first layers {name}", _head(params[f"pairwise_{name}"], batch_size, grids)) for name in potentials]
    features = Row("features", nets.forward - sum(row.multiply_adds for row in heads), nets.widest)
    parts = [(p.hidden_p, p.hidden_q) for p in potentials.values()]
    unary = [p.unary_log_probs for p in potentials.values() if p.unary_log_probs is not None][:1]  # of all relations
    nets_rows = [
        features,
        *heads,
        Row("backward pass", nets.total - nets.forward),
        Row("activations", bytes=nets.kept),
        Row("potentials", bytes=_bytes((nets.out.unary, parts, unary))),
        Row("largest layer", bytes=nets.largest_layer),
    ]

    loss, messages, totals, tables, working = [], [], [], 0, [nets.widest]
    for name, p in potentials.items():
        shapes = (p.offsets, *grid, model.num_classes, p.hidden_p.shape[-1], batch_size)
        bytes_each = dict(itemsize=p.hidden_p.dtype.itemsize)
        sampled = num_sampled_offsets if num_sampled_offsets < len(p.offsets) else 0
        cost = costs.pairwise_loss(*shapes, **bytes_each, chunk_edges=chunk_edges, num_sampled_offsets=sampled)
        loss.append(Row(f"pairwise loss {name}", cost.multiply_adds, cost.temp_bytes))
        if message_relations is not None and name not in message_relations:
            continue
        taken = costs.algorithm(*shapes, num_iterations=num_iterations) if algorithm == "auto" else algorithm
        if taken == "table":
            cost = costs.table_messages(*shapes, num_iterations=num_iterations)
            formed, one = (costs.table_messages(*shapes, num_iterations=n).multiply_adds for n in (0, 1))
            once = one - formed
            tables += cost.temp_bytes
        else:
            cost = costs.factored_messages(*shapes, **bytes_each, chunk_edges=message_chunk_edges)
            once = cost.multiply_adds
            cost = cost._replace(multiply_adds=num_iterations * once)
            working.append(cost.temp_bytes)
        totals.append(Row(f"messages {name}, {num_iterations} iterations, {taken}", *cost))
        messages += [Row(f"messages {name}, one iteration", once), totals[-1]]

    added = lambda rows: sum(row.multiply_adds for row in rows)
    size = {row.name: row.bytes for row in nets_rows}
    training = Row(
        "training step",
        nets.total + added(loss),
        sum(row.bytes for row in state)
        + size["activations"]
        + 2 * size["potentials"]
        + max(size["largest layer"], *(row.bytes for row in loss), 0),
    )
    inference = Row(
        "inference", nets.forward + added(totals), _bytes(params) + size["potentials"] + tables + max(working)
    )
    return Plan(batch_size, (height, width), grid, (*state, *nets_rows, *loss, *messages, training, inference))


def multiply_adds(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> int:
    """Multiply-adds of a jaxpr (module docstring), int: a scan's by its length, of a `cond` the dearest branch.

    The body of a `while` loop counts once, as its number of rounds is not known.
    """
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            total += _convolution(eqn)
        elif name == "mul":
            total += eqn.outvars[0].aval.size
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
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.ClosedJaxpr, core.Jaxpr)):
                found.append(getattr(item, "jaxpr", item))
    return found


def _bytes(tree) -> int:
    return sum(_size(x) for x in jax.tree.leaves(tree))


def _size(aval) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


def _short(number: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 1.59 GB, 24.3 M; "-" for 0."""
    if not number:
        return "-"
    prefixes = ["", "k", "M", "G", "T", "P"]
    while number >= 999.5 and len(prefixes) > 1:
        number, prefixes = number / 1000, prefixes[1:]
    digits = f"{number:.3g}" if number < 99.5 else f"{number:.0f}"
    return f"{digits} {prefixes[0]}{unit}".rstrip()


def _head(params, batch_size: int, grids: Sequence[tuple[int, int]]) -> int:
    """Multiply-adds of a head's dense layers; a last layer on edges is no `kernel`.

    First layers have the cells of all scales, each a part of the rows of theirs; last layers those of the largest.
    """
    cells = [math.prod(grid) for grid in grids]
    times = {"first": sum(cells) / len(cells), "last": max(cells)}
    leaves = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"]
    return round(batch_size * sum(times[path[0].key.split("_")[0]] * x.size for path, x in leaves))


class _Nets(NamedTuple):
    """out: the model's output, abstract. forward, total: multiply-adds, without and with the backward pass.

    kept, largest_layer, widest: bytes of "activations", "largest layer" and "features" of `plan`.
    """

    out: Any
    forward: int
    total: int
    kept: int
    largest_layer: int
    widest: int


def _nets(apply, params, images) -> _Nets:
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
            sums += _size(pending.pop().aval)
        peak = max(peak, sums + layer.backward)
        largest = max(largest, layer.forward)
    everything = sum(_size(value.aval) for value in kept)
    return _Nets(out, **passes, kept=everything, largest_layer=max(peak - everything, 0), widest=largest)


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
            moved = sum(_size(x.aval) for x in (*inputs, *outputs) if not x.parameter)
            if name == "pad" and outputs[0].source is outputs[0]:
                layers.append(_Layer(count, moved, 0))
            elif name in ("dot_general", "conv_general_dilated") and any(x.parameter for x in inputs):
                # Reversed for the input's gradient, and the gradient in the layout of the product.
                copies = 2 * sum(_size(x.aval) for x in inputs if x.parameter) if name != "dot_general" else 0
                layers.append(_Layer(count, moved, moved + copies))
        return [read(x) for x in jaxpr.outvars]

    inputs = [_Value(v.aval, 0, parameter=i < num_params) for i, v in enumerate(closed.jaxpr.invars)]
    return walk(closed.jaxpr, inputs), layers


def _call(eqn) -> core.Jaxpr | None:
    """What an equation only calls, such as another `jit`; None for loops and all else."""
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
