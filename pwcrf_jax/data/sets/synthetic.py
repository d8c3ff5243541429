"""Synthetic scenes whose classes share their looks and differ only by context.

Sky and water are the same blue, boats and cars the same red blobs; what tells them apart is the strip of
hills between sky and water, and whether a blob lies on water or on road. All surfaces fill whole 16x16
cells, so a network that sees a single cell cannot do better than guess. The context-free ceiling (each
look is given its most frequent class) is 53.9 % mean IoU on the default validation split; context
allows 100 %. Tossing coins with the best odds instead of naming the most frequent class would reach
56.8 %, because mean IoU rewards naming a rare class now and then.
"""

import zlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from pwcrf_jax.data.builder import Plan, SegmentationBuilder, check_options, fingerprint
from pwcrf_jax.data.readers.image_io import VOID, DataError, encode_png

CLASS_NAMES = ("sky", "hills", "water", "road", "boat", "car")
SKY, HILLS, WATER, ROAD, BOAT, CAR = range(6)
CELL = 16
"""Side of a cell in pixels; class borders lie on cell borders."""

LOOKS = np.array([0, 1, 0, 2, 3, 3])
"""Class -> look (0 blue, 1 green and brown, 2 grey, 3 red): all that a single cell shows."""

IMAGE_SIZE = (192, 256)
_COLOURS = np.array([[90, 130, 180], [80, 120, 60], [125, 125, 125], [180, 70, 60]], np.float32)
_EARTH = np.array([120, 95, 60], np.float32)  # the second colour of hills


