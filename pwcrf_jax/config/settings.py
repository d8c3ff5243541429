"""Values of a config as what stands above reads them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from pwcrf_jax import dense_crf
from pwcrf_jax.config.featmap import grid
from pwcrf_jax.config.keys import flat
from pwcrf_jax.data.given_scores import GivenScores, ScoreFiles
from pwcrf_jax.mean_field import Settings
from pwcrf_jax.model import losses


def crf_relations(config: ConfigDict) -> tuple[str, ...]:
    """The relations that inference uses."""
    return tuple(config.crf.relations or config.model.relations)


def relation_weights(config: ConfigDict) -> dict[str, float]:
    """config.crf.weights, by name of the relations that inference uses."""
    names, weights = crf_relations(config), config.crf.weights
    return dict(zip(names, weights if len(weights) == len(names) else weights * len(names), strict=True))


def label_weights(config: ConfigDict) -> dict[str, np.ndarray]:
    """config.crf.label_weights as float32 [K, K], label of p first, by name of the relation; empty where it is ()."""
    given = config.crf.label_weights
    pairs = [np.outer(*(np.array(labels, np.float32) for labels in ends)) for ends in given]
    return dict(zip(crf_relations(config), pairs, strict=True)) if given else {}


def message_weights(config: ConfigDict, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of relations, numbers that may be traced, times those of labels: numbers, or where there are [K, K]."""
    of_labels = label_weights(config)
    return {name: weight * of_labels[name] if of_labels else weight for name, weight in weights.items()}


def crf_settings(config: ConfigDict) -> Settings:
    """Settings of inference, from config.crf; weights by name of all relations that it uses."""
    crf = config.crf
    return Settings(
        weights=message_weights(config, relation_weights(config)),
        unary_temperature=crf.unary_temperature,
        num_iterations=crf.num_iterations,
        damping=crf.damping,
        average_messages=crf.average_messages,
        algorithm=crf.algorithm,
    )


def objective(config: ConfigDict) -> losses.Objective:
    """The objective of training that config.loss names."""
    return losses.OBJECTIVES[config.loss.objective]


def loss_settings(config: ConfigDict) -> losses.Settings:
    """Settings of the loss, from config.loss."""
    names = [field.name for field in dataclasses.fields(losses.Settings)]
    return losses.Settings(**{n: config.loss[n] for n in names} | {"chunk_edges": config.loss.chunk_edges or None})


def unary_steps(config: ConfigDict) -> int | None:
    """Steps that train the unary alone, None where there are no stages."""
    return round(config.loss.unary_share * config.train.steps) if objective(config).staged else None


class RefineSettings(NamedTuple):
    """Settings of the dense CRF on top of the model's marginals; see `pwcrf_jax.dense_crf.refine`."""

    params: dense_crf.Params
    num_iterations: int
    method: str = "auto"


def refine_settings(config: ConfigDict, mode: str) -> RefineSettings | None:
    """Settings of the dense CRF, from config.refine; None where there is none.

    mode: "full" has both kernels, "spatial" the smoothness kernel alone, "off" none.
    """
    if mode == "off":
        return None
    params = dense_crf.Params(*(config.refine[name] for name in dense_crf.Params._fields))
    if mode == "spatial":
        params = params._replace(appearance_compat=None)
    return RefineSettings(params, config.refine.num_iterations)


def augments(config: ConfigDict) -> bool:
    """Whether test-time augmentation shows more than the image itself."""
    return config.tta.flip or tuple(config.tta.scales) != (1.0,)


def table_rows(config: ConfigDict) -> dict[str, tuple[str, ...]]:
    """Rows of the evaluation table that differ in relations: the unary alone, each of them added to it, all of them.

    Those of each relation are left out where config.eval.each_relation is False.
    """
    names = crf_relations(config)
    each = names if config.eval.each_relation else ()
    return {"unary": ()} | {name: (name,) for name in each} | {"all": names}


def final_row(config: ConfigDict) -> str:
    """The row of the evaluation table that is the model's answer: all relations, then refinement convolutions."""
    return "convs" if config.model.refinement_convs.layers else "all"


def shown_rows(config: ConfigDict) -> tuple[str, ...]:
    """Rows of the evaluation table whose labels pictures show: the unary's, and the model's answer where it differs."""
    final = final_row(config)
    return ("unary",) if final == "all" and not crf_relations(config) else ("unary", final)


_STANDING_IN = {
    "data.num_classes": 2,
    "data.crop_size": (320, 320),
    "data.eval_size": (520, 520),
    "train.steps": 1000,
}


def left_to_set(config: ConfigDict) -> tuple[str, ...]:
    """Keys that training takes from the data set."""
    values = dict(flat(config))
    return tuple(key for key in _STANDING_IN if not values[key])


def filled(config: ConfigDict, values: Mapping[str, Any] = _STANDING_IN) -> ConfigDict:
    """A copy in which values stand for the keys of `left_to_set`; without values, some that will do for a look."""
    config = config.copy_and_resolve_references()
    for key in left_to_set(config):
        section, name = key.split(".")
        config[section][name] = values[key]
    return config


def dataset_options(config: ConfigDict) -> dict[str, Any]:
    """Keyword arguments of `pwcrf_jax.data.load_dataset`."""
    d = config.data
    options = d[d.name].to_dict() if d.name in d else {}
    return dict(
        name=d.name, source_dir=d.source_dir, data_dir=d.data_dir, partial=d.partial, max_pixels=d.max_pixels, **options
    )


def score_files(config: ConfigDict) -> ScoreFiles | None:
    """The files of given scores; None where the model has a Unary-Net. Raises DataError where there are none."""
    s = config.data.scores
    if config.model.unary != "scores":
        return None
    return ScoreFiles(s.dir, config.data.num_classes, s.layout, s.kind, s.confidence)


def given_scores(config: ConfigDict, size: Sequence[int], per_cell: int = 1) -> GivenScores | None:
    """`score_files` on the grid of a frame of this size, so many a side of a cell."""
    files = score_files(config)
    if files is None:
        return None
    height, width = grid(config, size)
    return GivenScores(files, (per_cell * height, per_cell * width))


def scored_classes(config: ConfigDict, class_names: Sequence[str]) -> list[int] | None:
    """Indices of the classes that means are taken over; None: all."""
    return [list(class_names).index(name) for name in config.eval.classes] or None
