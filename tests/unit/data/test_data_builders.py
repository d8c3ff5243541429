"""CamVid and VOC builders on tiny trees, what they refuse, and staleness of prepared data."""

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pwcrf_jax.data import DataError, load_dataset


@pytest.fixture
def load(tree, tmp_path):
    """Loads the tree as the named data set."""
    return lambda name, **kw: load_dataset(
        name,
        **{"source_dir": str(tree.root), "data_dir": str(tmp_path / "prepared"), "partial": True, **kw},
    )


def records(data, split):
    source = data.source(split)
    return {r["id"]: r for r in (source[i] for i in range(len(source)))}


def test_camvid_records_are_the_files(camvid, load):
    label = np.zeros((20, 30), np.uint8)
    label[5:], label[10:] = 10, 11
    camvid.mask("trainannot/img1.png", label)
    data = load("camvid")
    assert data.name == "camvid" and data.splits == {"train": 3, "val": 2}
    assert data.num_classes == len(data.class_names) == 11 and data.class_names[8] == "Car"
    got = records(data, "train")
    assert sorted(got) == ["img0", "img1", "img2"]
    record = got["img1"]
    assert record["image"].dtype == record["label"].dtype == np.uint8 and isinstance(record["id"], str)
    np.testing.assert_array_equal(record["label"], np.where(label == 11, 255, label))
    np.testing.assert_array_equal(record["image"], Image.open(camvid.root / "train/img1.jpg").convert("RGB"))


@pytest.mark.parametrize("lists", [True, False])
def test_camvid_public_layout(tree, load, lists):
    for split, count in (("train", 2), ("val", 1), ("test", 3)):
        lines = []
        for i in range(count):
            image, mask = f"{split}/000{i}TP.png", f"{split}annot/000{i}TP.png"
            tree.image(image)
            tree.mask(mask)
            lines.append(f"/SegNet/CamVid/{image} /SegNet/CamVid/{mask};\n")
        if lists:
            tree.text(f"{split}.txt", "".join(lines) + "\n")
    data = load("camvid")
    assert data.splits == {"train": 2, "val": 1, "test": 3}
    assert set(records(data, "test")) == {"0000TP", "0001TP", "0002TP"}


def test_grey_images_become_rgb(camvid, load):
    grey = np.full((20, 30), 77, np.uint8)
    Image.fromarray(grey).save(camvid.root / "train/img0.jpg", quality=100)
    image = records(load("camvid"), "train")["img0"]["image"]
    assert image.shape == (20, 30, 3) and (image == 77).all()


def test_voc_palette_masks_and_splits(voc, load, caplog):
    with caplog.at_level(logging.WARNING):
        data = load("voc")
    assert data.splits == {"train": 3, "val": 1} and data.num_classes == 21
    assert data.class_names[0] == "background" and data.class_names[20] == "tvmonitor"
    label = records(data, "train")["b"]["label"]
    assert (label[:4] == 20).all() and (label[4:8] == 255).all() and (label[8:] == 0).all()
    assert "test.txt: left out" in caplog.text
    with pytest.raises(DataError, match=r"no split 'test'.*train \(3\), val \(1\)"):
        data.source("test")


@pytest.mark.parametrize("nested", ["VOC2012", "VOCdevkit/VOC2012"])
def test_voc_in_a_parent_folder(voc, load, tmp_path, nested):
    target = tmp_path / "outer" / nested
    target.parent.mkdir(parents=True)
    shutil.move(voc.root, target)
    assert load("voc", source_dir=str(tmp_path / "outer")).splits == {"train": 3, "val": 1}


def test_slices(camvid, load):
    data = load("camvid")
    whole = [data.source("train")[i]["id"] for i in range(3)]
    assert [data.source("train[1:]")[i]["id"] for i in range(2)] == whole[1:]
    assert len(data.source("train[:34%]+val")) == 3
    assert len(data.source("train[-1:]")) == 1
    for split, match in (
        ("train[:0]", "selects no records"),
        ("train[:x]", "cannot be read"),
        ("trian", r"no split 'trian'.*train \(3\)"),
        ("train+tset", "no split 'tset'"),
        ("", "no split ''"),
    ):
        with pytest.raises(DataError, match=match):
            data.source(split)
    for index in (3, -1):
        with pytest.raises(IndexError):
            data.source("train")[index]


def test_prepares_once_with_one_log_line(camvid, load, caplog, capfd):
    with caplog.at_level(logging.INFO):
        load("camvid")
    assert [r.message for r in caplog.records if "Prepared camvid (train 3, val 2)" in r.message]
    assert len(caplog.records) == 1
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load("camvid").source("val")
    assert not caplog.records
    assert capfd.readouterr().out == ""


