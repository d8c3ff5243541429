"""Masks whose values, or colours, stand for classes as a classes.txt says."""

from pathlib import Path

import numpy as np

from pwcrf_jax.data.label_guard import bad_value
from pwcrf_jax.data.readers.classes import Coding
from pwcrf_jax.data.readers.files import MAX_PIXELS, DataError, read_image_file
from pwcrf_jax.data.readers.image_io import VOID, decode_colour_label, decode_label


def indices(num_classes: int) -> Coding:
    """The coding of masks of class indices, of which 255 is void; num_classes: 255 at most."""
    return Coding({k: k for k in range(num_classes)} | {VOID: VOID}, False)


def table_of(coding: Coding) -> np.ndarray:
    """The class, or -1, of each value or colour: int16 [256] or [2^24]."""
    table = np.full(1 << 24 if coding.colours else 256, -1, np.int16)
    table[list(coding.classes)] = list(coding.classes.values())
    return table


def read_mask(path: Path, coding: Coding, table: np.ndarray, max_pixels: float = MAX_PIXELS) -> np.ndarray:
    """The classes of a mask file, uint8 [H, W], 255 where it is void.

    table: of `table_of`.

    Raises:
      DataError: it cannot be read, or holds what is neither class nor void.
    """
    decode = decode_colour_label if coding.colours else decode_label
    return to_classes(decode(read_image_file(path, max_pixels), str(path), max_pixels), coding, table, str(path))


def to_classes(values: np.ndarray, coding: Coding, table: np.ndarray, where: str) -> np.ndarray:
    """The classes of a decoded mask, uint8 [H, W]; values: uint8 [H, W], or colours uint8 [H, W, 3].

    Raises:
      DataError: it holds what is neither class nor void.
    """
    if coding.colours:
        wide = values.astype(np.int32)
        label = table[wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]]
        if label.min() < 0:
            raise _bad_colour(where, values, label < 0)
        return label.astype(np.uint8)
    label = table[values]
    if label.min() < 0:
        stored = sorted(v for v, k in coding.classes.items() if k != VOID)
        void = ", ".join(str(v) for v, k in coding.classes.items() if k == VOID)
        first, last = stored[0], stored[-1]
        known = f"{first}..{last}" if last - first < len(stored) else ", ".join(map(str, stored))
        raise bad_value(
            where, values, table >= 0, f"neither a class ({known}) nor void ({void})",
            "correct the mask, or complete classes.txt (a line 'void VALUE' makes a value void)",
        )  # fmt: skip
    return label.astype(np.uint8)


def _bad_colour(where: str, colours: np.ndarray, bad: np.ndarray) -> DataError:
    y, x = np.argwhere(bad)[0]
    colour = tuple(colours[y, x].tolist())
    if len(set(colour)) == 1:
        remedy = "if its grey values are class numbers, take the colours out of classes.txt; "
    else:
        remedy = "if the mask was resized or smoothed, make it again with nearest neighbour; "
    return DataError(
        f"{where}: colour {colour} is not in classes.txt, first at row {y}, column {x}, in all {bad.sum()} pixels with "
        f"{len(np.unique(colours[bad], axis=0))} such colours; {remedy}else correct classes.txt (a line 'void R G B' "
        "makes a colour void)"
    )
