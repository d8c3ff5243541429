"""Sizes of crops and frames that fit a data set."""

from collections.abc import Mapping
from typing import Any

EVEN_SIZE = 40
"""Pixels: cells of 16 and of 8 cover multiples of it evenly at 1.2 times their size, the largest scale."""
LARGEST_CROP = 480
"""Pixels of a side: beyond, a training step takes long and sees no more of most things."""


def proposed(report: Mapping[str, Any]) -> dict[str, Any]:
    """Values of data.num_classes, data.crop_size and data.eval_size for a data set, by these names.

    Frames of evaluation hold the largest image. Crops hold most training images, up to `LARGEST_CROP`.

    Args:
      report: of the label guard.
    """
    splits = report["splits"]
    training = [about for split, about in splits.items() if split.startswith("train")] or list(splits.values())
    side = lambda name, among, axis: max(about.get(name, about["largest"])[axis] for about in among)
    even = lambda pixels: -(-pixels // EVEN_SIZE) * EVEN_SIZE
    return {
        "num_classes": len(report["classes"]),
        "crop_size": tuple(min(even(side("most", training, axis)), LARGEST_CROP) for axis in (0, 1)),
        "eval_size": tuple(even(side("largest", splits.values(), axis)) for axis in (0, 1)),
    }
