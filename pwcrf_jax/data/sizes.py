"""Sizes of crops and frames that fit a data set."""

from collections.abc import Mapping
from typing import Any

EVEN_SIZE = 40
"""Pixels: cells of 16 and of 8 cover multiples of it evenly at 1.2 times their size, the largest scale."""
LARGEST_CROP = 480
"""Pixels of a side: beyond, a training step takes long and sees no more of most things."""


PASSES = 25
"""Times that training sees each image."""
FEWEST_STEPS = 100


def proposed(report: Mapping[str, Any], batch_size: int = 8) -> dict[str, Any]:
    """Values of data.num_classes, data.crop_size, data.eval_size and train.steps for a data set, by these names.

    Frames of evaluation hold the largest image. Crops lie within half of the training images at least, as the rest of a
    crop is void, and have `LARGEST_CROP` pixels a side at most.

    Args:
      report: of the label guard.
      batch_size: images a step.
    """
    splits = report["splits"]
    training = [about for split, about in splits.items() if split.startswith("train")] or list(splits.values())
    usual = [min(about.get("usual", about["smallest"])[axis] for about in training) for axis in (0, 1)]
    largest = [max(about["largest"][axis] for about in splits.values()) for axis in (0, 1)]
    within = lambda side: max(min(side, LARGEST_CROP) // EVEN_SIZE * EVEN_SIZE, EVEN_SIZE)
    return {
        "data.num_classes": len(report["classes"]),
        "data.crop_size": tuple(map(within, usual)),
        "data.eval_size": tuple(-(-side // EVEN_SIZE) * EVEN_SIZE for side in largest),
        "train.steps": max(round(PASSES * sum(about["images"] for about in training) / batch_size), FEWEST_STEPS),
    }
