"""The unary's temperature and weights of pairs of labels, against loops over edges; their gradients by differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pwcrf_jax as pw
from pwcrf_jax import mean_field, potentials
from pwcrf_jax.relations import ABOVE_BELOW, SURROUNDING, offsets
from reference import crf_oracle, random_problems

H, W, K = 2, 3, 3
PAIRS = np.random.default_rng(0).uniform(0.2, 2.0, (2, K, K)).astype(np.float32)


def model(seed=0):
    """(unary, potentials of two relations, their edges for the oracle, labels with one void)."""
    found, edges = [], []
    for i, relation in enumerate((SURROUNDING, ABOVE_BELOW)):
        x = random_problems.grid_problem(seed + i, H, W, K)
        box = offsets(relation, H, W)
        found.append(pw.factored_pairwise(*x.parts, box, x.unary_log_probs))
        edges.append(crf_oracle.grid_edges(*x.parts, box))
    labels = x.labels.copy()
    labels[0, 1] = 255
    return x.unary, found, edges, labels


def of_oracle(unary, edges, temperature, weights, pairs, iterations=3):
    """Log marginals [H W, K] of scores z / T and w_r s_r[k, l] z_pq[k, l], float64."""
    scaled = [[edge._replace(scores=s * edge.scores) for edge in of] for of, s in zip(edges, pairs, strict=True)]
    nodes = np.asarray(unary, np.float64).reshape(-1, K) / temperature
    return crf_oracle.mean_field(nodes, scaled, iterations, weights=weights, normalize=True)[0]


@pytest.mark.parametrize("encode", [lambda p: p, pw.to_table], ids=["factored", "table"])
def test_temperature_and_weights_of_pairs_are_those_of_the_scores(encode):
    unary, found, edges, _ = model()
    found = [encode(p) for p in found]
    nodes = unary if isinstance(found[0], potentials.FactoredPairwise) else unary.reshape(-1, K)
    settings = mean_field.Settings(weights=list(0.7 * PAIRS), unary_temperature=2.5, average_messages=True)
    got, _ = mean_field.run(nodes, found, settings)
    want = of_oracle(unary, edges, 2.5, (0.7, 0.7), PAIRS)
    np.testing.assert_allclose(np.asarray(got).reshape(-1, K), want, atol=2e-5)
    # One of a relation and a number of the other; by name.
    named = {"a": 0.7 * PAIRS[0], "b": 0.4}
    got, _ = mean_field.run(nodes, dict(zip("ab", found, strict=True)), settings, weights=named)
    want = of_oracle(unary, edges, 2.5, (0.7, 0.4), (PAIRS[0], np.ones((K, K))))
    np.testing.assert_allclose(np.asarray(got).reshape(-1, K), want, atol=2e-5)


def test_gradients_of_the_likelihood_are_those_of_differences():
    unary, found, edges, labels = model(3)
    scored = labels.ravel() != 255

    def ours(temperature, weights, log_labels):
        pairs = jnp.exp(log_labels[:, 0, :, None] + log_labels[:, 1, None])
        settings = mean_field.Settings(
            weights=list(weights[:, None, None] * pairs), unary_temperature=temperature, average_messages=True
        )
        total, count = pw.unrolled_log_likelihood(unary, found, labels, settings)
        return -total / count

    def reference(x):
        a, b = np.exp(x[3:].reshape(2, 2, K)).swapaxes(0, 1)
        log_q = of_oracle(unary, edges, x[0], x[1:3], a[:, :, None] * b[:, None])
        return -np.mean(log_q[scored, labels.ravel()[scored]])

    at = np.concatenate([[1.7, 0.6, -0.3], np.random.default_rng(1).normal(0, 0.3, 4 * K)])
    parts = jnp.float32(at[0]), jnp.asarray(at[1:3], jnp.float32), jnp.asarray(at[3:].reshape(2, 2, K), jnp.float32)
    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*parts)
    assert value == pytest.approx(reference(at), abs=1e-5)
    want = crf_oracle.numerical_gradient(reference, at)
    np.testing.assert_allclose(np.concatenate([np.ravel(x) for x in gradients]), want, atol=2e-5)
    assert np.all(np.abs(want) > 1e-5)


def test_what_is_ruled_out_stays_so_and_has_gradients():
    unary, found, *_ = model()
    unary = unary.copy()
    unary[0, 0, 1] = -np.inf
    table = pw.to_table(found[0])
    table = table._replace(scores=table.scores.at[0, 1, 2].set(-jnp.inf))
    ruled_out = potentials.weighted(table, 0 * PAIRS[0])
    np.testing.assert_array_equal(np.isneginf(ruled_out.scores), np.isneginf(table.scores))

    def q(temperature, pairs):
        settings = mean_field.Settings(weights=[pairs], unary_temperature=temperature)
        return jnp.exp(mean_field.run(unary.reshape(-1, K), [table], settings)[0])[:, 0]

    assert jnp.all(jnp.isfinite(q(2.0, PAIRS[0])))
    for gradient in jax.grad(lambda *x: q(*x).sum(), argnums=(0, 1))(2.0, PAIRS[0]):
        assert jnp.all(jnp.isfinite(gradient)) and jnp.any(gradient != 0)


def test_a_temperature_of_one_changes_no_bit_and_others_are_those_of_divided_scores():
    unary, found, _, labels = model()
    for call in (
        lambda z, **more: mean_field.run(z, found, **more)[0],
        lambda z, **more: mean_field.step(mean_field.init(z), z, found, **more)[0],
        lambda z, **more: pw.pseudo_log_likelihood(z, found, labels, **more)[0],
        lambda z, **more: pw.exact_log_likelihood(z, found, labels, **more)[0],
    ):
        np.testing.assert_array_equal(call(unary, unary_temperature=1.0), call(unary))
        if call(unary).ndim == 0:  # a step from other marginals would be another one
            assert call(unary, unary_temperature=2.0) == pytest.approx(float(call(unary / 2)), rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(unary_temperature=0.0), "unary_temperature must be above 0, got 0.0"),
        (dict(unary_temperature=np.nan), "unary_temperature must be above 0"),
        (dict(weights=[1.0, np.ones((K, 2))]), r"expected weights of pairs of labels \(3, 3\), got \(3, 2\)"),
        (dict(weights=[1.0, np.ones(K)]), r"expected weights of pairs of labels \(3, 3\), got \(3,\)"),
    ],
    ids=str,
)
def test_refused(fields, match):
    unary, found, *_ = model()
    with pytest.raises(ValueError, match=match):
        mean_field.run(unary, found, **fields)
