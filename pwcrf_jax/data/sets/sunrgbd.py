"""SUN RGB-D indoor scenes of four cameras, RGB only, 37 classes: 5285 train, 5050 test.

Download SUNRGBD.zip (several GB, "SUNRGBD V1") and SUNRGBDtoolbox.zip of https://rgbd.cs.princeton.edu ("Data and
Annotation"). `data.source_dir` is the folder with the two archives, or with what they unpack to:

    SUNRGBD/{kv1,kv2,realsense,xtion}/.../image/NAME.jpg
    SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat
    SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat
    SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat

The labels are those of the 37-class benchmark, `seglabel` in SUNRGBD2Dseg.mat, whose entries are in the order of
SUNRGBDMeta.mat: 1..37 become 0..36, and 0 (unlabelled) becomes 255. The files seg.mat beside the images number names of
their own and are not read. One label array is read at a time: MATLAB would need 64 GB for the file. An id is the
image's folder below SUNRGBD with `_` for `/`. The set contains NYU Depth v2 (kv1/NYUdata): a network trained on one
must not be scored on the other.
"""

from pathlib import Path, PurePosixPath

import numpy as np

from pwcrf_jax.data.builder import Pair, Plan, SegmentationBuilder
from pwcrf_jax.data.readers.archives import locate, open_mat73, read_mat
from pwcrf_jax.data.readers.files import DataError, present
from pwcrf_jax.data.readers.image_io import VOID
from pwcrf_jax.data.sets.siftflow import relabel

LISTS = {"train": "alltrain", "test": "alltest"}
"""Split -> variable of allsplit.mat."""


class SunRgbd(SegmentationBuilder):
    """SUN RGB-D in the layout of its two archives."""

    name = "pwcrf_sunrgbd"
    class_names = (
        "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
        "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor_mat", "clothes",
        "ceiling", "books", "fridge", "tv", "paper", "towel", "shower_curtain", "box", "whiteboard", "person",
        "night_stand", "toilet", "sink", "lamp", "bathtub", "bag",
    )  # fmt: skip
    split_sizes = {"train": 5285, "test": 5050}
    manual = "SUNRGBD.zip and SUNRGBDtoolbox.zip of https://rgbd.cs.princeton.edu"
    _entries: dict[str, int] | None = None  # of SUNRGBDMeta.mat

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """Splits train and test by the folders that allsplit.mat names.

        Raises:
          DataError: an archive, folder or file is missing, or a folder does not hold one image.
        """
        images, toolbox = (_unpacked(source, name, data_dir) for name in ("SUNRGBD", "SUNRGBDtoolbox"))
        splits = toolbox / "traintestSUNRGBD" / "allsplit.mat"
        meta, labels = (toolbox / "Metadata" / name for name in ("SUNRGBDMeta.mat", "SUNRGBD2Dseg.mat"))
        for path in (splits, meta, labels):
            if not present(path):
                raise DataError(f"{path}: is missing; restore it from SUNRGBDtoolbox.zip")
        pairs = {}
        for split, texts in zip(LISTS, read_mat(splits, *LISTS.values()), strict=True):
            names = [_folder(text, splits) for text in np.ravel(texts)]
            pairs[split] = [Pair(n.replace("/", "_"), _image(images / n, splits), labels, splits) for n in names]
        return cls.plan_from_pairs(source, pairs, meta.stat().st_size, meta.stat().st_mtime_ns)

    def _label(self, mask: Path, image: Path) -> np.ndarray:
        meta = mask.with_name("SUNRGBDMeta.mat")
        if self._entries is None:
            entries = np.ravel(read_mat(meta, "SUNRGBDMeta")[0])
            self._entries = {_folder(entry["sequenceName"], meta): i for i, entry in enumerate(entries)}
        folder = image.parent.parent
        entry = self._entries.get(_folder(folder.as_posix(), meta))
        if entry is None:
            raise DataError(f"{meta}: has no entry for {folder}; restore it from SUNRGBDtoolbox.zip")
        with open_mat73(mask, "SUNRGBD2Dseg") as (content,):
            references = content["seglabel"]
            if entry >= len(references):
                raise DataError(
                    f"{mask}: holds {len(references)} label arrays, but {folder} is entry {entry + 1} of {meta}; "
                    "restore both from SUNRGBDtoolbox.zip"
                )
            values = content[references[entry, 0]][()].T
        return relabel(values, [VOID, *range(len(self.class_names))], f"{mask}, labels of {folder}")


def _unpacked(root: Path, name: str, data_dir: str) -> Path:
    # Some programs unpack into one more folder of the archive's name.
    folder = locate(root, [f"{name}/{name}", name], [f"{name}.zip"], data_dir)
    if folder is None:
        raise DataError(
            f"{root}: no folder {name} and no {name}.zip found; check data.source_dir, or download {SunRgbd.manual}"
        )
    return folder


def _folder(path: str, where: Path) -> str:
    """A folder below SUNRGBD; the files name it with somebody else's path before it and sometimes a slash after it."""
    parts = PurePosixPath(path).parts
    if "SUNRGBD" not in parts[:-1]:
        raise DataError(f"{where}: {path!r} is no folder below SUNRGBD; restore the file from SUNRGBDtoolbox.zip")
    last = max(i for i, part in enumerate(parts) if part == "SUNRGBD")
    return "/".join(parts[last + 1 :])


def _image(folder: Path, listed_in: Path) -> Path:
    found = sorted((folder / "image").glob("[!.]*.jpg"))
    if len(found) != 1:
        raise DataError(
            f"{folder / 'image'}: holds {len(found)} images instead of one, but {listed_in} names the folder; "
            "restore it from SUNRGBD.zip"
        )
    return found[0]
