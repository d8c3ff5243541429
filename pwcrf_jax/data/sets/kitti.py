"""KITTI street scenes: `kitti` with 11 classes (the set of the paper), `kitti_cityscapes` with Cityscapes' 19.

`kitti`: frames of the odometry sequences 00 and 07, labelled by Ros et al., "Vision-based offline-online perception
paradigm for autonomous driving", WACV 2015; from http://adas.cvc.uab.es/s2uad/. Unpacked in the source folder, or as
KITTI_SEMANTIC.zip:

    KITTI_SEMANTIC/{Training_00,Validation_07}/RGB/NAME.png    images
    KITTI_SEMANTIC/{Training_00,Validation_07}/GT/NAME.png     masks, a colour per class, black is void

Splits: train 100 (Training_00), val 46 (Validation_07; papers, this one too, report it as their test set).

`kitti_cityscapes`: the official benchmark, data_semantics.zip from
https://www.cvlibs.net/datasets/kitti/eval_semseg.php?benchmark=semantics2015, or what it unpacks to:

    training/image_2/NAME_10.png
    training/semantic/NAME_10.png      label ids of Cityscapes, mapped as there
    testing/image_2/NAME_10.png

Splits: train 200, test 200 (unlabelled). There is no official validation split: use slices such as train[:80%] and
train[80%:].
"""

from pathlib import Path

import numpy as np

from pwcrf_jax.data.builder import Plan, SegmentationBuilder, pairs_in
from pwcrf_jax.data.readers.archives import locate
from pwcrf_jax.data.readers.files import DataError, present
from pwcrf_jax.data.readers.image_io import VOID, decode_colour_label
from pwcrf_jax.data.sets.cityscapes import Cityscapes


class Kitti(SegmentationBuilder):
    """The 146 images of Ros et al.; classes are read from the colours of the masks."""

    name = "pwcrf_kitti"
    class_names = (
        "sky", "building", "road", "sidewalk", "fence", "vegetation", "pole", "car", "sign", "pedestrian", "cyclist",
    )  # fmt: skip
    palette = (
        (128, 128, 128), (128, 0, 0), (128, 64, 128), (0, 0, 192), (64, 64, 128), (128, 128, 0), (192, 192, 128),
        (64, 0, 128), (192, 128, 128), (64, 64, 0), (0, 128, 192),
    )  # fmt: skip
    void_colour = (0, 0, 0)
    split_sizes = {"train": 100, "val": 46}
    manual = "the folder KITTI_SEMANTIC of http://adas.cvc.uab.es/s2uad/"

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """The splits whose images are there.

        Raises:
          DataError: no split there, one without images, an image without its mask, or a damaged archive.
        """
        splits = {}
        for split, folder in (("train", "Training_00"), ("val", "Validation_07")):
            below = [f"KITTI_SEMANTIC/{folder}", folder]
            if root := locate(source, below, ["KITTI_SEMANTIC.zip"], data_dir):
                splits[split] = pairs_in(root / "RGB", root / "GT", "*.png")
        if not splits:
            raise DataError(
                f"{source}: neither KITTI_SEMANTIC/Training_00 nor KITTI_SEMANTIC/Validation_07 is there; set "
                f"data.source_dir to the folder that holds {cls.manual}"
            )
        return cls.plan_from_pairs(source, splits)

    def _label(self, mask: Path, image: Path) -> np.ndarray:
        codes = _code(decode_colour_label(self._read(mask), str(mask), self.max_pixels))
        known = {int(_code(np.array(colour))): index for index, colour in enumerate(self.palette)}
        known[int(_code(np.array(self.void_colour)))] = VOID
        present, where, counts = np.unique(codes, return_inverse=True, return_counts=True)
        unknown = [(int(count), int(code)) for code, count in zip(present, counts, strict=True) if code not in known]
        if unknown:
            count, code = max(unknown)
            raise DataError(
                f"{mask}: colour ({code >> 16}, {code >> 8 & 255}, {code & 255}) of {count} pixels is neither a "
                f"class nor void {self.void_colour} ({len(unknown)} such colours in the mask); restore the official "
                "mask: one that was a JPEG, was resized smoothly, or holds class indices cannot be read"
            )
        return np.array([known[code] for code in present.tolist()], np.uint8)[where].reshape(codes.shape)


class KittiCityscapes(Cityscapes):
    """The 200 + 200 images of KITTI's semantic segmentation benchmark, labelled as Cityscapes."""

    name = "pwcrf_kitti_cityscapes"
    split_sizes = {"train": 200, "test": 200}
    manual = "data_semantics.zip of https://www.cvlibs.net/datasets/kitti/eval_semseg.php?benchmark=semantics2015"

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """The training images, and the testing images where they are there.

        Raises:
          DataError: no training images, an image without its mask, or a damaged archive.
        """
        training = locate(source, ["training", "data_semantics/training"], ["data_semantics.zip"], data_dir)
        if training is None:
            raise DataError(
                f"{source}: neither the folder training nor data_semantics.zip is there; set data.source_dir to the "
                f"folder that holds {cls.manual}"
            )
        # Scene flow, often unpacked into the same folders, adds frames NAME_11, which have no labels.
        splits = {"train": pairs_in(training / "image_2", training / "semantic", "*_10.png")}
        testing = training.parent / "testing" / "image_2"
        if present(testing, folder=True):
            splits["test"] = pairs_in(testing, None, "*_10.png")
        return cls.plan_from_pairs(source, splits)


def _code(colours: np.ndarray) -> np.ndarray:
    """RGB [..., 3] as integers."""
    return colours.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
