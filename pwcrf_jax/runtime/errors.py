"""Errors that end a command in one line and exit code 2."""


class ConfigError(ValueError):
    """A value of the config that cannot work; the message names the key."""
