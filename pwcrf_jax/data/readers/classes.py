"""Classes of a data set by a file that names them: classes.txt, and what tools write beside sets of known layouts."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pwcrf_jax.data.readers.class_forms import INT, SYNTAX, Entry, is_heading, plain, read_entries
from pwcrf_jax.data.readers.files import DataError, present
from pwcrf_jax.data.readers.image_io import VOID

LABELME_VOID = "__ignore__"
"""labelme's first label, which has no value: its masks hold 255 there, and the next label is 0."""

_NO_NAME = (
    r"""\s#|,\s*[\d#]|:\s*[\d#]|[:,]\s*$|//|[\[\]{}<>="`|\\;@]|(?i:^(?:id|names?|class(?:es)?|labels?)\s*:)"""
    r"|\b0x[0-9a-fA-F]{6}|(?:^|\s)\d+\s+\d+(?:\s|$)"
)


_KEYS = ("nc", "numclasses", "nclasses", "numlabels", "numberofclasses", "version", "total", "count")


class Coding(NamedTuple):
    """Which class (255: void) a mask's values, or its colours where `colours`, stand for."""

    classes: dict[int, int]
    colours: bool


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
    classes.sort(key=lambda e: e.value or 0)  # in the order of the lines where no class has a value
    names = tuple(e.name for e in classes)
    if classes[0].colour:
        coding = {_number(e.colour): VOID if e.void else classes.index(e) for e in (*classes, *void)}
        return names, tuple((r, g, b) for r, g, b in (e.colour for e in classes)), Coding(coding, True)
    values = [e.value % 256 for e in void if e.value is not None]  # -1 is 255 of 8 bits
    voids = dict.fromkeys(values or [VOID], VOID)
    free = iter(v for v in range(256) if v not in voids)
    coding = {(next(free) if e.value is None else e.value): k for k, e in enumerate(classes)}
    return names, (), Coding(coding | voids, False)


def binary_lines(background: str = "background", thing: str = "object") -> str:
    """The two lines of classes.txt that make masks of 0 and 255 work: as colours, so that 255 is not void."""
    return f"'{background} 0 0 0' and '{thing} 255 255 255'"


