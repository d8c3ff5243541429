"""Spatial relations between the nodes of a grid, and the pairwise edges they make.

A node is a cell (row, column) of an H x W feature map. A relation is a *range box*: a rectangle of offsets
around a node. **p is the node whose box it is, q is a node inside the box**: edge (p, q) means

    q = p + (row offset, column offset),   rows grow downwards.

So in `ABOVE_BELOW`, whose row offsets are all negative, *q is above p*. Scores of an edge carry the label of p
on the second-to-last axis and the label of q on the last.

Everything here is static: NumPy arrays made from Python integers, so they are constants under `jit`.
Source: Lin et al., CVPR 2016, section 3 (relations and the 0.4a box); TPAMI 2017 (the 5x5 grid sampling).
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

UNITS = ("short_side", "cells")
"""Units of a box, names: of the short side of the map, or cells."""
_EPS = 1e-9  # 0.2 * 15 is 3.0000000000000004 in floating point, 0.29 * 100 is 28.999999999999996


@dataclasses.dataclass(frozen=True)
class Relation:
    """A range box, as data.

    Attributes:
      name: key of the relation in configs, parameters and tables.
      rows: (lowest, highest) row offset of q from p; negative is above.
      cols: (lowest, highest) column offset of q from p; negative is left.
      unit: "short_side": bounds are fractions of a = min(H, W); every integer offset inside the real interval
        belongs to the box; a bound other than zero reaches at least one cell, so that no map is too small; and a
        zero beside another bound is exclusive, so that (-0.4, 0) is the box directly above p, not p's own row.
        "cells": bounds are whole cells, whatever the size of the map.
      grid: None for all offsets of the box; an integer g for a regular g x g grid of offsets over the box (the
        journal version uses 5). A grid keeps both ends of the box; offsets that coincide count once.

    The offset (0, 0), a node joined to itself, is never part of a relation.

    Raises:
      ValueError: an unknown unit, bounds that are not (lowest, highest) or, in cells, not whole numbers, a grid below
        2, or a box that holds nothing but (0, 0).
    """

    name: str
    rows: tuple[float, float]
    cols: tuple[float, float]
    unit: str = "short_side"
    grid: int | None = None

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"relation {self.name!r}: unit must be one of {UNITS}, got {self.unit!r}")
        for axis, bounds in (("rows", self.rows), ("cols", self.cols)):
            if len(bounds) != 2 or not all(math.isfinite(x) for x in bounds) or bounds[0] > bounds[1]:
                raise ValueError(
                    f"relation {self.name!r}: {axis} must be (lowest, highest) with lowest <= highest, got {bounds}"
                )
            if self.unit == "cells" and any(x != int(x) for x in bounds):
                raise ValueError(f"relation {self.name!r}: {axis} in cells must be whole numbers, got {bounds}")
        if self.grid is not None and self.grid < 2:
            raise ValueError(f"relation {self.name!r}: grid must be None or at least 2, got {self.grid}")
        if not any((*self.rows, *self.cols)):
            raise ValueError(f"relation {self.name!r}: the box holds nothing but the node itself")


SURROUNDING = Relation("surrounding", rows=(-0.2, 0.2), cols=(-0.2, 0.2))
"""The box 0.4a x 0.4a centred on p, p itself left out (a = short side of the map)."""

ABOVE_BELOW = Relation("above_below", rows=(-0.4, 0.0), cols=(-0.2, 0.2))
"""The box 0.4a x 0.4a directly above p: q is above p."""

RELATIONS = {r.name: r for r in (SURROUNDING, ABOVE_BELOW)}
"""The relations of the paper by name."""


def _interval(bounds: tuple[float, float], unit: str, short_side: int) -> np.ndarray:
    """The integer offsets of one axis of the box."""
    lo, hi = bounds
    if unit == "cells":
        return np.arange(int(lo), int(hi) + 1)
    low, high = math.ceil(lo * short_side - _EPS), math.floor(hi * short_side + _EPS)
    # A box smaller than a cell would leave tiny maps without any edge: reach one cell outwards.
    if lo < 0:
        low = min(low, -1)
    if hi > 0:
        high = max(high, 1)
    if lo == 0 < hi:
        low = 1
    if lo < 0 == hi:
        high = -1
    return np.arange(low, high + 1)


def offsets(relation: Relation, height: int, width: int) -> np.ndarray:
    """Offsets q - p of a relation on an H x W map.

    A Pairwise-Net knows the distances that it was trained at: make its offsets once, on the map of the training images,
    and use them on maps of any size.

    Args:
      relation: the range box.
      height, width: size of the map in cells; Python integers.

    Returns:
      int32 [num_offsets, 2], (row, column), in row-major order, without (0, 0), and without offsets that leave the
      map from every node. num_offsets is 0 where the map is too small for any edge (a 1 x 1 map, or a map one cell
      high for a relation that only looks up).

    Raises:
      ValueError: height or width below 1.

    Examples:
      >>> left = pw.Relation("left", rows=(0, 0), cols=(-2, -1), unit="cells")
      >>> pw.offsets(left, 4, 5).tolist()
      [[0, -2], [0, -1]]
      >>> pw.offsets(pw.ABOVE_BELOW, 10, 10).shape  # 4 rows above p, 2 columns to either side of it
      (20, 2)
    """
    if height < 1 or width < 1:
        raise ValueError(f"expected a map of at least 1 x 1 cells, got {height} x {width}")
    short_side = min(height, width)
    rows = _interval(relation.rows, relation.unit, short_side)
    cols = _interval(relation.cols, relation.unit, short_side)
    if relation.grid is not None and rows.size and cols.size:
        rows, cols = (
            np.unique(np.rint(np.linspace(axis[0], axis[-1], relation.grid)).astype(int)) for axis in (rows, cols)
        )
    box = [(r, c) for r in rows for c in cols if (r, c) != (0, 0) and abs(r) < height and abs(c) < width]
    return np.array(box, np.int32).reshape(-1, 2)


def validity_mask(relation_offsets: np.ndarray, height: int, width: int) -> np.ndarray:
    """Which edges exist: where q = p + offset lies inside the map.

    Args:
      relation_offsets: int [num_offsets, 2], (row, column), from `offsets`.
      height, width: size of the map in cells; Python integers.

    Returns:
      bool [num_offsets, H, W], true where p = (row, column) has its q.
    """
    rows, cols = np.arange(height)[:, None], np.arange(width)[None, :]
    dr, dc = (np.asarray(relation_offsets)[:, i, None, None] for i in (0, 1))
    return (rows + dr >= 0) & (rows + dr < height) & (cols + dc >= 0) & (cols + dc < width)


class EdgeList(NamedTuple):
    """Directed edges of a graph: node indices p and q, int32 [num_edges] each; p's box holds q."""

    p: np.ndarray
    q: np.ndarray


def edge_list(relation: Relation, height: int, width: int) -> EdgeList:
    """All edges of a relation on an H x W map, nodes numbered row-major.

    Args:
      relation: the range box.
      height, width: size of the map in cells; Python integers.

    Returns:
      `EdgeList` of int32 [num_edges] each, ordered by offset, then by p: as in `pwcrf_jax.potentials.to_table`.

    Raises:
      ValueError: height or width below 1.

    Examples:
      >>> below = pw.Relation("below", rows=(1, 1), cols=(0, 0), unit="cells")
      >>> edges = pw.edge_list(below, 2, 3)  # nodes 0 1 2 above nodes 3 4 5
      >>> list(zip(edges.p.tolist(), edges.q.tolist()))
      [(0, 3), (1, 4), (2, 5)]
    """
    box = offsets(relation, height, width)
    mask = validity_mask(box, height, width)
    which, row, col = np.nonzero(mask)
    p = row * width + col
    q = (row + box[which, 0]) * width + col + box[which, 1]
    return EdgeList(p.astype(np.int32), q.astype(np.int32))
