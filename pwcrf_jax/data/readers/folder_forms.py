"""The forms of a user's own folder, and which of them a folder has.

In this order, by what lies in it: `masks`; `SegmentationClass` (masks as CVAT, labelme and VOC lay them); two trees
known by name; CVAT's XML; JSON of COCO's kind or labelme's, the first file that is one; two trees of one's own names;
else images and masks, whose reader says what is missing.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pwcrf_jax.data.readers import coco_outlines, cvat, labelme, trees
from pwcrf_jax.data.readers.classes import read_classes
from pwcrf_jax.data.readers.documents import MOST_BYTES
from pwcrf_jax.data.readers.files import DataError, open_file, present, read_file, read_lines, refuse_other_lists
from pwcrf_jax.data.readers.folder_files import LISTS, SPLIT_NAMES, choose, more, normal, split_in, walk, with_val
from pwcrf_jax.data.readers.outlines import CLASS_FILES, Classes, ImageIndex, class_file, classes_of

Label = Callable[[Path, Path, float], np.ndarray]
"""(annotations, image, max_pixels) -> the mask, uint8 [H, W] of classes and void."""


class Reading(NamedTuple):
    """A folder as one of its forms.

    form: its name, as `pwcrf check` tells it.
    images: id -> file of all images.
    masks: id -> mask, or annotations, of those that have any.
    splits: ids of each.
    names, palette, coding: as of a `Plan`; coding is that of masks, or a `Label`.
    depends: what else the labels depend on.
    """

    form: str
    images: Mapping[str, Path]
    masks: Mapping[str, Path]
    splits: Mapping[str, Sequence[str]]
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    coding: Any
    depends: tuple[Any, ...]


def read_folder(root: Path, fraction: float, seed: int) -> tuple[Reading | None, list[str]]:
    """A folder as its form, and what was left out; None for one of images and masks.

    Args:
      fraction, seed: of the draw of split val where the form has no splits.

    Raises:
      DataError: the form cannot be read, with what to do.
    """
    if os.path.lexists(root / "masks"):
        return None, []
    choice = partial(choose, fraction=fraction, seed=seed)
    if os.path.isdir(root / "SegmentationClass"):
        return _voc(root, fraction, seed)
    if any(os.path.lexists(root / name) for names in trees.KNOWN for name in names) and (two := trees.folders_in(root)):
        return _trees(root, two, choice), []
    if found := sorted(path for path in root.glob("*.xml") if _holds(path, (b"<annotations",))):
        return _cvat(root, found, choice, fraction, seed)
    for path in _json_files(root):
        if _holds(path, labelme.KEYS):
            return _labelme(root, choice)
        if _holds(path, coco_outlines.KEYS):
            return _coco(root, choice, fraction, seed)
    if two := trees.folders_in(root):
        return _trees(root, two, choice), []
    return None, []


def _holds(path: Path, keys: tuple[bytes, ...]) -> bool:
    """Whether the text of a file holds all keys; what is no file, or too long, holds none."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return False
    data = read_file(path, MOST_BYTES)
    return all(key in data for key in keys)


def _json_files(root: Path) -> list[Path]:
    """All JSON files: those beside, those in `annotations`, the rest."""
    found = [path for path in walk(root, linked=True, skip=True) if path.suffix.lower() == ".json"]
    near = {root: 0, root / "annotations": 1}
    return sorted(found, key=lambda path: (near.get(path.parent, 2), path))


def _trees(root: Path, two: tuple[Path, Path], choice: Callable[..., dict[str, list[str]]]) -> Reading:
    listed_in = class_file(root)
    if listed_in is None:
        hint = "; of the official Cityscapes use data.name=cityscapes" * (two[1].name == "gtFine")
        raise DataError(f"{root / CLASS_FILES[0]}: is missing; write one class a line, 'name' or 'name R G B'{hint}")
    names, colours, coding = read_classes(listed_in)
    images, masks, ending = trees.pair(*two, coding.colours)
    where = f"{two[0].relative_to(root)} and {two[1].relative_to(root)}" + f", masks *{ending}.png" * bool(ending)
    kind = {("img_dir", "ann_dir"): "mmsegmentation", ("leftImg8bit", "gtFine"): "Cityscapes"}
    kind_of = kind.get((two[0].name, two[1].name), "two folders")
    return Reading(f"{kind_of} ({where})", images, masks, choice(root, images), names,
                   colours if coding.colours else (), coding, (ending, sorted(coding.classes.items())))  # fmt: skip


