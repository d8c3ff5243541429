"""A user's own folder: images in several formats and subfolders, masks of values or of colours, lists or none."""

import pathlib

import numpy as np
from PIL import Image

NAMES = ("road", "street lamp", "sky")
COLOURS = ((128, 64, 128), (153, 153, 153), (70, 130, 180))
VOID = (0, 0, 0)
IMAGES = {
    "train": ("a.jpg", "b.JPG", "inner city/c.png", "d.bmp", "e.webp", "f.tif"),
    "val": ("été.jpeg", "inner city/a.jpg"),
    "test": ("g.jpg",),
}


def make(root: pathlib.Path, rng: np.random.Generator, lists: bool = True, colours: bool = False) -> dict[str, int]:
    """With lists, split test has no masks; without, it is left out."""
    splits = {split: files for split, files in IMAGES.items() if lists or split != "test"}
    for split, files in splits.items():
        for i, file in enumerate(files):
            write_image(root / "images" / file, image(rng))
            if split != "test":
                mask = root / "masks" / file
                write_mask(mask.with_suffix(".png"), label(rng), colours, palette=bool(i % 2))
        if lists:
            # Ids and file names may both stand in a list.
            lines = [file if i % 2 else file.rsplit(".", 1)[0] for i, file in enumerate(files)]
            (root / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_classes(root, colours)
    return {split: len(files) for split, files in splits.items()}


def image(rng: np.random.Generator, size: tuple[int, int] = (24, 36)) -> np.ndarray:
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8).repeat(2, 0)[: size[0]]


def label(rng: np.random.Generator, size: tuple[int, int] = (24, 36)) -> np.ndarray:
    """Blocks of the classes, and void."""
    blocks = rng.integers(0, 3, (size[0] // 6, size[1] // 6), dtype=np.uint8)
    blocks.flat[:4] = 0, 1, 2, 255
    return blocks.repeat(6, 0).repeat(6, 1)


def write_image(path: pathlib.Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(pixels).save(path, **lossless)


def write_mask(path: pathlib.Path, values: np.ndarray, colours: bool = False, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.zeros((256, 3), np.uint8)
    table[:3], table[255] = COLOURS, VOID
    mask = Image.fromarray(values)
    if palette:
        mask.putpalette(table.tobytes())
    elif colours:
        mask = Image.fromarray(table[values])
    mask.save(path)


def write_classes(root: pathlib.Path, colours: bool = False) -> None:
    named = zip((*NAMES, "void"), (*COLOURS, VOID), strict=True)
    lines = [" ".join(map(str, (name, *colour))) for name, colour in named] if colours else NAMES
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("# of the tests\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
