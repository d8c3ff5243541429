"""The beginning of a run: its config settled, its parameters random, from a file of weights or from another run."""

import operator
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pwcrf_jax import config as configs
from pwcrf_jax.nets import load_pretrained
from pwcrf_jax.nets.pip_weights import pip_path
from pwcrf_jax.nets.pretrained import KNOWN_FILES
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import checkpoint, files, mirror
from pwcrf_jax.runtime.logs import log
from pwcrf_jax.training import freezing


def resolve_init(config: ConfigDict, workdir: str) -> tuple[ConfigDict, Any]:
    """The config with what a run settles once, and the parameters to begin with; None where the run goes on.

    Settled are input_scaling, which belongs to the weights a run started from, and the offsets of the relations, which
    belong to the grid that they are trained on: a run that goes on has both in its config.json.
    """
    config = config.copy_and_resolve_references()
    config.init_from = files.expand_path(config.init_from, "config.init_from")
    if checkpoint.exists(os.path.join(workdir, "checkpoints")):
        stored = configs.load_checked(workdir)
        if config.model.input_scaling == "auto":
            config.model.input_scaling = stored.model.input_scaling
        configs.keep_offsets(config, stored)
        return config, None
    configs.keep_offsets(config)
    params, scaling = _fresh_params(config)
    if config.model.input_scaling == "auto":
        config.model.input_scaling = scaling
    return config, params


def _fresh_params(config: ConfigDict) -> tuple[Any, str]:
    """Random parameters with the pretrained weights read into them, and the input scaling of those."""
    model = configs.build_model(config)
    params = jax.jit(lambda: restore.init_params(model, config.seed))()
    if not config.init_from:
        if config.model.backbone in KNOWN_FILES:
            log.info("config.init_from = '': the backbone %s starts at random, though ImageNet weights for it are "
                     "published; docs/training.md lists them", config.model.backbone)  # fmt: skip
        return params, "tf"
    if files.is_folder(config.init_from):
        start, scaling = _from_run(config.init_from, params, configs.relations(config))
        freezing.check(config, params, jax.tree.map(operator.is_, start, params))
        return start, scaling
    path = mirror.local(pip_path(config.init_from))
    featmap, report = load_pretrained(path, params["featmap"])
    log.info("%s", report)
    given = config.model.input_scaling
    if given not in ("auto", report.scaling):
        log.info("config.model.input_scaling = %s, but these weights were trained with %s", given, report.scaling)
    params = {**params, "featmap": featmap}
    if "featmap_pairwise" in params:
        params["featmap_pairwise"], _ = load_pretrained(path, params["featmap_pairwise"])
    return params, report.scaling


def _from_run(folder: str, params: Any, relations: dict[str, np.ndarray]) -> tuple[Any, str]:
    """Parameters of the best checkpoint of another run where names and shapes agree, and its input scaling.

    Features that relations have of their own start from that run's features, where it has none of the kind. It is said
    where a relation has offsets, relations[name], at which its net was not trained there.
    """
    source = configs.load_checked(folder)
    _, trained, step = restore.restore_params(source, folder)
    known = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trained)}
    new = []
    if "featmap_pairwise" in trained and "featmap_pairwise" not in params:
        if any(name.startswith("pairwise_") and name in trained for name in params):
            raise configs.ConfigError(
                f"config.init_from = {folder!r}: the relations of that run stand on features of their own, which this "
                "model does not have; set config.model.pairwise_features to 'own'"
            )

    def take(path, leaf):
        name = jax.tree_util.keystr(path)
        shared = name.replace("['featmap_pairwise']", "['featmap']", 1)
        for source in (name, shared):
            if source in known and known[source].shape == leaf.shape:
                return jnp.array(known[source])  # a copy: the training step takes its buffers, each once
        new.append(jax.tree_util.keystr(path[:2], simple=True, separator="/"))
        return leaf

    params = jax.tree_util.tree_map_with_path(take, params)
    if len(new) == len(jax.tree.leaves(params)):
        raise configs.ConfigError(f"config.init_from = {folder!r}: that run has no parameter of this model")
    log.info("parameters of step %d of %s%s", step, folder, f"; new: {', '.join(dict.fromkeys(new))}" if new else "")
    for name, theirs in configs.relations(source).items():
        others = set(map(tuple, relations.get(name, []))) - set(map(tuple, theirs))
        if others and not any(module.startswith(f"pairwise_{name}/") for module in new):
            log.warning("pairwise_%s was trained at other distances there: %d of its %d offsets here are new to it",
                        name, len(others), len(relations[name]))  # fmt: skip
    return params, source.model.input_scaling
