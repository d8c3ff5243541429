"""Parts of splits: "train[:90%]" of the stored order, "train[20%:40% by id]" of the order of ids, and sums of these."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pwcrf_jax.data.readers.files import DataError

FORMS = "'train', 'train[:90%]', 'train[10:20]', 'train[20%:40% by id]', or a sum of these with +"
_BY_ID = re.compile(r"\s*([\w-]+)\s*\[([^:\[\]]*):([^:\[\]]*?)\s+by\s+id\s*\]\s*")
_BOUND = re.compile(r"(-?)(\d+(?:\.\d+)?)(%?)")


class Part(NamedTuple):
    """Records that a specification of TFDS selects: all of them, or those at `places`, in that order."""

    spec: str
    places: tuple[int, ...] | None = None


class Joined:
    """The records of several sources as one, all of each or those at some places."""

    def __init__(self, sources: Sequence[tuple[Any, Sequence[int] | None]]):
        self._at = [(s, i) for s, places in sources for i in (range(len(s)) if places is None else places)]

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: int) -> Any:
        records, place = self._at[index]
        return records[place]


def names(split: str) -> list[str]:
    """The splits that a split, or a sum of parts, is made of."""
    return [part.split("[")[0].strip() for part in split.split("+")]


def read(split: str, infos: Mapping[str, Any], order_of: Callable[[str], Sequence[int]]) -> tuple[Part, ...]:
    """What to read of a split, or of a sum of parts.

    Args:
      infos: TFDS' splits by name, of which all `names` are some.
      order_of: the places of a split's records in the order of their ids, see `in_order`.

    Raises:
      DataError: a part that means nothing, parts that overlap, or no record at all.
    """
    parts, taken = [], []
    for text in (part.strip() for part in split.split("+")):
        found = _BY_ID.fullmatch(text)
        try:
            name, first, end = _by_id(infos, *found.groups()) if found else _stored(infos, text)
        except Exception as e:  # TFDS: ValueError, AssertionError, KeyError, by the kind of mistake
            why = " ".join(str(e).split())
            raise DataError(f"split {split!r} cannot be read ({why}); write it like {FORMS}") from e
        parts.append(Part(name, tuple(order_of(name)[first:end])) if found else Part(text))
        taken.append((name, bool(found), first, end))
    if not any(first < end for *_, first, end in taken):
        raise DataError(f"split {split!r} selects no records; widen the slice")
    _refuse_overlap(split, taken)
    return tuple(parts)


def in_order(ids: Sequence[str]) -> list[int]:
    """Places of ids in their order, digits taken as numbers: frame9 comes before frame10."""
    keys = [[int(x) if i % 2 else x for i, x in enumerate(re.split(r"(\d+)", key))] for key in ids]
    return sorted(range(len(ids)), key=lambda place: (keys[place], ids[place]))


def _stored(infos: Mapping[str, Any], part: str) -> tuple[str, int, int]:
    """(name, first, end) of a part as TFDS reads it."""
    import tensorflow_datasets as tfds

    (at,) = tfds.core.ReadInstruction.from_spec(part).to_absolute(infos)
    return at.splitname, at.from_ or 0, infos[at.splitname].num_examples if at.to is None else at.to


def _by_id(infos: Mapping[str, Any], name: str, start: str, stop: str) -> tuple[str, int, int]:
    """(name, first, end) of a slice by id."""
    count = infos[name].num_examples
    return name, _place(start, count, 0), _place(stop, count, count)


def _place(text: str, count: int, default: int) -> int:
    """A bound of a slice of so many records; shares are rounded to the nearest, as TFDS does."""
    if not text.strip():
        return default
    found = _BOUND.fullmatch(text.strip())
    number = float(found[2]) if found else -1.0
    share = bool(found and found[3])
    if not found or (number > 100 if share else number % 1):
        raise ValueError(f"{text.strip()!r} is neither a number of records nor a share, such as 20%")
    place = min(round(number * count / 100) if share else int(number), count)
    return count - place if found[1] else place


def _refuse_overlap(split: str, taken: Sequence[tuple[str, bool, int, int]]) -> None:
    """DataError where records would count twice. taken: name, whether by id, first, end of each part."""
    for name in {name for name, *_ in taken}:
        mine = sorted((first, end) for other, _, first, end in taken if other == name and first < end)
        if len({kind for other, kind, first, end in taken if other == name and first < end}) > 1:
            raise DataError(
                f"split {split!r} takes some of {name!r} by id and some not, so that records may count twice; write "
                "'by id' in all of its parts, or in none"
            )
        for (_, end), (first, _) in zip(mine, mine[1:], strict=False):
            if first < end:
                raise DataError(
                    f"split {split!r} takes records {first} to {end - 1} of {name!r} twice; let its parts end where "
                    "others begin"
                )
