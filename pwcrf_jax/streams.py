"""Standard streams as programs find them: of a terminal, a file or a notebook, closed, or none at all."""

import sys
from typing import Any


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
