"""PASCAL VOC 2012 with SBD: archives and folders, train_aug, the unlabelled test split, and what is refused."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from layouts import voc as layout
from PIL import Image

from pwcrf_jax.data import DataError, load_dataset
from pwcrf_jax.data.readers.image_io import voc_palette


@pytest.fixture
def source(tmp_path):
    layout.make(tmp_path / "source", np.random.default_rng(0))
    return tmp_path / "source"


@pytest.fixture
def kit(source):
    return source / "VOCdevkit/VOC2012"


@pytest.fixture
def sbd(source):
    return source / "benchmark_RELEASE/dataset"


@pytest.fixture
def load(source, tmp_path):
    return lambda **kw: load_dataset(
        "voc", **{"source_dir": str(source), "data_dir": str(tmp_path / "prepared"), "partial": True, **kw}
    )


def records(data, split):
    source = data.source(split)
    return {r["id"]: r for r in (source[i] for i in range(len(source)))}


def png(path):
    return np.asarray(Image.open(path))


def mat(path):
    return scipy.io.loadmat(path)["GTcls"][0]["Segmentation"][0]


def names(path):
    return path.read_text().split()


def test_folder(load, kit):
    data = load()
    assert data.splits == {"train": 3, "val": 2, "trainval": 5, "test": 1, "train_aug": 5}
    assert data.num_classes == len(set(data.class_names)) == 21 and data.palette == voc_palette(21)
    for split in ("train", "val", "trainval"):
        got = records(data, split)
        assert sorted(got) == sorted(names(kit / f"ImageSets/Segmentation/{split}.txt"))
        for name, record in got.items():
            np.testing.assert_array_equal(record["label"], png(kit / f"SegmentationClass/{name}.png"))
            np.testing.assert_array_equal(record["image"], png(kit / f"JPEGImages/{name}.jpg"))
            assert {255, *record["label"].flat} > {255} and len(np.unique(record["label"])) > 5


def test_test_split_has_no_labels(load, kit):
    data = load()
    assert data.unlabelled == ("test",)
    (record,) = records(data, "test").values()
    assert (record["label"] == 255).all() and record["label"].shape == record["image"].shape[:2]
    np.testing.assert_array_equal(record["image"], png(kit / f"JPEGImages/{record['id']}.jpg"))
    with pytest.raises(DataError, match="'test'.*no public labels"):
        data.check_labelled("test")


def test_train_aug_is_the_union_without_val(load, kit, sbd):
    got = records(load(), "train_aug")
    listed = {*layout.TRAIN, *layout.SBD_TRAIN, *layout.SBD_VAL}
    assert set(got) == listed - set(layout.VAL) and listed & set(layout.VAL)
    for name, record in got.items():
        expected = png(kit / f"SegmentationClass/{name}.png") if name in layout.TRAIN else mat(sbd / f"cls/{name}.mat")
        np.testing.assert_array_equal(record["label"], expected)
        np.testing.assert_array_equal(record["image"], png(kit / f"JPEGImages/{name}.jpg"))
    both = set(layout.TRAIN) & set(layout.SBD_TRAIN)
    assert both and not np.array_equal(got[both.pop()]["label"], mat(sbd / "cls/2008_000008.mat"))


def test_archives_give_the_same_records(load, tmp_path):
    counts = layout.make(tmp_path / "archives", np.random.default_rng(0), archives=True)
    assert sorted(p.name for p in (tmp_path / "archives").iterdir()) == [
        "VOC2012test.tar",
        "VOCtrainval_11-May-2012.tar",
        "benchmark.tgz",
    ]
    packed, folder = load(source_dir=str(tmp_path / "archives")), load()
    assert packed.splits == folder.splits == counts and packed.unlabelled == folder.unlabelled
    for split in counts:
        a, b = records(packed, split), records(folder, split)
        assert sorted(a) == sorted(b)
        for name in a:
            np.testing.assert_array_equal(a[name]["image"], b[name]["image"])
            np.testing.assert_array_equal(a[name]["label"], b[name]["label"])


@pytest.mark.parametrize(
    "kept, splits",
    [
        (["VOCtrainval_11-May-2012.tar"], {"train": 3, "val": 2, "trainval": 5}),
        (["VOC2012test.tar"], {"test": 1}),
        (["VOCtrainval_11-May-2012.tar", "benchmark.tgz"], {"train": 3, "val": 2, "trainval": 5, "train_aug": 5}),
    ],
)
def test_optional_archives(load, tmp_path, kept, splits):
    layout.make(tmp_path / "archives", np.random.default_rng(0), archives=True)
    for path in (tmp_path / "archives").iterdir():
        if path.name not in kept:
            path.unlink()
    assert load(source_dir=str(tmp_path / "archives")).splits == splits


def test_an_archive_beside_a_folder(load, source, sbd):
    """SBD packed, VOC unpacked."""
    layout.pack(source / "benchmark.tgz", source, ["benchmark_RELEASE"])
    expected = load().splits
    shutil.rmtree(source / "benchmark_RELEASE")
    assert load().splits == expected


@pytest.mark.parametrize("where", ["VOCdevkit", "VOCdevkit/VOC2012"])
def test_nearer_folders(load, source, where):
    assert load(source_dir=str(source / where)).splits == {"train": 3, "val": 2, "trainval": 5, "test": 1}
    shutil.move(source / "benchmark_RELEASE", source / where)
    assert load(source_dir=str(source / where)).splits["train_aug"] == 5


def test_own_train_aug_list_comes_first(load, kit, sbd):
    """With PNG masks alone, as users of the enlarged set have it; SBD's only for names without one."""
    (kit / "ImageSets/Segmentation/train_aug.txt").write_text("2008_000003\n2007_000032\n")
    Image.fromarray(np.full((64, 96), 7, np.uint8)).save(kit / "SegmentationClass/2008_000003.png")
    got = records(load(), "train_aug")
    assert set(got) == {"2008_000003", "2007_000032"} and (got["2008_000003"]["label"] == 7).all()
    (kit / "SegmentationClass/2008_000003.png").unlink()
    got = records(load(), "train_aug")
    np.testing.assert_array_equal(got["2008_000003"]["label"], mat(sbd / "cls/2008_000003.mat"))
    shutil.rmtree(sbd)
    with pytest.raises(DataError, match=r"2008_000003\.png: mask is missing but .*train_aug\.txt"):
        load()


