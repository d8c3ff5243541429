"""What folders of outlines have in common: classes by name, images by name, and painting in the size of the image.

Unpainted pixels are class `background`, by whatever spelling, if the file of classes lists it, else void. Without a
file of classes the labels found are the classes, and `background` goes before them if no label is called so.
"""

import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pwcrf_jax.data.readers.class_forms import Entry, plain
from pwcrf_jax.data.readers.classes import read_classes
from pwcrf_jax.data.readers.documents import brief, text
from pwcrf_jax.data.readers.files import SUFFIXES, DataError, present, read_image_file
from pwcrf_jax.data.readers.folder_files import walk
from pwcrf_jax.data.readers.image_io import VOID, image_size, open_image, orientation
from pwcrf_jax.data.readers.painting import Canvas

CLASS_FILES = ("classes.txt", "labels.txt", "class_names.txt", "labelmap.txt", "label_colors.txt")
"""Names of files of classes, the first of which that is there counts; all but the first are written by tools."""


class Classes(NamedTuple):
    """Classes of outlines.

    names, palette: as of a `Plan`.
    fill: class of unpainted pixels, or `VOID`.
    listed_in: the file that lists them; None: they were found in the annotations.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    fill: int
    listed_in: Path | None

    def value(self, label: Any, where: str) -> int:
        """The class of a label, or `VOID` for one that says void; DataError for a label that is not among them."""
        name = text(label, where, "label")
        if name in self.names:
            return self.names.index(name)
        if is_void(name):
            return VOID
        listed = self.listed_in or "the labels"
        raise DataError(f"{where}: label {brief(name)} is not in {listed}; add it there, or rename the shape")


def is_void(label: str) -> bool:
    """Whether a label says that its pixels do not count: void, ignore, labelme's __ignore__, ..."""
    return Entry(0, label).void


def class_file(root: Path) -> Path | None:
    """The file of classes of a folder, the first of `CLASS_FILES` that is there."""
    return next((root / name for name in CLASS_FILES if present(root / name)), None)


def classes_of(
    root: Path, found: Callable[[], Sequence[tuple[str, tuple[int, int, int] | None]]], source: Path
) -> Classes:
    """Classes by the file that lists them, else those of the annotations.

    Args:
      found: gives labels and their colours (None: not told) in the annotations; called only without a file of classes.
      source: the annotations, for messages.

    Raises:
      DataError: of the file of classes, or the annotations have no label, or too many.
    """
    if path := class_file(root):
        names, palette, _ = read_classes(path)
        fill = next((k for k, name in enumerate(names) if plain(name) == "background"), VOID)
        return Classes(names, palette, fill, path)
    labels = {label: colour for label, colour in found() if not is_void(label)}
    if not labels:
        raise DataError(f"{source}: has no label; annotate images, or write classes.txt with one class a line")
    background = next((label for label in labels if plain(label) == "background"), "background")
    colours = {background: (0, 0, 0)} | labels
    if len(colours) > 255:
        raise DataError(f"{source}: has {len(colours)} labels, masks have room for 255; write classes.txt with fewer")
    told = [colour for colour in colours.values() if colour is not None]
    palette = tuple(told) if len(told) == len(set(told)) == len(colours) else ()
    return Classes(tuple(colours), palette, 0, None)


def normal(name: str) -> str:
    """A path as all systems write it: macOS stores "é" as two characters, Windows writes backslashes."""
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


class ImageIndex:
    """The images below a folder by what annotations call them."""

    def __init__(self, root: Path):
        self.root = root
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[Path, list[Path]] = {}
        for path in walk(root, linked=True):
            if path.suffix.lower() in SUFFIXES:
                self._by_name.setdefault(normal(path.name), []).append(path)
                self._by_stem.setdefault(path.with_suffix(""), []).append(path)

    def beside(self, path: Path) -> list[Path]:
        """The images in a file's folder that are called like it but for the suffix."""
        return self._by_stem.get(path.with_suffix(""), [])

    def find(self, name: Any, near: Path, where: str) -> Path:
        """The image of a name: as it lies from the annotations or below `images`, else by the end of its path.

        Args:
          name: a file name, perhaps with folders.
          near: folder of the annotations.

        Raises:
          DataError: there is no such image in the folder, or there are several.
        """
        wanted = normal(text(name, where, "image"))
        same = self._by_name.get(posixpath.basename(wanted), [])
        for base in (near, self.root / "images", self.root):
            there = posixpath.normpath(f"{base.as_posix()}/{wanted}")
            if exact := [path for path in same if normal(path.as_posix()) == normal(there)]:
                return exact[0]
        parts = wanted.split("/")
        shared = [_shared(parts, normal(path.as_posix()).split("/")) for path in same]
        best = [path for path, count in zip(same, shared, strict=True) if count == max(shared)]
        if not best:
            raise DataError(f"{where}: image {brief(name)} is not in {self.root}; add it, or remove its annotations")
        if len(best) > 1:
            raise DataError(
                f"{where}: image {brief(name)} may be {best[0]} or {best[1]}; give images names of their own"
            )
        return best[0]

    def key(self, path: Path) -> str:
        """The id of an image: its place without suffix, without the folder that only says that images are in it."""
        parts = normal(path.relative_to(self.root).with_suffix("").as_posix()).split("/")
        return "/".join(parts[1:] if len(parts) > 1 and parts[0] in ("images", "JPEGImages") else parts)

    def __iter__(self) -> Iterator[Path]:
        return (path for paths in self._by_name.values() for path in paths)


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many components two paths have in common at their ends."""
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count


class Shape(NamedTuple):
    """What is painted: `paint(canvas, value)` puts the pixels of a label there."""

    value: int
    paint: Callable[[Canvas, int], None]


def paint(
    image: Path, told: tuple[int, int] | None, where: str, shapes: Callable[[tuple[int, int]], Iterable[Shape]],
    fill: int, max_pixels: float,
) -> np.ndarray:  # fmt: skip
    """The mask of an image from shapes, one upon the other.

    Args:
      told: (height, width) that the annotations say; None: they do not.
      where: what messages call the annotations.
      shapes: of an image of a size.
      fill: what pixels are that no shape has.

    Returns:
      uint8 [H, W]: in the size as stored, or as viewers show it where an EXIF orientation says so and `told` has it.

    Raises:
      DataError: the image cannot be read, or has another size than the annotations say.
    """
    data = read_image_file(image, max_pixels)
    stored = image_size(data, str(image))
    if stored[0] * stored[1] > max_pixels:
        open_image(data, str(image), max_pixels)  # says so
    shown = stored[::-1] if orientation(data, str(image)) >= 5 else stored
    size = told or shown  # tools that do not tell the size draw on what viewers show
    if size not in (stored, shown):
        raise DataError(
            f"{where}: says that {image} has {size[1]}x{size[0]} pixels, but it has {stored[1]}x{stored[0]}; put the "
            "image there that was annotated"
        )
    canvas = Canvas(size, fill)
    for shape in shapes(size):
        shape.paint(canvas, shape.value)
    return canvas.array()
