"""Configs, checked before any compute is spent: keys and values, then what goes together."""

import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from pwcrf_jax.config import keys
from pwcrf_jax.config.keys import KEYS, RELATION
from pwcrf_jax.config.kinds import Choice
from pwcrf_jax.config.model import build_model
from pwcrf_jax.config.offsets import check_edges
from pwcrf_jax.config.settings import crf_relations, left_to_set, objective, unary_steps
from pwcrf_jax.model import losses
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.runtime.parallel import device_count

_BATCHES = ("train.batch_size", "eval.batch_size")


def unknown(key: str) -> str | None:
    """A sentence on a key that nothing reads, with the nearest that something does; None for keys and sections."""
    names = list(KEYS)
    if key.startswith("relations."):
        names = [f"{'.'.join(key.split('.')[:2])}.{field}" for field in RELATION]
    if keys.of(key) or any(f"{name}.".startswith(f"{key}.") for name in (*names, "relations")):
        return None
    section, _, last = key.rpartition(".")
    if entry := keys.of(section):
        return f"config.{section} must be {entry.kind.wanted}, not a section"
    siblings = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == section]
    near = [f"{section}.{name}".lstrip(".") for name in difflib.get_close_matches(last, siblings, 1)]
    near += difflib.get_close_matches(key, [name for name in names if name.rpartition(".")[2] == last], 1, 0)
    if not siblings:
        near += difflib.get_close_matches(key, names, 1, 0.75)
    if near:
        advice = f"did you mean config.{near[0]}?"
    elif section and siblings:
        advice = f"config.{section} has {', '.join(siblings)}"
    else:
        advice = "see docs/configuration.md for the names"
    return f"config.{key} is not a key; {advice}"


def problems(flat: dict[str, Any], relation_names: Collection[str]) -> Iterator[str]:
    """A sentence for every key that is unknown, missing or holds a wrong value; flat: {dotted key: value}."""
    entries = dict(KEYS)
    for relation in relation_names:
        entries |= {f"relations.{relation}.{field}": entry for field, entry in RELATION.items()}
    for key in (key for key in flat if key not in entries):  # before the key that it stands for is missed
        inner = next((name for name in entries if name.startswith(f"{key}.")), f"{key}.NAME.rows")
        yield unknown(key) or f"config.{key} = {flat[key]!r} must be a section, config.{inner} is missing"
    for key, entry in entries.items():
        if key not in flat:
            yield f"config.{key} is missing; start from configs/default.py"
        elif not entry.kind.accepts(flat[key]):
            yield entry.kind.refusal(key, flat[key])


def _choose(key: str, names: Sequence[str], known: Collection[str], what: str) -> None:
    """Refuses names that are not known, or given twice."""
    for name in names:
        if name not in known:
            raise ConfigError(Choice(known).refusal(key, name))
    if len(set(names)) != len(names):
        raise ConfigError(f"config.{key} = {names} names a {what} twice")


def check_keys(config: ConfigDict) -> None:
    """Refuses a config whose keys are not those of `pwcrf_jax.config.keys`, or whose values have another type or range.

    Raises:
      ConfigError: naming the key, its value and the remedy.
    """
    boxes = config.get("relations")
    for problem in problems(dict(keys.flat(config)), boxes if isinstance(boxes, ConfigDict) else ()):
        raise ConfigError(problem)
    _choose("model.relations", config.model.relations, boxes or (), "relation")


def validate(config: ConfigDict, num_devices: int | None = None, batches: tuple[str, ...] = _BATCHES) -> None:
    """Refuses what cannot work, before data are read or anything is compiled.

    batches: the batch sizes that the devices must divide.

    Raises:
      ConfigError: naming the key, its value and the remedy.
    """
    check_keys(config)
    flat = dict(keys.flat(config))
    for key in left_to_set(config):
        raise ConfigError(f"config.{key} = {flat[key]!r} is found by training; name it here")
    _choose("crf.relations", config.crf.relations, config.model.relations, "relation")
    if len(config.crf.weights) not in (1, len(crf_relations(config))):
        raise ConfigError(
            f"config.crf.weights = {config.crf.weights} must hold one number for all relations or one for each of "
            f"{crf_relations(config)}"
        )
    _validate_label_weights(config)
    build_model(config)
    _validate_objective(config)
    _validate_given_scores(config)
    _validate_evidence(config)
    check_edges(config, "data.eval_size")
    # Last, as it starts the devices, which takes a while on some.
    devices = num_devices or device_count()
    for key in batches:
        if flat[key] % devices:
            raise ConfigError(
                f"config.{key} = {flat[key]} is not divisible by the {devices} devices; use a multiple, such as "
                f"{-(-flat[key] // devices) * devices}"
            )
    parts, size = devices * config.train.accumulate, config.train.batch_size
    if "train.batch_size" in batches and size % parts:
        raise ConfigError(
            f"config.train.accumulate = {config.train.accumulate} does not divide the {size // devices} images of a "
            f"device (config.train.batch_size = {size}, {devices} devices); use a divisor, or a batch size that is a "
            f"multiple of {parts}"
        )