_NAMES_FILES = re.compile(
    r"(_|predefined_)?((class|label|category)(_?names|_?list|_?map|_?mapping|_?dict)?|classes|labels|categories|names)"
    r"\.(txt|json|ya?ml|names|csv)|(data|dataset)\.ya?ml|(id2label|label2id)\.json|obj\.names"
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
                if all(plain(e.name) == plain(values.get(e.value or 0, "")) for e in entries):
                    continue
                entries.sort(key=lambda e: e.value or 0)
            refuse_other_names(path, [e.name for e in entries], names, len(names))


def refuse_other_names(where: Any, found: Sequence[str], names: Sequence[str], least: int) -> None:
    """DataError where fewer than `least` of the names found are those of the classes, place by place."""
    alike = sum(plain(a) == plain(b) for a, b in zip(found, names, strict=False))
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
            if plain(name) != "void":
                raise DataError(
                    f"{where}: {name!r} would be a class; write 'void VALUE' or 'void R G B' for what is not trained "
                    "on, or rename it"
                )
            raise DataError(f"{where}: void needs its value ('void 255') or its colour ('void 0 0 0')")
        if entry.value is not None and not -1 <= entry.value <= 255:
            raise DataError(f"{where}: {entry.value} is no value of an 8-bit mask; void is 0..255")
        return
    if entry.value is not None and re.match(r"\d+[\s,;:]", name):
        raise DataError(f"{where}: {name!r} behind the value {entry.value} is no name; {SYNTAX}")
    if re.search(_NO_NAME, name) or (entry.colour and INT.fullmatch(name.split()[-1])):
        raise DataError(
            f"{where}: {name!r} is no name; {SYNTAX}, numbers apart by spaces, comments on lines of their own"
        )
    if entry.value is None and not entry.colour and re.match(r"0\s|\d+\s*[.:,;)]\s*\D", name):
        raise DataError(f"{where}: {name!r} starts like a numbered line; give every class 'NUMBER: name', or none")
    if (
        not name
        or unicodedata.category(name[0]) == "No"
        or not (name[0].isalnum() or name[0] in "_(")
        or name[-1] in "'("
    ):
        raise DataError(f"{where}: {name!r} is no name: names start with a letter or a digit; {SYNTAX}")
    if re.fullmatch(r"[\d\s.,:;+-]*", name):
        raise DataError(f"{where}: {name!r} is a number, no name; {SYNTAX}")
    if plain(name) in _KEYS:
        raise DataError(f"{where}: {name!r} looks like a key; delete the line, or rename the class")
    if first and entry.value != 0 and not entry.colour and is_heading(name):
        raise DataError(
            f"{where}: {name!r} looks like a heading; delete the line, or put # before it; if it is a class, write its "
            "value too, '0: NAME'"
        )
    if entry.value is not None and not 0 <= entry.value <= 254:
        raise DataError(f"{where}: {name!r} has the value {entry.value}; classes of 8-bit masks have 0 to 254, and 255 "
                        f"is void (for masks of 0 and 255 write {binary_lines(thing=name)})")  # fmt: skip


def _check_together(path: Path, classes: list[Entry], void: list[Entry]) -> None:
    if not classes:
        raise DataError(f"{path}: names no class; write one a line, 'name' or 'name R G B'")
    if len(classes) == 1:
        lines = binary_lines(thing=classes[0].name)
        raise DataError(f"{path}: names one class, expected two or more; what is around an object is a class, too (for "
                        f"masks of 0 and 255 write {lines})")  # fmt: skip
    _refuse_indices(path, classes)
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


def _refuse_indices(path: Path, classes: list[Entry]) -> None:
    """Names that count from 0 or 1 all through, "(0) road", "label 1 sky", are numbered in a form of their own; so are
    "a) road", "b) sky", and "I. road", "II. sky"."""
    letters = [m[1].casefold() for e in classes if (m := re.match(r"\(?([A-Za-z]{1,4})[.)]\s", e.name))]
    count = len(classes)
    if count <= 10 and letters in (list("abcdefghij")[:count], "i ii iii iv v vi vii viii ix x".split()[:count]):
        raise _index(path, classes[0])
    if all(e.value is None and not e.colour for e in classes):
        first = [(k, int(m[1])) for k, e in enumerate(classes) if (m := re.match(r"(\d{1,3})\s", e.name))]
        if len(first) > 1 and {n - k for k, n in first} in ({0}, {1}):  # "road", "1 sky", "2 tree"
            raise _index(path, classes[first[0][0]])
        last = [(e, m[1]) for e in classes if (m := re.search(r"\s(\d+)$", e.name))]
        if len(last) == 1 and last[0][1] in ("0", "255"):
            raise DataError(
                f"{path}, line {last[0][0].line}: {last[0][0].name!r} has a value, other classes have none; give all "
                "one, or write 'void VALUE' if it is void"
            )
    found = [m for e in classes if (m := re.search(r"(?<![^\W_])(?:0x)?(\d{1,4})(?![^\W_])", e.name))]
    if len(found) < len(classes) or any(e.value is not None or re.search(r"_\d+$", e.name) for e in classes):
        return
    numbers = [int(m[1]) for m in found]
    rest = {e.name[: m.start()] + e.name[m.end() :] for e, m in zip(classes, found, strict=True)}
    if len(rest) == len(classes) and numbers in (list(range(len(classes))), list(range(1, len(classes) + 1))):
        raise _index(path, classes[0])


def _index(path: Path, first: Entry) -> DataError:
    return DataError(
        f"{path}, line {first.line}: {first.name!r}, and so on, are names with an index; write 'NUMBER: name' if it is "
        "the value in the masks, or leave it out"
    )
