"""The label guard: looks at every example of a data set, refuses what must be wrong and warns of what may be.

It sees a data set once, while it is prepared, and keeps `label_report.json` in the prepared folder, which `pwcrf check`
prints.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pwcrf_jax.data.readers.classes import binary_lines
from pwcrf_jax.data.readers.image_io import VOID, DataError, orientation, value_counts
from pwcrf_jax.data.sizes import proposed
from pwcrf_jax.runtime import files

REPORT = "label_report.json"
INTERPOLATED = 0.35
"""Share of blurred borders from which a mask counts as interpolated. Masks of CamVid and VOC have up to 0.03, the same
resized or turned with bilinear or bicubic weights 0.36 to 1, noise 0.23."""
SPREAD = 0.05
"""Share of borders that values other than the two most frequent ones must blur. Outlines, kerbs and poles are thin too
and lie between others, but are drawn in few classes; interpolation makes all values between two. With four classes and
fewer one cannot tell."""
SMALLER = 0.25
"""Share of the images that may be less high, or less wide, than "usual" of a report."""


class LabelGuard:
    """Collects what there is to say about a data set from its examples.

    Args:
      class_names: one a class.
      unlabelled: splits whose masks mean nothing; only their images are looked at.

    Attributes:
      notes: warnings from elsewhere, to be reported with the guard's own.
    """

    def __init__(self, class_names: Sequence[str], unlabelled: Sequence[str] = ()):
        self.notes: list[str] = []
        self._names, self._unlabelled = tuple(class_names), tuple(unlabelled)
        self._splits: dict[str, _Split] = defaultdict(_Split)
        self._places: dict[int, list[tuple[str, str]]] = defaultdict(list)  # of each content, by a hash of 64 bits

    def add(self, split: str, key: str, image: bytes, pixels: np.ndarray, label: np.ndarray) -> None:
        """Takes an example in.

        Args:
          key: its id.
          image: encoded, as it is stored.
          pixels: the same decoded, uint8 [H, W, 3].
          label: classes 0..K-1 and 255 for void, uint8 [H, W].

        Raises:
          DataError: a label of another value, type or size.
        """
        if label.shape != pixels.shape[:2] or label.dtype != np.uint8:
            raise DataError(
                f"{key!r} of split {split!r}: its mask is {label.dtype} {label.shape}, its image {pixels.shape[:2]} "
                "(height, width); they need the same size, and classes as uint8"
            )
        seen = self._splits[split]
        seen.sizes.append(label.shape)
        self._places[hash((label.shape, pixels.tobytes()))].append((split, key))
        if split in self._unlabelled:
            return
        # Sizes that differ tell which way a mask was meant, see `storable_image`.
        turn = orientation(image, key)
        if turn > 1 and not (turn >= 5 and label.shape[0] != label.shape[1]):
            seen.turned.append(key)
        counts = value_counts(label)
        if counts[len(self._names) : VOID].any():
            value = len(self._names) + np.flatnonzero(counts[len(self._names) : VOID])[0]
            raise DataError(
                f"{key!r} of split {split!r}: label {value} is no class (0..{len(self._names) - 1}) or void"
            )
        seen.pixels += counts
        seen.images += counts > 0
        if counts[VOID] == label.size:
            seen.all_void.append(key)
        blurred, spread, borders = _blur(label)
        if blurred >= 10 and blurred > INTERPOLATED * borders and spread > SPREAD * borders:
            seen.interpolated.append(key)

    def close(self, split: str) -> None:
        """Says that a split is complete. DataError if it is one for training and void all over."""
        seen = self._splits[split]
        if _trains(split) and split not in self._unlabelled and seen.pixels.sum() == seen.pixels[VOID]:
            raise DataError(
                f"split {split!r}: all {len(seen.sizes)} masks are void all over, there is nothing to learn; check "
                f"what the masks hold and which value means void ({_some(seen.all_void)})"
            )

    def report(self) -> dict[str, Any]:
        """All of it, as JSON values: classes, per split what was counted, and the warnings."""
        splits = {}
        for split, seen in self._splits.items():
            sizes = np.array(seen.sizes)
            splits[split] = about = {
                "images": len(sizes),
                "smallest": sizes.min(0).tolist(),  # height and width, each for itself
                "largest": sizes.max(0).tolist(),
                "usual": np.quantile(sizes, SMALLER, axis=0, method="lower").tolist(),
                "labelled": split not in self._unlabelled,
            }
            if about["labelled"]:
                about["void"] = float(seen.pixels[VOID] / seen.pixels.sum())
                about["pixels"] = seen.pixels[: len(self._names)].tolist()
                about["images_with"] = seen.images[: len(self._names)].tolist()
        return {"classes": list(self._names), "splits": splits, "warnings": [*self._warnings(), *self.notes]}

    def _warnings(self) -> Iterable[str]:
        labelled = {split: seen for split, seen in self._splits.items() if split not in self._unlabelled}
        for split, seen in labelled.items():
            void = seen.pixels[VOID] / seen.pixels.sum()
            if void > 0.5:
                yield f"split {split!r}: {void:.0%} of all pixels are void"
            if seen.all_void:
                yield f"split {split!r}: {_counted(seen.all_void, 'mask')} void all over: {_some(seen.all_void)}"
            if seen.interpolated:
                yield (
                    f"split {split!r}: {_counted(seen.interpolated, 'mask')} blurred, with values in between along the "
                    "borders, as if resized or turned with interpolation; make them again with nearest neighbour: "
                    f"{_some(seen.interpolated)}"
                )
            if seen.turned:
                yield (
                    f"split {split!r}: {_counted(seen.turned, 'image')} marked by EXIF as turned or mirrored and taken "
                    f"as stored; check that the masks match: {_some(seen.turned)}"
                )
        yield from self._class_warnings(labelled)
        yield from self._duplicates()

    def _class_warnings(self, labelled: dict[str, "_Split"]) -> Iterable[str]:
        occurs = {split: seen.pixels[: len(self._names)] > 0 for split, seen in labelled.items()}
        anywhere = np.any(list(occurs.values()), axis=0) if occurs else np.ones(1, bool)
        if not anywhere[0] and anywhere.any():
            yield (
                f"class 0 ({self._names[0]}) occurs nowhere: do the masks count from 1, so that all classes are off by "
                "one?"
            )
        training = [found for split, found in occurs.items() if _trains(split)]
        if not training:
            return
        trained = np.any(training, axis=0)
        if trained.sum() == 1 and len(self._names) > 1:
            yield (
                f"the only class in training masks is {self._names[trained.argmax()]}; if they are masks of 0 and 255, "
                "write the object as 1: 255 is void; or use image_folder with two lines in classes.txt, "
                f"{binary_lines()}"
            )
        if not trained.all():
            yield f"never in training masks: {_some([n for n, t in zip(self._names, trained, strict=True) if not t])}"
        for split, found in occurs.items():
            untrained = [name for name, there in zip(self._names, found & ~trained, strict=True) if there]
            if untrained and not split.startswith("train"):
                yield f"split {split!r} holds classes that training never sees: {_some(untrained)}"

    def _duplicates(self) -> Iterable[str]:
        pairs: dict[tuple[str, str], list[str]] = defaultdict(list)
        for places in self._places.values():
            firsts: dict[str, str] = {}
            for split, key in places:
                for other, other_key in firsts.items():
                    if _apart(split, other):
                        pairs[other, split].append(f"{other_key} = {key}")
                firsts.setdefault(split, key)
        for (first, second), same in pairs.items():
            if first == second:
                yield f"split {first!r}: {_counted(same, 'pair')} the same image under two names: {_some(same)}"
            else:
                yield f"{_counted(same, 'image')} in both {first!r} and {second!r}: {_some(same)}"


class _Split:
    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []
        self.pixels = np.zeros(256, np.int64)
        self.images = np.zeros(256, np.int64)
        self.all_void: list[str] = []
        self.interpolated: list[str] = []
        self.turned: list[str] = []


def _trains(split: str) -> bool:
    return split.startswith("train") and split != "trainval"


def _apart(one: str, other: str) -> bool:
    """Whether no image should be in both splits, or in one of them twice."""
    if "trainval" in (one, other):  # the union of train and val
        return one == other or not all(split.startswith(("train", "val")) for split in (one, other))
    return one == other or _trains(one) != _trains(other)


def _counted(what: Sequence[str], noun: str) -> str:
    return f"{len(what)} {noun}{' is' if len(what) == 1 else 's are'}"


def _some(what: Sequence[str], most: int = 5) -> str:
    more = f" and {len(what) - most} more" if len(what) > most else ""
    return ", ".join(what[:most]) + more


def _blur(label: np.ndarray) -> tuple[int, int, int]:
    """Thin lines (1 or 2 pixels) along rows and columns whose value lies between those on both sides; those of them
    that are not of the two most frequent values; and all borders.

    Interpolation turns a step from 3 to 9 into 3, 6, 9; drawn borders are steps. A step of 1 tells nothing.
    """
    values, borders = np.zeros(256, np.int64), 0
    for lines in (label, np.ascontiguousarray(label.T)):
        if lines.shape[1] < 3:
            continue
        at = np.flatnonzero(lines[:, 1:] != lines[:, :-1])
        y, x = np.divmod(at, lines.shape[1] - 1)
        step = lines[y, x + 1].astype(np.int16) - lines[y, x]
        thin = (at[1:] - at[:-1] <= 2) & (y[1:] == y[:-1])
        between = thin & ((step[1:] > 0) == (step[:-1] > 0))
        single = np.abs(step) > 1
        single[1:] &= ~between
        single[:-1] &= ~between
        first = np.flatnonzero(between)
        values += np.bincount(lines[y[first], x[first] + 1], minlength=256)
        borders += int(thin.sum()) + int(single.sum())
    return int(values.sum()), int(np.sort(values)[:-2].sum()), borders


def bad_value(where: Any, label: np.ndarray, known: np.ndarray, meaning: str, remedy: str) -> DataError:
    """The error for a mask that holds a value it must not, with what the pattern of such pixels suggests.

    Args:
      label: uint8 [H, W].
      known: bool [256], values that it may hold.
      meaning: what the mask may hold, in words: "neither a class (0..10) nor void (11)".
      remedy: what to do where nothing is suggested.
    """
    bad = ~known[label]
    values = np.unique(label[bad])
    wide = np.pad(label.astype(np.int16), 1, mode="edge")
    between = np.zeros(label.shape, bool)
    for a, b in ((wide[1:-1, :-2], wide[1:-1, 2:]), (wide[:-2, 1:-1], wide[2:, 1:-1])):
        between |= (np.minimum(a, b) < label) & (label < np.maximum(a, b))
    if between[bad].mean() > 0.5 and len(values) > 1:  # one may be a thin thing that was drawn
        remedy = "such pixels lie between other labels: was the mask resized or turned with interpolation? " \
                 "Do it with nearest neighbour"  # fmt: skip
    elif len(values) == 1 and values[0] and known[values[0] - 1]:
        remedy = f"off by one? Classes count from 0; {remedy}"
    y, x = np.argwhere(bad)[0]
    return DataError(
        f"{where}: label value {values[0]} is {meaning}, first at row {y}, column {x}, in all {bad.sum()} pixels with "
        f"{_some([str(v) for v in values])}; {remedy}"
    )


def write_report(report: dict[str, Any], folder: str) -> None:
    """Keeps a report in a prepared folder, whole or not at all."""
    files.write_json(Path(folder, REPORT), report)


def format_report(report: dict[str, Any]) -> str:
    """A report as lines of text."""
    lines = []
    labelled = {}
    for split, about in report["splits"].items():
        (low, left), (high, right) = about["smallest"], about["largest"]
        void = f"{about['void']:.1%} void" if about["labelled"] else "no labels"
        lines.append(f"{split}: {about['images']} images, {low}-{high} high, {left}-{right} wide, {void}")
        if about["labelled"]:
            labelled[split] = about
    width = max(map(len, report["classes"]))
    lines.append(" " * (width + 4) + "".join(f"{split + ': pixels, images':>28}" for split in labelled))
    for k, name in enumerate(report["classes"]):
        cells = (f"{about['pixels'][k] / (sum(about['pixels']) or 1):18.2%}{about['images_with'][k]:10}"
                 for about in labelled.values())  # fmt: skip
        lines.append(f"{k:3} {name:{width}}" + "".join(cells))
    lines += [f"warning: {warning}" for warning in report["warnings"]] or ["no warnings"]
    values = {key: str(value).replace(" ", "") for key, value in proposed(report).items()}
    quoted = {key: f'"{value}"' if "(" in value else value for key, value in values.items()}
    lines.append("to train: " + " ".join(f"--config.{key}={value}" for key, value in quoted.items()))
    return "\n".join(lines)
