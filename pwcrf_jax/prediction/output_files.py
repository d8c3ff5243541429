"""Files of predictions below an output folder, which is claimed first: labels, overlays, and what was left out."""

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from pwcrf_jax.data import DataError
from pwcrf_jax.prediction import image_files
from pwcrf_jax.prediction.image_files import shown
from pwcrf_jax.runtime import files
from pwcrf_jax.runtime.logs import log

LARGEST_JPEG = 65_500
TOLD = 20
"""Lines about files that are no images."""


def claim(output: str, overwrite: bool, besides: Collection[str] = ()) -> None:
    """Makes the output folder, and clears what writers that were killed left there.

    overwrite: it may hold something.
    besides: names that it may hold in any case.

    Raises:
      DataError, FileError: it holds something, or cannot be written.
    """
    taken = f"--output={shown(output)}: the folder is not empty; name another one, or add --overwrite"
    folder = Path(output)
    if files.is_url(output):
        if not overwrite and any(name not in besides for name in files.names(output)):
            raise DataError(taken)
        files.make_folder(output)
        files.delete_unfinished(output)
        return
    try:
        if folder.is_dir() and any(path.name not in besides for path in folder.iterdir()) and not overwrite:
            raise DataError(taken)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(
            f"--output={shown(output)}: cannot be written ({error.strerror or error}); name another folder"
        ) from None
    files.delete_unfinished(output)
    for name in image_files.WRITTEN:
        files.check_folder(folder / name, inside=output)
        for place, _, _ in os.walk(folder / name):
            files.delete_unfinished(place)


@contextlib.contextmanager
def writing(path: files.StrPath, output: str) -> Iterator[IO[bytes]]:
    """A file to write below `output`, that appears whole or not at all; FileError where it cannot be written."""
    files.make_folder(os.path.dirname(path), inside=output)
    with files.replacing(path) as file:
        yield file


def write_labels(
    path: files.StrPath, labels: np.ndarray, palette: np.ndarray, output: str, codes: np.ndarray | None = None
) -> None:
    """Writes labels uint8 [H, W] as a palette PNG, or as grey values.

    palette: uint8 [K, 3].
    codes: uint8 [K], what is written for each class, then without palette; None: the class itself.
    """
    image = Image.fromarray(labels if codes is None else codes[labels])
    if codes is None:
        image.putpalette(palette.tobytes())
    with writing(path, output) as file:
        image.save(file, "PNG")


def write_overlay(name: str, image: np.ndarray, labels: np.ndarray, palette: np.ndarray, output: str) -> None:
    """Writes OUTPUT/overlays/NAME.jpg, the colours of the labels over the image; the log says where JPEG cannot."""
    if max(image.shape) > LARGEST_JPEG:
        log.info("%s: no overlay, as JPEG ends at %d pixels", name, LARGEST_JPEG)
        return
    with writing(os.path.join(output, "overlays", f"{name}.jpg"), output) as file:
        mixed = Image.blend(Image.fromarray(image), Image.fromarray(palette[labels]), 0.5)
        mixed.save(file, "JPEG", quality=90)


def tell(found: image_files.Found) -> None:
    """Says which images are not predicted, and what else was left out."""
    for why in found.failed.values():
        log.info("error: %s", shown(why))
    for path, why in list(found.left_out.items())[:TOLD]:
        log.info("left out: %s: %s", shown(path), why)
    if len(found.left_out) > TOLD:
        log.info("left out: %d more, no images or seen under another name", len(found.left_out) - TOLD)
