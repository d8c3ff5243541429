"""Your own images and masks.

    images/a.jpg  images/street/b.png    JPEG, PNG, BMP, WebP or TIFF, suffix in any letter case, subfolders at will
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
`void R G B`. Empty lines and lines that start with # do not count.

An image with an EXIF orientation is taken as stored or as viewers show it, whichever has the size of the mask; where
both have, it is refused. Without a mask it is taken as viewers show it.
"""

import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from pwcrf_jax.data.base import Pair, Plan, SegmentationBuilder, _read, check_options, require_source_dir
from pwcrf_jax.data.check import bad_value
from pwcrf_jax.data.common import VOID, DataError, decode_colour_label, decode_label, read_lines, value_counts

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
LISTS = ("train", "val", "test")
LAYOUT = (
    "expected images/NAME.jpg (or .png, .bmp, .webp, .tif), masks/NAME.png and classes.txt with one class a line, "
    "'name' or 'name R G B'"
)


class Coding(NamedTuple):
    """Which class (255: void) a mask's values, or its colours where `colours`, stand for."""

    classes: dict[int, int]
    colours: bool


class ImageFolder(SegmentationBuilder, skip_registration=True):
    """A folder of images, masks and classes.txt."""

    name = "pwcrf_image_folder"
    VERSION = tfds.core.Version("1.0.0")
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
        if not (root / "images").is_dir():
            raise DataError(f"{root}: has no folder images; {LAYOUT}; check data.source_dir")
        names, colours, coding = read_classes(root / "classes.txt")
        images, masks = _files(root / "images"), _files(root / "masks") if (root / "masks").is_dir() else {}
        if not images:
            raise DataError(f"{root / 'images'}: holds no image; {LAYOUT}")
        for path in masks.values():
            if path.suffix.lower() != ".png":
                raise DataError(
                    f"{path}: masks are PNG files; JPEG changes labels, so make it again from the original mask rather "
                    "than convert it"
                )
        if alone := sorted(masks.keys() - images.keys()):
            raise DataError(f"{masks[alone[0]]}: has no image {root / 'images' / alone[0]}.* ({_more(alone)}); add it, "
                            "or remove the mask")  # fmt: skip
        for path in sorted(root.glob("*.txt")):
            if path.name != "classes.txt" and path.stem not in LISTS and path.stem.casefold().startswith(LISTS):
                raise DataError(
                    f"{path}: looks like the list of a split, which are train.txt, val.txt and test.txt; rename it, or "
                    "move it elsewhere"
                )
        lists = {split: root / f"{split}.txt" for split in LISTS if (root / f"{split}.txt").is_file()}
        if lists:
            chosen = {split: _listed(path, images) for split, path in lists.items()}
        elif len(images) > 1:
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

    def __init__(self, *, plan: Plan, data_dir: str):
        super().__init__(plan=plan, data_dir=data_dir)
        # Colour of a value in the first palette mask that has it, and which mask that is.
        self._shown: dict[int, tuple[tuple[int, ...], Path]] = {}

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """Class, or -1, of each value or colour."""
        classes, colours = self._plan.coding
        table = np.full(1 << 24 if colours else 256, -1, np.int16)
        table[list(classes)] = list(classes.values())
        return table

    def _label(self, item: Pair) -> np.ndarray:
        data, where = _read(item.mask), str(item.mask)
        if self._plan.coding.colours:
            colours = decode_colour_label(data, where).astype(np.int32)
            label = self._table[colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]]
            if label.min() < 0:
                raise _bad_colour(where, colours, label < 0)
            return label.astype(np.uint8)
        values = decode_label(data, where)
        label = self._table[values]
        if label.min() < 0:
            known = sorted(v for v, k in self._plan.coding.classes.items() if k != VOID)
            void = ", ".join(str(v) for v, k in self._plan.coding.classes.items() if k == VOID)
            raise bad_value(
                where, values, self._table >= 0, f"neither a class ({known[0]}..{known[-1]}) nor void ({void})",
                "correct the mask, or complete classes.txt (a line 'void VALUE' makes a value void)",
            )  # fmt: skip
        self._compare_palette(item.mask, data, values)
        return label.astype(np.uint8)

    def _void_to_255(self, label: np.ndarray, path: Path) -> np.ndarray:
        del path
        return label  # it is so already

    def _compare_palette(self, path: Path, data: bytes, values: np.ndarray) -> None:
        """Notes a value that has one colour here and another in an earlier mask: it may mean two things."""
        palette = Image.open(BytesIO(data)).palette
        if palette is None or self.guard.notes:
            return
        colours = np.frombuffer(bytes(palette.palette)[: len(palette.palette) // 3 * 3], np.uint8).reshape(-1, 3)
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


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...], Coding]:
    """Names, colours (as many as names, or none) and the coding of masks that a classes.txt gives.

    Raises:
      DataError: missing, or it does not follow the syntax; names the line.
    """
    if not path.is_file():
        raise DataError(f"{path}: is missing; write one class a line, 'name' or 'name R G B'")
    lines = [(i, line.split()) for i, line in enumerate(read_lines(path), 1)]
    lines = [(i, words) for i, words in lines if words and not words[0].startswith("#")]
    lines = [(i, ["void", *words[1:]] if words[0].casefold() == "void" else words) for i, words in lines]
    _check_numbers(path, [words for _, words in lines if words[0] != "void"])
    names: list[str] = []
    colours: dict[tuple[int, ...], str] = {}
    void_values: list[int] = []
    for number, words in lines:
        where = f"{path}, line {number}"
        count = 3 if _numbers(words[-3:]) and len(words) > 3 else 0
        name, colour = " ".join(words[: len(words) - count]), tuple(map(int, words[len(words) - count :]))
        if len(words) == 2 and words[0] == "void" and _numbers(words[1:]):
            void_values.append(int(words[1]))
            if not 0 <= void_values[-1] <= 255:
                raise DataError(f"{where}: {void_values[-1]} is no value of an 8-bit mask; void is 0..255")
            continue
        if name.casefold() in ("ignore", "ignored", "unlabeled", "unlabelled"):
            raise DataError(
                f"{where}: {name!r} would be a class; write 'void' for what is not trained on, or rename it"
            )
        if re.search(r"\s#|,\s*\d", name) or (colour and _numbers(name.split()[-1:])):
            raise DataError(
                f"{where}: {name!r} is no name; write 'name' or 'name R G B', numbers apart by spaces, comments on "
                "lines of their own"
            )
        if any(unicodedata.category(c) == "Cc" for c in name):
            raise DataError(f"{where}: {name!r} holds control characters; save the file as UTF-8")
        if name == "void" and not colour:
            raise DataError(f"{where}: void needs its value ('void 255') or its colour ('void 0 0 0')")
        if name in names:
            raise DataError(f"{where}: class {name!r} is there twice; rename or remove one")
        if colour:
            if not all(0 <= c <= 255 for c in colour):
                raise DataError(f"{where}: {colour} is no colour; R, G and B are 0..255")
            if colour in colours:
                raise DataError(f"{where}: {name!r} and {colours[colour]!r} have the same colour {colour}; change one")
            colours[colour] = name
        if name != "void":
            names.append(name)
    return tuple(names), *_coding(path, names, colours, void_values)


