"""Evaluators: each sees every batch of a split (`add`) and then yields (name, value) pairs (`results`).

A name is SECTION/KEY of the result of `pwcrf_jax.evaluation.evaluate.evaluate_params`, such as rows/all or nll/unary.
Those that make a row of the table put its counts into the batch, where `Rows`, which comes after them, finds them.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from pwcrf_jax import metrics
from pwcrf_jax.config import RefineSettings
from pwcrf_jax.evaluation.steps import PerImage
from pwcrf_jax.model import decode
from pwcrf_jax.model.counts import BAND_WIDTHS, confusions
from pwcrf_jax.prediction import refinement
from pwcrf_jax.prediction.predictor import Marginals, Predictor
from pwcrf_jax.runtime import parallel


@dataclasses.dataclass
class Seen:
    """A batch of this process, and what is known of it.

    Attributes:
      number: of the batch, from 0.
      batch: of `pwcrf_jax.data.eval_batches`.
      per_image: of the evaluation step, with the axis of devices.
      confusion, terms, change: as in `pwcrf_jax.evaluation.steps.Sums`, of all processes; evaluators add rows to them.
    """

    number: int
    batch: dict[str, Any]
    per_image: PerImage
    confusion: dict[str, Any]
    terms: dict[str, Any]
    change: dict[str, Any]

    def labels(self, row: str) -> np.ndarray:
        """Predicted labels of a row that the step kept, uint8 [b, H, W]."""
        return without_devices(self.per_image.rows[row].labels)

    def log_marginals(self, row: str) -> np.ndarray:
        """Log marginals of a row that the step kept, float32 [b, h, w, K]; of "convs" not normalised."""
        return without_devices(self.per_image.rows[row].log_marginals)

    def images(self) -> Iterator[tuple[int, np.ndarray]]:
        """(position in the batch, image uint8 [H, W, 3] without its padding) of all but the entries that fill it up."""
        for i, box in enumerate(self.batch["valid_box"]):
            if box[2] > box[0]:
                yield i, inside(self.batch["image"][i], box)


class Evaluator(Protocol):
    def add(self, seen: Seen) -> None: ...

    def results(self) -> Iterable[tuple[str, Any]]: ...


def inside(array: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part of a frame [H, W, ...] that a valid box [4] has."""
    top, left, bottom, right = box
    return array[top:bottom, left:right]


def without_devices(x: jax.Array) -> np.ndarray:
    """[devices, b, ...] -> NumPy [devices * b, ...]."""
    return np.asarray(x).reshape(-1, *x.shape[2:])


class Rows:
    """Metrics of all rows of the table, and the largest change of mean field in each iteration.

    order: of rows; others come after these. scored: indices of the classes that means are over, None: all.
    """

    def __init__(self, order: Iterable[str], class_names: Iterable[str], scored: list[int] | None):
        self._order, self._class_names, self._scored = list(order), list(class_names), scored
        self._confusion: dict[str, np.ndarray] = {}
        self._change: dict[str, np.ndarray] = {}

    def add(self, seen: Seen) -> None:
        for row, counts in seen.confusion.items():
            self._confusion[row] = self._confusion.get(row, 0) + np.asarray(counts, np.int64)
        for row, largest in seen.change.items():
            self._change[row] = np.maximum(self._change.get(row, 0.0), np.asarray(largest))

    def results(self) -> Iterator[tuple[str, Any]]:
        for row in dict.fromkeys([*self._order, *self._confusion]):
            yield f"rows/{row}", figures(self._confusion[row], self._class_names, self._scored)
        for row, largest in self._change.items():
            yield f"change/{row}", [float(x) for x in largest]


