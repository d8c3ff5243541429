"""Confusion counts and figures against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pwcrf_jax import metrics
from reference import metrics_oracle


@pytest.mark.parametrize("void", [255, -1, 5])
def test_confusion_and_figures_match_loops(void):
    rng = np.random.default_rng(81)
    predictions = rng.integers(0, 5, (2, 6, 7)).astype(np.int32)
    labels = np.where(rng.random(predictions.shape) < 0.3, void, rng.integers(0, 4, predictions.shape))
    got = metrics.confusion_matrix(predictions, labels, 5, void=void)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, metrics_oracle.confusion(predictions, labels, 5, void))
    figures, expected = metrics.scores(got)._asdict(), metrics_oracle.figures(predictions, labels, 5, void)
    assert figures.keys() == expected.keys()
    for name, value in figures.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-12, err_msg=name)


def test_by_hand():
    #                  predicted 0, 1, 2
    s = metrics.scores([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    np.testing.assert_array_equal(s.iou_per_class, [3 / 6, 4 / 7, np.nan])
    np.testing.assert_array_equal(s.accuracy_per_class, [3 / 4, 4 / 6, np.nan])
    assert s.mean_iou == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert s.pixel_accuracy == pytest.approx(7 / 10)
    assert s.mean_accuracy == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert s.frequency_weighted_iou == pytest.approx((4 * 3 / 6 + 6 * 4 / 7) / 10)


def test_rows_are_true_classes():
    got = metrics.confusion_matrix(jnp.array([1, 1]), jnp.array([0, 0]), 2)
    assert got.tolist() == [[0, 2], [0, 0]]
    s = metrics.scores([[1, 1], [0, 2]])  # one pixel of class 0 given class 1
    np.testing.assert_allclose(s.accuracy_per_class, [0.5, 1.0])


def test_class_absent_from_the_truth_but_predicted():
    s = metrics.scores([[3, 1], [0, 0]])
    assert s.iou_per_class.tolist() == [0.75, 0.0]
    assert s.mean_iou == 0.375
    assert np.isnan(s.accuracy_per_class[1]) and s.mean_accuracy == 0.75
    assert s.frequency_weighted_iou == 0.75


def test_class_present_but_never_predicted():
    s = metrics.scores([[3, 0], [1, 0]])
    assert s.iou_per_class.tolist() == [0.75, 0.0] and s.accuracy_per_class.tolist() == [1.0, 0.0]
    assert s.mean_iou == 0.375 and s.mean_accuracy == 0.5


def test_perfect_and_empty():
    s = metrics.scores(np.diag([5, 0, 7]))
    assert s.mean_iou == s.pixel_accuracy == s.mean_accuracy == s.frequency_weighted_iou == 1.0
    with np.errstate(all="raise"):
        empty = metrics.scores(np.zeros((3, 3), np.int64))
    assert all(np.isnan(v).all() for v in empty)


def test_all_void_counts_nothing():
    labels = np.full((4, 4), 255, np.uint8)
    assert not metrics.confusion_matrix(np.zeros((4, 4), np.uint8), labels, 3).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32])
def test_small_integer_types_do_not_wrap(dtype):
    """Row times number of classes leaves 8 bits: 99 * 100 + 99."""
    classes, void = 100, 127
    labels = np.array([99, 50, void], dtype)
    predictions = np.array([99, 3, 0], dtype)
    got = metrics.confusion_matrix(jnp.asarray(predictions), jnp.asarray(labels), classes, void=void)
    assert got[99, 99] == got[50, 3] == 1 and got.sum() == 2


def test_counts_beyond_the_integers_of_float32():
    """A float32 matrix stops at 16,777,216."""
    pixels = 2**24 + 5
    ones = jnp.ones((pixels,), jnp.uint8)
    got = jax.jit(metrics.confusion_matrix, static_argnums=2)(ones, ones, 2)
    assert got.dtype == jnp.int32 and got.tolist() == [[0, 0], [0, pixels]]


def test_figures_of_sums_beyond_int32():
    n = np.array([[2**40, 2**40], [0, 2**41]], np.int64)
    s = metrics.scores(n)
    assert s.iou_per_class.tolist() == [0.5, 2 / 3] and s.pixel_accuracy == 0.75


def test_matrices_add_up():
    rng = np.random.default_rng(82)
    predictions, labels = rng.integers(0, 3, (2, 4, 5, 5))
    parts = sum(np.asarray(metrics.confusion_matrix(predictions[i], labels[i], 3), np.int64) for i in range(4))
    np.testing.assert_array_equal(parts, metrics.confusion_matrix(predictions, labels, 3))


@pytest.mark.parametrize(
    ("predictions", "labels", "match"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"one shape, got \(2, 3\) and \(3, 2\)"),
        (np.zeros(3, np.float32), np.zeros(3, int), "integer predictions, got float32"),
        (np.zeros(3, int), np.zeros(3, np.float32), "integer labels, got float32"),
    ],
    ids=["shape", "predictions", "labels"],
)
def test_refused_pixels(predictions, labels, match):
    with pytest.raises(ValueError, match=match):
        metrics.confusion_matrix(predictions, labels, 2)


@pytest.mark.parametrize("shape", [(2, 3), (4,), (2, 2, 2)], ids=str)
def test_refused_matrices(shape):
    with pytest.raises(ValueError, match="square confusion matrix"):
        metrics.scores(np.zeros(shape, int))


@pytest.mark.parametrize("width", [1, 2, 3, 20])
def test_boundary_band_matches_loops(width):
    rng = np.random.default_rng(width)
    labels = rng.integers(0, 3, (3, 4, 5)).repeat(5, 1).repeat(4, 2).astype(np.uint8)
    labels[0, 8:12] = 255
    got = metrics.boundary_band(jnp.asarray(labels), width)
    np.testing.assert_array_equal(got, [metrics_oracle.boundary_band(x, width) for x in labels])
    mask = np.zeros(labels.shape, bool)
    mask[:, :13, :9] = True
    got = metrics.boundary_band(jnp.asarray(labels), width, jnp.asarray(mask))
    expected = [metrics_oracle.boundary_band(x, width, m) for x, m in zip(labels, mask, strict=True)]
    np.testing.assert_array_equal(got, expected)
    padded = np.where(mask, labels, rng.integers(0, 9, labels.shape)).astype(np.uint8)
    np.testing.assert_array_equal(metrics.boundary_band(jnp.asarray(padded), width, jnp.asarray(mask)), got)


def test_one_label_has_no_boundary():
    assert not np.any(metrics.boundary_band(jnp.full((6, 7), 4), 3))


def test_means_over_some_classes():
    n = np.array([[6, 1, 1], [2, 4, 0], [0, 3, 1]])
    s, whole = metrics.scores(n, [0, 2]), metrics.scores(n)
    # Confusion with the class that is not scored counts: 6 / (8 + 8 - 6), 1 / (4 + 2 - 1).
    assert s.mean_iou == pytest.approx((6 / 10 + 1 / 5) / 2)
    assert s.mean_accuracy == pytest.approx((6 / 8 + 1 / 4) / 2)
    assert s.frequency_weighted_iou == pytest.approx((8 * 6 / 10 + 4 / 5) / 12)
    assert s.pixel_accuracy == whole.pixel_accuracy
    np.testing.assert_array_equal(s.iou_per_class, whole.iou_per_class)


@pytest.mark.parametrize("classes", [[], (), np.zeros(0), np.zeros(0, int)], ids=repr)
def test_the_mean_over_no_class_is_no_number(classes):
    got = metrics.scores(np.array([[3, 1], [0, 2]]), classes)
    assert np.isnan([got.mean_iou, got.mean_accuracy, got.frequency_weighted_iou]).all()
    assert got.pixel_accuracy == 5 / 6


@pytest.mark.parametrize("void", [-(2**63), 2**32, -(2**40), 2**63 - 1])
def test_a_void_of_64_bits_has_an_outline(void):
    """Of 32 bits there would be left 0, which is a class."""
    labels = np.zeros((3, 5), np.int64)
    labels[:, 3:] = void
    assert metrics.boundary_band(labels, 1).tolist() == [[False, False, True, True, False]] * 3
