"""`load_dataset`: prepare a data set once, then read its records at random."""

import contextlib
import difflib
import importlib
import io
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pwcrf_jax.data import shared
from pwcrf_jax.data import splits as parts_of
from pwcrf_jax.data.readers.disk import locked, refusal, unwritable
from pwcrf_jax.data.readers.files import MAX_PIXELS
from pwcrf_jax.data.readers.image_io import DataError, decode_image, decode_label, image_size, open_image
from pwcrf_jax.runtime import mirror
from pwcrf_jax.runtime.files import expand_path, is_url, read_json

_BUILDERS = {  # name -> module and class, imported when asked for: `import pwcrf_jax.data` does not pay for TFDS
    "synthetic": ("synthetic", "Synthetic"),
    "camvid": ("camvid", "CamVid"),
    "voc": ("voc", "Voc"),
    "pascal_context": ("pascal_context", "PascalContext"),
    "nyudv2": ("nyudv2", "NyuDv2"),
    "siftflow": ("siftflow", "SiftFlow"),
    "sunrgbd": ("sunrgbd", "SunRgbd"),
    "cityscapes": ("cityscapes", "Cityscapes"),
    "kitti": ("kitti", "Kitti"),
    "kitti_cityscapes": ("kitti", "KittiCityscapes"),
    "coco": ("coco", "Coco"),
    "coco_stuff": ("coco", "CocoStuff"),
    "ade20k": ("ade20k", "Ade20k"),
    "image_folder": ("image_folder", "ImageFolder"),
    "tfds": ("tfds_set", "TfdsSet"),
}

DATASETS = tuple(_BUILDERS)
"""Names `load_dataset` takes."""

log = logging.getLogger(__name__)


class Source:
    """Random access to the records of one split; safe to read from several threads."""

    def __init__(self, records: Any, folder: str, parts: Sequence[parts_of.Part]):
        self._records = records
        self._folder = folder
        self._parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        # Of what was prepared: TFDS cannot pickle builders that take arguments of their own.
        return _reopened, (self._folder, self._parts)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 [H, W, 3], "label": uint8 [H, W] with 255 = void, "id": str}.

        Raises:
          IndexError: index is not in 0..len-1.
          DataError: the prepared record is damaged; names the record, the folder and the remedy.
        """
        sample = self.open(index)
        return sample | {"image": np.asarray(sample["image"])}

    def open(self, index: int) -> dict[str, Any]:
        """The same with the image as a `PIL.Image` in RGB: a crop of it costs less than all of it as an array."""
        record, where = self._raw(index)
        # Whatever was prepared was within the limit that held then.
        image, label = open_image(record["image"], where, math.inf), decode_label(record["label"], where, math.inf)
        return {"image": image, "label": label, "id": record["id"]}

    def id(self, index: int) -> str:
        """The id of a record."""
        return self._raw(index)[0]["id"]

    def image_size(self, index: int) -> tuple[int, int]:
        """(height, width) of a record's image, from its header only."""
        record, where = self._raw(index)
        return image_size(record["image"], where)

    def _raw(self, index: int) -> tuple[dict[str, Any], str]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of a split with {len(self)} records")
        with _reading(self._folder, f"record {index}"):
            record = dict(self._records[index])
        if isinstance(record["id"], bytes):
            record["id"] = record["id"].decode()
        return record, f"record {record['id']!r} of the prepared data set {self._folder}"


