"""Any segmentation set of the TFDS catalogue, https://www.tensorflow.org/datasets/catalog/overview; say which one, and
where its records hold images and labels, in config.data.tfds. Its defaults are those of Oxford-IIIT Pet.

A set that TFDS prepared in its format array_record is looked for in `source_dir` (the folder of the version itself, or
one that holds NAME/VERSION or NAME/CONFIG/VERSION) and in `data_dir`; reading it takes no TensorFlow. Where there is
none, TFDS' own builder is asked to prepare it in `data_dir`, with `source_dir` as the folder of files downloaded by
hand (for Pet images.tar.gz and annotations.tar.gz, https://www.robots.ox.ac.uk/~vgg/data/pets). Most builders unpack
and decode with TensorFlow, Pet's too: then the error says what to run, once, on any machine that has it.

Splits and their sizes are the set's own (Pet: train 3680, test 3669). A class is the stored value plus `label_offset`;
`void` is the sum that means void. Pet's masks hold 1 pet, 2 background and 3 "not classified", a border between them.
"""

import contextlib
import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from pwcrf_jax.data.builder import Plan, SegmentationBuilder, check_options, fingerprint, require_source_dir
from pwcrf_jax.data.label_guard import bad_value
from pwcrf_jax.data.prepare import _locked, _quiet
from pwcrf_jax.data.readers.disk import refusal, unwritable
from pwcrf_jax.data.readers.files import present
from pwcrf_jax.data.readers.image_io import VOID, DataError, decode_label, encode_png, open_image, storable_image


class _Options(NamedTuple):
    dataset: str = ""
    image_key: str = "image"
    label_key: str = "label"
    label_offset: int = 0
    void: int = VOID
    class_names: tuple[str, ...] = ()
    num_classes: int = 0
    max_side: int = 0


