"""PASCAL VOC 2012 segmentation (21 classes, void 255) with SBD's masks, and any other folder in VOC's layout.

Download into one folder, data.source_dir, and leave the archives packed or unpack them there:
  VOCtrainval_11-May-2012.tar  from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/
  VOC2012test.tar              (optional) from the evaluation server, http://host.robots.ox.ac.uk:8080/, after
                               registration; split `test`, whose labels are not public
  benchmark.tgz                (optional) SBD, from http://home.bharathh.info/pubs/codes/SBD/download.html; split
                               `train_aug`
Unpack both VOC archives or neither: an archive beside an unpacked VOCdevkit/VOC2012 is not looked into.

Expected folder: `VOCdevkit/VOC2012` (or `VOC2012`, or data.source_dir itself) with `JPEGImages/NAME.jpg`,
`SegmentationClass/NAME.png` (palette masks of class indices) and lists of names `ImageSets/Segmentation/SPLIT.txt`; SBD
is `benchmark_RELEASE/dataset` with `img/NAME.jpg`, `cls/NAME.mat`, `train.txt` and `val.txt`. Every list is a split
under its own name: officially train (1464), val (1449), trainval (2913), test (1456).

train_aug (10582) is VOC's train and SBD's train and val without VOC's val; images that have VOC's mask keep it, the
others have SBD's, in which nothing is void. A list train_aug.txt of your own comes first; it needs SBD only for names
without a PNG mask. SBD's own lists are no splits: part of its training images are in VOC's val.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from pwcrf_jax.data.builder import Pair, Plan, SegmentationBuilder
from pwcrf_jax.data.readers.archives import locate, read_mat
from pwcrf_jax.data.readers.class_forms import plain
from pwcrf_jax.data.readers.files import DataError, present, read_file, read_lines, refuse_other_lists

LISTS = "ImageSets/Segmentation"

log = logging.getLogger(__name__)


class Voc(SegmentationBuilder):
    """A VOC devkit folder: VOC 2012 itself, with SBD's masks added, or any data set in its layout."""

    name = "pwcrf_voc"
    class_names = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
        "tvmonitor",
    )  # fmt: skip
    split_sizes = {"train": 1464, "val": 1449, "trainval": 2913, "test": 1456, "train_aug": 10582}
    manual = "VOCtrainval_11-May-2012.tar, VOC2012test.tar for test, benchmark.tgz of SBD for train_aug"

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """One split per list file, and train_aug where SBD is there.

        A list without a single mask is left out with a warning; `test` is unlabelled instead if it has images.

        Raises:
          DataError: not this layout, an empty list, a line that is no name, a missing file, or no mask at all.
        """
        folders = [LISTS, f"VOC2012/{LISTS}", f"VOCdevkit/VOC2012/{LISTS}"]
        lists = locate(source, folders, ["VOCtrainval_11-May-2012.tar", "VOC2012test.tar"], data_dir)
        if not lists or not (list_files := sorted(lists.glob("*.txt"))):
            raise DataError(
                f"{source}: no VOC devkit found; expected JPEGImages/NAME.jpg, SegmentationClass/NAME.png and "
                f"{LISTS}/train.txt there or in its VOC2012 or VOCdevkit/VOC2012, or VOCtrainval_11-May-2012.tar; "
                "check data.source_dir"
            )
        root = lists.parent.parent
        sbd = locate(source, ["benchmark_RELEASE/dataset"], ["benchmark.tgz"], data_dir)
        refuse_other_lists(lists, [path.name for path in list_files])
        splits, without_masks = {}, []
        for list_file in list_files:
            split = _split_name(list_file)
            pairs = [_pair(root, n, list_file, sbd if split == "train_aug" else None) for n in read_names(list_file)]
            if any(pair.mask and present(pair.mask) for pair in pairs):
                splits[split] = pairs
            elif split == "test" and any(present(pair.image) for pair in pairs):
                splits[split] = [pair._replace(mask=None) for pair in pairs]
            else:
                without_masks.append(list_file)
        # Without SegmentationClass, test alone would look like a data set.
        if without_masks and not any(pairs[0].mask for pairs in splits.values()):
            raise DataError(
                f"{root / 'SegmentationClass'}: holds no mask that a list in {LISTS} names; "
                "add the masks or correct data.source_dir"
            )
        for list_file in without_masks:
            log.warning("%s: left out, none of its masks exist in SegmentationClass", list_file)
        _refuse_own_objects(root / "Annotations", splits, cls.class_names)
        if sbd and not present(lists / "train_aug.txt"):
            splits["train_aug"] = _train_aug(root, sbd)
        return cls.plan_from_pairs(source, splits)

    def _label(self, mask: Path, image: Path) -> np.ndarray:
        if mask.suffix != ".mat":
            return super()._label(mask, image)
        (truth,) = read_mat(mask, "GTcls")
        values = truth.get("Segmentation") if isinstance(truth, dict) else None
        return label_matrix(mask, "GTcls.Segmentation", values, 256).astype(np.uint8)


