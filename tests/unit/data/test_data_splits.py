"""Parts of splits by id: blocks of neighbours, unions for cross-validation, and what is refused."""

import pickle

import numpy as np
import pytest
from PIL import Image

from pwcrf_jax.data import DataError, load_dataset, splits, train_batches

COUNT = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Images "room 1" to "room 12", of which the last four are split val."""
    root = tmp_path_factory.mktemp("source")
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    rng = np.random.default_rng(0)
    for i in range(1, COUNT + 5):
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)).save(root / f"images/room {i}.png")
        Image.fromarray(rng.integers(0, 2, (16, 24), np.uint8)).save(root / f"masks/room {i}.png")
    (root / "classes.txt").write_text("wall\nfloor\n")
    for split, ids in (("train", range(1, COUNT + 1)), ("val", range(COUNT + 1, COUNT + 5))):
        (root / f"{split}.txt").write_text("".join(f"room {i}\n" for i in ids))
    return load_dataset("image_folder", source_dir=str(root), data_dir=str(tmp_path_factory.mktemp("prepared")))


def numbers(dataset, split):
    source = dataset.source(split)
    return [int(source[i]["id"].removeprefix("room ")) for i in range(len(source))]


def test_digits_are_numbers():
    ids = ["b", "a10", "a9", "a9b2", "a9b10", "10", "9", "a09"]
    assert [ids[i] for i in splits.in_order(ids)] == ["9", "10", "a09", "a9", "a9b2", "a9b10", "a10", "b"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[: by id]", range(1, 13)),
        ("train[25%:50% by id]", range(4, 7)),
        ("train[:3 by id] + train[-2: by id]", [1, 2, 3, 11, 12]),
        ("train[75%: by id]+train[:12.5% by id]", [10, 11, 12, 1, 2]),
        ("train[10:99 by id]+val", [11, 12, None, None, None, None]),
        ("train[50%:50% by id]+train[:1 by id]", [1]),
    ],
)
def test_parts_by_id_are_blocks(dataset, split, expected):
    found = numbers(dataset, split)
    assert len(found) == len(list(expected))
    assert all(want in (None, got) for want, got in zip(expected, found, strict=True))
    if "val" in split:
        assert set(found[2:]) == {13, 14, 15, 16}


def test_the_stored_order_is_another(dataset):
    """So that blocks are worth their words."""
    assert numbers(dataset, "train[:25%]") != numbers(dataset, "train[:25% by id]") == [1, 2, 3]
    assert sorted(numbers(dataset, "train[:50%]+train[50%:]")) == list(range(1, 13))


def test_folds_are_a_partition(dataset):
    """Whatever the rounding: 7 blocks of 12 images."""
    width = 100 / 7
    found = [numbers(dataset, f"train[{i * width:g}%:{(i + 1) * width:g}% by id]") for i in range(7)]
    assert sum(found, []) == list(range(1, 13))


def test_the_same_in_processes(dataset):
    """A source that was pickled, as for data.num_workers, has the same records; batches do not depend on who reads."""
    split = "train[:3 by id]+train[8:10 by id]+val[:1]"
    source = dataset.source(split)
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == len(source) == 6
    for i in range(6):
        assert again.id(i) == source.id(i) == source[i]["id"]
        np.testing.assert_array_equal(again[i]["image"], source[i]["image"])
    with pytest.raises(IndexError):
        source[6]
    batches = train_batches(dataset, split, batch_size=6, crop_size=(16, 24), num_threads=0)
    assert set(next(batches)["id"]) == {source.id(i) for i in range(6)}
    batches.close()


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[:4 by id]+train[3:6 by id]", r"takes records 3 to 3 of 'train' twice; let its parts end where"),
        ("train[:50%]+train[25%:]", r"takes records 3 to 5 of 'train' twice"),
        ("train+train[:1]", r"takes records 0 to 0 of 'train' twice"),
        ("train[:4]+train[4: by id]", r"some of 'train' by id and some not.*'by id' in all of its parts, or in none"),
        ("train[:x by id]", r"cannot be read \('x' is neither a number of records nor a share, such as 20%\); write"),
        ("train[:101% by id]", "'101%' is neither a number"),
        ("train[1.5: by id]", "'1.5' is neither a number"),
        ("train[:4 by ids]", r"cannot be read .*'train\[20%:40% by id\]', or a sum of these"),
        ("train[6:6 by id]", "selects no records"),
        ("train[6:2 by id]", "selects no records"),
        ("trian[:4 by id]", r"no split 'trian'.*train \(12\), val \(4\)"),
    ],
)
def test_what_is_refused(dataset, split, message):
    with pytest.raises(DataError, match=message):
        dataset.source(split)
