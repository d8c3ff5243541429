"""Scores that another network gave to the images of a data set, on the cells that a model has of an image.

A file of scores (`pwcrf_jax.data.scores`) covers its image evenly, whatever its stride. So where an image goes, its
scores go: a place in the image is told in shares of its height and width, 0 to 1, and asks nothing of pixels.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pwcrf_jax.data import scores
from pwcrf_jax.data.prepare import Dataset
from pwcrf_jax.data.readers.image_io import VOID, DataError

Span = tuple[float, float]
"""First and last edge of what is shown of an image, in shares of its height or width; may lie beyond 0 and 1, and is
the other way round where the image is mirrored."""

LOOKED_AT = 40  # images of a split, evenly over it, that `accuracy` reads
FAR_ABOVE = 0.05  # of pixels; by so much accuracy on seen images may lie above that on others


@dataclasses.dataclass(frozen=True)
class ScoreFiles:
    """The files of scores of a folder; `files(name, size)` reads one.

    Attributes:
      folder, num_classes, layout, kind, confidence: as `pwcrf_jax.data.scores` has them.
      found: {name: file}.
    """

    folder: str
    num_classes: int
    layout: str = "auto"
    kind: str = "auto"
    confidence: float = 0.0
    found: dict[str, Path] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.folder:
            raise DataError("data.scores.dir: is empty; with model.unary = 'scores' it names the folder of the scores")
        object.__setattr__(self, "found", self._named(scores.find, self.folder))

    def __call__(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """Log-probabilities float32 [h, w, K] of an image of this name and size (height, width).

        Raises:
          DataError: there are none, or none of this form.
        """
        self.check({name: size})
        return self._named(self._read, self.found[name], size)

    def _read(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        if path.suffix.lower() == ".png":
            return scores.read(path, num_classes=self.num_classes, confidence=self.confidence)
        values = scores.read_values(path, self.layout, self.num_classes, size=size)
        if self.kind == "auto":
            scores.check_kind(values, self._kind_of_first, path)
        return scores.log_probabilities(values, self._kind_of_first, path)

    @functools.cached_property
    def _kind_of_first(self) -> str:
        """The kind of all files, by the first of them: one alone may look like another kind by chance."""
        first = next(iter(self.found.values()))
        if self.kind != "auto":
            return self.kind
        return scores.kind_of(scores.read_values(first, self.layout, self.num_classes), first)

    def check(self, sizes: dict[str, tuple[int, int]]) -> None:
        """DataError where images {name: (height, width)} have no scores, or by their headers not such scores."""
        missing = [name for name in sizes if name not in self.found]
        if missing:
            more = f", and {len(missing) - 1} more images have none" if len(missing) > 1 else ""
            raise DataError(
                f"data.scores.dir = {self.folder}: holds no scores of image {missing[0]!r}{more}; write one file an "
                f"image by the image's name, {missing[0]}.npy, or name another folder"
            )
        self._named(scores.form, {name: self.found[name] for name in sizes}, sizes, self.layout, self.num_classes)

    def check_split(self, dataset: Dataset, split: str) -> None:
        """`check` of all images of a split."""
        source = dataset.source(split)
        self.check({source.id(i): source.image_size(i) for i in range(len(source))})

    def _named(self, function: Any, *given: Any, **options: Any) -> Any:
        """function(*given); where an error names flags, with the keys that a config has for them."""
        try:
            return function(*given, **options)
        except scores.ScoresError as error:
            keys = "; in a config these are data.scores.layout and data.scores.kind" * ("--" in str(error))
            raise DataError(f"{error}{keys}") from None


class GivenScores(NamedTuple):
    """The files, and the grid (h, w) that covers a frame of images, on which a batch has them."""

    files: ScoreFiles
    grid: tuple[int, int]

    def shown(self, name: str, size: tuple[int, int], rows: Span, cols: Span) -> np.ndarray:
        """`on_grid` of the scores of an image of this name and size."""
        return on_grid(self.files(name, size), self.grid, rows, cols)

    def empty(self) -> np.ndarray:
        """Scores of a frame without an image."""
        return np.full((*self.grid, self.files.num_classes), -np.log(self.files.num_classes), np.float32)


def on_grid(log_probs: np.ndarray, grid: tuple[int, int], rows: Span, cols: Span) -> np.ndarray:
    """Scores of an image on the cells of a frame that shows it.

    A cell has the mean of the probabilities in it; on a finer grid than theirs log-probabilities are interpolated, as
    for labels of pixels.

    Args:
      log_probs: float32 [h, w, K] of a whole image.
      grid: cells of the frame, which covers rows and cols of the image.

    Returns:
      Log-probabilities float32 [*grid, K]; uniform where a cell lies beside the image.
    """
    num_classes = log_probs.shape[-1]
    down, across = (
        _weights(*span, cells, n) for span, cells, n in zip((rows, cols), grid, log_probs.shape[:2], strict=True)
    )
    used = [np.flatnonzero(weights.any(0)) for weights in (down, across)]
    if not (used[0].size and used[1].size):
        return np.full((*grid, num_classes), -np.log(num_classes), np.float32)
    y, x = (slice(at[0], at[-1] + 1) for at in used)
    sides = zip((rows, cols), grid, log_probs.shape[:2], strict=True)
    finer = all(abs(last - first) * n <= cells for (first, last), cells, n in sides)
    values = log_probs[y, x] if finer else np.exp(log_probs[y, x])
    height, width = values.shape[:2]
    mean = (down[:, y] @ values.reshape(height, -1)).reshape(grid[0], width, num_classes)
    mean = across[:, x] @ mean
    if not finer:
        beside = ~mean.any(-1, keepdims=True)
        mean = np.log(np.maximum(np.where(beside, 1.0, mean), np.finfo(np.float32).tiny))
    mean -= mean.max(-1, keepdims=True)
    return mean - np.log(np.exp(mean).sum(-1, keepdims=True))


def _weights(first: float, last: float, cells: int, source: int) -> np.ndarray:
    """Shares of the source's rows in each cell, float32 [cells, source]: sums are 1, or 0 beside the source.

    A cell is as wide as its own width or one row, whichever is more: a mean, or else linear interpolation; on the
    source's own grid it is that row.
    """
    edges = np.linspace(first * source, last * source, cells + 1)
    centres, half = (edges[:-1] + edges[1:]) / 2, max(abs(edges[1] - edges[0]), 1) / 2
    low, high, row = (centres - half)[:, None], (centres + half)[:, None], np.arange(source)
    overlap = np.clip(np.minimum(high, row + 1) - np.maximum(low, row), 0, None)
    overlap[overlap < 1e-6] = 0  # by rounding of edges
    return (overlap / np.maximum(overlap.sum(1, keepdims=True), 1e-9)).astype(np.float32)


def accuracy(dataset: Dataset, split: str, files: ScoreFiles) -> tuple[float, int]:
    """(share of pixels at the centres of the scores' cells that the scores have right, images) of some of a split."""
    source, right, count = dataset.source(split), 0, 0
    chosen = range(0, len(source), -(-len(source) // LOOKED_AT))
    for i in chosen:
        sample = source.open(i)
        label = sample["label"]
        found = files(sample["id"], label.shape).argmax(-1)
        at = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(found.shape, label.shape, strict=True))
        truth = label[np.ix_(*at)]
        right, count = right + int((found == truth).sum()), count + int((truth != VOID).sum())
    return right / max(count, 1), len(chosen)


def compared(dataset: Dataset, train: str, held_out: str, files: ScoreFiles) -> tuple[str, tuple[str, ...]]:
    """(pixel accuracies of the scores on two splits in words, a warning or none).

    It warns of scores of images that their network was trained on.

    Raises:
      DataError: of `ScoreFiles.check_split`.
    """
    for split in (train, held_out):
        files.check_split(dataset, split)
    (seen, some), (other, others) = (accuracy(dataset, split, files) for split in (train, held_out))
    told = f"{100 * seen:.1f} % on {some} images of {train!r}, {100 * other:.1f} % on {others} of {held_out!r}"
    warning = (
        "scores are much better on training images than on held-out ones: their network has seen those, and relations "
        "trained on them learn to change nothing; take scores of images that it has not seen, such as by folds "
        "(docs/relations-on-scores.md)"
    )
    return f"pixel accuracy of the scores: {told}", (warning,) * (seen - other > FAR_ABOVE)
