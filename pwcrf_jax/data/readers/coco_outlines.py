"""COCO's JSON of a user's own: `images`, `annotations` with `segmentation`, `categories`.

A segmentation is a list of polygons, whose pixels are joined (holes cannot be written so), or runs, as a list or as
COCO's compressed string. Annotations are painted in their order. `iscrowd` says no more than that the outline is made
of runs: tools write it for masks that were drawn with a brush.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pwcrf_jax.data.readers.documents import brief, fields, read_json, table, text, whole
from pwcrf_jax.data.readers.files import DataError
from pwcrf_jax.data.readers.outlines import Classes, ImageIndex, Shape, paint
from pwcrf_jax.data.readers.painting import Canvas, coco_counts, points_of, runs

KEYS = (b'"images"', b'"categories"')
"""What a JSON of COCO's kind holds."""
Colour = tuple[int, int, int] | None


class CocoImage(NamedTuple):
    """An image of the JSON: its file, (height, width), and annotations; None: the JSON has none at all."""

    path: Path
    size: tuple[int, int] | None
    annotations: list[tuple[str, dict[str, Any]]] | None  # name of the category, annotation


def read_images(path: Path, index: ImageIndex) -> tuple[list[CocoImage], list[tuple[str, Colour]]]:
    """The images of a file in its order; and its categories by id.

    Raises:
      DataError: it is of another kind (panoptic, captions), an image is missing or there twice, or an annotation names
        an image or a category that is not there.
    """
    content = read_json(path)
    names = _categories(path, content)
    found: dict[Any, CocoImage] = {}
    labelled = "annotations" in content
    seen = set()
    for i, entry in enumerate(table(content.get("images"), str(path), "images"), 1):
        where = f"{path}, image {i}"
        image = fields(entry, where, "it")
        file = index.find(image.get("file_name"), path.parent, where)
        key = whole(image.get("id"), where, "id")
        if file in seen or key in found:
            raise DataError(f"{where}: {'id ' + str(key) if key in found else file} is there twice; remove one of them")
        seen.add(file)
        size = None
        if image.get("height") is not None and image.get("width") is not None:
            size = whole(image["height"], where, "height", least=1), whole(image["width"], where, "width", least=1)
        found[key] = CocoImage(file, size, [] if labelled else None)
    if not found:
        raise DataError(f"{path}: has no image; export it again")
    for i, entry in enumerate(table(content.get("annotations", []), str(path), "annotations"), 1):
        where = f"{path}, annotation {i}"
        annotation = fields(entry, where, "it")
        if "segments_info" in annotation:
            raise DataError(f"{path}: is COCO panoptic, whose masks are PNG files; convert it: python "
                            "panopticapi/converters/panoptic2detection_coco_format.py")  # fmt: skip
        at = found.get(annotation.get("image_id")) if isinstance(annotation.get("image_id"), int) else None
        name = names.get(annotation["category_id"]) if isinstance(annotation.get("category_id"), int) else None
        if at is None or at.annotations is None or name is None:
            which = "image_id" if at is None else "category_id"
            raise DataError(
                f"{where}: {which} {brief(annotation.get(which))} is not there; correct it, or remove the annotation"
            )
        at.annotations.append((name, annotation))
    return list(found.values()), [(name, None) for _, name in sorted(names.items())]


def _categories(path: Path, content: dict[str, Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for i, entry in enumerate(table(content.get("categories", []), str(path), "categories"), 1):
        where = f"{path}, category {i}"
        category = fields(entry, where, "it")
        key, name = whole(category.get("id"), where, "id"), text(category.get("name"), where, "name")
        if key in names or name in names.values():
            raise DataError(
                f"{where}: {f'id {key}' if key in names else brief(name)} is there twice; rename one of them"
            )
        names[key] = name
    return names


def label(path: Path, image: CocoImage, classes: Classes, max_pixels: float) -> np.ndarray:
    """The mask of an image, uint8 [H, W] of classes and void; DataError for an annotation that cannot be painted."""

    def shapes(size: tuple[int, int]) -> Iterator[Shape]:
        for name, annotation in image.annotations or ():
            where = f"{path}, annotation {brief(annotation.get('id'))} of {image.path.name}"
            yield Shape(classes.value(name, where), _paint(annotation.get("segmentation"), size, where))

    return paint(image.path, image.size, f"{path}", shapes, classes.fill, max_pixels)


def _paint(outline: Any, size: tuple[int, int], where: str) -> Any:
    if isinstance(outline, dict):
        counts, told = outline.get("counts"), table(outline.get("size"), where, "size")
        if told != list(size):
            shown = ", ".join(map(brief, told[:3]))
            raise DataError(f"{where}: its runs are of size [{shown}], its image of {list(size)}; export it again")
        if isinstance(counts, str):
            lengths = coco_counts(counts, where)
        else:
            lengths = [whole(run, where, "run") for run in table(counts, where, "counts")]
        inside = runs(lengths, size[::-1], where).T  # they go along columns
        return lambda canvas, value: canvas.pixels(0, 0, inside, value)
    if not outline:
        raise DataError(f"{where}: has no segmentation, only a box; draw outlines, or remove the annotation")
    polygons = []
    for polygon in table(outline, where, "segmentation"):
        numbers = table(polygon, where, "polygon")
        if len(numbers) % 2:
            raise DataError(f"{where}: a polygon has {len(numbers)} numbers, expected x, y, x, y, ...; export it again")
        polygons.append(points_of([numbers[k : k + 2] for k in range(0, len(numbers), 2)], size, where))

    def union(canvas: Canvas, value: int) -> None:
        for points in polygons:
            canvas.coco_polygon(points, value)

    return union