class Terms:
    """Negative log-likelihood of every kind of factor, by its own count; None where there is none."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = collections.defaultdict(float)

    def add(self, seen: Seen) -> None:
        for name, (total, count) in seen.terms.items():
            self._sums[name] = self._sums[name] + np.array([total, count], np.float64)

    def results(self) -> Iterator[tuple[str, Any]]:
        for name, (total, count) in self._sums.items():
            yield f"nll/{name}", float(-total / count) if count else None


class Refined:
    """The row "refined": marginals of a row that the step keeps, refined by the dense CRF, an image on each device.

    settings: of `pwcrf_jax.config.refine_settings`.
    """

    def __init__(self, row: str, settings: RefineSettings):
        self._row, self._settings = row, settings

    def add(self, seen: Seen) -> None:
        log_marginals = seen.log_marginals(self._row)
        counts, change = refinement.refine_batch(log_marginals, seen.batch, self._settings)
        seen.confusion["refined"] = parallel.sum_over_hosts(counts)
        seen.change["refined"] = change

    def results(self) -> tuple:
        return ()


class ImageByImage:
    """Rows made of one image after the other: "tta" of a predictor's views and "refined" on top, of settings.

    predictor: whose marginals are taken; None: those of `row`, which the step keeps, and there is no row "tta".
    settings: of `Refined`; None: no row "refined".
    watch: called with (position in the batch, row, log-probabilities float32 [H, W, K]) of each row of each image.
    scores: the predictor's `pwcrf_jax.data.given_scores.ScoreFiles`, of a model that is given scores.
    """

    def __init__(
        self,
        predictor: Predictor | None,
        row: str,
        settings: RefineSettings | None,
        watch: Callable[[int, str, np.ndarray], None] | None = None,
        scores: Callable[[str, tuple[int, int]], np.ndarray] | None = None,
    ):
        self._predictor, self._row, self._settings, self._watch = predictor, row, settings, watch
        self._scores = scores

    def add(self, seen: Seen) -> None:
        change = np.zeros(self._settings.num_iterations if self._settings else 0, np.float32)
        rows = ["tta"] * bool(self._predictor) + ["refined"] * bool(self._settings)
        num_classes = next(iter(seen.confusion.values())).shape[-1]
        counts = {row: np.zeros((1 + len(BAND_WIDTHS), num_classes, num_classes), np.int32) for row in rows}
        for i, image, marginals in self._marginals(seen):
            labels, largest = self._labels(i, image, marginals)
            change = np.maximum(change, largest)
            for row in rows:
                counts[row] += counted(labels[row], seen.batch["label"][i], seen.batch["valid_box"][i], num_classes)
        seen.confusion |= {row: parallel.sum_over_hosts(x) for row, x in counts.items()}
        seen.change |= {"refined": change} if self._settings else {}

    def _marginals(self, seen):
        """(position in the batch, image, `Marginals`) of each image."""
        if self._predictor:
            read, ids = self._scores, seen.batch["id"]
            given = lambda i, image: (read(ids[i], image.shape[:2]),) if read else ()
            yield from self._predictor((i, image, *given(i, image)) for i, image in seen.images())
            return
        log_marginals, size = seen.log_marginals(self._row), seen.batch["label"].shape[1:]
        for i, image in seen.images():
            yield i, image, Marginals.of_frame(log_marginals[i], seen.batch["valid_box"][i], size)

    def _labels(self, i, image, marginals):
        """({row: labels [H, W]} of an image, the change in each iteration of its refinement)."""
        labels, largest = {}, np.float32(0)
        log_probs = marginals.log_probs() if self._watch or self._settings else None
        if self._predictor:
            labels["tta"] = marginals.labels()
            self._shown(i, "tta", log_probs)
        if self._settings:
            log_probs, largest = refinement.refine_image(log_probs, image, self._settings)
            labels["refined"] = log_probs.argmax(-1)
            self._shown(i, "refined", log_probs)
        return labels, largest

    def _shown(self, i, row, log_probs):
        if self._watch:
            self._watch(i, row, log_probs)

    def results(self) -> tuple:
        return ()


def counted(labels: np.ndarray, truth: np.ndarray, box: np.ndarray, num_classes: int) -> np.ndarray:
    """`confusions` of one image whose truth [H, W] lies in a frame, by one program for images of all sizes."""
    framed = np.zeros_like(truth)
    inside(framed, box)[:] = labels
    return np.asarray(_confusions(framed, truth, box, num_classes))


@functools.partial(jax.jit, static_argnums=3)
def _confusions(labels, truth, box, num_classes):
    return confusions(labels, truth, decode.grid_mask(box[None], truth.shape, truth.shape)[0], num_classes)


def mean_iou(confusion, scored: list[int] | None) -> float | None:
    """Mean IoU over the classes that are scored (indices; None: all). None where the truth has no pixel of any."""
    found = metrics.scores(confusion, scored)
    return None if math.isnan(found.mean_accuracy) else found.mean_iou


def figures(counts: np.ndarray, class_names: list[str], scored: list[int] | None) -> dict[str, Any]:
    """A row of the table, plain numbers, None where nothing gives one; counts [1 + bands, K, K] of `confusions`."""
    none = lambda x: None if math.isnan(x) else float(x)
    whole = metrics.scores(counts[0], scored)
    miou, *bands = (mean_iou(confusion, scored) for confusion in counts)
    return dict(
        miou=miou,
        pixel_accuracy=none(whole.pixel_accuracy),
        mean_accuracy=none(whole.mean_accuracy),
        fw_iou=none(whole.frequency_weighted_iou),
        boundary_iou=dict(zip(map(str, BAND_WIDTHS), bands, strict=True)),
        iou={name: none(x) for name, x in zip(class_names, whole.iou_per_class, strict=True)},
    )
