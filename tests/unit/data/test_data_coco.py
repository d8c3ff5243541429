"""COCO's instances become masks, COCO-Stuff's maps classes; both layouts, what is missing, and damaged annotations."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from layouts import coco as layout
from layouts import coco_stuff as stuff_layout
from PIL import Image

from pwcrf_jax.data import DataError, load_dataset
from pwcrf_jax.data.sets import coco


@pytest.fixture
def source(tmp_path):
    layout.make(tmp_path / "source", np.random.default_rng(0))
    return tmp_path / "source"


@pytest.fixture
def stuff(tmp_path):
    stuff_layout.make(tmp_path / "source", np.random.default_rng(0))
    return tmp_path / "source"


def _load(source, name="coco", **options):
    options = {"partial": True, **options}
    return load_dataset(name, source_dir=str(source), data_dir=str(source.parent / "prepared"), **options)


def _records(data):
    return {(split, int(r["id"])): r for split in data.splits for r in map(data.source(split).__getitem__,
            range(data.splits[split]))}  # fmt: skip


def _same(one, other):
    assert one.keys() == other.keys()
    for key, record in one.items():
        for what in ("image", "label"):
            np.testing.assert_array_equal(record[what], other[key][what])


def test_masks_are_painted_from_instances(source):
    data = _load(source)
    assert data.splits == {"train": 3, "val": 2, "test": 1} and data.unlabelled == ("test",)
    records = _records(data)
    for (split, number), record in records.items():
        path = source / f"{split}2017" / f"{number:012d}.jpg"
        np.testing.assert_array_equal(record["image"], np.asarray(Image.open(path)))
    people = np.zeros((64, 96), np.uint8)
    people[25:64, 32:96] = 255  # the crowd, below everything
    people[10:50, 10:60] = 1
    people[20:30, 30:35] = 28  # the tie: 32 is the 28th of the ids
    people[0:5, 70:80] = people[8:12, 70:90] = 80
    np.testing.assert_array_equal(records["train", 9]["label"], people)
    elephant = np.zeros((96, 64), np.uint8)
    elephant[:, :32] = 12  # stop sign, id 13
    elephant[90:, 20:] = 21  # smaller, so on top
    np.testing.assert_array_equal(records["train", 25]["label"], elephant)
    assert (records["train", 30]["label"] == 0).all() and (records["test", 1]["label"] == 255).all()
    np.testing.assert_array_equal(np.argwhere(records["val", 139]["label"] == 80), np.argwhere(_box(1, 2, 3, 90)))
    np.testing.assert_array_equal(records["val", 285]["label"], np.where(np.arange(70) < 7, 255, [[0]] * 50))


def _box(top, left, bottom, right):
    return np.pad(np.ones((bottom - top, right - left), bool), ((top, 64 - bottom), (left, 96 - right)))


def test_slanted_outlines(source):
    """A triangle, and a polygon that reaches beyond the image."""
    _edit(source, lambda c: c["annotations"][0].update(segmentation=[[0.0, 0.0, 60.0, 0.0, 0.0, 60.0]]))
    _edit(
        source, lambda c: c["annotations"][1].update(segmentation=[[50.0, 30.0, 120.0, 30.0, 120.0, 90.0, 50.0, 90.0]])
    )
    label = _records(_load(source))["train", 9]["label"]
    y, x = np.mgrid[:64, :96]
    triangle = label == 28
    assert (triangle[(x + y < 57) & (label != 80)]).all() and not triangle[x + y > 61].any()
    assert (label[30:, 61:] == 1).all() and not (label[:30] == 1).any()


def test_classes(source):
    data = _load(source)
    assert len(data.class_names) == len(set(data.class_names)) == len(set(data.palette)) == 81 == len(data.palette)
    official = {0: "background", 1: "person", 11: "fire hydrant", 12: "stop sign", 25: "backpack", 28: "tie",
                61: "dining table", 62: "toilet", 63: "tv", 80: "toothbrush"}  # fmt: skip
    assert {i: data.class_names[i] for i in official} == official and data.palette[1] == (220, 20, 60)


@pytest.mark.parametrize("move", ["archives", "images", "mixed"])
def test_layouts_agree(source, move, tmp_path):
    folder = _records(_load(source))
    other = tmp_path / "other"
    layout.make(other, np.random.default_rng(0), archives=move == "archives")
    if move == "images":
        (other / "images").mkdir()
        for split in layout.SIZES:
            (other / f"{split}2017").rename(other / "images" / f"{split}2017")
    elif move == "mixed":
        layout.pack(other, "annotations_trainval2017.zip", "annotations")
        layout.pack(other, "val2017.zip", "val2017")
    _same(folder, _records(_load(other)))


def test_splits_may_be_left_out(source):
    layout.pack(source, "elsewhere.zip", "train2017", "test2017")
    assert _load(source).splits == {"val": 2}


def test_official_sizes(source):
    with pytest.raises(DataError, match="'train' .*train2017.* has 3 images, officially 118287"):
        _load(source, partial=False)


def test_annotations_are_read_once(source, monkeypatch):
    files = []
    read = coco._read_instances
    monkeypatch.setattr(coco, "_read_instances", lambda path: files.append(path.name) or read(path))
    data = _load(source)
    assert files == ["instances_train2017.json", "instances_val2017.json"] and not data._builder._truth
    assert _load(source).folder == data.folder and len(files) == 2
    path = source / "annotations/instances_val2017.json"
    os.utime(path, (1, 1))
    assert _load(source).folder != data.folder and len(files) == 4


# Refusals ---------------------------------------------------------------------------------------------


def _edit(source, change, split="train"):
    path = source / f"annotations/instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _first(**values):
    return lambda source: _edit(source, lambda content: content["annotations"][0].update(values))


def _without(key):
    return lambda source: _edit(source, lambda content: content["annotations"][0].pop(key))


def _cut(source):
    path = source / "annotations/instances_train2017.json"
    path.write_bytes(path.read_bytes()[:-500])


def _captions(source):
    (source / "annotations/captions_train2017.json").replace(source / "annotations/instances_train2017.json")


def _another_size(source):
    _edit(source, lambda content: content["images"][2].update(height=65))


def _another_name(source):
    (source / "train2017/000000000009.jpg").rename(source / "train2017/000000000010.jpg")


def _no_images(source):
    for path in (source / "train2017").iterdir():
        path.rename(path.with_suffix(".png"))


def _nothing(source):
    for folder in ("train2017", "val2017", "test2017"):
        (source / folder).rename(source / f"COCO_{folder}")


def _damaged_image(source):
    path = source / "train2017/000000000009.jpg"
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            lambda s: (s / "annotations/instances_train2017.json").unlink(),
            r"instances_train2017\.json: is missing.*zip",
        ),
        (_cut, r"instances_train2017\.json: is not a file of COCO's instances"),
        (_captions, r"instances_train2017\.json: is not a file of COCO's instances"),
        (_without("image_id"), r"instances_train2017\.json: is not a file of COCO's instances .*image_id"),
        (_first(image_id=77), r"instances_train2017\.json: is not a file of COCO's instances .*77"),
        (_first(category_id=12), r"annotation 1000 has category_id 12"),
        (_first(segmentation=[[1.0, 2.0, 3.0, 4.0]]), "annotation 1000: holds a polygon that is none"),
        (_first(segmentation=[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]), "annotation 1000: holds a polygon that is none"),
        (_first(segmentation=[[1.0, 2.0, 3.0, 4.0, 5.0, float("nan")]]), "annotation 1000: holds a polygon"),
        (_first(segmentation=[["a"] * 6]), "is not a file of COCO's instances"),
        (_first(segmentation={"counts": [5, 5], "size": [64, 96]}), "annotation 1000: its runs do not .* 96x64"),
        (_first(segmentation={"counts": [-1, 6145], "size": [64, 96]}), "annotation 1000: its runs do not"),
        (_first(segmentation={"counts": "PPYo0", "size": [64, 96]}), "is not a file of COCO's instances"),
        (_another_size, r"instances_train2017\.json: mask is 96x65 .*000000000030\.jpg is 96x64"),
        (_another_name, r"000000000010\.jpg: .*instances_train2017\.json does not list it"),
        (_no_images, r"train2017: holds no \.jpg file; unpack train2017\.zip"),
        (_nothing, r"no images of COCO found; expected train2017/NAME\.jpg"),
        (_damaged_image, r"000000000009\.jpg: .*damaged"),
    ],
)
def test_refusals(source, spoil, match):
    spoil(source)
    with pytest.raises(DataError, match=match):
        _load(source)


def test_without_pycocotools(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(DataError, match=r'pip install -e "\.\[coco\]"'):
        _load(source)


def test_options_are_refused(source):
    with pytest.raises(DataError, match="'coco' has no option 'year'"):
        _load(source, year=2014)


# COCO-Stuff -------------------------------------------------------------------------------------------


def test_stuff_maps_become_classes(stuff):
    data = _load(stuff, "coco_stuff")
    assert data.splits == {"train": 3, "val": 2} and data.unlabelled == ()
    for (split, number), record in _records(data).items():
        stored = np.asarray(Image.open(stuff / "stuffthingmaps" / f"{split}2017" / f"{number:012d}.png"))
        expected = [[255 if v == 255 else stuff_layout.VALUES.index(v) for v in row] for row in stored.tolist()]
        np.testing.assert_array_equal(record["label"], expected)
        assert set(np.unique(record["label"])) == {*range(171), 255}


def test_stuff_official_sizes(stuff):
    with pytest.raises(DataError, match="'train' .*train2017.* has 3 images, officially 118287"):
        _load(stuff, "coco_stuff", partial=False)


def test_stuff_classes(stuff):
    data = _load(stuff, "coco_stuff")
    assert len(data.class_names) == len(set(data.class_names)) == len(set(data.palette)) == 171 == len(data.palette)
    official = {0: "person", 11: "stop sign", 79: "toothbrush", 80: "banner", 84: "building-other", 145: "sky-other",
                170: "wood"}  # fmt: skip
    assert {i: data.class_names[i] for i in official} == official


def _maps_to(folder):
    return lambda source: (source / "stuffthingmaps").rename(source / folder)


def _maps_beside(source):
    for split in ("train2017", "val2017"):
        for path in (source / "stuffthingmaps" / split).iterdir():
            path.rename(source / split / path.name)
    shutil.rmtree(source / "stuffthingmaps")


def _converted(source):
    """What mmsegmentation's converter leaves behind."""
    _maps_to("annotations")(source)
    for path in list((source / "annotations").rglob("*.png")):
        path.with_name(f"{path.stem}_labelTrainIds.png").write_bytes(path.read_bytes())


