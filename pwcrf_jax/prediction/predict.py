"""Prediction into files: `pwcrf predict`.

Images come from the user's files or from a split of the run's data set, labelled or not. For each, DIR holds

    labels/NAME.png          the class of each pixel, as a palette image of the image's own size
    overlays/NAME.jpg        the same colours over the image
    probabilities/NAME.npz   on demand: `probabilities` float16 [H, W, K], `class_names`

and `classes.json`, names and colours of the classes. NAME is that of `image_files.find_images`, or the id in the data
set. In the format of a benchmark (`FORMATS`) the labels lie where its
server wants them, coded as it wants them, instead of in labels/.
"""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import numpy as np

from pwcrf_jax import config as configs
from pwcrf_jax.data import DataError, load_dataset, prepare
from pwcrf_jax.data.readers.files import read_image_file
from pwcrf_jax.data.readers.image_io import MAX_PIXELS, decode_image, storable_image, voc_palette
from pwcrf_jax.prediction import image_files, output_files, refinement, restore
from pwcrf_jax.prediction import predictor as inference
from pwcrf_jax.prediction.image_files import shown
from pwcrf_jax.runtime import files, mirror
from pwcrf_jax.runtime.logs import bar, log

_LONGEST = 251  # bytes of a name without its suffix, as file systems have it


class Format(NamedTuple):
    """How label images are written.

    folder: below the output; {split} is the split's name.
    num_classes: that the format has; 0: any.
    flat: all in one folder, under the last part of their names.
    """

    folder: str
    num_classes: int = 0
    flat: bool = True


FORMATS = {
    "palette": Format("labels", flat=False),
    # Palette images; comp6 is the competition with any training data (ImageNet weights are such).
    "voc": Format("results/VOC2012/Segmentation/comp6_{split}_cls", 21),
    "cityscapes": Format("results", 19),  # label ids; the server finds a file by CITY_SEQUENCE_FRAME*.png
    "ade20k": Format("results", 150),  # 1..150
}


def _codes(name):
    """What the format writes for each class; None: its index."""
    if name == "cityscapes":
        from pwcrf_jax.data.sets.cityscapes import TRAIN_TO_LABEL_ID  # loads TFDS, which own images do not need

        return np.array(TRAIN_TO_LABEL_ID, np.uint8)
    return np.arange(1, 151, dtype=np.uint8) if name == "ade20k" else None


class Targets:
    """Where the label files of a format go.

    Raises, when called:
      DataError: the name cannot be that of a file below the output, or its files would be those of another name.
    """

    def __init__(self, output: str, format_name: str, split: str = "test"):
        self._format = FORMATS[format_name]
        self._folder = os.path.join(output, self._format.folder.format(split=split))
        self._taken: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._folders: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        parts = name.split("/")
        if not {"", ".", ".."}.isdisjoint(parts) or not all(map(_is_file_name, parts)):
            raise DataError(
                f"{shown(name)!r} is no name of a file below --output; rename it, to {_LONGEST} bytes at most"
            )
        file = os.path.join(self._folder, f"{parts[-1] if self._format.flat else name}.png")
        ends = {f"{name}{suffix}" for suffix in (".png", ".jpg", ".npy", ".npz")}
        folders = {str(folder) for folder in PurePosixPath(name).parents}
        others = [self._taken.setdefault(file, name)]
        others += [self._folders[x] for x in ends & self._folders.keys()]
        others += [self._files[x] for x in folders & self._files.keys()]
        for other in others:
            if other != name:
                raise DataError(
                    f"{shown(other)!r} and {shown(name)!r} would both be written to {file}; rename one of them"
                )
        self._files |= dict.fromkeys(ends, name)
        self._folders |= dict.fromkeys(folders, name)
        return file


def _is_file_name(part):
    try:
        return len(os.fsencode(part)) <= _LONGEST and "\0" not in part
    except UnicodeEncodeError:
        return False


def read_image(path: Path, max_pixels: float = MAX_PIXELS) -> np.ndarray:
    """An image file as it is meant to be looked at, EXIF orientation applied: uint8 [H, W, 3].

    max_pixels: config.data.max_pixels.

    Raises:
      DataError: it cannot be read, is no image or a larger one, or one that has no one reading as 8-bit RGB.
    """
    data, where = read_image_file(path, max_pixels), str(path)
    return decode_image(storable_image(data, where, None, trusted=False, max_pixels=max_pixels), where, max_pixels)


def class_info(config, workdir: str):
    """(class names, palette) of a run, for which its data set need not be there.

    Workdirs of before `configs.CLASSES` have those of the data set's module, or numbers and VOC's colours.

    Raises:
      ConfigError: they are not those of the run's config.
    """
    names, palette = configs.load_classes(workdir)
    if not names:
        builder = prepare.builder_class(config.data.name)
        names = getattr(builder, "class_names", ()) or tuple(f"class_{i}" for i in range(config.data.num_classes))
        palette = builder.palette or voc_palette(len(names))
    if len(names) != config.data.num_classes:
        raise configs.ConfigError(
            f"config.data.num_classes = {config.data.num_classes}, but the run in {workdir} has {len(names)} classes "
            f"({', '.join(names)}); start without this flag"
        )
    return names, palette


class Request(NamedTuple):
    """What is to be predicted, and how labels are written.

    items: {title: (name, None: of its record; file or index of the record)}. source: of records; None: items are files.
    found: of the files, with what is not among the items. target: where the labels of a name go.
    """

    items: dict[str, tuple]
    source: Any
    found: image_files.Found
    class_names: Sequence[str]
    palette: Sequence
    format_name: str
    target: Targets