def _voc(root: Path, fraction: float, seed: int) -> tuple[Reading, list[str]]:
    """Masks in `SegmentationClass`, as CVAT exports them ("Segmentation mask 1.1"), and labelme2voc.py."""
    listed_in = class_file(root)
    if listed_in is None:
        raise DataError(f"{root}: has SegmentationClass but neither labelmap.txt nor classes.txt; write one class a "
                        "line, or use data.name=voc for the official VOC")  # fmt: skip
    names, colours, coding = read_classes(listed_in)
    folder = next((root / name for name in ("JPEGImages", "images") if os.path.isdir(root / name)), None)
    if folder is None:
        raise DataError(f"{root}: has SegmentationClass but no JPEGImages; put the images there, or export with images "
                        "(CVAT: tick 'Save images')")  # fmt: skip
    every, masks, _ = trees.pair(folder, root / "SegmentationClass", coding.colours)
    images = {key: every[key] for key in sorted(masks)}
    lists = sorted((root / "ImageSets/Segmentation").glob("*.txt"))
    by_split = {split: path for path in lists if (split := SPLIT_NAMES.get(path.stem.casefold()))}
    if by_split and not any(present(root / f"{split}.txt") for split in LISTS):
        chosen = {s: [k for k in _lines(by_split[s]) if k in images] for s in LISTS if s in by_split}
        splits = with_val({s: keys for s, keys in chosen.items() if keys}, root, fraction, seed)
    else:
        splits = choose(root, images, fraction, seed)
    kind = "colours" if coding.colours else "values"
    return Reading(f"masks of {kind} in SegmentationClass ({listed_in.name})", images, masks, splits, names,
                   colours if coding.colours else (), coding, (sorted(coding.classes.items()),)), _without(
                       sorted(every.keys() - masks.keys()), "mask")  # fmt: skip


def _lines(path: Path) -> list[str]:
    return [normal(line.strip()) for line in read_lines(path) if line.strip()]


def _without(keys: Sequence[str], what: str) -> list[str]:
    """What to say of images that were left out."""
    return [f"{len(keys)} images without {what} are left out: {keys[0]} ({more(keys)})"] if keys else []


def _unnamed(index: ImageIndex, images: Mapping[str, Path], what: str) -> list[str]:
    return _without(sorted(index.key(path) for path in set(index) - set(images.values())), what)


def _labelme(root: Path, choice: Callable[..., dict[str, list[str]]]) -> tuple[Reading, list[str]]:
    files: list[Path] = []
    others: list[Path] = []
    for path in _json_files(root):
        (files if _looks(path, labelme.KEYS) else others).append(path)
    index = ImageIndex(root)
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    for path in files:
        image = labelme.image_of(path, index)
        key = index.key(image)
        if key in images:
            raise DataError(f"{path}: is of {image}, as is {masks[key]}; remove one of them")
        images[key], masks[key] = image, path
    images = dict(sorted(images.items()))
    classes = classes_of(root, lambda: labelme.labels_in(files), root)

    def label(annotations: Path, image: Path, max_pixels: float) -> np.ndarray:
        return labelme.label(annotations, image, classes, max_pixels)

    left = [f"{len(others)} JSON files are none of labelme's: {others[0]}"] if others else []
    return _outlines("labelme polygons", images, masks, choice(root, images), classes, label), left + _unnamed(
        index, images, ".json"
    )


def _looks(path: Path, keys: tuple[bytes, ...]) -> bool:
    """`_holds`, by the beginning and the end of a file: an image may lie between as text."""
    size = path.stat().st_size
    with open_file(path) as file:
        head = file.read(1 << 16)
        if size > 1 << 17:
            file.seek(-(1 << 16), os.SEEK_END)
        tail = file.read(1 << 16)
    return all(key in head + tail for key in keys) or _holds(path, keys)


