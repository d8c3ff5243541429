"""COCO 2017 (80 classes of things and background) and COCO-Stuff (80 of things and 91 of stuff), on the same images.

Download into one folder, data.source_dir, and leave the archives packed or unpack them there:
  train2017.zip, val2017.zip       images, from http://images.cocodataset.org/zips/; either may be left out
  test2017.zip                     (optional, of coco) split `test`, whose labels are not public; from the same page
  annotations_trainval2017.zip     of coco, from http://images.cocodataset.org/annotations/
  stuffthingmaps_trainval2017.zip  of coco_stuff, named on https://github.com/nightrome/cocostuff

Expected folder: `SPLIT2017/NAME.jpg`, or `images/SPLIT2017`; `annotations/instances_SPLIT2017.json` for coco; for
coco_stuff the maps in `stuffthingmaps/SPLIT2017/NAME.png`, or `annotations/SPLIT2017`, or beside the images: the
archive of the maps holds folders `train2017` and `val2017`, as those of the images do. train 118287, val 5000, test
40670 images.

coco: class 0 is background, 1 to 80 are the categories by their ids (1 to 90, with gaps). Masks are painted from the
instances with pycocotools. Where instances overlap the smaller one is on top: what lies on or in another thing is
mostly smaller, and painted first it would be lost. Crowds (iscrowd) are void where no single instance is: their
outlines are coarse, and COCO's own evaluations pass over them too. Images without an instance are all background.

coco_stuff: a pixel of a map holds category id - 1 (0 to 181), 255 is unlabelled and void; the 11 ids that COCO has no
segmentation of are left out, which makes 171 classes.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pwcrf_jax.data.builder import Pair, Plan, SegmentationBuilder
from pwcrf_jax.data.label_guard import bad_value
from pwcrf_jax.data.readers.archives import locate
from pwcrf_jax.data.readers.files import DataError, open_file, present
from pwcrf_jax.data.readers.image_io import VOID

INSTANCES, MAPS = "annotations_trainval2017.zip", "stuffthingmaps_trainval2017.zip"

_NAMES = (  # of ids 1 to 182
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "street sign", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "hat", "backpack", "umbrella", "shoe", "eye glasses", "handbag", "tie",
    "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
    "surfboard", "tennis racket", "bottle", "plate", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana",
    "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "mirror", "dining table", "window", "desk", "toilet", "door", "tv", "laptop", "mouse",
    "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "blender", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush", "hair brush", "banner", "blanket", "branch",
    "bridge", "building-other", "bush", "cabinet", "cage", "cardboard", "carpet", "ceiling-other", "ceiling-tile",
    "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff", "dirt", "door-stuff", "fence",
    "floor-marble", "floor-other", "floor-stone", "floor-tile", "floor-wood", "flower", "fog", "food-other", "fruit",
    "furniture-other", "grass", "gravel", "ground-other", "hill", "house", "leaves", "light", "mat", "metal",
    "mirror-stuff", "moss", "mountain", "mud", "napkin", "net", "paper", "pavement", "pillow", "plant-other", "plastic",
    "platform", "playingfield", "railing", "railroad", "river", "road", "rock", "roof", "rug", "salad", "sand", "sea",
    "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs", "stone", "straw", "structural-other", "table",
    "tent", "textile-other", "towel", "tree", "vegetable", "wall-brick", "wall-concrete", "wall-other", "wall-panel",
    "wall-stone", "wall-tile", "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood",
)  # fmt: skip
_REMOVED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # ids without any segmentation
IDS = tuple(i for i in range(1, 183) if i not in _REMOVED)
"""Category ids of COCO-Stuff's 171 classes, in order; the first 80 are COCO's."""


class Coco(SegmentationBuilder):
    """Masks painted from the instances of COCO 2017."""

    name = "pwcrf_coco"
    class_names = ("background", *(_NAMES[i - 1] for i in IDS[:80]))
    palette = (
        (0, 0, 0),
        (220, 20, 60), (119, 11, 32), (0, 0, 142), (0, 0, 230), (106, 0, 228), (0, 60, 100), (0, 80, 100), (0, 0, 70),
        (0, 0, 192), (250, 170, 30), (100, 170, 30), (220, 220, 0), (175, 116, 175), (250, 0, 30), (165, 42, 42),
        (255, 77, 255), (0, 226, 252), (182, 182, 255), (0, 82, 0), (120, 166, 157), (110, 76, 0), (174, 57, 255),
        (199, 100, 0), (72, 0, 118), (255, 179, 240), (0, 125, 92), (209, 0, 151), (188, 208, 182), (0, 220, 176),
        (255, 99, 164), (92, 0, 73), (133, 129, 255), (78, 180, 255), (0, 228, 0), (174, 255, 243), (45, 89, 255),
        (134, 134, 103), (145, 148, 174), (255, 208, 186), (197, 226, 255), (171, 134, 1), (109, 63, 54),
        (207, 138, 255), (151, 0, 95), (9, 80, 61), (84, 105, 51), (74, 65, 105), (166, 196, 102), (208, 195, 210),
        (255, 109, 65), (0, 143, 149), (179, 0, 194), (209, 99, 106), (5, 121, 0), (227, 255, 205), (147, 186, 208),
        (153, 69, 1), (3, 95, 161), (163, 255, 0), (119, 0, 170), (0, 182, 199), (0, 165, 120), (183, 130, 88),
        (95, 32, 0), (130, 114, 135), (110, 129, 133), (166, 74, 118), (219, 142, 185), (79, 210, 114), (178, 90, 62),
        (65, 70, 15), (127, 167, 115), (59, 105, 106), (142, 108, 45), (196, 172, 0), (95, 54, 80), (128, 76, 255),
        (201, 57, 1), (246, 0, 122), (191, 162, 208),
    )  # fmt: skip
    split_sizes = {"train": 118_287, "val": 5000, "test": 40_670}
    manual = f"train2017.zip, val2017.zip, test2017.zip, {INSTANCES}"
    _truth: dict[Path, dict[str, "_Image"]] = {}  # of one json file, while it is read from

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """The splits whose images are there. The annotations are not read, only their file's size and time.

        Raises:
          DataError: no split, or one whose images or annotations are missing.
        """
        splits = {}
        for split, folder, images in _images(source, ("train", "val", "test"), data_dir):
            truth = None
            if split != "test":
                annotations = locate(source, ["annotations"], [INSTANCES], data_dir) or source / "annotations"
                truth = annotations / f"instances_{split}2017.json"
                if not present(truth):
                    raise DataError(
                        f"{truth}: is missing but {folder} has images of split {split!r}; unpack {INSTANCES} in "
                        f"{source}"
                    )
            splits[split] = [Pair(image.stem, image, truth, folder) for image in images]
        return cls.plan_from_pairs(source, splits)

    def _generate_examples(self, *split: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from super()._generate_examples(*split)
        self._truth = {}  # 2 GB for train

    def _label(self, mask: Path, image: Path) -> np.ndarray:
        if mask not in self._truth:
            self._truth = {mask: _read_instances(mask)}
        truth = self._truth[mask].get(image.name)
        if truth is None:
            raise DataError(f"{image}: {mask} does not list it; remove the image, or restore the file of annotations")
        return _paint(truth, mask)


class CocoStuff(SegmentationBuilder):
    """COCO-Stuff, all 164k images of COCO 2017 but test's."""

    name = "pwcrf_coco_stuff"
    class_names = tuple(_NAMES[i - 1] for i in IDS)
    declared_values = dict(enumerate(("unlabeled", *_NAMES)))  # in its labels.txt
    split_sizes = {"train": 118_287, "val": 5000}
    manual = f"train2017.zip, val2017.zip, {MAPS}"

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """The splits whose images are there.

        Raises:
          DataError: no split, or one whose images or maps are missing.
        """
        splits = {}
        for split, folder, images in _images(source, ("train", "val"), data_dir):
            year = f"{split}2017"
            maps = locate(source, [f"stuffthingmaps/{year}", f"annotations/{year}"], [], data_dir)
            if not maps:  # sought below a folder of its own, or the images' would be taken for what the archive holds
                maps = locate(source / "stuffthingmaps", [year], [str(source / MAPS)], data_dir)
            if not maps and present(images[0].with_suffix(".png")):
                maps = folder
            if not maps:
                raise DataError(
                    f"{source}: has images of split {split!r} but no maps of them; put {MAPS} there, or unpack it into "
                    f"{source / 'stuffthingmaps'}"
                )
            splits[split] = [Pair(image.stem, image, maps / f"{image.stem}.png", folder) for image in images]
        return cls.plan_from_pairs(source, splits)

    def _label(self, mask: Path, image: Path) -> np.ndarray:
        stored = super()._label(mask, image)
        label = _CLASS_OF_VALUE[stored]
        if (label < 0).any():
            meaning = "no class of COCO-Stuff (category id - 1) and not 255"
            raise bad_value(mask, stored, _CLASS_OF_VALUE >= 0, meaning, f"restore the map from {MAPS}")
        return label.astype(np.uint8)


