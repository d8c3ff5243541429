"""NYU Depth v2 indoor scenes, RGB only, the 40 classes of Gupta et al.: 795 train, 654 test.

`data.source_dir` is a folder with three files:

    nyu_depth_v2_labeled.mat   2.8 GB, "Labeled dataset" of https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html
    splits.mat                 http://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat
    classMapping40.mat         https://github.com/ankurhanda/nyuv2-meta-data

The 894 labels of the first become the 40 classes of the last ("wall" is 0), and unlabelled pixels become 255. Images
are 480 x 640 with a white border; rows 46 to 470 and columns 41 to 600 (counted from 1) are kept, 425 x 560 pixels, as
in the 40-class benchmark (the toolbox of the data set itself keeps 427 x 561). An id is the image's number in the file,
"0001" to "1449". One image is read at a time: the large file never lies in memory.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pwcrf_jax.data.builder import Plan, SegmentationBuilder, fingerprint
from pwcrf_jax.data.readers.archives import open_mat73, read_mat
from pwcrf_jax.data.readers.classes import refuse_other_names
from pwcrf_jax.data.readers.files import DataError, present
from pwcrf_jax.data.readers.image_io import VOID, encode_png
from pwcrf_jax.data.sets.siftflow import relabel

FILES = ("nyu_depth_v2_labeled.mat", "splits.mat", "classMapping40.mat")
CROP = (slice(45, 470), slice(40, 600))
"""Rows and columns inside the white border."""


class Frame(NamedTuple):
    """Image `number` (from 1) of the .mat file; `table` gives the class of each of its labels, from 0, unlabelled."""

    number: int
    file: Path
    table: list[int]


class NyuDv2(SegmentationBuilder):
    """The labelled images of NYU Depth v2, read from the .mat file."""

    name = "pwcrf_nyudv2"
    class_names = (
        "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
        "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes",
        "ceiling", "books", "refridgerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard",
        "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture",
        "otherprop",
    )  # fmt: skip
    split_sizes = {"train": 795, "test": 654}
    manual = (
        "nyu_depth_v2_labeled.mat of https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html, splits.mat of "
        "http://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat, classMapping40.mat of "
        "https://github.com/ankurhanda/nyuv2-meta-data"
    )

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """Splits train and test by the numbers in splits.mat; of the large file only the header is read.

        Raises:
          DataError: a file is missing, damaged or of other contents, or splits.mat names an image that is not there
            or names one twice.
        """
        labeled, splits, mapping = paths = [source / name for name in FILES]
        missing = ", ".join(path.name for path in paths if not present(path))
        if missing:
            raise DataError(f"{source}: {missing} not found; check data.source_dir, or download {cls.manual}")
        with open_mat73(labeled, "images", "labels") as (images, labels):
            shapes = images.shape, labels.shape
        count = shapes[0][0]
        if shapes != ((count, 3, 640, 480), (count, 640, 480)):
            raise DataError(
                f"{labeled}: images and labels have shapes {shapes[0]} and {shapes[1]}, officially (1449, 3, 640, 480) "
                "and (1449, 640, 480); take the original file"
            )
        train, test = _numbers(splits, count)
        table = _table(mapping, len(cls.class_names))
        items = {split: [Frame(n, labeled, table) for n in ns] for split, ns in (("train", train), ("test", test))}
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return Plan(items, fingerprint(str(cls.VERSION), stats))

    def _example(self, item: Frame) -> tuple[str, bytes, np.ndarray]:
        with open_mat73(item.file, "images", "labels") as (images, labels):
            image, label = images[item.number - 1], labels[item.number - 1]
        label = relabel(label.T[CROP], item.table, f"{item.file}, image {item.number}")
        return f"{item.number:04d}", encode_png(image.transpose(2, 1, 0)[CROP]), label


def _numbers(path: Path, count: int) -> list[list[int]]:
    """Image numbers, from 1, of train and test."""
    splits = [[int(n) for n in np.ravel(numbers)] for numbers in read_mat(path, "trainNdxs", "testNdxs")]
    seen = set()
    for number in sum(splits, []):
        if not 1 <= number <= count:
            raise DataError(f"{path}: names image {number}, but {FILES[0]} holds images 1..{count}; take the originals")
        if number in seen:
            raise DataError(f"{path}: names image {number} twice; take the original file")
        seen.add(number)
    return splits


def _table(path: Path, num_classes: int) -> list[int]:
    """Class of each label, from 0 (unlabelled) to 894."""
    (classes,) = read_mat(path, "mapClass")
    classes = np.ravel(classes)
    if len(classes) != 894 or classes.min() != 1 or classes.max() != num_classes:
        raise DataError(
            f"{path}: mapClass maps {len(classes)} labels to classes {classes.min():g}..{classes.max():g}, expected "
            f"894 labels and classes 1..{num_classes}; take the mapping to {num_classes} classes"
        )
    names = list(map(str, np.ravel(read_mat(path, "className")[0])))
    refuse_other_names(f"{path}: className", names, NyuDv2.class_names, num_classes // 2)
    return [VOID, *(int(c) - 1 for c in classes)]
