"""Pseudo-likelihood, unrolled mean field and the exact likelihood, against enumeration and loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pwcrf_jax as pw
from pwcrf_jax import mean_field, objectives, piecewise
from pwcrf_jax.mean_field import Settings
from pwcrf_jax.relations import ABOVE_BELOW, SURROUNDING, offsets
from reference import crf_oracle, random_problems

H, W, K = 2, 3, 3
WEIGHTS = (0.7, -0.4)
PARTS = ("hidden_p", "hidden_q", "kernel", "bias")


def model(seed, scale=1.0):
    """unary [H, W, K], potentials, labels with one void, and the oracle's edges scaled by the relations' weights."""
    potentials, edges = [], []
    for i, (relation, weight) in enumerate(zip((SURROUNDING, ABOVE_BELOW), WEIGHTS, strict=True)):
        x = random_problems.grid_problem(seed + i, H, W, K, scale=scale)
        box = offsets(relation, H, W)
        potentials.append(pw.factored_pairwise(*x.parts, box, x.unary_log_probs))
        edges += [e._replace(scores=weight * e.scores) for e in crf_oracle.grid_edges(*x.parts, box)]
    labels = x.labels.copy()
    labels[1, 1] = 255
    return x.unary, potentials, labels, edges


def parts(potential):
    return [getattr(potential, name) for name in PARTS]


def as_tables(unary, potentials, labels):
    return unary.reshape(-1, K), [pw.to_table(p) for p in potentials], labels.reshape(-1)


def pseudo_oracle(unary, edges, labels):
    """Conditionals from the score of whole labellings: change one label, keep the others."""
    unary, labels = unary.reshape(-1, K), labels.ravel()
    known = [i for i, y in enumerate(labels) if y != 255]
    edges = [e for e in edges if e.p in known and e.q in known]
    total = 0.0
    for i in known:
        scores = []
        for k in range(K):
            y = [k if j == i else (0 if labels[j] == 255 else labels[j]) for j in range(len(labels))]
            scores.append(crf_oracle.log_score(y, unary, edges))
        total += scores[labels[i]] - crf_oracle.log_sum_exp(scores)
    return total, len(known)


@pytest.mark.parametrize("encoding", ["factored", "table"])
def test_pseudo_likelihood_is_the_conditional_of_each_label(encoding):
    unary, potentials, labels, edges = model(1)
    expected = pseudo_oracle(unary, edges, labels)
    arguments = (unary, potentials, labels) if encoding == "factored" else as_tables(unary, potentials, labels)
    settings = Settings(weights=WEIGHTS, damping=0.5)  # damping has no meaning here
    got = jax.jit(lambda *a: objectives.pseudo_log_likelihood(*a, settings))(*arguments)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_pseudo_likelihood_with_mean_messages_and_node_weights():
    unary, potentials, labels, _ = model(2)
    relations = [[e for e in crf_oracle.grid_edges(*parts(p), p.offsets)] for p in potentials]
    known = labels.ravel() != 255
    truth = np.log(np.where(np.eye(K)[np.where(known, labels.ravel(), 0)], 1.0, 1e-300))
    log_p, _ = crf_oracle.mean_field_step(
        truth, unary.reshape(-1, K), relations, weights=WEIGHTS, normalize=True, mask=known
    )
    node_weights = np.random.default_rng(3).uniform(0.5, 2, labels.shape).astype(np.float32)
    expected = crf_oracle.unary_log_likelihood(log_p, labels.ravel(), node_weights.ravel())
    got = objectives.pseudo_log_likelihood(
        unary,
        potentials,
        labels,
        Settings(weights=WEIGHTS, average_messages=True),
        node_weights=jnp.asarray(node_weights),
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_unrolled_is_the_log_marginal_of_the_truth(iterations):
    unary, potentials, labels, _ = model(4)
    relations = [crf_oracle.grid_edges(*parts(p), p.offsets) for p in potentials]
    mask = np.ones((H, W), bool)
    mask[0, 0] = False
    log_q, _ = crf_oracle.mean_field(
        unary.reshape(-1, K), relations, iterations, weights=WEIGHTS, damping=0.3, normalize=True, mask=mask.ravel()
    )
    scored = np.where(mask, labels, 255).ravel()
    settings = Settings(num_iterations=iterations, weights=WEIGHTS, damping=0.3, average_messages=True)
    got = objectives.unrolled_log_likelihood(unary, potentials, labels, settings, node_mask=jnp.asarray(mask))
    np.testing.assert_allclose(got, crf_oracle.unary_log_likelihood(log_q, scored), rtol=1e-5)
    assert float(got[1]) == (scored != 255).sum() == H * W - 2


@pytest.mark.parametrize("encoding", ["factored", "table"])
def test_exact_likelihood_by_enumeration(encoding):
    unary, potentials, labels, edges = model(5)
    flat = unary.reshape(-1, K)
    every, scores = crf_oracle.labellings(flat, edges)
    agrees = [all(a in (b, 255) for a, b in zip(labels.ravel(), y, strict=True)) for y in every]
    expected = crf_oracle.log_sum_exp(scores[agrees]) - crf_oracle.log_sum_exp(scores)
    arguments = (unary, potentials, labels) if encoding == "factored" else as_tables(unary, potentials, labels)
    got = objectives.exact_log_likelihood(*arguments, Settings(weights=WEIGHTS))
    np.testing.assert_allclose(got, (expected, H * W - 1), rtol=1e-5)


def test_without_potentials_all_are_the_unary():
    unary, _, labels, _ = model(6)
    expected = piecewise.unary_log_likelihood(unary, labels)
    for objective in (
        objectives.pseudo_log_likelihood,
        objectives.unrolled_log_likelihood,
        objectives.exact_log_likelihood,
    ):
        np.testing.assert_allclose(objective(unary, [], labels), expected, rtol=1e-5)


def test_evidence_plays_no_part():
    unary, potentials, labels, _ = model(7)
    bare = [pw.factored_pairwise(*parts(p), p.offsets) for p in potentials]
    for objective in (
        objectives.pseudo_log_likelihood,
        objectives.unrolled_log_likelihood,
        objectives.exact_log_likelihood,
    ):
        np.testing.assert_allclose(objective(unary, potentials, labels), objective(unary, bare, labels), rtol=1e-6)


def test_the_exact_likelihood_is_bounded_by_mean_field_and_pseudo_likelihood_is_exact_for_one_unknown():
    """log Z >= -F(Q) for any Q; and with all labels but one given, P(y) / P(others) is that one's conditional."""
    unary, potentials, labels, edges = model(8, scale=0.3)
    labels = np.where(labels == 255, 0, labels)
    flat = unary.reshape(-1, K)
    score, settings = crf_oracle.log_score(labels.ravel(), flat, edges), Settings(weights=WEIGHTS)
    log_z = score - float(objectives.exact_log_likelihood(unary, potentials, labels, settings)[0])
    damped = Settings(num_iterations=30, weights=WEIGHTS, damping=0.5)
    log_q, _ = mean_field.run(unary, potentials, damped)
    assert log_z >= -crf_oracle.free_energy(np.asarray(log_q, np.float64).reshape(-1, K), flat, edges) - 1e-4
    hidden = labels.copy()
    hidden[0, 1] = 255
    whole, others = (
        float(objectives.exact_log_likelihood(unary, potentials, y, settings)[0]) for y in (labels, hidden)
    )
    # The conditional of that node alone: all others weigh nothing.
    only = np.zeros((H, W), np.float32)
    only[0, 1] = 1
    conditional = objectives.pseudo_log_likelihood(unary, potentials, labels, settings, node_weights=jnp.asarray(only))
    assert whole - others == pytest.approx(float(conditional[0]), abs=1e-4)


