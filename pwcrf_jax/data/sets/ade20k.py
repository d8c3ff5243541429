"""ADE20K scene parsing (SceneParse150), 150 classes, JPEG images of many sizes.

From http://sceneparsing.csail.mit.edu/: ADEChallengeData2016.zip, and for the test images release_test.zip. The
archives, or what they unpack to, lie in the source folder (ADEChallengeData2016 itself may be the source folder too):

    ADEChallengeData2016/images/{training,validation}/NAME.jpg
    ADEChallengeData2016/annotations/{training,validation}/NAME.png    0 other, 1..150 classes
    release_test/testing/NAME.jpg                                      optional

Splits: train 20210, val 2000, test 3352 (unlabelled). Labels 1..150 become 0..149; 0, "other objects", becomes void and
is neither trained on nor scored, as in the benchmark. The full ADE20K release has other files and is not read.
"""

import re
from pathlib import Path

import numpy as np

from pwcrf_jax.data.builder import Plan, SegmentationBuilder, pairs_in
from pwcrf_jax.data.readers.archives import locate
from pwcrf_jax.data.readers.classes import refuse_other_names
from pwcrf_jax.data.readers.files import DataError, present, read_lines


class Ade20k(SegmentationBuilder):
    """The 150-class benchmark; class names are the first of objectInfo150.txt's synonyms."""

    name = "pwcrf_ade20k"
    class_names = (
        "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass",
        "cabinet", "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair",
        "car", "water", "painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field", "armchair",
        "seat", "fence", "desk", "rock", "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box",
        "column", "signboard", "chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace",
        "refrigerator", "grandstand", "path", "stairs", "runway", "case", "pool table", "pillow",
        "screen door", "stairway", "river", "bridge", "bookcase", "blind", "coffee table", "toilet", "flower",
        "book", "hill", "bench", "countertop", "stove", "palm", "kitchen island", "computer", "swivel chair",
        "boat", "bar", "arcade machine", "hovel", "bus", "towel", "light", "truck", "tower", "chandelier",
        "awning", "streetlight", "booth", "television", "airplane", "dirt track", "apparel", "pole", "land",
        "bannister", "escalator", "ottoman", "bottle", "buffet", "poster", "stage", "van", "ship", "fountain",
        "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool", "barrel", "basket",
        "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank",
        "trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen", "blanket",
        "sculpture", "hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier", "crt screen",
        "plate", "monitor", "bulletin board", "shower", "radiator", "glass", "clock", "flag",
    )  # fmt: skip
    # Official: road and skyscraper share a colour.
    palette = (
        (120, 120, 120), (180, 120, 120), (6, 230, 230), (80, 50, 50), (4, 200, 3), (120, 120, 80),
        (140, 140, 140), (204, 5, 255), (230, 230, 230), (4, 250, 7), (224, 5, 255), (235, 255, 7),
        (150, 5, 61), (120, 120, 70), (8, 255, 51), (255, 6, 82), (143, 255, 140), (204, 255, 4),
        (255, 51, 7), (204, 70, 3), (0, 102, 200), (61, 230, 250), (255, 6, 51), (11, 102, 255), (255, 7, 71),
        (255, 9, 224), (9, 7, 230), (220, 220, 220), (255, 9, 92), (112, 9, 255), (8, 255, 214),
        (7, 255, 224), (255, 184, 6), (10, 255, 71), (255, 41, 10), (7, 255, 255), (224, 255, 8),
        (102, 8, 255), (255, 61, 6), (255, 194, 7), (255, 122, 8), (0, 255, 20), (255, 8, 41), (255, 5, 153),
        (6, 51, 255), (235, 12, 255), (160, 150, 20), (0, 163, 255), (140, 140, 140), (250, 10, 15),
        (20, 255, 0), (31, 255, 0), (255, 31, 0), (255, 224, 0), (153, 255, 0), (0, 0, 255), (255, 71, 0),
        (0, 235, 255), (0, 173, 255), (31, 0, 255), (11, 200, 200), (255, 82, 0), (0, 255, 245), (0, 61, 255),
        (0, 255, 112), (0, 255, 133), (255, 0, 0), (255, 163, 0), (255, 102, 0), (194, 255, 0), (0, 143, 255),
        (51, 255, 0), (0, 82, 255), (0, 255, 41), (0, 255, 173), (10, 0, 255), (173, 255, 0), (0, 255, 153),
        (255, 92, 0), (255, 0, 255), (255, 0, 245), (255, 0, 102), (255, 173, 0), (255, 0, 20),
        (255, 184, 184), (0, 31, 255), (0, 255, 61), (0, 71, 255), (255, 0, 204), (0, 255, 194), (0, 255, 82),
        (0, 10, 255), (0, 112, 255), (51, 0, 255), (0, 194, 255), (0, 122, 255), (0, 255, 163), (255, 153, 0),
        (0, 255, 10), (255, 112, 0), (143, 255, 0), (82, 0, 255), (163, 255, 0), (255, 235, 0), (8, 184, 170),
        (133, 0, 255), (0, 255, 92), (184, 0, 255), (255, 0, 31), (0, 184, 255), (0, 214, 255), (255, 0, 112),
        (92, 255, 0), (0, 224, 255), (112, 224, 255), (70, 184, 160), (163, 0, 255), (153, 0, 255),
        (71, 255, 0), (255, 0, 163), (255, 204, 0), (255, 0, 143), (0, 255, 235), (133, 255, 0),
        (255, 0, 235), (245, 0, 255), (255, 0, 122), (255, 245, 0), (10, 190, 212), (214, 255, 0),
        (0, 204, 255), (20, 0, 255), (255, 255, 0), (0, 153, 255), (0, 41, 255), (0, 255, 204), (41, 0, 255),
        (41, 255, 0), (173, 0, 255), (0, 245, 255), (71, 0, 255), (122, 0, 255), (0, 255, 184), (0, 92, 255),
        (184, 255, 0), (0, 133, 255), (255, 214, 0), (25, 194, 194), (102, 255, 0), (92, 0, 255),
    )  # fmt: skip
    split_sizes = {"train": 20210, "val": 2000, "test": 3352}
    manual = "ADEChallengeData2016.zip, for test release_test.zip, of http://sceneparsing.csail.mit.edu/"

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """train, val, and test where its images are there.

        Raises:
          DataError: training and validation images are not there, a folder without images, an image without its
            mask, or a damaged archive.
        """
        images = locate(source, ["ADEChallengeData2016/images", "images"], ["ADEChallengeData2016.zip"], data_dir)
        if images is None:
            raise DataError(
                f"{source}: neither the folder ADEChallengeData2016 nor ADEChallengeData2016.zip is there; download "
                "it from http://sceneparsing.csail.mit.edu/ or correct data.source_dir"
            )
        if present(info := images.parent / "objectInfo150.txt"):  # Idx, ..., Name, the last with synonyms
            rows = [line.split("\t") for line in read_lines(info)[1:] if line.strip()]
            names = [re.split("[,;]", row[-1])[0] for row in rows]
            refuse_other_names(info, names, cls.class_names, len(names) // 2 + 1)
        splits = {}
        for split, folder in (("train", "training"), ("val", "validation")):
            if present(images / folder, folder=True):
                splits[split] = pairs_in(images / folder, images.parent / "annotations" / folder, "*.jpg")
        if not splits:
            raise DataError(
                f"{images}: holds neither training nor validation; set data.source_dir to what "
                "ADEChallengeData2016.zip unpacks to (the full ADE20K release is another set)"
            )
        if testing := locate(source, ["release_test/testing"], ["release_test.zip"], data_dir):
            splits["test"] = pairs_in(testing, None, "*.jpg")
        return cls.plan_from_pairs(source, splits)

    def _label(self, mask: Path, image: Path) -> np.ndarray:
        label = super()._label(mask, image)
        if label.max() > len(self.class_names):
            raise DataError(
                f"{mask}: label value {label.max()} is neither a class (1..{len(self.class_names)}) nor other "
                "(0); restore the mask from ADEChallengeData2016.zip"
            )
        return label - np.uint8(1)  # in 8 bits 0 becomes 255
