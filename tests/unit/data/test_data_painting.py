"""Outlines become the pixels that the tools make of them, and documents of any content end in one line."""

import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pwcrf_jax.data import DataError
from pwcrf_jax.data.readers.documents import number, read_json, read_xml, text, whole
from pwcrf_jax.data.readers.painting import Canvas, coco_counts, points_of, runs


def painted(size, draw):
    canvas = Canvas(size, 0)
    draw(canvas)
    return canvas.array()


@pytest.mark.parametrize("seed", range(4))
def test_coco_polygons_are_those_of_pycocotools(seed):
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(seed)
    for i in range(60):
        height, width, count = int(rng.integers(1, 40)), int(rng.integers(1, 40)), rng.integers(3, 9)
        points = rng.uniform(-0.2, 1.2, (count, 2)) * [width, height]
        points = points if i % 3 == 0 else np.round(points * (i % 3)) / (i % 3)  # wholes and halves, too
        theirs = coco.decode(coco.frPyObjects([points.ravel().tolist()], height, width))[..., 0]
        ours = painted((height, width), lambda canvas, points=points: canvas.coco_polygon(points, 1))
        np.testing.assert_array_equal(ours, theirs)


def test_coco_counts_are_those_of_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for size in ((1, 1), (7, 5), (300, 200)):
        inside = rng.random(size).repeat(3, 0)[: size[0]] > 0.5
        packed = coco.encode(np.asfortranarray(inside.astype(np.uint8)))["counts"].decode()
        np.testing.assert_array_equal(runs(coco_counts(packed, "x"), size[::-1], "x").T, inside)


def test_a_polygon_has_the_pixels_whose_centres_lie_inside():
    square = np.array([(1, 2), (4, 2), (4, 5), (1, 5)], float)
    expected = np.zeros((8, 9), np.uint8)
    expected[2:5, 1:4] = 3
    np.testing.assert_array_equal(painted((8, 9), lambda c: c.coco_polygon(square, 3)), expected)
    expected[2:6, 1:5] = 3  # labelme's border belongs to it
    np.testing.assert_array_equal(painted((8, 9), lambda c: c.polygon(square, 3)), expected)
    np.testing.assert_array_equal(painted((8, 9), lambda c: c.rectangle(square[[2, 0]], 3)), expected)
    assert not painted((8, 9), lambda c: c.coco_polygon(square + 20, 3)).any()


@pytest.mark.parametrize("seed", range(3))
def test_labelme_shapes_are_those_of_pil(seed):
    """labelme draws each shape into a mask of its own, and puts them one upon the other."""
    rng = np.random.default_rng(seed)
    expected, canvas = np.zeros((30, 40), np.uint8), Canvas((30, 40), 0)
    for value in range(1, 6):
        points = rng.uniform(0, 1, (5, 2)) * [40, 30]
        own = Image.new("1", (40, 30))
        ImageDraw.Draw(own).polygon([tuple(p) for p in points.tolist()], outline=1, fill=1)
        expected[np.asarray(own)] = value
        canvas.polygon(points, value)
    np.testing.assert_array_equal(canvas.array(), expected)


def test_circles_and_ellipses():
    circle = painted((20, 20), lambda c: c.circle(np.array([(10.0, 10.0), (13.0, 14.0)]), 1))
    own = Image.new("L", (20, 20))
    ImageDraw.Draw(own).ellipse([5, 5, 15, 15], outline=1, fill=1)
    np.testing.assert_array_equal(circle, own)
    upright = painted((20, 20), lambda c: c.ellipse((10, 8), (6, 3), 0, 1))
    assert upright.sum() == pytest.approx(np.pi * 18, abs=4) and upright[8, 4:16].all() and not upright[:, :4].any()
    turned = painted((20, 20), lambda c: c.ellipse((8, 10), (6, 3), 90, 1))
    np.testing.assert_array_equal(turned, upright.T)
    assert not painted((5, 5), lambda c: c.ellipse((40, 40), (2, 2), 0, 1)).any()


