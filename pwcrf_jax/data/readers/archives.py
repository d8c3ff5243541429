"""Official archives and MATLAB files: found, read, with errors that name the file."""

import contextlib
import io
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io

from pwcrf_jax.data.readers.files import DataError, open_file, present, read_file
from pwcrf_jax.data.readers.unpacking import unpack


def locate(source: Path, folders: Sequence[str], archives: Sequence[str], data_dir: str) -> Path | None:
    """The folder that holds a data set, unpacked already or from an archive as it was downloaded.

    Args:
      source: the user's folder.
      folders: where the data lie below it, or below what the archives unpack to; the first that exists is taken.
        "" stands for `source` itself.
      archives: file names, .tar, .tar.gz, .tgz or .zip, looked for in `source` when none of the folders is there. All
        that are there are unpacked into one folder below `data_dir`, once.
      data_dir: where prepared data sets are kept.

    Returns:
      The folder, or None where there is neither a folder nor an archive.

    Raises:
      DataError: a folder or an archive that is a link to nothing or another kind of thing; an archive that is damaged,
        that holds none of the folders or what is not unpacked (see `pwcrf_jax.data.readers.unpacking`), or a full disk.
    """
    for folder in folders:
        if present(source / folder, folder=True):
            return source / folder
    found = [source / name for name in archives if present(source / name)]
    if not found:
        return None
    home = Path(data_dir) / "unpacked" / _digest(found)
    if not home.is_dir():
        unpack(found, home)
    for folder in folders:
        if folder and (home / folder).is_dir():
            return home / folder
    names = ", ".join(map(str, found))
    raise DataError(f"{names}: holds none of {', '.join(f for f in folders if f)}; is it the official archive?")


def _digest(paths: Sequence[Path]) -> str:
    from pwcrf_jax.data.builder import fingerprint

    return fingerprint([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths])


def read_mat(path: Path, *names: str) -> tuple[Any, ...]:
    """Variables of a MATLAB file of version 5 to 7 (structs as dicts, cells as arrays of objects).

    Raises:
      DataError: missing, damaged, of another version (see `open_mat73`), or without one of the variables.
    """
    data = read_file(path, 1 << 32)
    try:
        _check_mat(data, names)
        content = scipy.io.loadmat(io.BytesIO(data), simplify_cells=True, variable_names=names)
    except Exception as e:  # scipy: MatReadError, ValueError, TypeError, zlib.error, struct.error, ...
        raise DataError(f"{path}: cannot be read as a .mat file ({e}); restore it from the original data") from e
    return tuple(_variable(content, name, path) for name in names)


# Bytes of a value of each type of element; classes of matrices.
_MAT_TYPES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8, 16: 1, 17: 2, 18: 4}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR, _SPARSE, _NUMBERS = 1, 2, 4, 5, range(6, 16)


