"""SIFT Flow: records against the files, the split rule, and what is refused."""

import numpy as np
import pytest
import scipy.io
from layouts import siftflow
from PIL import Image

from pwcrf_jax.configs import siftflow_vgg16
from pwcrf_jax.data import DataError, load_dataset
from pwcrf_jax.data.sets.siftflow import SiftFlow, relabel

FOLDER = siftflow.SCENES


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    return root


@pytest.fixture
def load(source, tmp_path):
    return lambda **kw: load_dataset(
        "siftflow", **{"source_dir": str(source), "data_dir": str(tmp_path / "prepared"), "partial": True, **kw}
    )


def records(data):
    return {
        split: {r["id"]: r for r in map(data.source(split).__getitem__, range(n))} for split, n in data.splits.items()
    }


def rng():
    return np.random.default_rng(0)


def test_records_are_the_files(source, load):
    counts = siftflow.make(source, rng())
    data = load()
    assert data.splits == counts and data.unlabelled == ()
    assert len(data.class_names) == len(set(data.class_names)) == len(data.palette) == 33
    assert data.class_names[:2] == ("awning", "balcony") and data.class_names[32] == "window"
    got = records(data)
    assert set(got["train"]) == set(siftflow.TRAIN) and set(got["test"]) == set(siftflow.TEST)
    for name, record in {**got["train"], **got["test"]}.items():
        np.testing.assert_array_equal(record["image"], Image.open(source / f"Images/{FOLDER}/{name}.jpg"))
        labels = scipy.io.loadmat(source / f"SemanticLabels/{FOLDER}/{name}.mat")["S"]
        np.testing.assert_array_equal(record["label"], np.where(labels == 0, 255, labels.astype(int) - 1))
    seen = np.unique(got["train"]["coast_n1"]["label"])
    assert list(seen) == [*range(33), 255]  # both ends of the mapping were met


def test_images_that_were_never_annotated(source, load):
    siftflow.make(source, rng())
    (source / f"SemanticLabels/{FOLDER}/highway_bost181.mat").unlink()
    assert (records(load())["train"]["highway_bost181"]["label"] == 255).all()


def test_archive_and_folders_agree(source, load, tmp_path):
    siftflow.make(source, rng(), archives=True)
    assert [p.name for p in source.iterdir()] == ["SiftFlowDataset.zip"]
    zipped = records(load())
    siftflow.make(tmp_path / "other" / "SiftFlowDataset", rng())
    unpacked = records(load(source_dir=str(tmp_path / "other")))
    for split, of in unpacked.items():
        assert set(zipped[split]) == set(of)
        for name, record in of.items():
            for key in ("image", "label"):
                np.testing.assert_array_equal(zipped[split][name][key], record[key])


def test_official_sizes(source, load):
    siftflow.make(source, rng())
    with pytest.raises(DataError, match=r"'train'.* 3 images, officially 2488"):
        load(partial=False)


def test_classes_the_config_scores():
    unseen = ("cow", "desert", "moon")  # in no image of test
    expected = tuple(name for name in SiftFlow.class_names if name not in unseen)
    assert siftflow_vgg16.get_config().eval.classes == expected and len(expected) == 30


def test_relabel():
    table = [255, 0, 1]
    values = np.array([[0, 1], [2, 0]])
    for dtype in (np.uint8, np.int16, np.float64):
        got = relabel(values.astype(dtype), table, "x.mat")
        assert got.dtype == np.uint8 and got.tolist() == [[255, 0], [1, 255]]
    for wrong in (3, -1, 0.5):
        with pytest.raises(DataError, match=rf"x\.mat: label value {wrong}\b"):
            relabel(np.array([[0, wrong]]), table, "x.mat")
    for wrong in (np.zeros(3), {}, 1, np.array([["a"]])):
        with pytest.raises(DataError, match="x.mat: the labels are no matrix"):
            relabel(wrong, table, "x.mat")


LABELS = f"SemanticLabels/{FOLDER}/coast_n1.mat"


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda root: (root / "SemanticLabels").rename(root / "Labels"), "no SIFT Flow data set found"),
        (lambda root: (root / "TestSet1.txt").unlink(), "TestSet1.txt: cannot be read"),
        (lambda root: (root / "TestSet1.txt").write_text("\n"), "TestSet1.txt: the list is empty"),
        (lambda root: (root / "TestSet1.txt").write_text(f"{FOLDER}\\nowhere.jpg"), "nowhere.jpg: image is missing"),
        (lambda root: (root / "Images").rename(root / "Pictures"), "no image for split 'train'"),
        (lambda root: (root / LABELS).unlink(), "coast_n1.mat: mask is missing"),
        (lambda root: (root / LABELS).write_bytes(b"x" * 200), "coast_n1.mat: cannot be read"),
        (lambda root: scipy.io.savemat(root / LABELS, {"T": np.eye(3)}), "coast_n1.mat: holds no variable 'S'"),
        (lambda root: scipy.io.savemat(root / LABELS, {"S": np.full((256, 256), 34)}), "coast_n1.mat: label value 34"),
        (lambda root: scipy.io.savemat(root / LABELS, {"S": np.ones((256, 9))}), "coast_n1.mat: mask is 9x256 pixels"),
        (lambda root: (root / f"Images/{FOLDER}/coast_n1.jpg").write_bytes(b"x"), "coast_n1.jpg: cannot be decoded"),
    ],
)
def test_refusals(source, load, spoil, named):
    siftflow.make(source, rng())
    spoil(source)
    with pytest.raises(DataError, match=named):
        load()


def test_damaged_archive(source, load):
    siftflow.make(source, rng(), archives=True)
    path = source / "SiftFlowDataset.zip"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"SiftFlowDataset\.zip: cannot be unpacked"):
        load()
    with pytest.raises(DataError, match="no option 'scale'"):
        load(scale=2)
