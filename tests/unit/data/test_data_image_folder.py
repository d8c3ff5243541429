"""A user's own folder of images and masks: read back as written, splits, classes.txt, EXIF, and what is refused."""

import json
import os
import shutil

import numpy as np
import pytest
from layouts import image_folder as layout
from PIL import Image

from pwcrf_jax.data import DataError, load_dataset
from pwcrf_jax.data.readers.classes import read_classes
from pwcrf_jax.data.sets.image_folder import ImageFolder


@pytest.fixture
def root(tmp_path):
    return tmp_path / "own"


@pytest.fixture
def load(root, tmp_path):
    return lambda **kw: load_dataset("image_folder", source_dir=str(root), data_dir=str(tmp_path / "prepared"), **kw)


@pytest.fixture
def make(root):
    return lambda **kw: layout.make(root, np.random.default_rng(3), **kw)


def records(data, split):
    source = data.source(split)
    return {r["id"]: r for r in (source[i] for i in range(len(source)))}


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("colours", [False, True])
def test_read_back_as_written(make, load, root, lists, colours):
    counts = make(lists=lists, colours=colours)
    data = load()
    assert sum(data.splits.values()) == sum(counts.values())
    assert data.class_names == layout.NAMES and data.num_classes == 3
    assert data.unlabelled == (("test",) if lists else ())
    if colours:
        assert data.palette == layout.COLOURS
    if lists:
        assert data.splits == counts
        got = {split: records(data, split) for split in data.splits}
        assert set(got["train"]) == {"a", "b", "inner city/c", "d", "e", "f"}
        assert set(got["val"]) == {"été", "inner city/a"} and set(got["test"]) == {"g"}
        assert (got["test"]["g"]["label"] == 255).all()
    else:
        assert data.splits == {"train": 7, "val": 1}
        got = {"train": records(data, "train") | records(data, "val")}
    rng = np.random.default_rng(3)
    for split, files in layout.IMAGES.items():
        for file in files if lists or split != "test" else ():
            record = (got.get(split) or got["train"])[file.rsplit(".", 1)[0]]
            pixels = layout.image(rng)
            with Image.open(root / "images" / file) as im:
                np.testing.assert_array_equal(record["image"], im.convert("RGB"))
                if im.format != "JPEG":  # without loss
                    np.testing.assert_array_equal(record["image"], pixels)
            if split != "test":
                np.testing.assert_array_equal(record["label"], layout.label(rng))


def test_only_jpeg_and_png_are_stored(make, load, root):
    make()
    data = load()
    source = data.source("train")
    stored = {source[i]["id"]: source._raw(i)[0]["image"] for i in range(len(source))}
    assert stored["a"] == (root / "images/a.jpg").read_bytes()
    assert stored["inner city/c"] == (root / "images/inner city/c.png").read_bytes()
    assert all(stored[key].startswith(b"\x89PNG") for key in "def")


# Splits -----------------------------------------------------------------------------------------------


def planned(root, **options):
    return {s: [p.id for p in pairs] for s, pairs in ImageFolder.plan(str(root), **options).splits.items()}


@pytest.fixture
def many(root):
    layout.write_classes(root)
    for i in range(60):
        for folder in ("images", "masks"):
            (root / folder).mkdir(exist_ok=True)
            (root / folder / f"{i:03}.png").touch()
    return root


def test_a_drawn_split_is_fixed_by_seed_and_ids(many, monkeypatch):
    before = planned(many, val_fraction=0.2, seed=5)
    assert len(before["val"]) == 12 and len(before["train"]) == 48
    scandir = os.scandir

    class Backwards(list):
        def __init__(self, path):
            super().__init__(sorted(scandir(path), key=lambda entry: entry.name, reverse=True))

        __enter__ = lambda self: self
        __exit__ = lambda self, *_: None

    monkeypatch.setattr(os, "scandir", Backwards)
    assert planned(many, val_fraction=0.2, seed=5) == before
    assert planned(many, val_fraction=0.2, seed=6) != before
    moved = shutil.move(many, many.parent / "elsewhere")
    assert planned(moved, val_fraction=0.2, seed=5) == before


def test_one_more_image_moves_at_most_one(many):
    before = planned(many)
    for i in range(60, 90):
        for folder in ("images", "masks"):
            (many / folder / f"{i:03}.png").touch()
        after = planned(many)
        assert len(after["val"]) == round(0.1 * (i + 1))
        for a, b in (("train", "val"), ("val", "train")):
            assert len(set(before[a]) & set(after[b])) <= 1
        before = after