def read_names(list_file: Path) -> list[str]:
    """The names a list of VOC's holds, one per line; DataError for an empty list or a line that is no name."""
    names = []
    for number, line in enumerate(read_lines(list_file), 1):
        name = line.strip()
        if not name:
            continue
        if not re.fullmatch(r"[^\s/\\\0]+", name) or len(name.encode()) > 250:  # the system's limit, with a suffix
            raise DataError(
                f"{list_file}, line {number}: {name!r} is not a name; expected one NAME per line, without "
                "folder or suffix"
            )
        names.append(name)
    if not names:
        raise DataError(f"{list_file}: the list is empty, split {list_file.stem!r} has no images; remove it")
    return names


def _split_name(list_file: Path) -> str:
    if not re.fullmatch(r"[A-Za-z]\w*", list_file.stem) or list_file.stem == "all":
        raise DataError(
            f"{list_file}: {list_file.stem!r} cannot be a split name; rename the file to letters, digits and "
            "underscores, other than 'all'"
        )
    return list_file.stem


def _refuse_own_objects(folder: Path, splits: Mapping[str, Sequence[Pair]], names: Sequence[str]) -> None:
    """DataError where the boxes that lie beside the masks have other classes; 20 files of a split tell."""
    known = {plain(name) for name in names}
    for pair in (pair for pairs in splits.values() for pair in pairs[:20]):
        if not present(path := folder / f"{pair.id}.xml"):
            continue
        try:
            objects = ElementTree.fromstring(read_file(path, 1 << 20)).findall("object")
        except (ElementTree.ParseError, ValueError):  # damaged, and not needed
            continue
        own = [name for found in objects if plain(name := (found.findtext("name") or "").strip()) not in known]
        if any(own):
            raise DataError(
                f"{path}: has objects of classes of its own ({', '.join(dict.fromkeys(own[:5]))}), but data.name "
                f"stands for VOC's {len(names)}; use data.name=image_folder with the classes and the masks of this set"
            )


def _pair(root: Path, name: str, listed_in: Path, sbd: Path | None) -> Pair:
    mask = root / "SegmentationClass" / f"{name}.png"
    if sbd and not present(mask):
        return Pair(name, sbd / "img" / f"{name}.jpg", sbd / "cls" / f"{name}.mat", listed_in)
    return Pair(name, root / "JPEGImages" / f"{name}.jpg", mask, listed_in)


def _train_aug(root: Path, sbd: Path) -> list[Pair]:
    listed_in: dict[str, Path] = {}
    for list_file in (sbd / "train.txt", sbd / "val.txt", root / LISTS / "train.txt"):
        listed_in |= dict.fromkeys(read_names(list_file), list_file)
    names = listed_in.keys() - set(read_names(root / LISTS / "val.txt"))
    return [_pair(root, name, listed_in[name], sbd) for name in sorted(names)]


def label_matrix(path: Path, variable: str, values: Any, limit: int) -> np.ndarray:
    """A variable of a .mat file as a matrix of integers, int64 [H, W]; DataError unless all are in 0..limit-1."""
    array = np.asarray(values)
    if array.ndim != 2 or array.dtype.kind not in "uif" or not np.isin(array, np.arange(limit)).all():
        raise DataError(
            f"{path}: {variable}, {array.dtype} of shape {array.shape}, is no matrix of integers in 0..{limit - 1}; "
            "restore the file from the official archive"
        )
    return array.astype(np.int64)
