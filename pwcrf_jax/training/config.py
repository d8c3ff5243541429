"""Configs: checked before any compute is spent, stored beside the checkpoints, read back."""

import difflib
import json
import math
import pathlib

import jax
from ml_collections import ConfigDict

from pwcrf_jax.data import DATASETS
from pwcrf_jax.nets import BACKBONES, INPUT_SCALINGS, FeatMapNet
from pwcrf_jax.relations import Relation
from pwcrf_jax.segmenter import PARAMETERISATIONS, Segmenter


class ConfigError(ValueError):
    """A value of the config that cannot work; the message names the key."""


def _choose(key, value, known):
    if value not in known:
        nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"config.{key} = {value!r} is not one of {', '.join(map(repr, known))}{hint}")


def _flat(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _numbers(value):
    if isinstance(value, (tuple, list)):
        for x in value:
            yield from _numbers(x)
    elif isinstance(value, float):
        yield value


_POSITIVE = (
    "data.crop_size data.eval_size data.scale_range data.num_threads model.hidden model.scales "
    "optimizer.learning_rate train.batch_size train.log_every train.checkpoint_every "
    "train.keep_checkpoints eval.batch_size data.synthetic.num_train data.synthetic.num_val"
).split()
_NOT_NEGATIVE = (
    "seed loss.pairwise_weight loss.balance_power optimizer.backbone_factor optimizer.warmup_steps "
    "optimizer.weight_decay optimizer.clip_norm train.steps train.eval_every crf.num_iterations"
).split()


def validate(config: ConfigDict, num_devices: int | None = None) -> None:
    """Refuses what cannot work, before data are read or anything is compiled.

    Raises:
      ConfigError: naming the key, its value and the remedy.
    """
    flat = dict(_flat(config))
    for key, value in flat.items():
        if not all(math.isfinite(x) for x in _numbers(value)):
            raise ConfigError(f"config.{key} = {value} must be finite")
    for keys, bad, word in ((_POSITIVE, lambda x: x <= 0, "positive"), (_NOT_NEGATIVE, lambda x: x < 0, "0 or more")):
        for key in keys:
            value = flat[key]
            for x in value if isinstance(value, tuple) else (value,):
                if bad(x):
                    raise ConfigError(f"config.{key} = {value} must be {word}")
    for key, known in {
        "data.name": DATASETS,
        "model.backbone": BACKBONES,
        "model.parameterisation": PARAMETERISATIONS,
        "model.input_scaling": ("auto", *INPUT_SCALINGS),
        "model.dtype": ("float32", "bfloat16"),
        "loss.reduction": ("mean", "sum"),
        "optimizer.name": ("adamw", "sgd"),
        "optimizer.schedule": ("poly", "cosine", "constant"),
    }.items():
        _choose(key, flat[key], list(known))
    for key in ("data.crop_size", "data.eval_size", "data.scale_range"):
        if len(flat[key]) != 2:
            raise ConfigError(f"config.{key} = {flat[key]} must hold two numbers")
    low, high = config.data.scale_range
    if low > high:
        raise ConfigError(f"config.data.scale_range = {(low, high)} must be (lowest, highest)")
    if not 2 <= config.data.num_classes <= 255:
        raise ConfigError(f"config.data.num_classes = {config.data.num_classes} must lie in 2..255")
    if not 0 <= config.crf.damping < 1:
        raise ConfigError(f"config.crf.damping = {config.crf.damping} must lie in [0, 1)")
    for name in config.model.relations:
        _choose("model.relations", name, list(config.relations))
        kind = config.relations[name].parameterisation
        _choose(f"relations.{name}.parameterisation", kind, ["", *PARAMETERISATIONS])
    for name in config.crf.relations:
        _choose("crf.relations", name, list(config.model.relations))
    if len(config.crf.weights) not in (1, len(crf_relations(config))):
        raise ConfigError(
            f"config.crf.weights = {config.crf.weights} must hold one number for all relations or one for each of "
            f"{crf_relations(config)}"
        )
    devices = num_devices or jax.device_count()
    for key in ("train.batch_size", "eval.batch_size"):
        if flat[key] % devices:
            raise ConfigError(
                f"config.{key} = {flat[key]} is not divisible by the {devices} devices; use a multiple, such as "
                f"{-(-flat[key] // devices) * devices}"
            )
    build_model(config)


def check_classes(config: ConfigDict, class_names) -> None:
    """The config's number of classes against the data set's."""
    if config.data.num_classes != len(class_names):
        raise ConfigError(
            f"config.data.num_classes = {config.data.num_classes}, but {config.data.name} has {len(class_names)} "
            f"classes ({', '.join(class_names)}); set --config.data.num_classes={len(class_names)}"
        )


def relations(config: ConfigDict) -> tuple[Relation, ...]:
    """The relations that the model has a Pairwise-Net for."""
    out = []
    for name in config.model.relations:
        c = config.relations[name]
        try:
            out.append(Relation(name, tuple(c.rows), tuple(c.cols), c.unit, c.grid or None))
        except ValueError as error:
            raise ConfigError(f"config.relations.{name}: {error}") from None
    return tuple(out)


def build_model(config: ConfigDict) -> Segmenter:
    """The model of a config. input_scaling "auto" stands for "tf" until weights say otherwise."""
    m = config.model
    options = m[m.backbone].to_dict() if m.backbone in m else {}
    featmap = dict(
        backbone=m.backbone,
        backbone_options=tuple(sorted(options.items())),
        scales=m.scales,
        block6=m.block6,
        pyramid_windows=m.pyramid_windows,
    )
    try:
        FeatMapNet(**featmap)
        return Segmenter(
            num_classes=config.data.num_classes,
            featmap=featmap,
            relations=relations(config),
            parameterisation=tuple(config.relations[n].parameterisation or m.parameterisation for n in m.relations),
            hidden=m.hidden,
            input_scaling="tf" if m.input_scaling == "auto" else m.input_scaling,
            pairwise_trains_features=m.pairwise_trains_features,
            dtype=m.dtype,
        )
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.model: {error}") from None


def crf_relations(config: ConfigDict) -> tuple[str, ...]:
    """The relations that inference uses."""
    return tuple(config.crf.relations or config.model.relations)


def crf_settings(config: ConfigDict) -> dict:
    """What `steps.make_eval_step` needs of config.crf."""
    names = crf_relations(config)
    weights = config.crf.weights if len(config.crf.weights) == len(names) else config.crf.weights * len(names)
    return dict(
        relation_weights=dict(zip(names, weights, strict=True)),
        num_iterations=config.crf.num_iterations,
        damping=config.crf.damping,
        normalize=config.crf.normalize,
    )


def table_rows(config: ConfigDict) -> dict[str, tuple[str, ...]]:
    """Rows of the evaluation table: the unary alone, each relation added to it, all of them."""
    names = crf_relations(config)
    return {"unary": ()} | {name: (name,) for name in names} | {"all": names}


def dataset_options(config: ConfigDict) -> dict:
    """Keyword arguments of `pwcrf_jax.data.load_dataset`."""
    d = config.data
    options = d[d.name].to_dict() if d.name in d else {}
    return dict(name=d.name, source_dir=d.source_dir, data_dir=d.data_dir, **options)


def save(config: ConfigDict, path) -> None:
    """Writes a config as JSON, whole or not at all."""
    path = pathlib.Path(path)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    partial.replace(path)


def load(path) -> ConfigDict:
    """Reads a config written by `save`; lists become tuples again, so that flags can override them."""
    try:
        return ConfigDict(_tuples(json.loads(pathlib.Path(path).read_text())))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: is this the --workdir of a training run?") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not a config: {error}") from None


def _tuples(x):
    if isinstance(x, dict):
        return {k: _tuples(v) for k, v in x.items()}
    return tuple(_tuples(v) for v in x) if isinstance(x, list) else x
