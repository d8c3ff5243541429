"""PASCAL VOC 2012 with its test images and SBD, as their archives unpack."""

import pathlib
import shutil
import tarfile

import numpy as np
import scipy.io
import scipy.sparse
from PIL import Image

from pwcrf_jax.data.readers.image_io import voc_palette

TRAIN, VAL, TEST = ("2007_000032", "2008_000008", "2011_003271"), ("2007_000033", "2009_000074"), ("2008_000006",)
SBD_TRAIN = ("2008_000008", "2008_000002", "2009_000074")  # one of VOC's train, a new one, one of VOC's val
SBD_VAL = ("2008_000003", "2007_000033")  # a new one, one of VOC's val


def make(root: pathlib.Path, rng: np.random.Generator, archives: bool = False) -> dict[str, int]:
    _devkit(root / "VOCdevkit/VOC2012", rng)
    _test(root / "test/VOCdevkit/VOC2012", rng)
    _sbd(root / "benchmark_RELEASE/dataset", root / "VOCdevkit/VOC2012/JPEGImages", rng)
    if archives:
        pack(root / "VOCtrainval_11-May-2012.tar", root, ["VOCdevkit"])
        pack(root / "VOC2012test.tar", root / "test", ["VOCdevkit"])
        pack(root / "benchmark.tgz", root, ["benchmark_RELEASE"])
        shutil.rmtree(root / "VOCdevkit")
        shutil.rmtree(root / "benchmark_RELEASE")
    else:
        shutil.copytree(root / "test/VOCdevkit", root / "VOCdevkit", dirs_exist_ok=True)
    shutil.rmtree(root / "test")
    return {"train": 3, "val": 2, "trainval": 5, "test": 1, "train_aug": 5}


def pack(archive: pathlib.Path, folder: pathlib.Path, names: list[str]) -> None:
    with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as tar:
        for name in names:
            tar.add(folder / name, name)


def jpeg(path: pathlib.Path, rng: np.random.Generator, size: tuple[int, int] = (64, 96)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    small.resize(size[::-1], Image.Resampling.BILINEAR).save(path, quality=90)


def name_list(path: pathlib.Path, names: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def _devkit(root: pathlib.Path, rng: np.random.Generator) -> None:
    for name in {*TRAIN, *VAL, *SBD_TRAIN, *SBD_VAL}:
        jpeg(root / f"JPEGImages/{name}.jpg", rng)
    palette = np.array(voc_palette(256), np.uint8).ravel().tolist()
    for name in (*TRAIN, *VAL):
        blocks = rng.integers(0, 21, (8, 12), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        blocks[::8] = blocks[:, ::8] = 255
        for folder in ("SegmentationClass", "SegmentationObject"):
            mask = Image.fromarray(blocks)
            mask.putpalette(palette)
            (root / folder).mkdir(exist_ok=True)
            mask.save(root / folder / f"{name}.png")
    for split, names in (("train", TRAIN), ("val", VAL), ("trainval", (*TRAIN, *VAL))):
        name_list(root / f"ImageSets/Segmentation/{split}.txt", names)
        name_list(root / f"ImageSets/Main/{split}.txt", names)


def _test(root: pathlib.Path, rng: np.random.Generator) -> None:
    for name in TEST:
        jpeg(root / f"JPEGImages/{name}.jpg", rng)
    name_list(root / "ImageSets/Segmentation/test.txt", TEST)
    name_list(root / "ImageSets/Main/test.txt", TEST)


def _sbd(root: pathlib.Path, images: pathlib.Path, rng: np.random.Generator) -> None:
    for folder in ("img", "cls"):
        (root / folder).mkdir(parents=True)
    for name in {*SBD_TRAIN, *SBD_VAL}:
        shutil.copy(images / f"{name}.jpg", root / "img")
        label = rng.integers(0, 21, (8, 12), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        boundaries = np.empty((20, 1), object)
        for index in range(20):
            boundaries[index, 0] = scipy.sparse.csc_matrix((label == index + 1) & (rng.random(label.shape) < 0.1))
        truth = {
            "Boundaries": boundaries,
            "Segmentation": label,
            "CategoriesPresent": np.unique(label[label > 0])[:, None],
        }
        scipy.io.savemat(root / f"cls/{name}.mat", {"GTcls": truth}, do_compression=True)
    name_list(root / "train.txt", SBD_TRAIN)
    name_list(root / "val.txt", SBD_VAL)
