"""Pictures of images and labels, for TensorBoard and --dry-run. NumPy in, NumPy out."""

import numpy as np

from pwcrf_jax.evaluation.evaluators import Seen, inside

VOID_COLOUR = (255, 255, 255)
_BETWEEN = 128  # the grey between pictures
_GAP = 4  # pixels of it
_SIDE = 320  # pixels, of each picture, at most


def coloured(labels: np.ndarray, palette) -> np.ndarray:
    """uint8 [H, W] labels in the colours of their classes, (r, g, b) each, void in white: uint8 [H, W, 3]."""
    table = np.full((256, 3), VOID_COLOUR, np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def mosaic(rows) -> np.ndarray:
    """Rows of pictures, uint8 [H, W, 3] of any sizes, as one: uint8 [H', W', 3].

    Pictures of more than 320 pixels a side keep every second, third, ... pixel, so that colours stay what they are.
    """
    rows = [[x[:: _step(x), :: _step(x)] for x in row] for row in rows]
    height = max(x.shape[0] for row in rows for x in row) + _GAP
    width = max(x.shape[1] for row in rows for x in row) + _GAP
    out = np.full((height * len(rows) - _GAP, width * max(map(len, rows)) - _GAP, 3), _BETWEEN, np.uint8)
    for i, row in enumerate(rows):
        for j, x in enumerate(row):
            out[i * height : i * height + x.shape[0], j * width : j * width + x.shape[1]] = x
    return out


def _step(picture):
    return -(-max(picture.shape[:2]) // _SIDE)


def chosen(num_images: int, batch_size: int, count: int) -> list[int]:
    """`count` images of a split, or all: the first ones of batches spread evenly over it, which process 0 has."""
    count = min(count, num_images)
    for first in range(1, batch_size + 1):
        found = [i for i in range(num_images) if i % batch_size < first]
        if len(found) >= count:
            break
    return [found[i * len(found) // count] for i in range(count)]


class Panel:
    """An evaluator that keeps some images of a split: a row each, of image, truth, labels.

    indices: of `chosen`. batch_size: over all processes. rows: of the evaluation table, whose labels are shown.
    palette: (r, g, b) of each class.
    """

    def __init__(self, indices, batch_size, rows, palette):
        self.rows = tuple(rows)
        self._indices, self._batch_size, self._palette = indices, batch_size, palette
        self._seen = []

    def add(self, seen: Seen) -> None:
        here = [i % self._batch_size for i in self._indices if i // self._batch_size == seen.number]
        here = [i for i in here if i < len(seen.batch["id"])]  # others are another process's
        labels = [seen.batch["label"], *(seen.labels(row) for row in self.rows)] if here else []
        for i in here:
            box = seen.batch["valid_box"][i]
            shown = [coloured(inside(x[i], box), self._palette) for x in labels]
            self._seen.append([inside(seen.batch["image"][i], box), *shown])

    def results(self) -> tuple:
        """Nothing: `picture` shows them."""
        return ()

    def picture(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return mosaic(self._seen)
