"""Prediction into files: `eval.py --images` and `eval.py --dataset`.

Images come from the user's files or from a split of the run's data set, labelled or not. For each, DIR holds

    labels/NAME.png          the class of each pixel, as a palette image of the image's own size
    overlays/NAME.jpg        the same colours over the image
    probabilities/NAME.npz   on demand: `probabilities` float16 [H, W, K], `class_names`

and `classes.json`, names and colours of the classes. NAME is the path below the folder (or the first wildcard) of
--images, without suffix, or the id in the data set. In the format of a benchmark (`FORMATS`) the labels lie where its
server wants them, coded as it wants them, instead of in labels/.
"""

import contextlib
import glob
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from pwcrf_jax.data import DataError, datasets, load_dataset
from pwcrf_jax.data.common import decode_image, storable_image, voc_palette
from pwcrf_jax.training import config as configs
from pwcrf_jax.training import evaluate, inference, refinement
from pwcrf_jax.training.logs import bar, log

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Of the files that are taken from a folder; files named one by one, or by a pattern, may have any."""


LARGEST_JPEG = 65_500


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
        from pwcrf_jax.data.cityscapes import TRAIN_TO_LABEL_ID  # loads TFDS, which own images do not need

        return np.array(TRAIN_TO_LABEL_ID, np.uint8)
    return np.arange(1, 151, dtype=np.uint8) if name == "ade20k" else None


def find_images(images: str, output: str) -> dict[str, Path]:
    """{name: file} of the images of --images: a file, a folder with all below it, or a pattern.

    output: whatever lies in there is no image, as earlier predictions may.

    Raises:
      DataError: nothing there, or two files of one name.
    """
    path, out = Path(images).expanduser(), Path(output).resolve()
    if path.is_file():
        root, found = path.parent, [path]
    elif path.is_dir():
        root = path
        hidden = lambda p: any(part.startswith(".") for part in p.relative_to(path).parts)
        found = [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not hidden(p)]
    else:
        parts = path.parts
        fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        root, found = Path(*parts[:fixed]), map(Path, glob.glob(str(path), recursive=True))
    named, within = {}, 0
    for file in sorted(found):
        if out in file.resolve().parents:
            within += 1
            continue
        if file.is_dir():
            continue
        name = str(file.relative_to(root).with_suffix(""))
        if name in named:
            raise DataError(f"{named[name]} and {file} would both be predicted as {name!r}; rename one of them")
        named[name] = file
    if not named:
        what = f"files ({', '.join(SUFFIXES)})" if path.is_dir() else "files"
        if within:
            raise DataError(
                f"--images={images}: all {within} files there lie in --output={output}; name another output"
            )
        raise DataError(
            f"--images={images}: no {what} there; name an image, a folder or a quoted pattern like 'a/*.jpg'"
        )
    return named


class Targets:
    """Where the label files of a format go; a file that two names would be is refused with DataError."""

    def __init__(self, output: str, format_name: str, split: str = "test"):
        self._format = FORMATS[format_name]
        self._folder = Path(output, self._format.folder.format(split=split))
        self._taken = {}

    def __call__(self, name: str) -> Path:
        file = self._folder / f"{name.split('/')[-1] if self._format.flat else name}.png"
        if self._taken.setdefault(file, name) != name:
            raise DataError(f"{self._taken[file]!r} and {name!r} would both be written to {file}; rename one of them")
        return file


def read_image(path: Path) -> np.ndarray:
    """An image file as it is meant to be looked at, EXIF orientation applied: uint8 [H, W, 3].

    Raises:
      DataError: it cannot be read, is no image, or one that has no one reading as 8-bit RGB.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return decode_image(storable_image(data, str(path), None, trusted=False), str(path))


def class_info(config, workdir: str):
    """(class names, palette) of a run, for which its data set need not be there.

    Workdirs of before `configs.CLASSES` have those of the data set's module, or numbers and VOC's colours.

    Raises:
      ConfigError: they are not those of the run's config.
    """
    names, palette = configs.load_classes(workdir)
    if not names:
        builder = datasets.builder_class(config.data.name)
        names = getattr(builder, "class_names", ()) or [f"class_{i}" for i in range(config.data.num_classes)]
        palette = builder.palette or voc_palette(len(names))
    if len(names) != config.data.num_classes:
        raise configs.ConfigError(
            f"config.data.num_classes = {config.data.num_classes}, but the run in {workdir} has {len(names)} classes "
            f"({', '.join(names)}); start without this flag"
        )
    return names, palette


