"""Tensors in a file of `torch.save`, found without torch and without running anything that the file says.

Such a file is a pickle, which is a program. The machine below knows the few operations that dictionaries of tensors are
made of; names of functions stay names, and of those it takes four for what they mean. Anything else is refused. Both
forms are read: a ZIP archive, and the stream of torch before 1.6.
"""

import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pwcrf_jax.nets.stored import StoredArray, WeightsError, some

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MAX_PROGRAM, _MAX_AXES = 1 << 21, 8  # bytes of pickles: those of the largest networks take a tenth of it
_STORAGES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "bf16", "Long": "i8", "Int": "i4", "Short": "i2"}
_STORAGES |= {"Char": "i1", "Byte": "u1", "Bool": "?"}
_DTYPES = {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()}
_WIDTHS = {dtype: 2 if dtype == "bf16" else np.dtype(dtype).itemsize for dtype in _STORAGES.values()}


class _Name(NamedTuple):
    """A function or a class that the file names."""

    name: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    values: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count values."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def torch_tensors(path: Path) -> dict[str, StoredArray]:
    """The tensors by name of a state dict, or of the one that a checkpoint has as "state_dict" or "model".

    Nothing of the values is read yet. Raises WeightsError for anything but tensors in dictionaries; damaged files may
    raise other errors too.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(0)
        if start == b"PK\x03\x04":
            tree, locate = _open_archive(path, file)
        else:
            tree, locate = _open_stream(path, file, start)
    if not isinstance(tree, dict):
        raise WeightsError(f"{path}: holds no dictionary of tensors; save model.state_dict() with torch.save")
    for wrapper in ("state_dict", "model"):
        if isinstance(tree.get(wrapper), dict):
            tree = tree[wrapper]
    tensors = {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        keys = some([key for key in tree if isinstance(key, str)])
        raise WeightsError(f"{path}: holds no tensors by name, but {keys}; save model.state_dict() with torch.save")
    return {name: _stored(path, name, tensor, locate) for name, tensor in tensors.items()}


def _stored(path: Path, name: str, tensor: Tensor, locate: Callable[[_Storage], Callable[[], bytes]]) -> StoredArray:
    """The tensor in its storage, which has each value once at least: copying takes no more than the file has."""
    storage, offset, shape, strides = tensor
    ints = all(type(value) is int and 0 <= value < 1 << 48 for value in (offset, *shape, *strides))
    if not ints or len(shape) != len(strides) or len(shape) > _MAX_AXES:
        raise WeightsError(f"{path}: {some([name])} is no tensor of the usual form; download it again")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    count = math.prod(int(size) for size in shape)
    if count > storage.values or (count and last >= storage.values):
        raise WeightsError(f"{path}: {some([name])} is larger than its storage; download it again")
    read_bytes = locate(storage)
    floats = storage.dtype == "bf16" or np.dtype(storage.dtype).kind == "f"

    def read() -> np.ndarray:
        content = read_bytes()
        if storage.dtype == "bf16":  # the upper half of a float32
            flat = (np.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4")
        else:
            flat = np.frombuffer(content, f"<{storage.dtype}")
        steps = [stride * flat.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)

    return StoredArray(shape, read, "" if floats else "holds whole numbers, which are no weights")


def _open_archive(path: Path, file: BinaryIO) -> tuple[Any, Callable[[_Storage], Callable[[], bytes]]]:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        programs = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(programs) != 1:
            raise WeightsError(f"{path}: a ZIP archive, but not one of torch.save (no data.pkl); download it again")
        root = programs[0].removesuffix("data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise WeightsError(f"{path}: has compressed parts, as torch.save writes none; download it again")
        order = archive.read(f"{root}byteorder")[:16] if f"{root}byteorder" in entries else b"little"
        if order != b"little":
            raise WeightsError(f"{path}: was saved on a machine of another byte order; save it again on this one")
        with archive.open(programs[0]) as program:
            tree = _Machine(path, program).run()

    def locate(storage: _Storage) -> Callable[[], bytes]:
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None or entry.file_size != storage.values * _WIDTHS[storage.dtype]:
            raise WeightsError(f"{path}: its tensors and what is stored do not fit together; download it again")
        if entry.file_size > os.path.getsize(path):
            raise WeightsError(f"{path}: declares more than the file has; download it again")

        def read() -> bytes:
            with zipfile.ZipFile(path) as again:
                return again.read(entry)

        return read

    return tree, locate


def _open_stream(path: Path, file: BinaryIO, start: bytes) -> tuple[Any, Callable[[_Storage], Callable[[], bytes]]]:
    if start[:2] != b"\x80\x02" or _Machine(path, file).run() != _MAGIC:
        raise WeightsError(f"{path}: not a file of torch.save")
    about = [_Machine(path, file).run() for _ in range(2)]
    if about[0] != _PROTOCOL or not isinstance(about[1], dict) or about[1].get("little_endian") is not True:
        raise WeightsError(f"{path}: of another protocol or byte order than torch.save's; save it again")
    machine = _Machine(path, file)
    tree = machine.run()
    keys, size = _Machine(path, file).run(), os.path.getsize(path)
    if not isinstance(keys, list) or set(map(type, keys)) - {str}:
        raise WeightsError(f"{path}: has no list of storages; download it again")
    places: dict[str, int] = {}
    for key in keys:
        storage = machine.storages.get(key)
        (values,) = struct.unpack("<q", file.read(8))
        if storage is None or storage.values != values or key in places:
            raise WeightsError(f"{path}: its tensors and what is stored do not fit together; download it again")
        places[key] = file.tell()
        end = places[key] + values * _WIDTHS[storage.dtype]
        if end > size:
            raise WeightsError(f"{path}: ends at {size:,} of at least {end:,} bytes; download it again")
        file.seek(end)

    def locate(storage: _Storage) -> Callable[[], bytes]:
        if storage.key not in places:
            raise WeightsError(f"{path}: its tensors and what is stored do not fit together; download it again")

        def read() -> bytes:
            with open(path, "rb") as again:
                again.seek(places[storage.key])
                return again.read(storage.values * _WIDTHS[storage.dtype])

        return read

    return tree, locate


class _Machine:
    """Reads one pickle: a stack, a memo, and one method for each operation that it knows."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file, self.left = path, file, _MAX_PROGRAM
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self) -> Any:
        while (code := self.take(1)) != b".":
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise self.refused(f"the operation {code!r}")
            operation(self)
        (result,) = self.stack
        return result

    def refused(self, what: str) -> WeightsError:
        return WeightsError(
            f"{self.path}: holds more than tensors ({what}), which is not read; save model.state_dict() with torch.save"
        )

    def take(self, count: int) -> bytes:
        self.left -= count
        if self.left < 0:
            raise self.refused("a longer pickle than any network's")
        content = self.file.read(count)
        if len(content) != count:
            raise WeightsError(f"{self.path}: ends within its first part; download it again")
        return content

    def skip(self, count: int) -> None:
        self.take(count)

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        text = b""
        while (byte := self.take(1)) != b"\n":
            text += byte
            if len(text) > 200:
                raise self.refused("a name without end")
        return text.decode("ascii")

    def since_mark(self) -> list[Any]:
        place = self.marks.pop()
        values = self.stack[place:]
        del self.stack[place:]
        return values

    def keep(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def last(self, count: int) -> None:
        values = tuple(self.stack.pop() for _ in range(count))
        self.stack.append(values[::-1])

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(target) is not dict or type(key) not in (str, int):  # the hash of others may take any time
                raise self.refused("something else than a dictionary by names")
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise self.refused("something else than a list")
        self.stack[-1].extend(values)

    def name(self) -> None:
        known = _Name(f"{self.line()}.{self.line()}")
        if known.name not in _KNOWN and known.name not in _DTYPES:
            raise self.refused(some([known.name]))
        self.stack.append(known)

    def persistent(self) -> None:
        """("storage", class, key, device, number of values), and in streams the view of another one, which is none."""
        kind, dtype, key, _, values, *view = self.stack.pop()
        fits = kind == "storage" and type(key) is str and type(values) is int and values >= 0
        if not fits or not isinstance(dtype, _Name) or dtype.name not in _DTYPES or view not in ([], [None]):
            raise self.refused("a storage of another form")
        storage = _Storage(_DTYPES[dtype.name], key, values)
        if self.storages.setdefault(key, storage) != storage:
            raise self.refused("a storage of two forms")
        self.stack.append(storage)

    def call(self) -> None:
        arguments, known = self.stack.pop(), self.stack.pop()
        if not isinstance(known, _Name) or known.name not in _KNOWN or type(arguments) is not tuple:
            raise self.refused("a call")
        self.stack.append(_KNOWN[known.name](self, arguments))

    def build(self) -> None:
        """Attributes of an OrderedDict, such as the versions of modules: not needed."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise self.refused("attributes")


def _ordered(machine: _Machine, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise machine.refused("a dictionary of another form")
    return {}


def _tensor(machine: _Machine, arguments: tuple[Any, ...]) -> Tensor:
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, _Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise machine.refused("a tensor of another form")
    return Tensor(storage, offset, shape, strides)


def _parameter(machine: _Machine, arguments: tuple[Any, ...]) -> Any:
    if not arguments or not isinstance(arguments[0], Tensor):
        raise machine.refused("a parameter of another form")
    return arguments[0]


_KNOWN: Mapping[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


_OPERATIONS: Mapping[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda machine: machine.skip(1),  # the version of the protocol
    b"(": lambda machine: machine.marks.append(len(machine.stack)),
    b")": _push(lambda machine: ()),
    b"]": _push(lambda machine: []),
    b"}": _push(lambda machine: {}),
    b"N": _push(lambda machine: None),
    b"\x88": _push(lambda machine: True),
    b"\x89": _push(lambda machine: False),
    b"K": _push(lambda machine: machine.number("B")),
    b"M": _push(lambda machine: machine.number("H")),
    b"J": _push(lambda machine: machine.number("i")),
    b"\x8a": _push(lambda machine: int.from_bytes(machine.take(machine.number("B")), "little", signed=True)),
    b"G": _push(lambda machine: struct.unpack(">d", machine.take(8))[0]),
    b"X": _push(lambda machine: machine.take(machine.number("I")).decode()),
    b"q": lambda machine: machine.keep(machine.number("B")),
    b"r": lambda machine: machine.keep(machine.number("I")),
    b"h": _push(lambda machine: machine.memo[machine.number("B")]),
    b"j": _push(lambda machine: machine.memo[machine.number("I")]),
    b"t": _push(lambda machine: tuple(machine.since_mark())),
    b"\x85": lambda machine: machine.last(1),
    b"\x86": lambda machine: machine.last(2),
    b"\x87": lambda machine: machine.last(3),
    b"s": lambda machine: machine.set_items([machine.stack.pop(), machine.stack.pop()][::-1]),
    b"u": lambda machine: machine.set_items(machine.since_mark()),
    b"a": lambda machine: machine.extend([machine.stack.pop()]),
    b"e": lambda machine: machine.extend(machine.since_mark()),
    b"c": _Machine.name,
    b"Q": _Machine.persistent,
    b"R": _Machine.call,
    b"b": _Machine.build,
}
