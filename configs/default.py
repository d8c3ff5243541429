"""Every key at its default: the paper's setting where the paper gives one. docs/configuration.md lists the keys."""

from pwcrf_jax.config import defaults


def get_config():
    return defaults()
