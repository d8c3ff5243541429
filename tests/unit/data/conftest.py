"""Tiny data trees in the real layouts."""

import numpy as np
import pytest
from PIL import Image


class Tree:
    """Writes images and masks below a root folder."""

    def __init__(self, root):
        self.root = root
        self.rng = np.random.default_rng(0)

    def image(self, path, size=(20, 30)):
        self._save(path, self.rng.integers(0, 256, (*size, 3), dtype=np.uint8), quality=95)

    def mask(self, path, label=None, size=(20, 30), palette=False):
        label = self.rng.integers(0, 11, size, dtype=np.uint8) if label is None else label
        self._save(path, label, palette=palette)
        return label

    def text(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def _save(self, path, array, palette=False, **options):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        im = Image.fromarray(array)
        if palette:
            im.putpalette(list(self.rng.integers(0, 256, 768)))
            assert im.mode == "P"
        im.save(path, **(options if path.suffix == ".jpg" else {}))


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "source")


@pytest.fixture
def camvid(tree):
    """JPEG layout with relative lists: 3 train, 2 val images."""
    for split, count in (("train", 3), ("val", 2)):
        lines = []
        for i in range(count):
            image, mask = f"{split}/img{i}.jpg", f"{split}annot/img{i}.png"
            tree.image(image)
            tree.mask(mask)
            lines.append(f"{image} {mask}\n")
        tree.text(f"{split}.txt", "".join(lines))
    return tree


@pytest.fixture
def voc(tree):
    """Devkit: 3 train, 1 val image, and a test list without masks."""
    for name in ("a", "b", "c", "d"):
        tree.image(f"JPEGImages/{name}.jpg")
        label = np.zeros((20, 30), np.uint8)
        label[:4], label[4:8] = 20, 255
        tree.mask(f"SegmentationClass/{name}.png", label, palette=True)
    tree.text("ImageSets/Segmentation/train.txt", "a\nb\nc\n")
    tree.text("ImageSets/Segmentation/val.txt", "d\n")
    tree.text("ImageSets/Segmentation/test.txt", "x\ny\n")
    return tree
