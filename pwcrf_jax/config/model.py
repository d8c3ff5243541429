"""The model of a config, and what makes it that model."""

import json
from typing import Any

from ml_collections import ConfigDict

from pwcrf_jax.config import featmap, keys
from pwcrf_jax.config.offsets import axes, relations
from pwcrf_jax.config.settings import objective
from pwcrf_jax.model.segmenter import Segmenter
from pwcrf_jax.nets import BACKBONES


def build_model(config: ConfigDict) -> Segmenter:
    """The model of a config. input_scaling "auto" stands for "tf" until weights say otherwise."""
    m, boxes = config.model, relations(config)
    try:
        return Segmenter(
            num_classes=config.data.num_classes,
            featmap=featmap.settings(config),
            relations=boxes,
            parameterisation=tuple(config.relations[n].parameterisation or m.parameterisation for n in m.relations),
            hidden=m.hidden,
            input_scaling="tf" if m.input_scaling == "auto" else m.input_scaling,
            pairwise_features=m.pairwise_features,
            pairwise_trains_features=m.pairwise_trains_features and not objective(config).staged,
            refinement_width=m.refinement_convs.width,
            dtype=m.dtype,
            dropout=m.dropout,
            unary=m.unary,
        )
    except (ValueError, TypeError) as error:
        raise featmap.refused(config, error) from None


def portable(config: ConfigDict) -> ConfigDict:
    """The config with "auto" as runtimes other than XLA do well: depthwise convolutions in one, no stored scores."""
    config = config.copy_and_resolve_references()
    options = config.model.get(config.model.backbone, {})
    if options.get("depthwise") == "auto":
        options.depthwise = "grouped"
    if config.crf.algorithm == "auto":
        config.crf.algorithm = "factored"
    return config


def identity(config: ConfigDict) -> dict[str, Any]:
    """Values that make a model the model it is, flat and as JSON: a checkpoint means nothing under others.

    Left out is what may change between runs: dtype, how depthwise convolutions are computed, what is trained.
    """
    backbone = config.model.backbone
    free = {"model.dtype", f"model.{backbone}.depthwise", f"model.{backbone}.freeze_until", "model.parameterisation"}
    free |= {"model.pairwise_trains_features", "model.dropout"}
    if not config.model.refinement_convs.layers:
        free |= {"model.refinement_convs.layers", "model.refinement_convs.width"}
    if config.model.pairwise_features == "shared" or not config.model.relations:
        free |= {"model.pairwise_features"}
    other_backbones = tuple(f"model.{name}." for name in BACKBONES if name != backbone)
    used = tuple(f"relations.{name}." for name in config.model.relations)
    flat = {}
    for key, value in keys.flat(config):
        model = key.startswith("model.") and key not in free and not key.startswith(other_backbones)
        if model or key.startswith(used) or key in ("data.name", "data.num_classes"):
            flat[key] = value
    for name, box in relations(config).items():  # what "" and () stand for
        kind = config.relations[name].parameterisation
        flat[f"relations.{name}.parameterisation"] = kind or config.model.parameterisation
        flat |= {f"relations.{name}.{key}": axis for key, axis in axes(box).items()}
    return json.loads(json.dumps(flat))
