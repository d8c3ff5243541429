"""Your own images and masks.

    images/a.jpg  images/street/b.png    JPEG, PNG, BMP, WebP or TIFF, whatever the suffix, subfolders at will
    masks/a.png   masks/street/b.png     PNG, at the same place under the same name
    classes.txt                          the classes, one a line
    train.txt     val.txt     test.txt   optional: which images make which split, one a line

The id of an image is its place below images/ without suffix: `a`, `street/b`. A line of a list is such an id, or a file
name with suffix. With any list, the splits are those of the lists, and images in none are left out. Images of test.txt
may all be without mask: that split is then unlabelled, to predict on.

Without lists, a pseudo-random order of the ids, drawn by option `seed`, decides: the first `val_fraction` of them is
split val, the rest is split train. It depends on seed and ids alone, and one more image moves at most one other.

classes.txt has either names alone, or a colour behind every name:

    road                 road 128 64 128
    street lamp          street lamp 153 153 153
    void 255             void 0 0 0

Names alone: masks hold one value a pixel (8-bit grey or palette). The classes have the values 0, 1, 2, ... in the order
of the lines, less the void values. Void is 255, or what lines `void VALUE` say; with `void 0`, classes count from 1.
Names with colours: masks are read by their colours, whether RGB, palette or grey. Void are the colours of lines
`void R G B`. Empty lines and lines that start with # do not count. Other forms, as annotation tools write them: see
`pwcrf_jax.data.readers.class_forms`.

An image with an EXIF orientation is taken as stored or as viewers show it, whichever has the size of the mask; where
both have, it is refused. Without a mask it is taken as viewers show it.
"""

import functools
import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pwcrf_jax.data.builder import Pair, Plan, SegmentationBuilder, check_options, require_source_dir
from pwcrf_jax.data.label_guard import bad_value
from pwcrf_jax.data.readers.classes import read_classes
from pwcrf_jax.data.readers.files import (
    FOREIGN_REMEDY,
    SUFFIXES,
    DataError,
    image_kind,
    present,
    read_image_file,
    read_lines,
    split_lists,
)
from pwcrf_jax.data.readers.image_io import VOID, decode_colour_label, decode_label, mask_palette, not_png, value_counts

LISTS = ("train", "val", "test")
log = logging.getLogger(__name__)
LAYOUT = (
    "expected images/NAME.jpg (or .png, .bmp, .webp, .tif), masks/NAME.png and classes.txt with one class a line, "
    "'name' or 'name R G B'"
)


