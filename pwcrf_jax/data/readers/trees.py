"""Two trees of folders, one of images, one of masks, paired by their place and what their names have in common.

    img_dir/train/x.jpg                             ann_dir/train/x.png                      mmsegmentation
    leftImg8bit/train/CITY/x_leftImg8bit.png        gtFine/train/CITY/x_gtFine_labelIds.png  Cityscapes
    photos/a/x_rgb.jpg                              labels/a/x_mask.png                      one's own names

All images end alike, or have no ending, and so do all masks. Where there are several masks of an image, as in
Cityscapes, that is taken which goes with the classes: with colours `_color`, else `_labelTrainIds`, else `_labelIds`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pwcrf_jax.data.readers.files import FOREIGN_REMEDY, SUFFIXES, DataError, read_image_file
from pwcrf_jax.data.readers.folder_files import image_files, more, walk
from pwcrf_jax.data.readers.image_io import not_png

KNOWN = (("img_dir", "ann_dir"), ("leftImg8bit", "gtFine"), ("imgsFine/leftImg8bit", "gtFine"))
"""Folders of images and masks: of mmsegmentation, of Cityscapes, and of CVAT's export for Cityscapes."""
_MASK_WORDS = re.compile(r"mask|label|ann|gt|seg|truth|target", re.IGNORECASE)
_PREFERRED = {True: ("_color",), False: ("_labelTrainIds", "_labelIds")}  # by whether the classes have colours


def folders_in(root: Path) -> tuple[Path, Path] | None:
    """The folder of images and that of masks; None where there are no two that could be.

    Raises:
      DataError: one of two known folders is missing.
    """
    for of_images, of_masks in KNOWN:
        found = [os.path.isdir(root / name) for name in (of_images, of_masks)]
        if all(found):
            return root / of_images, root / of_masks
        if any(found) and (of_images, of_masks) == KNOWN[0]:
            there, missing = (of_images, of_masks) if found[0] else (of_masks, of_images)
            raise DataError(f"{root}: has {there} but no {missing}; put it beside, {of_images}/train/x.jpg goes "
                            f"with {of_masks}/train/x.png")  # fmt: skip
    with os.scandir(root) as entries:
        folders = [Path(e.path) for e in sorted(entries, key=lambda e: e.name) if e.is_dir() and e.name[0] != "."]
    if len(folders) > 10:
        return None
    holding = [f for f in folders if any(path.suffix.lower() in SUFFIXES for path in walk(f, skip=True))]
    drawn = [folder for folder in holding if _MASK_WORDS.search(folder.name)]
    if len(holding) != 2 or len(drawn) != 1:
        return None
    return next(folder for folder in holding if folder not in drawn), drawn[0]


def pair(
    images: Path, masks: Path, coloured: bool, *, every: bool = True
) -> tuple[dict[str, Path], dict[str, Path], str]:
    """Images and masks of two trees by id, and what names of masks end with.

    Args:
      coloured: whether the classes have colours.
      every: refuse masks without image.

    Raises:
      DataError: no mask goes with the images, several do and none is preferred, a mask is no PNG, or it has no image.
    """
    shown, foreign, _ = image_files(images)
    drawn, other_masks, _ = image_files(masks)
    for folder, found in ((images, shown), (masks, drawn)):
        if not found:
            raise DataError(f"{folder}: holds no image; {FOREIGN_REMEDY}")
    if foreign:
        raise DataError(f"{foreign[0]}: {FOREIGN_REMEDY}")
    for ending in _endings(list(shown)):
        bases = {key.removesuffix(ending): path for key, path in shown.items()}
        by_ending = _by_ending(bases, drawn)
        if by_ending:
            break
    else:
        raise DataError(
            f"{masks}: no mask is called like an image, {next(iter(drawn))!r} unlike {next(iter(shown))!r}; a mask "
            "lies at the same place below its folder, and its name begins like that of the image"
        )
    chosen = _chosen(by_ending, coloured, masks)
    found = {key: drawn[key + chosen] for key in by_ending[chosen]}
    for path in (*other_masks, *found.values()):
        if path.suffix.lower() != ".png":
            raise not_png(read_image_file(path), str(path))
    ended = [key for key in drawn if key.endswith(chosen) and key.removesuffix(chosen) not in bases]
    if every and ended and (chosen or len(by_ending) == 1):
        raise DataError(f"{drawn[ended[0]]}: has no image {images / ended[0].removesuffix(chosen)}{ending}.* "
                        f"({more(ended)}); add it, or remove the mask")  # fmt: skip
    return bases, found, chosen


def _endings(keys: Sequence[str]) -> list[str]:
    """What all names may end with beside what tells them apart: nothing, or all after a mark that they share."""
    common = os.path.commonprefix([key[::-1] for key in keys])[::-1]
    shortest = min(len(os.path.basename(key)) for key in keys)
    marks = [i for i, c in enumerate(common) if c in "_-." and len(common) - i < shortest]
    return ["", *(common[i:] for i in reversed(marks))]


def _by_ending(bases: Mapping[str, Path], masks: Mapping[str, Path]) -> dict[str, list[str]]:
    """Ending of masks -> the ids that have a mask with it."""
    found: dict[str, list[str]] = {}
    for key in masks:
        start = key.rfind("/") + 1
        for at in (*(i for i, c in enumerate(key) if i > start and c in "_-."), len(key)):
            if key[:at] in bases:
                found.setdefault(key[at:], []).append(key[:at])
    return found


def _chosen(by_ending: Mapping[str, Sequence[str]], coloured: bool, masks: Path) -> str:
    most = max(map(len, by_ending.values()))
    full = [ending for ending, keys in by_ending.items() if len(keys) == most]
    for preferred in _PREFERRED[coloured]:
        if fitting := [ending for ending in full if ending.casefold().endswith(preferred.casefold())]:
            return fitting[0]
    if len(full) > 1:
        raise DataError(
            f"{masks}: has several masks of an image, *{'.png, *'.join(sorted(full))}.png; leave those there that go "
            "with classes.txt, and move the others away"
        )
    return full[0]
