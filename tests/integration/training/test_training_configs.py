"""Every file in configs/ resolves, is valid, builds its model and its steps; the scripts run end to end."""

import importlib
import json
import pathlib

import commands
import jax
import jax.numpy as jnp
import pytest
import small
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import parallel
from pwcrf_jax.training import steps
from pwcrf_jax.training.optimizer import make_optimizer, schedule

ROOT = pathlib.Path(__file__).parents[3]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


@pytest.mark.parametrize("name", full_but(NAMES, "demo", "voc_vgg16"))
def test_config_builds_and_its_step_is_traced(name):
    config = configs.filled(importlib.import_module(f"configs.{name}").get_config())
    configs.validate(config, num_devices=1)
    model = configs.build_model(config)
    tx = make_optimizer(config.optimizer, config.model, config.train.steps)
    params = restore.abstract_params(model)
    state = jax.eval_shape(lambda p: steps.TrainState(jnp.int32(0), p, tx.init(p)), params)
    batch = {
        "image": jax.ShapeDtypeStruct((1, 1, *config.data.crop_size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((1, 1, *config.data.crop_size), jnp.uint8),
    }
    step = steps.from_config(config, model, tx)
    new, metrics = jax.eval_shape(parallel.pmap_train(step, devices=jax.devices()[:1]), state, batch)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert {"loss", "nll_unary", *(f"nll_{n}" for n in config.model.relations)} <= set(metrics)


def test_camvid_variants():
    module = importlib.import_module("configs.camvid_mobilenet_v2")
    both = configs.build_model(module.get_config("both"))
    assert both.parameterisation == ("residual", "residual", "free", "free")
    assert configs.build_model(module.get_config("free")).parameterisation == ("free", "free")
    with pytest.raises(ValueError, match="residual, free, both"):
        module.get_config("other")


def test_schedule(config):
    config.optimizer.warmup_steps = 10
    rate = schedule(config.optimizer, 100)
    peak = config.optimizer.learning_rate
    assert 0 < rate(0) < rate(5) < peak
    assert float(rate(10)) == pytest.approx(peak)
    assert float(rate(99)) <= peak * 0.05


def test_scripts_end_to_end(config, tmp_path):
    """train.py, again (nothing left to do), then eval.py with no more than --workdir; its last line is JSON."""
    run = lambda *args: commands.run(args, cwd=tmp_path)
    flags = [x.replace("configs/", f"{ROOT}/configs/") for x in small.flags(config.data.data_dir, **{"train.steps": 2})]
    train = [ROOT / "train.py", f"--workdir={tmp_path / 'work'}", *flags]
    first = run(*train)
    assert first.returncode == 0, first.stderr
    assert "2 x unary" in first.stderr and "left" in first.stderr
    again = run(*train)
    assert again.returncode == 0 and "already trained for 2 steps" in again.stderr, again.stderr
    done = run(ROOT / "eval.py", "--workdir", tmp_path / "work", "--config.crf.weights=(0.5,2.0)")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {"miou_unary", "miou_surrounding", "miou_above_below", "miou_all"} <= set(figures)
    assert "all relations" in done.stdout
    assert json.loads((tmp_path / "work" / "eval_val.json").read_text())["config"]["crf"]["weights"] == [0.5, 2.0]
