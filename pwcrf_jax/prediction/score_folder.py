"""A folder of images with the scores of somebody's network, and perhaps masks: matched by name and checked by header.

An image's name is that of `image_files.find_images`; its scores, and its mask, lie at the same place below their own
folders: images/a/b.jpg, scores/a/b.npy, masks/a/b.png.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pwcrf_jax.data import DataError, coded_masks, scores
from pwcrf_jax.data.readers.classes import Coding, read_classes
from pwcrf_jax.data.readers.files import read_image_file
from pwcrf_jax.data.readers.image_io import image_size, orientation, voc_palette
from pwcrf_jax.model import decode
from pwcrf_jax.prediction import image_files
from pwcrf_jax.prediction.image_files import shown
from pwcrf_jax.prediction.predict import read_image

MOST_CLASSES = 255  # labels are written with 8 bits, of which 255 is void


class Given(NamedTuple):
    """What the user says of scores; what is left open is found out by `scan`.

    Attributes:
      layout, kind: of `pwcrf_jax.data.scores.read`, "auto" where they are to be found out.
      num_classes: 0: to be found out.
      confidence: of label images; 0: not said.
      classes: file of names, as classes.txt of the data set image_folder; "": there is none.
    """

    layout: str = "auto"
    kind: str = "auto"
    num_classes: int = 0
    confidence: float = 0.0
    classes: str = ""


class Item(NamedTuple):
    """Files of an image, and its (height, width) once it is upright; mask: None where it has none."""

    name: str
    image: Path
    scores: Path
    mask: Path | None
    size: tuple[int, int]

    def stamp(self, masked: bool = False) -> list[list[int]]:
        """Sizes and times of image and scores, and of the mask: with the same, they are taken to be the same."""
        stats = [os.stat(path) for path in (self.image, self.scores, *([self.mask] if masked else ())) if path]
        return [[about.st_size, about.st_mtime_ns] for about in stats]


class Folder(NamedTuple):
    """What `scan` found.

    Attributes:
      items: in the order of their names.
      found: of the images, with what else lies there.
      layout: of `Form`. kind: one of `scores.KINDS`, or "labels". asked: whether the user named the kind.
      num_classes, confidence: of the scores.
      class_names, palette: K of each.
      coding: of masks.
      max_pixels: of an image.
    """

    items: dict[str, Item]
    found: image_files.Found
    layout: str
    kind: str
    asked: bool
    num_classes: int
    confidence: float
    class_names: tuple[str, ...]
    palette: Sequence[Sequence[int]]
    coding: Coding
    max_pixels: float

    def read(self, item: Item) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 [H, W, 3], log-probabilities float32 [H, W, K] of its pixels).

        Raises:
          DataError: naming the file that cannot be read, or whose values cannot be used.
        """
        image, log_probs = read_image(item.image, self.max_pixels), self._log_probs(item)
        if image.shape[:2] != item.size:
            raise DataError(f"{item.image}: has changed while this ran; start again")
        return image, at_pixels(log_probs, item.size)

    def _log_probs(self, item: Item) -> np.ndarray:
        if self.kind == "labels":
            return scores.read(item.scores, num_classes=self.num_classes, confidence=self.confidence)
        values = scores.read_values(item.scores, self.layout, self.num_classes)
        if not self.asked:
            scores.check_kind(values, self.kind, item.scores)
        return scores.log_probabilities(values, self.kind, item.scores)

    def read_mask(self, item: Item, table: np.ndarray) -> np.ndarray:
        """The classes of its mask, uint8 [H, W]; table: of `coded_masks.table_of`. Raises DataError."""
        assert item.mask
        return coded_masks.read_mask(item.mask, self.coding, table, self.max_pixels)

    def labelled(self) -> list[Item]:
        """Those with a mask."""
        return [item for item in self.items.values() if item.mask]


