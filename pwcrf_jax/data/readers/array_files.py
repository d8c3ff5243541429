"""Arrays of floats in `.npy`, `.npz` and `.safetensors` files: their shapes from the header alone, then their values.

A file is not trusted: no pickle is opened, and what a header declares is compared with the file's size before memory
is taken.
"""

import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from pwcrf_jax.data.readers.files import DataError, open_file

SUFFIXES = (".npy", ".npz", ".safetensors")

_FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}  # as safetensors calls them
_MAX_HEADER = 1 << 23  # bytes; beyond this no file goes that holds a few arrays


class ArrayFile(NamedTuple):
    """An array in a file.

    Attributes:
      path, name: the file, and the array's name in it; "" in a `.npy` file.
      shape, dtype: from the header; dtype as users call it, such as "float16" or "bfloat16".
      read: gives its values, floating-point numbers in the machine's order of bytes; raises DataError.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def arrays_of(path: Path) -> list[ArrayFile]:
    """The arrays of a file, of any type and shape, without reading their values.

    Raises:
      DataError: it is no file of its suffix, is damaged, or declares more than it holds.
    """
    kind = path.suffix.lower()
    opened = {".npy": _of_npy, ".npz": _of_npz, ".safetensors": _of_safetensors}
    if kind not in opened:
        raise DataError(f"{path}: cannot be read as an array; files are {', '.join(SUFFIXES)}")
    try:
        with open_file(path) as file:
            return opened[kind](path, file)
    except DataError:
        raise
    except Exception as error:  # a damaged file may have its library raise anything
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Any) -> DataError:
    told = " ".join(str(error).split())[:160] or type(error).__name__
    return DataError(f"{path}: is no {path.suffix.lower()} file, or damaged ({told}); write it again")


def _check_size(path: Path, name: str, needed: int, there: int) -> None:
    if needed != there:
        where = f"array {name!r}" if name else "the array"
        raise _damaged(path, f"{where} needs {needed:,} bytes, the file has {there:,}")


def _npy_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in NumPy's format; the file then stands at its values."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise _damaged(path, f"version {version[0]}.{version[1]} of the format, for arrays of named fields")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise DataError(f"{path}: holds Python objects, which are not opened; save a plain array of floats")
    return shape, dtype


def _of_npy(path: Path, file: IO[bytes]) -> list[ArrayFile]:
    shape, dtype = _npy_header(path, file)
    there = os.fstat(file.fileno()).st_size - file.tell()
    _check_size(path, "", math.prod(shape) * dtype.itemsize, there)

    def read() -> np.ndarray:
        with open_file(path) as again:
            return _values(path, lambda: np.lib.format.read_array(again, allow_pickle=False))

    return [ArrayFile(path, "", shape, dtype.name, read)]


def _of_npz(path: Path, file: IO[bytes]) -> list[ArrayFile]:
    found = []
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                continue
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as inside:
                try:
                    shape, dtype = _npy_header(path, inside)
                except DataError:
                    continue  # objects beside the scores, such as a dictionary of notes
                _check_size(path, name, math.prod(shape) * dtype.itemsize, member.file_size - inside.tell())
            found.append(ArrayFile(path, name, shape, dtype.name, _npz_reader(path, member.filename)))
    return found


def _npz_reader(path: Path, member: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        def values() -> np.ndarray:
            with open_file(path) as file, zipfile.ZipFile(file) as archive, archive.open(member) as inside:
                return np.lib.format.read_array(inside, allow_pickle=False)

        return _values(path, values)

    return read


def _of_safetensors(path: Path, file: IO[bytes]) -> list[ArrayFile]:
    (length,) = struct.unpack("<Q", file.read(8))
    there = os.fstat(file.fileno()).st_size - 8 - length
    if not 0 < length <= _MAX_HEADER or there < 0:
        raise _damaged(path, f"it declares a header of {length:,} bytes")
    found = []
    for name, about in sorted(json.loads(file.read(length)).items()):
        if name == "__metadata__":
            continue
        shape, (begin, end) = tuple(map(int, about["shape"])), map(int, about["data_offsets"])
        kind = str(about["dtype"])
        if min((0, *shape)) < 0 or not 0 <= begin <= end <= there:
            raise _damaged(path, f"array {name!r} lies outside of the file")
        if kind in _FLOATS:
            _check_size(path, name, math.prod(shape) * np.dtype(_FLOATS[kind]).itemsize, end - begin)
        called = "bfloat16" if kind == "BF16" else np.dtype(_FLOATS[kind]).name if kind in _FLOATS else kind
        found.append(ArrayFile(path, name, shape, called, _safetensor_reader(path, kind, shape, 8 + length + begin)))
    return found


def _safetensor_reader(path: Path, kind: str, shape: tuple[int, ...], begin: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        def values() -> np.ndarray:
            with open_file(path) as file:
                file.seek(begin)
                dtype = np.dtype(_FLOATS[kind])
                flat = np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype)
            if kind == "BF16":  # the upper half of a float32
                flat = (flat.astype(np.uint32) << 16).view(np.float32)
            return flat.reshape(shape)

        return _values(path, values)

    return read


def _values(path: Path, read: Callable[[], np.ndarray]) -> np.ndarray:
    try:
        array = read()
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    except DataError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, error) from error
