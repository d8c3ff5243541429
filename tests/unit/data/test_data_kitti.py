"""KITTI: colours of Ros et al. become 11 classes; the official benchmark's label ids become Cityscapes' 19."""

import numpy as np
import pytest
from layouts import kitti as ros
from layouts import kitti_cityscapes as official
from PIL import Image

from pwcrf_jax.data import load_dataset
from pwcrf_jax.data.readers.image_io import DataError
from pwcrf_jax.data.sets.cityscapes import TRAIN_TO_LABEL_ID
from pwcrf_jax.data.sets.kitti import Kitti, KittiCityscapes

LAYOUTS = {"kitti": ros, "kitti_cityscapes": official}


@pytest.fixture
def sources(tmp_path):
    for name, layout in LAYOUTS.items():
        layout.make(tmp_path / name, np.random.default_rng(0))
    return {name: tmp_path / name for name in LAYOUTS}


def _load(name, root, **options):
    data_dir = str(root.parent / "data")
    return load_dataset(name, source_dir=str(root), data_dir=data_dir, **{"partial": True, **options})


def _records(dataset):
    return {(split, r["id"]): r for split in dataset.splits for r in dataset.source(split)}


def _gt(sources):
    return sources["kitti"] / "KITTI_SEMANTIC/Training_00/GT/000143.png"


def test_colours_become_classes(sources):
    dataset = _load("kitti", sources["kitti"])
    assert dataset.splits == {"train": 2, "val": 1} and dataset.unlabelled == ()
    assert dataset.class_names == tuple(ros.COLOURS) and dataset.palette == tuple(ros.COLOURS.values())
    classes = {colour: index for index, colour in enumerate(ros.COLOURS.values())} | {(0, 0, 0): 255}
    records = _records(dataset)
    for split, folder in (("train", "Training_00"), ("val", "Validation_07")):
        for frame in ros.FRAMES[folder]:
            record = records.pop((split, frame))
            root = sources["kitti"] / "KITTI_SEMANTIC" / folder
            np.testing.assert_array_equal(record["image"], np.asarray(Image.open(root / "RGB" / f"{frame}.png")))
            mask = np.asarray(Image.open(root / "GT" / f"{frame}.png"))
            expected = [[classes[tuple(pixel)] for pixel in row] for row in mask.tolist()]
            np.testing.assert_array_equal(record["label"], expected)
            assert set(np.unique(expected)) == {*range(11), 255}
    assert not records


def test_label_ids_become_classes(sources):
    dataset = _load("kitti_cityscapes", sources["kitti_cityscapes"])
    assert dataset.splits == {"train": 5, "test": 2} and dataset.unlabelled == ("test",)
    assert dataset.num_classes == 19 and dataset.class_names[13] == "car" and dataset.palette[13] == (0, 0, 142)
    classes = {label_id: index for index, label_id in enumerate(TRAIN_TO_LABEL_ID)}
    records = _records(dataset)
    for split, part in (("train", "training"), ("test", "testing")):
        for number, size in enumerate(official.SIZES[part]):
            name = f"{number:06d}_10"
            record = records.pop((split, name))
            root = sources["kitti_cityscapes"] / part
            np.testing.assert_array_equal(record["image"], np.asarray(Image.open(root / "image_2" / f"{name}.png")))
            assert record["label"].shape == size
            if split == "train":
                ids = np.asarray(Image.open(root / "semantic" / f"{name}.png"))
                np.testing.assert_array_equal(
                    record["label"], [[classes.get(i, 255) for i in row] for row in ids.tolist()]
                )
                assert len(np.unique(record["label"])) == 20
            else:
                assert (record["label"] == 255).all()
    assert not records


@pytest.mark.parametrize("name", LAYOUTS)
def test_archives(sources, tmp_path, name):
    LAYOUTS[name].make(tmp_path / "zipped", np.random.default_rng(0), archives=True)
    archive = {"kitti": "KITTI_SEMANTIC.zip", "kitti_cityscapes": "data_semantics.zip"}[name]
    assert [p.name for p in (tmp_path / "zipped").iterdir()] == [archive]
    zipped, plain = (_records(_load(name, root)) for root in (tmp_path / "zipped", sources[name]))
    assert zipped.keys() == plain.keys()
    for key in plain:
        for field in ("image", "label"):
            np.testing.assert_array_equal(zipped[key][field], plain[key][field])
    (tmp_path / "zipped" / archive).write_bytes(b"PK\3\4 cut")
    with pytest.raises(DataError, match=archive.replace(".", r"\.")):
        _load(name, tmp_path / "zipped")


