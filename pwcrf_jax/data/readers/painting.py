"""Outlines as pixels, as the tools that drew them make pixels of them.

labelme draws with PIL, the border of a shape being part of it. COCO (pycocotools), and CVAT through it, take the pixels
whose centres lie inside, on a grid of fifths of a pixel.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pwcrf_jax.data.readers.documents import brief, number
from pwcrf_jax.data.readers.files import DataError

MARGIN = 0.1
"""Share of an image's side by which points may lie outside of it: hands slip, an image that was resized shows more."""
_FIFTHS = 5
_NONE = np.zeros(0, np.int64)


class Canvas:
    """A mask that shapes are painted on, one upon the other.

    Args:
      size: (height, width).
      fill: what pixels are that nothing is painted on.
    """

    def __init__(self, size: tuple[int, int], fill: int):
        self.height, self.width = size
        self._image = Image.new("L", (self.width, self.height), fill)
        self._draw = ImageDraw.Draw(self._image)

    def array(self) -> np.ndarray:
        """uint8 [H, W]."""
        return np.array(self._image)

    def polygon(self, points: np.ndarray, value: int) -> None:
        """A polygon [N, 2] of x, y as labelme draws it."""
        self._draw.polygon(points.ravel().tolist(), fill=value, outline=value)

    def rectangle(self, points: np.ndarray, value: int) -> None:
        """A rectangle by two corners [2, 2], as labelme draws it."""
        self._draw.rectangle([*points.min(0).tolist(), *points.max(0).tolist()], fill=value, outline=value)

    def circle(self, points: np.ndarray, value: int) -> None:
        """A circle by its centre and a point of its border [2, 2], as labelme draws it."""
        (x, y), radius = points[0].tolist(), math.dist(*points.tolist())
        self._draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=value, outline=value)

    def coco_polygon(self, points: np.ndarray, value: int) -> None:
        """A polygon [N, 2] of x, y as COCO fills it."""
        found = coco_pixels(points, self.height, self.width)
        if found is not None:
            left, inside = found
            self.pixels(0, left, inside, value)

    def ellipse(self, centre: tuple[float, float], radii: tuple[float, float], angle: float, value: int) -> None:
        """The pixels whose centres lie in an ellipse of radii along x and y, turned by `angle` degrees clockwise."""
        reach = max(radii) + 1
        top, left = (max(0, math.floor(c - reach)) for c in reversed(centre))
        bottom, right = min(self.height, math.ceil(centre[1] + reach)), min(self.width, math.ceil(centre[0] + reach))
        if bottom <= top or right <= left or not min(radii) > 0:
            return
        y, x = np.mgrid[top:bottom, left:right] + 0.5
        x, y, turn = x - centre[0], y - centre[1], math.radians(angle)
        along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
        self.pixels(top, left, (along / radii[0]) ** 2 + (across / radii[1]) ** 2 <= 1, value)

    def pixels(self, top: int, left: int, inside: np.ndarray, value: int) -> None:
        """The pixels where `inside`, bool [h, w], is true; what lies outside of the mask is cut off."""
        self._image.paste(value, (left, top), Image.fromarray(inside.astype(np.uint8) * 255))


def coco_pixels(points: np.ndarray, height: int, width: int) -> tuple[int, np.ndarray] | None:
    """The pixels of a polygon as pycocotools has them.

    Corners are rounded to fifths of a pixel. Where the border passes the middle of a column, the inside begins or
    ends there: a pixel is inside where its centre is.

    Args:
      points: x, y of the corners, float [N, 2].

    Returns:
      The first column, and bool [height, columns]; None where the polygon has no pixel.
    """
    corners = np.trunc(_FIFTHS * points + 0.5).astype(np.int64).tolist()
    found = [_crossings(*a, *b) for a, b in zip(corners, corners[1:] + corners[:1], strict=True)]
    columns, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
    within = (columns >= 0) & (columns < width)
    columns = columns[within]
    if not columns.size:
        return None
    rows = np.ceil(np.clip((rows[within] + 0.5) / _FIFTHS - 0.5, 0, height)).astype(np.int64)
    left, right = int(columns.min()), int(columns.max()) + 1
    turns = np.bincount((columns - left) * height + rows, minlength=(right - left) * height + 1)
    inside = np.cumsum(turns[:-1], dtype=np.uint8) & 1
    return left, inside.reshape(right - left, height).T.astype(bool)


