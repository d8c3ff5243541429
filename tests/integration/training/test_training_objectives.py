"""config.loss.objective: each trains, staged training freezes what it says, devices change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax import objectives, piecewise
from pwcrf_jax.mean_field import Settings
from pwcrf_jax.model import losses
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import parallel
from pwcrf_jax.training import checks, loop, steps
from pwcrf_jax.training.optimizer import make_optimizer

OTHERS = [name for name, objective in losses.OBJECTIVES.items() if objective.contains_inference]


def batch_of(rng, count, size=(32, 48), classes=6):
    labels = rng.integers(0, classes, (count, size[0] // 16, size[1] // 16)).repeat(16, 1).repeat(16, 2)
    labels[rng.random(labels.shape) < 0.05] = 255
    noise = rng.normal(0, 20, (*labels.shape, 3))
    image = (np.where(labels == 255, 0, labels)[..., None] * [40, 20, 9] + noise).clip(0, 255)
    return {"image": image.astype(np.uint8), "label": labels.astype(np.uint8)}


def started(config, seed=0, kinds=None):
    """(step function, state) of a config, for the devices given to `run`; staged: of the stage of these kinds."""
    model = configs.build_model(config)
    unary_steps = configs.unary_steps(config)
    tx = make_optimizer(config.optimizer, config.model, config.train.steps, unary_steps)
    params = restore.init_params(model, seed)
    kinds = kinds or configs.objective(config).stages[0]
    step = steps.from_config(config, model, tx, kinds)
    return step, steps.TrainState(jnp.int32(0), params, tx.init(params))


def run(step, state, batches, devices=1):
    mapped, out = parallel.pmap_train(step, devices=jax.devices()[:devices]), []
    state = jax.tree.map(jnp.array, state)  # the step takes its buffers
    for batch in batches:
        state, metrics = mapped(state, parallel.split(batch, devices))
        out.append((jax.device_get(state), {k: float(v) for k, v in metrics.items()}))
    return out


@pytest.fixture
def small(config):
    config.data.crop_size = config.data.eval_size = (32, 48)
    config.data.num_classes = 6
    config.relations.surrounding.rows = config.relations.surrounding.cols = (-1, 1)
    config.relations.surrounding.unit = "cells"
    config.relations.above_below.rows, config.relations.above_below.cols = (-1, 0), (0, 0)
    config.relations.above_below.unit = "cells"
    config.train.steps = 12
    config.optimizer.warmup_steps = 2
    return config


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_an_objective_names_its_terms_and_weighs_no_other(small, name):
    """With each relation that inference uses, or with those that it names; refinement convolutions where they train."""
    objective, batch = losses.OBJECTIVES[name], batch_of(np.random.default_rng(0), 1)
    if objective.trains_refinement_convs:
        small.model.refinement_convs.layers = ("conv3",)
    model = configs.build_model(small)
    scores = lambda p: model.apply({"params": p}, batch["image"])
    params = restore.abstract_params(model)
    names = objective.term_names(jax.eval_shape(scores, params))
    for weights in (None, 0.5, {"surrounding": 1.0}):
        of = lambda p, w=weights: objective.terms(scores(p), jnp.asarray(batch["label"]), inference=Settings(weights=w))
        terms = jax.eval_shape(of, params)
        assert set(terms) == set(names) >= set(objective.weights(terms))
    assert ("refinement_convs" in names) == objective.trains_refinement_convs
    assert [kind for stage in objective.stages for kind in stage] == list(losses.TRAINED_FACTORS)


@pytest.mark.full
@pytest.mark.parametrize("features", ["shared", "own"])
def test_relations_leave_the_steps_of_the_unary_as_they_are(small, features):
    """Beside relations that do not train its features, the unary takes the steps it takes alone, clipped or not."""
    small.model.pairwise_features, small.loss.pairwise_weight = features, 5.0
    small.model.pairwise_trains_features = features == "own"  # which is of shared ones
    small.optimizer.name, small.optimizer.clip_norm = "sgd", 0.05  # Adam would hide a gradient of another size
    batches = [batch_of(np.random.default_rng(i), 2) for i in range(3)]
    step, state = started(small)
    beside = run(step, state, batches)
    small.model.relations = ()
    alone = started(small)[0]
    tx = make_optimizer(small.optimizer, small.model, small.train.steps)
    params = {k: state.params[k] for k in ("featmap", "unary")}
    out = run(alone, steps.TrainState(jnp.int32(0), params, tx.init(params)), batches)
    assert all(m["grad_norm"] > 0.05 for _, m in out), "nothing was clipped"
    for name, tree in out[-1][0].params.items():
        for a, b in zip(*map(jax.tree.leaves, (tree, beside[-1][0].params[name])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    if features == "own":
        start, end = (x.params["featmap_pairwise"]["backbone"] for x in (state, beside[-1][0]))
        assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (start, end)), strict=True))


@pytest.mark.full
@pytest.mark.parametrize("name", ["piecewise_staged", "pseudo_likelihood", "unrolled_mean_field"])
def test_devices_change_nothing_and_the_loss_falls(small, name):
    small.loss.objective, small.loss.balance_power = name, 0.5
    batches = [batch_of(np.random.default_rng(i % 2), 8) for i in range(12)]
    step, state = started(small)
    one, eight = (run(step, state, batches, devices) for devices in (1, 8))
    for (_, a), (_, b) in zip(one, eight, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-4, nan_ok=True)
    losses = [metrics["loss"] for _, metrics in one]
    assert np.isfinite(losses).all() and losses[5] < losses[0] and one[-1][1]["nll_unary"] < one[0][1]["nll_unary"]


def test_the_terms_are_those_of_the_core(small):
    """One step's loss is the objective's own figure at the start."""
    small.model.parameterisation = "free"
    small.crf.weights, small.crf.damping = (0.5, 0.25), 0.1
    batch = batch_of(np.random.default_rng(3), 2)
    for name in ("pseudo_likelihood", "unrolled_mean_field"):
        small.loss.objective = name
        step, state = started(small)
        potentials = configs.build_model(small).apply({"params": state.params}, batch["image"])
        grid = piecewise.grid_labels(batch["label"], *potentials.unary.shape[1:3])
        chosen = list(potentials.pairwise.values())
        settings = Settings(weights=(0.5, 0.25), damping=0.1, average_messages=True)
        if name == "pseudo_likelihood":
            total, count = objectives.pseudo_log_likelihood(potentials.unary, chosen, grid, settings)
        else:
            total, count = objectives.unrolled_log_likelihood(potentials.unary, chosen, grid, settings)
        got = run(step, state, [batch])[0][1]
        assert got["loss"] == pytest.approx(float(-total / count), rel=1e-4) == got[f"nll_{name}"]
        assert got["nll_unary"] != pytest.approx(got["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "name, features",
    full_but(
        [("piecewise_staged", "shared"), ("piecewise_staged", "own"), ("unrolled_mean_field_staged", "shared")],
        ("piecewise_staged", "own"),
    ),
)
def test_stages(small, name, features):
    """The first stage trains nothing of the relations, the second nothing else."""
    small.model.pairwise_features = features
    small.loss.objective, small.loss.unary_share = name, 1 / 3
    small.model.pairwise_trains_features = True  # staged training does not let them
    small.optimizer.weight_decay = 0.1
    assert configs.unary_steps(small) == 4
    (first, state), (second, _) = (started(small, kinds=(kind,)) for kind in losses.TRAINED_FACTORS)
    batches = [batch_of(np.random.default_rng(i), 2) for i in range(12)]
    out = run(first, state, batches[:4])
    out += run(second, out[-1][0], batches[4:])
    states = [jax.device_get(state.params), *(s.params for s, _ in out)]
    for i, (before, after) in enumerate(zip(states[:-1], states[1:], strict=True)):
        for part in before:
            moved = any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before[part], after[part])), strict=True))
            assert moved == (("pairwise" in part) == (i >= 4)), (i, part)
    second_terms = ("surrounding", "above_below") if name == "piecewise_staged" else ("unrolled_mean_field",)
    for i, (_, metrics) in enumerate(out):
        assert np.isfinite([metrics["loss"], metrics["nll_unary"], metrics["grad_norm"]]).all()
        assert (metrics[f"nll_{second_terms[0]}"] == -1) == (i < 4)
        expected = metrics["nll_unary"] if i < 4 else sum(metrics[f"nll_{k}"] for k in second_terms)
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rule", full_but(["adamw", "sgd"], "adamw"))
def test_the_second_stage_starts_as_a_run_does(small, rule):
    """Moments and schedule of the relations begin with their stage, as in a run of their own."""
    small.loss.objective, small.loss.unary_share, small.optimizer.name = "piecewise_staged", 1 / 3, rule
    params = restore.init_params(configs.build_model(small), 0)
    ones = jax.tree.map(jnp.ones_like, params)
    relations = lambda tree: {k: v for k, v in tree.items() if k.startswith("pairwise_")}
    staged = make_optimizer(small.optimizer, small.model, 12, 4)
    alone = make_optimizer(small.optimizer, small.model, 8)
    state, fresh = staged.init(params), alone.init(relations(params))
    staged_update, alone_update = jax.jit(staged.update), jax.jit(alone.update)
    for step in range(7):
        trained = {k: float(k.startswith("pairwise_") == (step >= 4)) for k in ones}
        grads = {k: jax.tree.map(lambda g, on=trained[k]: on * g, v) for k, v in ones.items()}
        updates, state = staged_update(grads, state, params)
        if step >= 4:
            expected, fresh = alone_update(relations(grads), fresh, relations(params))
            for a, b in zip(*map(jax.tree.leaves, (relations(updates), expected)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5)


def test_padding_of_a_crop_takes_no_part(small):
    """Unrolled mean field of a padded crop is that of the image in its frame, as evaluation masks it."""
    small.loss.objective, small.model.parameterisation = "unrolled_mean_field", "free"
    batch = batch_of(np.random.default_rng(5), 2, size=(64, 96))
    batch["label"][:, 32:], batch["label"][:, :, 64:] = 255, 255
    step, state = started(small)
    model = configs.build_model(small)
    potentials = model.apply({"params": state.params}, batch["image"])
    grid = piecewise.grid_labels(batch["label"], 4, 6)
    mask = np.zeros((2, 4, 6), bool)
    mask[:, :2, :4] = True
    total, count = objectives.unrolled_log_likelihood(
        potentials.unary,
        list(potentials.pairwise.values()),
        grid,
        Settings(average_messages=True),
        node_mask=jnp.asarray(mask),
    )
    valid_box = np.array([[0, 0, 32, 64]] * 2, np.int32)
    got = run(step, state, [batch | {"valid_box": valid_box}])[0][1]["loss"]
    assert got == pytest.approx(float(-total / count), rel=1e-4)
    assert got != pytest.approx(run(step, state, [batch])[0][1]["loss"], rel=1e-4)


@pytest.mark.full
def test_a_staged_run_keeps_its_stages(config, tmp_path):
    config.loss.objective, config.train.steps, config.train.eval_every = "piecewise_staged", 2, 0
    loop.train_and_evaluate(config, str(tmp_path / "work"))
    config.train.steps = 4
    with pytest.raises(configs.ConfigError, match=r"began with 1 steps .*now it would be with 2.*unary_share to 0\.25"):
        loop.train_and_evaluate(config, str(tmp_path / "work"))
    config.loss.unary_share = 0.25
    loop.train_and_evaluate(config, str(tmp_path / "work"))


@pytest.mark.parametrize(
    "name",
    full_but(
        ["piecewise_staged", "pseudo_likelihood", "unrolled_mean_field", "unrolled_mean_field_staged"],
        "piecewise_staged",
    ),
)
@pytest.mark.full
def test_a_run_from_start_to_table(config, tmp_path, name):
    config.loss.objective = name
    config.train.steps, config.train.eval_every, config.train.log_every = 4, 4, 1
    result = loop.train_and_evaluate(config, str(tmp_path / "work"))
    assert result["rows"]["all"]["miou"] is not None
    lines = (tmp_path / "work" / "metrics.jsonl").read_text()
    assert "NaN" not in lines and ("train/nll_surrounding" in lines) == (name == "piecewise_staged")


def test_refused(small):
    small.loss.objective = "exact"
    with pytest.raises(configs.ConfigError, match=r"loss\.objective = 'exact' is not one of 'piecewise'"):
        configs.validate(small, num_devices=1)
    small.loss.objective, small.loss.sampled_offsets = "pseudo_likelihood", 3
    with pytest.raises(configs.ConfigError, match=r"loss\.sampled_offsets = 3 does nothing"):
        configs.validate(small, num_devices=1)
    small.loss.sampled_offsets = 0
    small.loss.objective, small.loss.unary_share = "piecewise_staged", 0.99
    with pytest.raises(configs.ConfigError, match=r"unary_share = 0\.99 leaves none of the 12 steps"):
        configs.validate(small, num_devices=1)
    for name in (*OTHERS, "piecewise_staged"):
        small.loss.objective, small.model.relations = name, ()
        with pytest.raises(configs.ConfigError, match="needs relations"):
            configs.validate(small, num_devices=1)
    small.loss.objective = "piecewize"
    with pytest.raises(configs.ConfigError, match="did you mean 'piecewise'"):
        configs.validate(small, num_devices=1)
    small.loss.objective, small.loss.unary_share = "piecewise_staged", 1.0
    with pytest.raises(configs.ConfigError, match=r"unary_share.*below 1"):
        configs.validate(small, num_devices=1)


@pytest.mark.parametrize(
    "name, key, value",
    [("pseudo_likelihood", "weights", (0.0,)), ("unrolled_mean_field", "weights", (1.0, 0.0))]
    + [("unrolled_mean_field", "relations", ("surrounding",))]
    + [(name, "num_iterations", 0) for name in ("unrolled_mean_field", "unrolled_mean_field_staged")],
)
def test_relations_out_of_reach_are_refused_in_training_alone(small, tmp_path, name, key, value):
    small.loss.objective, small.crf[key] = name, value
    with pytest.raises(configs.ConfigError, match=rf"config\.crf\.{key} = .*config\.loss\.objective = '{name}'"):
        loop.train_and_evaluate(small, str(tmp_path))
    assert not list(tmp_path.iterdir())
    configs.validate(small, num_devices=1)  # as evaluation does: decoding so is no mistake
    small.loss.objective, small.data.eval_size = "piecewise", (192, 256)
    checks.load_and_validate(small)  # trains them each by itself


@pytest.mark.full
@pytest.mark.parametrize("features", ["shared", "own"])
def test_relations_on_the_unary_of_another_run(config, trained, tmp_path, features):
    """init_from names a workdir; with unary_share 0 nothing but the relations is trained, from the first step.

    Features of their own start as that run's, near which two small steps leave them.
    """
    source = restore.restore_params(configs.load(trained / "config.json"), str(trained))[1]
    config.init_from, config.loss.objective, config.loss.unary_share = str(trained), "piecewise_staged", 0.0
    config.model.pairwise_features = features
    config.relations.around = config.relations.surrounding
    config.model.relations = ("above_below", "around")
    config.train.steps, config.train.eval_every, config.optimizer.weight_decay = 2, 0, 0.1
    loop.train_and_evaluate(config, str(tmp_path / "work"))
    params = restore.restore_params(configs.load(tmp_path / "work" / "config.json"), str(tmp_path / "work"))[1]
    same = lambda name: all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (source[name], params[name])), strict=True)
    )
    assert same("featmap") and same("unary") and not same("pairwise_above_below")
    assert "pairwise_around" in params
    assert ("featmap_pairwise" in params) == (features == "own")
    if features == "own":
        own, start = params["featmap_pairwise"], source["featmap"]
        apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), own, start)
        assert 0 < max(jax.tree.leaves(apart)) < 5e-3
        config.init_from, config.model.pairwise_features = str(tmp_path / "work"), "shared"
        with pytest.raises(configs.ConfigError, match="on features of their own.*pairwise_features to 'own'"):
            loop.train_and_evaluate(config, str(tmp_path / "other"))
        config.model.relations = ()
        own, shared = config, config.copy_and_resolve_references()
        own.model.pairwise_features = "own"
        assert configs.identity(own) == configs.identity(shared)


def test_starting_from_a_run_is_refused_where_nothing_fits(config, trained, tmp_path):
    config.init_from = str(tmp_path)
    with pytest.raises(configs.ConfigError, match=r"config\.json does not exist"):
        loop.train_and_evaluate(config, str(tmp_path / "work"))