_CLASS_OF_VALUE = np.full(256, -1, np.int16)
_CLASS_OF_VALUE[[i - 1 for i in IDS]] = np.arange(len(IDS))
_CLASS_OF_VALUE[255] = VOID


def _images(root: Path, splits: tuple[str, ...], data_dir: str) -> list[tuple[str, Path, list[Path]]]:
    """Split, folder and image files of each split that is there; DataError where there is none."""
    found = []
    for split in splits:
        year = f"{split}2017"
        if folder := locate(root, [year, f"images/{year}"], [f"{year}.zip"], data_dir):
            images = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(".jpg"))
            if not images:
                raise DataError(f"{folder}: holds no .jpg file; unpack {year}.zip there, or remove the folder")
            found.append((split, folder, images))
    if not found:
        raise DataError(
            f"{root}: no images of COCO found; expected {splits[0]}2017/NAME.jpg, images/{splits[0]}2017/NAME.jpg or "
            f"{splits[0]}2017.zip, and the same for {' or '.join(splits[1:])}; check data.source_dir"
        )
    return found


class _Instance(NamedTuple):
    id: int
    image: int  # the id of its image
    label: int
    crowd: bool
    outline: list[np.ndarray] | np.ndarray  # polygons x, y, x, y, ...; or lengths of runs, column by column


