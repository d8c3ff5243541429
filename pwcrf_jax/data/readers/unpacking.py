"""Unpacks archives by rules of our own, whatever Python's version allows: regular files and folders, each name once.

Links, devices and names that lead elsewhere are refused. Owners, modes and times are not taken over.
"""

import contextlib
import gzip
import logging
import lzma
import os
import re
import secrets
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from pwcrf_jax.data.readers.disk import locked, unwritable
from pwcrf_jax.data.readers.files import DataError, open_file

_CHUNK = 1 << 20  # bytes held at a time
_MAX_RATIO, _SMALL = 100, 1 << 30  # images and masks are packed 1:10 at most; below _SMALL bytes nobody is harmed
_BLOCK = 4096  # what a file takes on a disk, at least
_ZIP_HEADER = 30  # bytes before each member of a .zip, at least
_LEFTOVER = re.compile(r"[0-9a-f]{16}\.[0-9a-f]{8}")
_DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, ValueError,
    OverflowError, IndexError, RuntimeError, NotImplementedError,
    struct.error,
)  # fmt: skip

log = logging.getLogger(__name__)


class _Member(NamedTuple):
    """A regular file, or a folder (stream None)."""

    name: str
    size: int
    stream: IO[bytes] | None


class _OddError(Exception):
    """Why a member is not unpacked."""


def unpack(paths: Sequence[Path], home: Path) -> None:
    """Unpacks archives (.zip, .tar, .tar.gz, .tgz) into one folder, which is there whole or not at all.

    Of several processes one unpacks and the others wait. What one that was killed has left is deleted. Where two
    archives hold a file of the same name, that of the later one stays.

    Args:
      paths: the archives.
      home: the folder; its parent is made, holds nothing else than such folders, and has a lock beside it.

    Raises:
      DataError: an archive that is damaged or holds what is not unpacked (the member is named), or a disk that is full
        or cannot be written.
    """
    parent = home.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = parent.with_name(f"{parent.name}.lock")
        with locked(lock, f"another process unpacks archives into {parent}; waiting for it") as held:
            for leftover in parent.iterdir() if held else ():  # nobody writes it while we hold the lock
                if _LEFTOVER.fullmatch(leftover.name):
                    shutil.rmtree(leftover, ignore_errors=True)
            if not home.is_dir():
                _unpack(paths, home)
    except OSError as e:
        raise unwritable(parent, e) from e


def _unpack(paths: Sequence[Path], home: Path) -> None:
    part, names = home.with_name(f"{home.name}.{secrets.token_hex(4)}"), _Names()
    try:
        part.mkdir()
        for path in paths:
            log.info("unpacking %s into %s", path, home)
            _unpack_one(path, part, names)
        os.sync()  # or a power cut after the renaming could leave a folder that only looks whole
        os.rename(part, home)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _unpack_one(path: Path, part: Path, names: "_Names") -> None:
    """OSError is what writing raises; all else, what reading raises too, is a DataError."""
    member = None
    try:
        with _Archive(path) as raw:
            for member in (_zip if path.suffix == ".zip" else _tar)(raw, part):
                target = part.joinpath(*names.add(member, path))
                if member.stream is None:
                    target.mkdir(parents=True, exist_ok=True)
                else:
                    _write(member.stream, member.size, target)
                member = None
    except DataError:
        raise
    except _OddError as e:
        raise DataError(
            f"{path}: cannot be unpacked, its member {e}; download it again, or unpack it yourself in {path.parent}"
        ) from e
    except _DAMAGED as e:
        inside = f" at {member.name!a}" if member else ""
        reason = " ".join(str(e).split())[:200]
        raise DataError(
            f"{path}: cannot be unpacked, the archive is damaged{inside} ({reason}); download it again"
        ) from e