# Refusals ---------------------------------------------------------------------------------------------


def missing_image(t):
    (t.root / "train/img1.jpg").unlink()


def missing_mask(t):
    (t.root / "valannot/img1.png").unlink()


def truncated_image(t):
    path = t.root / "train/img1.jpg"
    path.write_bytes(path.read_bytes()[:-300])


def truncated_mask(t):
    path = t.root / "trainannot/img1.png"
    path.write_bytes(path.read_bytes()[:-40])


def flipped_bit_in_mask(t):
    path = t.root / "trainannot/img1.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def zero_bytes(t):
    (t.root / "train/img1.jpg").write_bytes(b"")


def no_image(t):
    (t.root / "train/img1.jpg").write_text("<html>not found</html>")


def other_size(t):
    t.mask("trainannot/img1.png", size=(30, 20))


def out_of_range(t):
    t.mask("trainannot/img1.png", np.full((20, 30), 12, np.uint8))


def rgb_mask(t):
    t.image("trainannot/img1.png")


def deep_mask(t):
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(t.root / "trainannot/img1.png")


def bit_mask(t):
    Image.fromarray(np.zeros((20, 30), bool)).save(t.root / "trainannot/img1.png")


def empty_list(t):
    t.text("val.txt", "\n")


def empty_folder(t):
    (t.root / "val.txt").unlink()
    shutil.rmtree(t.root / "val")
    (t.root / "val").mkdir()


def one_column(t):
    t.text("val.txt", "val/img0.jpg\n")


def named_twice(t):
    t.text("val.txt", "val/img0.jpg valannot/img0.png\n" * 2)


@pytest.mark.parametrize(
    "damage, match",
    [
        (missing_image, r"train/img1\.jpg: image is missing but .*train\.txt names it"),
        (missing_mask, r"valannot/img1\.png: mask is missing but .*val\.txt names it"),
        (truncated_image, r"train/img1\.jpg: cannot be decoded.*truncated.*restore"),
        (truncated_mask, r"trainannot/img1\.png: cannot be decoded"),
        (flipped_bit_in_mask, r"trainannot/img1\.png: cannot be decoded"),
        (zero_bytes, r"train/img1\.jpg: the file is empty \(0 bytes\)"),
        (no_image, r"train/img1\.jpg: cannot be decoded"),
        (other_size, r"trainannot/img1\.png: mask is 20x30 pixels but its image .*img1\.jpg is 30x20"),
        (out_of_range, r"trainannot/img1\.png: label value 12 is .*\(0\.\.10\) nor void \(11\)"),
        (rgb_mask, r"trainannot/img1\.png: mask has PIL mode 'RGB'.*convert"),
        (deep_mask, r"trainannot/img1\.png: mask has PIL mode 'I;16'.*convert"),
        (bit_mask, r"trainannot/img1\.png: mask has PIL mode '1'.*convert"),
        (empty_list, r"val\.txt: the list is empty"),
        (empty_folder, r"val: split 'val' is empty"),
        (one_column, r"val\.txt, line 1: 'val/img0\.jpg' is not 'image mask'"),
        (named_twice, r"val\.txt: 'img0' is in split 'val' twice"),
    ],
)
def test_camvid_refuses(camvid, load, tmp_path, damage, match):
    damage(camvid)
    with pytest.raises(DataError, match=match):
        load("camvid")
    assert not list((tmp_path / "prepared").rglob("*.array_record*"))


def test_voc_refuses(voc, load):
    voc.text("ImageSets/Segmentation/val.txt", "d\nmissing\n")
    with pytest.raises(DataError, match=r"missing\.jpg: image is missing but .*val\.txt names it"):
        load("voc")
    voc.text("ImageSets/Segmentation/val.txt", "/JPEGImages/d.jpg /SegmentationClass/d.png\n")
    with pytest.raises(DataError, match=r"val\.txt, line 1.*one NAME per line"):
        load("voc")
    voc.text("ImageSets/Segmentation/val.txt", "")
    with pytest.raises(DataError, match=r"val\.txt: the list is empty"):
        load("voc")
    voc.text("ImageSets/Segmentation/val.txt", "d\n")
    voc.text("ImageSets/Segmentation/my-split.txt", "d\n")
    with pytest.raises(DataError, match=r"'my-split' cannot be a split name; rename"):
        load("voc")
    (voc.root / "ImageSets/Segmentation/my-split.txt").unlink()
    voc.mask("SegmentationClass/d.png", np.full((20, 30), 21, np.uint8), palette=True)
    with pytest.raises(DataError, match=r"d\.png: label value 21 .*0\.\.20.*255"):
        load("voc")
    shutil.rmtree(voc.root / "SegmentationClass")
    with pytest.raises(DataError, match=r"SegmentationClass: holds no mask"):
        load("voc")


