"""Names of classes as people and annotation tools write them: one parser, of classes.txt and of all files like it.

A line a class: `road`, or with its colour, `road 128 64 128`, `road,128,64,128`, `128 64 128 road`, CVAT's
`road:128,64,128::`; or with its value in the masks, `0 road`, `0: road`, `0,road`, `1. road`, `road,0`, `road: 0`. YAML
and JSON: a list of names, `{0: road}`, `{road: 0}`, `{road: [128, 64, 128]}`, COCO's `[{id: 0, name: road}]`, or one of
these under `names`, `classes`, `labels` or `categories`; a Python list as mmseg has it, `classes = ("road", "sky")`.
What looks like a heading, a key, an index or a void marker is taken for what it is, or refused; it becomes no name.
"""

import ast
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pwcrf_jax.data.common import VOID
from pwcrf_jax.data.files import DataError, present, read_lines

LABELME_VOID = "__ignore__"
"""labelme's first label, which has no value: its masks hold 255 there, and the next label is 0."""

_VOID_WORDS = {
    "void", "ignore", "ignored", "ignorelabel", "ignoreindex", "unlabeled", "unlabelled", "notlabeled", "notlabelled",
    "unannotated", "undefined", "unknown", "dontcare", "null", "none", "nan", "na", "~",
}  # fmt: skip
_HEADING = {
    "id", "ids", "idx", "index", "no", "nr", "number", "num", "value", "values", "pixel", "label", "labels", "class",
    "classes", "category", "categories", "name", "names", "classname", "classnames", "classid", "labelname", "labelid",
    "trainid", "color", "colour", "colorrgb", "colors", "colours", "rgb", "hex", "parts", "actions", "description",
}  # fmt: skip
_CHANNELS = {"r", "g", "b", "red", "green", "blue"}
_KEYS = ("names", "classes", "labels", "categories", "class_names", "label_names")
_SYNTAX = "write 'name' or 'name R G B', one class a line"
_INT = re.compile(r"[+-]?\d{1,9}")
_NO_NAME = r"""\s#|,\s*[\d#]|:\s*[\d#]|[:,]\s*$|//|[\[\]{}<>="`|\\;@]|(?i:^(?:id|names?|class(?:es)?|labels?)\s*:)"""


class Entry(NamedTuple):
    """A class, or what is void: `value` in the masks where it is written, `colour` where there is one."""

    line: int
    name: str
    value: int | None = None
    colour: tuple[int, ...] = ()

    @property
    def void(self) -> bool:
        return _plain(self.name) in _VOID_WORDS or self.name in ("255", "-1")


class Coding(NamedTuple):
    """Which class (255: void) a mask's values, or its colours where `colours`, stand for."""

    classes: dict[int, int]
    colours: bool


def _plain(word: str) -> str:
    """What two spellings of a name have in common."""
    return re.sub(r"[\W_]+", "", word.casefold()) or word.strip()


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...], Coding]:
    """Names, colours (as many as names, or none) and the coding of masks that a classes.txt gives.

    Raises:
      DataError: missing, or it does not follow the syntax; names the line.
    """
    if not present(path):
        raise DataError(f"{path}: is missing; write one class a line, 'name' or 'name R G B'")
    entries = read_entries(path)
    for i, entry in enumerate(entries):
        _check(path, entry, first=i == 0)
    entries = [e for i, e in enumerate(entries) if not (i == 0 and e.name == LABELME_VOID and e.value is None)]
    classes, void = [e for e in entries if not e.void], [e for e in entries if e.void]
    _check_together(path, classes, void)
    if classes[0].value is not None:
        classes.sort(key=lambda e: e.value)
    if classes[0].colour:
        coding = {_number(e.colour): VOID if e.void else classes.index(e) for e in (*classes, *void)}
        return tuple(e.name for e in classes), tuple(e.colour for e in classes), Coding(coding, True)
    voids = dict.fromkeys([e.value % 256 for e in void] or [VOID], VOID)  # -1 is 255 of 8 bits
    free = iter(v for v in range(256) if v not in voids)
    coding = {(next(free) if e.value is None else e.value): k for k, e in enumerate(classes)}
    return tuple(e.name for e in classes), (), Coding(coding | voids, False)


_NAMES_FILES = re.compile(
    r"((class|label|category)(_?names|_?list|_?map)?|classes|labels|categories|names)\.(txt|json|ya?ml|names|csv)|data\.ya?ml"
)


