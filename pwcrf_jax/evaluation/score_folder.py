"""The dense CRF on a folder of scores against masks: its parameters chosen, and the table before and after it."""

import hashlib
import json
import math
import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from pwcrf_jax import dense_crf
from pwcrf_jax.config import ConfigError, RefineSettings
from pwcrf_jax.data import DataError, coded_masks
from pwcrf_jax.data.readers.files import read_image_file
from pwcrf_jax.data.readers.image_io import VOID, decode_label
from pwcrf_jax.evaluation import evaluators, intervals, kernel_search
from pwcrf_jax.prediction import crf_folder, refinement, score_folder
from pwcrf_jax.prediction.score_folder import Folder, Item
from pwcrf_jax.runtime import files
from pwcrf_jax.runtime.logs import bar, log

ROWS = ("scores", "crf")
"""Rows of the table: the scores as they are, and after the dense CRF."""
PARAMETERS, EVALUATION, _NOTES = "parameters.json", "evaluation.json", "tuning"  # in an output


def divide(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """(images to choose parameters on, the others): a share of them, those whose names have the least SHA-256.

    So one more image moves at most one other, and the order of the names says nothing.

    Raises:
      ConfigError: one of the two would be empty, though share is below 1.
    """
    order = sorted(items, key=lambda item: hashlib.sha256(item.name.encode()).hexdigest())
    number = math.ceil(share * len(order))
    if not number or (share < 1 and number == len(order)):
        raise ConfigError(
            f"--tune_share={share:g}: of {len(order)} images with a mask it leaves "
            f"{len(order) - number} to report and {number} to choose parameters on; add masks, or name another share"
        )
    chosen = {item.name for item in order[:number]}
    return [x for x in items if x.name in chosen], [x for x in items if x.name not in chosen]


def tuning_question(items: Sequence[Item], share: float, trials: int, classes: Sequence[str]) -> dict[str, Any]:
    """What decides the parameters that `tune` chooses beside settings and scores, as JSON has it.

    share, trials: of `divide` and `tune`. classes: names of those that means are over; none: all.
    """
    stamps = json.dumps([[item.name, item.stamp(masked=True)] for item in items])
    files_of = hashlib.sha256(stamps.encode()).hexdigest()[:16]
    return dict(share=share, trials=trials, classes=list(classes), images=len(items), files=files_of)


def tune(
    folder: Folder,
    items: Sequence[Item],
    settings: RefineSettings,
    output: str,
    trials: int,
    *,
    asked: dict[str, Any],
    scored: list[int] | None,
) -> tuple[RefineSettings, dict[str, Any]]:
    """Chooses the parameters of both kernels by mean IoU on some images, and writes them to OUTPUT/parameters.json.

    Args:
      items: images with a mask, which are never to be reported.
      settings: where the search starts.
      output: claimed; every trial is written down there, so that a search that was stopped goes on.
      trials: at most.
      asked: of `crf_folder.question`; another one starts another search.
      scored: indices of the classes that means are over; None: all.

    Returns:
      (the best settings, what was written).

    Raises:
      DataError: a file cannot be used, or no mask has a pixel of a class.
    """
    about = {key: value for key, value in asked.items() if key not in ("palette", "probabilities")}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    notes = os.path.join(output, _NOTES, digest)
    files.make_folder(notes, inside=output)
    table = coded_masks.table_of(folder.coding)
    before = _mean_iou(_count(folder, items, table, None, "scores"), items, scored)
    log.info("mean IoU of the scores on the %d images that parameters are chosen on: %.2f", len(items), 100 * before)
    names = kernel_search.searched("full")
    found = kernel_search.Trials(os.path.join(notes, "refine-full.jsonl"), names)
    score = lambda tried, what: _mean_iou(_count(folder, items, table, tried, what), items, scored)
    best, after = kernel_search.search(score, settings, found, "full", trials)
    if after < before + kernel_search.WORTH:
        log.info("no parameters that were tried gain anything on these images")
    chosen = best.params._asdict()
    result = dict(
        config={f"refine.{name}": value for name, value in chosen.items()}
        | {"refine.num_iterations": best.num_iterations},
        images={item.name: score_folder.image_digest(item) for item in items},
        trials=trials,
        miou_scores=before,
        miou_crf=after,
    )
    path = os.path.join(output, PARAMETERS)
    files.write_json(path, result)
    log.info("mean IoU on these images %.2f after the CRF with %s; wrote %s", 100 * after,
             kernel_search.named(names, [chosen[name] for name in names]), path)  # fmt: skip
    return best, result


def _count(folder, items, table, settings, what):
    """Confusion matrix int64 [K, K] of images, refined with settings; None: of the scores."""
    total = np.zeros((folder.num_classes, folder.num_classes), np.int64)
    for item, *read in bar(crf_folder.ahead(folder, items), what, len(items), "image"):
        if isinstance(read[0], DataError):
            raise read[0]
        image, log_probs = read
        if settings is not None:
            log_probs, _ = refinement.refine_image(log_probs, image, settings)
        total += confusion(log_probs.argmax(-1), folder.read_mask(item, table), folder.num_classes)
    return total


def confusion(labels: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [K, K], rows true classes, of labels and truth [H, W], whose void pixels count for nothing."""
    index = truth.astype(np.int64) * num_classes + labels
    return np.bincount(index[truth != VOID], minlength=num_classes**2).reshape(num_classes, num_classes)


def _mean_iou(counts: np.ndarray, items: Sequence[Item], scored: list[int] | None) -> float:
    found = evaluators.mean_iou(counts, scored)
    if found is None:
        raise DataError(
            f"{items[0].mask}: neither this mask nor the other {len(items) - 1} has a pixel that is not void"
        )
    return found


def unseen(items: Sequence[Item], tuned: dict[str, str]) -> list[Item]:
    """Those of the images that parameters were not chosen on; tuned: {name: SHA-256 of the image} of a file of them.

    Raises:
      ConfigError: none is left.
    """
    digests = set(tuned.values())
    left = [item for item in items if not digests or score_folder.image_digest(item) not in digests]
    if len(left) < len(items):
        log.info("%d of %d images with a mask are those that --parameters were chosen on: they are not reported",
                 len(items) - len(left), len(items))  # fmt: skip
    if not left:
        raise ConfigError("--parameters were chosen on all images with a mask, so none is left to report; add others")
    return left


def evaluate(
    folder: Folder, items: Sequence[Item], output: str, failed: Collection[str], scored: list[int] | None
) -> dict[str, Any]:
    """Scores the label files of an output, and the scores that they were made of, against masks.

    Args:
      items: images with a mask.
      failed: names of images without results.
      scored: indices of the classes that means are over; None: all.

    Returns:
      {"num_images", "classes", "rows": {row of `ROWS`: figures of `evaluators.figures`}, "intervals": of
      `intervals.paired`, in plain lists}, also written to OUTPUT/evaluation.json.

    Raises:
      DataError: a mask cannot be used.
    """
    items = [item for item in items if item.name not in failed]
    if not items:
        raise DataError("none of the images with a mask could be read, so there is nothing to report")
    table, per_image = coded_masks.table_of(folder.coding), []
    total = {row: np.zeros((1 + len(evaluators.BAND_WIDTHS), *(folder.num_classes,) * 2), np.int64) for row in ROWS}
    for item, *read in bar(crf_folder.ahead(folder, items), "evaluate", len(items), "image"):
        if isinstance(read[0], DataError):
            raise read[0]
        truth = folder.read_mask(item, table)
        path = crf_folder.label_file(output, item.name)
        both = read[1].argmax(-1).astype(np.uint8), decode_label(read_image_file(path), str(path))
        counts = [_counted(labels, truth, folder.num_classes) for labels in both]
        for row, added in zip(ROWS, counts, strict=True):
            total[row] += added
        per_image.append([intervals.reduced(added[0]) for added in counts])
    _mean_iou(total["scores"][0], items, scored)
    before, after = np.moveaxis(np.array(per_image), 1, 0)
    found = intervals.paired(before, after, scored)
    names = list(folder.class_names)
    result = dict(
        split="the images reported",
        num_images=len(items),
        classes=[] if scored is None else [names[k] for k in scored],
        rows={row: evaluators.figures(counts, names, scored) for row, counts in total.items()},
        intervals={name: {key: list(x) for key, x in rows.items()} for name, rows in found.items()},
    )
    files.write_json(os.path.join(output, EVALUATION), result)
    return result


def _counted(labels: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """`evaluators.counted` in a frame of the dense CRF, so that images of many sizes share few programs."""
    height, width = truth.shape
    framed = np.full([dense_crf.frame_side(side) for side in truth.shape], VOID, np.uint8)
    framed[:height, :width] = truth
    return evaluators.counted(labels, framed, np.array([0, 0, height, width], np.int32), num_classes)


def verdict(result: dict[str, Any], tuned: bool) -> str:
    """What the table says of the CRF, in plain words; tuned: its parameters were chosen on images like these."""
    number = result["num_images"]
    value, low, high = (100 * x for x in result["intervals"]["miou"]["gain"])
    shown = f"{value:+.2f} points of mean IoU [{low:+.2f}, {high:+.2f}], 95 % over {number} images"
    if number < 2:
        return f"One image has no interval: {value:+.2f} points of mean IoU on it say nothing of others."
    if low > 0:
        return f"The CRF gains {shown}."
    advice = "keep the scores as they are" if tuned else "keep the scores as they are, or choose parameters with --tune"
    if high < 0:
        return f"The CRF makes these labels worse: {shown}; {advice}."
    return f"The CRF gains nothing that these images show: {shown}, an interval that covers 0; {advice}."


def interval_lines(result: dict[str, Any]) -> str:
    """Figures of the table with their intervals, a line each."""
    lines = []
    for name, title in (("miou", "mean IoU"), ("pixel_accuracy", "pixel accuracy")):
        rows = result["intervals"][name]
        shown = [
            f"{key} {100 * value:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
            for key, (value, low, high) in ((key, rows[key]) for key in ("before", "after"))
        ]
        value, low, high = (100 * x for x in rows["gain"])
        lines.append(f"{title}: {', '.join(shown)}, gain {value:+.2f} [{low:+.2f}, {high:+.2f}]")
    return "\n".join(lines)
