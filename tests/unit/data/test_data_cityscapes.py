"""Cityscapes: label ids become training classes, from folders and archives; what is missing is named."""

import numpy as np
import pytest
from layouts import cityscapes as layout
from PIL import Image

from pwcrf_jax.data import load_dataset
from pwcrf_jax.data.readers.image_io import DataError
from pwcrf_jax.data.sets.cityscapes import TRAIN_TO_LABEL_ID, Cityscapes

# The official table of scored labels, by name.
LABEL_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source"
    layout.make(root, np.random.default_rng(0))
    return root


def _load(root, tmp_path, **options):
    return load_dataset("cityscapes", source_dir=str(root), data_dir=str(tmp_path / "data"), partial=True, **options)


def _records(dataset):
    return {(split, r["id"]): r for split in dataset.splits for r in dataset.source(split)}


def _file(root, kind, split, frame):
    end = {"leftImg8bit": "leftImg8bit", "gtFine": "gtFine_labelIds"}[kind]
    return root / kind / split / frame.split("_")[0] / f"{frame}_{end}.png"


def test_images_and_labels(source, tmp_path):
    dataset = _load(source, tmp_path)
    assert dataset.splits == {"train": 2, "val": 1, "test": 1} and dataset.unlabelled == ("test",)
    assert dataset.class_names == tuple(LABEL_IDS) and len(set(dataset.palette)) == 19
    assert TRAIN_TO_LABEL_ID == tuple(LABEL_IDS.values())
    assert dataset.palette[dataset.class_names.index("rider")] == (255, 0, 0)
    classes = {label_id: index for index, label_id in enumerate(LABEL_IDS.values())}
    records = _records(dataset)
    for split, frames in layout.FRAMES.items():
        for frame in frames:
            record = records.pop((split, frame))
            np.testing.assert_array_equal(
                record["image"], np.asarray(Image.open(_file(source, "leftImg8bit", split, frame)))
            )
            ids = np.asarray(Image.open(_file(source, "gtFine", split, frame)))
            expected = [[classes.get(i, 255) if split != "test" else 255 for i in row] for row in ids.tolist()]
            np.testing.assert_array_equal(record["label"], expected)
            assert len(np.unique(expected)) == (20 if split != "test" else 1)
    assert not records


def test_archives(source, tmp_path):
    layout.make(tmp_path / "zipped", np.random.default_rng(0), archives=True)
    assert {p.name for p in (tmp_path / "zipped").iterdir()} == {
        "gtFine_trainvaltest.zip",
        "leftImg8bit_trainvaltest.zip",
    }
    zipped, plain = (_records(_load(root, tmp_path)) for root in (tmp_path / "zipped", source))
    assert zipped.keys() == plain.keys()
    for key in plain:
        for field in ("image", "label"):
            np.testing.assert_array_equal(zipped[key][field], plain[key][field])


def test_one_folder_and_one_archive(source, tmp_path):
    layout.pack(source / "gtFine_trainvaltest.zip", source, "gtFine")
    dataset = _load(source, tmp_path)
    assert dataset.splits == {"train": 2, "val": 1, "test": 1} and (dataset.source("val")[0]["label"] < 19).any()


def test_only_what_is_there(source, tmp_path):
    for split in ("train", "test"):
        (source / "leftImg8bit" / split).rename(tmp_path / split)
    assert _load(source, tmp_path).splits == {"val": 1}


def test_train_ids_are_not_needed_and_test_is_never_labelled(source, tmp_path):
    assert not list(source.rglob("*labelTrainIds.png"))
    for path in (source / "gtFine" / "test").rglob("*.png"):
        path.unlink()
    assert (_load(source, tmp_path).source("test")[0]["label"] == 255).all()


def test_licence_plates_and_unknown_ids(source, tmp_path):
    path = _file(source, "gtFine", "val", layout.FRAMES["val"][0])
    ids = np.asarray(Image.open(path)).copy()
    ids[:8, :8] = 255  # -1 in 8 bits
    Image.fromarray(ids).save(path)
    assert (_load(source, tmp_path).source("val")[0]["label"][:8, :8] == 255).all()
    ids[0, 0] = 34
    Image.fromarray(ids).save(path)
    with pytest.raises(DataError, match=r"frankfurt_000000_000294_gtFine_labelIds\.png: label id 34 "):
        _load(source, tmp_path)


def test_official_sizes(source, tmp_path):
    assert Cityscapes.split_sizes == {"train": 2975, "val": 500, "test": 1525}
    with pytest.raises(DataError, match=r"'train'.* 2 images, officially 2975.*gtFine_trainvaltest\.zip"):
        load_dataset("cityscapes", source_dir=str(source), data_dir=str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("leftImg8bit", r"leftImg8bit_trainvaltest\.zip"),
        ("gtFine", r"gtFine_trainvaltest\.zip"),
        ("gtFine/val", r"frankfurt_000000_000294_gtFine_labelIds\.png: mask is missing"),
        ("leftImg8bit/val/frankfurt", r"leftImg8bit/val: no image"),
    ],
)
def test_missing_parts(source, tmp_path, missing, message):
    (source / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=message):
        _load(source, tmp_path)


def test_wrong_folders(source, tmp_path):
    with pytest.raises(DataError, match=r"leftImg8bit: neither .*holds both leftImg8bit and gtFine"):
        _load(source / "leftImg8bit", tmp_path)
    for split in layout.FRAMES:
        (source / "leftImg8bit" / split).rename(tmp_path / split)
    with pytest.raises(DataError, match="leftImg8bit: holds none of the folders train, val, test"):
        _load(source, tmp_path)
    with pytest.raises(DataError, match="no option 'coarse'"):
        _load(source, tmp_path, coarse=True)


def test_a_missing_archive_is_named_before_the_other_is_unpacked(tmp_path):
    for missing in ("gtFine", "leftImg8bit"):
        root = tmp_path / missing
        layout.make(root, np.random.default_rng(0), archives=True)
        (root / f"{missing}_trainvaltest.zip").unlink()
        with pytest.raises(DataError, match=rf"{missing}_trainvaltest\.zip is there"):
            _load(root, tmp_path)
    assert not list((tmp_path / "data").rglob("*_leftImg8bit.png"))


@pytest.mark.parametrize("kind", ["leftImg8bit", "gtFine"])
def test_damaged_files(source, tmp_path, kind):
    path = _file(source, kind, "train", layout.FRAMES["train"][1])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=path.name.replace(".", r"\.")):
        _load(source, tmp_path)


def test_a_mask_of_another_size_or_kind(source, tmp_path):
    path = _file(source, "gtFine", "train", layout.FRAMES["train"][0])
    Image.open(path).resize((48, 32), Image.Resampling.NEAREST).save(path)
    with pytest.raises(DataError, match="aachen_000000_000019_gtFine_labelIds.png: mask is 48x32"):
        _load(source, tmp_path)
    path.write_bytes(path.with_name("aachen_000000_000019_gtFine_color.png").read_bytes())
    with pytest.raises(DataError, match="aachen_000000_000019_gtFine_labelIds.png: mask has PIL mode 'RGBA'"):
        _load(source, tmp_path)
