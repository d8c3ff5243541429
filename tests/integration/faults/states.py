"""States to save and to compare: small ones made here, and those of a workdir."""

import json

import jax
import jax.numpy as jnp

from pwcrf_jax import config as configs
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import checkpoint
from pwcrf_jax.training.optimizer import make_optimizer
from pwcrf_jax.training.steps import TrainState

MODEL = {"model.hidden": 4, "model.backbone": "tiny", "model.relations": ["surrounding", "above_below"]}
CLASSES = ("sky", "water", "boat")


def trees(step):
    """All kinds of leaves that a state has: float32 of several sizes, an int32 scalar, an empty tuple."""
    keys = jax.random.split(jax.random.key(step), 3)
    params = {"a": {"kernel": jax.random.normal(keys[0], (3, 3, 4, 8)), "bias": jnp.zeros(8)}}
    moments = jax.random.normal(keys[1], (2, 5)), ()
    return {"params": params, "rest": {"step": jnp.int32(step), "opt_state": moments}}


def abstract():
    return jax.eval_shape(lambda: trees(0))


def store(folder, keep=2, model=MODEL, classes=CLASSES):
    return checkpoint.Store(str(folder), model, keep, classes)


def abstract_of(config):
    """{"checkpoints": ..., "best": ...}: what the checkpoints of a run hold."""
    model = configs.build_model(config)
    tx = make_optimizer(config.optimizer, config.model, config.train.steps, configs.unary_steps(config))
    state = jax.eval_shape(lambda: TrainState.create(restore.init_params(model, 0), tx))
    return {"checkpoints": state.trees(), "best": {"params": state.params}}


def read(workdir, kind="checkpoints"):
    """(trees, meta) of the newest checkpoint of a kind, damaged or not of no interest: it must be whole."""
    config = configs.load(workdir / "config.json")
    reader = checkpoint.Store(str(workdir / kind), configs.identity(config))
    found, meta = reader.restore(abstract_of(config)[kind])
    assert meta["step"] == reader.latest, f"{workdir / kind} has a damaged checkpoint"
    return found, meta


def lines(workdir):
    """Of metrics.jsonl, without the speed; NaN, which is no JSON, is not read."""

    def refuse(name):
        raise ValueError(f"{name} in metrics.jsonl")

    found = [json.loads(x, parse_constant=refuse) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        line.pop("train/images_per_second", None)
    return found


def final(workdir):
    """What two runs that are the same agree in: all leaves, the best score, the metrics."""
    _, latest = read(workdir)
    _, best = read(workdir, "best")
    return (
        latest["step"],
        latest["hashes"],
        best["step"],
        best["hashes"],
        best["miou_all"],
        sorted(map(json.dumps, lines(workdir))),
    )
