"""JSON and XML of annotation tools, read so that no file can do more than be wrong.

A document is bounded in bytes and in depth; XML may have no DTD, and so no entities that grow or name other files.
"""

import json
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree
from xml.parsers import expat

from pwcrf_jax.data.readers.files import DataError, read_file

MOST_BYTES = 1 << 28
"""Bytes of a document. As Python objects it takes about ten times as much memory."""
_DEPTH = 64  # of elements; CVAT's have 6


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      DataError: it cannot be read, is longer than `MOST_BYTES`, no JSON, or no object.
    """
    data = read_file(path, MOST_BYTES)
    try:
        content = json.loads(data.decode("utf-8-sig"), parse_constant=_no_number)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: is not JSON ({_told(e)}); export it again") from e
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a JSON {type(content).__name__}, expected an object; export it again")
    return content


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _told(error: BaseException) -> str:
    return "it is nested without end" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]


def read_xml(path: Path) -> ElementTree.Element:
    """The root element of an XML file.

    Raises:
      DataError: it cannot be read, is longer than `MOST_BYTES`, not well-formed, nested too deep, or has a DTD.
    """
    data = read_file(path, MOST_BYTES)
    builder, depth = ElementTree.TreeBuilder(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEPTH:
            raise DataError(f"{path}: is nested deeper than {_DEPTH} elements; export it again")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse_dtd(*_: Any) -> None:
        raise DataError(f"{path}: has a DTD (<!DOCTYPE ...>), which no annotation tool writes; remove that line")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse_dtd
    try:
        parser.Parse(data, True)
        return builder.close()
    except (expat.ExpatError, ValueError, LookupError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path}: is not XML ({_told(e)}); export it again") from e


def number(value: Any, where: str, what: str, *, least: float = -math.inf) -> float:
    """A finite number, given as one or, in XML, as text; DataError for all else, and below `least`."""
    try:
        if isinstance(value, bool):
            raise ValueError
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not (math.isfinite(found) and found >= least):
        bound = f" of {least:g} or more" if math.isfinite(least) else ""
        raise DataError(f"{where}: {what} {brief(value)} is no finite number{bound}; correct it, or export it again")
    return found


def whole(value: Any, where: str, what: str, *, least: int = 0) -> int:
    """An integer of `least` or more that an int64 holds, as `number`."""
    found = number(value, where, what, least=least)
    if abs(found) >= 1 << 62 or found != int(found):
        raise DataError(f"{where}: {what} {brief(value)} is no whole number; correct it, or export it again")
    return value if isinstance(value, int) else int(found)


def text(value: Any, where: str, what: str) -> str:
    """A string that is not empty and has one line; DataError for all else."""
    if (
        not isinstance(value, str)
        or not value.strip()
        or len(value) > 1000
        or {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, value))
    ):
        raise DataError(f"{where}: {what} {brief(value)} is no name; correct it, or export it again")
    return value


def table(value: Any, where: str, what: str) -> Sequence[Any]:
    """A JSON list; DataError for all else."""
    if not isinstance(value, list):
        raise DataError(f"{where}: {what} {brief(value)} is no list; correct it, or export it again")
    return value


def fields(value: Any, where: str, what: str) -> dict[str, Any]:
    """A JSON object; DataError for all else."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: {what} {brief(value)} is no object; correct it, or export it again")
    return value


def brief(value: Any) -> str:
    """A value as it is shown in a message of one line."""
    if isinstance(value, list | tuple | dict):
        return f"({type(value).__name__} of {len(value)})"
    shown = repr(value if not isinstance(value, str) else value[:60])
    return shown if len(shown) <= 80 else shown[:77] + "..."
