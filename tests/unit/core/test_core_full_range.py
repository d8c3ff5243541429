"""Chunks, sampled offsets and algorithms of messages: the same numbers as the plain forms, whatever the shapes.

Random shapes go against the closed forms in float64 of `reference.factored_oracle`, which compile nothing.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import full_but

import pwcrf_jax as pw
from pwcrf_jax import mean_field, piecewise
from pwcrf_jax.likelihood import pairwise_log_likelihood
from pwcrf_jax.mean_field import Settings
from pwcrf_jax.messages import ALGORITHMS
from pwcrf_jax.relations import SURROUNDING, offsets
from reference import crf_oracle, factored_oracle, random_problems

PARTS = ("hidden_p", "hidden_q", "kernel", "bias", "unary_log_probs")
GARBAGE = (255, -1, 10**6)


class Case(NamedTuple):
    """A random problem; every field but `seed` shapes the program or what is masked."""

    seed: int = 0
    size: tuple = (3, 4)
    batch: tuple = ()
    classes: int = 3
    hidden: int = 4
    box: tuple = ((0, 1), (1, -1), (-1, 0))
    chunk_edges: int | None = None
    residual: bool = True
    mask: str = "some"
    weights: str = "random"


near = st.tuples(st.integers(-2, 2), st.integers(-2, 2))
far = st.tuples(st.integers(-8, 8), st.integers(-8, 8))  # beyond every map below
CASES = st.builds(
    Case,
    seed=st.integers(0, 2**20),
    size=st.sampled_from([(1, 1), (1, 6), (5, 1), (3, 4), (4, 5), (2, 7)]),
    batch=st.sampled_from([(), (2,), (2, 1)]),
    classes=st.integers(1, 4),
    hidden=st.integers(1, 5),
    box=st.lists(st.one_of(near, near, far).filter(any), max_size=5).map(tuple),
    chunk_edges=st.sampled_from([None, 1, 3, 10, 40, 10**9]),
    residual=st.booleans(),
    mask=st.sampled_from(["all", "some", "some", "none"]),
    weights=st.sampled_from(["one", "random", "balance"]),
)
EXAMPLES = (
    Case(box=()),
    Case(box=((0, -1),), chunk_edges=1),
    Case(box=((0, 1), (0, 1), (-1, 2), (0, 1)), batch=(2,), chunk_edges=5),
    Case(size=(1, 6), box=((0, 2), (1, 0), (0, -5), (0, 6)), batch=(2, 1), chunk_edges=10**9),
    Case(size=(5, 1), box=((2, 0), (0, 1), (-4, 0), (5, 0), (-1, -1)), chunk_edges=2),
    Case(box=((9, 0), (0, 9), (-9, 9)), residual=False, mask="all"),
    Case(box=((1, 1), (2, 9), (9, 1)), weights="balance", chunk_edges=3),
    Case(size=(1, 1), batch=(2,)),
    Case(mask="none"),
    Case(classes=1, mask="all", weights="one"),
)
# Messages of these are walked in steps of which the last is half empty, in runs of which the last of each row is.
UNEVEN = Case(size=(5, 2), batch=(2, 1), chunk_edges=24, mask="all"), Case(size=(2, 7), chunk_edges=6, mask="all")


class Problem(NamedTuple):
    parts: dict
    labels: np.ndarray
    mask: np.ndarray | None
    weights: np.ndarray | None
    marginals: np.ndarray
    probe: np.ndarray

    def oracle_mask(self):
        return np.ones(self.labels.shape, bool) if self.mask is None else self.mask

    def oracle_weights(self):
        return np.ones(self.labels.shape) if self.weights is None else self.weights


def problem(case):
    x = random_problems.grid_problem(case.seed, *case.size, case.classes, case.hidden, case.batch)
    rng = np.random.default_rng(case.seed + 1)
    nodes = (*case.batch, *case.size)
    mask = {"all": None, "some": rng.random(nodes) > 0.3, "none": np.zeros(nodes, bool)}[case.mask]
    labels = x.labels if mask is None else np.where(mask, x.labels, rng.choice(GARBAGE, nodes))
    weights = None
    if case.weights == "random":
        weights = (rng.uniform(0.2, 3, nodes) * (rng.random(nodes) > 0.1)).astype(np.float32)
    elif case.weights == "balance":
        known = np.where((labels >= 0) & (labels < case.classes), labels, 255)
        weights = np.array(piecewise.balance_weights(known, case.classes))
    if weights is not None and mask is not None:
        weights = np.where(mask, weights, np.nan)  # not read either
    return Problem(
        parts={name: getattr(x, name) for name in PARTS} | ({} if case.residual else {"unary_log_probs": None}),
        labels=labels,
        mask=mask,
        weights=weights,
        marginals=np.array(jax.nn.softmax(x.unary)),
        probe=rng.normal(size=x.unary.shape).astype(np.float32),
    )


def build(parts, box):
    box = np.array(box, np.int32).reshape(-1, 2)
    return pw.factored_pairwise(*(parts[n] for n in PARTS[:4]), box, parts.get("unary_log_probs"))


def close(got, expected, tolerance=1e-4, floor=0.1):
    """Equal to `tolerance` of the largest entry, or of `floor` where all are smaller."""
    got, expected = (jax.tree.leaves_with_path(x) for x in (got, expected))
    assert [path for path, _ in got] == [path for path, _ in expected]
    for (path, one), (_, other) in zip(got, expected, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert one.shape == other.shape, path
        atol = tolerance * max(np.abs(other).max(initial=0), floor)
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=str(path))


def flat(x):
    """[..., H, W] -> [..., H * W]"""
    return None if x is None else x.reshape(*x.shape[:-2], -1)


def flat_scores(x):
    """[..., H, W, K] -> [..., H * W, K]"""
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


# --- likelihood ------------------------------------------------------------------------------------


def likelihood(case, encode=lambda v: v, **settings):
    """A jitted (parts, weights) -> ((sum, count), gradients of the sum by both)."""
    x = problem(case)
    per_node = flat if encode is pw.to_table else lambda v: v

    def both(arguments):
        potential = encode(build(arguments, case.box))
        labels, mask = per_node(jnp.asarray(x.labels)), None if x.mask is None else per_node(jnp.asarray(x.mask))
        total, count = pairwise_log_likelihood(
            potential, labels, node_mask=mask, node_weights=per_node(arguments.get("weights")), **settings
        )
        return total, (total, count)

    def run(arguments):
        gradients, values = jax.grad(both, has_aux=True)(arguments)
        return values, gradients

    arguments = {name: v for name, v in (x.parts | {"weights": x.weights}).items() if v is not None}
    return jax.jit(run), arguments, x


def expected_likelihood(case, x, only=None):
    total, count, gradients = factored_oracle.log_likelihood(
        x.parts, case.box, x.labels, x.oracle_mask(), x.oracle_weights(), only
    )
    if x.weights is None:
        gradients["weights"] = None
    return (total, count), {name: g for name, g in gradients.items() if g is not None}


def check_likelihood(case):
    run, arguments, x = likelihood(case, chunk_edges=case.chunk_edges)
    (total, count), gradients = run(arguments)
    close(((total, count), gradients), expected_likelihood(case, x))
    assert total.dtype == count.dtype == np.float32


@pytest.mark.parametrize("index", full_but(range(len(EXAMPLES)), 0, 2, 4, 6, 8))
def test_likelihood_and_gradients_match_the_oracle(index):
    check_likelihood(EXAMPLES[index])


@pytest.mark.full
@settings(max_examples=15, deadline=None, derandomize=True)
@given(CASES)
def test_likelihood_and_gradients_of_any_case_match_the_oracle(case):
    check_likelihood(case)


@pytest.mark.parametrize("index", full_but([0, 2, 3, 4, 6], 2, 3))
def test_the_oracle_and_the_table_agree(index):
    """Nothing here rests on the oracle alone: its gradients are JAX's through a table, its sums those of loops."""
    case = EXAMPLES[index]
    run, arguments, x = likelihood(case, pw.to_table)
    expected = expected_likelihood(case, x)
    close(run(arguments), expected)
    total = count = 0.0
    for i in np.ndindex(*case.batch):
        hidden = x.parts["hidden_p"][i], x.parts["hidden_q"][i]
        edges = crf_oracle.grid_edges(*hidden, x.parts["kernel"], x.parts["bias"], case.box)
        if x.parts["unary_log_probs"] is not None:
            edges = crf_oracle.with_unary(edges, flat_scores(x.parts["unary_log_probs"][i]))
        labels = np.where(x.oracle_mask(), x.labels, 255)[i].ravel()
        got = crf_oracle.pairwise_log_likelihood(edges, labels, x.oracle_weights()[i].ravel())
        total, count = total + got[0], count + got[1]
    np.testing.assert_allclose((total, count), expected[0], rtol=1e-9)


