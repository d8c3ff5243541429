"""COCO-Stuff: the images of COCO 2017 and grey PNG maps of category id - 1, with 255 for unlabelled."""

import pathlib

import numpy as np
from layouts import coco
from PIL import Image

SIZES = {split: coco.SIZES[split] for split in ("train", "val")}
REMOVED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
VALUES = [i - 1 for i in range(1, 183) if i not in REMOVED]


def make(root: pathlib.Path, rng: np.random.Generator, archives: bool = False) -> dict[str, int]:
    """Folders SPLIT2017 and stuffthingmaps/SPLIT2017, or SPLIT2017.zip and stuffthingmaps_trainval2017.zip."""
    coco.write_images(root, rng, SIZES)
    for split, images in SIZES.items():
        folder = root / "stuffthingmaps" / f"{split}2017"
        folder.mkdir(parents=True)
        for number, size in images.items():
            label = rng.choice(np.array([*VALUES, 255], np.uint8), size)
            label.ravel()[:172] = rng.permutation([*VALUES, 255])
            Image.fromarray(label).save(folder / f"{number:012d}.png")
    if archives:
        for split in SIZES:
            coco.pack(root, f"{split}2017.zip", f"{split}2017")
        pack_maps(root)
    return {split: len(images) for split, images in SIZES.items()}


def pack_maps(root):
    coco.pack(root, "stuffthingmaps_trainval2017.zip", "train2017", "val2017", base="stuffthingmaps")
    (root / "stuffthingmaps").rmdir()
