"""KITTI labelled by Ros et al.: masks of RGB colours, black for void."""

import pathlib

import numpy as np
from layouts.cityscapes import pack
from PIL import Image

FRAMES = {"Training_00": ("000050", "000143"), "Validation_07": ("000172",)}
COLOURS = {  # in the order of the authors' list of classes
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "road": (128, 64, 128),
    "sidewalk": (0, 0, 192),
    "fence": (64, 64, 128),
    "vegetation": (128, 128, 0),
    "pole": (192, 192, 128),
    "car": (64, 0, 128),
    "sign": (192, 128, 128),
    "pedestrian": (64, 64, 0),
    "cyclist": (0, 128, 192),
}


def make(root: pathlib.Path, rng: np.random.Generator, archives: bool = False) -> dict[str, int]:
    colours = np.array([*COLOURS.values(), (0, 0, 0)], np.uint8)
    for folder, frames in FRAMES.items():
        for kind in ("RGB", "GT"):
            (root / "KITTI_SEMANTIC" / folder / kind).mkdir(parents=True)
        size = (62, 102) if folder == "Validation_07" else (64, 96)  # sequences differ
        for frame in frames:
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / "KITTI_SEMANTIC" / folder / "RGB" / f"{frame}.png")
            mask = colours[rng.integers(0, len(colours), size)]
            Image.fromarray(mask).save(root / "KITTI_SEMANTIC" / folder / "GT" / f"{frame}.png")
    if archives:
        pack(root / "KITTI_SEMANTIC.zip", root, "KITTI_SEMANTIC")
    return {"train": 2, "val": 1}