def _claim(output: str, overwrite: bool) -> None:
    """Makes the output folder; DataError for one that holds something, or cannot be written."""
    folder = Path(output)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise DataError(f"--output={output}: the folder is not empty; name another one, or add --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"--output={output}: cannot be written ({error.strerror}); name another folder") from None


@contextlib.contextmanager
def _whole(path: Path):
    """A file to write that appears whole or not at all; DataError where it cannot be written."""
    partial = path.with_name(".partial")  # short: the name itself may be as long as names can be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); the files before it are whole"
        ) from None


def _label_image(labels, codes, palette):
    if codes is not None:
        return Image.fromarray(codes[labels])
    image = Image.fromarray(labels)
    image.putpalette(palette.tobytes())
    return image


def predict(
    config,
    workdir: str,
    output: str,
    images: str = "",
    split: str = "",
    which: str = "best",
    refine: str = "off",
    format_name: str = "auto",
    probabilities: bool = False,
    overlay: bool = True,
    overwrite: bool = False,
) -> dict:
    """Predicts the images of `images` (see `find_images`) or of a split of the run's data set into files in `output`.

    which, refine: of `evaluate.evaluate`.
    format_name: of `FORMATS`; "auto": of a split that of its data set, where there is one, else "palette".
    overwrite: write into a folder that is not empty; files of other names stay.

    An image that cannot be read is named in the log and left out.

    Returns:
      {"num_images", "failed": [what could not be read], "format", "step", "output"}.

    Raises:
      ConfigError, DataError, CheckpointError: before anything is computed; DataError also for a file that cannot be
        written.
    """
    configs.validate(config, batches=())
    if jax.process_count() > 1:
        raise configs.ConfigError("predictions are written by one process; start it on one host alone")
    if split:
        dataset = load_dataset(**configs.dataset_options(config))
        configs.check_classes(config, dataset.class_names)
        class_names, palette, source = dataset.class_names, dataset.palette, dataset.source(split)
        items = {f"record {i} of {split}": (None, i) for i in range(len(source))}
    else:
        class_names, palette = class_info(config, workdir)
        items = {str(file): (name, file) for name, file in find_images(images, output).items()}
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
    model, params, step = evaluate.restore_params(config, workdir, which)
    predictor = inference.Predictor(config, model, params)
    _claim(output, overwrite)
    log.info("%s checkpoint of step %d, %d images into %s", which, step, len(items), output)
    configs.save_classes(class_names, palette, output)
    failed = []

    def readable():
        for title, (name, where) in items.items():
            try:
                record = {"id": name, "image": read_image(where)} if images else source[where]
            except DataError as error:
                failed.append(title)
                log.info("error: %s", error)
            else:
                yield record["id"], record["image"]

    codes = _codes(format_name)
    colours = np.array(palette, np.uint8)
    for name, image, marginals in bar(predictor(readable()), "predict", len(items), "image"):
        log_probs = marginals.log_probs() if probabilities or refine != "off" else None
        if refine != "off":
            log_probs, _ = refinement.refine_image(log_probs, image, config.refine, refine)
        labels = marginals.labels() if log_probs is None else log_probs.argmax(-1).astype(np.uint8)
        with _whole(target(name)) as file:
            _label_image(labels, codes, colours).save(file, "PNG")
        if overlay and max(image.shape) > LARGEST_JPEG:
            log.info("%s: no overlay, as JPEG ends at %d pixels", name, LARGEST_JPEG)
        elif overlay:
            with _whole(Path(output, "overlays", f"{name}.jpg")) as file:
                mixed = Image.blend(Image.fromarray(image), Image.fromarray(colours[labels]), 0.5)
                mixed.save(file, "JPEG", quality=90)
        if probabilities:
            with _whole(Path(output, "probabilities", f"{name}.npz")) as file:
                np.savez_compressed(file, probabilities=np.exp(log_probs).astype(np.float16), class_names=class_names)
    return dict(num_images=len(items) - len(failed), failed=failed, format=format_name, step=step, output=output)
