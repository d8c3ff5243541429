"""NYU Depth v2: transposition, crop and mapping against the .mat file, and what is refused."""

import gc
import os

import h5py
import numpy as np
import pytest
import scipy.io
from layouts import nyudv2

from pwcrf_jax.data import DataError, load_dataset

MAT, SPLITS, MAPPING = "nyu_depth_v2_labeled.mat", "splits.mat", "classMapping40.mat"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("nyudv2")
    nyudv2.make(root, np.random.default_rng(0))
    return root


@pytest.fixture
def source(made, tmp_path):
    """Links to the files, so that a test may replace one."""
    root = tmp_path / "source"
    root.mkdir()
    for path in made.iterdir():
        (root / path.name).symlink_to(path)
    return root


@pytest.fixture
def load(source, tmp_path):
    return lambda **kw: load_dataset(
        "nyudv2", **{"source_dir": str(source), "data_dir": str(tmp_path / "prepared"), "partial": True, **kw}
    )


def replace(path, write):
    path.unlink()
    write(path)


def test_records_are_the_images(source, load):
    data = load()
    assert data.splits == {"train": 2, "test": 2} and data.unlabelled == ()
    assert len(data.class_names) == len(set(data.class_names)) == len(data.palette) == 40
    assert data.class_names[:3] == ("wall", "floor", "cabinet") and data.class_names[39] == "otherprop"
    numbers = {"train": {"0003", "0004"}, "test": {"0001", "0002"}}
    with h5py.File(source / MAT) as file:
        images, labels = file["images"][:], file["labels"][:]
    for split, ids in numbers.items():
        records = [data.source(split)[i] for i in range(2)]
        assert {r["id"] for r in records} == ids
        for record in records:
            image, label = record["image"], record["label"]
            assert image.shape == (425, 560, 3) and label.shape == (425, 560)
            assert image.max() <= 200  # nothing of the white border, and with 425 x 560 pixels all inside it
            n = int(record["id"]) - 1
            for y, x in ((0, 0), (0, 559), (424, 0), (424, 559), (100, 300), (300, 100)):
                assert tuple(image[y, x]) == tuple(images[n, c, 40 + x, 45 + y] for c in range(3))
            raw = labels[n, 40:600, 45:470].T
            for value in np.unique(raw):
                assert (label[raw == value] == (nyudv2.MAPPING[value - 1] - 1 if value else 255)).all()
            assert {0, 39, 255} <= set(label.ravel())


def test_the_large_file_is_closed(load):
    data = load()
    gc.collect()
    opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)]
    assert data.splits["train"] == 2 and not [path for path in opened if path.endswith(".mat")]


def _exists(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_official_sizes(load):
    with pytest.raises(DataError, match="'train' has 2 images, officially 795"):
        load(partial=False)


def test_other_splits_are_prepared_anew(source, load):
    first = load()
    replace(source / SPLITS, lambda path: scipy.io.savemat(path, {"trainNdxs": [[1], [3], [4]], "testNdxs": 2}))
    assert load().splits == {"train": 3, "test": 1} and first.splits == {"train": 2, "test": 2}


def splits(train, test):
    return lambda path: scipy.io.savemat(path, {"trainNdxs": train, "testNdxs": test})


def mapping(classes):
    return lambda path: scipy.io.savemat(path, {"mapClass": classes})


def mat(**arrays):
    def write(path):
        with nyudv2.mat73(path) as file:
            for name, (shape, value) in arrays.items():
                file.create_dataset(name, shape, np.uint16, fillvalue=value)

    return write


@pytest.mark.parametrize(
    ("name", "write", "named"),
    [
        (MAT, lambda path: None, rf"{MAT} not found.*fergus"),
        (SPLITS, lambda path: None, f"{SPLITS} not found"),
        (MAPPING, lambda path: None, f"{MAPPING} not found"),
        (MAT, lambda path: path.write_bytes(b"x" * 2000), f"{MAT}: cannot be read"),
        (MAT, mat(images=((4, 3, 640, 480), 0)), f"{MAT}: holds no variable 'labels'"),
        (MAT, mat(images=((4, 480, 640, 3), 0), labels=((4, 480, 640), 0)), f"{MAT}: images and labels have shapes"),
        (MAT, mat(images=((4, 3, 640, 480), 0), labels=((4, 640, 480), 895)), "image [34]: label value 895"),
        (SPLITS, lambda path: path.write_bytes(b"x" * 2000), f"{SPLITS}: cannot be read"),
        (SPLITS, splits([[1]], [[0]]), f"{SPLITS}: names image 0, but"),
        (SPLITS, splits([[1]], [[5]]), f"{SPLITS}: names image 5, but"),
        (SPLITS, splits([[1], [2]], [[2]]), f"{SPLITS}: names image 2 twice"),
        (MAPPING, mapping(nyudv2.MAPPING[:800]), f"{MAPPING}: mapClass maps 800 labels"),
        (MAPPING, mapping(nyudv2.MAPPING % 13 + 1), f"{MAPPING}: .*to classes 1..13"),
        (MAPPING, mapping(np.where(nyudv2.MAPPING == 1, 0, nyudv2.MAPPING)), f"{MAPPING}: .*to classes 0..40"),
    ],
)
def test_refusals(source, load, name, write, named):
    replace(source / name, write)
    with pytest.raises(DataError, match=named):
        load()


def test_a_file_that_was_cut_short(source, load):
    content = (source / MAT).read_bytes()
    replace(source / MAT, lambda path: path.write_bytes(content[: len(content) // 2]))
    with pytest.raises(DataError, match=MAT):
        load()


def test_options_and_folders(source, load):
    with pytest.raises(DataError, match="no option 'classes'"):
        load(classes=13)
    with pytest.raises(DataError, match="set data.source_dir"):
        load(source_dir="")
    with pytest.raises(DataError, match="is not a folder"):
        load(source_dir=str(source / MAT))
