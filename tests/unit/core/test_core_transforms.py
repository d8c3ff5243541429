"""Every public function of the core: eager == jit == vmap, and the second call does not trace again."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import full_row

import pwcrf_jax as pw
from pwcrf_jax import (
    costs,
    dense_crf,
    gaussian,
    heads,
    likelihood,
    mean_field,
    messages,
    metrics,
    objectives,
    permutohedral,
    piecewise,
    pixels,
    potentials,
    relations,
)
from pwcrf_jax.model import plan
from reference import random_problems

H, W, K, M = 3, 4, 3, 4
BOX = relations.offsets(relations.SURROUNDING, H, W)
WEIGHTS = (0.5, 0.25)


def inputs(seed):
    x = random_problems.grid_problem(seed, H, W, K, M)
    rng = np.random.default_rng(seed)
    image = rng.integers(0, K, (2 * H, 3 * W)).astype(np.int32)
    return jax.tree.map(
        jnp.asarray,
        dict(
            x._asdict(),
            labels=np.where(rng.random((H, W)) < 0.2, 255, x.labels),
            image=np.where(rng.random(image.shape) < 0.2, 255, image),
            predictions=rng.integers(0, K, image.shape).astype(np.int32),
            mask=rng.random((H, W)) > 0.2,
            weights=rng.uniform(0.5, 2, (H, W)).astype(np.float32),
            relation_weights=np.float32(WEIGHTS),
            damping=np.float32(rng.uniform(0, 0.9)),
            key=jax.random.key(seed),
            box=np.int32([seed % 2, 1, 2 * H - seed % 2, 3 * W - 3]),
            colours=rng.uniform(2, 255, (H, W, 3)).astype(np.float32),
            sigmas=rng.uniform(0.5, 2, 2).astype(np.float32),
        ),
    )


def grid(v, residual=True):
    return pw.factored_pairwise(
        v["hidden_p"], v["hidden_q"], v["kernel"], v["bias"], BOX, v["unary_log_probs"] if residual else None
    )


def own_head(v):
    return heads.pairwise_apply(heads.pairwise_init(v["key"], M, M, K, zero_last=False), v["hidden_p"], BOX)


def table(v, residual=True):
    return pw.to_table(grid(v, residual))


def nodes(v, name):
    return v[name].reshape(H * W, *v[name].shape[2:])


def sample(v):
    return pw.sample_offsets(v["key"], len(BOX), 3)


def stored(v):
    return pw.prepare_messages(grid(v), 3, algorithm="table")


def lattice(v):
    return permutohedral.build(nodes(v, "hidden_p"), nodes(v, "mask"), capacity=H * W * (M + 1))


def corner(v):
    """Two rows of the grid: few enough labellings to enumerate."""
    return pw.factored_pairwise(v["hidden_p"][:2], v["hidden_q"][:2], v["kernel"], v["bias"], ((0, 1), (1, 0)))


def refine(v, method):
    params = dense_crf.Params(v["kernel"][0], v["sigmas"], v["sigmas"][0], 2 * v["sigmas"], 30 * v["sigmas"][1])
    unary = jax.nn.log_softmax(v["unary"])
    return dense_crf.refine(unary, v["colours"], params, 2, mask=v["mask"], method=method, capacity=6 * H * W)


def compute_messages(v, potential, **settings):
    return pw.compute_messages(potential, jax.nn.softmax(v["unary"]), node_mask=v["mask"], **settings)


def of(v, **changes):
    given = dict(weights=v["relation_weights"], damping=v["damping"], average_messages=True)
    return mean_field.Settings(**given | changes)


CASES = {
    "unary_log_likelihood": lambda v: piecewise.unary_log_likelihood(
        v["unary"], v["labels"], node_weights=v["weights"]
    ),
    "uniform_log_likelihood": lambda v: piecewise.uniform_log_likelihood(
        v["unary"], v["labels"], node_weights=v["weights"]
    ),
    "soft_dice": lambda v: piecewise.soft_dice(v["unary"], v["labels"]),
    "pairwise_log_likelihood-factored": lambda v: pw.pairwise_log_likelihood(
        grid(v), v["labels"], node_weights=v["weights"]
    ),
    "pairwise_log_likelihood-table": lambda v: pw.pairwise_log_likelihood(table(v), nodes(v, "labels")),
    "pairwise_log_likelihood-masked": lambda v: likelihood.pairwise_log_likelihood(
        grid(v, False), v["labels"], node_mask=v["mask"], void=255
    ),
    "pairwise_log_likelihood-chunks": lambda v: likelihood.pairwise_log_likelihood(
        grid(v), v["labels"], node_mask=v["mask"], chunk_edges=5, void=255
    ),
    "pairwise_log_likelihood-sample": lambda v: likelihood.pairwise_log_likelihood(
        grid(v), v["labels"], node_mask=v["mask"], node_weights=v["weights"], sample=sample(v), void=255
    ),
    "pairwise_log_likelihood-chunked-sample": lambda v: pw.pairwise_log_likelihood(
        grid(v), v["labels"], chunk_edges=7, sample=sample(v)
    ),
    "sample_offsets": sample,
    "prepare_messages-factored": lambda v: pw.prepare_messages(grid(v), 3, algorithm="factored"),
    "prepare_messages-table": stored,
    "prepare_messages-masked": lambda v: pw.prepare_messages(grid(v), 3, algorithm="table", node_mask=v["mask"]),
    "compute_prepared_messages": lambda v: messages.compute_prepared_messages(
        pw.prepare_messages(grid(v), 1, algorithm="factored", node_mask=v["mask"]),
        jax.nn.softmax(v["unary"]),
        v["mask"],
    ),
    "compute_messages-chunks": lambda v: compute_messages(v, grid(v), chunk_edges=5),
    "compute_messages-stored": lambda v: compute_messages(v, stored(v)),
    "compute_messages-factored": lambda v: compute_messages(v, grid(v)),
    "compute_messages-table": lambda v: pw.compute_messages(
        table(v), jax.nn.softmax(nodes(v, "unary")), node_mask=nodes(v, "mask")
    ),
    "factored_pairwise": grid,
    "pairwise_init": lambda v: heads.pairwise_init(v["key"], M, M, K, zero_last=False),
    "pairwise_apply": lambda v: own_head(v),
    "piecewise_loss": lambda v: piecewise.piecewise_loss(
        v["unary"], [own_head(v), grid(v, False)], v["labels"], balance_power=0.5
    ),
    "piecewise_loss-table": lambda v: piecewise.piecewise_loss(
        nodes(v, "unary"), table(v, False), nodes(v, "labels"), balance_power=0.5
    ),
    "decode": lambda v: pixels.decode(v["unary"], [grid(v)], of(v, weights=None), (2 * H, 3 * W)),
    "decode-box": lambda v: pixels.decode(
        v["unary"], [grid(v)], size=(2 * H, 3 * W), valid_box=v["box"], num_iterations=1
    ),
    "upsample": lambda v: pixels.upsample(v["unary"], (2 * H, 3 * W), v["mask"]),
    "read": lambda v: pixels.read(v["unary"], v["mask"], *pixels.frame_taps((H, W), (5, 7))),
    "grid_mask": lambda v: pixels.grid_mask(v["box"], (H, W), (2 * H, 3 * W)),
    "to_table": table,
    "weighted": lambda v: potentials.weighted(grid(v), v["bias"]),
    "last_layer": lambda v: potentials.last_layer(v["hidden_p"], v["kernel"], v["bias"]),
    "guarded_last_layer": lambda v: potentials.guarded_last_layer(v["hidden_p"], v["kernel"], v["bias"]),
    "sum_over_neighbours": lambda v: potentials.sum_over_neighbours(v["weights"], grid(v).offsets),
    "init": lambda v: mean_field.init(v["unary"]),
    "tempered": lambda v: mean_field.tempered(v["unary"], of(v, unary_temperature=1 + v["damping"])),
    "step": lambda v: mean_field.step(
        mean_field.init(v["unary_log_probs"]),
        v["unary"],
        [grid(v), grid(v, False)],
        of(v, algorithm="factored"),
        node_mask=v["mask"],
    ),
    **{
        f"run-{algorithm}": lambda v, algorithm=algorithm: mean_field.run(
            v["unary"], [grid(v), grid(v, False)], of(v, algorithm=algorithm), node_mask=v["mask"]
        )
        for algorithm in messages.ALGORITHMS
    },
    "run-PairwiseTable": lambda v: mean_field.run(
        nodes(v, "unary"), [table(v), table(v)], of(v), node_mask=nodes(v, "mask")
    ),
    "pseudo_log_likelihood": lambda v: objectives.pseudo_log_likelihood(
        v["unary"], [grid(v), grid(v, False)], v["labels"], of(v), node_weights=v["weights"]
    ),
    "unrolled_log_likelihood": lambda v: objectives.unrolled_log_likelihood(
        v["unary"],
        [grid(v)],
        v["labels"],
        of(v, num_iterations=2, weights=v["relation_weights"][:1]),
        node_mask=v["mask"],
    ),
    "exact_log_likelihood": lambda v: objectives.exact_log_likelihood(
        v["unary"][:2], [corner(v)], v["labels"][:2], mean_field.Settings(weights=v["relation_weights"][:1])
    ),
    "balance_weights": lambda v: piecewise.balance_weights(v["labels"], K, power=v["damping"]),
    "grid_labels": lambda v: piecewise.grid_labels(v["image"], H, W),
    "confusion_matrix": lambda v: metrics.confusion_matrix(v["predictions"], v["image"], K),
    "boundary_band": lambda v: metrics.boundary_band(v["image"], 1, v["image"] != 255),
    "build": lattice,
    "apply-lattice": lambda v: permutohedral.apply(lattice(v), nodes(v, "unary")),
    "apply-points": lambda v: gaussian.apply(
        gaussian.prepare(nodes(v, "hidden_p"), nodes(v, "mask"), "exact"), nodes(v, "unary")
    ),
    "prepare": lambda v: gaussian.prepare(nodes(v, "hidden_p"), nodes(v, "mask")),
    "exact": lambda v: gaussian.exact(nodes(v, "hidden_p"), nodes(v, "mask"), nodes(v, "unary"), (5, 4)),
    "spatial-matrix": lambda v: gaussian.spatial(v["unary"], v["sigmas"], v["mask"]),
    "spatial-taps": lambda v: gaussian.spatial(v["unary"], v["sigmas"], v["mask"], radius=2),
    "pair": lambda v: gaussian.pair(v["sigmas"]),
    "pixel_features": lambda v: dense_crf.pixel_features(v["colours"], v["sigmas"], v["sigmas"][0]),
    "refine-exact": lambda v: refine(v, "exact"),
    "refine-lattice": lambda v: refine(v, "lattice"),
}


def public_functions(*modules):
    for module in modules:
        for name, value in vars(module).items():
            if not name.startswith("_") and not isinstance(value, type) and callable(value):
                if getattr(value, "__module__", "") == module.__name__:
                    yield name


# Static geometry, costs and figures on the host: nothing to trace.
HOST = {"replaced", "frame_side", "resolve_method", "offsets", "edge_list", "validity_mask", "scores", "radius_of"}
HOST |= {"offsets_on", "taps", "frame_taps", *public_functions(costs, plan)}


def test_every_public_function_is_in_the_battery():
    covered = {name.split("-")[0] for name in CASES} | HOST
    modules = (
        relations, costs, potentials, likelihood, messages, piecewise, objectives, mean_field, metrics, plan,
        permutohedral, gaussian, dense_crf, heads, pixels,
    )  # fmt: skip
    assert set(public_functions(*modules)) == covered
    exported = {n for n in pw.__all__ if callable(v := getattr(pw, n)) and not isinstance(v, type)}
    assert {n for n in exported if getattr(pw, n).__module__.startswith("pwcrf_jax.")} - covered == set()


def equal(got, expected):
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# A row of each function here, the others by `make test-full`: they trace the same code with other settings.
MORE = {
    "pairwise_log_likelihood-table", "pairwise_log_likelihood-chunked-sample", "pairwise_log_likelihood-masked",
    "prepare_messages-factored", "prepare_messages-table", "compute_messages-chunks",
    "compute_messages-stored", "run-factored", "run-table", "run-PairwiseTable", "refine-exact", "spatial-matrix",
    "apply-points", "piecewise_loss-table", "decode-box", "upsample", "pairwise_init", "read", "grid_mask",
    "piecewise_loss", "decode",
}  # fmt: skip
assert set(CASES) > MORE


@pytest.mark.parametrize("name", [full_row(name) if name in MORE else name for name in CASES])
def test_eager_jit_and_vmap_agree_and_trace_once(name):
    function, traces = CASES[name], []

    def counted(v):
        traces.append(1)
        return function(v)

    first, second = inputs(61), inputs(62)
    jitted = jax.jit(counted)
    one, two = jitted(first), jitted(second)
    assert len(traces) == 1
    equal(one, function(first))
    batch = jax.tree.map(lambda *v: jnp.stack(v), first, second)
    equal(jax.jit(jax.vmap(function))(batch), jax.tree.map(lambda *v: jnp.stack(v), one, two))
    # The battery's two inputs are told apart by the function.
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True))


class Model(NamedTuple):
    unary: jax.Array
    potentials: list


@pytest.mark.parametrize("encode", [grid, table])
def test_potentials_pass_through_jit_as_arguments(encode):
    """Potentials are pytrees, their offsets static: a new potential of one relation traces nothing."""
    traces = []

    @jax.jit
    def run(model):
        traces.append(1)
        return mean_field.run(model.unary, model.potentials)[0]

    for seed in (63, 64):
        v = inputs(seed)
        unary = v["unary"] if encode is grid else nodes(v, "unary")
        run(Model(unary, [encode(v), encode(v, residual=False)]))
    assert len(traces) == 1
    if encode is grid:
        fewer = pw.factored_pairwise(v["hidden_p"], v["hidden_q"], v["kernel"], v["bias"], BOX[1:])
        run(Model(v["unary"], [fewer, fewer]))
        assert len(traces) == 2


def test_factored_pairwise_is_a_pytree_of_its_arrays():
    potential = grid(inputs(65))
    leaves, tree = jax.tree.flatten(potential)
    assert len(leaves) == 5 and len(jax.tree.leaves(grid(inputs(65), residual=False))) == 4
    assert hash(tree) == hash(jax.tree.structure(grid(inputs(66))))
    assert jax.tree.unflatten(tree, leaves).offsets == tuple(map(tuple, BOX.tolist()))
