"""Images of any size: the tiles the networks see, their potentials blended on one grid, marginals read at pixels.

An image that fits the evaluation frame is padded to it, as in evaluation. A larger one goes through the networks in
overlapping tiles. What they say of a cell (unary scores and, of each relation, the first layer's parts of both ends,
which are linear in the features) is averaged over the tiles that see it, and mean field then runs once, over the whole
grid. Tiles lie so that their cells, at every scale of the network, are cells of the whole image: where all tiles saw
enough around a cell, the outcome is that of the networks on the whole image.
"""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from pwcrf_jax.nets import grid_size
from pwcrf_jax.pixels import Taps
from pwcrf_jax.pixels import taps as taps_at

SHARPNESS = 4  # of the weights: cells near the border of a tile, which saw little around them, should count little


class Layout(NamedTuple):
    """Where the tiles of an image lie; sizes are (height, width).

    size: of the image, pixels. canvas: the image padded at bottom and right. grid: cells of the canvas.
    tile, tile_grid: pixels and cells of a tile. starts: rows and columns, in pixels, at which tiles begin.
    """

    size: tuple[int, int]
    canvas: tuple[int, int]
    grid: tuple[int, int]
    tile: tuple[int, int]
    tile_grid: tuple[int, int]
    starts: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def corners(self) -> list[tuple[int, int]]:
        """(row, column) of each tile's first pixel."""
        return list(itertools.product(*self.starts))

    def cells(self, corner) -> tuple[slice, slice]:
        """The cells of the grid that a tile covers."""
        first = (at * cells // pixels for at, cells, pixels in zip(corner, self.grid, self.canvas, strict=True))
        rows, cols = (slice(at, at + n) for at, n in zip(first, self.tile_grid, strict=True))
        return rows, cols

    def weights(self, corner) -> np.ndarray:
        """Weight of each cell of a tile, float32 [h, w], positive; falls towards sides that other tiles lie beyond."""
        axes = zip(corner, self.tile, self.canvas, self.tile_grid, strict=True)
        return np.outer(*(_ramp(at > 0, at + tile < whole, cells) for at, tile, whole, cells in axes))


def _ramp(before, after, cells):
    position = (np.arange(cells, dtype=np.float32) + 0.5) / cells
    distance = np.ones(cells, np.float32)
    if before:
        distance = np.minimum(distance, position)
    if after:
        distance = np.minimum(distance, 1 - position)
    return distance**SHARPNESS


def alignment(scales: Sequence[float], stride: int) -> int:
    """The least number of pixels by which a tile can be moved so that the cells of all scales fall on one another."""
    return math.lcm(*((stride / Fraction(scale).limit_denominator(1000)).numerator for scale in scales))


def layout(
    size: Sequence[int],
    frame: Sequence[int],
    tile: Sequence[int],
    overlap: float,
    scales: Sequence[float],
    *,
    stride: int,
) -> Layout:
    """Tiles for an image.

    size: of the image, (height, width) as all sizes.
    frame: what an image is padded to that fits into it; it is then the only tile.
    tile: at most, of larger images, rounded up to `alignment`. Where the image is smaller than that, so is its tile, in
      steps of a quarter of the frame, so that images of many sizes share few compiled programs.
    overlap: of neighbouring tiles, at least, as a share of the tile.
    scales, stride: of the network.

    Raises:
      ValueError: the tile is too small to be moved; with the size that would do.
    """
    if all(n <= most for n, most in zip(size, frame, strict=True)):
        return whole_frame(size, frame, grid_size(_pair(frame), tuple(scales), stride))
    step = alignment(scales, stride)
    up = lambda n: -(-n // step) * step
    tiles, canvas, starts = [], [], []
    for n, most, large in zip(size, frame, tile, strict=True):
        quarter = up(-(-most // 4))
        side = up(most) if n <= most else min(up(large), -(-n // quarter) * quarter)
        whole = max(side, up(n))
        move = int(side * (1 - overlap)) // step * step
        if whole > side and not move:
            raise ValueError(
                f"tiles of {side} pixels with an overlap of {overlap:g} cannot be moved, as cells fall on one another "
                f"every {step} pixels; take tiles of at least {up(math.ceil(step / (1 - overlap)))}, or less overlap"
            )
        last = (whole - side) // step
        count = 1 + -(-(whole - side) // move) if last else 1
        tiles.append(side)
        canvas.append(whole)
        starts.append(tuple(round(i * last / max(count - 1, 1)) * step for i in range(count)))
    of = lambda sides: (_pair(sides), grid_size(_pair(sides), tuple(scales), stride))
    return Layout(_pair(size), *of(canvas), *of(tiles), (starts[0], starts[1]))


def whole_frame(size: Sequence[int], frame: Sequence[int], grid: Sequence[int]) -> Layout:
    """One tile, the frame, whose cells are `grid`; the image lies in its upper left corner."""
    return Layout(_pair(size), _pair(frame), _pair(grid), _pair(frame), _pair(grid), ((0,), (0,)))


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    first, second = numbers
    return int(first), int(second)


def taps(pixels: np.ndarray, num_pixels: int, layout: Layout, axis: int, mirrored: bool = False) -> Taps:
    """Where pixels of an image of `num_pixels` rows or columns lie on a grid that saw it scaled to layout.size.

    pixels: integers along `axis`, 0 rows, 1 columns. mirrored: the grid saw the image mirrored along the axis.
    Returns `pwcrf_jax.pixels.taps` of the pixels.
    """
    pixels = np.asarray(pixels)
    pixels = num_pixels - 1 - pixels if mirrored else pixels
    scaled = (pixels + 0.5) * (layout.size[axis] / num_pixels)
    position = scaled * (layout.grid[axis] / layout.canvas[axis]) - 0.5
    return taps_at(position, layout.grid[axis])
