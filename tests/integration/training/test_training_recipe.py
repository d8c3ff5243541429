"""A recipe of today: accumulation, averaged parameters, dropout, jitter, early stopping, hooks."""

import importlib
import json
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rows import full_but
from test_training_objectives import batch_of
from test_training_runs import _interrupt_after, _params

import pwcrf_jax as pw
from pwcrf_jax import config as configs
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.model import losses
from pwcrf_jax.model.segmenter import Potentials
from pwcrf_jax.nets import drop_channels
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import checkpoint, functions, logs, parallel
from pwcrf_jax.training import checks, initial, loop, steps
from pwcrf_jax.training.averaging import Averaging
from pwcrf_jax.training.optimizer import make_optimizer
from pwcrf_jax.training.patience import Patience

ROOT = pathlib.Path(__file__).parents[3]


# --- gradient accumulation and dropout, over devices -----------------------------------------------


def _small(config):
    config.data.crop_size = config.data.eval_size = (32, 48)
    for name, rows in (("surrounding", (-1, 1)), ("above_below", (-1, 0))):
        config.relations[name].update(rows=rows, cols=(-1, 1), unit="cells", grid=0)
    config.model.parameterisation = "free"
    return config


def _uneven(count):
    batch = batch_of(np.random.default_rng(0), count)
    for i, label in enumerate(batch["label"]):
        label[: 32 * (i % 5) // 4] = 255  # some parts of a device have next to no label
    return batch


def _one_step(config, batch, devices, params):
    """(metrics, the update of the parameters) of one step."""
    model = configs.build_model(config)
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    keep = optax.GradientTransformation(zeros, lambda updates, state, params: (zeros(updates), updates))
    tx = optax.chain(make_optimizer(config.optimizer, config.model, 10), keep)
    step = parallel.pmap_train(steps.from_config(config, model, tx), devices=jax.devices()[:devices])
    state = steps.TrainState.create(jax.tree.map(jnp.array, params), tx)
    state, metrics = step(state, parallel.split(batch, devices))
    return {k: float(v) for k, v in metrics.items()}, jax.device_get(state.opt_state[-1])


@pytest.mark.parametrize("devices, accumulate", full_but([(1, 4), (2, 8), (8, 2)], (8, 2)))
def test_parts_and_devices_are_one_batch(config, devices, accumulate):
    """With all that depends on counts, on draws and on the norm of the whole gradient."""
    _small(config)
    config.optimizer.name, config.optimizer.clip_norm, config.optimizer.warmup_steps = "sgd", 0.01, 0
    config.model.relations, config.loss.sampled_offsets, config.loss.balance_power = ("surrounding",), 2, 0.5
    config.loss.label_smoothing, config.loss.dice_weight, config.model.dropout = 0.1, 0.5, 0.3
    batch, params = _uneven(16), restore.init_params(configs.build_model(config), 0)
    expected, update = _one_step(config, batch, 1, params)
    config.train.accumulate = accumulate
    got, other = _one_step(config, batch, devices, params)
    assert got.keys() == expected.keys() >= {"nll_unary", "nll_label_smoothing", "nll_dice", "nll_surrounding"}
    assert expected["grad_norm"] > 0.02, "nothing was clipped"
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-6), key
    for a, b in zip(*map(jax.tree.leaves, (other, update)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)
    # The loss is what the terms say.
    weights = {"unary": 0.9, "label_smoothing": 0.1, "dice": 0.5, "surrounding": 1.0}
    assert expected["loss"] == pytest.approx(sum(w * expected[f"nll_{k}"] for k, w in weights.items()), rel=1e-5)


@pytest.mark.full
def test_parts_need_the_nets_once_each(config):
    """The counts of the whole batch cost no forward pass."""
    _small(config)
    compiled = {}
    for config.train.accumulate in (1, 4):
        model, tx = configs.build_model(config), optax.sgd(0.1)
        step = parallel.pmap_train(steps.from_config(config, model, tx), devices=jax.devices()[:1])
        state = jax.eval_shape(lambda p, tx=tx: steps.TrainState.create(p, tx), restore.abstract_params(model))
        compiled[config.train.accumulate] = step.lower(state, parallel.split(_uneven(16), 1)).compile().as_text()
    convolutions = {n: len(re.findall(r"= \S+ convolution\(|__onednn\$conv|\bdot\(", x)) for n, x in compiled.items()}
    assert 0 < convolutions[4] <= 4 * convolutions[1]  # on a CPU parts are written out one by one


@pytest.mark.parametrize("accumulate, batch_size, devices", [(3, 8, 1), (2, 8, 8), (16, 8, 1)])
def test_parts_that_do_not_divide_are_refused(config, accumulate, batch_size, devices):
    config.train.accumulate, config.train.batch_size = accumulate, batch_size
    with pytest.raises(
        configs.ConfigError, match=rf"train\.accumulate = {accumulate} does not divide the {8 // devices}"
    ):
        configs.validate(config, num_devices=devices)
    config.train.batch_size = devices * accumulate
    configs.validate(config, num_devices=devices, batches=("train.batch_size",))


def test_dropout_is_of_whole_channels_of_the_heads_that_a_stage_trains(config):
    _small(config).model.dropout, config.model.relations = 0.4, ("surrounding",)
    model, batch = configs.build_model(config), batch_of(np.random.default_rng(1), 3)
    params = restore.init_params(model, 0)
    keys = jax.random.split(jax.random.key(0), 3)
    of = lambda image=batch["image"], **kw: model.apply({"params": params}, image, **kw)
    plain, both = of(), of(dropout_keys=keys)
    unary, pairwise = (of(dropout_keys=keys, dropped=(kind,)) for kind in losses.TRAINED_FACTORS)
    hidden = lambda x: x.pairwise["surrounding"].hidden_p
    same = lambda a, b: np.array_equal(a, b)
    assert same(unary.unary, both.unary) and not same(unary.unary, plain.unary)
    assert same(hidden(pairwise), hidden(both)) and not same(hidden(pairwise), hidden(plain))
    assert same(hidden(unary), hidden(plain)) and same(pairwise.unary, plain.unary)
    # An image keeps the same in any company.
    alone = of(batch["image"][2:], dropout_keys=keys[2:])
    np.testing.assert_allclose(alone.unary[0], both.unary[2], rtol=1e-5, atol=1e-6)
    kept = np.asarray(drop_channels(jnp.ones((64, 2, 3, 128)), jax.random.split(jax.random.key(1), 64), 0.25))
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1 / 0.75)}
    assert np.all(kept == kept[:, :1, :1]) and np.mean(kept) == pytest.approx(1, abs=0.03)
    assert len({x.tobytes() for x in kept[:, 0, 0]}) == 64