@pytest.mark.parametrize(
    ("counts", "says"),
    [([1, 2], "3 pixels, not 3x2"), ([7, -1], "6 pixels"), ([], "0 pixels"),
     ([2**62, 2**62, 2**62], "pixels, not 3x2")],
)  # fmt: skip
def test_runs_of_another_size_are_refused(counts, says):
    with pytest.raises(DataError, match=rf"^x: its runs make up .*{says}.*export it again$"):
        runs(counts, (2, 3), "x")


@pytest.mark.parametrize("packed", ["é", "0`", "0oooooooooooooooooooo", "O", "/"])
def test_spoiled_compressed_runs_are_refused(packed):
    with pytest.raises(DataError, match="^x: its compressed runs"):
        coco_counts(packed, "x")


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ([[0, 0], [1, 1]], "has 2 points, expected 3"),
        ([[0, 0], [1, 1], [1]], r"\(list of 1\) is no point"),
        ([[0, 0], [1, 1], 7], "7 is no point"),
        ([[0, 0], [1, 1], [1, float("nan")]], "coordinate nan is no finite number"),
        ([[0, 0], [1, 1], ["1", "x"]], "coordinate 'x' is no finite number"),
        ([[0, 0], [1, 1], [True, 1]], "coordinate True is no finite number"),
        ([[0, 0], [1, 1], [1, 10**400]], "coordinate .*is no finite number"),
        ([[0, 0], [1, 1], [12, 1]], r"point \(12, 1\) lies outside of its image of 10x8 pixels"),
        ([[0, 0], [1, 1], [1, -1]], r"point \(1, -1\) lies outside"),
    ],
)
def test_points_that_are_none_are_refused(points, says):
    with pytest.raises(DataError, match=rf"^x: {says}") as e:
        points_of(points, (8, 10), "x")
    assert "\n" not in str(e.value)
    assert points_of([[-1, 0], [11, 8.8], [3, 4]], (8, 10), "x").shape == (3, 2)


# Documents ----------------------------------------------------------------------------------------------


BOMB = '<!DOCTYPE l [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><annotations>&b;</annotations>'
FILE = '<!DOCTYPE l [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotations>&a;</annotations>'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (BOMB, r"has a DTD"),
        (FILE, r"has a DTD"),
        ("<a>" * 1000, r"is nested deeper than 64"),
        ("<a>" * 9, r"is not XML \(no element found"),
        ("", r"is not XML"),
        ("<a>&b;</a>", r"is not XML \(undefined entity"),
        ('<?xml version="1.0" encoding="no-such"?><a/>', r"is not XML"),
        ("<a b='1' b='2'/>", r"is not XML \(duplicate attribute"),
    ],
)
def test_spoiled_xml_is_refused(tmp_path, content, says):
    path = tmp_path / "x.xml"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"x\.xml: {says}"):
        read_xml(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 100_000, "is not JSON"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ("[1]", "holds a JSON list, expected an object"),
        ("", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
    ],
)
def test_spoiled_json_is_refused(tmp_path, content, says):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"x\.json: .*{says}") as e:
        read_json(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize("read", [read_json, read_xml])
def test_documents_that_claim_to_be_huge_are_not_read(tmp_path, read):
    with open(tmp_path / "x", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=rf"x: holds {1 << 40} bytes"):
        read(tmp_path / "x")


def test_values_of_another_kind_are_refused():
    for use, value in (
        (number, None),
        (number, "inf"),
        (whole, 1.5),
        (whole, -1),
        (text, ""),
        (text, "a\nb"),
        (text, 3),
    ):
        with pytest.raises(DataError, match=rf"^x: y {re.escape(repr(value))} is no "):
            use(value, "x", "y")
    assert whole("3.0", "x", "y") == 3 and number("-2.5", "x", "y") == -2.5
