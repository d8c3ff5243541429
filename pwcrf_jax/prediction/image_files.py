"""Which files `pwcrf predict --images` means, and what lies there and is not predicted.

What is an image is told by its suffix or, where that says nothing, by its first bytes. Each is predicted or named as
failed; what is none is named too.
"""

import fnmatch
import glob
import os
from pathlib import Path
from typing import NamedTuple

from pwcrf_jax.data.readers.files import FOREIGN_REMEDY, SUFFIXES, DataError, image_kind, open_file
from pwcrf_jax.runtime import mirror
from pwcrf_jax.runtime.files import FileError, naming

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

    The name of an image is its path below the folder, or the first wildcard, without a suffix of `SUFFIXES`. Linked
    folders are followed, each real folder once. Hidden files count where the pattern names them.

    output: earlier predictions in there are no images.

    Raises:
      DataError: no image there, or two of one name.
      FileError: it may not be looked for.
    """
    path, found = Path(images), Found({}, {}, {})
    with naming(images, "cannot be read"):
        whole = path.is_dir()
    if whole:
        root, files = path, _sorted_out(_walk(path, found), path, found)
    elif os.path.lexists(path):
        open_file(path).close()  # refuses what is no file
        root, files = path.parent, [path]
    else:
        root, matches = _matching(path, found)
        files = _sorted_out(matches, None, found)
    out = Path(os.path.realpath(output))
    for file in files:
        try:
            with naming(file, "cannot be read"):
                real = Path(os.path.realpath(file))  # Path.resolve raises where links go in a circle
        except FileError as error:
            found.failed[str(file)] = str(error)
            continue
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
        return f"nothing there can be predicted, {len(found.failed)} failed; the first: {shown(why)}"
    advice = "name an image, a folder or a quoted pattern like 'a/*.jpg'"
    if found.left_out:
        path, why = next(iter(found.left_out.items()))
        return f"no image files there; {len(found.left_out)} others, the first: {shown(path)}: {why}; {advice}"
    return f"no files there; {advice}"


def shown(path) -> str:
    """A path for a line of text: what would break the line, or move the cursor, is escaped.

    Of a file that was fetched it is the URL.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in mirror.origin(str(path)))


def _sorted_out(files, root, found):
    """Of files, the images that may be read; `root`: hidden ones below it are not taken, None: they are."""
    for file in sorted(files):
        try:
            with naming(file, "cannot be read"):
                if not os.path.exists(file):  # a link to nothing may have been one to an image
                    open_file(file).close()
                kind = image_kind(file)
        except (DataError, FileError) as error:
            found.failed[str(file)] = str(error)
            continue
        parts = file.relative_to(root).parts if root else ()
        hidden = next((i for i, part in enumerate(parts) if part.startswith(".")), None)
        if kind == "other":
            place = file if hidden is None else root.joinpath(*parts[: hidden + 1])
            found.left_out[str(place)] = "no image" if hidden is None else "hidden, and no image"
        elif kind == "foreign":
            found.failed[str(file)] = f"{file}: {FOREIGN_REMEDY}"
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
