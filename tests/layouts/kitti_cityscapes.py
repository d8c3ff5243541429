"""KITTI's semantic segmentation benchmark, as data_semantics.zip unpacks: training and testing at its root."""

import pathlib
import shutil
import zipfile

import numpy as np
from layouts.cityscapes import label_ids
from PIL import Image

# The config holds out a fifth of training.
SIZES = {"training": ((64, 96), (62, 90), (63, 94), (64, 96), (64, 96)), "testing": ((63, 94), (64, 96))}


def make(root: pathlib.Path, rng: np.random.Generator, archives: bool = False) -> dict[str, int]:
    for part, sizes in SIZES.items():
        for number, size in enumerate(sizes):
            name = f"{number:06d}_10.png"
            _save(root / part / "image_2" / name, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            if part == "training":
                ids = label_ids(rng, size)
                _save(root / part / "semantic" / name, ids)
                _save(root / part / "semantic_rgb" / name, np.dstack([ids] * 3))
                _save(root / part / "instance" / name, ids.astype(np.uint16) * 256)
    if archives:
        with zipfile.ZipFile(root / "data_semantics.zip", "w") as zipped:
            for path in sorted(root.glob("t*ing/**/*")):
                zipped.write(path, path.relative_to(root))
        for part in SIZES:
            shutil.rmtree(root / part)
    return {part.removesuffix("ing"): len(sizes) for part, sizes in SIZES.items()}


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
