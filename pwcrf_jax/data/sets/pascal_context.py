"""PASCAL-Context, 59 frequent classes and background: whole-scene labels of the VOC 2010 images.

Download into one folder, data.source_dir, and leave the archives packed or unpack them there:
  trainval.tar.gz              from https://cs.stanford.edu/~roozbeh/pascal-context/ (also
                               https://roozbehm.info/pascal-context/): labels.txt and trainval/NAME.mat. PASCAL-Part
                               calls its own archive the same.
  VOCtrainval_03-May-2010.tar  from http://host.robots.ox.ac.uk/pascal/VOC/voc2010/

Expected folder: `VOCdevkit/VOC2010` (or `VOC2010`, or data.source_dir itself) with `JPEGImages/NAME.jpg` and
`ImageSets/Main/train.txt`, `val.txt`; `trainval/NAME.mat` in data.source_dir or in the VOC2010 folder, and `labels.txt`
beside or in `trainval`. Splits are VOC 2010's: train (4998) and val (5105).

A .mat file holds LabelMap, uint16 [H, W], whose numbers labels.txt names ("397: table"), 459 of them. The classes are
the 59 of the page's 59_labels.txt, in its order and after background, and are found in labels.txt by their names; three
are called otherwise there, see `NAMES_IN_FULL_LIST`. All other labels, and 0, which means not labelled, are background
(class 0), which is trained on and scored: the 60 classes of the paper, and nothing is void.
"""

import re
from pathlib import Path

import numpy as np

from pwcrf_jax.data.builder import Pair, Plan, SegmentationBuilder
from pwcrf_jax.data.readers.archives import locate, read_mat
from pwcrf_jax.data.readers.files import DataError, present, read_lines
from pwcrf_jax.data.sets.voc import label_matrix, read_names

LISTS = "ImageSets/Main"
VOC_ARCHIVE = "VOCtrainval_03-May-2010.tar"

NAMES_IN_FULL_LIST = {"diningtable": "table", "clothes": "cloth", "bedcloth": "bedclothes"}
"""Name in 59_labels.txt -> name in labels.txt, where they differ."""


class PascalContext(SegmentationBuilder):
    """PASCAL-Context as released, in .mat files."""

    name = "pwcrf_pascal_context"
    class_names = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
        "bag", "bed", "bench", "book", "building", "cabinet", "ceiling", "clothes", "computer", "cup", "door", "fence",
        "floor", "flower", "food", "grass", "ground", "keyboard", "light", "mountain", "mouse", "curtain", "platform",
        "sign", "plate", "road", "rock", "shelves", "sidewalk", "sky", "snow", "bedcloth", "track", "tree", "truck",
        "wall", "water", "window", "wood",
    )  # fmt: skip
    names_files_count = False  # labels.txt has all 459 labels, see `_classes`
    split_sizes = {"train": 4998, "val": 5105}
    manual = f"trainval.tar.gz of https://cs.stanford.edu/~roozbeh/pascal-context/ and {VOC_ARCHIVE}"

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """Splits train and val, of which one may be absent.

        Raises:
          DataError: a part of the data set is not there, labels.txt lacks a class, a list is empty or names a file
            that is missing.
        """
        folders = [f"VOCdevkit/VOC2010/{LISTS}", f"VOC2010/{LISTS}", LISTS]
        lists = locate(source, folders, [VOC_ARCHIVE], data_dir)
        if lists is None:
            raise DataError(
                f"{source}: no VOC 2010 devkit found; expected {VOC_ARCHIVE}, or VOCdevkit/VOC2010 with "
                f"JPEGImages/NAME.jpg and {LISTS}/train.txt; check data.source_dir"
            )
        # Some programs unpack trainval.tar.gz into a folder of its own, which is called trainval as well.
        folders = ["trainval/trainval", "trainval", "VOCdevkit/VOC2010/trainval", "VOC2010/trainval"]
        masks = locate(source, folders, ["trainval.tar.gz"], data_dir)
        if masks is None:
            raise DataError(
                f"{source}: no PASCAL-Context labels found; expected trainval.tar.gz, or its labels.txt and folder "
                "trainval with NAME.mat; check data.source_dir"
            )
        splits = {}
        for split in ("train", "val"):
            list_file = lists / f"{split}.txt"
            if present(list_file):
                images = lists.parent.parent / "JPEGImages"
                splits[split] = [
                    Pair(name, images / f"{name}.jpg", masks / f"{name}.mat", list_file)
                    for name in read_names(list_file)
                ]
        if not splits:
            raise DataError(f"{lists}: holds neither train.txt nor val.txt; restore them from {VOC_ARCHIVE}")
        return cls.plan_from_pairs(source, splits, _classes(masks).tolist())

    def _label(self, mask: Path, image: Path) -> np.ndarray:
        (numbers,) = read_mat(mask, "LabelMap")
        classes = _classes(mask.parent)
        return classes[label_matrix(mask, "LabelMap", numbers, len(classes))]


def _classes(masks: Path) -> np.ndarray:
    """Number in labels.txt -> class, uint8."""
    inside = masks / "labels.txt"
    labels = inside if present(inside) else masks.parent / "labels.txt"
    matches = [re.fullmatch(r"\s*(\d{1,4})\s*:(.+)", line) for line in read_lines(labels)]
    numbers = {match[2].replace(" ", ""): int(match[1]) for match in matches if match}
    classes = np.zeros(max(numbers.values(), default=0) + 1, np.uint8)
    for index, name in enumerate(PascalContext.class_names[1:], 1):
        name = NAMES_IN_FULL_LIST.get(name, name)
        if name not in numbers:
            raise DataError(
                f"{labels}: no line 'NUMBER: {name}' among its {len(numbers)} labels; expected the 459 of "
                "PASCAL-Context's labels.txt, restore it from trainval.tar.gz"
            )
        classes[numbers[name]] = index
    return classes