class Dataset:
    """A prepared data set.

    Attributes:
      name: the name `load_dataset` was given.
      class_names: tuple of str, one per class.
      num_classes: number of classes; labels are 0..num_classes-1, or 255 for void.
      splits: dict of split name -> number of records.
      palette: an RGB colour for each class.
      unlabelled: splits whose labels are not public; their records are void all over.
      folder: the prepared folder.
      form: what the source was taken for, "labelme polygons", ...; "": it can be one thing only.
    """

    def __init__(
        self, name: str, builder: Any, splits: dict[str, int], unlabelled: tuple[str, ...] = (), form: str = ""
    ):
        self.name = name
        self.class_names: tuple[str, ...] = tuple(builder.class_names)
        self.num_classes = len(self.class_names)
        self.splits = splits
        self.palette: tuple[tuple[int, int, int], ...] = tuple(builder.palette)
        self.unlabelled: tuple[str, ...] = unlabelled
        self.folder = str(builder.data_dir)
        self.form = form
        self._builder = builder
        self._by_id: dict[str, list[int]] = {}  # of splits that were asked for by id

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {self.num_classes} classes, splits={self.splits})"

    def check_labelled(self, split: str) -> None:
        """DataError where a split, or a part of it, has no public labels to train on or to score."""
        for name in parts_of.names(split):
            if name in self.unlabelled:
                raise DataError(
                    f"split {name!r} of data set {self.name!r} has no public labels; predict on it with "
                    f"pwcrf predict --dataset={name} --output=DIR, or name another split"
                )

    def label_report(self) -> dict[str, Any]:
        """The report of `label_guard.LabelGuard`, made when the data set was prepared, see `LabelGuard.report`.

        Raises:
          DataError: a prepared record is damaged.
        """
        from pwcrf_jax.data import label_guard

        def usable(report: Any) -> Any:
            label_guard.format_report(report)
            if list(report["classes"]) != list(self.class_names) or report["splits"].keys() != self.splits.keys():
                raise ValueError("it is of another data set")
            return report

        try:
            return read_json(Path(self.folder, label_guard.REPORT), "it is written again", usable)
        except OSError:  # of another shape, or of a run that was killed
            guard = label_guard.LabelGuard(self.class_names, self.unlabelled)
        for split in self.splits:
            source = self.source(split)
            for index in range(len(source)):
                record, where = source._raw(index)
                pixels = decode_image(record["image"], where, math.inf)
                label = decode_label(record["label"], where, math.inf)
                guard.add(split, record["id"], record["image"], pixels, label)
        report = guard.report()
        with contextlib.suppress(OSError):  # a read-only folder
            label_guard.write_report(report, self.folder)
        return report

    def source(self, split: str) -> Source:
        """Random access to a split, to a part of one, or to a sum of parts with +.

        "train[:90%]" is a slice of the stored order, a fixed shuffle by id: a random but reproducible subset.
        "train[20%:40% by id]" is one of the order of ids, digits taken as numbers: a block of neighbours.

        Raises:
          DataError: unknown split, unreadable slice, parts that overlap, or no records.
        """
        for name in parts_of.names(split):
            if name not in self.splits:
                counts = ", ".join(f"{k} ({n})" for k, n in self.splits.items())
                raise DataError(f"data set {self.name!r} has no split {name!r} ({split!r}); it has {counts}")
        parts = parts_of.read(split, self._builder.info.splits, self._order_of)
        with _quiet(), _reading(self.folder, f"split {split!r}"):
            return _source(self._builder, self.folder, parts)

    def _order_of(self, name: str) -> list[int]:
        if name not in self._by_id:
            source = self.source(name)
            self._by_id[name] = parts_of.in_order([source.id(i) for i in range(len(source))])
        return self._by_id[name]


def _source(builder: Any, folder: str, parts: Sequence[parts_of.Part]) -> Source:
    import tensorflow_datasets as tfds

    raw = {"image": tfds.decode.SkipDecoding(), "label": tfds.decode.SkipDecoding()}
    if any(part.places is not None for part in parts):
        of = [(builder.as_data_source(part.spec, decoders=raw), part.places) for part in parts if part.places != ()]
        return Source(parts_of.Joined(of), folder, parts)
    return Source(builder.as_data_source("+".join(part.spec for part in parts), decoders=raw), folder, parts)


def _reopened(folder: str, parts: Sequence[parts_of.Part]) -> Source:
    import tensorflow_datasets as tfds

    with _quiet(), _reading(folder, f"split {'+'.join(part.spec for part in parts)!r}"):
        return _source(tfds.builder_from_directory(folder), folder, parts)