def _check_mat(data: bytes, names: Sequence[str]) -> None:
    """Walks through a MATLAB file: scipy.io goes by what it says of itself, and a wrong byte may end the process.

    Raises:
      ValueError, KeyError, struct.error, zlib.error: its parts do not fit together.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None or struct.unpack(f"{order}H", data[124:126])[0] != 0x0100:
        raise ValueError("no MATLAB file of version 5 to 7")
    for kind, content in _mat_elements(memoryview(data)[128:], order):
        if kind == _COMPRESSED:
            ((kind, content),) = _mat_elements(memoryview(zlib.decompress(content)), order)
        if kind != _MATRIX:
            raise ValueError(f"a variable of type {kind}")
        _check_matrix(content, order, names)


def _mat_elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and content of each element of a file or a matrix."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:  # up to 4 bytes, written where the size would be
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data) or (start == at + 4 and size > 4):
            raise ValueError("an element longer than what holds it")
        yield kind, data[start : start + size]
        at = at + 8 if start == at + 4 else start + (size if kind == _COMPRESSED else -(-size // 8) * 8)


def _check_matrix(data: memoryview, order: str, names: Sequence[str] = ()) -> None:
    """names: matrices of another name are not looked into; (): this one is, whatever its name."""
    if not data:  # an empty place of a cell or struct
        return
    elements = _mat_elements(data, order)
    (kind, flags), (dims_kind, dims), (name_kind, name) = (next(elements, (0, b"")) for _ in range(3))
    if (kind, len(flags)) != (6, 8) or dims_kind not in (5, 6) or len(dims) % 4 or name_kind not in (1, 16):
        raise ValueError("a matrix without header")
    shape = struct.unpack(f"{order}{len(dims) // 4}i", dims)
    if not 2 <= len(shape) <= 32 or min(shape) < 0:
        raise ValueError(f"a matrix of shape {shape}")
    if names and bytes(name).decode("latin-1") not in names:
        return
    (flags, _), parts, count = struct.unpack(f"{order}II", flags), list(elements), math.prod(shape)
    cls, numbers = flags & 0xFF, 2 if flags & 0x0800 else 1  # the latter where they are complex
    if cls in _NUMBERS:
        fits = len(parts) == numbers and all(len(p) == count * _MAT_TYPES[k] for k, p in parts)
    elif cls == _CHAR:
        fits = len(parts) == 1 and parts[0][0] in (1, 2, 4, 16, 17, 18)
    elif cls == _SPARSE:
        logical = bool(flags & 0x0200)
        fits = len(parts) == 2 + numbers and len(shape) == 2 and _sparse_fits(shape, parts, order, logical)
    elif cls == _CELL:
        fits = len(parts) == count
    elif cls == _STRUCT:
        (length, fields), parts = [p for _, p in parts[:2]], parts[2:]
        (length,) = struct.unpack(f"{order}i", length)
        fits = length > 0 and len(fields) % length == 0 and len(parts) == count * (len(fields) // length)
    else:
        raise ValueError(f"a matrix of class {cls}, which only MATLAB can read")
    if cls in (_CELL, _STRUCT):
        fits = fits and all(k == _MATRIX for k, _ in parts)
        for _, part in parts if fits else ():
            _check_matrix(part, order)
    if not fits:
        raise ValueError(f"a matrix of shape {shape} with parts that do not fit")


def _sparse_fits(shape: Sequence[int], parts: Sequence[tuple[int, memoryview]], order: str, logical: bool) -> bool:
    if [kind for kind, _ in parts[:2]] != [5, 5] or len(parts[1][1]) != 4 * (shape[1] + 1):
        return False
    rows, starts = (np.frombuffer(part, f"{order}i4") for _, part in parts[:2])
    used = starts[-1]
    if starts[0] or (np.diff(starts) < 0).any() or used > len(rows):
        return False
    if used and not 0 <= rows[:used].min() <= rows[:used].max() < shape[0]:
        return False
    # Logical values are bytes, whatever type MATLAB gives them.
    return all(len(p) >= used * min(_MAT_TYPES[k], 1 if logical else 8) for k, p in parts[2:])


@contextlib.contextmanager
def open_mat73(path: Path, *names: str) -> Iterator[tuple[h5py.Dataset | h5py.Group, ...]]:
    """Variables of a MATLAB file of version 7.3, which is HDF5: axes come in reversed order, cells as references.

    Raises:
      DataError: missing, damaged, not of this version, or without one of the variables; also for any error inside the
        with block, where a damaged file may say anything.
    """
    open_file(path).close()  # HDF5 would wait for a pipe
    try:
        with h5py.File(path, "r") as content:
            variables = tuple(_variable(content, name, path) for name in names)
            for name, variable in zip(names, variables, strict=True):
                if not isinstance(content.get(name, getlink=True), h5py.HardLink) or (
                    isinstance(variable, h5py.Dataset) and (variable.is_virtual or variable.external)
                ):
                    raise DataError(f"{path}: {name!r} lies in another file; restore it from the original data")
                # HDF5 2.0 ends the process where a checked chunk is shorter than its checksum; MATLAB writes none.
                if isinstance(variable, h5py.Dataset) and variable.fletcher32:
                    raise DataError(f"{path}: {name!r} has checksums, as MATLAB never writes; restore it from the "
                                    "original data")  # fmt: skip
            yield variables
    except DataError:
        raise
    except Exception as e:  # h5py: OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, ...
        raise DataError(f"{path}: cannot be read as a .mat file of version 7.3 ({e}); restore it from the original "
                        "data") from e  # fmt: skip


def _variable(content: Any, name: str, path: Path) -> Any:
    if name not in content:
        known = ", ".join(k for k in content if not k.startswith(("_", "#")))
        raise DataError(f"{path}: holds no variable {name!r} (it holds {known or 'none'}); is it the original file?")
    return content[name]
