"""Files of a data set: opened without hanging, found or refused by name, and told apart from other files.

Nothing else in the package opens what a user names: a pipe, a device or a link to nothing would hang it, or be passed
over as if it were not there.
"""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image


class DataError(ValueError):
    """Something is wrong with the data or with how it was asked for; the message names it and the remedy."""


IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
"""Formats of images that are read, as PIL calls them; others are not even tried."""

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".webp", ".tif", ".tiff",
)  # fmt: skip
"""Suffixes of files in one of `IMAGE_FORMATS`, in lower case."""

MAX_PIXELS = 89_478_485
"""Pixels of an image at most, unless config.data.max_pixels says otherwise; PIL's own limit."""

_FOREIGN = (
    ".gif", ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pam",
    ".tga", ".psd", ".exr", ".hdr", ".svg", ".ico", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf",
    ".raw", ".pcx", ".sgi", ".xcf",
)  # fmt: skip
_FOREIGN_STARTS = {
    "GIF": rb"GIF8[79]a",
    "HEIC": rb"....ftyp(hei|hev|mif|msf)",
    "AVIF": rb"....ftypavi",
    "raw": rb"....ftypcrx",
    "PNM": rb"P[1-7]\s",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "Photoshop": rb"8BPS",
    "OpenEXR": rb"v/1\x01",
}


def open_file(path: Path) -> BinaryIO:
    """A file opened for reading. Whatever else has a name is refused: a pipe, a device or a socket may never end.

    Raises:
      DataError: it is not there, cannot be read, or is no regular file.
    """
    try:
        check_regular(path, os.stat(path).st_mode)  # opening a device may already do something
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        try:
            check_regular(path, os.fstat(file.fileno()).st_mode)
        except BaseException:
            file.close()
            raise
        return file
    except DataError:
        raise
    except FileNotFoundError as e:
        missing = "a link to nothing" if os.path.islink(path) else "no such file"
        raise DataError(f"{path}: cannot be read ({missing}); restore it, or correct what names it") from e
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the name
        raise DataError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); check its permissions") from e


def read_file(path: Path, most: int = 1 << 30) -> bytes:
    """The bytes of a file, `most` of them at most.

    Raises:
      DataError: as `open_file`, and for a file that is longer.
    """
    with open_file(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(most + 1) if size <= most else None
        except OSError as e:
            raise DataError(f"{path}: cannot be read ({e.strerror}); restore it from the original data") from e
    if data is None or len(data) > most:
        raise DataError(f"{path}: holds {size} bytes, more than the {most} that such a file has; is it the right one?")
    return data


def read_image_file(path: Path, max_pixels: float = MAX_PIXELS) -> bytes:
    """`read_file` of an image, of no more bytes than one of `max_pixels` pixels may have."""
    return read_file(path, int(max(1 << 30, 8 * min(max_pixels, 1 << 40))))


def present(path: Path, folder: bool = False) -> bool:
    """Whether an optional file (or folder) is there.

    Returns:
      False only where nothing has its name, or that of a folder that it would lie in.

    Raises:
      DataError: something has its name, but is a link to nothing, a pipe, a folder (or no folder), ...: what stands
        there was meant to count. The same for the folders above it.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        if not os.path.exists(there):
            raise DataError(f"{there}: is a link to nothing; restore its target, or remove it") from None
        if not os.path.isdir(there):
            raise DataError(f"{there}: is no folder, so that it cannot hold {path}; correct or remove it") from None
        return False
    except OSError as e:  # a link to itself, a folder that may not be looked into
        raise DataError(f"{path}: cannot be read ({e.strerror}); correct or remove it") from e
    if folder and not stat.S_ISDIR(mode):
        raise DataError(f"{path}: is {_kind(mode)}, expected a folder; correct or remove it")
    if not folder:
        check_regular(path, mode)
    return True


def check_regular(path: Path, mode: int) -> None:
    """DataError unless `st_mode` is that of a file."""
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is {_kind(mode)}, expected a file; correct or remove it")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def image_kind(path: Path) -> str:
    """Tells what a file among images is, by its suffix, or else by its first bytes.

    Returns:
      "image": to be read, and refused if that fails. "foreign": an image of a format that is not read, to be refused by
      name with `FOREIGN_REMEDY`. "other": no image, as far as its name and its first bytes tell.

    Raises:
      DataError: it cannot be read.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in SUFFIXES and not path.name.startswith("._"):  # so macOS calls what it keeps beside a file
        return "image"
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # a link to nothing, or to itself
        regular = False
    if not regular:
        return "foreign" if suffix in _FOREIGN else "other"
    with open_file(path) as file:
        head = file.read(32) or b""  # None where it would have to be waited for, as in /proc
    # Raw photographs are TIFF files, of a preview.
    if any(_accepts(name, head) for name in IMAGE_FORMATS if suffix not in _FOREIGN or name != "TIFF"):
        return "image"
    return "foreign" if suffix in _FOREIGN or foreign_format(head) else "other"


def foreign_format(data: bytes) -> str | None:
    """The format of an image that is not read, by its first bytes; None for all else."""
    return next((name for name, start in _FOREIGN_STARTS.items() if re.match(start, data, re.DOTALL)), None)


FOREIGN_REMEDY = f"images are {', '.join(IMAGE_FORMATS)} files ({', '.join(SUFFIXES)}); convert it, or remove it"


def _accepts(name: str, head: bytes) -> bool:
    if name == "BMP":  # two letters are the beginning of many a text
        return head[:2] == b"BM" and head[6:10] == bytes(4) and head[15:18] == bytes(3)
    Image.init()
    accept = Image.OPEN[name][1]
    return accept is not None and bool(accept(head))


def read_lines(path: Path, most: int = 1 << 28) -> list[str]:
    """The lines of a text file of names, with any of the usual line ends, without a byte order mark.

    Raises:
      DataError: as `read_file`, or it is not UTF-8.
    """
    try:
        text = read_file(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8") from e
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


_LIST_SUFFIXES = ("", ".txt", ".text", ".lst", ".list", ".csv", ".tsv")


def split_lists(folder: Path, splits: Sequence[str]) -> dict[str, Path]:
    """The lists SPLIT.txt that are there, each of which is optional.

    Raises:
      DataError: one is no file, or a file looks like a list under another name: without it the images would be dealt
        out otherwise than was meant.
    """
    lists = {split: folder / f"{split}.txt" for split in splits if present(folder / f"{split}.txt")}
    refuse_other_lists(folder, [path.name for path in lists.values()])
    return lists


def refuse_other_lists(folder: Path, known: Sequence[str]) -> None:
    """DataError for a file that looks like the list of a split but is none of those known."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        stem, suffix = os.path.splitext(entry.name.casefold())
        like = stem.startswith(("train", "val", "test")) and suffix in _LIST_SUFFIXES
        like = like or (stem in ("train", "val", "test") and suffix == ".json")
        if like and entry.name not in known and not entry.is_dir():
            raise DataError(
                f"{entry.path}: looks like the list of a split, which are train.txt, val.txt and test.txt; rename it, "
                "or move it elsewhere"
            )
