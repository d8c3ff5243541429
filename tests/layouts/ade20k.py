"""ADE20K scene parsing: JPEG images (one of them grey), masks with 0 for other and 1..150 for the classes."""

import pathlib

import numpy as np
from layouts.cityscapes import pack
from PIL import Image

SIZES = {"training": ("train", ((64, 96), (96, 64), (50, 70))), "validation": ("val", ((64, 96), (40, 130)))}


def make(root: pathlib.Path, rng: np.random.Generator, archives: bool = False) -> dict[str, int]:
    data, release = root / "ADEChallengeData2016", root / "release_test"
    for folder, (prefix, sizes) in SIZES.items():
        for kind in ("images", "annotations"):
            (data / kind / folder).mkdir(parents=True)
        for number, size in enumerate(sizes, 1):
            name = f"ADE_{prefix}_{number:08d}"
            grey = (folder, number) == ("training", 2)
            _jpeg(data / "images" / folder / f"{name}.jpg", rng, size if grey else (*size, 3))
            label = rng.integers(0, 151, size, dtype=np.uint8)
            label.ravel()[:151] = rng.permutation(151)
            Image.fromarray(label).save(data / "annotations" / folder / f"{name}.png")
    (data / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1576\t11664\t1172\twall\n")
    (data / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    (release / "testing").mkdir(parents=True)
    for number in (1, 3489):  # numbers have gaps
        _jpeg(release / "testing" / f"ADE_test_{number:08d}.jpg", rng, (64, 96, 3))
    (release / "list.txt").write_text("ADE_test_00000001.jpg\nADE_test_00003489.jpg\n")
    (release / "readme.txt").write_text("test images\n")
    if archives:
        pack(root / "ADEChallengeData2016.zip", root, "ADEChallengeData2016")
        pack(root / "release_test.zip", root, "release_test")
    return {"train": 3, "val": 2, "test": 2}


def _jpeg(path: pathlib.Path, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path, quality=95)
