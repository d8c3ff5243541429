"""The TFDS builder all data sets share, and the reading of loose image/mask files.

A data set module lists its splits as a `Plan`; the builder reads, checks and stores every example.
TensorFlow is not needed: the file format is array_record and images are handed over as bytes.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from pwcrf_jax.data.label_guard import LabelGuard, bad_value
from pwcrf_jax.data.readers.classes import refuse_own_names
from pwcrf_jax.data.readers.files import MAX_PIXELS, DataError, check_regular, read_image_file
from pwcrf_jax.data.readers.image_io import (
    VOID,
    decode_image,
    decode_label,
    encode_label,
    storable_image,
    value_counts,
    voc_palette,
)
from pwcrf_jax.runtime import mirror


class Plan(NamedTuple):
    """A data set to prepare.

    splits: the items of every split.
    fingerprint: of all they depend on.
    class_names, palette: where the source says them; else the builder's.
    unlabelled: splits whose labels are not public; their records are void all over.
    coding: how masks are to be read, where the source says it too.
    form: what the source was taken for, where it may be several things.
    """

    splits: Mapping[str, Sequence[Any]]
    fingerprint: str
    class_names: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    unlabelled: tuple[str, ...] = ()
    coding: Any = None
    form: str = ""


class Pair(NamedTuple):
    """One image file and its mask (None: not labelled); `listed_in` is the list file or folder that names it."""

    id: str
    image: Path
    mask: Path | None
    listed_in: Path


def fingerprint(*parts: Any) -> str:
    """16 hex digits that change when any of the (JSON-able) parts changes; of paths in a copy of a bucket its URLs."""
    text = mirror.origin(json.dumps(parts, sort_keys=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pairs_in(images: Path, masks: Path | None, pattern: str) -> list[Pair]:
    """The images of a folder, and the PNG masks of the same names in another; DataError where there is no image."""
    paths = sorted(images.glob(pattern))
    if not paths:
        raise DataError(f"{images}: no image {pattern} is there; unpack the archive again, or remove the folder")
    return [Pair(path.stem, path, masks and masks / f"{path.stem}.png", images) for path in paths]


def require_source_dir(name: str, source_dir: str) -> Path:
    """The absolute source folder, or DataError when none was given or it is no folder."""
    if not source_dir:
        raise DataError(f"data set {name!r} is read from your own copy: set data.source_dir to its folder")
    path = Path(source_dir).absolute()
    if not path.is_dir():
        raise DataError(f"data.source_dir: {path} is not a folder; set it to your copy of {name!r}")
    return path


def check_options(name: str, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The defaults with the options given; DataError for one the data set does not have, or of another type."""
    allowed = defaults or {}
    for key in options:
        if key not in allowed:
            known = ", ".join(allowed) or "none"
            raise DataError(f"data set {name!r} has no option {key!r}; its options: {known}")
        kind = type(allowed[key])
        kinds = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
        if not isinstance(options[key], kinds) or isinstance(options[key], bool) != (kind is bool):
            raise DataError(f"data.{name}.{key}: {options[key]!r} is no {kind.__name__}, such as {allowed[key]!r}")
    return {**allowed, **options}


