"""A graph of ONNX operators while it is built: values, nodes, loops, and what of them the outputs need.

What is constant is computed here, not in the file. A value may be stored smaller than it is: axes of length 1 stand for
longer ones until a node needs them written out, as ONNX broadcasts where it adds and multiplies.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

Shape = tuple[int, ...]

OPSET, IR = 18, 8
"""Of ONNX 1.13, which runtimes read since early 2023; reductions take their axes as an input from 18 on."""

_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
          "neg": np.negative, "sign": np.sign, "abs": np.abs, "and": np.bitwise_and, "or": np.bitwise_or,
          "not": np.invert}  # fmt: skip
_TRUTHS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
           "ne": np.not_equal, "is_finite": np.isfinite}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Value:
    """An array of the graph.

    Attributes:
      held: a constant, np.ndarray, or the name of what a node or an input gives.
      shape, dtype: of what is stored; an axis of 1 may stand for a longer one.
    """

    held: np.ndarray | str
    shape: Shape
    dtype: np.dtype

    @property
    def constant(self) -> np.ndarray | None:
        """The array, where it is known; None: a name."""
        return None if isinstance(self.held, str) else self.held


@dataclasses.dataclass
class Node:
    """An operator. A loop has a body, whose outputs after the first are those of the loop.

    Attributes:
      kind: of ONNX, such as "MatMul".
      inputs, outputs: names.
      attributes: of ONNX, int, float or list.
      body: of a loop alone.
    """

    kind: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    body: "Body | None" = None


@dataclasses.dataclass
class Body:
    """What a loop does each time.

    Attributes:
      nodes: in their order.
      inputs, outputs: number, condition and state; condition, state and what is stacked.
      num_state: arrays that go from one time to the next.
    """

    nodes: list[Node]
    inputs: list[Value]
    outputs: list[Value]
    num_state: int


class Graph:
    """Nodes and constants, added one after the other."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[tuple, tuple[str, np.ndarray]] = {}
        self._numbers = itertools.count()

    def constant(self, array: Any, dtype: Any = None) -> Value:
        """An array that is known."""
        array = np.asarray(array, dtype)
        return Value(array, array.shape, array.dtype)

    def new(self, shape: Sequence[int], dtype: Any) -> Value:
        """A name that nothing has yet, of an array of this shape."""
        return Value(f"v{next(self._numbers)}", tuple(map(int, shape)), np.dtype(dtype))

    def name(self, value: Value) -> str:
        """What nodes call a value; equal constants have one name."""
        if isinstance(value.held, str):
            return value.held
        array = np.ascontiguousarray(value.held).reshape(value.shape)
        key = (array.shape, str(array.dtype), array.tobytes())
        if key not in self.constants:
            self.constants[key] = (f"c{next(self._numbers)}", array)
        return self.constants[key][0]

    def add(self, kind: str, inputs: Sequence[Value], shape: Sequence[int], dtype: Any, **attributes: Any) -> Value:
        """A node of one result, of this shape."""
        out = self.new(shape, dtype)
        self.nodes.append(Node(kind, [self.name(x) for x in inputs], [self.name(out)], attributes))
        return out

    def levelled(self, kind: str, inputs: Sequence[Value], dtype: Any = None, **attributes: Any) -> Value:
        """A node that broadcasts; dtype None: that of the first input."""
        shape = np.broadcast_shapes(*(x.shape for x in inputs))
        return self.add(kind, inputs, shape, inputs[0].dtype if dtype is None else dtype, **attributes)

    def full(self, value: Value, shape: Sequence[int]) -> Value:
        """The value with all axes written out."""
        shape = tuple(map(int, shape))
        if value.shape == shape:
            return value
        if value.constant is not None and np.prod(shape) <= 4096:
            return self.constant(np.broadcast_to(value.constant, shape))
        return self.add("Expand", [value, self.constant(shape, np.int64)], shape, value.dtype)

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """The value, stored in full, in another shape."""
        shape = tuple(map(int, shape))
        if value.shape == shape:
            return value
        if value.constant is not None:
            return self.constant(value.constant.reshape(shape))
        return self.add("Reshape", [value, self.constant(shape, np.int64)], shape, value.dtype)

    def transpose(self, value: Value, axes: Sequence[int]) -> Value:
        """The value with its axes in another order."""
        axes = list(map(int, axes))
        if axes == sorted(axes):
            return value
        if value.constant is not None:
            return self.constant(value.constant.transpose(axes))
        return self.add("Transpose", [value], [value.shape[i] for i in axes], value.dtype, perm=axes)

    def cast(self, value: Value, dtype: Any) -> Value:
        """The value in another type."""
        dtype = np.dtype(dtype)
        if value.dtype == dtype:
            return value
        if value.constant is not None:
            return self.constant(value.constant, dtype)
        return self.add("Cast", [value], value.shape, dtype, to=_type(dtype))

    @contextlib.contextmanager
    def inside(self) -> Iterator[list[Node]]:
        """In here nodes go into a list of their own, which this gives: a loop's body."""
        outer, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outer

    def loop(self, length: int, state: Sequence[Value], body: Body) -> list[Value]:
        """The last state, and the outputs that are stacked, of a body run `length` times."""
        ends = [self.new(x.shape, x.dtype) for x in body.outputs[1 : 1 + body.num_state]]
        ends += [self.new((length, *x.shape), x.dtype) for x in body.outputs[1 + body.num_state :]]
        times = self.name(self.constant(length, np.int64))
        inputs = [times, "", *(self.name(x) for x in state)]
        self.nodes.append(Node("Loop", inputs, [self.name(x) for x in ends], {}, body))
        return ends