def test_more_than_one_chunk_more_than_one_column():
    """A map of several chunks a column offset, the last of each half empty, equal to one chunk in all."""
    case = Case(size=(5, 4), batch=(2,), box=tuple(map(tuple, offsets(SURROUNDING, 5, 4).tolist())))
    values = []
    for chunk_edges in (1, 20, 50):
        run, arguments, x = likelihood(case, chunk_edges=chunk_edges)
        values.append(run(arguments))
        close(values[-1], expected_likelihood(case, x))
    for value in values[1:]:
        close(value, values[0], 1e-5)


def test_second_derivatives_match_the_table():
    """Reverse over reverse: the gradient made on the way forward is itself differentiable."""
    case = Case(size=(2, 3), box=((0, 1), (-1, 1), (1, 0)), classes=2, hidden=3)
    results = []
    for encode in (lambda v: v, pw.to_table):
        run, arguments, _ = likelihood(case, encode, **({} if encode is pw.to_table else {"chunk_edges": 6}))
        rng = np.random.default_rng(3)
        direction = {name: rng.normal(size=v.shape).astype(np.float32) for name, v in arguments.items()}

        def slope(arguments, run=run, direction=direction):
            _, gradients = run(arguments)
            return sum(jnp.sum(direction[name] * g) for name, g in gradients.items() if name != "weights")

        results.append(jax.jit(jax.grad(slope))({n: jnp.nan_to_num(v) for n, v in arguments.items()}))
    close(*results)
    assert all(np.abs(v).max() > 1e-2 for v in results[0].values())


