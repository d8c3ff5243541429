"""Sizes of crops and frames that fit a data set."""

from collections.abc import Mapping
from typing import Any

EVEN_SIZE = 40
"""Pixels: cells of 16 and of 8 cover multiples of it evenly at 1.2 times their size, the largest scale."""
LARGEST_CROP = 480
"""Pixels of a side: beyond, a training step takes long and sees no more of most things."""


def proposed(report: Mapping[str, Any]) -> dict[str, Any]:
    """Values of data.num_classes, data.crop_size and data.eval_size for a data set, by these names.

    Frames of evaluation hold the largest image. Crops lie within half of the training images at least, as the rest of a
    crop is void, and have `LARGEST_CROP` pixels a side at most.

    Args:
      report: of the label guard.
    """
    splits = report["splits"]
    training = [about for split, about in splits.items() if split.startswith("train")] or list(splits.values())
    usual = [min(about.get("usual", about["smallest"])[axis] for about in training) for axis in (0, 1)]
    largest = [max(about["largest"][axis] for about in splits.values()) for axis in (0, 1)]
    within = lambda side: max(min(side, LARGEST_CROP) // EVEN_SIZE * EVEN_SIZE, EVEN_SIZE)
    return {
        "num_classes": len(report["classes"]),
        "crop_size": tuple(map(within, usual)),
        "eval_size": tuple(-(-side // EVEN_SIZE) * EVEN_SIZE for side in largest),
    }
