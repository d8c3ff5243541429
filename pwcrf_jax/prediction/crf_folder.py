"""The dense CRF on a folder of scores, into files: `pwcrf crf`.

For each image, DIR holds

    labels/NAME.png          the class of each pixel, as a palette image of the image's own size
    overlays/NAME.jpg        on demand: the same colours over the image
    probabilities/NAME.npy   on demand: probabilities [H, W, K]

and `classes.json`, names and colours of the classes, `crf.json`, what the files were made with, and `done.jsonl`, a
line an image. A run that was stopped goes on: an image is done where its line is there, its files are, and what they
were made of has not changed since.
"""

import collections
import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pwcrf_jax import config as configs
from pwcrf_jax.config import ConfigError, RefineSettings
from pwcrf_jax.data import DataError
from pwcrf_jax.prediction import image_files, output_files, refinement
from pwcrf_jax.prediction.image_files import shown
from pwcrf_jax.prediction.predict import Targets
from pwcrf_jax.prediction.score_folder import Folder, Item
from pwcrf_jax.runtime import files, lock
from pwcrf_jax.runtime.logs import OTHER_SHAPE, bar, log

RECORD, DONE = "crf.json", "done.jsonl"
PRECISIONS = ("float16", "float32")
_AHEAD = 2  # images that are read while others are refined


class Wanted(NamedTuple):
    """Files beside the labels: overlays, and probabilities in one of `PRECISIONS` ("": none)."""

    overlays: bool = False
    probabilities: str = ""


def question(folder: Folder, settings: RefineSettings, wanted: Wanted, tuning: Any) -> dict[str, Any]:
    """What decides the files of an output, as JSON has it. An empty text leaves its key open.

    settings: of the dense CRF; with tuning those that it starts from.
    tuning: what decides that; None: there is none.
    """
    about = dict(
        iterations=settings.num_iterations,
        **settings.params._asdict(),
        layout=folder.layout,
        kind=folder.kind,
        confidence=folder.confidence,
        classes=list(folder.class_names),
        palette=[list(map(int, colour)) for colour in folder.palette],
        tuning=tuning,
        probabilities=wanted.probabilities,
    )
    return json.loads(json.dumps(about))


@contextlib.contextmanager
def claimed(output: str, asked: Mapping[str, Any], overwrite: bool) -> Iterator[None]:
    """Holds the output folder for this process; what it has of the same `question` stays.

    overwrite: whatever it holds, all is made again.

    Raises:
      DataError, FileError: it holds something else, or cannot be written.
      ConfigError: another process writes there, or it was made with other settings.
    """
    path = os.path.join(output, RECORD)
    known = _record(path)
    if known is not None and not overwrite:
        for key, value in asked.items():
            if known.get(key) != value and "" not in (known.get(key), value):
                raise ConfigError(
                    f"--output={output}: was made with {key} = {_brief(known.get(key))}, now {_brief(value)}; name "
                    "another folder, or add --overwrite"
                )
    output_files.claim(output, overwrite or known is not None, besides=(lock.WRITING.file,))
    with lock.held(output, lock.WRITING):
        if overwrite:
            files.write(os.path.join(output, DONE), "")
        before = known if known and not overwrite else {}
        files.write_json(path, {key: before.get(key, "") if value == "" else value for key, value in asked.items()})
        yield


def _record(path: str) -> dict[str, Any] | None:
    def check(content: Any) -> dict[str, Any]:
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content

    try:
        return files.read_json(path, "delete it, or name another --output", check)
    except FileNotFoundError:
        return None


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:56]} ..."


class _Done:
    """Which images are done, by their names and the stamps of what they were made of."""

    def __init__(self, output: str):
        self._path = os.path.join(output, DONE)
        self._stamps: dict[str, Any] = {}
        for line in files.read_lines(self._path):
            with contextlib.suppress(*OTHER_SHAPE):  # a line that was cut off: that image is done again
                about = json.loads(line)
                self._stamps[about["name"]] = about["stamp"]

    def __contains__(self, item: Item) -> bool:
        return self._stamps.get(item.name) == item.stamp()

    def add(self, item: Item) -> None:
        line = json.dumps({"name": item.name, "stamp": item.stamp()})
        with files.naming(self._path, "cannot be written"), files.append(self._path) as file:
            file.write(f"{line}\n".encode())


def ahead(
    folder: Folder, items: Iterable[Item]
) -> Iterator[tuple[Item, np.ndarray, np.ndarray] | tuple[Item, DataError]]:
    """(item, image, log-probabilities) of each, or (item, why it cannot be read); the next are read meanwhile."""
    waiting: collections.deque = collections.deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(folder.read, item)))
                if len(waiting) > _AHEAD:
                    yield _taken(*waiting.popleft())
            while waiting:
                yield _taken(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _taken(item, future):
    try:
        return item, *future.result()
    except DataError as error:
        return item, error


def refine_folder(folder: Folder, settings: RefineSettings, output: str, wanted: Wanted) -> list[str]:
    """Refines each image that is not done yet, and writes its files; `claimed` is held meanwhile.

    Returns:
      Names of the images that could not be read; the log says why.

    Raises:
      FileError: a file cannot be written; those before it are whole.
    """
    target, done, failed = Targets(output, "palette"), _Done(output), []
    there = lambda item: all(map(os.path.exists, _paths(target, output, item, wanted)))
    left = [item for item in folder.items.values() if item not in done or not there(item)]
    if len(left) < len(folder.items):
        log.info("%d of %d images are done already", len(folder.items) - len(left), len(folder.items))
    configs.save_classes(folder.class_names, folder.palette, output)
    palette = np.array(folder.palette, np.uint8)
    for item, *read in bar(ahead(folder, left), "refine", len(left), "image"):
        if isinstance(read[0], DataError):
            failed.append(item.name)
            log.info("error: %s", shown(read[0]))
            continue
        image, log_probs = read
        log_probs, _ = refinement.refine_image(log_probs, image, settings)
        labels = log_probs.argmax(-1).astype(np.uint8)
        if wanted.probabilities:
            with output_files.writing(Path(output, "probabilities", f"{item.name}.npy"), output) as file:
                np.save(file, np.exp(log_probs).astype(wanted.probabilities))
        if wanted.overlays:
            output_files.write_overlay(item.name, image, labels, palette, output)
        output_files.write_labels(target(item.name), labels, palette, output)
        done.add(item)
    return failed


def _paths(target: Targets, output: str, item: Item, wanted: Wanted) -> list[Path]:
    """Files that an image has once it is done."""
    overlay = wanted.overlays and max(item.size) <= output_files.LARGEST_JPEG
    paths = [Path(target(item.name)), *[Path(output, "overlays", f"{item.name}.jpg")] * overlay]
    return paths + [Path(output, "probabilities", f"{item.name}.npy")] * bool(wanted.probabilities)


def label_file(output: str, name: str) -> Path:
    """Where the labels of an image lie."""
    return Path(output, image_files.WRITTEN[0], f"{name}.png")
