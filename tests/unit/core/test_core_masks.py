"""Void nodes and padded cells change no loss, no gradient, no marginal, no metric, whatever they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pwcrf_jax as pw
from pwcrf_jax import mean_field, metrics, piecewise
from reference import crf_oracle, random_problems

H, W, K, M = 3, 4, 3, 4
PAD = ((1, 2), (2, 1))  # rows above and below, columns left and right
GARBAGE = 1e3
SIGNS = {"unary": 1, "hidden_p": 1, "hidden_q": -0.5, "unary_log_probs": -1}  # of the garbage
INSIDE = (slice(1, 1 + H), slice(2, 2 + W))
BOXES = (
    np.array([[r, c] for r in (-1, 0, 1) for c in (-2, -1, 0, 1, 2) if (r, c) != (0, 0)]),
    np.array([[-2, -1], [-1, 0], [-2, 1]]),
)


run = jax.jit(mean_field.run)


def padded(x, garbage):
    """x inside a border that holds `garbage`."""
    lead = [(0, 0)] * (x.ndim - 2)
    return np.pad(np.asarray(x), [*PAD, *lead], constant_values=garbage)


@pytest.fixture(scope="module")
def problem():
    x = random_problems.grid_problem(71, H, W, K, M)
    labels = x.labels.copy()
    labels[1, 2] = 255
    return x._replace(labels=labels)


def surround(x, garbage):
    return x._replace(
        **{n: padded(getattr(x, n), s * garbage) for n, s in SIGNS.items()},
        labels=padded(x.labels, 255),
    )


def make(x, encoding, residual=True):
    potentials = [pw.factored_pairwise(*x.parts, box, x.unary_log_probs if residual else None) for box in BOXES]
    return potentials if encoding == "factored" else [pw.to_table(v) for v in potentials]


def for_encoding(v, encoding, inner):
    return v if encoding == "factored" else v.reshape(-1, *v.shape[2:]) if inner else v.reshape(-1)


@pytest.mark.parametrize("encoding", ["factored", "table"])
def test_padding_changes_no_loss_and_no_gradient(problem, encoding):
    def loss(parts, x, power):
        x = x._replace(**parts)
        weights = piecewise.balance_weights(x.labels, K, power=power)
        labels, w = (for_encoding(v, encoding, False) for v in (jnp.asarray(x.labels), weights))
        terms = [piecewise.unary_log_likelihood(x.unary, x.labels, node_weights=weights)]
        terms += [pw.pairwise_log_likelihood(v, labels, node_weights=w) for v in make(x, encoding)]
        return sum(t for t, _ in terms), jnp.array(terms)

    def evaluate(x):
        parts = {n: getattr(x, n) for n in ("unary", "hidden_p", "hidden_q", "kernel", "bias", "unary_log_probs")}
        return jax.jit(jax.grad(lambda v: loss(v, x, 0.7), has_aux=True))(parts)

    grads, terms = evaluate(problem)
    padded_grads, padded_terms = evaluate(surround(problem, GARBAGE))
    np.testing.assert_allclose(padded_terms, terms, rtol=1e-5)
    for name, grad in grads.items():
        got = np.asarray(padded_grads[name])
        if name not in ("kernel", "bias"):
            inside = got[INSIDE]
            outside = got.copy()
            outside[INSIDE] = 0
            assert not outside.any()
            got = inside
        np.testing.assert_allclose(got, grad, atol=1e-5 * np.abs(grad).max())


@pytest.mark.parametrize("encoding", ["factored", "table"])
def test_padding_changes_no_marginal(problem, encoding):
    def infer(x, mask):
        unary = for_encoding(jnp.asarray(x.unary), encoding, True)
        node_mask = None if mask is None else for_encoding(jnp.asarray(mask), encoding, False)
        settings = mean_field.Settings(weights=jnp.array([0.3, 0.6]), damping=0.2, average_messages=True)
        log_q, info = run(unary, make(x, encoding), settings, node_mask=node_mask)
        return log_q.reshape(x.unary.shape), info.change

    mask = np.random.default_rng(72).random((H, W)) > 0.2
    log_q, change = infer(problem, mask)
    got, padded_change = infer(surround(problem, GARBAGE), padded(mask, False))
    np.testing.assert_allclose(got[INSIDE], log_q, atol=1e-5)
    np.testing.assert_allclose(padded_change, change, atol=1e-6)
    assert np.isfinite(got).all() and change.max() > 0.01
    # No padding at all is no mask at all.
    full, _ = infer(surround(problem, GARBAGE), padded(np.ones((H, W), bool), False))
    unmasked, _ = infer(problem, None)
    np.testing.assert_allclose(full[INSIDE], unmasked, atol=1e-5)


def test_what_a_void_node_holds_changes_nothing(problem):
    """Scores and features of void nodes: any values, the same loss; and void is not the same as left in."""
    x = problem
    void = x.labels == 255
    other = x._replace(**{n: np.where(void[..., None], 100.0, getattr(x, n)).astype(np.float32) for n in SIGNS})

    @jax.jit
    def loss(v, labels):
        terms = [piecewise.unary_log_likelihood(v.unary, labels)]
        return jnp.array(terms + [pw.pairwise_log_likelihood(p, labels) for p in make(v, "factored")])

    np.testing.assert_allclose(loss(other, x.labels), loss(x, x.labels), rtol=1e-6)
    kept = loss(x, np.where(void, 0, x.labels))
    assert (kept[:, 1] > loss(x, x.labels)[:, 1]).all()


def test_labels_under_a_false_mask_are_not_read(problem):
    mask = problem.labels != 255
    loss = jax.jit(pw.likelihood.pairwise_log_likelihood)
    for potential, shape in ((make(problem, "factored")[0], (H, W)), (make(problem, "table")[0], (H * W,))):
        values = [
            loss(potential, np.where(mask, problem.labels, garbage).reshape(shape), node_mask=mask.reshape(shape))
            for garbage in (0, -7, 10**6)
        ]
        assert values[0] == values[1] == values[2]


def test_padding_and_void_change_no_metric(problem):
    rng = np.random.default_rng(73)
    predictions, labels = rng.integers(0, K, (2, H, W))
    expected = metrics.confusion_matrix(predictions, labels, K)
    for garbage in (0, -3, 10**6):
        got = metrics.confusion_matrix(padded(predictions, garbage), padded(labels, 255), K)
        np.testing.assert_array_equal(got, expected)


def test_padding_changes_no_balance_weight(problem):
    got = piecewise.balance_weights(padded(problem.labels, 255), K)
    np.testing.assert_allclose(got[INSIDE], crf_oracle.balance_weights(problem.labels, K), rtol=1e-5)
    assert np.count_nonzero(got) == H * W - 1
