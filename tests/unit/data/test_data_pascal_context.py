"""PASCAL-Context: 459 labels to 60 classes by name, official archives and folders, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from layouts import pascal_context as layout
from PIL import Image

from pwcrf_jax.data import DataError, load_dataset
from pwcrf_jax.data.readers.image_io import voc_palette
from pwcrf_jax.data.sets.pascal_context import NAMES_IN_FULL_LIST

# What the detail API, by which others convert this data set, keeps of the 459 labels; in ascending order.
KEPT = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158,
    159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360,
    366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip


@pytest.fixture
def source(tmp_path):
    layout.make(tmp_path / "source", np.random.default_rng(0))
    return tmp_path / "source"


@pytest.fixture
def load(source, tmp_path):
    return lambda **kw: load_dataset(
        "pascal_context", **{"source_dir": str(source), "data_dir": str(tmp_path / "prepared"), "partial": True, **kw}
    )


def records(data, split):
    source = data.source(split)
    return {r["id"]: r for r in (source[i] for i in range(len(source)))}


def expected_classes(data):
    """Number -> class, from the names as the layout wrote them."""
    names = [NAMES_IN_FULL_LIST.get(name, name) for name in data.class_names]
    labels = [" ".join(name.split()) for name in layout.LABELS.split(";")]
    return np.array([0] + [names.index(label) if label in names else 0 for label in labels])


def test_all_459_labels(load, source):
    """One image that holds every number: those of the 59 classes keep their names, the rest and 0 are background."""
    numbers = np.arange(460, dtype=np.uint16).reshape(20, 23)
    layout.jpeg(source / "VOCdevkit/VOC2010/JPEGImages/2008_000003.jpg", np.random.default_rng(0), (20, 23))
    layout.write_mask(source / "trainval/2008_000003.mat", numbers)
    data = load()
    classes = records(data, "val")["2008_000003"]["label"].ravel()
    assert tuple(np.flatnonzero(classes)) == KEPT and sorted(classes[classes > 0]) == list(range(1, 60))
    np.testing.assert_array_equal(classes, expected_classes(data))
    # Spot checks, among them the three whose names differ.
    named = dict(zip(data.class_names, (int(np.flatnonzero(classes == k)[0]) for k in range(60)), strict=True))
    assert named["aeroplane"] == 2 and named["wood"] == 458 and named["tvmonitor"] == 427 and named["background"] == 0
    assert named["diningtable"] == 397 and named["clothes"] == 80 and named["bedcloth"] == 19


def test_folder(load, source):
    data = load()
    assert data.splits == {"train": 3, "val": 2} and data.unlabelled == ()
    assert data.num_classes == len(set(data.class_names)) == 60 and data.palette == voc_palette(60)
    assert data.class_names == ("background", *layout.LABELS_59.split())
    lookup = expected_classes(data)
    for split in data.splits:
        kit = source / "VOCdevkit/VOC2010"
        got = records(data, split)
        assert sorted(got) == sorted((kit / f"ImageSets/Main/{split}.txt").read_text().split())
        for name, record in got.items():
            numbers = scipy.io.loadmat(source / f"trainval/{name}.mat")["LabelMap"]
            np.testing.assert_array_equal(record["label"], lookup[numbers])
            assert record["label"].dtype == np.uint8 and len(np.unique(record["label"])) > 5
            np.testing.assert_array_equal(record["image"], np.asarray(Image.open(kit / f"JPEGImages/{name}.jpg")))


def test_archives_give_the_same_records(load, tmp_path):
    counts = layout.make(tmp_path / "archives", np.random.default_rng(0), archives=True)
    assert not any(p.is_dir() for p in (tmp_path / "archives").iterdir())
    packed, folder = load(source_dir=str(tmp_path / "archives")), load()
    assert packed.splits == folder.splits == counts
    for split in counts:
        a, b = records(packed, split), records(folder, split)
        assert sorted(a) == sorted(b)
        for name in a:
            np.testing.assert_array_equal(a[name]["image"], b[name]["image"])
            np.testing.assert_array_equal(a[name]["label"], b[name]["label"])


def own_folder(source):
    (source / "trainval").rename(source / "inner")
    (source / "trainval").mkdir()
    (source / "inner").rename(source / "trainval/trainval")
    (source / "labels.txt").rename(source / "trainval/labels.txt")


def in_the_devkit(source):
    for name in ("trainval", "labels.txt"):
        (source / name).rename(source / "VOCdevkit/VOC2010" / name)


def list_inside(source):
    (source / "labels.txt").rename(source / "trainval/labels.txt")


def flat(source):
    for path in (source / "VOCdevkit/VOC2010").iterdir():
        path.rename(source / path.name)


def without_devkit(source):
    (source / "VOCdevkit/VOC2010").rename(source / "VOC2010")


def one_packed(source):
    layout.pack(source / "VOCtrainval_03-May-2010.tar", source, ["VOCdevkit"])
    shutil.rmtree(source / "VOCdevkit")


def windows(source):
    for path in (source / "labels.txt", source / "VOCdevkit/VOC2010/ImageSets/Main/val.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


@pytest.mark.parametrize("change", [own_folder, in_the_devkit, list_inside, flat, without_devkit, one_packed, windows])
def test_other_layouts(load, source, change):
    before = records(load(), "val")
    change(source)
    after = load()
    assert after.splits == {"train": 3, "val": 2}
    for name, record in records(after, "val").items():
        np.testing.assert_array_equal(record["label"], before[name]["label"])


def test_an_absent_split_is_left_out(load, source):
    (source / "VOCdevkit/VOC2010/ImageSets/Main/val.txt").unlink()
    assert load().splits == {"train": 3}


def test_official_sizes(load, source):
    with pytest.raises(
        DataError, match=r"split 'train' .*train\.txt.* has 3 images, officially 4998.*trainval\.tar\.gz"
    ):
        load(partial=False)
    (source / "VOCdevkit/VOC2010/ImageSets/Main/train.txt").unlink()
    with pytest.raises(DataError, match=r"split 'val' .*has 2 images, officially 5105"):
        load(partial=False)


def test_another_label_list_is_prepared_again(load, source):
    before = load().folder
    path = source / "labels.txt"
    path.write_text(path.read_text().replace("2: aeroplane", "2: bag").replace("9: bag", "9: aeroplane"))
    assert load().folder != before


def remove(name):
    return lambda source: shutil.rmtree(source / name) if (source / name).is_dir() else (source / name).unlink()


def the_59_labels(source):
    shutil.copy(source / "59_labels.txt", source / "labels.txt")


def other_labels(source):
    (source / "labels.txt").write_text("<html>not found</html>")


def no_list(source):
    for split in ("train", "val"):
        (source / f"VOCdevkit/VOC2010/ImageSets/Main/{split}.txt").unlink()


def class_list(source):
    (source / "VOCdevkit/VOC2010/ImageSets/Main/val.txt").write_text("2008_000003 -1\n")


def no_archive(source):
    shutil.rmtree(source / "trainval")
    (source / "trainval.tar.gz").write_bytes(b"<html>not found</html>")


def pascal_part(source):
    (source / "trainval").rename(source / "Annotations_Part")
    layout.pack(source / "trainval.tar.gz", source, ["Annotations_Part"])


@pytest.mark.parametrize(
    "damage, match",
    [
        (remove("VOCdevkit"), r"no VOC 2010 devkit found; expected VOCtrainval_03-May-2010\.tar"),
        (remove("trainval"), r"no PASCAL-Context labels found; expected trainval\.tar\.gz"),
        (remove("labels.txt"), r"labels\.txt: cannot be read"),
        (the_59_labels, r"labels\.txt: no line 'NUMBER: table' among its 59 labels"),
        (other_labels, r"labels\.txt: no line 'NUMBER: aeroplane' among its 0 labels"),
        (no_list, r"ImageSets/Main: holds neither train\.txt nor val\.txt"),
        (class_list, r"val\.txt, line 1: '2008_000003 -1' is not a name"),
        (remove("trainval/2009_000015.mat"), r"2009_000015\.mat: mask is missing but .*Main/val\.txt names it"),
        (
            remove("VOCdevkit/VOC2010/JPEGImages/2010_002193.jpg"),
            r"2010_002193\.jpg: image is missing but .*train\.txt",
        ),
        (no_archive, r"trainval\.tar\.gz: cannot be unpacked"),
        (pascal_part, r"trainval\.tar\.gz: holds none of .*official archive"),
    ],
)
def test_refuses(load, source, damage, match):
    damage(source)
    with pytest.raises(DataError, match=match):
        load()


def write(**variables):
    return lambda path: scipy.io.savemat(path, variables)


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), r"cannot be read as a \.mat file"),
        (lambda path: path.write_bytes(b""), r"cannot be read as a \.mat file"),
        (write(anno=np.zeros((64, 96), np.uint8)), "no variable 'LabelMap'"),
        (write(LabelMap=np.full((64, 96), 460, np.uint16)), r"LabelMap, uint16 .*no matrix of integers in 0\.\.459"),
        (write(LabelMap=np.full((64, 96), -1, np.int16)), "LabelMap, int16"),
        (write(LabelMap=np.zeros((64, 96, 3), np.uint16)), r"LabelMap, uint16 of shape \(64, 96, 3\)"),
        (write(LabelMap="none"), "LabelMap, <U4"),
        (write(LabelMap=np.zeros((96, 64), np.uint16)), "mask is 64x96 pixels but its image .* is 96x64"),
    ],
)
def test_damaged_masks(load, source, damage, match):
    damage(source / "trainval/2008_000002.mat")
    with pytest.raises(DataError, match=rf"2008_000002\.mat: .*{match}"):
        load()


def test_numbers_as_matlab_doubles(load, source):
    path = source / "trainval/2008_000003.mat"
    before = records(load(), "val")["2008_000003"]["label"]
    layout.write_mask(path, scipy.io.loadmat(path)["LabelMap"].astype(np.float64))
    np.testing.assert_array_equal(records(load(), "val")["2008_000003"]["label"], before)


def test_source_dir_and_options(load, tmp_path):
    with pytest.raises(DataError, match=r"set data\.source_dir"):
        load(source_dir="")
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load(source_dir=str(Path(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="no option 'classes'"):
        load(classes=459)