class TfdsSet(SegmentationBuilder):
    """A set that TFDS prepared, read without TensorFlow."""

    name = "pwcrf_tfds"
    VERSION = tfds.core.Version("1.0.0")

    @classmethod
    def plan(cls, source_dir: str, *, data_dir: str = "", **options: Any) -> Plan:
        """The splits of the prepared set; prepares it where it is not.

        Options:
          dataset: TFDS' name of it, as "name", "name/config" or "name/config:1.0.0"; without a version the newest that
            is prepared.
          image_key, label_key: features of its records that hold the images.
          label_offset: added to stored labels.
          void: what means void, after the offset.
          class_names: (): those of the label's feature, or class_0, class_1, ... where it has none.
          num_classes: 0: as many as there are names.
          max_side: images of a larger height or width are shrunk to it, with their masks; 0: none is.

        Raises:
          DataError: a wrong option, or a set that is not there and cannot be prepared, or is not in array_record.
        """
        o = _Options(**check_options("tfds", options, _Options._field_defaults))
        if o.max_side < 0 or o.num_classes < 0:
            raise DataError(f"data.tfds: max_side {o.max_side} and num_classes {o.num_classes} must be 0 or more")
        match = re.fullmatch(r"(\w+)(?:/([\w.+-]+?))?(?::(\d+\.\d+\.\d+))?", o.dataset)
        if not match:
            raise DataError(
                f"data.tfds.dataset: {o.dataset!r} is not the name of a TFDS data set, such as 'oxford_iiit_pet', "
                "'name/config' or 'name/config:1.0.0'"
            )
        source = require_source_dir("tfds", source_dir) if source_dir else None
        roots = [root for root in (source, Path(data_dir)) if root]
        find = lambda: next(filter(None, (_prepared(root, *match.groups()) for root in roots)), None)
        folder = find()
        if not folder:
            with _locked(Path(data_dir) / cls.name):  # the second process finds what the first prepared
                folder = find() or _prepare(o.dataset, source, data_dir)
        try:
            with _quiet():
                builder = tfds.builder_from_directory(folder)
                images, stored_as = _images(builder), builder.info.file_format.value
                sizes = {name: split.num_examples for name, split in builder.info.splits.items() if split.num_examples}
        except Exception as e:  # TFDS: DatasetInfoFileError, KeyError, ValueError, by what is damaged
            raise DataError(
                f"{folder}: is not a data set that TFDS prepared ({_first_line(e)}); prepare it again"
            ) from e
        if builder.name != match[1]:
            raise DataError(
                f"{folder}: holds {builder.name!r}, not data.tfds.dataset {o.dataset!r}; correct one of them"
            )
        if stored_as != "array_record":
            raise DataError(
                f"{folder}: is stored as {stored_as}, which only TensorFlow reads; prepare it as array_record in "
                f"another folder and set data.source_dir to it: {_command(o.dataset, None, 'FOLDER')}"
            )
        for option in ("image_key", "label_key"):
            if (key := getattr(o, option)) not in images:
                raise DataError(
                    f"data.tfds.{option}: {o.dataset!r} has no feature {key!r} that is an image; it has "
                    f"{', '.join(images) or 'none'}"
                )
        if not sizes:
            raise DataError(f"{folder}: has no split with records; prepare it again")
        names = _class_names(o, images[o.label_key])
        state = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir())]
        key = fingerprint(str(cls.VERSION), str(folder), state, *o[1:])
        _table(o, len(names))  # before any record is read
        splits = {split: _Records(folder, split, size, o) for split, size in sizes.items()}
        return Plan(splits, key, class_names=names, coding=o)

    def _example(self, item: "_Stored") -> tuple[str, bytes, np.ndarray]:
        o, where, most = self._plan.coding, item.where, self.max_pixels
        stored = decode_label(item.mask, f"{where}, {o.label_key}", most)
        image_where = f"{where}, {o.image_key}"
        image = storable_image(item.image, image_where, stored.shape, trusted=True, max_pixels=most)
        picture = open_image(image, image_where, most)
        if stored.shape != (picture.height, picture.width):
            raise DataError(
                f"{where}: {o.label_key} is {stored.shape[1]}x{stored.shape[0]} pixels but {o.image_key} is "
                f"{picture.width}x{picture.height}; data.tfds.image_key and label_key need one size"
            )
        num_classes = len(self.class_names)
        table = _table(o, num_classes)
        label = table[stored]
        if (label < 0).any():
            meaning = (
                f"with data.tfds.label_offset {o.label_offset:+} neither a class (0..{num_classes - 1}) nor void "
                f"({o.void})"
            )
            remedy = "correct data.tfds.label_offset, void or num_classes"
            raise bad_value(f"{where}, {o.label_key}", stored, table >= 0, meaning, remedy)
        label = label.astype(np.uint8)
        if o.max_side and max(picture.size) > o.max_side:
            size = tuple(max(1, round(n * o.max_side / max(picture.size))) for n in picture.size)
            image = encode_png(np.asarray(picture.resize(size, Image.Resampling.BILINEAR)))
            label = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
        return item.id, image, label


class _Stored(NamedTuple):
    """A record as TFDS has it; `where` is what messages call it."""

    id: str
    where: str
    image: bytes
    mask: bytes


class _Records(Sequence):
    """The records of a split, opened at the first one."""

    def __init__(self, folder: Path, split: str, size: int, options: _Options):
        self._folder, self._split, self._size, self._options = folder, split, size, options

    def __len__(self) -> int:
        return self._size

    @functools.cached_property
    def _source(self) -> Any:
        builder = tfds.builder_from_directory(self._folder)
        decoders = {key: tfds.decode.SkipDecoding() for key in _images(builder)}
        return builder.as_data_source(self._split, decoders=decoders)

    def __getitem__(self, index: Any) -> Any:  # nobody asks for slices
        if not 0 <= index < self._size:
            raise IndexError(index)
        o, where = self._options, f"{self._folder}: record {index} of split {self._split!r}"
        try:
            record = self._source[index]
            return _Stored(f"{self._split}_{index:06d}", where, record[o.image_key], record[o.label_key])
        except Exception as e:  # array_record: RuntimeError, IndexError; TFDS: many kinds
            raise DataError(f"{where} cannot be read ({_first_line(e)}); have TFDS prepare the set again") from e


def _images(builder: tfds.core.DatasetBuilder) -> dict[str, tfds.features.Image]:
    return {key: x for key, x in builder.info.features.items() if isinstance(x, tfds.features.Image)}