def test_small_folders_have_both_splits(many):
    for path in [*(many / "images").iterdir(), *(many / "masks").iterdir()]:
        if path.stem not in ("000", "001"):
            path.unlink()
    for fraction in (0.01, 0.5, 0.99):
        assert {s: len(ids) for s, ids in planned(many, val_fraction=fraction).items()} == {"train": 1, "val": 1}
    (many / "images/001.png").unlink()
    (many / "masks/001.png").unlink()
    with pytest.raises(DataError, match=r"images: holds one image; .*train\.txt"):
        planned(many)


@pytest.mark.parametrize("value", [0, 1, -0.1, 2, "0.1", None])
def test_bad_options(many, value):
    with pytest.raises(DataError, match=r"val_fraction: .*0\.1"):
        planned(many, val_fraction=value)
    with pytest.raises(DataError, match=r"seed: 'x' is no int, such as 0"):
        planned(many, seed="x")
    with pytest.raises(DataError, match=r"no option 'val_share'; its options: val_fraction, seed"):
        planned(many, val_share=0.1)


def test_lists_take_ids_and_file_names(many):
    (many / "images/dir").mkdir()
    (many / "masks/dir").mkdir()
    for stem in ("a b", "c.d"):
        (many / f"images/dir/{stem}.JPG").touch()
        (many / f"masks/dir/{stem}.png").touch()
    (many / "train.txt").write_text("000\n001.png\nimages/002.png\n\n./003\ndir/a b\ndir\\c.d.JPG\n")
    assert planned(many) == {"train": ["000", "001", "002", "003", "dir/a b", "dir/c.d"]}
    (many / "test.txt").write_text("004\n")
    assert planned(many)["test"] == ["004"] and not ImageFolder.plan(str(many)).unlabelled
    (many / "masks/004.png").unlink()
    assert ImageFolder.plan(str(many)).unlabelled == ("test",)


def test_the_fingerprint_knows_classes_and_splits(many):
    key = lambda **options: ImageFolder.plan(str(many), **options).fingerprint
    keys = [key(), key(seed=1), key(val_fraction=0.3)]
    for text in ("road\nlamp\nsky\n", "road\nstreet lamp\nsky\nvoid 3\n", "a 0 0 0\nb 0 0 1\nvoid 0 0 255\n", "a\nb\n"):
        (many / "classes.txt").write_text(text)
        keys.append(key())
    assert len(set(keys)) == len(keys)


# classes.txt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names", "classes"),
    [
        ("a\nb\n", ("a", "b"), {0: 0, 1: 1, 255: 255}),
        ("\ufeffa b\r\n# no\r\n\r\n c  d \r\n", ("a b", "c d"), {0: 0, 1: 1, 255: 255}),
        ("void 0\na\nb", ("a", "b"), {0: 255, 1: 0, 2: 1}),
        ("a\nb\nvoid 1\nvoid 255", ("a", "b"), {0: 0, 1: 255, 2: 1, 255: 255}),
        ("lane 2\nlane 3", ("lane 2", "lane 3"), {0: 0, 1: 1, 255: 255}),
        ("2 wheels\ncar", ("2 wheels", "car"), {0: 0, 1: 1, 255: 255}),
    ],
)
def test_classes_of_values(tmp_path, text, names, classes):
    (tmp_path / "classes.txt").write_text(text, newline="")
    assert read_classes(tmp_path / "classes.txt") == (names, (), (classes, False))


def test_classes_of_colours(tmp_path):
    (tmp_path / "classes.txt").write_text("void 0 0 0\na b 1 2 3\nvoid 9 9 9\nc 255 0 1\n")
    names, colours, coding = read_classes(tmp_path / "classes.txt")
    assert names == ("a b", "c") and colours == ((1, 2, 3), (255, 0, 1))
    assert coding == ({0: 255, 0x010203: 0, 0x090909: 255, 0xFF0001: 1}, True)