def test_forward_over_reverse():
    """What `jax.hessian` does."""
    case = Case(size=(2, 2), classes=2, hidden=2, weights="one")
    hessians = []
    for encode in (lambda v: v, pw.to_table):
        run, arguments, _ = likelihood(case, encode)
        by_bias = lambda bias, run=run, arguments=arguments: run(arguments | {"bias": bias})[1]["bias"]
        hessians.append(jax.jit(jax.jacfwd(by_bias))(arguments["bias"]))
    close(*hessians)


def test_vmap_over_potentials_is_a_batch_axis():
    case = Case(size=(3, 3), batch=(3,), mask="all", weights="one", chunk_edges=7)
    x = problem(case)
    axes = {name: 0 if name in ("hidden_p", "hidden_q", "unary_log_probs") else None for name in PARTS}

    def one(parts, labels):
        return pairwise_log_likelihood(build(parts, case.box), labels, chunk_edges=case.chunk_edges)[0]

    vmapped = lambda parts: jnp.sum(jax.vmap(one, (axes, 0))(parts, x.labels))
    batched = lambda parts: one(parts, x.labels)
    results = [jax.jit(jax.value_and_grad(f))(x.parts) for f in (vmapped, batched)]
    close(*results, tolerance=1e-5)
    # Gradients of one image each, by vmap of the gradient.
    each = jax.jit(jax.vmap(jax.grad(one), (axes, 0)))(x.parts, x.labels)
    total = {name: v if axes[name] == 0 else v.sum(0) for name, v in each.items()}
    close(total, results[1][1], 1e-5)


@pytest.mark.parametrize("dtype", full_but(["bfloat16", "float16"], "bfloat16"))
def test_half_precision_rounds_features_alone(dtype):
    """Against float32 on the same, already rounded numbers: hidden units and products round, by 2^-9 in bfloat16."""
    case = Case(size=(5, 6), batch=(2,), classes=4, hidden=16, mask="all", weights="one")
    run, arguments, x = likelihood(case, chunk_edges=40)
    half = {name: jnp.asarray(v, dtype) for name, v in arguments.items()}
    full = {name: v.astype(jnp.float32) for name, v in half.items()}
    (total, count), gradients = run(half)
    assert total.dtype == count.dtype == jnp.float32
    assert {g.dtype for g in gradients.values()} == {jnp.dtype(dtype)}
    (expected, number), slopes = run(full)
    assert count == number
    np.testing.assert_allclose(total, expected, rtol=2e-3)
    close(gradients, slopes, 2e-2)
    # Mixed: only the hidden parts are narrow, as in training.
    mixed = full | {name: half[name] for name in ("hidden_p", "hidden_q")}
    (total, _), gradients = run(mixed)
    assert {name: g.dtype for name, g in gradients.items()} == {name: v.dtype for name, v in mixed.items()}
    np.testing.assert_allclose(total, expected, rtol=2e-3)
    close(gradients, slopes, 2e-2)


