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

A folder without masks/ may be one of labelme, CVAT, COCO's tools, mmsegmentation or like Cityscapes: see
`pwcrf_jax.data.readers.folder_forms`.

An image with an EXIF orientation is taken as stored or as viewers show it, whichever has the size of the mask; where
both have, it is refused. Without a mask it is taken as viewers show it.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pwcrf_jax.data import coded_masks
from pwcrf_jax.data.builder import Pair, Plan, SegmentationBuilder, check_options, require_source_dir
from pwcrf_jax.data.readers.classes import Coding, binary_lines, read_classes
from pwcrf_jax.data.readers.files import FOREIGN_REMEDY, DataError, present, read_image_file, split_lists
from pwcrf_jax.data.readers.folder_files import (
    LISTS,
    drawn,
    image_files,
    listed,
    more,
    refuse_splits_by_folder,
)
from pwcrf_jax.data.readers.folder_forms import Reading, read_folder
from pwcrf_jax.data.readers.image_io import decode_colour_label, decode_label, mask_palette, not_png, value_counts

log = logging.getLogger(__name__)
LAYOUT = (
    "expected images/NAME.jpg (or .png, .bmp, .webp, .tif), masks/NAME.png and classes.txt with one class a line, "
    "'name' or 'name R G B'; or what labelme, CVAT, COCO or mmsegmentation lay there (docs/your-data.md)"
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
        reading, left_out = read_folder(root, fraction, seed)
        for note in left_out:
            log.warning("%s", note)
        return cls._plan_of_form(root, reading) if reading else cls._plan_of_masks(root, fraction, seed)

    @classmethod
    def _plan_of_form(cls, root: Path, reading: Reading) -> Plan:
        splits = {}
        for split, keys in reading.splits.items():
            splits[split] = pairs = [Pair(key, reading.images[key], reading.masks.get(key), root) for key in keys]
            _refuse_bare(split, pairs, f"mask or annotations of the form it was read as ({reading.form})")
        return cls.plan_from_pairs(
            root, splits, reading.names, *reading.depends,
            class_names=reading.names, palette=reading.palette, coding=reading.coding, form=reading.form,
        )  # fmt: skip

    @classmethod
    def _plan_of_masks(cls, root: Path, fraction: float, seed: int) -> Plan:
        if not present(root / "images", folder=True):
            raise DataError(f"{root}: has no folder images; {LAYOUT}; check data.source_dir")
        _refuse_binary_without_classes(root)
        names, colours, coding = read_classes(root / "classes.txt")
        images, masks = _images_and_masks(root)
        lists = split_lists(root, LISTS)
        if lists:
            chosen = {split: listed(path, images) for split, path in lists.items()}
        elif len(images) > 1:
            refuse_splits_by_folder(root / "images")
            chosen = drawn(images, fraction, seed)
        else:
            raise DataError(f"{root / 'images'}: holds one image; train and val need one each, or write train.txt")
        splits = {}
        for split, keys in chosen.items():
            where = lists.get(split, root / "images")
            splits[split] = pairs = [Pair(key, images[key], masks.get(key), where) for key in keys]
            _refuse_bare(split, pairs, f"mask {root / 'masks'}/{{}}.png")
        palette = colours if coding.colours else ()
        return cls.plan_from_pairs(
            root, splits, names, coding.colours, sorted(coding.classes.items()),
            class_names=names, palette=palette, coding=coding,
            form=f"images and masks of {'colours' if coding.colours else 'values'}",
        )  # fmt: skip

    def __init__(self, **options: Any):
        super().__init__(**options)
        # Colour of a value in the first palette mask that has it, and which mask that is.
        self._shown: dict[int, tuple[tuple[int, ...], Path]] = {}
        self._values = np.zeros(256, bool)  # that masks have held so far

    def _generate_examples(self, split: str, items: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from super()._generate_examples(split, items)
        # Of two classes one occurs, and the rest is void: nobody means that, so the masks are black and white.
        if len(self.class_names) == 2 and np.flatnonzero(self._values).tolist() == [0, 255]:
            self.failure = DataError(
                f"{items[0].mask}: holds 0 and 255 alone, as do all masks of split {split!r}, but 255 is void; write "
                f"these two lines into classes.txt: {binary_lines(*self.class_names)}"
            )
            raise self.failure

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """Class, or -1, of each value or colour."""
        return coded_masks.table_of(self._plan.coding)

    def _label(self, mask: Path, image: Path) -> np.ndarray:
        if not isinstance(self._plan.coding, Coding):  # outlines
            return self._plan.coding(mask, image, self.max_pixels)
        data, where = self._read(mask), str(mask)
        decode = decode_colour_label if self._plan.coding.colours else decode_label
        values = decode(data, where, self.max_pixels)
        label = coded_masks.to_classes(values, self._plan.coding, self._table, where)
        if not self._plan.coding.colours:
            self._values |= value_counts(values) > 0
            self._compare_palette(mask, data, values)
        return label

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


def _images_and_masks(root: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The files of images/ and masks/ by id; what is no image is named and left out."""
    images, foreign, others = image_files(root / "images")
    if others:
        shown = ", ".join(map(str, others[:5]))
        log.warning("%d files are no images, and left out: %s%s", len(others), shown, ", ..." * (len(others) > 5))
    masks, other_masks, _ = image_files(root / "masks") if present(root / "masks", folder=True) else ({}, [], [])
    if foreign:
        raise DataError(f"{foreign[0]}: {FOREIGN_REMEDY}")
    if not images:
        raise DataError(f"{root / 'images'}: holds no image; {LAYOUT}")
    for path in (*other_masks, *masks.values()):
        if path.suffix.lower() != ".png":
            raise not_png(read_image_file(path), str(path))
    if alone := sorted(masks.keys() - images.keys()):
        raise DataError(f"{masks[alone[0]]}: has no image {root / 'images' / alone[0]}.* ({more(alone)}); add it, "
                        f"or remove the mask; {FOREIGN_REMEDY}")  # fmt: skip
    return images, masks


def _refuse_bare(split: str, pairs: Sequence[Pair], mask: str) -> None:
    """DataError for an image without mask, unless all of split test are; `mask` names what is missing, {} its id."""
    bare = [p for p in pairs if p.mask is None]
    if bare and not (split == "test" and len(bare) == len(pairs)):
        raise DataError(
            f"{bare[0].image}: has no {mask.format(bare[0].id)} (split {split!r}; {more([p.id for p in bare])}); "
            "add it or leave the image out (only test.txt may list images without masks, none of them with one)"
        )


def _refuse_binary_without_classes(root: Path) -> None:
    """DataError where classes.txt is missing, and masks are black and white: which lines it needs."""
    if present(root / "classes.txt") or not present(root / "masks", folder=True):
        return
    values = np.zeros(256, bool)
    for path in list(image_files(root / "masks")[0].values())[:5]:
        colours = decode_colour_label(read_image_file(path), str(path))
        if np.ptp(colours, axis=-1).any():
            return
        values |= value_counts(np.ascontiguousarray(colours[..., 0])) > 0
    if np.flatnonzero(values).tolist() == [0, 255]:
        raise DataError(f"{root / 'classes.txt'}: is missing; write one class a line; the masks hold 0 and 255, for "
                        f"which it needs these two lines: {binary_lines()}")  # fmt: skip
