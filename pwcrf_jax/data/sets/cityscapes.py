"""Cityscapes street scenes with the fine annotations, 19 classes, images of 1024 x 2048.

From https://www.cityscapes-dataset.com/downloads/ (after registering): leftImg8bit_trainvaltest.zip and
gtFine_trainvaltest.zip. Both archives, or what they unpack to, lie in the source folder:

    leftImg8bit/{train,val,test}/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png
    gtFine/{train,val}/CITY/CITY_SEQUENCE_FRAME_gtFine_labelIds.png

Splits: train 2975, val 500, test 1525 (unlabelled: the archive's masks of test mark only the ego vehicle and borders).
The label ids 0..33 of *_labelIds.png become the 19 training classes or void; *_labelTrainIds.png is not needed. Licence
plates (id -1) are not drawn in the official masks; a mask made otherwise may hold 255 for them, which is void too.
"""

from pathlib import Path

import numpy as np

from pwcrf_jax.data.builder import Pair, Plan, SegmentationBuilder
from pwcrf_jax.data.readers.archives import locate
from pwcrf_jax.data.readers.files import DataError, present
from pwcrf_jax.data.readers.image_io import VOID

TRAIN_TO_LABEL_ID = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label id (of *_labelIds.png, and of result files for the benchmark) of each of the 19 training classes."""

_LABEL_TO_TRAIN_ID = np.full(256, VOID, np.uint8)
_LABEL_TO_TRAIN_ID[list(TRAIN_TO_LABEL_ID)] = range(len(TRAIN_TO_LABEL_ID))
_LABEL_IDS = (*range(34), VOID)


class Cityscapes(SegmentationBuilder):
    """Cityscapes as downloaded; labels are made from the label ids."""

    name = "pwcrf_cityscapes"
    class_names = (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    )  # fmt: skip
    palette = (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
        (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    )  # fmt: skip
    split_sizes = {"train": 2975, "val": 500, "test": 1525}
    manual = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of https://www.cityscapes-dataset.com/downloads/"

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """The splits whose images are there.

        Raises:
          DataError: images or labels are not there at all, a split without images, an image without its mask, or a
            damaged archive.
        """
        # The small archive first: a missing one is named before the 11 GB are unpacked.
        labels, images = (_folder(source, kind, data_dir) for kind in ("gtFine", "leftImg8bit"))
        splits = {}
        for split in cls.split_sizes:
            if present(images / split, folder=True):
                splits[split] = _pairs(images / split, None if split == "test" else labels / split)
        if not splits:
            raise DataError(f"{images}: holds none of the folders {', '.join(cls.split_sizes)}; unpack {cls.manual}")
        return cls.plan_from_pairs(source, splits)

    def _label(self, mask: Path, image: Path) -> np.ndarray:
        label = super()._label(mask, image)
        unknown = np.setdiff1d(label, _LABEL_IDS)
        if unknown.size:
            raise DataError(
                f"{mask}: label id {unknown[0]} is not one of Cityscapes' (0..33); restore the official "
                "*_labelIds.png masks"
            )
        return _LABEL_TO_TRAIN_ID[label]


def _folder(source: Path, kind: str, data_dir: str) -> Path:
    archive = f"{kind}_trainvaltest.zip"
    folder = locate(source, [kind], [archive], data_dir)
    if folder is None:
        raise DataError(
            f"{source}: neither the folder {kind} nor {archive} is there; download the archive from "
            "https://www.cityscapes-dataset.com/downloads/, and set data.source_dir to the folder that holds both "
            "leftImg8bit and gtFine (or their archives)"
        )
    return folder


def _pairs(images: Path, labels: Path | None) -> list[Pair]:
    end = "_leftImg8bit.png"
    pairs = []
    for image in sorted(images.glob(f"*/*{end}")):
        name = image.name.removesuffix(end)
        mask = labels and labels / image.parent.name / f"{name}_gtFine_labelIds.png"
        pairs.append(Pair(name, image, mask, images))
    if not pairs:
        raise DataError(f"{images}: no image CITY/*{end} is there; unpack the archive again, or remove the folder")
    return pairs
