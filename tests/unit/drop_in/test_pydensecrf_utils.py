"""Energies and features for pydensecrf's classes: each against loops, and against pydensecrf's own."""

import logging

import numpy as np
import pytest

from pwcrf_jax.pydensecrf import utils


def test_energies_of_labels():
    labels = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    got = utils.unary_from_labels(labels, 3, 0.8)
    assert got.dtype == np.float32 and got.shape == (3, 8) and got.flags.c_contiguous
    for point, label in enumerate(labels.flat):
        expected = [1 / 3] * 3 if label == 0 else [0.8 if label == k + 1 else 0.1 for k in range(3)]
        np.testing.assert_allclose(np.exp(-got[:, point]), expected, rtol=1e-6)
    got = utils.unary_from_labels(labels, 4, 0.7, zero_unsure=False)
    for point, label in enumerate(labels.flat):
        np.testing.assert_allclose(np.exp(-got[:, point]), [0.7 if label == k else 0.1 for k in range(4)], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint32])
def test_labels_of_any_integer(dtype):
    labels = np.array([0, 2, 1])
    np.testing.assert_array_equal(
        utils.unary_from_labels(labels.astype(dtype), 2, 0.6), utils.unary_from_labels(labels.tolist(), 2, 0.6)
    )


def test_energies_of_probabilities():
    probs = np.random.default_rng(0).dirichlet(np.ones(3), (4, 5)).transpose(2, 0, 1).astype(np.float32)
    probs[:, 0, 0] = 1, 0, 0
    got = utils.unary_from_softmax(probs)
    assert got.dtype == np.float32 and got.shape == (3, 20) and got.flags.c_contiguous
    np.testing.assert_allclose(np.exp(-got), np.maximum(probs, 1e-5).reshape(3, 20), rtol=1e-5)
    np.testing.assert_allclose(
        np.exp(-utils.unary_from_softmax(probs, scale=0.6)), (0.6 * probs + 0.4 / 3).reshape(3, 20), rtol=1e-5
    )
    assert np.isinf(utils.unary_from_softmax(probs, clip=None)[1, 0])


def test_old_names_warn(caplog):
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(utils.compute_unary([[1, 2]], 2), utils.unary_from_labels([[1, 2]], 2, 0.5))
        probs = np.array([[0.25], [0.75]])
        np.testing.assert_allclose(np.exp(-utils.softmax_to_unary(probs)), probs, rtol=1e-6)
        np.testing.assert_allclose(np.exp(-utils.softmax_to_unary(probs, 0.5)), [[0.375], [0.625]], rtol=1e-6)
    assert [r.getMessage().split()[0] for r in caplog.records] == [
        "pydensecrf.compute_unary",
        *["pydensecrf.softmax_to_unary"] * 2,
    ]


def test_features_of_positions():
    got = utils.create_pairwise_gaussian((2.0, 4.0, 5.0), (2, 3, 4))
    assert got.dtype == np.float32 and got.flags.c_contiguous
    expected = [(i / 2, j / 4, k / 5) for i in range(2) for j in range(3) for k in range(4)]
    np.testing.assert_allclose(got.T, expected, rtol=1e-6)


@pytest.mark.parametrize("chdim", [0, 1, 2])
def test_features_of_positions_and_channels(chdim):
    image = np.random.default_rng(1).integers(0, 255, (2, 3, 4)).astype(np.uint8)
    given = np.moveaxis(image, 2, chdim)
    got = utils.create_pairwise_bilateral((2, 3), (5.0, 6.0, 7.0, 8.0), given, chdim)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    expected = [(i / 2, j / 3, *(image[i, j] / [5.0, 6, 7, 8])) for i in range(2) for j in range(3)]
    np.testing.assert_allclose(got.T, expected, rtol=1e-6)


def test_features_of_an_image_without_channels():
    image = np.arange(6.0).reshape(2, 3)
    got = utils.create_pairwise_bilateral((1, 1), 0.5, image)
    np.testing.assert_allclose(got.T, [(i, j, 2 * image[i, j]) for i in range(2) for j in range(3)])
    np.testing.assert_array_equal(got, utils.create_pairwise_bilateral((1, 1), (0.5,), image[..., None], chdim=2))
    assert image[1, 2] == 5