class ImageFolder(SegmentationBuilder):
    """A folder of images, masks and classes.txt."""

    name = "pwcrf_image_folder"
    masks_fit_stored_pixels = False  # who knows which program drew them

    @classmethod
    def plan(cls, source_dir: str, *, data_dir: str = "", **options: Any) -> Plan:
        """The splits of the lists, or train and val drawn by `seed`.

        Args:
          val_fraction: share of the images in split val where there are no lists, 0 < x < 1.
          seed: draws them.

        Raises:
          DataError: not this layout, a line of classes.txt or a list that means nothing, an image without mask, or a
            mask without image.
        """
        del data_dir
        defaults = {"val_fraction": 0.1, "seed": 0}
        options = check_options("image_folder", options, defaults)
        fraction, seed = options["val_fraction"], options["seed"]
        if not 0 < fraction < 1:
            raise DataError(f"val_fraction: {fraction!r} is not a number between 0 and 1, such as 0.1")
        root = require_source_dir("image_folder", source_dir)
        if not present(root / "images", folder=True):
            raise DataError(f"{root}: has no folder images; {LAYOUT}; check data.source_dir")
        names, colours, coding = read_classes(root / "classes.txt")
        images, foreign, others = _files(root / "images")
        if others:
            shown = ", ".join(map(str, others[:5]))
            log.warning("%d files are no images, and left out: %s%s", len(others), shown, ", ..." * (len(others) > 5))
        masks, other_masks, _ = _files(root / "masks") if present(root / "masks", folder=True) else ({}, [], [])
        if foreign:
            raise DataError(f"{foreign[0]}: {FOREIGN_REMEDY}")
        if not images:
            raise DataError(f"{root / 'images'}: holds no image; {LAYOUT}")
        for path in (*other_masks, *masks.values()):
            if path.suffix.lower() != ".png":
                raise not_png(read_image_file(path), str(path))
        if alone := sorted(masks.keys() - images.keys()):
            raise DataError(f"{masks[alone[0]]}: has no image {root / 'images' / alone[0]}.* ({_more(alone)}); add it, "
                            f"or remove the mask; {FOREIGN_REMEDY}")  # fmt: skip
        lists = split_lists(root, LISTS)
        if lists:
            chosen = {split: _listed(path, images) for split, path in lists.items()}
        elif len(images) > 1:
            _refuse_splits_by_folder(root / "images")
            chosen = _drawn(images, fraction, seed)
        else:
            raise DataError(f"{root / 'images'}: holds one image; train and val need one each, or write train.txt")
        splits = {}
        for split, keys in chosen.items():
            where = lists.get(split, root / "images")
            splits[split] = pairs = [Pair(key, images[key], masks.get(key), where) for key in keys]
            bare = [p.id for p in pairs if p.mask is None]
            if bare and not (split == "test" and len(bare) == len(pairs)):
                raise DataError(
                    f"{images[bare[0]]}: has no mask {root / 'masks' / bare[0]}.png (split {split!r}; {_more(bare)}); "
                    "add it or leave the image out (only test.txt may list images without masks, none of them with one)"
                )
        palette = colours if coding.colours else ()
        return cls.plan_from_pairs(
            root, splits, names, coding.colours, sorted(coding.classes.items()),
            class_names=names, palette=palette, coding=coding,
        )  # fmt: skip

    def __init__(self, **options: Any):
        super().__init__(**options)
        # Colour of a value in the first palette mask that has it, and which mask that is.
        self._shown: dict[int, tuple[tuple[int, ...], Path]] = {}

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """Class, or -1, of each value or colour."""
        classes, colours = self._plan.coding
        table = np.full(1 << 24 if colours else 256, -1, np.int16)
        table[list(classes)] = list(classes.values())
        return table

    def _label(self, mask: Path, image: Path) -> np.ndarray:
        data, where = self._read(mask), str(mask)
        if self._plan.coding.colours:
            colours = decode_colour_label(data, where, self.max_pixels).astype(np.int32)
            label = self._table[colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]]
            if label.min() < 0:
                raise _bad_colour(where, colours, label < 0)
            return label.astype(np.uint8)
        values = decode_label(data, where, self.max_pixels)
        label = self._table[values]
        if label.min() < 0:
            stored = sorted(v for v, k in self._plan.coding.classes.items() if k != VOID)
            void = ", ".join(str(v) for v, k in self._plan.coding.classes.items() if k == VOID)
            first, last = stored[0], stored[-1]
            known = f"{first}..{last}" if last - first < len(stored) else ", ".join(map(str, stored))
            raise bad_value(
                where, values, self._table >= 0, f"neither a class ({known}) nor void ({void})",
                "correct the mask, or complete classes.txt (a line 'void VALUE' makes a value void)",
            )  # fmt: skip
        self._compare_palette(mask, data, values)
        return label.astype(np.uint8)

    def _void_to_255(self, label: np.ndarray, path: Path) -> np.ndarray:
        del path
        return label  # it is so already

    def _compare_palette(self, path: Path, data: bytes, values: np.ndarray) -> None:
        """Notes a value that has one colour here and another in an earlier mask: it may mean two things."""
        if self.guard.notes:
            return
        colours = mask_palette(data, str(path))
        for value in np.flatnonzero(value_counts(values)[: len(colours)]):
            colour = tuple(colours[value].tolist())
            before, first = self._shown.setdefault(int(value), (colour, path))
            if before != colour:
                self.guard.notes.append(
                    f"value {value} is {before} in the palette of {first} but {colour} in that of {path}, and there "
                    "may be more such masks: if the colours are right and the values are not, give the colours in "
                    "classes.txt"
                )
                return


