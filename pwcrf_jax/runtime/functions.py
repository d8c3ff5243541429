"""Functions of the user's own that a config names."""

from collections.abc import Callable
from typing import Any

from pwcrf_jax import user_functions
from pwcrf_jax.runtime.errors import ConfigError

described = user_functions.described


def load(name: str, key: str) -> Callable[..., Any]:
    """`user_functions.find`; key: of the config, for messages.

    Raises:
      ConfigError: where that raises ValueError.
    """
    try:
        return user_functions.find(name)
    except ValueError as error:
        raise ConfigError(f"config.{key} = {name!r}: {error}") from error
