"""Gradients against central differences of the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pwcrf_jax as pw
from pwcrf_jax import likelihood, mean_field, piecewise
from pwcrf_jax.relations import SURROUNDING, offsets
from reference import crf_oracle, random_problems

H, W, K, M = 2, 3, 3, 3
BOX = offsets(SURROUNDING, H, W)
NAMES = ("hidden_p", "hidden_q", "kernel", "bias", "unary_log_probs")


def check(got, expected):
    got = np.asarray(got)
    scale = np.abs(expected).max()
    assert scale > 1e-3
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * scale)


def numerical(oracle, arguments):
    """Gradient of oracle(dict) for every argument."""
    return {
        name: crf_oracle.numerical_gradient(lambda v, n=name: oracle(arguments | {n: v}), value)
        for name, value in arguments.items()
    }


@pytest.fixture(scope="module")
def problem():
    x = random_problems.grid_problem(51, H, W, K, M)
    labels = x.labels.copy()
    labels[0, 2] = 255
    return x._replace(labels=labels)


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(52).uniform(0.5, 2, (H, W)).astype(np.float32)


def test_unary_log_likelihood(problem, weights):
    labels = problem.labels
    loss = lambda z: piecewise.unary_log_likelihood(z, labels, node_weights=weights)[0]
    oracle = lambda z: crf_oracle.unary_log_likelihood(z.reshape(-1, K), labels.ravel(), weights.ravel())[0]
    got = jax.jit(jax.grad(loss))(problem.unary)
    check(got, crf_oracle.numerical_gradient(oracle, problem.unary))
    assert not got[0, 2].any()


@pytest.mark.parametrize("encoding", ["factored", "table"])
def test_pairwise_log_likelihood(problem, weights, encoding):
    x = problem
    arguments = {name: getattr(x, name) for name in NAMES}

    def loss(v):
        potential = pw.factored_pairwise(*(v[n] for n in NAMES[:4]), BOX, v["unary_log_probs"])
        labels, w = x.labels, weights
        if encoding == "table":
            potential, labels, w = pw.to_table(potential), labels.ravel(), w.ravel()
        return likelihood.pairwise_log_likelihood(potential, labels, node_weights=w)[0]

    def oracle(v):
        edges = crf_oracle.grid_edges(*(v[n] for n in NAMES[:4]), BOX)
        edges = crf_oracle.with_unary(edges, v["unary_log_probs"].reshape(-1, K))
        return crf_oracle.pairwise_log_likelihood(edges, x.labels.ravel(), weights.ravel())[0]

    got, expected = jax.jit(jax.grad(loss))(arguments), numerical(oracle, arguments)
    for name in NAMES:
        check(got[name], expected[name])


def test_pairwise_log_likelihood_of_a_table():
    x = random_problems.graph_problem(53, nodes=5, edges=8)
    labels = np.where(np.arange(5) == 2, 255, x.labels)

    def loss(scores):
        return likelihood.pairwise_log_likelihood(pw.PairwiseTable(scores, x.p, x.q), labels)[0]

    oracle = lambda s: crf_oracle.pairwise_log_likelihood(crf_oracle.table_edges(s, x.p, x.q), labels)[0]
    check(jax.jit(jax.grad(loss))(x.scores), crf_oracle.numerical_gradient(oracle, x.scores))


@pytest.mark.parametrize(("encoding", "average"), [("factored", False), ("factored", True), ("table", True)])
def test_mean_field_run(problem, encoding, average):
    """Of a linear function of the log marginals, by the unary, the relations' weights and all parts."""
    x = problem
    second = np.array([[-1, 0]])
    mask = np.arange(H * W).reshape(H, W) != 4
    probe = np.random.default_rng(54).normal(size=(H, W, K)).astype(np.float32)
    arguments = {name: getattr(x, name) for name in ("unary", *NAMES[:4])}
    arguments["weights"] = np.array([0.2, -0.3], np.float32)

    def objective(v):
        parts = [v[n] for n in NAMES[:4]]
        potentials = [pw.factored_pairwise(*parts, box) for box in (BOX, second)]
        unary, m = v["unary"], jnp.asarray(mask)
        if encoding == "table":
            potentials, unary, m = (
                list(map(pw.to_table, potentials)),
                unary.reshape(H * W, K),
                m.ravel(),
            )
        settings = mean_field.Settings(num_iterations=2, weights=v["weights"], damping=0.25, average_messages=average)
        log_q, _ = mean_field.run(unary, potentials, settings, node_mask=m)
        return jnp.sum(log_q.reshape(H, W, K) * probe)

    def oracle(v):
        parts = [v[n] for n in NAMES[:4]]
        relations = [crf_oracle.grid_edges(*parts, box) for box in (BOX, second)]
        settings = dict(weights=v["weights"], damping=0.25, normalize=average, mask=mask.ravel())
        log_q, _ = crf_oracle.mean_field(v["unary"].reshape(-1, K), relations, 2, **settings)
        return (log_q * probe.reshape(-1, K)).sum()

    got, expected = jax.jit(jax.grad(objective))(arguments), numerical(oracle, arguments)
    for name in arguments:
        check(got[name], expected[name])


def test_log_probs_of_the_unary_have_no_gradient_through_mean_field(problem):
    x = problem

    def objective(unary_log_probs):
        potential = pw.factored_pairwise(*x.parts, BOX, unary_log_probs)
        return jnp.sum(mean_field.run(x.unary, [potential])[0] ** 2)

    assert not jax.jit(jax.grad(objective))(x.unary_log_probs).any()


def test_zero_weights_have_finite_gradients(problem):
    """An edge weighs w_p w_q, at 0 too."""
    x = problem
    potential = pw.factored_pairwise(*x.parts, BOX)
    weights = np.arange(H * W, dtype=np.float32).reshape(H, W)
    loss = lambda w: likelihood.pairwise_log_likelihood(potential, x.labels, node_weights=w)[0]
    value, slope = jax.jit(jax.value_and_grad(loss))(weights)
    edges = crf_oracle.grid_edges(*x.parts, BOX)
    oracle = lambda w: crf_oracle.pairwise_log_likelihood(edges, x.labels.ravel(), w.ravel())[0]
    np.testing.assert_allclose(value, oracle(weights), rtol=1e-4)
    check(slope, crf_oracle.numerical_gradient(oracle, weights.astype(np.float64)))


def test_works_under_x64(problem):
    """Every result is float32 by contract, and no scan carry changes its type."""
    x = problem
    with jax.enable_x64(True):
        double = [jnp.asarray(v, jnp.float64) for v in x.parts]
        potential = pw.factored_pairwise(*double, BOX, jnp.asarray(x.unary_log_probs, jnp.float64))
        total, count = likelihood.pairwise_log_likelihood(potential, jnp.asarray(x.labels, jnp.int64))
        log_q, info = mean_field.run(jnp.asarray(x.unary, jnp.float64), [potential], mean_field.Settings(damping=0.5))
        dtypes = {v.dtype for v in (total, count, log_q, info.change)}
    edges = crf_oracle.with_unary(crf_oracle.grid_edges(*x.parts, BOX), x.unary_log_probs.reshape(-1, K))
    expected = crf_oracle.pairwise_log_likelihood(edges, x.labels.ravel())
    assert dtypes == {np.dtype("float32")}
    np.testing.assert_allclose((total, count), expected, rtol=1e-5)
