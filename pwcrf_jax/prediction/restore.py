"""Trained runs: the parameters in a workdir, and its data set, with everything refused that cannot be used."""

import os

import jax
import numpy as np

from pwcrf_jax import config as configs
from pwcrf_jax.config import agreement
from pwcrf_jax.data import check_sizes, load_dataset
from pwcrf_jax.runtime import checkpoint, distributed

BEST = "miou_all"  # in the meta of a checkpoint of best/: mean IoU of the final row


def abstract_params(model):
    """Shapes of the parameters, nothing computed."""
    return jax.eval_shape(lambda: init_params(model, 0))


def init_params(model, seed):
    """Parameters from a seed. They do not depend on the size of images, so a small one is traced."""
    return model.init(jax.random.key(seed), np.zeros((1, 64, 64, 3), np.uint8))["params"]


def load(config, workdir: str, which: str, split: str):
    """(model, parameters, step, data set), with everything refused that cannot be evaluated."""
    configs.validate(config, batches=("eval.batch_size",))
    model, params, step = restore_params(config, workdir, which)
    dataset = load_dataset(**configs.dataset_options(config))
    configs.check_classes(config, dataset.class_names)
    with _store(config, workdir, which, dataset.class_names) as store:
        store.meta()  # refuses other classes than those of the checkpoint
    dataset.check_labelled(split)
    check_sizes(dataset, split, config.data.eval_size)
    if given := configs.score_files(config):
        given.check_split(dataset, split)
    distributed.agree(lambda: {"the step": step} | agreement.of_data(dataset) | agreement.of_arrays({"params": params}))
    return model, params, step, dataset


def restore_params(config, workdir: str, which: str = "best"):
    """(model, parameters, step) of a trained workdir; which as in `evaluate`."""
    model = configs.build_model(config)
    with _store(config, workdir, which) as store:
        trees, meta = store.restore({"params": abstract_params(model)})
    return model, trees["params"], meta["step"]


def _store(config, workdir, which, class_names=()):
    folder = os.path.join(workdir, {"best": "best", "latest": "checkpoints"}[which])
    score = BEST if which == "best" else ""
    return checkpoint.Store(folder, configs.identity(config), class_names=class_names, score=score)
