"""Official archives and MATLAB files: found, unpacked once, read, with errors that name the file."""

import contextlib
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import scipy.io

from pwcrf_jax.data.common import DataError


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
      DataError: an archive that is damaged, or that holds none of the folders.
    """
    for folder in folders:
        if (source / folder).is_dir():
            return source / folder
    present = [source / name for name in archives if (source / name).is_file()]
    if not present:
        return None
    home = Path(data_dir) / "unpacked" / _digest(present)
    if not home.is_dir():
        _unpack(present, home)
    for folder in folders:
        if folder and (home / folder).is_dir():
            return home / folder
    names = ", ".join(map(str, present))
    raise DataError(f"{names}: holds none of {', '.join(f for f in folders if f)}; is it the official archive?")


def _digest(paths: Sequence[Path]) -> str:
    from pwcrf_jax.data.base import fingerprint

    return fingerprint([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths])


def _unpack(paths: Sequence[Path], home: Path) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    part = tempfile.mkdtemp(prefix=f"{home.name}.", dir=home.parent)
    try:
        for path in paths:
            try:
                if path.suffix == ".zip":
                    with zipfile.ZipFile(path) as archive:
                        archive.extractall(part)  # drops "..", drives and leading slashes
                else:
                    with tarfile.open(path) as archive:
                        archive.extractall(part, filter="data")
            except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError, NotImplementedError) as e:
                raise DataError(f"{path}: cannot be unpacked, the archive is damaged ({e}); download it again") from e
            except OSError as e:  # of gzip and zlib too
                raise DataError(f"{path}: cannot be unpacked into {home.parent} ({e}); make room, set data.data_dir "
                                "to another folder, or download the archive again") from e  # fmt: skip
        with contextlib.suppress(OSError):  # another process was first
            os.rename(part, home)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_mat(path: Path, *names: str) -> tuple[Any, ...]:
    """Variables of a MATLAB file of version 5 to 7 (structs as dicts, cells as arrays of objects).

    Raises:
      DataError: missing, damaged, of version 7.3 (see `open_mat73`), or without one of the variables.
    """
    try:
        content = scipy.io.loadmat(path, simplify_cells=True, variable_names=names)
    except FileNotFoundError as e:
        raise DataError(f"{path}: is missing; restore it from the original data") from e
    except Exception as e:  # scipy: MatReadError, ValueError, TypeError, zlib.error, struct.error, ...
        raise DataError(f"{path}: cannot be read as a .mat file ({e}); restore it from the original data") from e
    return tuple(_variable(content, name, path) for name in names)


@contextlib.contextmanager
def open_mat73(path: Path, *names: str) -> Iterator[tuple[h5py.Dataset | h5py.Group, ...]]:
    """Variables of a MATLAB file of version 7.3, which is HDF5: axes come in reversed order, cells as references.

    Raises:
      DataError: missing, damaged, not of this version, or without one of the variables; also for an error of HDF5
        inside the with block.
    """
    try:
        with h5py.File(path, "r") as content:
            yield tuple(_variable(content, name, path) for name in names)
    except FileNotFoundError as e:
        raise DataError(f"{path}: is missing; restore it from the original data") from e
    except (OSError, RuntimeError, KeyError) as e:
        raise DataError(f"{path}: cannot be read as a .mat file of version 7.3 ({e}); restore it from the original "
                        "data") from e  # fmt: skip


def _variable(content: Any, name: str, path: Path) -> Any:
    if name not in content:
        known = ", ".join(k for k in content if not k.startswith(("_", "#")))
        raise DataError(f"{path}: holds no variable {name!r} (it holds {known or 'none'}); is it the original file?")
    return content[name]