def refuse_own_names(folders: Sequence[Path], names: Sequence[str], values: Mapping[int, str]) -> None:
    """Compares what a tool has written beside a data set of another layout with the classes of that layout.

    Args:
      folders: where such a file may lie: classes.txt, class_names.txt, labelmap.txt, labels.txt, data.yaml, ...
      names: the layout's classes in their order.
      values: and what values of its masks mean.

    Raises:
      DataError: a file names other classes, or cannot be understood.
    """
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if not _NAMES_FILES.fullmatch(path.name.casefold()) or not present(path):
                continue
            entries = [e for e in read_entries(path) if not e.void]
            if entries and all(e.value is not None for e in entries):
                if all(_plain(e.name) == _plain(values.get(e.value, "")) for e in entries):
                    continue
                entries.sort(key=lambda e: e.value)
            refuse_other_names(path, [e.name for e in entries], names, len(names))


def refuse_other_names(where: Any, found: Sequence[str], names: Sequence[str], least: int) -> None:
    """DataError where fewer than `least` of the names found are those of the classes, place by place."""
    alike = sum(_plain(a) == _plain(b) for a, b in zip(found, names, strict=False))
    if alike < least or len(found) > len(names):
        raise DataError(
            f"{where}: names {len(found)} classes of its own ({', '.join(found[:5])}{', ...' * (len(found) > 5)}), but "
            f"data.name stands for these {len(names)}: {', '.join(names[:5])}, ...; use data.name=image_folder with "
            "these classes and masks of values, or remove the file if it is about other data"
        )


def _number(colour: Sequence[int]) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


# What there is to say against an entry, and against all together ------------------------------------------


def _check(path: Path, entry: Entry, first: bool) -> None:
    where, name = f"{path}, line {entry.line}", entry.name
    if any(unicodedata.category(c) == "Cc" or c in "\ufeff\u200b" for c in name):
        raise DataError(f"{where}: {name!r} holds control characters; save the file as UTF-8")
    if entry.colour and not all(0 <= c <= 255 for c in entry.colour):
        raise DataError(f"{where}: {entry.colour} is no colour; R, G and B are 0..255")
    if entry.void:
        if first and name == LABELME_VOID:
            return
        if entry.value is None and not entry.colour:
            if _plain(name) != "void":
                raise DataError(
                    f"{where}: {name!r} would be a class; write 'void VALUE' or 'void R G B' for what is not trained "
                    "on, or rename it"
                )
            raise DataError(f"{where}: void needs its value ('void 255') or its colour ('void 0 0 0')")
        if entry.value is not None and not -1 <= entry.value <= 255:
            raise DataError(f"{where}: {entry.value} is no value of an 8-bit mask; void is 0..255")
        return
    if re.search(_NO_NAME, name) or (entry.colour and _INT.fullmatch(name.split()[-1])):
        raise DataError(
            f"{where}: {name!r} is no name; {_SYNTAX}, numbers apart by spaces, comments on lines of their own"
        )
    if entry.value is not None and re.match(r"\d+[\s,;:]", name):
        raise DataError(f"{where}: {name!r} behind the value {entry.value} is no name; {_SYNTAX}")
    if not name or not (name[0].isalnum() or name[0] in "_(") or name[-1] in "'(":
        raise DataError(f"{where}: {name!r} is no name: names start with a letter or a digit; {_SYNTAX}")
    if re.fullmatch(r"[\d\s.,:;+-]*", name):
        raise DataError(f"{where}: {name!r} is a number, no name; {_SYNTAX}")
    if first and _is_heading(name):
        raise DataError(f"{where}: {name!r} looks like a heading; delete the line, or put # before it")
    if entry.value is not None and not 0 <= entry.value <= 254:
        raise DataError(f"{where}: {name!r} has the value {entry.value}; classes of 8-bit masks have 0 to 254, "
                        "and 255 is void")  # fmt: skip