def test_log_sum_exp_of_bfloat16_features_is_float32():
    """1600 scores of 256 or a little more, on more than 256 edges: in bfloat16 the scores would be one and the same, a
    sum of ones would stop at 256, and log 1600 = 7.4 would be rounded to even beside 256."""
    classes, size, more = 40, (12, 12), 0.75
    zeros = jnp.zeros((*size, 2), jnp.bfloat16)
    labels = np.random.default_rng(4).integers(0, classes, size)
    labels[:, ::2] = labels[:, 1::2]
    equal = np.eye(classes)

    def mean(bias):
        potential = pw.factored_pairwise(zeros, zeros, np.zeros((2, *bias.shape)), bias, np.array([(0, 1), (1, 0)]))
        total, count = pairwise_log_likelihood(potential, labels)
        return total / count, count

    (value, count), slope = jax.jit(jax.value_and_grad(mean, has_aux=True))(jnp.float32(256 + more * equal))
    assert count == 2 * 12 * 11 > 256
    share = np.zeros((classes, classes))
    for p, q in ((labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])):
        np.add.at(share, (p, q), 1 / count)
    norm = np.exp(more * equal).sum()
    assert 0.1 < np.trace(share) < 0.5
    np.testing.assert_allclose(value, more * np.trace(share) - np.log(norm), rtol=1e-5)
    np.testing.assert_allclose(slope, share - np.exp(more * equal) / norm, atol=1e-6)


@pytest.mark.parametrize("dtype", full_but(["int8", "uint8", "int16", "int64"], "uint8", "int64"))
def test_labels_of_any_integer_type(dtype):
    x = problem(Case(mask="some"))
    void = 100
    labels = np.where(x.mask, x.labels, void).astype(dtype)
    potential = build(x.parts, Case().box)
    expected = pairwise_log_likelihood(potential, jnp.asarray(x.labels), node_mask=x.mask)
    close(pairwise_log_likelihood(potential, labels, node_mask=x.mask), expected, 1e-6)
    close(pairwise_log_likelihood(potential, jnp.asarray(labels), void=void), expected, 1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_scores_do_not_overflow(scale):
    case = Case(residual=False, mask="all", weights="one")
    run, arguments, x = likelihood(case, chunk_edges=10)
    arguments |= {name: np.float32(scale) * arguments[name] for name in ("kernel", "bias")}
    x.parts.update(arguments)
    expected = expected_likelihood(case, x)
    assert np.abs(expected[0][0]) > 1e4
    close(run(arguments), expected)


def test_impossible_labels():
    """A log-probability of -inf for a class that no node has."""
    x = problem(Case(classes=4, mask="all", weights="one"))
    parts = x.parts | {"unary_log_probs": np.where(np.arange(4) == 3, -np.inf, x.parts["unary_log_probs"])}
    labels = np.minimum(x.labels, 2)
    factored = lambda parts: pairwise_log_likelihood(build(parts, Case().box), labels, chunk_edges=10)[0]
    table = lambda parts: pairwise_log_likelihood(pw.to_table(build(parts, Case().box)), flat(labels))[0]
    got, expected = (jax.jit(jax.value_and_grad(f))(parts) for f in (factored, table))
    close(got, expected)
    assert np.isfinite(got[0]) and not got[1]["unary_log_probs"][..., 3].any()


def test_double_precision_enabled():
    """Sums stay float32, gradients have the dtypes of what they are of, and no carry changes its type."""
    case = Case(size=(2, 3), chunk_edges=5)
    x = problem(case)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(v, jnp.float64) for name, v in x.parts.items()}
        labels, weights = jnp.asarray(x.labels, jnp.int64), jnp.asarray(x.weights, jnp.float64)
        key = jax.random.key(0)

        def total(parts, sample=None):
            potential = build(parts, case.box)
            settings = dict(node_mask=x.mask, node_weights=weights, chunk_edges=case.chunk_edges)
            return pairwise_log_likelihood(potential, labels, sample=sample, **settings)[0]

        value, gradients = jax.jit(jax.value_and_grad(total))(wide)
        sampled = jax.jit(lambda parts: total(parts, pw.sample_offsets(key, 3, 2)))(wide)
        results = {}
        for algorithm in ALGORITHMS:
            of = Settings(algorithm=algorithm, chunk_edges=5)
            unary = jnp.asarray(x.probe, jnp.float64)
            infer = lambda parts, of=of, unary=unary: mean_field.run(unary, [build(parts, case.box)], of)[0]
            results[algorithm] = jax.jit(infer)(wide)
    assert value.dtype == sampled.dtype == np.float32
    assert {g.dtype for g in gradients.values()} == {np.dtype(np.float64)}
    (expected, _), slopes = expected_likelihood(case, x)
    close((value, gradients), (expected, {name: slopes[name] for name in PARTS}))
    assert {v.dtype for v in results.values()} == {np.dtype(np.float32)}
    close(results["factored"], results["table"])
    close(results["auto"], results["table"])