def test_values_with_void_between(make, load, root):
    make(lists=False)
    with (root / "classes.txt").open("a") as file:
        file.write("void 0\nvoid 255\n")
    for path in (root / "masks").rglob("*.png"):
        layout.write_mask(path, np.where(layout.label(np.random.default_rng(1)) == 1, 3, 0).astype(np.uint8))
    label = records(load(), "val").popitem()[1]["label"]
    assert set(np.unique(label)) == {2, 255}
    layout.write_mask(path, np.full((24, 36), 4, np.uint8))
    with pytest.raises(DataError, match=r"label value 4 is neither a class \(1\.\.3\) nor void \(0, 255\).*off by one"):
        load()


# EXIF -------------------------------------------------------------------------------------------------


def turned(root, orientation, mask_shape, size=(24, 36), file="a.jpg"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[: size[0] // 2] = 250  # bright on top, as stored
    Image.fromarray(pixels).save(root / "images" / file, exif=exif)
    label = np.zeros(mask_shape, np.uint8)
    label[0, 0] = 2
    layout.write_mask(root / "masks" / "a.png", label)


def test_the_masks_size_tells_how_an_image_is_meant(make, load, root):
    make()
    turned(root, 6, (24, 36))
    stored = records(load(), "train")["a"]["image"]
    assert stored.shape == (24, 36, 3) and stored[:11].min() > 200 and stored[13:].max() < 50
    turned(root, 6, (36, 24))
    shown = records(load(), "train")["a"]["image"]
    np.testing.assert_array_equal(shown, np.rot90(stored, -1))
    turned(root, 8, (36, 24))
    np.testing.assert_array_equal(records(load(), "train")["a"]["image"], np.rot90(stored))
    turned(root, 6, (36, 25))
    with pytest.raises(DataError, match=r"masks/a\.png: mask is 25x36 pixels but its image .*a\.jpg is 36x24"):
        load()


@pytest.mark.parametrize(
    ("orientation", "shape"), [(2, (24, 36)), (3, (24, 36)), (4, (24, 36)), (5, (24, 24)), (8, (24, 24))]
)
def test_an_orientation_that_fits_both_ways_is_refused(make, load, root, orientation, shape):
    make()
    turned(root, orientation, shape, size=shape)
    with pytest.raises(DataError, match=rf"a\.jpg: has EXIF orientation {orientation}.*remove the tag"):
        load()
    turned(root, 1, shape, size=shape)
    load()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_images_without_mask_are_made_upright(make, load, root, orientation):
    make()
    mask = (root / "masks/a.png").read_bytes()
    turned(root, orientation, (24, 36), file="g.jpg")
    (root / "masks/a.png").write_bytes(mask)
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(Image.open(root / "images/g.jpg")))
    np.testing.assert_array_equal(records(load(), "test")["g"]["image"], expected)


def test_png_and_webp_have_exif_too_and_tiff_is_refused(make, load, root):
    make()
    (root / "images/a.jpg").unlink()
    for suffix in ("png", "webp", "tif"):
        turned(root, 6, (36, 24), file=f"a.{suffix}")
        if suffix == "tif":
            with pytest.raises(DataError, match=r"a\.tif: a TIFF file with an orientation tag"):
                load()
        else:
            assert records(load(), "train")["a"]["image"].shape == (36, 24, 3)
        (root / f"images/a.{suffix}").unlink()


def test_other_layouts_take_images_as_stored_and_say_so(tmp_path, tree, camvid):
    for i in range(3):
        camvid.mask(f"trainannot/img{i}.png", np.arange(11, dtype=np.uint8).repeat(60).reshape(20, 33)[:, :30])
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(camvid.root / "train/img1.jpg").save(camvid.root / "train/img1.jpg", exif=exif)
    data = load_dataset("camvid", source_dir=str(camvid.root), data_dir=str(tmp_path / "p"), partial=True)
    assert any("1 image is marked by EXIF" in w and w.endswith("match: img1") for w in data.label_report()["warnings"])


def test_scripts_take_the_data_set(make, root, tmp_path):
    """The options of configs/default.py are those of the data set."""
    import pwcrf_jax.configs.default as default
    from pwcrf_jax import config as configs

    make()
    config = default.get_config()
    config.data.name, config.data.source_dir, config.data.data_dir = "image_folder", str(root), str(tmp_path / "p")
    data = load_dataset(**configs.dataset_options(config))
    assert data.splits["train"] == 6
    assert (
        json.loads((root.parent / "p").joinpath(data.folder, "label_report.json").read_text())["warnings"] is not None
    )