def test_sbd_masks_do_not_fill_gaps_of_other_splits(load, kit):
    (kit / "SegmentationClass/2007_000033.png").unlink()  # of val; SBD has it
    with pytest.raises(DataError, match=r"2007_000033\.png: mask is missing but .*val\.txt names it"):
        load()


def test_lists_without_masks(load, kit, caplog):
    """A test list without images, as in the archive for training, and another list without masks."""
    (kit / "JPEGImages/2008_000006.jpg").unlink()
    (kit / "ImageSets/Segmentation/mine.txt").write_text("2008_000002\n")
    with caplog.at_level(logging.WARNING):
        assert load().splits == {"train": 3, "val": 2, "trainval": 5, "train_aug": 5}
    assert "mine.txt: left out" in caplog.text and "test.txt: left out" in caplog.text


def test_masks_gone_is_no_unlabelled_set(load, kit):
    shutil.rmtree(kit / "SegmentationClass")
    with pytest.raises(DataError, match=r"SegmentationClass: holds no mask"):
        load()


def test_a_test_list_with_masks_is_labelled(load, kit):
    Image.fromarray(np.full((64, 96), 7, np.uint8)).save(kit / "SegmentationClass/2008_000006.png")
    data = load()
    assert data.unlabelled == () and (data.source("test")[0]["label"] == 7).all()


@pytest.mark.parametrize(
    "split, official", [("train", 1464), ("val", 1449), ("trainval", 2913), ("test", 1456), ("train_aug", 10582)]
)
def test_official_sizes(load, kit, split, official):
    for path in (kit / "ImageSets/Segmentation").iterdir():
        path.unlink()
    layout.name_list(kit / f"ImageSets/Segmentation/{split}.txt", layout.TRAIN)
    shutil.rmtree(kit.parents[1] / "benchmark_RELEASE")
    with pytest.raises(
        DataError, match=rf"split '{split}' .*{split}\.txt.* has 3 images, officially {official}.*partial"
    ):
        load(partial=False)
    assert load().splits == {split: 3}


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def another_variable(path):
    scipy.io.savemat(path, {"GTinst": {"Segmentation": np.zeros((64, 96), np.uint8)}})