def _validate_label_weights(config: ConfigDict) -> None:
    names, num_classes = crf_relations(config), config.data.num_classes
    sizes = [tuple(map(len, ends)) for ends in config.crf.label_weights]
    if sizes and sizes != [(num_classes, num_classes)] * len(names):
        raise ConfigError(
            f"config.crf.label_weights, of sizes {sizes}, must be () or hold two tuples of {num_classes} numbers, one "
            f"for each class, for each of {names}"
        )


def _validate_evidence(config: ConfigDict) -> None:
    """Noise of the evidence is refused where no relation is given any."""
    kinds = {
        config.relations[name].parameterisation or config.model.parameterisation for name in config.model.relations
    }
    for key in losses.EVIDENCE_NOISE:
        value, default = config.loss[key], keys.KEYS[f"loss.{key}"].default
        if value != default and "residual" not in kinds:
            raise ConfigError(
                f"config.loss.{key} = {value} needs a relation of parameterisation 'residual', there is none; set it "
                f"to {default}"
            )


def _validate_given_scores(config: ConfigDict) -> None:
    """Given scores have no parameters: what would train them, or stand on them alone, is refused."""
    if config.model.unary != "scores":
        if config.data.scores.dir:
            raise ConfigError(
                f"config.data.scores.dir = {config.data.scores.dir!r} is read with config.model.unary = 'scores' "
                "alone; set both, or neither"
            )
        return
    none = {"model.refinement_convs.layers": (), "loss.label_smoothing": 0.0, "loss.dice_weight": 0.0}
    of_stages = [name for name, other in losses.OBJECTIVES.items() if other.staged]
    wrong = {key: f"set it to {value}" for key, value in none.items() if dict(keys.flat(config))[key] != value}
    wrong |= {} if config.model.relations else {"model.relations": "name some, there is nothing else to train"}
    wrong |= {"loss.objective": "take one without stages"} if config.loss.objective in of_stages else {}
    shared = config.model.pairwise_features == "shared" and not config.model.pairwise_trains_features
    wrong |= {"model.pairwise_trains_features": "set it to True, nothing else trains the features"} if shared else {}
    wrong |= {"data.augment": "set it to '', it cannot move scores"} if config.data.augment else {}
    for key, remedy in wrong.items():
        raise ConfigError(
            f"config.{key} = {dict(keys.flat(config))[key]!r} does not go with config.model.unary = 'scores', which "
            f"nothing trains; {remedy}"
        )


def _validate_objective(config: ConfigDict) -> None:
    name, convs = config.loss.objective, config.model.refinement_convs.layers
    chosen, first = objective(config), unary_steps(config)
    if chosen.needs_relations and not crf_relations(config) and not (chosen.trains_refinement_convs and convs):
        raise ConfigError(f"config.loss.objective = {name!r} needs relations, there are none")
    if convs and not chosen.trains_refinement_convs:
        others = " or ".join(k for k, other in losses.OBJECTIVES.items() if other.trains_refinement_convs)
        raise ConfigError(
            f"config.model.refinement_convs.layers = {convs} are not trained by config.loss.objective = {name!r}; "
            f"take {others}, or set them to ()"
        )
    if first is not None and first >= config.train.steps:
        raise ConfigError(
            f"config.loss.unary_share = {config.loss.unary_share} leaves none of the {config.train.steps} steps to the "
            "relations; lower it"
        )
    if config.train.patience and not config.train.eval_every:
        raise ConfigError(
            f"config.train.patience = {config.train.patience} does nothing without evaluations in training; set "
            "config.train.eval_every above 0"
        )
    for key in chosen.unused:
        value, default = config.loss[key], keys.KEYS[f"loss.{key}"].default
        if value != default:
            raise ConfigError(
                f"config.loss.{key} = {value} does nothing with config.loss.objective = {name!r}; set it to {default}"
            )


def check_classes(config: ConfigDict, class_names: Sequence[str]) -> None:
    """The config's number of classes and names of classes against the data set's."""
    if config.data.num_classes != len(class_names):
        raise ConfigError(
            f"config.data.num_classes = {config.data.num_classes}, but {config.data.name} has {len(class_names)} "
            f"classes ({', '.join(class_names)}); set --config.data.num_classes={len(class_names)}"
        )
    check_scored(config, class_names)


def check_scored(config: ConfigDict, class_names: Sequence[str]) -> None:
    """The names of the classes that means are taken over against those that there are."""
    _choose("eval.classes", config.eval.classes, class_names, "class")
