"""PASCAL VOC segmentation (devkit layout), 21 classes, void 255.

Expected folder: `JPEGImages/NAME.jpg`, `SegmentationClass/NAME.png` (palette masks) and lists of names in
`ImageSets/Segmentation/*.txt`; every list is a split under its own name (train, val, train_aug, ...).
"""

import logging
import re
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from pwcrf_jax.data.base import Pair, Plan, SegmentationBuilder, check_options, require_source_dir
from pwcrf_jax.data.common import DataError

LISTS = Path("ImageSets/Segmentation")

log = logging.getLogger(__name__)


class Voc(SegmentationBuilder, skip_registration=True):
    """A VOC devkit folder: VOC 2012 itself, with SBD masks added, or any data set in its layout."""

    name = "pwcrf_voc"
    VERSION = tfds.core.Version("1.0.0")
    class_names = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
        "tvmonitor",
    )  # fmt: skip

    @classmethod
    def plan(cls, source_dir: str, *, data_dir: str = "", **options: Any) -> Plan:
        """One split per list file; a list none of whose masks exist (test) is left out with a warning.

        Args:
          source_dir: the devkit folder, or a parent holding it as `VOC2012` or `VOCdevkit/VOC2012`.

        Raises:
          DataError: not this layout, an empty list, a line that is no name, or a missing file.
        """
        del data_dir
        check_options("voc", options)
        parent = require_source_dir("voc", source_dir)
        roots = [parent, parent / "VOC2012", parent / "VOCdevkit" / "VOC2012"]
        root = next((r for r in roots if (r / LISTS).is_dir()), None)
        lists = sorted((root / LISTS).glob("*.txt")) if root else []
        if not lists:
            raise DataError(
                f"{parent}: no VOC devkit found; expected JPEGImages/NAME.jpg, SegmentationClass/NAME.png "
                f"and {LISTS}/train.txt there or in its VOC2012 or VOCdevkit/VOC2012; check data.source_dir"
            )
        splits = {}
        for list_file in lists:
            pairs = _from_list(root, list_file)
            if any(pair.mask.is_file() for pair in pairs):
                splits[list_file.stem] = pairs
            else:
                log.warning("%s: left out, none of its masks exist in SegmentationClass", list_file)
        if not splits:
            raise DataError(
                f"{root / 'SegmentationClass'}: holds no mask that a list in {LISTS} names; "
                "add the masks or correct data.source_dir"
            )
        return cls.plan_from_pairs(root, splits)


def _from_list(root: Path, list_file: Path) -> list[Pair]:
    if not re.fullmatch(r"[A-Za-z]\w*", list_file.stem) or list_file.stem == "all":
        raise DataError(
            f"{list_file}: {list_file.stem!r} cannot be a split name; rename the file to letters, digits and "
            "underscores, other than 'all'"
        )
    pairs = []
    for number, line in enumerate(list_file.read_text().splitlines(), 1):
        name = line.strip()
        if not name:
            continue
        if not re.fullmatch(r"[^\s/\\]+", name):
            raise DataError(
                f"{list_file}, line {number}: {name!r} is not a name; expected one NAME per line, without "
                "folder or suffix"
            )
        image = root / "JPEGImages" / f"{name}.jpg"
        pairs.append(Pair(name, image, root / "SegmentationClass" / f"{name}.png", list_file))
    if not pairs:
        raise DataError(f"{list_file}: the list is empty, split {list_file.stem!r} has no images; remove it")
    return pairs