def predict(
    config,
    workdir: str,
    output: str,
    *,
    images: str = "",
    split: str = "",
    which: str = "best",
    refine: str = "off",
    format_name: str = "auto",
    probabilities: bool = False,
    overlay: bool = True,
    overwrite: bool = False,
) -> dict:
    """Predicts `images` (see `image_files.find_images`), or a split of the run's data set, into files in `output`.

    which, refine: of `evaluate.evaluate`.
    format_name: of `FORMATS`; "auto": of a split that of its data set, where there is one, else "palette".
    overwrite: write into a folder that is not empty; files of other names stay.

    An image that cannot be predicted is named in the log, and so is what lies among images and is none.

    Returns:
      {"num_images", "failed": [images that were not predicted, and what may hold some but cannot be looked into],
      "left_out": [what is no image], "format", "step", "output"}.

    Raises:
      ConfigError, DataError, CheckpointError: before anything is computed.
      FileError: a file cannot be written; those before it are whole.
    """
    configs.validate(config, batches=())
    output, images = files.expand_path(output, "--output"), files.expand_path(images, "--images")
    scores = configs.score_files(config)
    if jax.process_count() > 1:
        raise configs.ConfigError("predictions are written by one process; start it on one host alone")
    request = _requested(config, workdir, output, images=images, split=split, format_name=format_name)
    model, params, step = restore.restore_params(config, workdir, which)
    predictor, settings = inference.Predictor(config, model, params), configs.refine_settings(config, refine)
    real = lambda path: path if files.is_url(path) else os.path.realpath(path)
    if real(output) == real(workdir):
        raise DataError(f"--output={shown(output)}: is the workdir of the run; name another folder")
    output_files.claim(output, overwrite)
    log.info("%s checkpoint of step %d, %d images into %s", which, step, len(request.items), output)
    configs.save_classes(request.class_names, request.palette, output)
    output_files.tell(request.found)
    failed = list(request.found.failed)
    write = _Writer(output, request, probabilities=probabilities, overlay=overlay)
    predicted = predictor(_readable(request, config.data.max_pixels, failed, scores))
    for name, image, marginals in bar(predicted, "predict", len(request.items), "image"):
        if settings is None:
            write(name, image, marginals.labels(), marginals.log_probs() if probabilities else None)
        else:
            log_probs, _ = refinement.refine_image(marginals.log_probs(), image, settings)
            write(name, image, log_probs.argmax(-1).astype(np.uint8), log_probs)
    failed, left_out = (list(map(mirror.origin, paths)) for paths in (failed, request.found.left_out))
    counts = dict(num_images=len(request.items) + len(request.found.failed) - len(failed), failed=failed)
    about = dict(left_out=left_out, format=request.format_name, step=step, output=output)
    return counts | about


def _requested(config, workdir, output, *, images, split, format_name) -> Request:
    """Finds what is to be predicted; refuses a format that does not fit, and names that are none of files."""
    found, source = image_files.Found({}, {}, {}), None
    items: dict[str, tuple[Any, Any]]
    if split:
        dataset = load_dataset(**configs.dataset_options(config))
        configs.check_classes(config, dataset.class_names)
        class_names, palette, source = dataset.class_names, dataset.palette, dataset.source(split)
        if scores := configs.score_files(config):
            scores.check_split(dataset, split)
        items = {f"record {i} of {split}": (None, i) for i in range(len(source))}
    else:
        class_names, palette = class_info(config, workdir)
        found = image_files.find_images(mirror.pattern(images), output)
        items = {str(file): (name, file) for name, file in found.images.items()}
    if format_name == "auto":
        format_name = config.data.name if split and config.data.name in FORMATS else "palette"
    wanted = FORMATS[format_name].num_classes
    if wanted not in (0, len(class_names)):
        raise configs.ConfigError(
            f"--format={format_name} has {wanted} classes, but this run has {len(class_names)} ({config.data.name}); "
            "use --format=palette"
        )
    target = Targets(output, format_name, split.split("+")[0].split("[")[0] or "test")
    for name, _ in items.values() if images else ():
        target(name)
    return Request(items, source, found, class_names, palette, format_name, target)


def _readable(request, max_pixels, failed, scores):
    """(name, image) of each item that can be read and has a name for its files; others are told and go to `failed`.

    With scores, `pwcrf_jax.data.given_scores.ScoreFiles`, also those of the image.
    """
    for title, (name, where) in request.items.items():
        try:
            source = request.source
            record = source[where] if source is not None else {"id": name, "image": read_image(where, max_pixels)}
            request.target(record["id"])
            given = [scores(record["id"], record["image"].shape[:2])] if scores else []
        except DataError as error:
            failed.append(title)
            log.info("error: %s", shown(error))
        else:
            yield record["id"], record["image"], *given


class _Writer:
    """Writes the files of an image: labels and, if wanted, the overlay and the probabilities."""

    def __init__(self, output, request, *, probabilities, overlay):
        self._output, self._target, self._class_names = output, request.target, request.class_names
        self._probabilities, self._overlay = probabilities, overlay
        self._codes, self._palette = _codes(request.format_name), np.array(request.palette, np.uint8)

    def __call__(self, name, image, labels, log_probs):
        """labels: uint8 [H, W]. log_probs: float32 [H, W, K], for the probabilities."""
        output_files.write_labels(self._target(name), labels, self._palette, self._output, self._codes)
        if self._overlay:
            output_files.write_overlay(name, image, labels, self._palette, self._output)
        if self._probabilities:
            probs = np.exp(log_probs).astype(np.float16)
            with output_files.writing(os.path.join(self._output, "probabilities", f"{name}.npz"), self._output) as file:
                np.savez_compressed(file, probabilities=probs, class_names=self._class_names)
