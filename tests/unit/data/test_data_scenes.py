"""Synthetic scenes: reproducible, locally ambiguous, and the documented ceiling."""

import re

import numpy as np
import pytest

from pwcrf_jax.data import VOID, DataError, load_dataset
from pwcrf_jax.data.sets import synthetic
from pwcrf_jax.data.sets.synthetic import BOAT, CAR, CELL, HILLS, ROAD, SKY, WATER, generate_scene


def cells_of(label):
    """Class per cell, taken at the centre (the rim of blobs is void)."""
    return label[CELL // 2 :: CELL, CELL // 2 :: CELL]


def test_scene_depends_on_seed_split_and_index_only():
    image, label = generate_scene(3, 5, "train")
    again, label_again = generate_scene(3, 5, "train")
    assert image.shape == (192, 256, 3) and label.shape == (192, 256)
    assert image.dtype == label.dtype == np.uint8
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    for other in ((4, 5, "train"), (3, 6, "train"), (3, 5, "val")):
        assert (generate_scene(*other)[0] != image).any()


def test_context_tells_all_classes_apart():
    seen = set()
    for index in range(100):
        label = generate_scene(0, index, image_size=(128, 192) if index % 2 else (192, 256))[1]
        cells = cells_of(label)
        seen |= set(np.unique(cells))
        rows = np.flatnonzero((cells == HILLS).all(1))
        assert len(rows) in (1, 2) and (cells[: rows[0]] == SKY).all()
        below = cells[rows[-1] + 1 :]
        assert len(below) and not np.isin(below, (SKY, HILLS)).any()
        # Going sideways from a blob, the first other cell is the surface of its class.
        for row in below:
            for col in np.flatnonzero(np.isin(row, (BOAT, CAR))):
                surface = WATER if row[col] == BOAT else ROAD
                for side in (row[col::-1], row[col:]):
                    assert side[side != row[col]][0] == surface
    assert seen == {SKY, HILLS, WATER, ROAD, BOAT, CAR}


def test_void_is_the_rim_of_blobs():
    for index in range(20):
        label = generate_scene(0, index)[1]
        assert (label == VOID).any()
        grown = np.repeat(np.repeat(cells_of(label), CELL, 0), CELL, 1)
        assert np.isin(grown[label == VOID], (BOAT, CAR)).all()
        np.testing.assert_array_equal(label[label != VOID], grown[label != VOID])


def test_classes_of_one_look_have_the_same_local_statistics():
    stats = {SKY: [], WATER: [], BOAT: [], CAR: []}
    for index in range(300):
        image, label = generate_scene(1, index)
        mean = image.reshape(12, CELL, 16, CELL, 3).mean((1, 3))
        std = image.reshape(12, CELL, 16, CELL, 3).std((1, 3))
        cells = cells_of(label)
        for name, values in stats.items():
            mask = cells == name
            if mask.any():  # one entry per scene: cells of a scene share its jitter
                values.append(np.concatenate([mean[mask].mean(0), std[mask].mean(0)]))
    for one, other in ((SKY, WATER), (BOAT, CAR)):
        a, b = np.array(stats[one]), np.array(stats[other])
        error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
        assert len(a) > 200 and len(b) > 200
        assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error).all()
    blue, red = np.array(stats[SKY]).mean(0), np.array(stats[BOAT]).mean(0)
    assert np.abs(blue - red).max() > 50


def test_painting_ignores_the_class():
    cells = np.full((8, 12), SKY)
    water = np.full((8, 12), WATER)
    paint = lambda c: synthetic._paint(np.random.default_rng(0), c)
    np.testing.assert_array_equal(paint(cells), paint(water))
    np.testing.assert_array_equal(paint(cells * 0 + BOAT), paint(cells * 0 + CAR))


def test_ceiling_agrees_with_the_docstring_and_a_confusion_matrix():
    percents = [float(x) for x in re.findall(r"(\d+\.\d) % ?", synthetic.__doc__.replace("\n", " "))]
    ceiling = synthetic.context_free_ceiling("val")
    bound = synthetic.context_free_ceiling("val", coin_flips=True)
    assert percents[0] == pytest.approx(100 * ceiling, abs=0.5)
    assert percents[1] == pytest.approx(100 * bound, abs=0.5)
    assert ceiling < bound < 0.6

    labels = np.concatenate([generate_scene(0, i, "val")[1].ravel() for i in range(100)])
    labels = labels[labels != VOID]
    counts = np.bincount(labels, minlength=6)
    classes = [np.flatnonzero(synthetic.LOOKS == look) for look in range(4)]
    guess = np.array([max(same, key=counts.__getitem__) for same in classes])
    predicted = guess[synthetic.LOOKS[labels]]
    matrix = np.bincount(labels.astype(int) * 6 + predicted, minlength=36).reshape(6, 6)
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert ceiling == pytest.approx(iou.mean(), abs=1e-12)


def test_coin_flip_bound_holds_for_random_guessers():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [7000, 3000])
    for odds in (0.3, 0.6, 0.9):
        said = (rng.random(10000) > odds).astype(int)
        for k, share in ((0, odds), (1, 1 - odds)):
            own, other = (7000, 3000) if k == 0 else (3000, 7000)
            measured = ((said == k) & (labels == k)).sum() / ((said == k) | (labels == k)).sum()
            assert synthetic._expected_iou(own, other, share) == pytest.approx(measured, abs=0.02)


def test_data_set_holds_the_scenes(tmp_path):
    options = {"num_train": 5, "num_val": 3, "seed": 7, "image_size": (128, 192)}
    data = load_dataset("synthetic", data_dir=str(tmp_path), **options)
    assert data.splits == {"train": 5, "val": 3} and data.num_classes == 6
    assert data.class_names == synthetic.CLASS_NAMES
    source = data.source("val")
    records = {r["id"]: r for r in (source[i] for i in range(3))}
    image, label = generate_scene(7, 2, "val", (128, 192))
    np.testing.assert_array_equal(records["val_00002"]["image"], image)
    np.testing.assert_array_equal(records["val_00002"]["label"], label)
    other = load_dataset("synthetic", data_dir=str(tmp_path), **{**options, "seed": 8})
    assert other.folder != data.folder


@pytest.mark.parametrize(
    "options, match",
    [
        ({"image_size": (100, 192)}, "image_size.*multiples of 16"),
        ({"image_size": (64, 192)}, "image_size"),
        ({"num_train": 0}, "num_train: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"numtrain": 5}, "no option 'numtrain'.*num_train"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, match):
    with pytest.raises(DataError, match=match):
        load_dataset("synthetic", data_dir=str(tmp_path), **options)