# --- averaged parameters ---------------------------------------------------------------------------


class Toy:
    """A model that compiles at once: linear in colours; relation "r" to the cell at the right."""

    dropout = 0.0

    def apply(self, variables, images):
        params, x = variables["params"], images[:, ::16, ::16].astype(jnp.float32) / 255
        net = params["pairwise_r"]
        pair = pw.factored_pairwise(x @ net["p"], x @ net["q"], net["kernel"], net["bias"], np.array([[0, 1]]))
        return Potentials(x @ params["unary"]["kernel"], {"r": pair})

    @staticmethod
    def params():
        shapes = {"p": (3, 4), "q": (3, 4), "kernel": (4, 6, 6), "bias": (6, 6)}
        rng = np.random.default_rng(0)
        of = lambda shape: jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32)
        return {"unary": {"kernel": of((3, 6))}, "pairwise_r": {k: of(v) for k, v in shapes.items()}}


def _toy_states(config, averaging, number, unary_steps=None, spoiled=()):
    """The states after each step; images of steps in `spoiled` give a gradient that is not finite."""
    tx = make_optimizer(config.optimizer, config.model, number, unary_steps)
    objective = losses.Piecewise(staged=unary_steps is not None)
    mapped = [
        parallel.pmap_train(
            steps.make_train_step(
                Toy(), tx, objective, trained=kinds, averaging=Averaging(averaging, i * (unary_steps or 0))
            ),
            devices=jax.devices()[:1],
        )
        for i, kinds in enumerate(objective.stages)
    ]
    state, out = steps.TrainState.create(Toy.params(), tx, Averaging(averaging)), []
    for i in range(number):
        batch = parallel.split(batch_of(np.random.default_rng(i), 4), 1)
        if i in spoiled:
            batch["image"] = np.full(batch["image"].shape, np.nan, np.float32)
        taken = int(state.step)
        state, _ = mapped[int(unary_steps is not None and taken >= unary_steps)](state, batch)
        out.append(jax.device_get(state))
    return out


