"""CVAT's own XML, "CVAT for images 1.1": `image` elements with polygons, boxes, ellipses and masks.

Shapes are painted by `z_order`, the lowest first, then in their order. Polygons, boxes and turned boxes cover what
CVAT's export of masks covers. The labels are those of the task or project, with their colours.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

import numpy as np

from pwcrf_jax.data.readers.documents import brief, number, read_xml, text, whole
from pwcrf_jax.data.readers.files import DataError
from pwcrf_jax.data.readers.folder_files import split_in
from pwcrf_jax.data.readers.outlines import Classes, ImageIndex, Shape, paint
from pwcrf_jax.data.readers.painting import points_of, runs

_AREAS = ("polygon", "box", "ellipse", "mask")
_REST = ("tag", "attribute")  # they say something about an image, and have no place in it


class CvatImage(NamedTuple):
    """An image of the XML: its file, the split that its subset names, size and shapes."""

    path: Path
    split: str | None
    size: tuple[int, int]
    shapes: list[tuple[Element, str]]


def read_images(path: Path, index: ImageIndex) -> tuple[list[CvatImage], list[tuple[str, tuple[int, int, int] | None]]]:
    """The images of a file in its order; and labels with their colours.

    Raises:
      DataError: it is of another kind, an image is missing or there twice, or a shape has no area.
    """
    root = read_xml(path)
    if root.tag != "annotations":
        raise DataError(f"{path}: its root is <{root.tag[:60]}>, that of CVAT for images is <annotations>; export the "
                        "task as 'CVAT for images 1.1'")  # fmt: skip
    if root.find("track") is not None:
        raise DataError(
            f"{path}: holds tracks of a video; export the task as 'CVAT for images 1.1' or 'Segmentation mask 1.1', "
            "which have every frame"
        )
    labels = []
    for element in root.iterfind("meta//labels/label"):
        name = text((element.findtext("name") or "").strip(), str(path), "label")
        colour = (element.findtext("color") or "").strip()
        hexes = re.fullmatch(r"#[0-9A-Fa-f]{6}", colour)
        labels.append((name, (int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:], 16)) if hexes else None))
    images, seen = [], set()
    for element in root.iterfind("image"):
        where = f"{path}, image {brief(element.get('name'))}"
        file = index.find(element.get("name"), path.parent, where)
        if file in seen:
            raise DataError(f"{where}: {file} is there twice; remove one of them")
        seen.add(file)
        size = tuple(whole(element.get(side), where, side, least=1) for side in ("height", "width"))
        shapes = [(shape, f"{where}, {shape.tag} {i}") for i, shape in enumerate(element, 1) if shape.tag not in _REST]
        for shape, at in shapes:
            if shape.tag not in _AREAS:
                raise DataError(f"{at}: has no area; remove it, or export the task as 'Segmentation mask 1.1', which "
                                "leaves it out")  # fmt: skip
        images.append(CvatImage(file, split_in(element.get("subset") or ""), (size[0], size[1]), shapes))
    if not images:
        raise DataError(f"{path}: has no image; export the task as 'CVAT for images 1.1'")
    if not labels:
        labels = [(text(e.get("label"), at, "label"), None) for image in images for e, at in image.shapes]
    return images, labels


def label(path: Path, image: CvatImage, classes: Classes, max_pixels: float) -> np.ndarray:
    """The mask of an image, uint8 [H, W] of classes and void; DataError for a shape that cannot be painted."""

    def shapes(size: tuple[int, int]) -> Iterator[Shape]:
        for shape, at in sorted(
            image.shapes, key=lambda pair: whole(pair[0].get("z_order", 0), pair[1], "z_order", least=-(1 << 31))
        ):
            yield Shape(classes.value(shape.get("label"), at), _paint(shape, size, at))

    return paint(image.path, image.size, f"{path}, image {image.path.name!r}", shapes, classes.fill, max_pixels)


def _paint(shape: Element, size: tuple[int, int], where: str) -> Any:
    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in (shape.get("points") or "").split(";")]
        points = points_of(pairs, size, where)
        return lambda canvas, value: canvas.coco_polygon(points, value)
    angle = number(shape.get("rotation", 0), where, "rotation")
    if shape.tag == "box":
        left, top, right, bottom = _numbers(shape, ("xtl", "ytl", "xbr", "ybr"), where)
        points_of([(left, top), (right, bottom)], size, where, 2)
        corners = _turned(np.array([(left, top), (right, top), (right, bottom), (left, bottom)]), angle)
        return lambda canvas, value: canvas.coco_polygon(corners, value)
    if shape.tag == "ellipse":
        x, y, across, down = _numbers(shape, ("cx", "cy", "rx", "ry"), where)
        points_of([(x, y)], size, where, 1)
        if not 0 < min(across, down) <= max(across, down) <= 2 * max(size):
            raise DataError(f"{where}: its radii {across:g} and {down:g} are none; correct it, or remove the shape")
        return lambda canvas, value: canvas.ellipse((x, y), (across, down), angle, value)
    left, top, width, height = (whole(shape.get(key), where, key) for key in ("left", "top", "width", "height"))
    if left + width > size[1] or top + height > size[0]:
        raise DataError(f"{where}: reaches ({left + width}, {top + height}), beyond its image of {size[1]}x{size[0]} "
                        "pixels; export it again")  # fmt: skip
    counts = [whole(run.strip(), where, "run") for run in (shape.get("rle") or "").split(",")]
    inside = runs(counts, (height, width), where)
    return lambda canvas, value: canvas.pixels(top, left, inside, value)


def _numbers(shape: Element, keys: tuple[str, ...], where: str) -> list[float]:
    return [number(shape.get(key), where, key) for key in keys]


def _turned(corners: np.ndarray, angle: float) -> np.ndarray:
    """Corners turned about their middle by degrees, clockwise as one sees it."""
    middle, turn = corners.mean(axis=0), math.radians(angle)
    cos, sin = math.cos(turn), math.sin(turn)
    return (corners - middle) @ np.array([[cos, sin], [-sin, cos]]) + middle
