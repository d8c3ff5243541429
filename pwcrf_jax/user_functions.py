"""Functions of the user's own, named "module:function"."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def is_name(name: str) -> bool:
    """Whether a text has the form "package.module:function"."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def find(name: str) -> Callable[..., Any]:
    """The function of a name; its module is looked for in the current folder too.

    Raises:
      ValueError: no such module or function, a module that cannot be imported, or what cannot be called.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last: nothing of Python's or ours is hidden by a file there
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"{module} cannot be imported: {described(error)}; {_ADVICE}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module} has no {attribute}; name a function that it has")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{attribute} is no function but {type(found).__name__}; name what can be called")
    return found


_ADVICE = "install it, or start in the folder that it lies in"


def described(error: BaseException) -> str:
    """An error of the user's code in one short line, with the place that it was raised at."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is ours
    return f"{said} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else said