def _write(stream: IO[bytes], size: int, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # of an earlier archive
    left = size
    with open(target, "xb") as file:
        while chunk := stream.read(_CHUNK):
            left -= len(chunk)
            file.write(chunk)
    if left:
        raise EOFError(f"{size - left} bytes instead of {size}")


class _Names:
    """The names that were unpacked, so that no two of them can be one file on any file system."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, Path | None]] = {}  # as compared -> as spelt, and a file's archive

    def add(self, member: _Member, archive: Path) -> list[str]:
        """The parts of a member's path; _OddError for one that cannot or must not be a file's."""
        name = member.name
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in parts:
            raise _OddError(f"{name!a} leads out of its folder")
        # Undecodable bytes are surrogates, which are not printable either.
        if "\\" in name or not all(c.isprintable() for c in name):
            raise _OddError(f"{name!a} has characters that are in no name")
        if max(map(len, map(os.fsencode, parts)), default=0) > 255 or len(os.fsencode(name)) > 1024:
            raise _OddError(f"{name[:80]!a}... has too long a name")
        if not parts and member.stream is not None:
            raise _OddError(f"{name!a} is a file without a name")
        for depth in range(1, len(parts) + 1):
            spelt = "/".join(parts[:depth])
            new = spelt, archive if depth == len(parts) and member.stream is not None else None
            old = self._known.setdefault(_as_compared(spelt), new)
            if old is not new and (old[0] != spelt or (old[1] is None) != (new[1] is None) or old[1] == archive):
                raise _OddError(f"{name!a} is there twice, also as {old[0]!a}")
            self._known[_as_compared(spelt)] = new
        return parts


def _as_compared(name: str) -> str:
    """Equal for names that some file system takes for the same."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


class _Archive:
    """An archive's bytes. An error of the disk it lies on is told from one of the disk that is written."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open_file(path)
        with _reading(path):
            self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> "_Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        with _reading(self.path):
            return self._file.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def check(self, unpacked: int, room: Path | None = None) -> None:
        """DataError where so many bytes are too many for the archive, or for the disk of a folder."""
        if unpacked > max(_SMALL, _MAX_RATIO * self.size):
            raise DataError(
                f"{self.path}: cannot be unpacked, its {self.size:,} bytes would become {unpacked:,} or more, as no "
                "data set's do; download it again"
            )
        if room and unpacked > (free := shutil.disk_usage(room).free):
            raise DataError(
                f"{self.path}: cannot be unpacked into {room.parent}, where {free:,} bytes are free and {unpacked:,} "
                "are needed; make room or set data.data_dir to another folder"
            )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        reason = e.strerror or e
        raise DataError(f"{path}: cannot be read ({reason}); check its permissions and its disk") from e


def _zip(raw: _Archive, room: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(raw) as archive:
        infos = archive.infolist()
        raw.check(sum(max(info.file_size, _BLOCK) for info in infos), room)
        _check_overlaps(infos, raw.size)
        _check_count(len(infos), raw)
        for info in infos:
            name, mode = info.orig_filename, info.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _OddError(f"{name!a} is a link or a special file")
            if info.flag_bits & 0x41:
                raise _OddError(f"{name!a} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _OddError(f"{name!a} is compressed by method {info.compress_type}")
            if name.endswith("/"):
                yield _Member(name, 0, None)
                continue
            with archive.open(info) as stream:  # checks the name there, and the checksum at its end
                yield _Member(name, info.file_size, stream)


def _check_overlaps(infos: Sequence[zipfile.ZipInfo], end: int) -> None:
    """_OddError where members share bytes, which makes a small archive endless."""
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        if info.header_offset < 0 or info.header_offset + _ZIP_HEADER + info.compress_size > end:
            raise _OddError(f"{info.orig_filename!a} lies in another one")
        end = info.header_offset


def _check_count(found: int, raw: _Archive) -> None:
    """EOFError where the directory of a .zip lacks members: zipfile does not see one that hides those behind it."""
    raw.seek(max(0, raw.size - (1 << 16) - 100))
    tail = raw.read(_CHUNK)
    at, at64 = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    (told,) = struct.unpack_from("<H", tail, at + 10)
    if told == 0xFFFF and at64 >= 0:
        (told,) = struct.unpack_from("<Q", tail, at64 + 32)
    if (found - told) % (1 << 16):  # some programs count no further
        raise EOFError(f"{found} members instead of {told}")


def _tar(raw: _Archive, room: Path) -> Iterator[_Member]:
    packed = raw.read(2) == b"\x1f\x8b"  # whatever its name: browsers unpack a .tgz and keep the name
    raw.seek(0)
    raw.check(0 if packed else raw.size, room)
    stream = _Blocks(gzip.GzipFile(fileobj=raw, mode="rb") if packed else raw)
    unpacked = 0
    # typeshed asks for write and close, which reading does not call.
    with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8") as archive:  # type: ignore[call-overload]
        while info := archive.next():
            name = info.name
            if not (info.isdir() or (info.isreg() and not info.issparse())):
                kind = "a link" if info.issym() or info.islnk() else "a special or sparse file"
                raise _OddError(f"{name!a} is {kind}")
            # Also not NaN. Negative sizes would send tarfile back and forth for ever.
            for field, value, end in (
                ("size", info.size, 1 << 62),
                ("time", info.mtime, 1 << 34),
                ("owner", info.uid, 1 << 32),
                ("group", info.gid, 1 << 32),
            ):
                if not 0 <= value < end:
                    raise _OddError(f"{name!a} has the {field} {value}")
            unpacked += max(info.size, _BLOCK)
            raw.check(unpacked)
            stream.left = info.size
            yield _Member(name, info.size, None if info.isdir() else archive.extractfile(info))
            stream.left = _CHUNK
            archive.members.clear()  # or a million names would be kept
        # tarfile takes a header that it cannot read for the end.
        if stream.last.strip(b"\0") or len(stream.last) != tarfile.BLOCKSIZE:
            raise EOFError("it breaks off before its end")
        stream.read_on()


class _Blocks:
    """The stream for tarfile: keeps the last block; of it no more than `left` bytes are read, ample for headers."""

    def __init__(self, stream: gzip.GzipFile | _Archive):
        self._stream, self.last, self.left = stream, b"", _CHUNK

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header of {size} bytes or more")
        self.last = self._stream.read(size)
        self.left -= len(self.last)
        return self.last

    def read_on(self) -> None:
        """To the end, and so to gzip's checksum."""
        while self._stream.read(_CHUNK):
            pass

    def seek(self, position: int) -> int:
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()
