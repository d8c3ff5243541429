"""Steps without a finite loss and gradient: skipped by all devices together, counted, named, and never saved."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults import states
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import parallel
from pwcrf_jax.runtime.logs import log
from pwcrf_jax.training import guard, loop, steps

MARK = 251  # of the first pixel of an image that the model below fails on


class Failing:
    """A model whose scores ("loss") or their gradient ("gradient") are not finite for images that begin with MARK."""

    def __init__(self, model, what):
        self._model, self._what = model, what

    def __getattr__(self, name):
        return getattr(self._model, name)

    def apply(self, variables, image):
        potentials = self._model.apply(variables, image)
        bad = jnp.all(image[:, 0, 0] == MARK, axis=-1)[:, None, None, None]
        if self._what == "loss":
            return potentials._replace(unary=jnp.where(bad, jnp.nan, potentials.unary))
        # The square root's slope at 0 is infinite, and times 0 not a number; its value is 0, or 1 - 1.
        nothing = jnp.sqrt(jnp.where(bad, 0.0, 1.0) + 0.0 * potentials.unary) - jnp.where(bad, 0.0, 1.0)
        return potentials._replace(unary=potentials.unary + nothing)


def _batch(rng, bad=()):
    image = rng.integers(0, 250, (8, 64, 80, 3)).astype(np.uint8)
    for i in bad:
        image[i, 0, 0] = MARK
    return {"image": image, "label": rng.integers(0, 6, (8, 64, 80)).astype(np.uint8)}


def _same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("what", full_but(["loss", "gradient"], "gradient"))
def test_all_devices_skip_what_one_of_them_cannot(config, what):
    config.model.relations = ("surrounding",)
    model, tx = configs.build_model(config), optax.adam(1e-2)
    step = parallel.pmap_train(steps.from_config(config, Failing(model, what), tx))
    params = restore.init_params(model, 0)
    state = steps.TrainState(jnp.int32(0), params, tx.init(params))
    rng = np.random.default_rng(0)
    state, metrics = step(state, parallel.split(_batch(rng)))
    assert metrics["finite"] and not metrics["skipped"]
    before = jax.tree.map(lambda x: np.array(x, copy=True), state)
    state, metrics = step(state, parallel.split(_batch(rng, bad=[5])))
    assert metrics["skipped"] and metrics["finite"]
    assert [math.isfinite(metrics[k]) for k in ("loss", "grad_norm")] == [what == "gradient", what == "loss"]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        assert len(new.addressable_shards) == 8
        for shard in new.addressable_shards:
            np.testing.assert_array_equal(shard.data, old)
    state, metrics = step(state, parallel.split(_batch(rng)))
    assert not metrics["skipped"] and int(state.step) == 2 and not _same(state.params, before.params)


@pytest.fixture
def poison(monkeypatch):
    """poison(batches, what): in batches of these numbers, from 1, the fourth image fails; returns their ids."""
    monkeypatch.setattr(log, "propagate", True)
    make_step, read = steps.make_train_step, loop.train_batches

    def apply(numbers, what="loss"):
        ids = {}

        def batches(*args, **kwargs):
            stream = read(*args, **kwargs)
            try:
                for number, batch in enumerate(stream, 1 + kwargs["start_step"]):
                    if number in numbers:
                        batch["image"][3, 0, 0] = MARK
                        ids[number] = batch["id"]
                    yield batch
            finally:
                stream.close()

        monkeypatch.setattr(loop, "train_batches", batches)
        failing = lambda model, *args, **options: make_step(Failing(model, what), *args, **options)
        monkeypatch.setattr(steps, "make_train_step", failing)
        return ids

    return apply


@pytest.mark.full
def test_a_run_goes_on_after_one(config, tmp_path, poison, caplog):
    config.train.max_skipped_steps = 1
    ids = poison([2])
    with caplog.at_level("INFO", logger=log.name):
        loop.train_and_evaluate(config, str(tmp_path))
    assert "step 2 is skipped: loss nan (images of that step: " in caplog.text
    assert all(name in caplog.text for name in ids[2]) and "; 1 of 1" in caplog.text
    trees, meta = states.read(tmp_path)
    assert meta["step"] == 6 and trees["rest"]["step"] == 5 and meta["samples_seen"] == 48
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(trees))
    train = [line for line in states.lines(tmp_path) if "train/nll_unary" in line or "train/skipped_steps" in line]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert [line.get("train/skipped_steps") for line in train] == [None, 1, 1, 1, 1, 1]
    assert ["train/loss" in line for line in train] == [True, False, True, True, True, True]
    # What was skipped before a stop counts after it.
    config.train.steps = 9
    ids = poison([8])
    match = r"step 8: loss nan \(images of that step: .*one more than config.train.max_skipped_steps = 1"
    with pytest.raises(guard.NonFiniteError, match=match) as error:
        loop.train_and_evaluate(config, str(tmp_path))
    assert all(name in str(error.value) for name in ids[8])
    assert states.read(tmp_path)[1]["step"] == 6, "the last good checkpoint is left as it was"


@pytest.mark.full
@pytest.mark.parametrize("skipped", [1, 3, 4])
def test_a_skipped_step_is_none_of_its_stage(config, tmp_path, poison, skipped):
    """Three steps of the unary are three that were taken: the next is the first that trains relations."""
    config.loss.objective, config.loss.unary_share = "piecewise_staged", 0.5
    config.train.max_skipped_steps = 1
    poison([skipped])
    loop.train_and_evaluate(config, str(tmp_path))
    lines = {x["step"]: x for x in states.lines(tmp_path) if "train/nll_unary" in x or "train/skipped_steps" in x}
    pairwise = [step for step, x in sorted(lines.items()) if "train/nll_surrounding" in x]
    assert pairwise == [5, 6], lines  # of step 4 the unary's third, or the relations' first, which was skipped


@pytest.mark.full
def test_none_is_allowed(config, tmp_path, poison, monkeypatch):
    config.train.max_skipped_steps = 0
    with monkeypatch.context():
        poison([5], "gradient")
        with pytest.raises(guard.NonFiniteError, match="step 5: grad_norm nan .*max_skipped_steps = 0"):
            loop.train_and_evaluate(config, str(tmp_path))
    assert states.read(tmp_path)[1]["step"] == 3


def test_parameters_that_an_update_makes_infinite_are_not_saved(config, tmp_path, monkeypatch):
    make = loop.make_optimizer
    monkeypatch.setattr(loop, "make_optimizer", lambda *args: optax.chain(make(*args), optax.scale(math.inf)))
    config.train.checkpoint_every = config.train.eval_every = 1
    with pytest.raises(guard.NonFiniteError, match="step 1 led to parameters that are not finite .*learning_rate"):
        loop.train_and_evaluate(config, str(tmp_path))
    assert not list((tmp_path / "checkpoints").iterdir()) and not list((tmp_path / "best").iterdir())
