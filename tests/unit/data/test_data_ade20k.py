"""ADE20K: 0 becomes void and 1..150 the classes; grey images, the optional test images, and what is missing."""

import io

import numpy as np
import pytest
from layouts import ade20k as layout
from PIL import Image

from pwcrf_jax.data import load_dataset
from pwcrf_jax.data.readers.image_io import DataError
from pwcrf_jax.data.sets.ade20k import Ade20k


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source"
    layout.make(root, np.random.default_rng(0))
    return root


def _load(root, tmp_path, **options):
    data_dir = str(tmp_path / "data")
    return load_dataset("ade20k", source_dir=str(root), data_dir=data_dir, **{"partial": True, **options})


def _records(dataset):
    return {(split, r["id"]): r for split in dataset.splits for r in dataset.source(split)}


def test_images_and_labels(source, tmp_path):
    dataset = _load(source, tmp_path)
    assert dataset.splits == {"train": 3, "val": 2, "test": 2} and dataset.unlabelled == ("test",)
    records = _records(dataset)
    root = source / "ADEChallengeData2016"
    for split, folder in (("train", "training"), ("val", "validation")):
        for path in (root / "images" / folder).iterdir():
            record = records.pop((split, path.stem))
            np.testing.assert_array_equal(record["image"], np.asarray(Image.open(path).convert("RGB")))
            mask = np.asarray(Image.open(root / "annotations" / folder / f"{path.stem}.png"))
            np.testing.assert_array_equal(
                record["label"], [[v - 1 if v else 255 for v in row] for row in mask.tolist()]
            )
            assert set(np.unique(record["label"])) == {*range(150), 255}
    assert records.keys() == {("test", "ADE_test_00000001"), ("test", "ADE_test_00003489")}
    assert all((r["label"] == 255).all() and r["image"].shape == (64, 96, 3) for r in records.values())


def test_grey_images(source, tmp_path):
    path = source / "ADEChallengeData2016/images/training/ADE_train_00000002.jpg"
    assert Image.open(path).mode == "L"
    dataset = _load(source, tmp_path)
    image = _records(dataset)["train", "ADE_train_00000002"]["image"]
    assert image.shape == (96, 64, 3) and (image == image[..., :1]).all() and image.std() > 10
    assert max(dataset.source("train").image_size(i) for i in range(3)) == (96, 64)


def test_classes(source, tmp_path):
    dataset = _load(source, tmp_path)
    assert len(dataset.class_names) == len(set(dataset.class_names)) == len(dataset.palette) == 150
    official = {1: "wall", 2: "building", 13: "person", 21: "car", 44: "signboard", 75: "computer", 100: "buffet",
                124: "trade name", 131: "screen", 149: "clock", 150: "flag"}  # fmt: skip
    assert {i: dataset.class_names[i - 1] for i in official} == official
    colours = {1: (120, 120, 120), 3: (6, 230, 230), 13: (150, 5, 61), 49: (140, 140, 140), 150: (92, 0, 255)}
    assert {i: dataset.palette[i - 1] for i in colours} == colours


def test_archives(source, tmp_path):
    layout.make(tmp_path / "zipped", np.random.default_rng(0), archives=True)
    names = {p.name for p in (tmp_path / "zipped").iterdir()}
    assert names == {"ADEChallengeData2016.zip", "release_test.zip"}
    zipped, plain = (_records(_load(root, tmp_path)) for root in (tmp_path / "zipped", source))
    assert zipped.keys() == plain.keys()
    for key in plain:
        for field in ("image", "label"):
            np.testing.assert_array_equal(zipped[key][field], plain[key][field])


def test_other_places(source, tmp_path):
    assert _load(source / "ADEChallengeData2016", tmp_path).splits == {"train": 3, "val": 2}
    (source / "release_test").rename(source / "ADEChallengeData2016/release_test")
    assert _load(source / "ADEChallengeData2016", tmp_path).splits == {"train": 3, "val": 2, "test": 2}


def test_only_what_is_there(source, tmp_path):
    (source / "release_test").rename(tmp_path / "release_test")
    (source / "ADEChallengeData2016/images/training").rename(tmp_path / "training")
    dataset = _load(source, tmp_path)
    assert dataset.splits == {"val": 2} and dataset.unlabelled == ()


def test_official_sizes(source, tmp_path):
    assert Ade20k.split_sizes == {"train": 20210, "val": 2000, "test": 3352}
    with pytest.raises(DataError, match=r"'train'.*images/training.* 3 images, officially 20210.*Data2016\.zip"):
        _load(source, tmp_path, partial=False)


@pytest.mark.parametrize("value", [151, 255])
def test_unknown_values(source, tmp_path, value):
    path = source / "ADEChallengeData2016/annotations/validation/ADE_val_00000002.png"
    mask = np.asarray(Image.open(path)).copy()
    mask[7, 9] = value
    Image.fromarray(mask).save(path)
    with pytest.raises(DataError, match=rf"validation/ADE_val_00000002\.png: label value {value} is neither"):
        _load(source, tmp_path)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("ADEChallengeData2016", r"neither the folder ADEChallengeData2016 nor ADEChallengeData2016\.zip"),
        ("ADEChallengeData2016/annotations", r"training/ADE_train_00000001\.png: mask is missing"),
        ("ADEChallengeData2016/annotations/validation/ADE_val_00000002.png", r"ADE_val_00000002\.png: mask is missing"),
    ],
)
def test_missing_parts(source, tmp_path, missing, message):
    (source / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=message):
        _load(source, tmp_path)


def test_empty_folders_and_the_full_release(source, tmp_path):
    testing = source / "release_test/testing"
    for path in testing.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"release_test/testing: no image \*\.jpg"):
        _load(source, tmp_path)
    full = tmp_path / "ADE20K_2021_17_01"
    (full / "images/ADE/training").mkdir(parents=True)
    with pytest.raises(DataError, match=r"images: holds neither training nor validation.*full ADE20K release"):
        _load(full, tmp_path)
    with pytest.raises(DataError, match="no option 'instances'"):
        _load(source, tmp_path, instances=True)


@pytest.mark.parametrize(
    "damaged", ["images/training/ADE_train_00000001.jpg", "annotations/validation/ADE_val_00000001.png"]
)
def test_damaged_files(source, tmp_path, damaged):
    path = source / "ADEChallengeData2016" / damaged
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=path.name.replace(".", r"\.")):
        _load(source, tmp_path)


def test_a_mask_of_another_size_or_kind(source, tmp_path):
    path = source / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png"
    mask = Image.open(path)
    mask.rotate(90, expand=True).save(path)
    with pytest.raises(DataError, match=r"ADE_train_00000001\.png: mask is 64x96"):
        _load(source, tmp_path)
    content = io.BytesIO()
    mask.convert("RGB").save(content, "PNG")
    path.write_bytes(content.getvalue())
    with pytest.raises(DataError, match=r"ADE_train_00000001\.png: mask has PIL mode 'RGB'"):
        _load(source, tmp_path)