def scan(images: str, score_folder: str, output: str, given: Given, masks: str, max_pixels: float) -> Folder:
    """Finds images, scores and masks, and checks masks and all that headers show; of the first scores the values.

    masks: folder; "": there are none.
    output: earlier results in there are no images.

    Raises:
      DataError: one line, naming the first file that is missing or does not fit, and what to do.
    """
    found = image_files.find_images(images, output)
    for why in found.failed.values():
        raise DataError(shown(why))
    files = scores.find(score_folder)
    for name, path in found.images.items():
        if name not in files:
            missing = len(found.images.keys() - files.keys())
            raise DataError(
                f"{shown(path)}: has no scores {shown(Path(score_folder, name))}.npy (or .npz, .safetensors, .png), in "
                f"all {missing} of {len(found.images)} images; write them, or take the image away"
            )
    for name, path in files.items():
        if name not in found.images:
            raise DataError(
                f"{shown(path)}: has no image {shown(name)} in {shown(images)}, in all "
                f"{len(files.keys() - found.images.keys())} of {len(files)} scores; add the image, or take them away"
            )
    sizes = {name: _upright_size(path, max_pixels) for name, path in found.images.items()}
    names, palette, coding = _classes(given)
    form = scores.form(files, sizes, given.layout, len(names) or given.num_classes)
    _check_number(form.num_classes, next(iter(files.values())))
    coding = coding or coded_masks.indices(form.num_classes)
    truth = _masks(masks, found.images, sizes, coding, max_pixels) if masks else {}
    kind = _kind(files, form, given)
    return Folder(
        {name: Item(name, found.images[name], files[name], truth.get(name), sizes[name]) for name in sorted(files)},
        found,
        form.layout,
        kind,
        given.kind != "auto" or kind == "labels",
        form.num_classes,
        given.confidence,
        names or tuple(f"class_{k}" for k in range(form.num_classes)),
        palette or voc_palette(form.num_classes),
        coding,
        max_pixels,
    )


def _check_number(num_classes: int, path: Path) -> None:
    if num_classes > MOST_CLASSES:
        raise DataError(
            f"{path}: has {num_classes} classes, and label images hold {MOST_CLASSES} at most; if classes are another "
            "axis, add another --layout"
        )


def _upright_size(path: Path, max_pixels: float) -> tuple[int, int]:
    data = read_image_file(path, max_pixels)
    height, width = image_size(data, str(path))
    return (width, height) if orientation(data, str(path)) >= 5 else (height, width)


def _classes(given: Given) -> tuple[tuple[str, ...], Sequence[Sequence[int]], Coding | None]:
    """(names, palette, coding of masks) of --classes."""
    if not given.classes:
        return (), (), None
    names, colours, coding = read_classes(Path(given.classes))
    if given.num_classes not in (0, len(names)):
        raise DataError(
            f"{given.classes}: names {len(names)} classes, --num_classes says {given.num_classes}; leave that out"
        )
    return names, colours or voc_palette(len(names)), coding


def _kind(files: Mapping[str, Path], form: scores.Form, given: Given) -> str:
    """What the scores are, by the values of the first, which are then known to be sound."""
    first = next(iter(files.values()))
    if form.layout == "labels":
        if not 0 < given.confidence < 1:
            raise DataError(
                f"{first}: is a label image; add --confidence, the share of pixels that it has right, such as 0.7"
            )
        scores.read(first, num_classes=form.num_classes, confidence=given.confidence)
        return "labels"
    if given.confidence:
        raise DataError(f"{first}: --confidence is of label images (.png), and this holds scores; leave it out")
    values = scores.read_values(first, form.layout, form.num_classes)
    kind = scores.kind_of(values, first) if given.kind == "auto" else given.kind
    scores.log_probabilities(values, kind, first)
    return kind


def _masks(
    folder: str, images: Mapping[str, Path], sizes: Mapping[str, scores.Size], coding: Coding, max_pixels: float
) -> dict[str, Path]:
    """{name: mask} of the images that have one; each is read once, as a wrong one would stop the report at the end."""
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: is no folder; name the folder of the masks")
    found = {name: root / f"{name}.png" for name in images if os.path.lexists(root / f"{name}.png")}
    if not found:
        raise DataError(f"{root}: holds no mask of any image; masks are PNG files, {next(iter(images))}.png and so on")
    table = coded_masks.table_of(coding)
    for name, path in found.items():
        if (size := coded_masks.read_mask(path, coding, table, max_pixels).shape) != sizes[name]:
            raise DataError(
                f"{path}: has {size[0]} x {size[1]} pixels, its image {sizes[name][0]} x {sizes[name][1]} (height x "
                "width); make the mask for this image"
            )
    return found


def at_pixels(log_probs: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Log-probabilities float32 [h, w, K] of a map at the pixels of its image [H, W, K], as `decode.read` has them.

    By NumPy, which compiles nothing for each size; exp sums to 1 again.
    """
    if log_probs.shape[:2] == size:
        return log_probs
    for axis, cells in enumerate(log_probs.shape[:2]):
        index, fraction = decode.frame_taps((cells, cells), (size[axis], size[axis]))[0]
        near, far = (np.clip(index + step, 0, cells - 1) for step in (-1, 0))
        share = np.asarray(fraction)[:, None, None] if axis == 0 else np.asarray(fraction)[:, None]
        low, high = np.take(log_probs, near, axis), np.take(log_probs, far, axis)
        log_probs = low * (1 - share) + high * share
    return scores.log_probabilities(log_probs, "logits", Path())


def image_digest(item: Item) -> str:
    """SHA-256 of the image file, by which it is known under another name."""
    return hashlib.sha256(read_image_file(item.image)).hexdigest()