def _prepared(root: Path, name: str, config: str | None, version: str | None) -> Path | None:
    if present(root / "dataset_info.json"):
        return root
    folders = [root / name / config] if config else [root / name, *sorted((root / name).glob("*/"))]
    found = {}
    for folder in folders:
        versions = [info.parent for info in folder.glob(f"{version or '*.*.*'}/dataset_info.json")]
        versions = [path for path in versions if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]  # no "incomplete.*_1.0.0"
        if versions:
            found[folder.name] = max(versions, key=lambda path: tuple(map(int, path.name.split("."))))
    if len(found) > 1:
        raise DataError(
            f"{root / name}: holds the configs {', '.join(found)}; set data.tfds.dataset to one, such as "
            f"'{name}/{next(iter(found))}'"
        )
    return next(iter(found.values()), None)


def _prepare(dataset: str, manual_dir: Path | None, data_dir: str) -> Path:
    try:
        builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
    except Exception as e:  # TFDS: DatasetNotFoundError, AssertionError, ValueError, by what is wrong in the name
        raise DataError(
            f"data.tfds.dataset: {dataset!r} is neither prepared in {manual_dir or data_dir} nor can TFDS prepare it "
            f"({_first_line(e)}); names are in https://www.tensorflow.org/datasets/catalog/overview"
        ) from e
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS announces itself with print
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    except Exception as e:  # a builder may raise anything, and so may the network
        if refusal(e):
            raise unwritable(Path(data_dir), e) from e
        raise DataError(
            f"{dataset!r} is not prepared in {data_dir}, and TFDS could not do it here ({_first_line(e)}). Run this, "
            "once, on any machine with a network, and set data.source_dir to the folder: pip install "
            f"tensorflow-cpu array-record tensorflow-datasets importlib_resources; "
            f"{_command(dataset, manual_dir, data_dir)}"
        ) from e
    return Path(builder.data_dir)


def _command(dataset: str, manual_dir: Path | None, data_dir: str) -> str:
    manual = f"download_config=tfds.download.DownloadConfig(manual_dir='{manual_dir}')" if manual_dir else ""
    return (
        f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{dataset}', data_dir='{data_dir}', "
        f"file_format='array_record').download_and_prepare({manual})\""
    )


def _class_names(o: _Options, feature: Any) -> tuple[str, ...]:
    known = tuple(getattr(feature, "names", None) or ())  # of a LabeledImage, by stored value
    declared = ("",) * o.label_offset + known if known and o.label_offset > 0 else known[-o.label_offset :]
    names = tuple(o.class_names) or declared
    if "" in names:
        raise DataError(
            f"data.tfds.label_offset: with {o.label_offset:+}, class {names.index('')} is none that {o.dataset!r} "
            f"names ({', '.join(known[:20])}); correct it, or set data.tfds.class_names"
        )
    for k, name in enumerate(names):
        if name in declared and declared.index(name) != k:
            raise DataError(
                f"data.tfds.class_names: {name!r} is class {k} there, but class {declared.index(name)} of what "
                f"{o.dataset!r} says itself ({', '.join(declared[:20])}); correct the order, or data.tfds.label_offset"
            )
    names = names or tuple(f"class_{i}" for i in range(o.num_classes))
    if o.num_classes not in (0, len(names)):
        raise DataError(
            f"data.tfds.num_classes: {o.num_classes}, but there are {len(names)} names ({', '.join(names)}); "
            "correct one of them, or set it to 0"
        )
    if not 2 <= len(names) <= 255 or len(set(names)) != len(names):
        raise DataError(
            f"data.tfds.class_names: {names} are not 2 to 255 different names; set them, or data.tfds.num_classes "
            f"where {o.dataset!r} does not name its classes"
        )
    return names


def _table(o: _Options, num_classes: int) -> np.ndarray:
    """Stored value -> class, 255 = void, -1 = neither."""
    if 0 <= o.void < num_classes:
        raise DataError(f"data.tfds.void: {o.void} is one of the {num_classes} classes; set data.tfds.label_offset so "
                        "that it is none")  # fmt: skip
    value = np.arange(256) + o.label_offset
    classes = np.where((value >= 0) & (value < num_classes), value, -1)
    return np.where(value == o.void, VOID, classes).astype(np.int16)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