def test_names_of_pydensecrfs_own_tests():
    image = np.random.default_rng(3).integers(0, 255, (5, 10, 3))
    np.testing.assert_allclose(
        utils._create_pairwise_gaussian_2d(1.5, 1.3, (5, 10)), utils.create_pairwise_gaussian((1.5, 1.3), (5, 10)), 1e-6
    )
    np.testing.assert_allclose(
        utils._create_pairwise_bilateral_2d(1.5, 1.3, 3, 4, 5, image),
        utils.create_pairwise_bilateral((1.5, 1.3), (3, 4, 5), image, 2),
        1e-6,
    )


IMAGE = np.zeros((2, 3, 3), np.uint8)
REFUSED = {
    "gt_prob": (lambda: utils.unary_from_labels([1], 2, 1.0), AssertionError, "must be in .0, 1.; got 1.0"),
    "one-label": (lambda: utils.unary_from_labels([1], 1, 0.5), ZeroDivisionError, "expected 2 or more.*got 1"),
    "label-above": (lambda: utils.unary_from_labels([3], 2, 0.5), IndexError, "expected 0 to 2; got 3"),
    "label-above-without-unsure": (lambda: utils.unary_from_labels([2], 2, 0.5, False), IndexError, "0 to 1; got 2"),
    "label-below": (lambda: utils.unary_from_labels([-1], 2, 0.5), ValueError, "expected 0 to 2; got -1"),
    "label-float": (lambda: utils.unary_from_labels([1.0], 2, 0.5), IndexError, "expected integers; got float64"),
    "scale": (lambda: utils.unary_from_softmax(np.ones((2, 1)) / 2, scale=0), AssertionError, "in .0, 1.; got 0"),
    "nan": (lambda: utils.unary_from_softmax(np.array([[0.5], [np.nan]])), ValueError, "got NaN"),
    "sdims-few": (lambda: utils.create_pairwise_gaussian((3,), (4, 6)), ValueError, "expected 2 .*axes.*got 1"),
    "sdims-many": (lambda: utils.create_pairwise_gaussian((3, 3, 3), (4, 6)), IndexError, "expected 2 .*got 3"),
    "sdims-zero": (lambda: utils.create_pairwise_gaussian((3, 0), (4, 6)), ValueError, "other than 0; got"),
    "sdims-nan": (lambda: utils.create_pairwise_gaussian((3, np.nan), (4, 6)), ValueError, "finite"),
    "schan-few": (lambda: utils.create_pairwise_bilateral((3, 3), (13,), IMAGE, 2), ValueError, "3 .*channels.*got 1"),
    "schan-zero": (lambda: utils.create_pairwise_bilateral((3, 3), 0, IMAGE, 2), ValueError, "other than 0"),
    "no-chdim": (lambda: utils.create_pairwise_bilateral((3, 3), 13, IMAGE), ValueError, "sdims: expected 3 .*got 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, kind, match = REFUSED[name]
    with pytest.raises(kind, match=match):
        call()


def test_the_same_as_pydensecrfs():
    theirs = pytest.importorskip("pydensecrf.utils", reason="pydensecrf2 needs a compiler, so no extra of tests has it")
    rng = np.random.default_rng(2)
    labels, probs = rng.integers(0, 5, (6, 7)), rng.dirichlet(np.ones(4), (6, 7)).transpose(2, 0, 1)
    image = rng.integers(0, 255, (6, 7, 3)).astype(np.uint8)
    calls = [
        lambda m: m.unary_from_labels(labels, 4, 0.7),
        lambda m: m.unary_from_labels(labels, 5, 0.7, zero_unsure=False),
        lambda m: m.compute_unary(labels, 4),
        lambda m: m.unary_from_softmax(probs),
        lambda m: m.unary_from_softmax(probs.astype(np.float32), 0.9, 1e-3),
        lambda m: m.softmax_to_unary(probs, 0.8),
        lambda m: m.create_pairwise_gaussian((3, 2.5), (6, 7)),
        lambda m: m.create_pairwise_bilateral((3, 2.5), (13, 14, 15), image, 2),
        lambda m: m.create_pairwise_bilateral((3, 2.5), 0.5, image[..., 0]),
        lambda m: m.create_pairwise_bilateral((3, 2, 2), 13, image, -1),
        lambda m: m._create_pairwise_gaussian_2d(1.5, 1.3, (6, 7)),
        lambda m: m._create_pairwise_bilateral_2d(1.5, 1.3, 3, 4, 5, image),
    ]
    for call in calls:
        ours, expected = call(utils), call(theirs)
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)