def _average(params, start, decay):
    """The oracle, in float64: the average after each of the parameters."""
    out, average = [], start
    for t, p in enumerate(params):
        d = min(decay, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, p, d=d: d * np.float64(a) + (1 - d) * np.float64(p), average, p)
        out.append(average)
    return out


def _close(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def _equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_averages_are_those_of_the_equation(config):
    config.optimizer.learning_rate = 0.1
    with_average, without = _toy_states(config, 0.4, 8), _toy_states(config, 0.0, 8)
    for state, plain, wanted in zip(
        with_average, without, _average([s.params for s in with_average], Toy.params(), 0.4), strict=True
    ):
        assert plain.averaged is None and _equal(state.params, plain.params), "an average changed the training"
        _close(state.averaged, wanted)
        assert state.evaluated is state.averaged and plain.evaluated is plain.params
    assert not np.allclose(state.averaged["unary"]["kernel"], state.params["unary"]["kernel"], atol=1e-3)
    trees = state.trees()
    assert _equal(trees["params"], state.averaged) and _equal(trees["rest"]["params"], state.params)
    assert _equal(steps.TrainState.from_trees(trees), state)
    assert _equal(steps.TrainState.from_trees(plain.trees()), plain) and set(plain.trees()["rest"]) == {
        "step",
        "opt_state",
    }


@pytest.mark.full
def test_a_skipped_step_does_not_count_in_the_average(config):
    whole, skipping = _toy_states(config, 0.9, 4), _toy_states(config, 0.9, 4, spoiled=(2,))
    assert int(skipping[-1].step) == 3 and _equal(skipping[1], whole[1])
    assert _equal(skipping[2], whole[1]) and not _equal(skipping[3].averaged, whole[1].averaged)


def test_relations_train_on_the_averaged_unary(config):
    config.optimizer.learning_rate = 0.1
    states = _toy_states(config, 0.6, 8, unary_steps=4)
    end, after = states[3], states[4:]
    assert not _equal(end.params["unary"], end.averaged["unary"])
    assert _equal(end.averaged["pairwise_r"], Toy.params()["pairwise_r"])
    for state in after:
        assert _equal(state.params["unary"], end.averaged["unary"]) and _equal(
            state.averaged["unary"], end.averaged["unary"]
        )
    wanted = _average([s.params["pairwise_r"] for s in after], Toy.params()["pairwise_r"], 0.6)
    for state, average in zip(after, wanted, strict=True):
        _close(state.averaged["pairwise_r"], average)


@pytest.mark.parametrize("before, now", [(False, 0.9), (True, 0.0)])
def test_an_average_begins_with_a_run(config, before, now):
    config.optimizer.ema_decay = now
    with pytest.raises(configs.ConfigError, match=r"optimizer\.ema_decay = .* this run began with.* set it to"):
        checks.check_averaged(config, {"averaged": before})
    checks.check_averaged(config, {"averaged": bool(now)})


# --- whole runs ------------------------------------------------------------------------------------

HOOK = """
seen = []

def log(step, metrics):
    seen.append((step, metrics))
    if step > 3:
        raise OSError("no\\nnetwork")
"""


@pytest.fixture
def hook(tmp_path, monkeypatch):
    """The module of a hook, in the current folder."""
    (tmp_path / "own_hook.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield functions.load("own_hook:log", "train.hook") and sys.modules["own_hook"]
    sys.modules.pop("own_hook", None)


def _score_by_params(monkeypatch):
    """Evaluations cost nothing: the score follows from the parameters that they are given. Returns their hashes."""
    seen = []

    def evaluated(eval_fn, params, dataset, split, *_):
        seen.append(checkpoint.hashes({"params": jax.device_get(params)}))
        return {"split": split, "rows": {"all": {"miou": float(jnp.abs(params["unary"]["last"]["kernel"]).mean())}}}

    monkeypatch.setattr(evaluate, "evaluate_params", evaluated)
    monkeypatch.setattr(evaluate, "table", lambda _: "")
    monkeypatch.setattr(evaluate, "summary", lambda result: {"miou_all": result["rows"]["all"]["miou"]})
    return seen


@pytest.mark.full
def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, monkeypatch, hook, caplog):
    monkeypatch.setattr(logs.log, "propagate", True)
    caplog.set_level("INFO", logger="pwcrf_jax")
    config.model.dropout, config.data.jitter, config.optimizer.ema_decay = 0.3, (0.3, 0.3, 0.3, 0.05), 0.7
    config.train.patience, config.train.hook, config.eval.panel = 5, "own_hook:log", 0
    config.loss.evidence_temperature, config.loss.evidence_dropout = (1.0, 4.0), 0.3
    config.model.relations = ("surrounding",)
    whole, stopped, evaluated = tmp_path / "whole", tmp_path / "stopped", _score_by_params(monkeypatch)
    loop.train_and_evaluate(config, str(whole))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **metrics} for step, metrics in hook.seen] == lines and "val/miou_all" in lines[-1]
    said = [r.getMessage() for r in caplog.records if "train.hook" in r.getMessage()]
    assert said == ["step 4: config.train.hook raised OSError: no network (own_hook.py, line 7); the run goes on"]
    assert any(re.search("^curves: .*tensorboard --logdir", r.getMessage()) for r in caplog.records)
    with monkeypatch.context() as m:
        _interrupt_after(m, 5)
        with pytest.raises(KeyboardInterrupt):
            loop.train_and_evaluate(config, str(stopped))
    loop.train_and_evaluate(config, str(stopped))
    for folder in ("checkpoints", "best"):
        (_, a), (_, b) = (_params(work, config, folder) for work in (whole, stopped))
        assert a["hashes"] == b["hashes"] and a["step"] == b["step"]
        assert a.get("score") == b.get("score") and a.get("patience") == b.get("patience")

    # What is evaluated, and what others read of a run, are the averaged parameters.
    meta = _params(whole, config)[1]
    averaged = {k: v for k, v in meta["hashes"].items() if k.startswith("params/")}
    assert averaged == evaluated[1] == evaluated[-1] and len(evaluated) == 4 and meta["step"] == 6
    assert all(meta["hashes"][f"rest/{name}"] != value for name, value in averaged.items() if name.endswith("kernel"))
    stored = configs.load(whole / "config.json")
    assert checkpoint.hashes({"params": restore.restore_params(stored, str(whole), "latest")[1]}) == averaged
    config.init_from = str(whole)
    _, start = initial.resolve_init(config, str(tmp_path / "new"))
    assert _equal(start, restore.restore_params(stored, str(whole))[1])