def test_other_places(sources, tmp_path):
    assert _load("kitti", sources["kitti"] / "KITTI_SEMANTIC").splits == {"train": 2, "val": 1}
    sources["kitti_cityscapes"].rename(tmp_path / "data_semantics")
    (tmp_path / "kitti").rename(tmp_path / "data_semantics" / "unrelated")
    (tmp_path / "parent").mkdir()
    (tmp_path / "data_semantics").rename(tmp_path / "parent" / "data_semantics")
    assert _load("kitti_cityscapes", tmp_path / "parent").splits == {"train": 5, "test": 2}


def test_only_what_is_there(sources, tmp_path):
    (sources["kitti"] / "KITTI_SEMANTIC/Validation_07").rename(tmp_path / "away")
    assert _load("kitti", sources["kitti"]).splits == {"train": 2}
    (sources["kitti_cityscapes"] / "testing").rename(tmp_path / "away too")
    assert _load("kitti_cityscapes", sources["kitti_cityscapes"]).splits == {"train": 5}


def test_frames_of_scene_flow_are_left_out(sources):
    images = sources["kitti_cityscapes"] / "training/image_2"
    (images / "000000_11.png").write_bytes((images / "000000_10.png").read_bytes())
    assert _load("kitti_cityscapes", sources["kitti_cityscapes"]).splits["train"] == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kitti", r"'train'.*RGB.* 2 images, officially 100.*KITTI_SEMANTIC"),
        ("kitti_cityscapes", r"'train'.*image_2.* 5 images, officially 200.*data_semantics\.zip"),
    ],
)
def test_official_sizes(sources, name, message):
    with pytest.raises(DataError, match=message):
        _load(name, sources[name], partial=False)


def test_split_sizes():
    assert Kitti.split_sizes == {"train": 100, "val": 46} and KittiCityscapes.split_sizes == {"train": 200, "test": 200}


def test_unknown_colours(sources):
    mask = np.asarray(Image.open(_gt(sources))).copy()
    mask[:3, :4], mask[10, :5] = (12, 200, 34), (128, 128, 129)
    Image.fromarray(mask).save(_gt(sources))
    with pytest.raises(DataError, match=r"GT/000143\.png: colour \(12, 200, 34\) of 12 pixels .*\(2 such colours"):
        _load("kitti", sources["kitti"])


def test_a_mask_of_indices(sources):
    indices = np.ones((64, 96), np.uint8)
    Image.fromarray(indices).save(_gt(sources))
    with pytest.raises(DataError, match=r"GT/000143\.png: colour \(1, 1, 1\) of 6144 pixels .*holds class indices"):
        _load("kitti", sources["kitti"])


def test_unknown_label_ids(sources):
    path = sources["kitti_cityscapes"] / "training/semantic/000001_10.png"
    Image.fromarray(np.full((62, 90), 40, np.uint8)).save(path)
    with pytest.raises(DataError, match=r"semantic/000001_10\.png: label id 40 "):
        _load("kitti_cityscapes", sources["kitti_cityscapes"])


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("kitti", "KITTI_SEMANTIC", r"neither KITTI_SEMANTIC/Training_00 nor"),
        ("kitti", "KITTI_SEMANTIC/Training_00/GT/000143.png", r"GT/000143\.png: mask is missing"),
        ("kitti", "KITTI_SEMANTIC/Validation_07/RGB", r"Validation_07/RGB: no image \*\.png"),
        ("kitti_cityscapes", "training", r"neither the folder training nor data_semantics\.zip"),
        ("kitti_cityscapes", "training/semantic", r"semantic/000000_10\.png: mask is missing"),
        ("kitti_cityscapes", "testing/image_2/000001_10.png", ""),
        ("kitti_cityscapes", "training/image_2", r"training/image_2: no image \*_10\.png"),
    ],
)
def test_missing_parts(sources, tmp_path, name, missing, message):
    (sources[name] / missing).rename(tmp_path / "elsewhere")
    if message:
        with pytest.raises(DataError, match=message):
            _load(name, sources[name])
    else:
        assert _load(name, sources[name]).splits == {"train": 5, "test": 1}


def test_damaged_files(sources):
    image = sources["kitti_cityscapes"] / "testing/image_2/000001_10.png"
    for name, path in (("kitti", _gt(sources)), ("kitti_cityscapes", image)):
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match=path.name.replace(".", r"\.")):
            _load(name, sources[name])


def test_a_mask_of_another_size(sources):
    Image.open(_gt(sources)).resize((48, 32), Image.Resampling.NEAREST).save(_gt(sources))
    with pytest.raises(DataError, match=r"GT/000143\.png: mask is 48x32"):
        _load("kitti", sources["kitti"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_options(sources, name):
    with pytest.raises(DataError, match=f"{name}.*no option 'void'"):
        _load(name, sources[name], void=True)