def _check_together(path: Path, classes: list[Entry], void: list[Entry]) -> None:
    if not classes:
        raise DataError(f"{path}: names no class; write one a line, 'name' or 'name R G B'")
    if len(classes) == 1:
        raise DataError(f"{path}: names one class, expected two or more; what is around an object is a class, too")
    if len({e.value is None for e in classes}) > 1:
        odd = next(e for e in classes if e.value is None)
        raise DataError(f"{path}, line {odd.line}: {odd.name!r} has no value, other classes have one; give all one")
    names: dict[str, Entry] = {}
    codes: dict[object, Entry] = {}
    for e in sorted((*classes, *void), key=lambda e: e.line):
        if not e.void and e.name in names:
            raise DataError(f"{path}, line {e.line}: class {e.name!r} is there twice; rename or remove one")
        names[e.name] = e
        code = e.colour or e.value
        what = "colour" if e.colour else "value"
        if code is not None and code in codes and not (e.void and codes[code].void):
            raise DataError(
                f"{path}, line {e.line}: {e.name!r} and {codes[code].name!r} have the same {what} {code}; change one"
            )
        codes[code] = e
    if any(e.colour for e in classes):
        without = [e.name for e in classes if not e.colour]
        if without or any(not e.colour for e in void):
            raise DataError(
                f"{path}: some lines have a colour, but not {', '.join(without[:5]) or 'void'}; give every class a "
                "colour, or none"
            )
    elif bad := [e for e in void if e.value is None]:
        raise DataError(f"{path}, line {bad[0].line}: {bad[0].name!r} has a colour, the classes have none; give all "
                        "one, or none")  # fmt: skip
    if len(classes) > 255 or (not classes[0].colour and len(classes) + max(1, len({e.value for e in void})) > 256):
        raise DataError(f"{path}: {len(classes)} classes are too many, 8-bit masks have room for 255 and void")


# Forms ------------------------------------------------------------------------------------------------


def read_entries(path: Path) -> list[Entry]:
    """What a file of names holds, in its order, whatever its form; nothing of it is checked yet.

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
        raise DataError(f"{path}: is nested without end; {_SYNTAX}") from e


def _from_node(path: Path, node: yaml.Node) -> Iterator[Entry]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            fields = _pairs(item)
            if isinstance(item, yaml.ScalarNode):
                yield Entry(_line(item), item.value.strip())
            elif "name" in fields and "" not in fields:
                index = next((fields[key] for key in ("id", "index", "value") if key in fields), None)
                yield Entry(_line(item), fields["name"], int(index) if index and _INT.fullmatch(index) else None)
            else:
                raise DataError(f"{path}, line {_line(item)}: is no name in the list; {_SYNTAX}")
        return
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if _plain(str(key.value)) in map(_plain, _KEYS) and not isinstance(value, yaml.ScalarNode):
            yield from _from_node(path, value)
            return
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        entry = None
        if isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode):
            if _INT.fullmatch(key.value) and not _INT.fullmatch(value.value):
                entry = Entry(_line(key), value.value.strip(), int(key.value))
            elif _INT.fullmatch(value.value):
                entry = Entry(_line(key), key.value.strip(), int(value.value))
        elif isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.SequenceNode):
            numbers = [str(x.value) for x in value.value]
            if len(numbers) == 3 and all(map(_INT.fullmatch, numbers)):
                entry = Entry(_line(key), key.value.strip(), None, tuple(map(int, numbers)))
        if entry is None:
            raise DataError(f"{path}, line {_line(key)}: is neither 'NUMBER: name' nor 'name: NUMBER'; {_SYNTAX}")
        yield entry


def _pairs(node: yaml.Node) -> dict[str, str]:
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {str(k.value): v.value for k, v in node.value if isinstance(v, yaml.ScalarNode)}


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _is_heading(text: str, channels: bool = False) -> bool:
    words = {_plain(word) for word in re.split(r"[\s,;:|]+", text) if word}
    return bool(words) and (_plain(text) in _HEADING or words <= (_HEADING | _CHANNELS if channels else _HEADING))


_BY = r"(?P<by>\s*[:,;=|\t]\s*|[.)]\s+|[.)](?=[^\s\d])|\s+-\s+|\s+)"
_VALUE_FIRST = re.compile(rf"(?P<value>[+-]?\d{{1,9}}){_BY}(?P<name>.*\D.*)")
_VALUE_LAST = re.compile(r"(?=.*\D)(?P<name>.+?)(?P<by>\s*[:,;=|\t]\s*|\s+)(?P<value>[+-]?\d{1,9})")
_COLOUR_FIRST = re.compile(r"(?P<r>\d{1,9})[\s,;]+(?P<g>\d{1,9})[\s,;]+(?P<b>\d{1,9})[\s,;:]+(?P<name>\D.*)")
_COLOUR_LAST = re.compile(  # the end is CVAT's ":parts:actions"
    r"(?=.*\D)(?P<name>.+?)[\s,;:]+\[?(?P<r>-?\d{1,9})[\s,;]+(?P<g>-?\d{1,9})[\s,;]+(?P<b>-?\d{1,9})\]?(:[^:]*:[^:]*)?"
)
_COLOURS, _VALUES = (_COLOUR_FIRST, _COLOUR_LAST), (_VALUE_FIRST, _VALUE_LAST)


def _from_lines(path: Path, lines: list[tuple[int, str]]) -> list[Entry]:
    for i, line in lines:
        if len(line) > 200:
            raise DataError(f"{path}, line {i}: is {len(line)} characters long, no name; {_SYNTAX}")
    quoted = [re.fullmatch(r"""(["'])((?:(?!\1).)*)\1""", line) for _, line in lines]
    if lines and all(quoted):
        return [Entry(i, match[2].strip()) for (i, _), match in zip(lines, quoted, strict=True)]
    heading = len(lines) > 2 and _is_heading(lines[0][1], channels=True)
    rest = lines[1:] if heading else lines
    void = [entry for i, line in rest if (entry := _void_entry(path, i, line))]
    names = [(i, line) for i, line in rest if i not in {e.line for e in void}]
    found = _of_one_form(path, names)
    if found is None and len(names) > 1 and all(re.search(r"[,;|\t]", line) for _, line in names):
        raise DataError(f"{path}, line {names[0][0]}: {names[0][1]!r} has columns that cannot be told apart; {_SYNTAX}")
    if found is None:  # the heading, if it is one, is refused as a name
        found = [_plain_entry(i, line) for i, line in (lines[:1] if heading else []) + names]
    return sorted([*found, *void])


