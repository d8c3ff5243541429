"""What a beginner is warned of before a run: too few images to score on, crops larger than the images."""

from collections.abc import Iterator

import numpy as np

from pwcrf_jax.data.prepare import Dataset, Source
from pwcrf_jax.data.sizes import EVEN_SIZE

FEW = 20
"""Images of a split, below which its mean IoU tells little."""
_LOOKED_AT = 500  # images, evenly over a split: sizes are read from headers


def of_split(dataset: Dataset, split: str) -> Iterator[str]:
    """A warning of a split to score on that is too small, of an own folder; none of other sets."""
    count = len(dataset.source(split))
    if dataset.name != "image_folder" or count >= FEW:
        return
    total = sum(n for name, n in dataset.splits.items() if name in ("train", "val"))
    share = min(0.3, -(-100 * FEW // max(total, 1)) / 100)
    yield (
        f"split {split!r} has {count} image{'s' * (count != 1)}, below {FEW}: its mean IoU is mostly chance; label "
        f"more images, or hold more out: data.image_folder.val_fraction={share:g} (--option val_fraction={share:g} of "
        "pwcrf check), or more of them in val where the folder has splits"
    )


def of_crops(dataset: Dataset, split: str, crop: tuple[int, int]) -> Iterator[str]:
    """A warning of crops (height, width) larger than most images of a split, of an own folder; none of other sets."""
    if dataset.name != "image_folder":
        return
    sizes = np.array(_sizes(dataset.source(split)))
    smaller = int((sizes < np.array(crop)).any(axis=1).sum())
    if 2 * smaller <= len(sizes):
        return
    height, width = np.median(sizes, axis=0).astype(int).tolist()
    fitting = tuple(max(EVEN_SIZE, min(side, most) // EVEN_SIZE * EVEN_SIZE)
                    for side, most in zip((height, width), crop, strict=True))  # fmt: skip
    yield (
        f"data.crop_size {tuple(crop)} is larger than {smaller} of {len(sizes)} images of split {split!r} (the median "
        f"is {height}x{width}, height x width): the rest of such crops is void, and costs time; set "
        f'--config.data.crop_size="{fitting}"'
    )


def _sizes(source: Source) -> list[tuple[int, int]]:
    step = -(-len(source) // _LOOKED_AT)
    return [source.image_size(i) for i in range(0, len(source), step)]