def no_segmentation(path):
    scipy.io.savemat(path, {"GTcls": {"Boundaries": np.zeros((64, 96), np.uint8)}})


def no_struct(path):
    scipy.io.savemat(path, {"GTcls": np.zeros((64, 96), np.uint8)})


def fractions(path):
    scipy.io.savemat(path, {"GTcls": {"Segmentation": np.full((64, 96), 0.5)}})


def class_21(path):
    scipy.io.savemat(path, {"GTcls": {"Segmentation": np.full((64, 96), 21, np.uint8)}})


def turned(path):
    scipy.io.savemat(path, {"GTcls": {"Segmentation": np.zeros((96, 64), np.uint8)}})


@pytest.mark.parametrize(
    "damage, match",
    [
        (Path.unlink, "mask is missing but .*train.txt names it"),
        (cut, "cannot be read as a .mat file"),
        (another_variable, "no variable 'GTcls'"),
        (no_segmentation, "GTcls.Segmentation"),
        (no_struct, "GTcls.Segmentation"),
        (fractions, "GTcls.Segmentation, float64 .*no matrix of integers in 0..255"),
        (class_21, "label value 21"),
        (turned, "mask is 64x96 pixels but its image .* is 96x64"),
    ],
)
def test_damaged_sbd_masks(load, sbd, damage, match):
    damage(sbd / "cls/2008_000002.mat")
    with pytest.raises(DataError, match=rf"2008_000002\.mat: .*{match}"):
        load()


def test_damaged_sbd(load, source, kit, sbd):
    (sbd / "img/2008_000003.jpg").unlink()
    with pytest.raises(DataError, match=r"dataset/img/2008_000003\.jpg: image is missing but .*dataset/val\.txt"):
        load()
    (sbd / "val.txt").unlink()
    with pytest.raises(DataError, match=r"benchmark_RELEASE/dataset/val\.txt: cannot be read"):
        load()
    shutil.rmtree(sbd)
    (source / "benchmark.tgz").write_bytes(b"not an archive")
    with pytest.raises(DataError, match=r"benchmark\.tgz: cannot be unpacked"):
        load()


def test_train_aug_needs_the_val_list(load, kit):
    """Without it the images of VOC's val would be trained on."""
    for split in ("val", "trainval"):
        (kit / f"ImageSets/Segmentation/{split}.txt").unlink()
    with pytest.raises(DataError, match=r"Segmentation/val\.txt: cannot be read"):
        load()


@pytest.mark.parametrize(
    "content", [b"\0\0\0\n", bytes(range(128, 256)), b"2008_000002 1\n", b"JPEGImages/2008_000002\n"]
)
def test_garbled_lists(load, kit, content):
    (kit / "ImageSets/Segmentation/val.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"Segmentation/val\.txt"):
        load()


def test_lists_from_windows(load, kit):
    path = kit / "ImageSets/Segmentation/val.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(name.encode() for name in layout.VAL) + b"\r\n")
    assert load().splits["val"] == 2


BOXES = "<annotation><object><name>{}</name><part><name>head</name></part></object></annotation>"


@pytest.mark.parametrize("name", ["leaf", "road sign", "Kind 3", "背景"])
def test_boxes_of_own_classes_are_refused(load, kit, name):
    (kit / "Annotations").mkdir()
    (kit / "Annotations/2007_000033.xml").write_text(BOXES.format(name), encoding="utf-8")
    with pytest.raises(DataError, match=rf"33\.xml: has objects of classes of its own \({name}\).*_folder"):
        load()


@pytest.mark.parametrize("text", [BOXES.format("person"), BOXES.format("TVmonitor"), "<annotation/>", "damaged <", ""])
def test_boxes_of_vocs_classes_are_taken(load, kit, text):
    (kit / "Annotations").mkdir()
    (kit / "Annotations/2007_000033.xml").write_text(text)
    assert load().splits


@pytest.mark.parametrize("name", ["benchmark.tgz", "benchmark_RELEASE"])
def test_sbd_that_is_a_link_to_nothing_is_not_passed_over(load, source, name):
    """Without it there would be no train_aug, and no word."""
    shutil.rmtree(source / "benchmark_RELEASE")
    (source / name).symlink_to(source / "gone")
    with pytest.raises(DataError, match=rf"{name}: is a link to nothing"):
        load()
