"""Cityscapes, fine annotations: all files its two archives hold for an image."""

import json
import pathlib
import shutil
import zipfile

import numpy as np
from PIL import Image

FRAMES = {"train": ("aachen_000000_000019", "zurich_000121_000019"), "val": ("frankfurt_000000_000294",),
          "test": ("berlin_000000_000019",)}  # fmt: skip
SIZE = (64, 96)


def make(root: pathlib.Path, rng: np.random.Generator, archives: bool = False) -> dict[str, int]:
    for split, frames in FRAMES.items():
        for frame in frames:
            city = frame.split("_")[0]
            image = root / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(image)
            _annotations(root / "gtFine" / split / city / f"{frame}_gtFine", rng, split)
    if archives:
        for kind in ("leftImg8bit", "gtFine"):
            pack(root / f"{kind}_trainvaltest.zip", root, kind, texts=("README", "license.txt"))
    return {split: len(frames) for split, frames in FRAMES.items()}


def _annotations(stem: pathlib.Path, rng: np.random.Generator, split: str) -> None:
    ids = label_ids(rng, SIZE, top=34 if split != "test" else 4)
    stem.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(f"{stem}_labelIds.png")
    Image.fromarray(ids.astype(np.uint16) * 1000).save(f"{stem}_instanceIds.png")
    Image.fromarray(np.dstack([ids, ids, ids, np.full_like(ids, 255)])).save(f"{stem}_color.png")
    polygons = {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": []}
    pathlib.Path(f"{stem}_polygons.json").write_text(json.dumps(polygons))


def label_ids(rng: np.random.Generator, size: tuple[int, int], top: int = 34) -> np.ndarray:
    """Blocks of ids below `top`, all of them at least once, uint8."""
    blocks = rng.integers(0, top, (size[0] // 8 + 1, size[1] // 8 + 1), dtype=np.uint8)
    blocks.ravel()[:top] = rng.permutation(top)
    return blocks.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]


def pack(archive: pathlib.Path, root: pathlib.Path, folder: str, texts: tuple[str, ...] = ()) -> None:
    """Moves a folder below `root` into a zip file."""
    with zipfile.ZipFile(archive, "w") as zipped:
        for name in texts:
            zipped.writestr(name, name)
        for path in sorted((root / folder).rglob("*")):
            zipped.write(path, path.relative_to(root))
    shutil.rmtree(root / folder)