def generate_scene(
    seed: int, index: int, split: str = "train", image_size: tuple[int, int] = IMAGE_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Draws scene `index` of a split; the same arguments always give the same scene.

    Args:
      seed, index: not negative.
      split: any name; splits share no random numbers.
      image_size: (height, width), multiples of 16, at least 128 x 192.

    Returns:
      image uint8 [H, W, 3], label uint8 [H, W] (0..5; the 1-pixel rim of each blob is void, 255).

    Raises:
      DataError: image_size is not as above.
    """
    height, width = _check_size(image_size)
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    cells, blobs = _layout(rng, height // CELL, width // CELL)
    image = _paint(rng, cells)
    label = _enlarge(cells, CELL).astype(np.uint8)
    for top, left, rows, cols in blobs:
        y0, x0, y1, x1 = (n * CELL for n in (top, left, top + rows, left + cols))
        inner = label[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].copy()
        label[y0:y1, x0:x1] = VOID
        label[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = inner
    return image, label


def _layout(rng: np.random.Generator, rows: int, cols: int) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """Class per cell [rows, cols], and the blobs as (top, left, rows, cols)."""
    # The horizon varies over half the image, so that the row alone says little.
    horizon = int(rng.integers(rows // 4, 2 * rows // 3 + 1))
    ground = horizon + int(rng.integers(1, 3))
    shore = int(rng.integers(5, cols - 4))
    surfaces = [WATER, ROAD] if rng.random() < 0.5 else [ROAD, WATER]
    cells = np.full((rows, cols), SKY)
    cells[horizon:ground] = HILLS
    cells[ground:, :shore], cells[ground:, shore:] = surfaces
    blobs, taken = [], np.zeros((rows, cols), bool)
    for surface, first, last in zip(surfaces, (0, shore), (shore, cols), strict=True):
        for _ in range(int(rng.integers(1, 4))):
            # One cell of its own surface stays free to the left and right, so a blob is never cut off
            # from what tells its class.
            h, w = int(rng.integers(1, min(3, rows - ground) + 1)), int(rng.integers(1, 4))
            top = int(rng.integers(ground, rows - h + 1))
            left = int(rng.integers(first + 1, last - w))
            if taken[max(top - 1, 0) : top + h + 1, left - 1 : left + w + 1].any():
                continue
            taken[top : top + h, left : left + w] = True
            cells[top : top + h, left : left + w] = BOAT if surface == WATER else CAR
            blobs.append((top, left, h, w))
    return cells, blobs


def _paint(rng: np.random.Generator, cells: np.ndarray) -> np.ndarray:
    """Colours by look alone; noise and jitter do not know the class."""
    rows, cols = cells.shape
    shape = (rows * CELL, cols * CELL)
    looks = _enlarge(LOOKS[cells], CELL)
    image = _COLOURS[looks]
    patches = _enlarge(rng.random((rows * 4, cols * 4)) < 0.5, CELL // 4)
    image[(looks == LOOKS[HILLS]) & patches] = _EARTH
    image += _enlarge(rng.normal(0, 6, (rows, cols)), CELL)[..., None]
    image += rng.standard_normal((*shape, 3), np.float32) * 10
    image *= (rng.uniform(0.75, 1.25) * rng.uniform(0.93, 1.07, 3)).astype(np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _enlarge(cells: np.ndarray, factor: int) -> np.ndarray:
    return cells.repeat(factor, 0).repeat(factor, 1)


def context_free_ceiling(
    split: str = "val",
    num: int = 100,
    seed: int = 0,
    image_size: tuple[int, int] = IMAGE_SIZE,
    *,
    coin_flips: bool = False,
) -> float:
    """Mean IoU (0..1) of the best guess from the look of a single cell, counted over `num` scenes.

    Args:
      split, num, seed, image_size: which scenes, as in `generate_scene`.
      coin_flips: False: each look is given its most frequent class, which is the Bayes decision and what
        training approaches. True: of two classes with one look each is named with the best fixed odds
        (in expectation); a strict bound for anything that sees single cells.
    """
    counts = np.zeros(len(CLASS_NAMES) + 1, np.int64)
    for index in range(num):
        label = generate_scene(seed, index, split, image_size)[1]
        counts += np.bincount(np.minimum(label, len(CLASS_NAMES)).ravel(), minlength=len(counts))
    counts = counts[:-1]  # void is not scored
    odds = np.linspace(0, 1, 1001) if coin_flips else np.array([0.0, 1.0])
    total = 0.0
    for look in range(LOOKS.max() + 1):
        classes = counts[look == LOOKS]
        if len(classes) == 1:
            total += 1.0
        else:
            one, other = classes
            total += np.max(_expected_iou(one, other, odds) + _expected_iou(other, one, 1 - odds))
    return float(total / len(CLASS_NAMES))


def _expected_iou(own: int, other: int, named: np.ndarray) -> np.ndarray:
    """IoU of a class of `own` pixels when a share `named` of its and of `other`'s pixels is called so."""
    return named * own / (own + named * other)


def _check_size(image_size: Any) -> tuple[int, int]:
    height, width = image_size
    if height % CELL or width % CELL or height < 8 * CELL or width < 12 * CELL:
        raise DataError(
            f"image_size: {(height, width)} is not a (height, width) of multiples of {CELL} of at least "
            f"{(8 * CELL, 12 * CELL)}, such as {IMAGE_SIZE}"
        )
    return int(height), int(width)


class Synthetic(SegmentationBuilder):
    """The scenes as a data set with splits train and val."""

    name = "pwcrf_synthetic"
    VERSION = tfds.core.Version("1.0.0")  # raise it when the scenes change: it is part of the folder's name
    class_names = CLASS_NAMES

    @classmethod
    def plan(cls, source_dir: str = "", *, data_dir: str = "", **options: Any) -> Plan:
        """Splits train and val; options image_size, num_train, num_val, seed (`source_dir` is not used).

        Raises:
          DataError: an unknown option or a value out of range.
        """
        del source_dir, data_dir
        defaults = {"image_size": IMAGE_SIZE, "num_train": 400, "num_val": 100, "seed": 0}
        values = check_options("synthetic", options, defaults)
        size = _check_size(values["image_size"])
        for key, least in (("num_train", 1), ("num_val", 1), ("seed", 0)):
            if values[key] < least:
                raise DataError(f"{key}: {values[key]} is less than {least}")
        counts, seed = {"train": int(values["num_train"]), "val": int(values["num_val"])}, int(values["seed"])
        splits = {split: [(seed, i, split, size) for i in range(n)] for split, n in counts.items()}
        return Plan(splits, fingerprint(str(cls.VERSION), size, counts, seed))

    def _example(self, item: Any) -> tuple[str, bytes, np.ndarray]:
        image, label = generate_scene(*item)
        _, index, split, _ = item
        return f"{split}_{index:05d}", encode_png(image), label
