"""Costs of a model at an image size, before anything is compiled: multiply-adds, and bytes of memory on one device.

The nets' figures are read from the jaxprs of the model and of its gradient, those of the pairwise parts come from
`pwcrf_jax.costs`; nothing is computed, and no array of the model's size is made. A multiply-add is one product and one
sum, half of what XLA counts as operations: matrix products, convolutions and elementwise products count, and taps of a
convolution that fall on padding do not.

What memory means here, and how near it is (tests/unit/nets/test_nets_plan.py, against XLA on a CPU, float32):

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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import costs, mean_field
from pwcrf_jax.model.jaxprs import Nets, num_bytes, trace_nets

CHIPS = {
    "v4": 32 * 2**30,
    "v5e": 16 * 2**30,
    "v5p": 95 * 2**30,
    "v6e": 32 * 2**30,
    "H100": 80 * 10**9,
    "H200": 141 * 10**9,
}
"""Memory of one chip in bytes, as its maker gives it; what a runtime keeps for itself is not taken off.

TPU: https://cloud.google.com/tpu/docs/v4 and its neighbours v5e, v5p, v6e. GPU: https://www.nvidia.com/en-us/data-center/h100/
(SXM) and h200.
"""


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

    def largest_batch(self, chip: str) -> int:
        """How many images a training step may have on one chip; 0: not one.

        A lower bound beyond the plan's own batch: all but parameters, gradients and optimizer state is taken to grow
        with the images.

        Raises:
          KeyError: a chip that is not in `CHIPS`, with the names of all.
        """
        if chip not in CHIPS:
            raise KeyError(f"no chip {chip!r} is known; known: {', '.join(CHIPS)}")
        state = sum(row.bytes for row in self.rows if row.name in ("parameters", "gradients", "optimizer state"))
        of_images = self["training step"].bytes - state
        return max(0, (CHIPS[chip] - state) * self.batch_size // of_images)

    def chips(self) -> str:
        """A line for each of `CHIPS`: whether the training step fits, and the largest batch that would."""
        needs, lines = _short(self["training step"].bytes, "B"), []
        for chip, memory in CHIPS.items():
            largest = self.largest_batch(chip)
            says = "fits" if largest >= self.batch_size else "does not fit"
            lines.append(f"{chip:5} {says}: {needs} of {_short(memory, 'B')}, {largest} images a device would")
        return "\n".join(lines)

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
    *,
    inference: mean_field.Settings = mean_field.DEFAULT_SETTINGS,
    num_sampled_offsets: int = 0,
    chunk_edges: int | None = None,
    optimizer: Any = None,
) -> Plan:
    """Multiply-adds and bytes of a model's training step and of its inference, on one device.

    Args:
      model: a `pwcrf_jax.model.segmenter.Segmenter`, or what has its `init`, `apply`, `grids`, `num_classes`,
        `relations` and parameter names.
      image_size: (H, W) in pixels.
      batch_size: images a device.
      inference: settings of mean field; where its weights are a mapping, relations that it does not name send no
        messages.
      num_sampled_offsets, chunk_edges: of the pairwise loss; 0: all offsets, None: chosen from the shapes.
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
      ValueError: a size, number or relation that cannot be.

    Examples:
      >>> from pwcrf_jax.model.segmenter import Segmenter
      >>> featmap = dict(backbone="tiny", scales=(1.0,), block6=(), pyramid_windows=())
      >>> relations = {"above_below": pw.offsets(pw.ABOVE_BELOW, 4, 4)}
      >>> model = Segmenter(num_classes=3, featmap=featmap, relations=relations, hidden=8)
      >>> plan = pw.plan(model, image_size=(64, 64))
      >>> plan.grid, plan["unary head"].multiply_adds  # 16 cells, 64 features to 8 hidden units to 3 classes
      ((4, 4), 8576)
    """
    _check(model, image_size, batch_size, inference, num_sampled_offsets, chunk_edges)
    height, width = image_size
    images = jax.ShapeDtypeStruct((batch_size, height, width, 3), jnp.uint8)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    nets = trace_nets(lambda p, x: model.apply({"params": p}, x), params, images)
    grid = tuple(nets.out.unary.shape[1:3])
    potentials = {name: nets.out.pairwise[name] for name, _ in model.relations}

    state = [Row("parameters", bytes=_bytes(params)), Row("gradients", bytes=_bytes(params))]
    if optimizer is not None:
        state.append(Row("optimizer state", bytes=_bytes(jax.eval_shape(optimizer.init, params))))
    rows = _nets_rows(nets, potentials, params, batch_size, model.grids((height, width)))
    size = {row.name: row.bytes for row in rows}
    shapes = {
        name: (p.offsets, *grid, model.num_classes, p.hidden_p.shape[-1], batch_size) for name, p in potentials.items()
    }
    itemsizes = {name: p.hidden_p.dtype.itemsize for name, p in potentials.items()}
    loss = [_loss_row(name, of, itemsizes[name], num_sampled_offsets, chunk_edges) for name, of in shapes.items()]
    sending = inference.weights if isinstance(inference.weights, Mapping) else shapes
    messages = [_messages(name, of, itemsizes[name], inference) for name, of in shapes.items() if name in sending]

    training = Row(
        "training step",
        nets.total + sum(row.multiply_adds for row in loss),
        sum(row.bytes for row in state)
        + size["activations"]
        + 2 * size["potentials"]
        + max(size["largest layer"], *(row.bytes for row in loss), 0),
    )
    decoding = Row(
        "inference",
        nets.forward + sum(of.every.multiply_adds for of in messages),
        _bytes(params)
        + size["potentials"]
        + sum(of.every.bytes for of in messages if of.stored)
        + max(nets.widest, *(of.every.bytes for of in messages if not of.stored), 0),
    )
    sent = [row for of in messages for row in (of.once, of.every)]
    return Plan(batch_size, (height, width), grid, (*state, *rows, *loss, *sent, training, decoding))


def _check(model, image_size, batch_size, inference, num_sampled_offsets, chunk_edges) -> None:
    if np.shape(image_size) != (2,):
        raise ValueError(f"expected image_size (height, width), got {image_size!r}")
    if min(*image_size, batch_size) < 1 or num_sampled_offsets < 0:
        raise ValueError(
            f"expected positive image_size and batch_size, and no negative number, got image_size {image_size}, "
            f"batch_size {batch_size}, num_sampled_offsets {num_sampled_offsets}"
        )
    if chunk_edges is not None and chunk_edges < 1:
        raise ValueError(f"chunk_edges must be at least 1, or None to choose it, got {chunk_edges}")
    known = [name for name, _ in model.relations]
    named = inference.weights if isinstance(inference.weights, Mapping) else ()
    if unknown := set(named) - set(known):
        raise ValueError(f"weights of inference: {sorted(unknown)} are not among the model's relations, {known}")


def _nets_rows(
    nets: Nets, potentials: dict[str, Any], params: Any, batch_size: int, grids: Sequence[tuple[int, int]]
) -> list[Row]:
    heads = [Row("unary head", _head(params.get("unary", {}), batch_size, grids))]
    heads += [Row(f"first layers {name}", _head(params[f"pairwise_{name}"], batch_size, grids)) for name in potentials]
    parts = [(p.hidden_p, p.hidden_q) for p in potentials.values()]
    unary = [p.unary_log_probs for p in potentials.values() if p.unary_log_probs is not None][:1]  # of all relations
    return [
        Row("features", nets.forward - sum(row.multiply_adds for row in heads), nets.widest),
        *heads,
        Row("backward pass", nets.total - nets.forward),
        Row("activations", bytes=nets.kept),
        Row("potentials", bytes=_bytes((nets.out.unary, parts, unary))),
        Row("largest layer", bytes=nets.largest_layer),
    ]


def _loss_row(name: str, shapes: tuple, itemsize: int, num_sampled_offsets: int, chunk_edges: int | None) -> Row:
    sampled = num_sampled_offsets if num_sampled_offsets < len(shapes[0]) else 0
    cost = costs.pairwise_loss(*shapes, itemsize=itemsize, chunk_edges=chunk_edges, num_sampled_offsets=sampled)
    return Row(f"pairwise loss {name}", cost.multiply_adds, cost.temp_bytes)


class _Messages(NamedTuple):
    """Rows of a relation's messages, once and in every iteration; stored: their scores stay, others are temporary."""

    once: Row
    every: Row
    stored: bool


def _messages(name: str, shapes: tuple, itemsize: int, inference: mean_field.Settings) -> _Messages:
    number, algorithm = inference.num_iterations, inference.algorithm
    if algorithm == "auto":
        algorithm = costs.algorithm(*shapes, num_iterations=number)
    if algorithm == "table":
        cost = costs.table_messages(*shapes, num_iterations=number)
        formed, one = (costs.table_messages(*shapes, num_iterations=n).multiply_adds for n in (0, 1))
        once = one - formed
    else:
        cost = costs.factored_messages(*shapes, itemsize=itemsize, chunk_edges=inference.chunk_edges)
        once = cost.multiply_adds
        cost = cost._replace(multiply_adds=number * once)
    every = Row(f"messages {name}, {number} iterations, {algorithm}", cost.multiply_adds, cost.temp_bytes)
    return _Messages(Row(f"messages {name}, one iteration", once), every, algorithm == "table")


def _bytes(tree: Any) -> int:
    return sum(num_bytes(x) for x in jax.tree.leaves(tree))


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
