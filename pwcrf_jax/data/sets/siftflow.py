"""SIFT Flow (LabelMe outdoor) scenes, 33 classes, all images 256 x 256: 2488 train, 200 test.

Download SiftFlowDataset.zip (140 MB) of http://www.cs.unc.edu/~jtighe/Papers/ECCV10/ ("Sift Flow Dataset", "Full
Dataset"). `data.source_dir` is the folder with the archive, or the one it was unpacked in, which then holds (there or
in its SiftFlowDataset)

    Images/spatial_envelope_256x256_static_8outdoorcategories/NAME.jpg
    SemanticLabels/spatial_envelope_256x256_static_8outdoorcategories/NAME.mat
    TestSet1.txt

A label file's variable `S` has 1..33 for the classes, which become 0..32, and 0 where nothing is labelled, which
becomes 255. Images that TestSet1.txt does not name are split train. Two of them, highway_bost181 and street_urb506,
were never annotated: they count among the 2488, and their records are void all over. GeoLabels are not read. No image
of test shows a cow, a desert or the moon.
"""

from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from pwcrf_jax.data.builder import Pair, Plan, SegmentationBuilder
from pwcrf_jax.data.readers.archives import locate, read_mat
from pwcrf_jax.data.readers.classes import refuse_other_names
from pwcrf_jax.data.readers.files import DataError, read_lines
from pwcrf_jax.data.readers.image_io import VOID

SCENES = "spatial_envelope_256x256_static_8outdoorcategories"
UNANNOTATED = ("highway_bost181", "street_urb506")


class SiftFlow(SegmentationBuilder):
    """The semantic labels of SIFT Flow, in the layout of SiftFlowDataset.zip."""

    name = "pwcrf_siftflow"
    class_names = (
        "awning", "balcony", "bird", "boat", "bridge", "building", "bus", "car", "cow", "crosswalk", "desert", "door",
        "fence", "field", "grass", "moon", "mountain", "person", "plant", "pole", "river", "road", "rock", "sand",
        "sea", "sidewalk", "sign", "sky", "staircase", "streetlight", "sun", "tree", "window",
    )  # fmt: skip
    split_sizes = {"train": 2488, "test": 200}
    _names_seen = False  # of the first label file, for all
    manual = "SiftFlowDataset.zip of http://www.cs.unc.edu/~jtighe/Papers/ECCV10/"

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """Splits test, as TestSet1.txt lists it, and train, all other images.

        Raises:
          DataError: neither the archive nor its folders are there, no image is left for train, or a file is missing.
        """
        labels = locate(source, ["SiftFlowDataset/SemanticLabels", "SemanticLabels"], ["SiftFlowDataset.zip"], data_dir)
        if labels is None:
            raise DataError(
                f"{source}: no SIFT Flow data set found; expected SiftFlowDataset.zip, or what it holds: Images, "
                f"SemanticLabels and TestSet1.txt; check data.source_dir, or download {cls.manual}"
            )
        images = labels.parent / "Images" / SCENES
        test_list = labels.parent / "TestSet1.txt"
        test = _listed(test_list)
        train = sorted({path.stem for path in images.glob("[!.]*.jpg")} - set(test))
        if not train:
            raise DataError(
                f"{images}: holds no image for split 'train', no NAME.jpg that {test_list} does not name; "
                f"restore the folder from {cls.manual}"
            )

        def pairs(names: list[str], listed_in: Path) -> list[Pair]:
            mask = lambda name: None if name in UNANNOTATED else labels / SCENES / f"{name}.mat"
            return [Pair(name, images / f"{name}.jpg", mask(name), listed_in) for name in names]

        return cls.plan_from_pairs(source, {"train": pairs(train, images), "test": pairs(test, test_list)})

    def _label(self, mask: Path, image: Path) -> np.ndarray:
        (values,) = read_mat(mask, "S")
        label = relabel(values, [VOID, *range(len(self.class_names))], mask)
        if not self._names_seen:
            self._names_seen = True
            try:
                (names,) = read_mat(mask, "names")
            except DataError:  # it has none
                return label
            names = list(map(str, np.ravel(names)))
            refuse_other_names(f"{mask}: names", names, self.class_names, len(self.class_names) // 2)
        return label


def relabel(values: np.ndarray, table: list[int], where: Any) -> np.ndarray:
    """The classes of label numbers read from a MATLAB file.

    Args:
      values: whole numbers of any dtype, [H, W].
      table: class index, or 255 for void, of each number.
      where: what an error message calls the labels.

    Returns:
      uint8 [H, W].

    Raises:
      DataError: no matrix of numbers, or a number that is not in the table.
    """
    if np.ndim(values) != 2 or np.asarray(values).dtype.kind not in "uif":
        raise DataError(f"{where}: the labels are no matrix of numbers (shape {np.shape(values)}); restore the file")
    numbers = values.astype(np.int64)
    wrong = (numbers != values) | (numbers < 0) | (numbers >= len(table))
    if wrong.any():
        raise DataError(
            f"{where}: label value {values[wrong][0]} is neither a class (1..{len(table) - 1}) nor unlabelled (0); "
            "restore the file from the original data"
        )
    return np.array(table, np.uint8)[numbers]


def _listed(path: Path) -> list[str]:
    """Names in TestSet1.txt, whose lines are `FOLDER\\NAME.jpg`."""
    names = [PureWindowsPath(line.strip()).stem for line in read_lines(path) if line.strip()]
    if not names:
        raise DataError(f"{path}: the list is empty, split 'test' has no images; restore it from {SiftFlow.manual}")
    return names