def _images_below(source):
    (source / "images").mkdir()
    for split in ("train2017", "val2017"):
        (source / split).rename(source / "images" / split)


@pytest.mark.parametrize(
    "move", [_maps_to("annotations"), _maps_beside, _converted, _images_below, stuff_layout.pack_maps, None]
)
def test_stuff_layouts_agree(stuff, move, tmp_path):
    folder = _records(_load(stuff, "coco_stuff"))
    other = tmp_path / "other"
    stuff_layout.make(other, np.random.default_rng(0), archives=move is None)
    if move:
        move(other)
    _same(folder, _records(_load(other, "coco_stuff")))


def _removed_class(source):
    path = source / "stuffthingmaps/train2017/000000000009.png"
    label = np.array(Image.open(path))
    label[3, 4] = 11
    Image.fromarray(label).save(path)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_removed_class, r"000000000009\.png: label value 11 is no class of COCO-Stuff"),
        (lambda s: (s / "stuffthingmaps/val2017/000000000285.png").unlink(), r"000000000285\.png: mask is missing"),
        (_maps_to("maps"), r"images of split 'train' but no maps of them; put stuffthingmaps_trainval2017\.zip there"),
        (lambda s: [(s / f"{x}2017").rename(s / x) for x in ("train", "val")], "no images of COCO found"),
    ],
)
def test_stuff_refusals(stuff, spoil, match):
    spoil(stuff)
    with pytest.raises(DataError, match=match):
        _load(stuff, "coco_stuff")