@pytest.mark.parametrize("name", ["camvid", "voc"])
def test_wrong_source_dir(name, load, tmp_path):
    with pytest.raises(DataError, match=r"set data\.source_dir"):
        load(name, source_dir="")
    with pytest.raises(DataError, match=r"data\.source_dir: .*nowhere is not a folder"):
        load(name, source_dir=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no (CamVid split|VOC devkit) found; expected"):
        load(name, source_dir=str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no option 'num_train'"):
        load(name, num_train=3)


def test_unknown_name():
    with pytest.raises(DataError, match="unknown data set 'camvdi', did you mean 'camvid'"):
        load_dataset("camvdi")


def test_unwritable_data_dir(camvid, load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*cannot be written.*data\.data_dir"):
        load("camvid", data_dir=str(tmp_path / "file"))


# Staleness and damage of what is prepared --------------------------------------------------------------


def test_changed_source_is_prepared_again(camvid, load):
    before = load("camvid")
    assert load("camvid").folder == before.folder
    label = camvid.mask("trainannot/img0.png", np.full((20, 30), 3, np.uint8))
    stat = os.stat(camvid.root / "trainannot/img0.png")
    after = load("camvid")
    assert after.folder != before.folder
    np.testing.assert_array_equal(records(after, "train")["img0"]["label"], label)
    # The same size at another time, and a shorter list, are changes too.
    os.utime(camvid.root / "trainannot/img0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert load("camvid").folder not in (before.folder, after.folder)
    camvid.text("val.txt", "val/img1.jpg valannot/img1.png\n")
    assert load("camvid").splits == {"train": 3, "val": 1}


def test_repair_after_refusal_and_leftovers_of_a_killed_run(camvid, load):
    good = (camvid.root / "train/img2.jpg").read_bytes()
    (camvid.root / "train/img2.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="img2"):
        load("camvid")
    (camvid.root / "train/img2.jpg").write_bytes(good)
    data = load("camvid")
    home = Path(data.folder).parent
    shutil.rmtree(data.folder)
    (home / "incomplete.ABC123_1.0.0").mkdir()
    (home / "incomplete.ABC123_1.0.0/part").write_text("half")
    assert load("camvid").splits == data.splits
    assert not list(home.glob("incomplete.*"))


def test_damaged_records_name_the_folder(camvid, load):
    folder = load("camvid").folder
    shard = next(Path(folder).glob("*-train.array_record*"))
    data = bytearray(shard.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    shard.write_bytes(data)
    with pytest.raises(DataError, match=rf"{re.escape(folder)}.*cannot be read.*delete this folder"):
        records(load("camvid"), "train")
    shard.unlink()
    with pytest.raises(DataError, match=rf"{re.escape(folder)}.*cannot be read.*delete this folder"):
        records(load("camvid"), "train")


def test_damaged_description_names_the_folder(camvid, load):
    folder = Path(load("camvid").folder)
    for damage in (lambda p: p.write_text("{"), lambda p: p.unlink()):
        damage(folder / "dataset_info.json")
        with pytest.raises(DataError, match=rf"{re.escape(str(folder.parent))}.*delete this folder"):
            load("camvid")


def test_two_processes_prepare_at_once(camvid, tmp_path):
    code = (
        "import sys; from pwcrf_jax.data import load_dataset; "
        "print(load_dataset('camvid', source_dir=sys.argv[1], data_dir=sys.argv[2], partial=True).splits)"
    )
    repo = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", code, str(camvid.root), str(tmp_path / "prepared")]
    runs = [subprocess.Popen(command, cwd=repo, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        assert run.communicate(timeout=120)[0].strip() == "{'train': 3, 'val': 2}"
        assert run.returncode == 0


# Real data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, folder, counts",
    [
        ("camvid", "camvid", {"train": 367, "val": 101}),
        pytest.param("voc", "voc2012_animals", {"train": 437, "train_aug": 1000, "val": 222}, marks=pytest.mark.slow),
    ],
)
def test_real_data(tmp_path, name, folder, counts):
    default = Path(__file__).resolve().parents[4] / "shared" / "data"
    path = Path(os.environ.get("PWCRF_DATA", default)) / folder
    if not path.is_dir():
        pytest.skip(f"no {folder} in PWCRF_DATA or ../shared/data")
    data = load_dataset(name, source_dir=str(path), data_dir=str(tmp_path), partial=name == "voc")
    assert data.splits == counts
    source = data.source("val")
    for index in range(0, len(source), 20):
        record = source[index]
        assert record["label"].shape == record["image"].shape[:2]
        assert set(np.unique(record["label"])) <= {*range(data.num_classes), 255}
