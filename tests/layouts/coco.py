"""COCO 2017: JPEG images, polygons and run lengths of instances; an image without any, crowds, one test image."""

import json
import pathlib
import zipfile

import numpy as np
from PIL import Image

from pwcrf_jax.data.sets.coco import IDS, Coco

SIZES = {
    "train": {9: (64, 96), 25: (96, 64), 30: (64, 96)},
    "val": {139: (64, 96), 285: (50, 70)},
    "test": {1: (64, 96)},
}
# Split, image, category, and the rectangles (top, left, bottom, right) of its parts, or of a crowd. The tie lies on the
# person and comes before it; the crowd's rectangle reaches over both.
INSTANCES = (
    ("train", 9, 32, [(20, 30, 30, 35)]),
    ("train", 9, 1, [(10, 10, 50, 60)]),
    ("train", 9, 90, [(0, 70, 5, 80), (8, 70, 12, 90)]),
    ("train", 9, 1, (25, 32, 64, 96)),
    ("train", 25, 13, [(0, 0, 96, 32)]),
    ("train", 25, 22, [(90, 20, 96, 64)]),
    ("val", 139, 90, [(1, 2, 3, 90)]),
    ("val", 285, 3, (0, 0, 50, 7)),
)
SUPERCATEGORIES = {1: "person", 13: "outdoor", 22: "animal"}


def make(root: pathlib.Path, rng: np.random.Generator, archives: bool = False) -> dict[str, int]:
    """Folders SPLIT2017 and annotations, or train2017.zip, val2017.zip, test2017.zip, annotations_trainval2017.zip."""
    write_images(root, rng, SIZES)
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(instances(split)))
        captions = [{"image_id": i, "id": i, "caption": "a test"} for i in SIZES[split]]
        content = {**instances(split), "annotations": captions}
        del content["categories"]
        (root / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))
    if archives:
        for split in SIZES:
            pack(root, f"{split}2017.zip", f"{split}2017")
        pack(root, "annotations_trainval2017.zip", "annotations")
    return {split: len(sizes) for split, sizes in SIZES.items()}


def write_images(root, rng, sizes):
    for split, images in sizes.items():
        (root / f"{split}2017").mkdir(parents=True)
        for number, size in images.items():
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / f"{split}2017" / f"{number:012d}.jpg", quality=95)


def instances(split):
    """The content of instances_SPLIT2017.json."""
    images = [
        {"license": 4, "file_name": f"{i:012d}.jpg", "coco_url": f"http://images.cocodataset.org/{split}2017/{i:012d}.jpg",
         "height": h, "width": w, "date_captured": "2013-11-14 17:02:52", "flickr_url": "", "id": i}
        for i, (h, w) in SIZES[split].items()
    ]  # fmt: skip
    annotations = []
    for number, (where, image, category, parts) in enumerate(INSTANCES, 1000):
        if where != split:
            continue
        crowd = isinstance(parts, tuple)
        boxes = np.array([parts] if crowd else parts)
        top, left, bottom, right = *boxes[:, :2].min(0), *boxes[:, 2:].max(0)
        area = int(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum())
        segmentation = _runs(SIZES[split][image], parts) if crowd else [_polygon(box) for box in parts]
        annotations.append({
            "segmentation": segmentation, "area": area, "iscrowd": int(crowd), "image_id": image,
            "bbox": [float(x) for x in (left, top, right - left, bottom - top)], "category_id": category, "id": number,
        })  # fmt: skip
    categories = [
        {"supercategory": SUPERCATEGORIES.get(i, "other"), "id": i, "name": Coco.class_names[IDS.index(i) + 1]}
        for i in range(1, 91)
        if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
    ]
    info = {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2017}
    licenses = [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}]
    return dict(info=info, licenses=licenses, images=images, annotations=annotations, categories=categories)


def _polygon(box):
    top, left, bottom, right = map(float, box)
    return [left, top, right, top, right, bottom, left, bottom]


def _runs(size, box):
    """Lengths of runs of 0 and 1 in turn, down the columns."""
    mask = np.zeros(size, bool)
    mask[box[0] : box[2], box[1] : box[3]] = True
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"counts": [0, *counts] if flat[0] else counts, "size": list(size)}


def pack(root, name, *folders, base=""):
    """Moves folders below root / base into a zip archive."""
    with zipfile.ZipFile(root / name, "a") as archive:
        for folder in folders:
            for path in sorted((root / base / folder).iterdir()):
                archive.write(path, f"{folder}/{path.name}")
                path.unlink()
            (root / base / folder).rmdir()