def _crossings(x0: int, y0: int, x1: int, y1: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns whose middle a border from (x0, y0) to (x1, y1), in fifths, passes, and the rows in fifths."""
    across, down = abs(x1 - x0), abs(y1 - y0)
    if (across >= down and x0 > x1) or (across < down and y0 > y1):
        x0, y0, x1, y1 = x1, y1, x0, y0
    middle = _FIFTHS // 2
    # Where no column's middle lies between, most edges of a drawn outline end here.
    if -(-(min(x0, x1) - middle) // _FIFTHS) * _FIFTHS + middle >= max(x0, x1):
        return _NONE, _NONE
    if across >= down:
        first = -(-(x0 - middle) // _FIFTHS)  # the first x = 5 column + 2 from x0 on
        columns = np.arange(first, (x1 - 1 - middle) // _FIFTHS + 1, dtype=np.int64)
        steps = _FIFTHS * columns + middle - x0
        slope = (y1 - y0) / across
        rows = [np.trunc(y0 + slope * (steps + k) + 0.5).astype(np.int64) for k in (0, 1)]
        return columns, np.minimum(*rows)
    x = np.trunc(x0 + (x1 - x0) / down * np.arange(down + 1) + 0.5).astype(np.int64)
    steps = np.flatnonzero(x[1:] != x[:-1])
    low = np.minimum(x[steps], x[steps + 1])
    passed = low % _FIFTHS == middle
    return low[passed] // _FIFTHS, y0 + steps[passed]


def runs(counts: Sequence[int], size: tuple[int, int], where: str) -> np.ndarray:
    """Runs of pixels, outside first, as bool [h, w]; they go along rows.

    Raises:
      DataError: they do not make up the size.
    """
    total = sum(counts)  # of Python's integers, which do not overflow
    if min(counts, default=0) < 0 or total != size[0] * size[1]:
        raise DataError(f"{where}: its runs make up {total} pixels, not {size[1]}x{size[0]}; export it again")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size)


def coco_counts(text: str, where: str) -> list[int]:
    """Runs from COCO's compressed string: six bits a character from "0" on, five of the number, the least first, and
    one that says that there are more; from the fourth on, less the run two before.

    Raises:
      DataError: a character that is none of these, or a run that is none.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise DataError(f"{where}: its compressed runs hold {brief(character)}, or a run too long; export it again")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        value -= (1 << shift) if bits & 16 else 0
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        if not 0 <= counts[-1] < 1 << 40:
            raise DataError(f"{where}: its compressed runs hold a run of {counts[-1]} pixels; export it again")
        value = shift = 0
    if shift:
        raise DataError(f"{where}: its compressed runs are cut off; export it again")
    return counts


def points_of(values: Sequence[Any], size: tuple[int, int], where: str, least: int = 3) -> np.ndarray:
    """Points as float [N, 2] of x, y.

    Args:
      values: pairs of numbers, as a tool wrote them.
      size: (height, width) of the image.
      least: of points.

    Raises:
      DataError: too few points, something else than two finite numbers, or a point outside of the image by more than
        `MARGIN` of its size.
    """
    if len(values) < least:
        raise DataError(f"{where}: has {len(values)} points, expected {least} or more; correct it, or remove the shape")
    for value in values:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise DataError(f"{where}: {brief(value)} is no point x, y; correct it, or export it again")
    found = np.array([[number(x, where, "coordinate") for x in value] for value in values], np.float64)
    limits = np.array([size[1], size[0]], np.float64)
    outside = ((found < -MARGIN * limits) | (found > (1 + MARGIN) * limits)).any(axis=1)
    if outside.any():
        x, y = found[outside][0]
        raise DataError(
            f"{where}: point ({x:g}, {y:g}) lies outside of its image of {size[1]}x{size[0]} pixels; correct it, or "
            "annotate the image in the size that it has"
        )
    return found