def _outlines(
    form: str, images: Mapping[str, Path], masks: Mapping[str, Path], splits: Mapping[str, Sequence[str]],
    classes: Classes, label: Label,
) -> Reading:  # fmt: skip
    rest = "void" if classes.fill not in range(len(classes.names)) else classes.names[classes.fill]
    return Reading(f"{form}, unpainted pixels {rest}", images, masks, splits, classes.names, classes.palette, label,
                   (form, classes.fill))  # fmt: skip


def _cvat(
    root: Path, files: Sequence[Path], choice: Callable[..., dict[str, list[str]]], fraction: float, seed: int
) -> tuple[Reading, list[str]]:
    if len(files) > 1:
        raise DataError(f"{root}: has {len(files)} files of CVAT, {files[0].name} and {files[1].name}; keep one, or "
                        "join the tasks in a project and export that")  # fmt: skip
    path, index = files[0], ImageIndex(root)
    found, labels = cvat.read_images(path, index)
    by_file = {image.path: image for image in found}
    images = _keyed(index, list(by_file), path)
    classes = classes_of(root, lambda: labels, path)

    def label(annotations: Path, image: Path, max_pixels: float) -> np.ndarray:
        return cvat.label(annotations, by_file[image], classes, max_pixels)

    subsets: dict[str, list[str]] = {}
    for key, file in images.items():
        subsets.setdefault(by_file[file].split or "", []).append(key)
    if "" in subsets or any(present(root / f"{split}.txt") for split in LISTS):
        splits = choice(root, images)
    else:
        splits = with_val({s: subsets[s] for s in LISTS if s in subsets}, path, fraction, seed)
    reading = _outlines("CVAT for images", images, dict.fromkeys(images, path), splits, classes, label)
    return reading, _unnamed(index, images, f"entry in {path.name}")


def _coco(
    root: Path, choice: Callable[..., dict[str, list[str]]], fraction: float, seed: int
) -> tuple[Reading, list[str]]:
    files = [path for path in _json_files(root) if _holds(path, coco_outlines.KEYS)]
    index, by_file, of_split = ImageIndex(root), {}, {}
    labels: dict[str, coco_outlines.Colour] = {}
    source: dict[Path, Path] = {}
    for path in files:
        split = split_in(path.stem) or split_in(path.parent.name if path.parent != root else "") or ""
        if split in of_split or (len(files) > 1 and not split):
            raise DataError(f"{path}: which split it is of cannot be told from its name, or another file is of it; "
                            "call the files train.json, val.json and test.json")  # fmt: skip
        found, categories = coco_outlines.read_images(path, index)
        for image in found:
            if image.path in by_file:
                raise DataError(f"{path}: {image.path} is in {source[image.path]}, too; remove one of them")
            by_file[image.path], source[image.path] = image, path
        of_split[split] = _keyed(index, [image.path for image in found], path)
        labels |= dict(categories)
    images = {key: file for keyed in of_split.values() for key, file in keyed.items()}
    classes = classes_of(root, lambda: list(labels.items()), files[0])

    def label(annotations: Path, image: Path, max_pixels: float) -> np.ndarray:
        return coco_outlines.label(annotations, by_file[image], classes, max_pixels)

    if "" in of_split or any(present(root / f"{split}.txt") for split in LISTS):
        splits = choice(root, images, known=[path.name for path in files])
    else:
        refuse_other_lists(root, [path.name for path in files])
        splits = with_val({s: list(of_split[s]) for s in LISTS if s in of_split}, files[0], fraction, seed)
    masks = {key: source[file] for key, file in images.items() if by_file[file].annotations is not None}
    return _outlines("COCO polygons", images, masks, splits, classes, label), _unnamed(
        index, images, "entry in the JSON"
    )


def _keyed(index: ImageIndex, files: Sequence[Path], where: Path) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for file in sorted(files):
        key = index.key(file)
        if key in images:
            raise DataError(f"{where}: {file} and {images[key]} have the same name but for the suffix; rename one")
        images[key] = file
    return images