# TFDS, which has no types, would else list the class in its own catalogue.
class SegmentationBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base builder: records of an image, a mask of class indices with 255 = void, and an id.

    Subclasses set `name`, "pwcrf_" and the name of the data set, and `class_names`, and give `plan_from_source` (and,
    unless the items of their plan are `Pair`s with masks of class indices, `_example` or `_label`). The prepared folder
    is `data_dir/name/<fingerprint>/<version>`, so a changed source never meets records prepared from the old one.
    """

    VERSION = tfds.core.Version("1.0.0")  # of a subclass, higher where its records change: part of the folder's name
    class_names: tuple[str, ...]
    void_value: ClassVar[int] = VOID  # what the source calls void
    palette: tuple[tuple[int, int, int], ...] = ()  # RGB of each class; (): VOC's colours
    split_sizes: ClassVar[Mapping[str, int]] = {}  # official, of splits that have one
    names_files_count: ClassVar[bool] = True  # a file of names beside the data must have these
    declared_values: ClassVar[Mapping[int, str]] = {}  # what values of masks mean; {}: the classes from 0
    manual: ClassVar[str] = ""  # what to download, by the names of its files
    masks_fit_stored_pixels: ClassVar[bool] = True  # whatever an EXIF orientation says, see `storable_image`

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(skip_registration=True, **options)  # type: ignore[call-arg]  # as above

    def __init__(self, *, plan: Plan, data_dir: str, max_pixels: int = MAX_PIXELS):
        self._plan, self.max_pixels = plan, max_pixels
        self.class_names = plan.class_names or type(self).class_names
        self.palette = plan.palette or type(self).palette or voc_palette(len(self.class_names))
        self.failure: DataError | None = None
        self.guard = LabelGuard(self.class_names, plan.unlabelled)
        super().__init__(
            data_dir=data_dir or None,
            config=tfds.core.BuilderConfig(name=plan.fingerprint),
            file_format="array_record",
        )

    @classmethod
    def plan(cls, source_dir: str, *, data_dir: str = "", **options: Any) -> Plan:
        """Lists the examples of every split without reading them.

        Args:
          source_dir: the user's folder.
          data_dir: where archives may be unpacked, see `archives.locate`.
          options: none, but for subclasses that say which.

        Raises:
          DataError: as `plan_from_source`, and for a source that is no folder.
        """
        key = cls.name.removeprefix("pwcrf_")
        check_options(key, options)
        return cls.plan_from_source(require_source_dir(key, source_dir), data_dir)

    @classmethod
    def plan_from_source(cls, source: Path, data_dir: str) -> Plan:
        """`plan` of a folder that is there. Abstract: each data set has its own layout."""
        raise NotImplementedError(f"{cls.__name__} does not say where its examples are")

    @classmethod
    def plan_from_pairs(
        cls, source_dir: Path, splits: Mapping[str, Sequence[Pair]], *depends: Any, **attributes: Any
    ) -> Plan:
        """Checks that all files exist, ids are unique, and no file beside them names other classes; fingerprints names,
        sizes and times.

        depends: what else the records depend on (JSON-able).
        attributes: of the `Plan`; `unlabelled` is found out.
        """
        if not attributes.get("class_names") and cls.names_files_count:
            first = [path.parent for pairs in splits.values() for path in pairs[0][1:3] if path is not None]
            folders = {source_dir, *first, *(folder.parent for folder in first)} - set(source_dir.parents)
            values = cls.declared_values or dict(enumerate(cls.class_names))
            refuse_own_names(sorted(folder for folder in folders if folder.is_dir()), cls.class_names, values)
        state = {split: _file_states(split, pairs) for split, pairs in splits.items()}
        unlabelled = tuple(split for split, pairs in splits.items() if all(pair.mask is None for pair in pairs))
        key = fingerprint(str(cls.VERSION), str(source_dir), state, *depends)
        return Plan(splits, key, unlabelled=unlabelled, **attributes)

    @classmethod
    def check_sizes(cls, plan: Plan, source_dir: str) -> None:
        """DataError where a split does not have its official number of images."""
        for split, items in plan.splits.items():
            official = cls.split_sizes.get(split, len(items))
            if len(items) != official:
                lists = {str(item.listed_in) for item in items if isinstance(item, Pair)}
                where = f" ({', '.join(sorted(lists)[:3])})" if lists else ""
                raise DataError(
                    f"{source_dir}: split {split!r}{where} has {len(items)} images, officially {official}; restore "
                    f"what is missing ({cls.manual or 'the official archives'}), or set data.partial=true to go on "
                    "with a part or a variant"
                )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.Image(shape=(None, None, 1)),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split, items) for split, items in self._plan.splits.items()}

    def _generate_examples(self, split: str, items: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            for item in items:
                key, image, label = self._example(item)
                pixels = decode_image(image, str(item.image) if isinstance(item, Pair) else key, self.max_pixels)
                if label is None:
                    label = np.full(pixels.shape[:2], VOID, np.uint8)
                elif isinstance(item, Pair) and label.shape != pixels.shape[:2]:
                    raise DataError(
                        f"{item.mask}: mask is {label.shape[1]}x{label.shape[0]} pixels but its image {item.image} is "
                        f"{pixels.shape[1]}x{pixels.shape[0]}; both need the same size (resize masks with nearest "
                        "neighbour only)"
                    )
                self.guard.add(split, key, image, pixels, label)
                png = io.BytesIO(encode_label(label))
                yield key, {"image": io.BytesIO(image), "label": png, "id": key}
            self.guard.close(split)
        except DataError as e:
            self.failure = e  # TFDS may wrap it; the caller raises this one
            raise

    def _label(self, mask: Path, image: Path) -> np.ndarray:
        """The mask of an image as the source has it: class indices and `void_value`, uint8 [H, W]."""
        return decode_label(self._read(mask), str(mask), self.max_pixels)

    def _read(self, path: Path) -> bytes:
        return read_image_file(path, self.max_pixels)

    def _example(self, item: Any) -> tuple[str, bytes, np.ndarray | None]:
        """One example: id, JPEG or PNG, and uint8 [H, W] labels with 255 = void (None: not labelled)."""
        label = None if item.mask is None else self._label(item.mask, item.image)
        image = storable_image(
            self._read(item.image),
            str(item.image),
            None if label is None else label.shape,
            trusted=self.masks_fit_stored_pixels,
            max_pixels=self.max_pixels,
        )
        return item.id, image, None if label is None else self._void_to_255(label, item.mask)

    def _void_to_255(self, label: np.ndarray, path: Path) -> np.ndarray:
        num_classes = len(self.class_names)
        known = np.arange(256) < num_classes
        known[self.void_value] = True
        if value_counts(label)[~known].any():
            raise bad_value(
                path,
                label,
                known,
                f"neither a class (0..{num_classes - 1}) nor void ({self.void_value})",
                f"correct the mask, or mark those pixels {self.void_value}",
            )
        return np.where(label == self.void_value, np.uint8(VOID), label)


def _file_states(split: str, pairs: Sequence[Pair]) -> list[list[Any]]:
    states, seen = [], set()
    for pair in pairs:
        if pair.id in seen:
            raise DataError(f"{pair.listed_in}: {pair.id!r} is in split {split!r} twice; remove one of them")
        seen.add(pair.id)
        state: list[Any] = [pair.id]
        for kind, path in (("image", pair.image), ("mask", pair.mask)):
            if path is None:
                continue
            try:
                stat = path.stat()
            except (OSError, ValueError) as e:  # ValueError: a zero byte in the name
                missing = "is a link to nothing" if path.is_symlink() else "is missing"
                raise DataError(
                    f"{path}: {kind} {missing} but {pair.listed_in} names it (split {split!r}); "
                    "add the file or remove it there"
                ) from e
            check_regular(path, stat.st_mode)
            state += [str(path), stat.st_size, stat.st_mtime_ns]
        states.append(state)
    return states