def oracle_value(name, v, labels):
    """The objective in float64; v: unary, the parts of both potentials as a0, b0, ..., and relation weights."""
    grids = [crf_oracle.grid_edges(*(v[f"{n}{i}"] for n in PARTS), v["boxes"][i]) for i in (0, 1)]
    flat = v["unary"].reshape(-1, K)
    edges = [e._replace(scores=w * e.scores) for w, g in zip(v["weights"], grids, strict=True) for e in g]
    if name == "pseudo":
        return pseudo_oracle(flat, edges, labels)[0]
    if name == "unrolled":
        log_q, _ = crf_oracle.mean_field(flat, grids, 2, weights=v["weights"], damping=0.2, normalize=True)
        return crf_oracle.unary_log_likelihood(log_q, labels.ravel())[0]
    every, scores = crf_oracle.labellings(flat, edges)
    agrees = [all(a in (b, 255) for a, b in zip(labels.ravel(), y, strict=True)) for y in every]
    return crf_oracle.log_sum_exp(scores[agrees]) - crf_oracle.log_sum_exp(scores)


@pytest.mark.parametrize("name", ["pseudo", "unrolled", "exact"])
def test_gradients(name):
    """Along a random direction of each argument, against central differences in float64."""
    unary, potentials, labels, _ = model(9)
    boxes = [p.offsets for p in potentials]
    point = {f"{n}{i}": np.asarray(getattr(p, n)) for i, p in enumerate(potentials) for n in PARTS}
    point |= {"unary": unary, "weights": np.float32(WEIGHTS)}

    def value(v):
        changed = [pw.factored_pairwise(*(v[f"{n}{i}"] for n in PARTS), boxes[i]) for i in (0, 1)]
        settings = Settings(weights=v["weights"])
        if name == "exact":
            return objectives.exact_log_likelihood(v["unary"], changed, labels, settings)[0]
        if name == "pseudo":
            return objectives.pseudo_log_likelihood(v["unary"], changed, labels, settings)[0]
        settings = Settings(num_iterations=2, weights=v["weights"], damping=0.2, average_messages=True)
        return objectives.unrolled_log_likelihood(v["unary"], changed, labels, settings)[0]

    got = jax.jit(jax.grad(value))(point)
    rng, step = np.random.default_rng(10), 1e-5
    double = {key: np.asarray(x, np.float64) for key, x in point.items()} | {"boxes": boxes}
    for key, x in point.items():
        direction = rng.normal(size=x.shape)
        ends = [oracle_value(name, double | {key: double[key] + s * direction}, labels) for s in (step, -step)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float(np.vdot(np.asarray(got[key], np.float64), direction)) == pytest.approx(slope, rel=1e-3, abs=1e-4)
        assert abs(slope) > 1e-3, key


def test_refused():
    unary, potentials, labels, _ = model(11)
    with pytest.raises(ValueError, match="integer labels, got float32"):
        objectives.pseudo_log_likelihood(unary, potentials, labels.astype(np.float32))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        objectives.exact_log_likelihood(unary, potentials, labels.T)
    for objective in (objectives.pseudo_log_likelihood, objectives.exact_log_likelihood):
        with pytest.raises(ValueError, match="expected 2 weights, one a potential, got 1"):
            objective(unary, potentials, labels, Settings(weights=(1.0,)))
        with pytest.raises(ValueError, match="classes"):
            objective(unary[..., :2], potentials, labels)
    with pytest.raises(ValueError, match="sums of messages: expected average_messages=False, got True"):
        objectives.exact_log_likelihood(unary, potentials, labels, Settings(average_messages=True))
    big = np.zeros((4, 4, 3), np.float32)
    with pytest.raises(ValueError, match="3 classes on 16 nodes are more than 1048576 labellings"):
        objectives.exact_log_likelihood(big, [], np.zeros((4, 4), int))
