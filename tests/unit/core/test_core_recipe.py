"""Label smoothing and soft Dice against loops over nodes, with void, weights and infinities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pwcrf_jax as pw
from reference import crf_oracle

K = 4


def problem(seed, *lead, void=255):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, (*lead, 3, 5))
    return rng.normal(0, 2, (*labels.shape, K)).astype(np.float32), np.where(
        rng.random(labels.shape) < 0.3, void, labels
    )


@pytest.mark.parametrize("void", [255, -1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_smoothed_cross_entropy(smoothing, void):
    scores, labels = problem(1, 2, void=void)
    weights = np.random.default_rng(2).uniform(0.1, 3, labels.shape).astype(np.float32)
    (true, count), (uniform, same) = (
        of(scores, labels, void=void, node_weights=weights)
        for of in (pw.unary_log_likelihood, pw.uniform_log_likelihood)
    )
    flat = scores.reshape(-1, K), labels.ravel(), smoothing, weights.ravel(), void
    np.testing.assert_allclose(
        (-(1 - smoothing) * true - smoothing * uniform, count), crf_oracle.smoothed_cross_entropy(*flat), rtol=1e-5
    )
    assert count == same > 0


@pytest.mark.parametrize("void", [255, -1])
def test_dice_is_of_each_image_and_each_class_it_shows(void):
    scores, labels = problem(3, 2, 2, void=void)
    labels[0, 0] = void  # an image without labels
    labels[0, 1][labels[0, 1] == 2] = 0  # one that does not show a class
    got = pw.soft_dice(scores, labels, void=void)
    images = zip(scores.reshape(4, -1, K), labels.reshape(4, -1), strict=True)
    found = [crf_oracle.dice(z, y, void) for z, y in images]
    assert len(found[0]) == 0 < len(found[1]) < K
    np.testing.assert_allclose(got, (sum(map(sum, found)), sum(map(len, found))), rtol=1e-5)
    parts = [pw.soft_dice(z, y, void=void) for z, y in zip(scores, labels, strict=True)]
    np.testing.assert_allclose(got, np.sum(parts, axis=0), rtol=1e-6)  # of micro-batches and of devices


def test_dice_of_a_sure_answer():
    labels = np.array([[0, 1, 1, 255]])
    sure = lambda of: 50.0 * np.eye(K, dtype=np.float32)[of]
    np.testing.assert_allclose(pw.soft_dice(sure([[0, 1, 1, 3]]), labels), (2, 2), rtol=1e-6)
    np.testing.assert_allclose(pw.soft_dice(sure([[1, 0, 0, 0]]), labels), (0, 2), atol=1e-6)


@pytest.mark.parametrize("function", [pw.uniform_log_likelihood, pw.soft_dice])
def test_void_has_no_value_and_no_gradient(function):
    scores, labels = problem(4)
    spoiled = np.where((labels == 255)[..., None], np.array([np.nan, np.inf, -np.inf, 1], np.float32), scores)
    assert function(scores, labels) == function(spoiled, labels)
    gradient = jax.grad(lambda z: function(z, labels)[0])
    np.testing.assert_array_equal(gradient(jnp.asarray(spoiled)), gradient(jnp.asarray(scores)))
    assert np.all(np.asarray(gradient(jnp.asarray(scores)))[labels == 255] == 0)
    assert np.any(np.asarray(gradient(jnp.asarray(scores))) != 0)
    nothing = np.full_like(labels, 255)
    assert function(scores, nothing) == (0, 0) and not np.any(jax.grad(lambda z: function(z, nothing)[0])(scores))


def test_labels_that_are_ruled_out_take_no_part():
    scores = np.array([[1.0, -np.inf, 2.0, -np.inf]], np.float32)
    total, count = pw.uniform_log_likelihood(scores, np.array([0]))
    assert count == 1 and total == pytest.approx(crf_oracle.log_softmax(scores[0, [0, 2]]).mean(), rel=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda z: pw.uniform_log_likelihood(z, np.array([0]))[0])(scores)))


@pytest.mark.parametrize("function", [pw.uniform_log_likelihood, pw.soft_dice])
def test_labels_are_refused_as_elsewhere(function):
    scores = np.zeros((2, 3, K), np.float32)
    with pytest.raises(ValueError, match="or void"):
        function(scores, np.full((2, 3), 9))
    with pytest.raises(ValueError, match="one a node"):
        function(scores, np.zeros((2, 4), int))