def _files(folder: Path) -> tuple[dict[str, Path], list[Path], list[Path]]:
    """Id -> file of all images below a folder; those of formats that are not read; and what is no image.

    Hidden files do not count.
    """
    found: dict[str, Path] = {}
    foreign: dict[Path, str] = {}
    others = []
    for path in _walk(folder):
        kind = image_kind(path)
        if kind == "other":
            others.append(path)
            continue
        key = _key(path.relative_to(folder).as_posix())
        # Only what looks like a suffix is one: "frame.0001" has none.
        if path.suffix.lower() in SUFFIXES or re.fullmatch(r"\.[A-Za-z]\w{0,9}", path.suffix):
            key = key.removesuffix(_key(path.suffix))
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in key):
            raise DataError(f"{str(path)!r}: its name is not UTF-8, or holds control characters; rename it")
        if kind == "foreign":
            foreign[path] = key
            continue
        if key in found:
            raise DataError(f"{path} and {found[key]} have the same name but for the suffix; rename or remove one")
        found[key] = path
    # Raw photographs lie beside theirs; the others are Windows' own.
    others = [path for path in others if path.name not in ("Thumbs.db", "desktop.ini")]
    return found, [path for path, key in foreign.items() if key not in found], others


def _refuse_splits_by_folder(images: Path) -> None:
    names = [entry.name for entry in os.scandir(images) if entry.is_dir()]
    like = sorted(name for name in names if re.fullmatch(r"train(ing)?|val(id|idation)?|test(ing)?", name.casefold()))
    if len(like) > 1:
        raise DataError(
            f"{images}: has the folders {', '.join(like)}, but no list says which images make which split, and they "
            "would be mixed; write train.txt, val.txt and test.txt beside images, such as 'train/NAME' a line"
        )


def _walk(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield Path(entry.path)
        elif entry.is_symlink():
            raise DataError(f"{entry.path}: is a link to a folder, which could lead in circles; link images/ or masks/ "
                            "themselves, or copy the folder")  # fmt: skip
        else:
            yield from _walk(Path(entry.path))


def _key(name: str) -> str:
    # macOS writes "é" as two characters, lists and other systems as one.
    return unicodedata.normalize("NFC", name)


def _listed(path: Path, images: dict[str, Path]) -> list[str]:
    """The ids that a list names."""
    by_file = {key + file.suffix: key for key, file in images.items()}
    keys = []
    for number, line in enumerate(read_lines(path), 1):
        name = _key(line.strip())
        if not name:
            continue
        for known in (name, name.replace("\\", "/")):  # the latter of a list written under Windows
            known = known.removeprefix("./").removeprefix("images/")
            if key := by_file.get(known) or (known if known in images else None):
                keys.append(key)
                break
        else:
            raise DataError(
                f"{path}, line {number}: {line.strip()!r} is no image in {path.parent / 'images'}; write ids or file "
                "names as they are below that folder, one a line, or add the image"
            )
    if not keys:
        raise DataError(f"{path}: the list is empty, split {path.stem!r} has no images; fill it or remove it")
    return keys


def _drawn(keys: Iterable[str], fraction: float, seed: int) -> dict[str, list[str]]:
    """Two keys or more, dealt out to train and val."""
    order = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    count = min(max(1, round(fraction * len(order))), len(order) - 1)
    return {"train": order[count:], "val": order[:count]}


def _more(keys: list[str]) -> str:
    return "nothing else" if len(keys) == 1 else f"and {len(keys) - 1} more: {', '.join(keys[1:6])}"


def _bad_colour(where: str, colours: np.ndarray, bad: np.ndarray) -> DataError:
    y, x = np.argwhere(bad)[0]
    colour = tuple(colours[y, x].tolist())
    if len(set(colour)) == 1:
        remedy = "if its grey values are class numbers, take the colours out of classes.txt; "
    else:
        remedy = "if the mask was resized or smoothed, make it again with nearest neighbour; "
    return DataError(
        f"{where}: colour {colour} is not in classes.txt, first at row {y}, column {x}, in all {bad.sum()} pixels with "
        f"{len(np.unique(colours[bad], axis=0))} such colours; {remedy}else correct classes.txt (a line 'void R G B' "
        "makes a colour void)"
    )