# --- sampled offsets -------------------------------------------------------------------------------

SAMPLED = Case(size=(3, 4), batch=(2,), box=((0, 1), (-1, 1), (2, 0), (1, -9)), chunk_edges=12)


def sampled_likelihood():
    """(jitted function of (arguments, sample), arguments, problem, list that grows with each trace)."""
    x, traces = problem(SAMPLED), []

    def both(arguments, sample):
        traces.append(1)
        return pairwise_log_likelihood(
            build(arguments, SAMPLED.box),
            jnp.asarray(x.labels),
            node_mask=jnp.asarray(x.mask),
            node_weights=arguments["weights"],
            chunk_edges=SAMPLED.chunk_edges,
            sample=sample,
        )

    run = jax.jit(jax.value_and_grad(both, has_aux=True))
    return run, x.parts | {"weights": np.where(x.mask, x.weights, 0)}, x, traces


@pytest.mark.parametrize("size", [1, 2, 3])
def test_samples_are_unbiased(size):
    """The mean over all subsets is the full sum, exactly; so is that of the gradients. One trace serves all subsets."""
    run, arguments, x, traces = sampled_likelihood()
    expected = expected_likelihood(SAMPLED, x)
    sums, gradients = [], []
    for subset in itertools.combinations(range(4), size):
        (total, count), slope = run(arguments, np.array(subset, np.int32))
        np.testing.assert_allclose(count, expected[0][1], rtol=1e-6)
        only = [SAMPLED.box[i] for i in subset]
        close(total, expected_likelihood(SAMPLED, x, only)[0][0] * 4 / size)
        sums.append(total)
        gradients.append(slope)
    mean = jax.tree.map(lambda *v: np.mean(v, axis=0), *gradients)
    close((np.mean(sums), mean), (expected[0][0], expected[1]))
    assert np.ptp(sums) > 1 and len(traces) == 1


def test_a_sample_of_all_offsets_is_the_full_sum():
    run, arguments, x, traces = sampled_likelihood()
    expected = expected_likelihood(SAMPLED, x)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        close(run(arguments, np.array(order)), (expected[0], expected[1]))
    assert len(traces) == 1


def test_samples_of_a_relation_without_edges():
    x = problem(Case())
    for box in ([(9, 9)], [(9, 9), (0, -9)]):
        assert not any(pairwise_log_likelihood(build(x.parts, box), x.labels, node_mask=x.mask, sample=jnp.array([0])))


def test_sample_offsets_are_distinct_and_uniform():
    keys = jax.random.split(jax.random.key(5), 3000)
    draws = np.array(jax.jit(jax.vmap(lambda key: pw.sample_offsets(key, 5, 2)))(keys))
    assert draws.dtype == np.int32 and draws.min() == 0 and draws.max() == 4
    assert (draws[:, 0] != draws[:, 1]).all()
    _, counts = np.unique(np.sort(draws, axis=1), axis=0, return_counts=True)
    assert len(counts) == 10
    # Chi-square of 9 degrees of freedom: above 33.7 once in ten thousand.
    assert ((counts - 300) ** 2 / 300).sum() < 33.7
    assert sorted(np.array(pw.sample_offsets(jax.random.key(6), 7, 7))) == list(range(7))


@pytest.mark.parametrize("size", [0, -1, 6])
def test_sample_offsets_refuses_sizes(size):
    with pytest.raises(ValueError, match=f"cannot sample {size} of 5 offsets"):
        pw.sample_offsets(jax.random.key(0), 5, size)


def test_refused_settings():
    x = problem(Case())
    potential = build(x.parts, Case().box)
    with pytest.raises(ValueError, match="sampled on a grid alone"):
        pairwise_log_likelihood(pw.to_table(potential), flat(x.labels), sample=jnp.array([0]))
    for chunk_edges in (0, -5):
        with pytest.raises(ValueError, match=f"at least 1, or None to choose it, got {chunk_edges}"):
            pairwise_log_likelihood(potential, x.labels, chunk_edges=chunk_edges)
        with pytest.raises(ValueError, match=f"at least 1, or None to choose it, got {chunk_edges}"):
            pw.compute_messages(potential, x.marginals, chunk_edges=chunk_edges)
    with pytest.raises(ValueError, match="algorithm must be one of .*'table'.*got 'stored'"):
        pw.prepare_messages(potential, 3, algorithm="stored")
    with pytest.raises(ValueError, match="algorithm must be one of"):
        mean_field.run(x.probe, [potential], Settings(algorithm="fold"))