def _of_one_form(path: Path, lines: list[tuple[int, str]]) -> list[Entry] | None:
    """Entries of lines that all have a colour, or all a value; None where they have neither."""
    matched = lambda form, texts: [form.fullmatch(text) for text in texts]
    texts = [line for _, line in lines]
    for form in _COLOURS if lines else ():
        if all(found := matched(form, texts)):
            colours = [tuple(int(m[c]) for c in "rgb") for m in found]
            names = [m["name"].rstrip(" ,;:\t") for m in found]
            numbered = _of_values(path, [(i, name) for (i, _), name in zip(lines, names, strict=True)], (_VALUE_FIRST,))
            entries = numbered or [Entry(i, _unquoted(name)) for (i, _), name in zip(lines, names, strict=True)]
            return [e._replace(colour=colour) for e, colour in zip(entries, colours, strict=True)]
    return _of_values(path, lines, _VALUES)


def _of_values(path: Path, lines: list[tuple[int, str]], forms: Sequence[re.Pattern]) -> list[Entry] | None:
    for form in forms if lines else ():
        matches = [form.fullmatch(line) for _, line in lines]
        if not all(matches):
            continue
        entries = [Entry(i, _unquoted(m["name"]), int(m["value"])) for (i, _), m in zip(lines, matches, strict=True)]
        if any("\t" in m["by"] or not m["by"].isspace() for m in matches):
            return entries
        # A number may be part of a name: "2 wheels", "lane 1".
        values, names = [e.value for e in entries], {e.name for e in entries}
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


def _unquoted(name: str) -> str:
    return re.sub(r"""^(["'])(.*)\1$""", r"\2", name.strip()).strip()


def _void_entry(path: Path, number: int, line: str) -> Entry | None:
    """What a line of a void marker, alone or with numbers before or behind it, says; None for other lines."""
    word = re.sub(r"(?<![\w+-])[+-]?\d+(?!\w)", " ", line).strip(" ,;:=.)|\t")
    if _plain(word) not in _VOID_WORDS:
        return None
    numbers = [int(x) for x in re.findall(r"[+-]?\d{1,9}", line)]
    if len(numbers) not in (0, 1, 3, 4):
        raise DataError(f"{path}, line {number}: {line!r} is no void line; write 'void VALUE' or 'void R G B'")
    return Entry(number, word, numbers[0] if len(numbers) == 1 else None, tuple(numbers[-3:] if numbers[2:] else ()))


def _plain_entry(number: int, line: str) -> Entry:
    """A name, perhaps with a colour."""
    words = line.split()
    colour = tuple(map(int, words[-3:])) if len(words) > 3 and all(map(_INT.fullmatch, words[-3:])) else ()
    return Entry(number, " ".join(words[:-3] if colour else words), None, colour)
