"""Standard streams as programs find them: of a terminal, a file or a notebook, closed, or none at all."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from pwcrf_jax.runtime import files


class _Named:
    """A stream whose refusals, such as of a full disk, are told by its name: the system names no file there."""

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._naming():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._naming():
            self._stream.flush()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):  # or Python tries again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise files.refused(self._name, "cannot be used", error) from None


@contextlib.contextmanager
def naming_stdout() -> Iterator[None]:
    """In here what standard output refuses is a `FileError` that names it; all is written when this ends well."""
    if sys.stdout is None:
        yield
        return
    with contextlib.redirect_stdout(_Named(sys.stdout, "standard output")) as stream:
        yield
        if not getattr(stream, "closed", False):
            stream.flush()


def is_terminal(stream: Any) -> bool:
    """Whether somebody watches: False for streams that cannot tell, are closed, or are None (pythonw)."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):
        return False


def say(text: str) -> None:
    """Prints text at once on standard output, if there is one. Characters that its encoding lacks come as \\\\u...."""
    stream = sys.stdout
    if stream is None or getattr(stream, "closed", False):
        return
    try:
        print(text, file=stream)
    except UnicodeEncodeError as error:
        encoding = getattr(stream, "encoding", None) or error.encoding
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    if hasattr(stream, "flush"):
        stream.flush()