# --- messages --------------------------------------------------------------------------------------


def factored(potential, marginals, mask, chunk_edges):
    return pw.compute_messages(potential, marginals, node_mask=mask, chunk_edges=chunk_edges)


def stored(potential, marginals, mask, chunk_edges):
    return pw.compute_messages(pw.prepare_messages(potential, 3, algorithm="table"), marginals, node_mask=mask)


def table(potential, marginals, mask, chunk_edges):
    message, count = pw.compute_messages(pw.to_table(potential), flat_scores(marginals), node_mask=flat(mask))
    return message.reshape(marginals.shape), count.reshape(*count.shape[:-1], *marginals.shape[-3:-1])


def check_messages(case, *encodings):
    """Messages, their number, and gradients of a linear function of them, against the oracle."""
    x = problem(case)
    mask = None if x.mask is None else jnp.asarray(x.mask)

    def run(arguments, encode):
        def objective(arguments):
            potential = build(arguments, case.box)
            message, count = encode(potential, arguments["marginals"], mask, case.chunk_edges)
            return jnp.sum(message * x.probe), (message, count)

        gradients, values = jax.grad(objective, has_aux=True)(arguments)
        return values, gradients

    arguments = {name: x.parts[name] for name in PARTS[:4]} | {"marginals": x.marginals}
    message, count, gradients = factored_oracle.messages(x.parts, case.box, x.marginals, x.oracle_mask(), x.probe)
    for values, slopes in jax.jit(lambda arguments: [run(arguments, encode) for encode in encodings])(arguments):
        assert values[0].dtype == values[1].dtype == np.float32
        close((values[0], np.broadcast_to(values[1], count.shape)), (message, count))
        close(slopes, gradients)


@pytest.mark.parametrize("case", full_but(EXAMPLES[:6] + UNEVEN, EXAMPLES[2], EXAMPLES[4], UNEVEN[0]), ids=repr)
def test_messages_of_both_routes_match_the_oracle(case):
    check_messages(case, factored, stored)


@pytest.mark.full
@settings(max_examples=8, deadline=None, derandomize=True)
@given(CASES)
def test_messages_of_both_routes_of_any_case_match_the_oracle(case):
    check_messages(case, factored, stored)


@pytest.mark.parametrize("index", full_but(range(2, 7), 2, 4))
def test_messages_of_tables_match_the_oracle(index):
    check_messages(EXAMPLES[index], table)


RUNS = {
    "plain": dict(case=Case(mask="all", chunk_edges=None), settings={}),
    "masked-damped": dict(
        case=Case(size=(3, 5), batch=(2, 1), chunk_edges=4), settings=dict(damping=0.3, average_messages=True)
    ),
    "off-the-map": dict(
        case=Case(size=(1, 6), batch=(2,), box=((0, 2), (0, -7), (1, 0), (0, 2)), chunk_edges=10**9),
        settings=dict(damping=0.1),
    ),
}


@pytest.mark.parametrize("name", full_but(RUNS, "masked-damped"))
def test_routes_of_mean_field_give_the_same_marginals_and_gradients(name):
    case, settings = RUNS[name]["case"], RUNS[name]["settings"]
    x = problem(case)
    mask = None if x.mask is None else jnp.asarray(x.mask)
    second = ((-1, 0), (0, 3))
    arguments = {name: x.parts[name] for name in PARTS[:4]} | {"unary": x.probe, "weights": np.float32([0.3, -0.4])}

    def objective(arguments, algorithm):
        potentials = [build(arguments, box) for box in (case.box, second)]
        unary, node_mask = arguments["unary"], mask
        if algorithm == "PairwiseTable":
            potentials, unary, node_mask = list(map(pw.to_table, potentials)), flat_scores(unary), flat(mask)
            algorithm = "auto"
        of = dict(weights=arguments["weights"], algorithm=algorithm, chunk_edges=case.chunk_edges, **settings)
        log_q, info = mean_field.run(unary, potentials, Settings(num_iterations=2, **of), node_mask=node_mask)
        log_q = log_q.reshape(x.probe.shape)
        return jnp.sum(log_q * x.marginals), (log_q, info.change)

    run = jax.jit(jax.grad(objective, has_aux=True), static_argnums=1)
    expected = run(arguments, "PairwiseTable")
    assert all(np.abs(v).max() > 1e-3 for v in jax.tree.leaves(expected))
    for algorithm in ("factored", "table", "auto") if name == "plain" else ("factored", "table"):
        close(run(arguments, algorithm), expected)


