"""Errors that end a command in one line and exit code 2."""


class ConfigError(ValueError):
    """A value of the config that cannot work; the message names the key."""


class FileError(OSError):
    """A file or folder that cannot be read or written; the message names it and the remedy."""
