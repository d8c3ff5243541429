"""Names of classes as people and annotation tools write them: one parser, of classes.txt and of all files like it.

A line a class: `road`, or with its colour, `road 128 64 128`, `road,128,64,128`, `128 64 128 road`, CVAT's
`road:128,64,128::`; or with its value in the masks, `0 road`, `0: road`, `0,road`, `1. road`, `road,0`, `road: 0`. YAML
and JSON: a list of names, `{0: road}`, `{road: 0}`, `{road: [128, 64, 128]}`, COCO's `[{id: 0, name: road}]`, or one of
these under `names`, `classes`, `labels` or `categories`; a Python list as mmseg has it, `classes = ("road", "sky")`.
What looks like a heading, a key, an index or a void marker is taken for what it is, or refused; it becomes no name.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from pwcrf_jax.data.readers.files import DataError, read_lines

_VOID_WORDS = {
    "void", "ignore", "ignored", "ignorelabel", "ignoreindex", "unlabeled", "unlabelled", "notlabeled", "notlabelled",
    "unannotated", "notannotated", "undefined", "unknown", "dontcare", "donotcare", "nolabel", "nodata", "novalue",
    "invalid", "null", "none", "nan", "na", "~",
}  # fmt: skip
_VOID_KINDS = {"area", "areas", "class", "label", "mask", "pixel", "pixels", "region", "regions", "value", "zone"}
_HEADING = {
    "id", "ids", "idx", "index", "no", "nr", "number", "num", "value", "values", "pixel", "label", "labels", "class",
    "classes", "category", "categories", "name", "names", "classname", "classnames", "classid", "labelname", "labelid",
    "trainid", "color", "colour", "colorrgb", "colors", "colours", "rgb", "hex", "parts", "actions", "description",
}  # fmt: skip
_ABOUT = {"a", "all", "and", "each", "list", "my", "of", "our", "object", "segmentation", "semantic", "the"}
_PLURALS = {"classes", "labels", "categories", "classnames"}
_CHANNELS = {"r", "g", "b", "red", "green", "blue"}
_KEYS = ("names", "classes", "labels", "categories", "class_names", "label_names")
SYNTAX = "write 'name' or 'name R G B', one class a line"
INT = re.compile(r"[+-]?\d{1,9}")


class Entry(NamedTuple):
    """A class, or what is void: `value` in the masks where it is written, `colour` where there is one."""

    line: int
    name: str
    value: int | None = None
    colour: tuple[int, ...] = ()

    @property
    def void(self) -> bool:
        return _is_void(self.name) or self.name in ("255", "-1")


def plain(word: str) -> str:
    """A form of a name that its spellings have in common."""
    return re.sub(r"[\W_]+", "", word.casefold()) or word.strip()


def _is_void(name: str) -> bool:
    """Whether a name says void: "void", "do not care", "ignore region", "void/unlabelled"."""
    words = {plain(word) for word in re.split(r"[\W_]+", name) if word} - _VOID_KINDS
    return plain(name) in _VOID_WORDS or bool(words) and words <= _VOID_WORDS


def read_entries(path: Path) -> list[Entry]:
    """Reads the entries of a file of names, in its order, whatever its form; nothing of them is checked yet.

    Raises:
      DataError: it cannot be read, or its form cannot be told for sure.
    """
    lines = read_lines(path, 1 << 20)
    if (structured := _structured(path, "\n".join(lines))) is not None:
        return structured
    numbered = [(i, _without_comma(line)) for i, line in enumerate(lines, 1)]
    numbered = [(i, line) for i, line in numbered if line and not line.startswith("#")]
    return _from_lines(path, numbered)


def _without_comma(line: str) -> str:
    return re.sub(r"[\s,;]+$", "", line).strip()


def _structured(path: Path, text: str) -> list[Entry] | None:
    """Entries of YAML, JSON or a Python list; None where the text is none of them."""
    if re.search(r"^[^#\n]+:[\d, ]*:[^:\n]*:[^:\n]*$", text, re.MULTILINE):  # CVAT's, whose last colon YAML would take
        return None
    assigned = re.fullmatch(r"\s*[A-Za-z_]\w*\s*=\s*([\[({].*[\])}])\s*,?\s*", text, re.DOTALL)
    python = re.fullmatch(r"\s*(\(.*\))\s*,?\s*", assigned[1] if assigned else text, re.DOTALL)
    if python:
        try:
            if isinstance(value := ast.literal_eval(python[1]), tuple) and all(isinstance(x, str) for x in value):
                before = text[: text.index("(")].count("\n")
                lines = {x.value: x.lineno + before for x in ast.walk(ast.parse(python[1]))
                         if isinstance(x, ast.Constant)}  # fmt: skip
                return [Entry(lines[name], name) for name in value]
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    try:  # the base loader: "no", "1" and "null" stay what is written
        node = yaml.compose((assigned[1] if assigned else text).replace("\t", " "), yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    try:
        return None if node is None or isinstance(node, yaml.ScalarNode) else list(_from_node(path, node))
    except RecursionError as e:
        raise DataError(f"{path}: is nested without end; {SYNTAX}") from e


def _from_node(path: Path, node: yaml.Node) -> Iterator[Entry]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            fields = _pairs(item)
            if isinstance(item, yaml.ScalarNode):
                yield Entry(_line(item), item.value.strip())
            elif "name" in fields and "" not in fields:
                yield _from_fields(path, item, fields)
            else:
                raise DataError(f"{path}, line {_line(item)}: is no name in the list; {SYNTAX}")
        return
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if plain(str(key.value)) in map(plain, _KEYS) and not isinstance(value, yaml.ScalarNode):
            yield from _from_node(path, value)
            return
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        entry = None
        if isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode):
            if INT.fullmatch(key.value) and not INT.fullmatch(value.value):
                entry = Entry(_line(key), value.value.strip(), int(key.value))
            elif INT.fullmatch(value.value):
                entry = Entry(_line(key), key.value.strip(), int(value.value))
            elif colour := _colour(value):
                entry = Entry(_line(key), key.value.strip(), None, colour)
        elif isinstance(key, yaml.ScalarNode) and (colour := _colour(value)):
            entry = Entry(_line(key), key.value.strip(), None, colour)
        if entry is None:
            raise DataError(f"{path}, line {_line(key)}: is neither 'NUMBER: name' nor 'name: NUMBER'; {SYNTAX}")
        yield entry


_INDEX = re.compile(r"(?!parent|super|root)\w*(id|idx|index|value|number|label)")


def _from_fields(path: Path, item: yaml.MappingNode, fields: dict[str, str]) -> Entry:
    """An item of a list that has a name, and perhaps a value or a colour among its fields."""
    found = {key: int(text) for key, text in fields.items() if _INDEX.fullmatch(plain(key)) and INT.fullmatch(text)}
    if len(set(found.values())) > 1:
        raise DataError(
            f"{path}, line {_line(item)}: {fields['name']!r} has {' and '.join(f'{k} {v}' for k, v in found.items())}; "
            "keep the one that the masks hold"
        )
    colours = [_colour(value) for key, value in item.value if plain(str(key.value)) in ("color", "colour", "rgb")]
    colour = colours[0] if len(colours) == 1 and not found else ()
    return Entry(_line(item), fields["name"], next(iter(found.values()), None), colour)


def _colour(node: yaml.Node) -> tuple[int, ...]:
    """[128, 64, 128], or "#804080"; () for what is none."""
    if isinstance(node, yaml.ScalarNode):
        return tuple(bytes.fromhex(node.value[1:])) if re.fullmatch(r"#[0-9A-Fa-f]{6}", node.value) else ()
    numbers = [str(x.value) for x in node.value] if isinstance(node, yaml.SequenceNode) else []
    return tuple(map(int, numbers)) if len(numbers) == 3 and all(map(INT.fullmatch, numbers)) else ()


def _pairs(node: yaml.Node) -> dict[str, str]:
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {str(k.value): v.value for k, v in node.value if isinstance(v, yaml.ScalarNode)}


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def is_heading(text: str, channels: bool = False) -> bool:
    """Whether a line is one over names ("Class name", "11 classes", "List of labels") or, `channels`, over columns."""
    words = {plain(word) for word in re.split(r"[\s,;:|()]+", text) if word}
    words -= _CHANNELS if channels else set()
    return plain(text) in _HEADING or bool(words & _HEADING) and words <= _HEADING | _ABOUT or bool(words & _PLURALS)


_BY = r"(?P<by>\s*[:,;=|\t]\s*|[.)]\s+|[.)](?=[^\s\d])|\s+-\s+|\s+)"
_VALUE_FIRST = re.compile(rf"(?P<value>[+-]?\d{{1,9}}){_BY}(?P<name>.*\D.*)")
_VALUE_LAST = re.compile(r"(?=.*\D)(?P<name>.+?)(?P<by>\s*[:,;=|\t]\s*|\s+)(?P<value>[+-]?\d{1,9})")
_COLOUR_FIRST = re.compile(r"(?P<r>\d{1,9})[\s,;]+(?P<g>\d{1,9})[\s,;]+(?P<b>\d{1,9})[\s,;:]+(?P<name>\D.*)")
_COLOUR_LAST = re.compile(  # the end is CVAT's ":parts:actions"
    r"(?=.*\D)(?P<name>.+?)[\s,;:]+\[?(?P<r>-?\d{1,9})[\s,;]+(?P<g>-?\d{1,9})[\s,;]+(?P<b>-?\d{1,9})\]?(:[^:]*:[^:]*)?"
)
_QUOTED = re.compile(r"""(["'])((?:(?!\1).)*)\1""")
_COLOURS, _VALUES = (_COLOUR_FIRST, _COLOUR_LAST), (_VALUE_FIRST, _VALUE_LAST)


def _matches(form: re.Pattern[str], texts: Iterable[str]) -> list[re.Match[str]]:
    """The matches of texts that all have a form; [] where one has another."""
    found = [form.fullmatch(text) for text in texts]
    return [match for match in found if match] if all(found) else []


def _from_lines(path: Path, lines: list[tuple[int, str]]) -> list[Entry]:
    for i, line in lines:
        if len(line) > 200:
            raise DataError(f"{path}, line {i}: is {len(line)} characters long, no name; {SYNTAX}")
    if quoted := _matches(_QUOTED, (line for _, line in lines)):
        return [Entry(i, match[2].strip()) for (i, _), match in zip(lines, quoted, strict=True)]
    heading = len(lines) > 2 and is_heading(lines[0][1], channels=True)
    rest = lines[1:] if heading else lines
    void = [entry for i, line in rest if (entry := _void_entry(path, i, line))]
    names = [(i, line) for i, line in rest if i not in {e.line for e in void}]
    found = _of_one_form(path, names)
    if found is None and len(names) > 1 and all(re.search(r"[,;|\t]", line) for _, line in names):
        raise _columns(path, *names[0])
    if found is None:  # the heading, if it is one, is refused as a name
        found = [_plain_entry(i, line) for i, line in (lines[:1] if heading else []) + names]
    return sorted([*found, *void])


def _of_one_form(path: Path, lines: list[tuple[int, str]]) -> list[Entry] | None:
    """Entries of lines that all have a colour, or all a value; None where they have neither."""
    for form in _COLOURS:
        if found := _matches(form, (line for _, line in lines)):
            colours = [tuple(int(m[c]) for c in "rgb") for m in found]
            names = [m["name"].rstrip(" ,;:\t") for m in found]
            numbered = _of_values(path, [(i, name) for (i, _), name in zip(lines, names, strict=True)], (_VALUE_FIRST,))
            entries = numbered or [Entry(i, _unquoted(name)) for (i, _), name in zip(lines, names, strict=True)]
            return [e._replace(colour=colour) for e, colour in zip(entries, colours, strict=True)]
    return _of_values(path, lines, _VALUES)


def _of_values(path: Path, lines: list[tuple[int, str]], forms: Sequence[re.Pattern[str]]) -> list[Entry] | None:
    for form in forms:
        matches = _matches(form, (line for _, line in lines))
        if not matches:
            continue
        entries = [Entry(i, _unquoted(m["name"]), int(m["value"])) for (i, _), m in zip(lines, matches, strict=True)]
        if all(
            m["by"].strip(" ") in (",", ";", "|", "\t") and m["by"].strip(" ") in m["name"] for m in matches
        ) and not any(m["name"][0] in "\"'" for m in matches):
            raise _columns(path, *lines[0])
        if any("\t" in m["by"] or not m["by"].isspace() for m in matches):
            return entries
        # A number may be part of a name: "2 wheels", "lane 1".
        values, names = [int(m["value"]) for m in matches], {e.name for e in entries}
        part = len(names) < len(entries) or any(re.search(r"\d$", name) for name in names)
        if part and form is _VALUE_LAST and values == sorted(values):
            return None
        if part or sorted(values) not in (list(range(len(values))), list(range(1, len(values) + 1))):
            raise DataError(
                f"{path}: every line {'starts' if form is _VALUE_FIRST else 'ends'} with a number, but they are not "
                "0, 1, 2, ... of different names; if they are the values in the masks write 'NUMBER: name', and "
                "'name_1' where a number is part of the name"
            )
        return entries
    return None


def _columns(path: Path, number: int, line: str) -> DataError:
    return DataError(f"{path}, line {number}: {line!r} has columns that cannot be told apart; {SYNTAX}")


def _unquoted(name: str) -> str:
    return re.sub(r"""^(["'])(.*)\1$""", r"\2", name.strip()).strip()


def _void_entry(path: Path, number: int, line: str) -> Entry | None:
    """The entry of a line of a void marker, alone or with numbers before or behind it; None for other lines."""
    word = re.sub(r"(?<![\w+-])[+-]?\d+(?!\w)", " ", line).strip(" ,;:=.)|\t")
    if not _is_void(word):
        return None
    numbers = [int(x) for x in re.findall(r"[+-]?\d{1,9}", line)]
    if len(numbers) not in (0, 1, 3, 4):
        raise DataError(f"{path}, line {number}: {line!r} is no void line; write 'void VALUE' or 'void R G B'")
    return Entry(number, word, numbers[0] if len(numbers) == 1 else None, tuple(numbers[-3:] if numbers[2:] else ()))


def _plain_entry(number: int, line: str) -> Entry:
    """A name, perhaps with a colour."""
    words = line.split()
    colour = tuple(map(int, words[-3:])) if len(words) > 3 and all(map(INT.fullmatch, words[-3:])) else ()
    return Entry(number, " ".join(words[:-3] if colour else words), None, colour)