def test_prepared_potentials():
    """ "factored" is the potential itself; tables and stored scores pass through."""
    x = problem(Case())
    potential = build(x.parts, Case().box)
    assert pw.prepare_messages(potential, 3, algorithm="factored") is potential
    stored = pw.prepare_messages(potential, 3, algorithm="table")
    table = pw.to_table(potential)
    for other in (stored, table):
        for algorithm in ALGORITHMS:
            assert pw.prepare_messages(other, 3, algorithm=algorithm) is other
    assert isinstance(stored, pw.GridScores) and stored.offsets == potential.offsets
    assert stored.scores.shape == (3, 3, 4, 3, 3) and stored.scores.dtype == jnp.float32
    assert stored.grid == (3, 4) and stored.num_classes == 3
    nothing = build(x.parts, ())
    assert pw.prepare_messages(nothing, 3, algorithm="table") is nothing
    # The scores of the edges within the map are those of the table.
    at = np.array(
        [[(0 <= r + dr < 3) and (0 <= c + dc < 4) for r in range(3) for c in range(4)] for dr, dc in Case().box]
    )
    close(stored.scores.reshape(3, 12, 3, 3)[at], table.scores, 1e-6)


def test_stored_and_factored_potentials_mix():
    x = problem(Case(batch=(2,)))
    potential = build(x.parts, Case().box)
    stored = pw.prepare_messages(potential, 3, algorithm="table")
    run = jax.jit(lambda unary, potentials: mean_field.run(unary, potentials)[0])
    close(run(x.probe, [stored, potential]), run(x.probe, [potential, potential]), 1e-5)


@pytest.mark.parametrize("shapes", [((2,), ()), ((), (2,))], ids=str)
def test_one_potential_for_many_marginals_and_the_reverse(shapes):
    of_potential, of_marginals = shapes
    parts = problem(Case(batch=of_potential)).parts
    marginals = problem(Case(batch=of_marginals)).marginals
    potential = build(parts, Case().box)
    both = {n: v if n in ("kernel", "bias") else np.broadcast_to(v, (2, *v.shape[-3:])) for n, v in parts.items()}
    full = build(both, Case().box)
    send = jax.jit(pw.compute_messages)
    expected, _ = send(full, np.broadcast_to(marginals, (2, 3, 4, 3)))
    for one in (potential, jax.jit(lambda p: pw.prepare_messages(p, 3, algorithm="table"))(potential)):
        close(send(one, marginals)[0], expected, 1e-5)


@pytest.mark.parametrize("algorithm", full_but(["factored", "table"], "factored"))
def test_bfloat16_features_send_float32_messages(algorithm):
    case = Case(size=(5, 6), classes=4, hidden=16, mask="all")
    x = problem(case)
    half = x.parts | {name: jnp.asarray(x.parts[name], jnp.bfloat16) for name in ("hidden_p", "hidden_q")}
    full = {name: jnp.asarray(v, jnp.float32) for name, v in half.items()}

    def objective(parts):
        potential = pw.prepare_messages(build(parts, case.box), 3, algorithm=algorithm)
        message, _ = pw.compute_messages(potential, x.marginals)
        return jnp.sum(message * x.probe), message

    (gradients, message), (slopes, expected) = (jax.jit(jax.grad(objective, has_aux=True))(v) for v in (half, full))
    assert message.dtype == jnp.float32
    close(message, expected, 2e-2)
    assert {n: g.dtype for n, g in gradients.items()} == {n: v.dtype for n, v in half.items()}
    close(gradients, slopes, 2e-2)


# --- other devices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", full_but(["float32", "bfloat16"], "bfloat16"))
def test_lowers_for_other_devices(dtype):
    case = Case(batch=(2,), mask="all", weights="one")
    x = problem(case)
    parts = {name: jnp.asarray(v, dtype if name.startswith("hidden") else jnp.float32) for name, v in x.parts.items()}

    def total(parts, key=None):
        sample = None if key is None else pw.sample_offsets(key, len(case.box), 2)
        return pairwise_log_likelihood(build(parts, case.box), x.labels, sample=sample)[0]

    def infer(parts, algorithm):
        return jnp.sum(mean_field.run(x.probe, [build(parts, case.box)], Settings(algorithm=algorithm))[0])

    programs = [(total, (parts,)), (total, (parts, jax.random.PRNGKey(0)))]
    programs += [(functools.partial(infer, algorithm=algorithm), (parts,)) for algorithm in ("factored", "table")]
    for function, args in programs:
        exported = jax.export.export(jax.jit(jax.value_and_grad(function)), platforms=["cuda", "tpu"])(*args)
        assert exported.platforms == ("cuda", "tpu")


