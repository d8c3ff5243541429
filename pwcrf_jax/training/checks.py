"""Refusals before a run trains: of its config, its data set, its start, of what is left of another run."""

import logging
import os
from typing import Any

from ml_collections import ConfigDict

from pwcrf_jax import config as configs
from pwcrf_jax.data import advice, check_sizes, given_scores, load_dataset
from pwcrf_jax.data.prepare import builder_class
from pwcrf_jax.data.sizes import proposed
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.nets import WeightsError
from pwcrf_jax.nets.pip_weights import pip_path
from pwcrf_jax.runtime import checkpoint, files, functions
from pwcrf_jax.runtime.logs import METRICS, last_step
from pwcrf_jax.training import freezing

log = logging.getLogger(__name__)


def load_and_validate(config: ConfigDict, workdir: str = "") -> Any:
    """The data set of a config; what is wrong with the config or the set is refused here.

    workdir: a run in it goes on, and needs nothing to start from; "": it begins.
    """
    configs.validate(config)
    _check_reached(config)
    for key, name in {"data.augment": config.data.augment, "train.hook": config.train.hook}.items():
        if name:
            functions.load(name, key)
    if not (workdir and checkpoint.exists(os.path.join(workdir, "checkpoints"))):
        _check_start(config)
    if names := getattr(builder_class(config.data.name), "class_names", ()):
        configs.check_classes(config, names)  # before the set is prepared, which may take hours
    dataset = load_dataset(**configs.dataset_options(config))
    configs.check_classes(config, dataset.class_names)
    for split in (config.data.train_split, config.data.eval_split):
        dataset.check_labelled(split)
    dataset.source(config.data.train_split)  # unknown and empty splits are refused here
    check_sizes(dataset, config.data.eval_split, config.data.eval_size)
    evaluate.check_scored(config, dataset, config.data.eval_split)
    of_scores: tuple[str, ...] = ()
    if given := configs.score_files(config):
        told, of_scores = given_scores.compared(dataset, config.data.train_split, config.data.eval_split, given)
        log.info("%s", told)
    for warning in (
        *of_scores,
        *advice.of_split(dataset, config.data.eval_split),
        *advice.of_crops(dataset, config.data.train_split, config.data.crop_size),
    ):
        log.warning("%s", warning)
    return dataset


def settle_data(config: ConfigDict, workdir: str) -> ConfigDict:
    """The config with the number of classes and the sizes of the data set, where it leaves them to that.

    A run that goes on has its own. Otherwise the data set is prepared here.

    Raises:
      ConfigError, DataError, WeightsError: what training would refuse.
    """
    if not configs.left_to_set(config):
        return config
    if workdir and checkpoint.exists(os.path.join(workdir, "checkpoints")):
        return configs.filled(config, dict(configs.flat(configs.load_checked(workdir))))
    standing_in = configs.filled(config)
    configs.validate(standing_in)  # before the set is prepared, which may take hours
    _check_start(standing_in)
    report = load_dataset(**configs.dataset_options(config)).label_report()
    values = proposed(report, config.train.batch_size)
    found = {key: values[key] for key in configs.left_to_set(config)}
    log.info("from the data set: %s", ", ".join(f"config.{key} = {value}" for key, value in found.items()))
    return configs.filled(config, found)


def _check_start(config: ConfigDict) -> None:
    config = config.copy_and_resolve_references()
    config.init_from = path = pip_path(files.expand_path(config.init_from, "config.init_from"))
    if files.is_url(path):
        there = files.exists(path)
    else:
        there = os.path.isfile(path) or os.path.isdir(path)
    if path and not there:
        why = "is neither a file nor a folder" if os.path.exists(path) else "does not exist"
        raise WeightsError(f"config.init_from = {path!r} {why}")
    freezing.check_before_data(config)


def _check_reached(config: ConfigDict) -> None:
    """An objective that contains inference trains what inference uses. A finished model may be decoded with less."""
    objective, crf = configs.objective(config), config.crf
    left_out = {
        "relations": set(config.model.relations) - set(configs.crf_relations(config)),
        "weights": 0 in crf.weights,
        "num_iterations": objective.iterates and not crf.num_iterations,
    }
    if objective.contains_inference and any(left_out.values()):
        key = next(key for key, found in left_out.items() if found)
        raise configs.ConfigError(
            f"config.crf.{key} = {getattr(crf, key)!r} leaves relations out, which config.loss.objective = "
            f"{config.loss.objective!r} then does not train; change it, or take them out of config.model.relations"
        )


def check_new(workdir: str, latest: checkpoint.Store, best: checkpoint.Store) -> None:
    """A run does not begin over what is left of one whose checkpoints are gone, or over files of another program."""
    told, file = last_step(workdir), os.path.join(workdir, configs.CONFIG)
    # The save of a step is through when the next one begins, whose step may be told by then.
    stored = configs.load_checked(workdir) if files.exists(file) else None  # refuses another program's
    saved = told and stored and told > 2 * stored.train.checkpoint_every
    left = [f"{best.folder} holds a model"] if best.latest is not None else []
    left += [f"{latest.folder} holds {', '.join(latest.damaged)}"] if latest.damaged else []
    left += [f"{os.path.join(workdir, METRICS)} tells of {told} steps"] if saved else []
    others = [] if stored else [os.path.join(workdir, name) for name in (METRICS, configs.CLASSES)]
    left += [f"{path} is there without a {configs.CONFIG}" for path in others if files.exists(path)]
    if left:
        raise checkpoint.CheckpointError(
            f"{left[0]}, but {latest.folder} has no whole checkpoint, so the run cannot go on; put one there, use "
            "another --workdir, or move what is left of the run away"
        )


def check_stages(config: ConfigDict, meta: dict[str, Any]) -> None:
    """A run goes on in the stages it began with: relations that were trained stay on the features they know."""
    before, now = meta.get("unary_steps"), configs.unary_steps(config)
    said = lambda steps: "without stages" if steps is None else f"with {steps} steps of the unary alone"
    if before != now:
        share = "" if before is None else f", and set config.loss.unary_share to {before / config.train.steps:g}"
        raise configs.ConfigError(
            f"this run began {said(before)}, now it would be {said(now)}; keep config.loss.objective{share}"
        )


def check_averaged(config: ConfigDict, meta: dict[str, Any]) -> None:
    """A run goes on with averaged parameters if it began with them: an average that begins late is another one."""
    before, now = meta.get("averaged", False), config.optimizer.ema_decay
    if before != bool(now):
        decay = "a decay above 0, such as the one in config.json" if before else "0"
        raise configs.ConfigError(
            f"config.optimizer.ema_decay = {now}, but this run began {'with' if before else 'without'} averaged "
            f"parameters; set it to {decay}, or begin another run, from config.init_from = this workdir"
        )