def needed(nodes: Sequence[Node], wanted: set[str]) -> tuple[list[Node], set[str]]:
    """Those of the nodes that lead to wanted names, and all names that they read. Loops lose what nothing reads."""
    kept, wanted = [], set(wanted)
    for node in reversed(nodes):
        if not wanted & set(node.outputs):
            continue
        if node.body is not None:
            node = _without_unread(node, wanted)
        kept.append(node)
        wanted |= set(node.inputs)
        if node.body is not None:
            inner, read = needed(node.body.nodes, {str(x.held) for x in node.body.outputs})
            node.body.nodes = inner
            wanted |= read
    return kept[::-1], wanted


def _without_unread(node: Node, wanted: set[str]) -> Node:
    """A loop without the stacked outputs that nothing reads."""
    body = node.body
    assert body is not None
    keeps = [i < body.num_state or name in wanted for i, name in enumerate(node.outputs)]
    outputs = [name for name, keep in zip(node.outputs, keeps, strict=True) if keep]
    inner = [body.outputs[0], *(x for x, keep in zip(body.outputs[1:], keeps, strict=True) if keep)]
    return dataclasses.replace(node, outputs=outputs, body=dataclasses.replace(body, outputs=inner))


def model(graph: Graph, inputs: Sequence[Value], outputs: dict[str, Value], defaults: dict[str, np.ndarray]) -> Any:
    """An onnx.ModelProto of what the outputs need.

    Args:
      graph: `Graph`, with all nodes.
      inputs: values by name.
      outputs: by the names that they will have.
      defaults: of inputs that need not be given.
    """
    from onnx import helper, numpy_helper

    for name, value in outputs.items():
        graph.nodes.append(Node("Identity", [graph.name(value)], [name], {}))
    nodes, read = needed(graph.nodes, set(outputs))
    constants = [numpy_helper.from_array(x, name) for name, x in graph.constants.values() if name in read]
    constants += [numpy_helper.from_array(x, name) for name, x in defaults.items()]
    named = [Value(name, x.shape, x.dtype) for name, x in outputs.items()]
    given, made = list(map(_info, inputs)), list(map(_info, named))
    program = helper.make_graph(list(map(_proto, nodes)), "predictor", given, made, initializer=constants)
    return helper.make_model(program, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)


def _proto(node: Node) -> Any:
    from onnx import helper

    attributes = dict(node.attributes)
    if (body := node.body) is not None:
        infos = (list(map(_info, body.inputs)), list(map(_info, body.outputs)))
        attributes["body"] = helper.make_graph(list(map(_proto, body.nodes)), f"{node.outputs[0]}_body", *infos)
    return helper.make_node(node.kind, node.inputs, node.outputs, **attributes)


def _info(value: Value) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(str(value.held), _type(value.dtype), value.shape)


def _type(dtype: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def evaluated(primitive: Any, inputs: Sequence[np.ndarray], params: dict[str, Any]) -> list[np.ndarray]:
    """What an operation makes of constants: NumPy's where that is the same, else JAX's, which compiles for each."""
    name = primitive.name
    if name in _EXACT:
        return [np.asarray(_EXACT[name](*inputs), inputs[0].dtype)]
    if name in _TRUTHS:
        return [_TRUTHS[name](*inputs)]
    if name == "select_n" and len(inputs) == 3 and inputs[0].dtype == bool:
        return [np.where(inputs[0], inputs[2], inputs[1])]
    if name == "iota":
        shape, axis = params["shape"], params["dimension"]
        steps = np.arange(shape[axis], dtype=params["dtype"]).reshape(-1, *[1] * (len(shape) - 1 - axis))
        return [np.broadcast_to(steps, shape)]
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        out = primitive.bind(*inputs, **params)
    return [np.asarray(x) for x in (out if primitive.multiple_results else [out])]
