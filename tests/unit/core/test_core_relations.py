"""Range boxes and edges against loops over all pairs of nodes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwcrf_jax.relations import (
    ABOVE_BELOW,
    RELATIONS,
    SURROUNDING,
    Relation,
    edge_list,
    offsets,
    validity_mask,
)
from reference import crf_oracle

MAPS = [(1, 1), (1, 2), (1, 9), (8, 1), (2, 2), (3, 3), (4, 6), (5, 7), (10, 11), (13, 10), (15, 16)]
BOXES = [
    SURROUNDING,
    ABOVE_BELOW,
    Relation("left", rows=(-0.1, 0.1), cols=(-0.5, 0.0)),
    Relation("wide", rows=(0.0, 0.0), cols=(-0.3, 0.7)),
    Relation("ring", rows=(0.2, 0.45), cols=(-0.45, -0.2)),
    Relation("cells", rows=(-2, 1), cols=(0, 3), unit="cells"),
    Relation("far", rows=(4, 6), cols=(-1, 0), unit="cells"),
    Relation("larger_than_map", rows=(-20, 20), cols=(-20, 20), unit="cells"),
]


def pairs(relation, height, width):
    """Edges of the implementation as a list of ((row, col), (row, col))."""
    p, q = edge_list(relation, height, width)
    cell = lambda i: (int(i) // width, int(i) % width)
    return [(cell(i), cell(j)) for i, j in zip(p, q, strict=True)]


@pytest.mark.parametrize("grid", [None, 5])
@pytest.mark.parametrize("relation", BOXES, ids=lambda r: r.name)
@pytest.mark.parametrize("size", MAPS, ids=str)
def test_edges_match_a_loop_over_all_pairs(relation, size, grid):
    relation = dataclasses.replace(relation, grid=grid)
    got = pairs(relation, *size)
    expected = crf_oracle.box_edges(relation.rows, relation.cols, relation.unit, *size, grid=grid)
    assert len(got) == len(set(got)) == len(expected)
    assert set(got) == expected
    box = offsets(relation, *size)
    assert validity_mask(box, *size).sum() == len(expected)


bound = st.integers(-9, 9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.tuples(bound, bound).map(sorted),
    cols=st.tuples(bound, bound).map(sorted),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    cells=st.booleans(),
    grid=st.sampled_from([None, None, 2, 3, 4, 5]),
)
def test_edges_match_a_loop_for_any_box(rows, cols, height, width, cells, grid):
    if not any((*rows, *cols)):
        cols = (-1, 1)
    if not cells:
        rows, cols = ([x / 10 for x in axis] for axis in (rows, cols))
    unit = "cells" if cells else "short_side"
    relation = Relation("any", tuple(rows), tuple(cols), unit, grid)
    got = pairs(relation, height, width)
    expected = crf_oracle.box_edges(rows, cols, unit, height, width, grid)
    assert len(got) == len(expected) and set(got) == expected


@pytest.mark.parametrize("size", [(20, 27), (40, 33), (9, 9), (48, 64)], ids=str)
def test_surrounding_on_a_5x5_grid_has_24_neighbours(size):
    box = offsets(dataclasses.replace(SURROUNDING, grid=5), *size)
    if min(size) >= 10:
        assert len(box) == 24
    assert {(-r, -c) for r, c in box.tolist()} == {tuple(o) for o in box.tolist()}
    assert len(box) <= len(offsets(SURROUNDING, *size))


def test_published_grids_on_a_20x27_map():
    rows = lambda relation: sorted(set(offsets(dataclasses.replace(relation, grid=5), 20, 27)[:, 0].tolist()))
    assert rows(SURROUNDING) == [-4, -2, 0, 2, 4]
    assert rows(ABOVE_BELOW)[0] == -8 and rows(ABOVE_BELOW)[-1] == -1
    assert len(offsets(SURROUNDING, 20, 27)) == 9 * 9 - 1
    assert len(offsets(ABOVE_BELOW, 20, 27)) == 8 * 9
    # 9 x 9 window sums over a 20 x 27 map, the node itself left out: closed form, no loop.
    along = lambda n: sum(n - abs(d) for d in range(-4, 5))
    assert len(edge_list(SURROUNDING, 20, 27).p) == along(20) * along(27) - 20 * 27


@pytest.mark.parametrize("size", [(2, 2), (7, 5), (12, 16)], ids=str)
def test_above_below_means_q_is_above_p(size):
    edges = pairs(ABOVE_BELOW, *size)
    assert edges
    assert all(q[0] < p[0] for p, q in edges)
    # The top row looks at nobody, the bottom row is seen by nobody.
    assert not any(p[0] == 0 for p, _ in edges) and not any(q[0] == size[0] - 1 for _, q in edges)


def test_surrounding_is_symmetric_and_above_below_is_not():
    surrounding, above = (set(pairs(r, 6, 7)) for r in (SURROUNDING, ABOVE_BELOW))
    assert {(q, p) for p, q in surrounding} == surrounding
    assert not {(q, p) for p, q in above} & above


@pytest.mark.parametrize(
    ("relation", "size", "count"),
    [(SURROUNDING, (1, 1), 0), (ABOVE_BELOW, (1, 9), 0), (SURROUNDING, (1, 9), 2), (ABOVE_BELOW, (9, 1), 1)],
)
def test_one_wide_maps(relation, size, count):
    box = offsets(relation, *size)
    assert box.shape == (count, 2) and box.dtype == np.int32
    assert len(edge_list(relation, *size).p) == count * (max(size) - 1)


def test_edges_are_ordered_by_offset_then_by_p():
    box = offsets(SURROUNDING, 5, 6)
    assert box.tolist() == sorted(box.tolist()) and [0, 0] not in box.tolist()
    p, q = edge_list(SURROUNDING, 5, 6)
    assert p.dtype == q.dtype == np.int32
    step = np.stack([q // 6 - p // 6, q % 6 - p % 6], -1).tolist()
    keys = [(box.tolist().index(s), i) for s, i in zip(step, p.tolist(), strict=True)]
    assert keys == sorted(keys)


def test_fractions_survive_floating_point():
    # 0.2 * 15 is 3.0000000000000004 and 0.29 * 100 is 28.999999999999996.
    assert offsets(SURROUNDING, 15, 15).max() == 3 and offsets(SURROUNDING, 15, 15).min() == -3
    assert offsets(Relation("r", (0.29, 0.29), (0, 0)), 100, 100).tolist() == [[29, 0]]


def test_registry_holds_the_published_relations():
    assert RELATIONS == {"surrounding": SURROUNDING, "above_below": ABOVE_BELOW}


def test_box_without_any_offset_gives_no_edges():
    # No whole number lies between 5.1 and 5.5.
    relation = Relation("gap", rows=(0.51, 0.55), cols=(-0.1, 0.1))
    for grid in (None, 5):
        assert offsets(dataclasses.replace(relation, grid=grid), 10, 10).shape == (0, 2)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(rows=(1, 0)), "lowest <= highest"),
        (dict(cols=(0.0, float("nan"))), "cols must be"),
        (dict(rows=(0.0, float("inf"))), "rows must be"),
        (dict(rows=(0, 1, 2)), "rows must be"),
        (dict(unit="pixels"), "unit must be one of"),
        (dict(unit="cells", rows=(-1.5, 1)), "whole numbers"),
        (dict(grid=1), "grid must be None or at least 2"),
        (dict(rows=(0, 0), cols=(0.0, 0.0)), "nothing but the node itself"),
    ],
    ids=lambda x: "_".join(x) if isinstance(x, dict) else "",
)
def test_refused_relations(fields, match):
    with pytest.raises(ValueError, match=match):
        Relation(**{**dict(name="bad", rows=(-1, 1), cols=(-1, 1)), **fields})


@pytest.mark.parametrize("size", [(0, 3), (3, 0)])
def test_refused_maps(size):
    with pytest.raises(ValueError, match="at least 1 x 1"):
        offsets(SURROUNDING, *size)
