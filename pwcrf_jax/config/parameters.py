"""The configuration of `pwcrf crf`, which is a part of that of a run, and files of parameters of the dense CRF."""

import os
from typing import Any

from ml_collections import ConfigDict

from pwcrf_jax.config import keys
from pwcrf_jax.config.workdir import apply_values
from pwcrf_jax.runtime import files
from pwcrf_jax.runtime.errors import ConfigError

KEYS = (
    "compilation_cache",
    "data.max_pixels",
    "eval.classes",
    *(key for key in keys.KEYS if key.startswith("refine.")),
)
"""Keys that the dense CRF by itself has."""


def crf_defaults() -> ConfigDict:
    """A config of `KEYS` alone, with their defaults."""
    config = ConfigDict({key.partition(".")[0]: ConfigDict() for key in KEYS if "." in key})
    for key in KEYS:
        *section, name = key.split(".")
        (config[section[0]] if section else config)[name] = keys.KEYS[key].default
    return config


def check_crf(config: ConfigDict) -> None:
    """Refuses values that a key of `crf_defaults` cannot hold; ConfigError."""
    for key, value in keys.flat(config):
        entry = keys.of(key)
        if entry and not entry.kind.accepts(value):
            raise ConfigError(entry.kind.refusal(key, value))


def apply_parameters(config: ConfigDict, path: str | os.PathLike[str]) -> dict[str, str]:
    """Sets the keys of a file that `pwcrf crf --tune` wrote, or one has written by hand: {"config": {key: value}}.

    Returns:
      {name: SHA-256 of the file} of the images that they were chosen on.

    Raises:
      ConfigError: it is not there, or cannot be used.
    """

    def check(content: Any) -> tuple[dict[str, Any], dict[str, str]]:
        values, images = content["config"], content.get("images", {})
        if not isinstance(values, dict) or not isinstance(images, dict):
            raise ValueError("'config' and 'images' are JSON objects")
        for key, value in values.items():
            entry = keys.of(key)
            if not entry or not key.startswith("refine."):
                raise ValueError(f"{key!r} is no parameter of the dense CRF, which are refine.NAME")
            if not entry.kind.accepts(value):
                raise ValueError(f"{key} = {value!r} must be {entry.kind.wanted}")
        return values, {str(name): str(digest) for name, digest in images.items()}

    try:
        values, images = files.read_json(path, "name a file that pwcrf crf --tune wrote", check)
    except FileNotFoundError:
        raise ConfigError(
            f"--parameters={os.fspath(path)}: there is no such file; pwcrf crf --tune writes one"
        ) from None
    except files.FileError as error:
        raise ConfigError(f"--parameters: {error}") from None
    apply_values(config, values)
    return images
