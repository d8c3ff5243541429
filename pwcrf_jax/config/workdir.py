"""Files of a workdir beside its checkpoints: config.json, classes.json, tuned.json."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from pwcrf_jax.config import keys
from pwcrf_jax.config.settings import crf_relations
from pwcrf_jax.config.validation import check_keys
from pwcrf_jax.runtime import files
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.runtime.logs import log

CONFIG = "config.json"
"""The config of the run."""

CLASSES = "classes.json"
"""Names and colours of its classes, for prediction without the data set."""

TUNED = "tuned.json"
"""The values that `pwcrf tune` chose."""

_TUNED_OF_CRF = ("crf.weights", "crf.label_weights", "crf.unary_temperature", "crf.num_iterations")

Palette = Sequence[Sequence[int]]


def save(config: ConfigDict, path: str | os.PathLike[str]) -> None:
    """Writes a config as JSON, whole or not at all."""
    files.write_json(path, config.to_dict())


def load(path: str | os.PathLike[str]) -> ConfigDict:
    """Reads a config written by `save`; lists become tuples again, so that flags can override them.

    Where the file is damaged or not there, as power loss may leave it, the log says so and the config that the
    checkpoints beside it carry is taken.

    Raises:
      ConfigError: neither can be used.
    """
    try:
        return files.read_json(path, "put a copy in its place, or name another --workdir", _restored)
    except (FileNotFoundError, files.FileError) as error:
        from pwcrf_jax.runtime import checkpoint  # Orbax, which a run that is refused need not load

        missing = f"{path} does not exist: is this the --workdir of a training run?"
        why = str(error) if isinstance(error, files.FileError) else missing
        carried = checkpoint.config_of(os.path.dirname(path))
        if carried is None:
            raise ConfigError(why) from None
        log.warning("%s is taken instead: %s", f"The configuration in {carried[1]}", why)
        return _restored(carried[0])


def load_checked(workdir: str) -> ConfigDict:
    """`load` of the config of a run, and `check_keys` of it.

    Raises:
      ConfigError: it cannot be used; the message names the file.
    """
    path = os.path.join(workdir, CONFIG)
    config = load(path)
    try:
        check_keys(config)
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be used: {error}") from None
    return config


def _restored(stored: Any) -> ConfigDict:
    """The config of what JSON keeps of it; ValueError where that is something else."""
    if not isinstance(stored, dict) or not stored:
        raise ValueError("expected a JSON object with the keys of docs/configuration.md")
    return ConfigDict(_tuples(stored))  # ValueError for names with a dot


def save_classes(class_names: Sequence[str], palette: Palette, folder: str) -> None:
    """Writes FOLDER/classes.json, whole or not at all."""
    named = [{"name": name, "colour": list(colour)} for name, colour in zip(class_names, palette, strict=True)]
    files.write_json(os.path.join(folder, CLASSES), named)


def load_classes(workdir: str) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """(class names, palette) of WORKDIR/classes.json; two empty tuples where it is not there.

    Raises:
      ConfigError: it cannot be read.
    """

    def check(content: Any) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
        if not isinstance(content, list) or not content:
            raise ValueError("expected a list of classes")
        for x in content:
            colour = x["colour"]
            if not isinstance(x["name"], str) or not isinstance(colour, list) or len(colour) != 3:
                raise ValueError("expected names and colours of three numbers")
            if not all(type(n) is int and 0 <= n <= 255 for n in colour):
                raise ValueError("a colour is not three integers 0..255")
        return tuple(x["name"] for x in content), tuple(tuple(x["colour"]) for x in content)

    try:
        return files.read_json(os.path.join(workdir, CLASSES), "delete it, training writes it again", check)
    except FileNotFoundError:
        return (), ()
    except files.FileError as error:
        raise ConfigError(str(error)) from None


def tuning_conditions(config: ConfigDict) -> dict[str, Any]:
    """Values beside the tuned ones that decide how good those are, flat and as JSON."""
    names = ("crf.num_iterations", "crf.unary_temperature", "crf.damping", "crf.average_messages",
             "refine.num_iterations")  # fmt: skip
    flat = dict(keys.flat(config))
    return {"crf.relations": list(crf_relations(config))} | {key: flat[key] for key in names}


def check_tuned(config: ConfigDict, tuned: dict[str, Any], workdir: str) -> None:
    """Refuses values of `apply_tuned` under other conditions than they were chosen under."""
    now = tuning_conditions(config)
    for key, value in tuned["conditions"].items():
        if now.get(key) != value:
            raise ConfigError(
                f"config.{key} = {now.get(key)}, but {os.path.join(workdir, TUNED)} was chosen with {value}; "
                "tune again, or add --notuned"
            )


def write_tuned(result: dict[str, Any], workdir: str) -> None:
    """Writes the result of `tuning.tune`, whole or not at all."""
    files.write_json(os.path.join(workdir, TUNED), result)


def apply_tuned(config: ConfigDict, workdir: str) -> dict[str, Any] | None:
    """Sets the keys that tuning chose, where WORKDIR/tuned.json is there; returns its content."""

    def check(result: Any) -> dict[str, Any]:
        for name, kind in {"config": dict, "conditions": dict, "split": str, "step": int}.items():
            if not isinstance(result.get(name, 0) if name == "step" else result[name], kind):
                raise ValueError(f"{name!r} is no {kind.__name__}")
        for key, value in result["config"].items():
            entry = keys.of(key)
            if not entry or not (key in _TUNED_OF_CRF or key.startswith("refine.")):
                raise KeyError(key)
            if not entry.kind.accepts(value):
                raise ValueError(f"{key} = {value!r} must be {entry.kind.wanted}")
        return result

    remedy = "delete it, tune again, or add --tuned=false"
    try:
        result = files.read_json(os.path.join(workdir, TUNED), remedy, check)
    except FileNotFoundError:
        return None
    except files.FileError as error:
        raise ConfigError(str(error)) from None
    apply_values(config, result["config"])
    return result


def apply_values(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets keys of a config to what JSON keeps of their values; values: {SECTION.NAME: value}."""
    for key, value in values.items():
        section, name = key.split(".")
        config[section][name] = _tuples(value)


def _tuples(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _tuples(v) for k, v in x.items()}
    return tuple(_tuples(v) for v in x) if isinstance(x, list) else x
