"""Folders as labelme, CVAT, COCO's tools, mmsegmentation and Cityscapes lay them, with the keys that they write."""

import json
import pathlib

import numpy as np
from PIL import Image

SIZE = (20, 30)


def write_json(path: pathlib.Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def image(path: pathlib.Path, size: tuple[int, int] = SIZE, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)


def mask(path: pathlib.Path, values: np.ndarray | None = None, palette: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    im = Image.fromarray(np.eye(*SIZE, dtype=np.uint8) if values is None else values)
    if palette:
        im.putpalette(palette)
    im.save(path)


def shape(label: str, points: list, shape_type: str = "polygon", **more: object) -> dict:
    """As labelme 5 writes it."""
    return {"label": label, "points": points, "group_id": None, "description": "", "shape_type": shape_type,
            "flags": {}, "mask": None} | more  # fmt: skip


def labelme(path: pathlib.Path, shapes: list[dict], size: tuple[int, int] = SIZE, **more: object) -> None:
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{path.stem}.jpg", "imageData": None,
               "imageHeight": size[0], "imageWidth": size[1]}  # fmt: skip
    write_json(path, content | more)


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <id>4</id>
      <name>own</name>
      <size>2</size>
      <mode>annotation</mode>
      <labels>
        <label>
          <name>car</name>
          <color>#ff0102</color>
          <type>any</type>
          <attributes>
          </attributes>
        </label>
        <label>
          <name>sky</name>
          <color>#0000fe</color>
          <type>any</type>
          <attributes>
          </attributes>
        </label>
      </labels>
    </task>
    <dumped>2024-09-25 11:38:28.799808+00:00</dumped>
  </meta>
{body}
</annotations>
"""


def cvat(path: pathlib.Path, images: dict[str, str], attributes: str = "") -> None:
    """Image name -> its elements."""
    parts = [
        f'  <image id="{i}" name="{name}" {attributes} width="{SIZE[1]}" height="{SIZE[0]}">\n{body}\n  </image>'
        for i, (name, body) in enumerate(images.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CVAT.replace("{body}", "\n".join(parts)), encoding="utf-8")


def coco(path: pathlib.Path, images: list[str], annotations: list[dict], categories: tuple[str, ...] = ("car", "sky")):
    """Annotations need image (from 0), category (from 0) and segmentation."""
    content = {
        "info": {"description": "own"},
        "licenses": [],
        "images": [{"id": i + 5, "file_name": n, "height": SIZE[0], "width": SIZE[1]} for i, n in enumerate(images)],
        "annotations": [
            {"id": i + 1, "image_id": a["image"] + 5, "category_id": a["category"] + 1, "area": 1.0,
             "bbox": [0, 0, 1, 1], "iscrowd": int(isinstance(a["segmentation"], dict)),
             "segmentation": a["segmentation"]}
            for i, a in enumerate(annotations)
        ],
        "categories": [{"id": i + 1, "name": name, "supercategory": ""} for i, name in enumerate(categories)],
    }  # fmt: skip
    write_json(path, content)
