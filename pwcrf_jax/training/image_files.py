"""Which files `eval.py --images` means, and what lies there and is not predicted.

What is an image is told by its suffix or, where that says nothing, by its first bytes. Whatever is one is predicted or
named as failed; what is none is named too.
"""

import fnmatch
import glob
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from pwcrf_jax.data.common import DataError

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .dib .webp .tif .tiff .gif .ppm .pgm .pbm .pnm .avif .heic .heif .jp2 .jxl "
    ".dng .nef .cr2 .cr3 .arw .orf .rw2 .raf".split()
)
"""Of images; not all can be read, but none may be left out without a word."""

_FIRST_BYTES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|BM.{4}\0{4}|RIFF.{4}WEBP|II[*+]\0|MM\0[*+]|GIF8[79]a|P[1-6]\s+[#\d]"
    rb"|.{4}ftyp(?:avi[fs]|hei[cmsx]|hev[cmsx]|mif1|msf1|crx )|\0{3}\x0c(?:jP  |JXL )\r\n\x87\n|\xff\x4f\xff\x51"
    rb"|\xff\x0a|8BPS|FUJIFILM|IIRO|IIU\0|DDS |qoif|#\?RADIANCE|\x76\x2f\x31\x01",
    re.DOTALL,
)
_HEAD = 32  # bytes, enough for these
WRITTEN = ("labels", "overlays", "probabilities", "results")  # what predictions are, in a folder of --output


class Found(NamedTuple):
    """What lies where --images points.

    images: {name: file}, to be predicted. failed: {path: why}, images that are not, and what may hold some but cannot
    be looked into; the reason names the path. left_out: {path: why}, no images, or predicted under another name.
    """

    images: dict[str, Path]
    failed: dict[str, str]
    left_out: dict[str, str]


def find_images(images: str, output: str) -> Found:
    """What --images means: a file, a folder with all below it, or a pattern.

    The name of an image is its path below the folder, or the first wildcard, without the suffix if it is one of
    `SUFFIXES`. Linked folders are followed, each real folder once. Hidden files count where the pattern names them.

    output: earlier predictions in there are no images.

    Raises:
      DataError: no image there, or two of one name.
    """
    path, found = Path(images), Found({}, {}, {})
    if path.is_dir():
        root, files = path, _sorted_out(_walk(path, found), path, found)
    elif os.path.lexists(path):
        _first_bytes(path)  # refuses what is no file
        root, files = path.parent, [path]
    else:
        root, matches = _matching(path, found)
        files = _sorted_out(matches, None, found)
    out = Path(os.path.realpath(output))
    for file in files:
        real = Path(os.path.realpath(file))  # Path.resolve raises where links go in a circle
        if out in real.parents:
            within = real.relative_to(out).parts
            if within[0] in WRITTEN:
                found.left_out[str(out / within[0])] = "what --output holds of earlier predictions"
            else:
                found.failed[str(file)] = f"{file}: lies in --output={output}; name another output"
            continue
        short = file.with_suffix("") if file.suffix.lower() in SUFFIXES else file
        name = str(short.relative_to(root))
        if name in found.images:
            raise DataError(
                f"{shown(found.images[name])} and {shown(file)} would both be predicted as {shown(name)!r}; rename one "
                "of them"
            )
        found.images[name] = file
    if not found.images:
        raise DataError(f"--images={shown(images)}: {_nothing(found)}")
    return found


def _nothing(found):
    if found.failed:
        why = next(iter(found.failed.values()))
        return f"none of {len(found.failed)} image files there can be predicted; the first: {shown(why)}"
    advice = "name an image, a folder or a quoted pattern like 'a/*.jpg'"
    if found.left_out:
        path, why = next(iter(found.left_out.items()))
        return f"no image files there; {len(found.left_out)} others, the first: {shown(path)}: {why}; {advice}"
    return f"no files there; {advice}"


def shown(path) -> str:
    """A path for a line of text: what would break the line, or move the cursor, is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def _first_bytes(path):
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(0, "it is no file")
            return file.read(_HEAD)
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read ({error.strerror})") from None


def _sorted_out(files, root, found):
    """Of files, those that are images; hidden ones, below `root`, are not taken."""
    for file in sorted(files):
        try:
            image = file.suffix.lower() in SUFFIXES or _FIRST_BYTES.match(_first_bytes(file))
        except DataError as error:
            found.failed[str(file)] = str(error)
            continue
        parts = file.relative_to(root).parts if root else ()
        hidden = next((i for i, part in enumerate(parts) if part.startswith(".")), None)
        if not image:
            place = file if hidden is None else root.joinpath(*parts[: hidden + 1])
            found.left_out[str(place)] = "no image" if hidden is None else "hidden, and no image"
        elif hidden is not None:
            found.failed[str(file)] = f"{file}: hidden; rename it, or name it by a pattern, to have it predicted"
        else:
            yield file


def _walk(root, found, enter=lambda folder: True):
    """The files below a folder, in the folders that `enter` takes.

    Each real folder is entered once, linked ones last, so that a folder is seen under its own name, and links in a
    circle end.
    """
    seen, folders, linked = set(), [root], []
    while folders or linked:
        link = not folders
        folder = linked.pop(0) if link else folders.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                found.left_out[str(folder)] = "a folder that was seen under another name"
                continue
            if link and root.resolve().is_relative_to(folder.resolve()):
                found.failed[str(folder)] = f"{folder}: links to a folder that {root} lies in; name that one instead"
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            found.failed[str(folder)] = f"{folder}: cannot be looked into ({error.strerror}); check its permissions"
            continue
        for entry in entries:
            path = folder / entry.name
            if not os.path.isdir(path):
                yield path
            elif enter(path):
                (linked if entry.is_symlink() else folders).append(path)


def _matching(path, found):
    """(the folder before the first wildcard, the files that match); as glob has it, but for links in a circle."""
    parts = path.parts
    magic = lambda i: glob.has_magic(parts[i]) and not Path(*parts[: i + 1]).exists()
    first = next((i for i in range(len(parts)) if magic(i)), len(parts))
    root, pattern = Path(*parts[:first]), parts[first:]
    if not root.is_dir():
        return root, []

    def enter(folder):
        below = folder.relative_to(root).parts
        if _fits(below, pattern, within=True):
            return True
        if _fits(below, pattern):
            found.left_out[str(folder)] = "a folder; '**' is for what lies in there too"
        return False

    return root, [file for file in _walk(root, found, enter) if _fits(file.relative_to(root).parts, pattern)]


def _fits(parts, pattern, within=False):
    """Whether a path matches a pattern, or `within`, whether something in that folder may."""
    if not parts:
        return bool(pattern) if within else all(part == "**" for part in pattern)
    if not pattern:
        return False
    hidden = parts[0].startswith(".")
    if pattern[0] == "**":
        return _fits(parts, pattern[1:], within) or (not hidden and _fits(parts[1:], pattern, within))
    fits = fnmatch.fnmatchcase(parts[0], pattern[0]) and hidden <= pattern[0].startswith(".")
    return fits and _fits(parts[1:], pattern[1:], within)
