"""labelme: one JSON beside each image, `shapes` of `label`, `points` and `shape_type`, painted in their order.

Read are polygon, rectangle, oriented_rectangle, circle, and mask (of the AI tools). Lines and points have no area. The
image is the file of the same name beside the JSON, else the one that `imagePath` names.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pwcrf_jax.data.readers.documents import brief, fields, read_json, table, text, whole
from pwcrf_jax.data.readers.files import DataError
from pwcrf_jax.data.readers.image_io import decode_colour_label
from pwcrf_jax.data.readers.outlines import Classes, ImageIndex, Shape, normal, paint
from pwcrf_jax.data.readers.painting import Canvas, points_of

KEYS = (b'"shapes"', b'"imagePath"')
"""What a JSON of labelme holds."""


def image_of(path: Path, index: ImageIndex) -> Path:
    """The image of a JSON.

    Raises:
      DataError: there is none, there are several, or the JSON is none of labelme's.
    """
    beside = index.beside(path)
    if len(beside) > 1:
        raise DataError(f"{path}: may be of {beside[0]} or {beside[1]}; rename or remove one")
    if beside:
        return beside[0]
    content = read_json(path)
    name = text(content.get("imagePath"), str(path), "imagePath")
    try:
        return index.find(name, path.parent, str(path))
    except DataError as e:
        if not content.get("imageData"):
            raise
        raise DataError(
            f"{path}: image {brief(name)} is not there, only a copy within the JSON; write it out: labelme_export_json "
            f"{path}, then put its img.png beside as {path.with_suffix('.png').name}"
        ) from e


def labels_in(paths: Sequence[Path]) -> list[tuple[str, None]]:
    """The labels of all files, in the order of the alphabet."""
    found = {
        text(shape.get("label"), where, "label") for path in paths for shape, where in _shapes(path, read_json(path))
    }
    return [(label, None) for label in sorted(found)]


def label(path: Path, image: Path, classes: Classes, max_pixels: float) -> np.ndarray:
    """The mask of a JSON, uint8 [H, W] of classes and void.

    Raises:
      DataError: it cannot be read, is of another image, or has a shape that cannot be painted.
    """
    content = read_json(path)
    if content.get("imagePath") is not None:
        named = path.parent / normal(text(content["imagePath"], str(path), "imagePath"))
        if named.is_file() and not named.samefile(image):
            raise DataError(f"{path}: its imagePath is {named}, but {image} is beside it; correct or remove one")
    sides = [content.get(key) for key in ("imageHeight", "imageWidth")]
    size = None
    if None not in sides:
        height, width = (whole(side, str(path), "imageHeight or imageWidth", least=1) for side in sides)
        size = height, width

    def shapes(size: tuple[int, int]) -> Iterator[Shape]:
        for shape, where in _shapes(path, content):
            yield _shape(shape, size, classes.value(shape.get("label"), where), where)

    return paint(image, size, str(path), shapes, classes.fill, max_pixels)


def _shapes(path: Path, content: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for number, shape in enumerate(table(content.get("shapes"), str(path), "shapes"), 1):
        where = f"{path}, shape {number}"
        yield fields(shape, where, "it"), where


_POINTS = {"polygon": (3, None), "rectangle": (2, 2), "oriented_rectangle": (4, 4), "circle": (2, 2), "mask": (2, 2)}


def _shape(shape: dict[str, Any], size: tuple[int, int], value: int, where: str) -> Shape:
    kind = shape.get("shape_type") or "polygon"  # as old versions leave it out
    if not isinstance(kind, str) or kind not in _POINTS:
        raise DataError(
            f"{where}: shape_type {brief(kind)} has no area; draw it as a polygon, or remove it (labelme2voc.py of "
            "labelme's examples paints lines 10 pixels wide, if that is meant)"
        )
    least, most = _POINTS[kind]
    points = points_of(table(shape.get("points"), where, "points"), size, where, least)
    if most and len(points) > most:
        raise DataError(f"{where}: a {kind} has {len(points)} points, expected {most}; correct it, or remove the shape")
    if kind == "mask":
        return Shape(value, _mask(shape.get("mask"), points, size, where))
    draw = {"rectangle": Canvas.rectangle, "circle": Canvas.circle}.get(kind, Canvas.polygon)
    return Shape(value, lambda canvas, value: draw(canvas, points, value))


def _mask(data: Any, points: np.ndarray, size: tuple[int, int], where: str) -> Any:
    """A mask in base64 of a PNG, that lies in the rectangle of its two points."""
    try:
        png = base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error) as e:
        raise DataError(f"{where}: its mask {brief(data)} is not base64; export it again") from e
    inside = decode_colour_label(png, f"{where}, mask", size[0] * size[1]).max(axis=-1) > 0
    (left, top), (right, bottom) = np.round(points).astype(int).tolist()
    if (points == np.trunc(points)).all():  # then both corners are within
        inside = inside[: max(0, bottom - top + 1), : max(0, right - left + 1)]
    return lambda canvas, value: canvas.pixels(top, left, inside, value)
