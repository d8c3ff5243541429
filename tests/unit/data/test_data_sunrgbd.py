"""SUN RGB-D: labels found by folder, not by order; transposition and mapping; archives; refusals."""

import shutil

import h5py
import numpy as np
import pytest
import scipy.io
from layouts import nyudv2, sunrgbd
from PIL import Image

from pwcrf_jax.data import DataError, load_dataset

SPLITS = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"
META = "SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat"
LABELS = "SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat"
NYU = "SUNRGBD/kv1/NYUdata/NYU0003"


@pytest.fixture
def source(tmp_path):
    sunrgbd.make(tmp_path / "source", np.random.default_rng(0))
    return tmp_path / "source"


@pytest.fixture
def load(tmp_path):
    return lambda root, **kw: load_dataset(
        "sunrgbd", **{"source_dir": str(root), "data_dir": str(tmp_path / "prepared"), "partial": True, **kw}
    )


def records(data):
    return {
        split: {r["id"]: r for r in map(data.source(split).__getitem__, range(n))} for split, n in data.splits.items()
    }


def test_records_are_the_files(source, load):
    data = load(source)
    assert data.splits == {"train": 3, "test": 2} and data.unlabelled == ()
    assert len(data.class_names) == len(set(data.class_names)) == len(data.palette) == 37
    assert data.class_names[0] == "wall" and data.class_names[19] == "floor_mat" and data.class_names[36] == "bag"
    meta = scipy.io.loadmat(source / META, struct_as_record=False)["SUNRGBDMeta"][0]
    with h5py.File(source / LABELS) as file:
        stored = [file[ref][:] for ref in file["SUNRGBD2Dseg/seglabel"][:, 0]]
    got = records(data)
    for split, folders in (("train", sunrgbd.TRAIN), ("test", sunrgbd.TEST)):
        assert set(got[split]) == {folder.replace("/", "_") for folder in folders}
        for folder, (name, size) in folders.items():
            record = got[split][folder.replace("/", "_")]
            np.testing.assert_array_equal(record["image"], Image.open(source / "SUNRGBD" / folder / "image" / name))
            (entry,) = (i for i, m in enumerate(meta) if m.rgbpath[0].endswith(f"/SUNRGBD/{folder}/image/{name}"))
            values = stored[entry].astype(int)  # [x, y]
            assert record["label"].shape == size == values.shape[::-1]
            for y, x in np.ndindex(size):
                assert record["label"][y, x] == (values[x, y] - 1 if values[x, y] else 255)
    assert {0, 36, 255} <= set(got["train"]["kv1_NYUdata_NYU0003"]["label"].ravel())


@pytest.mark.parametrize("nested", [False, True])
def test_archives_and_folders_agree(source, load, tmp_path, nested):
    other = tmp_path / "other"
    sunrgbd.make(other, np.random.default_rng(0), archives=True)
    assert sorted(p.name for p in other.iterdir()) == ["SUNRGBD.zip", "SUNRGBDtoolbox.zip"]
    if nested:  # unpacked by a program that makes a folder for each archive
        for name in ("SUNRGBD", "SUNRGBDtoolbox"):
            shutil.unpack_archive(other / f"{name}.zip", other / name)
            (other / f"{name}.zip").unlink()
    expected = records(load(source))
    for split, of in records(load(other)).items():
        assert set(of) == set(expected[split])
        for name, record in of.items():
            for key in ("image", "label"):
                np.testing.assert_array_equal(record[key], expected[split][name][key])


def test_official_sizes(source, load):
    with pytest.raises(DataError, match=r"'train' \(.*allsplit.mat\) has 3 images, officially 5285"):
        load(source, partial=False)


def labels(*arrays):
    def write(path):
        path.unlink()
        with nyudv2.mat73(path) as file:
            file["SUNRGBD2Dseg/seglabel"] = nyudv2.cells(file, [np.array(a, np.float64) for a in arrays])

    return write


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])


def lists(train):
    return lambda path: scipy.io.savemat(path, {"alltrain": np.array([train], object), "alltest": train[0]})


def one_entry(path):
    scipy.io.savemat(path, {"SUNRGBDMeta": {"sequenceName": "SUNRGBD/kv1/other", "rgbname": "a.jpg"}})


@pytest.mark.parametrize(
    ("name", "spoil", "named"),
    [
        ("SUNRGBD", shutil.rmtree, "no folder SUNRGBD and no SUNRGBD.zip"),
        ("SUNRGBDtoolbox", shutil.rmtree, "no folder SUNRGBDtoolbox and no SUNRGBDtoolbox.zip"),
        (SPLITS, lambda path: path.unlink(), "allsplit.mat: is missing"),
        (META, lambda path: path.unlink(), "SUNRGBDMeta.mat: is missing"),
        (LABELS, lambda path: path.unlink(), "SUNRGBD2Dseg.mat: is missing"),
        (SPLITS, cut, "allsplit.mat: cannot be read"),
        (META, cut, "SUNRGBDMeta.mat: cannot be read"),
        (LABELS, cut, "SUNRGBD2Dseg.mat: cannot be read"),
        (SPLITS, lists(["/data/kv1/NYUdata/NYU0003", "x"]), "allsplit.mat: '/data/kv1/NYUdata/NYU0003' is no folder"),
        (SPLITS, lists([f"/n/{NYU}/", f"/n/{NYU}"]), "allsplit.mat: 'kv1_NYUdata_NYU0003' is in split 'train' twice"),
        (META, one_entry, "SUNRGBDMeta.mat: has no entry for .*/SUNRGBD/"),
        (NYU, shutil.rmtree, "NYU0003/image: holds 0 images instead of one"),
        (f"{NYU}/image/NYU0003.jpg", lambda path: shutil.copy(path, path.with_name("b.jpg")), "holds 2 images"),
        (f"{NYU}/image/NYU0003.jpg", lambda path: path.write_bytes(b"x"), "NYU0003.jpg: cannot be decoded"),
        (LABELS, labels([[1]]), r"holds 1 label arrays, but .* is entry [2-5]"),
        (LABELS, labels(*5 * [np.full((56, 42), 38)]), "SUNRGBD2Dseg.mat, labels of .*: label value 38"),
        (LABELS, labels(*5 * [np.ones((42, 56))]), "SUNRGBD2Dseg.mat: mask is 42x56 pixels but its image"),
    ],
)
def test_refusals(source, load, name, spoil, named):
    spoil(source / name)
    with pytest.raises(DataError, match=named):
        load(source)


def test_options(source, load):
    with pytest.raises(DataError, match="no option 'camera'"):
        load(source, camera="kv1")