# --- what the shapes and the values of a user may bring -----------------------------------------


@functools.cache  # compiled once for all that masked nodes hold
def outcome_under_a_mask(encode):
    x = problem(Case(size=(4, 5), residual=True))

    @jax.jit
    def outcome(parts, marginals):
        def total(parts):
            potential = build(parts, Case().box)
            labels, mask = (x.labels, x.mask) if encode == "factored" else (flat(x.labels), flat(x.mask))
            potential = potential if encode == "factored" else pw.to_table(potential)
            return pairwise_log_likelihood(potential, labels, node_mask=mask)[0]

        if encode == "table":  # gradients of the hidden parts go through to_table, which has no mask
            return total(parts)
        value, gradients = jax.value_and_grad(total)(parts)
        return value, gradients, pw.compute_messages(build(parts, Case().box), marginals, node_mask=x.mask)

    return outcome, x


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encode", ["factored", "table"])
def test_masked_nodes_may_hold_anything(encode, garbage):
    """Sums, gradients and messages are those of any other values there."""
    outcome, x = outcome_under_a_mask(encode)
    nodes = np.where(x.mask[..., None], 0.0, garbage).astype(np.float32)
    if encode == "table":
        dirty = x.parts | {"unary_log_probs": x.parts["unary_log_probs"] + nodes}
    else:
        dirty = x.parts | {name: x.parts[name] + nodes for name in ("hidden_p", "hidden_q", "unary_log_probs")}
    got = outcome(dirty, x.marginals + nodes)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(got))
    close(got, outcome(x.parts, x.marginals))


def test_a_batch_of_no_images():
    x = problem(Case(batch=(0,), mask="all"))
    potential = build(x.parts, Case().box)
    assert [float(v) for v in pairwise_log_likelihood(potential, x.labels)] == [0, 0]
    for algorithm in ("factored", "table"):
        message, _ = pw.compute_messages(pw.prepare_messages(potential, 1, algorithm=algorithm), x.marginals)
        assert message.shape == x.marginals.shape


def test_gradients_of_means_fit_half_precision_where_those_of_sums_do_not():
    x = problem(Case(size=(8, 8)))
    weights = np.full(x.labels.shape, 100, np.float32)

    def mean(parts, dtype):
        parts = parts | {n: parts[n].astype(dtype) for n in ("hidden_p", "hidden_q")}
        total, count = pairwise_log_likelihood(
            build(parts, Case().box), x.labels, node_mask=x.mask, node_weights=weights
        )
        return total / count

    arrays = jax.tree.map(jnp.asarray, x.parts)
    slope = jax.jit(jax.grad(mean), static_argnums=1)
    got, expected = (slope(arrays, dtype) for dtype in (jnp.float16, jnp.float32))
    close(got, expected, 0.02, 1e-3)


def test_stored_scores_are_batched_like_everything_else():
    x = problem(Case(batch=(3,), box=((0, 1), (1, -1), (-1, 0)), mask="all", residual=False))
    store = lambda p, q: pw.prepare_messages(
        build(x.parts | {"hidden_p": p, "hidden_q": q}, Case().box), 3, algorithm="table"
    )
    stored = jax.jit(jax.vmap(store))(x.parts["hidden_p"], x.parts["hidden_q"])
    close(pw.compute_messages(stored, x.marginals), pw.compute_messages(build(x.parts, Case().box), x.marginals))


def test_two_dtypes_are_promoted():
    x = problem(Case(mask="all"))
    mixed = build(x.parts | {"hidden_p": jnp.asarray(x.parts["hidden_p"], jnp.bfloat16)}, Case().box)
    rounded = build(x.parts | {"hidden_p": np.float32(jnp.asarray(x.parts["hidden_p"], jnp.bfloat16))}, Case().box)
    run = jax.jit(lambda p: (pairwise_log_likelihood(p, x.labels), pw.compute_messages(p, x.marginals)))
    close(run(mixed), run(rounded))


def test_misuse_is_named():
    x = problem(Case(mask="all"))
    potential = build(x.parts, Case().box)
    stored = pw.prepare_messages(potential, 1, algorithm="table")
    with pytest.raises(TypeError, match="GridScores are for messages"):
        pairwise_log_likelihood(stored, x.labels)
    with pytest.raises(TypeError, match="expected a FactoredPairwise, got GridScores"):
        pw.to_table(stored)
    for sample in ([], [[0]]):
        with pytest.raises(ValueError, match=r"sample of shape \[n\]"):
            pairwise_log_likelihood(potential, x.labels, sample=sample)