def _scored(config, monkeypatch, scores):
    """Runs of this config take no time, and evaluations give these scores."""
    scores = iter(scores)
    metrics = {"loss": 1.0, "grad_norm": 1.0, "nll_unary": 1.0, "skipped": False, "finite": True}
    step = lambda state, batch: (state.replace(step=state.step + 1), jax.tree.map(jnp.asarray, metrics))
    monkeypatch.setattr(steps, "from_config", lambda *_, **__: step)
    result = lambda *_: {"split": "val", "rows": {"all": {"miou": next(scores)}}}
    monkeypatch.setattr(evaluate, "evaluate_params", result)
    monkeypatch.setattr(evaluate, "table", lambda _: "")
    monkeypatch.setattr(evaluate, "summary", lambda _: {})
    config.train.eval_every, config.train.checkpoint_every, config.eval.panel = 1, 1, 0


@pytest.mark.full
def test_a_run_ends_without_a_better_score(config, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logs.log, "propagate", True)
    caplog.set_level("INFO", logger="pwcrf_jax")
    config.train.patience = 2
    _scored(config, monkeypatch, [0.3, 0.5, 0.5, None, 0.4, 0.6])
    said = lambda: [r.getMessage() for r in caplog.records if "train.patience" in r.getMessage()]
    loop.train_and_evaluate(config, str(tmp_path))
    assert said() == [
        "step 4 is the last: no mean IoU above 50.0 in the last 2 evaluations (config.train.patience = 2)"
    ]
    assert _params(tmp_path, config)[1]["step"] == 4 and _params(tmp_path, config, "best")[1]["step"] == 2
    assert loop.train_and_evaluate(config, str(tmp_path)) == {}
    assert said()[1].startswith("ended at step 4") and said()[1].endswith("raise it to go on")
    config.train.patience = 3  # what was counted is kept
    loop.train_and_evaluate(config, str(tmp_path))
    assert said()[2].startswith("step 5 is the last") and _params(tmp_path, config)[1]["step"] == 5