def _check_numbers(path: Path, lines: list[list[str]]) -> None:
    """Refuses classes that seem to be numbered: their numbers would not count."""
    first = bool(lines) and all(re.fullmatch(r"\d+[:;,.]?", words[0]) for words in lines)
    last = [words[-1] for words in lines if len(words) > 1 and _numbers(words[-1:]) and not _numbers(words[-3:])]
    # "lane 1", "lane 2" are names.
    last = len(last) == len(lines) and sorted(last, key=int) != last
    if first or last:
        raise DataError(
            f"{path}: every line {'starts' if first else 'ends'} with a number; classes are numbered in the order of "
            "the lines, so write 'name' or 'name R G B' (and 'name_1' where a number is part of the name)"
        )


def _coding(path: Path, names: list[str], colours: dict[tuple[int, ...], str], void_values: list[int]) -> Any:
    if not names:
        raise DataError(f"{path}: names no class; write one a line, 'name' or 'name R G B'")
    if len(names) == 1:
        raise DataError(f"{path}: names one class, expected two or more; what is around an object is a class, too")
    without = sorted(set(names) - set(colours.values()))
    if colours and (without or void_values):
        raise DataError(
            f"{path}: some lines have a colour, but not {', '.join(without[:5]) or 'void'}; give every class a colour, "
            "or none"
        )
    if len(names) > 255 or (not colours and len(names) + len(set(void_values or [VOID])) > 256):
        raise DataError(f"{path}: {len(names)} classes are too many, 8-bit masks have room for 255 and void")
    if colours:
        index = {name: k for k, name in enumerate(names)} | {"void": VOID}
        coding = {r << 16 | g << 8 | b: index[name] for (r, g, b), name in colours.items()}
        return tuple(c for c, name in colours.items() if name != "void"), Coding(coding, True)
    void = dict.fromkeys(void_values or [VOID], VOID)
    classes = (v for v in range(256) if v not in void)
    return (), Coding(dict(zip(classes, range(len(names)), strict=False)) | void, False)


def _numbers(words: Sequence[str]) -> bool:
    return all(re.fullmatch(r"-?[0-9]{1,9}", word) for word in words)


def _files(folder: Path) -> dict[str, Path]:
    """Id -> file of all images below a folder; hidden files and folders do not count."""
    found: dict[str, Path] = {}
    for path in _walk(folder):
        if path.suffix.lower() not in SUFFIXES:
            continue
        key = _key(path.relative_to(folder).with_suffix("").as_posix())
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in key):
            raise DataError(f"{str(path)!r}: its name is not UTF-8, or holds control characters; rename it")
        if key in found:
            raise DataError(f"{path} and {found[key]} have the same name but for the suffix; rename or remove one")
        found[key] = path
    return found


def _walk(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
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
