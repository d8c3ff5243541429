"""Kinds of values that keys of a config take, so that a wrong value is refused by name before any compute."""

import abc
import difflib
from collections.abc import Iterable
from typing import Any

from pwcrf_jax import user_functions
from pwcrf_jax.runtime import buckets, files

_LARGEST: dict[type, int | float] = {int: 2**31 - 1, float: 3.4e38}  # what int32 and float32 hold


class Kind(abc.ABC):
    """A set of values. wanted: the values in words, as in "must be WANTED"."""

    wanted: str

    @abc.abstractmethod
    def accepts(self, x: Any) -> bool:
        """Whether x is one of the values."""

    def refusal(self, key: str, x: Any) -> str:
        """A sentence on a value that is not accepted."""
        return f"config.{key} = {x!r} must be {self.wanted}"


class Number(Kind):
    """An int, or a float (ints pass for floats), low <= x <= high; `above` and `below` are exclusive; odd: of ints.

    besides: a number outside of it that has a meaning of its own.
    """

    def __init__(
        self,
        kind: type[int] | type[float],
        low: float | None = None,
        high: float | None = None,
        *,
        above: float | None = None,
        below: float | None = None,
        odd: bool = False,
        besides: float | None = None,
    ):
        largest = _LARGEST[kind]
        self.kind, self.above, self.below, self.odd, self.besides = kind, above, below, odd, besides
        self.low, self.high = -largest if low is None else low, largest if high is None else high
        if kind is int:
            other = f", or {besides}" if besides is not None else ""
            self.wanted = f"an {'odd ' if odd else ''}integer from {self.low} to {self.high}{other}"
            return
        bounds = {"above": above, "at least": low, "below": below, "at most": high}
        named = " and ".join(f"{name} {bound}" for name, bound in bounds.items() if bound is not None)
        self.wanted = f"a finite number {named}".strip() + (f", or {besides}" if besides is not None else "")

    def accepts(self, x: Any) -> bool:
        if isinstance(x, bool) or not isinstance(x, (int, self.kind)):
            return False
        if not self.low <= x <= self.high:  # nor NaN
            return self.besides is not None and x == self.besides
        inside = (self.above is None or x > self.above) and (self.below is None or x < self.below)
        return inside and not (self.odd and x % 2 == 0)


class Text(Kind):
    """Text without NUL."""

    def __init__(self, empty: bool = True):
        self.empty, self.wanted = empty, "text" if empty else "text, not empty"

    def accepts(self, x: Any) -> bool:
        return isinstance(x, str) and "\0" not in x and (self.empty or bool(x))


class Path(Text):
    """The path of a local file or folder, or one that may lie in a bucket; "" where none is meant."""

    def __init__(self, in_bucket: bool = True) -> None:
        super().__init__()
        self.in_bucket, others = in_bucket, ", or gs://BUCKET/NAME" * in_bucket
        self.wanted = f"the path of a local file or folder, in a home that is known{others}"

    def accepts(self, x: Any) -> bool:
        if isinstance(x, str) and files.is_url(x):  # whether it can be read is asked where it is
            return self.in_bucket and buckets.is_well_formed(x.rstrip("/"))
        try:
            return super().accepts(x) and files.expand_path(x, "") is not None
        except files.FileError:
            return False


class Function(Kind):
    """The name of a Python function; "" where none is meant. Whether it is there is asked where it is loaded."""

    wanted = 'text of the form "module:function", or ""'

    def accepts(self, x: Any) -> bool:
        return isinstance(x, str) and (not x or user_functions.is_name(x))


class Choice(Kind):
    """One of some names, or of some whole numbers."""

    def __init__(self, known: Iterable[str | int]):
        self.known = tuple(known)
        self.wanted = f"one of {', '.join(map(repr, self.known))}"

    def accepts(self, x: Any) -> bool:
        return isinstance(x, str | int) and not isinstance(x, bool) and x in self.known

    def refusal(self, key: str, x: Any) -> str:
        names = [name for name in self.known if isinstance(name, str)]
        nearest = difflib.get_close_matches(str(x), names, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return f"config.{key} = {x!r} is not {self.wanted}{hint}"


class ChoiceOrOwn(Choice):
    """One of some names, or "package.module:factory"."""

    def __init__(self, known: Iterable[str]):
        super().__init__(known)
        self.wanted = f"{self.wanted}, or your own as 'package.module:factory'"

    def accepts(self, x: Any) -> bool:
        return super().accepts(x) or (isinstance(x, str) and user_functions.is_name(x))


class Flag(Kind):
    """True or False."""

    wanted = "True or False"

    def accepts(self, x: Any) -> bool:
        return isinstance(x, bool)


class Tuple(Kind):
    """A tuple whose elements are all of one kind.

    length: the number of elements, or the numbers that it may be; None: any. rising: of two, in order or equal.
    """

    def __init__(
        self,
        element: Kind,
        length: int | tuple[int, ...] | None = None,
        *,
        empty: bool = True,
        rising: bool = False,
    ):
        self.element, self.empty, self.rising = element, empty, rising
        self.lengths = (length,) if isinstance(length, int) else length
        size = " of one value or more" if not empty else ""
        if self.lengths:
            size = f" of {' or '.join(map(str, self.lengths))} values"
        self.wanted = f"a tuple{size}, each {element.wanted}{', the lower one first' if rising else ''}"

    def accepts(self, x: Any) -> bool:
        return (
            isinstance(x, (tuple, list))
            and (self.lengths is None or len(x) in self.lengths)
            and (self.empty or len(x) > 0)
            and all(map(self.element.accepts, x))
            and not (self.rising and x[0] > x[1])
        )


class Pair(Kind):
    """A pair of values, each of a kind of its own."""

    def __init__(self, first: Kind, second: Kind):
        self.kinds, self.wanted = (first, second), f"a pair of {first.wanted} and {second.wanted}"

    def accepts(self, x: Any) -> bool:
        two = isinstance(x, (tuple, list)) and len(x) == 2
        return two and self.kinds[0].accepts(x[0]) and self.kinds[1].accepts(x[1])