class _Image(NamedTuple):
    height: int
    width: int
    instances: list[_Instance]


def _read_instances(path: Path) -> dict[str, _Image]:
    """File name of each image -> its size and instances."""
    label_of_id = {i: label for label, i in enumerate(IDS[:80], 1)}

    unknown = []

    def compact(x: dict) -> Any:  # while it is parsed: as Python lists the polygons of train need twice the memory
        if "segmentation" not in x:
            return x
        outline, category = x["segmentation"], x["category_id"]
        if category not in label_of_id:
            unknown.append((x["id"], category))
        if isinstance(outline, dict):
            outline = np.array(outline["counts"], np.int64)
        else:
            outline = [np.array(polygon, np.float64) for polygon in outline]
        return _Instance(x["id"], x["image_id"], label_of_id.get(category, 0), bool(x["iscrowd"]), outline)

    try:
        with open_file(path) as file:
            content = json.load(file, object_hook=compact)
        _check_categories(path, [(x["id"], str(x["name"])) for x in content["categories"]])
        if unknown:
            raise DataError(
                f"{path}: annotation {unknown[0][0]} has category_id {unknown[0][1]}, which is none of COCO's 80; "
                f"restore the file from {INSTANCES}"
            )
        images = {x["id"]: (x["file_name"], _Image(x["height"], x["width"], [])) for x in content["images"]}
        for instance in content["annotations"]:
            images[instance.image][1].instances.append(instance)
    except DataError:
        raise
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}); check its permissions") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:  # no JSON, or not of this kind
        raise DataError(
            f"{path}: is not a file of COCO's instances ({type(e).__name__}: {e}); restore it from {INSTANCES}"
        ) from e
    return dict(images.values())


def _check_categories(path: Path, categories: list[tuple[Any, str]]) -> None:
    """DataError where a file has categories (id, name) of its own."""
    plain = lambda name: name.casefold().replace(" ", "").replace("_", "")
    coco = {i: plain(_NAMES[i - 1]) for i in IDS[:80]}
    own = [f"{i}: {name}" for i, name in categories if coco.get(i) != plain(name)]
    if own or not categories:
        raise DataError(
            f"{path}: its categories are not COCO's 80 but its own ({', '.join(own[:5]) or 'none'}"
            f"{', ...' * (len(own) > 5)}), which would become person, bicycle, car, ...; paint its masks as PNG files "
            "(annToMask of pycocotools), and use data.name=image_folder"
        )


def _paint(image: _Image, path: Path) -> np.ndarray:
    label = np.zeros((image.height, image.width), np.uint8)
    masks = [(_mask(x, image.height, image.width, path), x) for x in image.instances]
    for mask, x in sorted(masks, key=lambda pair: (not pair[1].crowd, -int(pair[0].sum()))):
        label[mask] = VOID if x.crowd else x.label
    return label


def _mask(x: _Instance, height: int, width: int, path: Path) -> np.ndarray:
    """The pixels of an instance, bool [height, width]."""
    where, remedy = f"{path}: annotation {x.id}", f"restore the file from {INSTANCES}"
    if isinstance(x.outline, np.ndarray):
        if x.outline.ndim != 1 or (x.outline < 0).any() or x.outline.sum() != height * width:
            raise DataError(f"{where}: its runs do not make up {width}x{height} pixels; {remedy}")
        return np.repeat(np.arange(len(x.outline)) % 2 == 1, x.outline).reshape(width, height).T
    try:
        from pycocotools import mask as coco
    except ImportError as e:
        raise DataError(f'COCO\'s polygons are painted with pycocotools: pip install -e ".[coco]" ({e})') from e
    for polygon in x.outline:  # of 4 numbers pycocotools makes a box
        if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 or not (np.abs(polygon) < 1e5).all():
            raise DataError(f"{where}: holds a polygon that is none; {remedy}")
    if not x.outline:
        return np.zeros((height, width), bool)
    return coco.decode(coco.merge(coco.frPyObjects(x.outline, height, width))).astype(bool)