def test_patience_counts_in_the_last_stage_alone():
    patience = Patience(2, begins=10)
    for step, score in ((5, 0.9), (10, 0.8), (11, 0.3), (12, 0.3), (13, 0.4), (14, 0.1)):
        patience.add(step, score)
        assert not patience.is_over
    again = Patience(2, begins=10)
    again.restore(json.loads(json.dumps(patience.meta())))
    again.add(15, 0.4)
    assert again.is_over and "40.0" in again.why()
    never = Patience(0)
    for step in range(100):
        never.add(step, None)
    assert not never.is_over


# --- names of functions, and the paper's settings --------------------------------------------------


@pytest.mark.parametrize("key, name", [("data.augment", "nowhere:f"), ("train.hook", "json:nothing")])
def test_a_function_that_is_not_there_is_refused_first(config, tmp_path, key, name):
    section, last = key.split(".")
    config[section][last] = name
    with pytest.raises(configs.ConfigError, match=rf"config\.{key} = '{name}'"):
        checks.load_and_validate(config)
    config[section][last] = "no function"
    with pytest.raises(configs.ConfigError, match='must be text of the form "module:function"'):
        configs.check_keys(config)


@pytest.mark.parametrize("key, value", [("label_smoothing", 0.1), ("dice_weight", 1.0)])
def test_terms_of_the_unary_are_refused_where_nothing_trains_with_them(config, key, value):
    config.loss[key] = value
    for name, objective in losses.OBJECTIVES.items():
        config.loss.objective = name
        if objective.contains_inference and not objective.staged:
            with pytest.raises(configs.ConfigError, match=rf"loss\.{key} = {value} does nothing with"):
                configs.validate(config, num_devices=1)
        else:
            configs.validate(config, num_devices=1)


def test_the_papers_configs_have_none_of_it():
    names = [path.stem for path in (ROOT / "configs").glob("*_vgg16.py")]
    assert len(names) > 10
    off = {"data.jitter": (0.0,) * 4, "data.augment": "", "model.dropout": 0.0, "loss.label_smoothing": 0.0}
    off |= {"loss.dice_weight": 0.0, "optimizer.ema_decay": 0.0, "train.accumulate": 1, "train.patience": 0}
    for name in names:
        flat = dict(configs.flat(importlib.import_module(f"configs.{name}").get_config()))
        assert {key: flat[key] for key in off} == off, name


def test_a_checkpoint_means_the_same_with_and_without(config):
    before = configs.identity(config)
    config.model.dropout, config.optimizer.ema_decay, config.loss.label_smoothing = 0.5, 0.9, 0.1
    config.data.jitter, config.train.accumulate = (0.1,) * 4, 2
    assert configs.identity(config) == before


def test_the_page_shows_how_to_log_to_wandb(tmp_path, monkeypatch):
    """The hook of docs/training.md, with a module that stands in for wandb."""
    (code,) = re.findall(r"```python\n(# wandb_hook.py.*?)```", (ROOT / "docs/training.md").read_text(), re.S)
    assert len(code.splitlines()) <= 10
    calls, wandb = [], types.ModuleType("wandb")
    wandb.run = None

    def init(**options):
        wandb.run = options
        calls.append(("init", options))

    wandb.init, wandb.log = init, lambda metrics, step: calls.append((step, metrics))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "wandb_hook.py").write_text(code)
    writer = logs.Writer(str(tmp_path), hook=functions.load("wandb_hook:log", "train.hook"))
    sys.modules.pop("wandb_hook")
    assert not calls, "the module is imported by all processes"
    writer.write(20, {"loss": 0.5}, "train")
    writer.write(40, {"miou_all": 41.0}, "val")
    writer.close()
    assert [name for name, _ in calls] == ["init", 20, 40] and calls[2][1] == {"val/miou_all": 41.0}