def load_dataset(
    name: str,
    *,
    source_dir: str = "",
    data_dir: str = "",
    partial: bool = False,
    max_pixels: int = MAX_PIXELS,
    **options: Any,
) -> Dataset:
    """Gives a data set, preparing it first if this exact source was not prepared before.

    The prepared folder is keyed by a fingerprint of the source (paths, sizes and times of all files, or
    the parameters of the synthetic set): after any change a new one is prepared beside the old.

    Args:
      name: one of `DATASETS`.
      source_dir: folder of your copy, as docs/datasets.md says for each; not used by synthetic.
      data_dir: where prepared data sets are kept; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets. Of a URL gs://...,
        here and there, this machine has a copy, see `runtime.mirror`.
      partial: accept splits that do not have the official number of images.
      max_pixels: that an image or mask may have; a header that claims more is refused before memory is taken.
      **options: of synthetic: image_size=(192, 256), num_train=400, num_val=100, seed=0; of image_folder:
        val_fraction=0.1, seed=0.

    Raises:
      FileError: a path that is neither a local one nor one of a bucket, or a bucket that cannot be read or written.
      DataError: unknown name or option, a source that is missing or damaged, or a prepared folder that
        cannot be written or read. The message names the file or key, and the remedy.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(str(name), DATASETS, 1, 0)[0]
        raise DataError(f"data.name: unknown data set {name!r}, did you mean {near!r}? Known: {DATASETS}")
    if not isinstance(max_pixels, int) or isinstance(max_pixels, bool) or max_pixels < 1:
        raise DataError(f"data.max_pixels: {max_pixels!r} is no number of pixels, such as {MAX_PIXELS}")
    builder_cls = builder_class(name)
    source_dir = expand_path(source_dir, "data.source_dir")
    named = {"data.data_dir": data_dir, "$TFDS_DATA_DIR": os.environ.get("TFDS_DATA_DIR", "")}
    named = {key: value for key, value in named.items() if value} or {"data.data_dir": "~/tensorflow_datasets"}
    key, data_dir = next(iter(named.items()))
    remote = data_dir = expand_path(data_dir, key)
    if is_url(data_dir):
        data_dir = mirror.place(data_dir)
    source_dir = mirror.local(source_dir)
    with _listing(source_dir):
        plan = builder_cls.plan(source_dir, data_dir=data_dir, **options)
    if not partial:
        builder_cls.check_sizes(plan, source_dir)
    home = Path(data_dir) / builder_cls.name / plan.fingerprint
    there = f"{remote}/{builder_cls.name}/{plan.fingerprint}" if is_url(remote) else ""
    with _quiet(), _locked(home) as held, shared.prepared(there, home) as share:
        with _reading(str(home), "its description"):
            _check_files(home)
            builder = builder_cls(plan=plan, data_dir=data_dir, max_pixels=max_pixels)
        if not Path(builder.data_dir).is_dir():
            if held:  # else another process may be writing there
                _clear_leftovers(home)
            _prepare(name, builder, home)
        share()
    expected = {split: len(items) for split, items in plan.splits.items()}
    found = {split: info.num_examples for split, info in builder.info.splits.items()}
    if found != expected:
        raise DataError(
            f"{builder.data_dir}: the prepared data set has {found} records instead of {expected}; "
            "delete this folder, it is then prepared again"
        )
    return Dataset(name, builder, expected, plan.unlabelled, plan.form)


def builder_class(name: str) -> Any:
    """The `SegmentationBuilder` of a name; its classes and colours can be read without the data."""
    module, cls = _BUILDERS[name]
    return getattr(importlib.import_module(f"pwcrf_jax.data.sets.{module}"), cls)


def _clear_leftovers(home: Path) -> None:
    """Deletes what a run that was killed had begun."""
    for leftover in home.glob("incomplete.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _prepare(name: str, builder: Any, home: Path) -> None:
    import tensorflow_datasets as tfds

    from pwcrf_jax.data import label_guard

    start = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself with print
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False, compute_stats="skip")
            )
    except Exception as e:
        if builder.failure is not None:
            raise builder.failure from None
        if isinstance(e, OSError) or refusal(e):
            raise unwritable(home, e) from e
        raise
    report = builder.guard.report()
    with contextlib.suppress(OSError):  # the data set is whole; `label_report` makes it anew
        label_guard.write_report(report, builder.data_dir)
    for warning in report["warnings"]:
        log.warning("%s: %s", name, warning)
    counts = ", ".join(f"{k} {v.num_examples}" for k, v in builder.info.splits.items())
    log.info("Prepared %s (%s) in %.1f s: %s", name, counts, time.monotonic() - start, builder.data_dir)


@contextlib.contextmanager
def _listing(source_dir: str) -> Iterator[None]:
    """In here an error of the file system, as the listing of a source may meet one, becomes a DataError."""
    try:
        yield
    except OSError as e:
        raise DataError(
            f"{e.filename or source_dir}: cannot be read ({e.strerror or e}); check its name and permissions"
        ) from e
    except UnicodeDecodeError as e:
        raise DataError(f"{source_dir}: a list or table there is not UTF-8 text ({e}); save it as UTF-8") from e


@contextlib.contextmanager
def _reading(folder: str, what: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as e:  # array_record: RuntimeError without a file name; TFDS: many kinds
        raise DataError(
            f"{folder}: {what} of the prepared data set cannot be read ({' '.join(str(e).split())}); "
            "delete this folder, it is then prepared again"
        ) from e


def _check_files(home: Path) -> None:
    """TFDS would wait for a FIFO, and read a device without an end. Raises OSError."""
    for path in home.glob("*/*"):
        if not path.is_file() and not path.is_dir():
            raise FileNotFoundError(f"{path.name} is no file")


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[bool]:
    """One process prepares, others wait; yields whether the lock is held, see `disk.locked`."""
    held = False
    with contextlib.ExitStack() as stack:
        try:
            home.mkdir(parents=True, exist_ok=True)
            busy = f"another process prepares {home}; waiting for it"
            held = stack.enter_context(locked(home / "prepare.lock", busy))
        except OSError as e:
            # A read-only folder that is already prepared needs no lock.
            if not home.is_dir() or next(home.glob("[0-9]*"), None) is None:
                raise unwritable(home, e) from e
        yield held


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS logs a page and shows progress bars; our one line says what matters."""
    import tensorflow_datasets as tfds

    absl_log = logging.getLogger("absl")
    level = absl_log.level
    absl_log.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        absl_log.setLevel(level)
