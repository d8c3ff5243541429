"""Batches for training and evaluation, read and augmented by Grain threads.

What sample number g of a run is depends on (seed, g) alone: the order comes from Grain's per-epoch
shuffle and the augmentation from its own generator. Threads, processes, hosts and resuming therefore change
nothing, and the position in the data is one integer.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from pwcrf_jax.data import augment
from pwcrf_jax.data.given_scores import GivenScores
from pwcrf_jax.data.prepare import Dataset, Source
from pwcrf_jax.data.readers.image_io import MEAN_COLOUR, VOID, DataError
from pwcrf_jax.data.workers import Workers

_ENDLESS = 2**60  # length of the training stream


class _TrainView:
    """Position p of this host -> augmented sample; every host sees its part of each global batch."""

    def __init__(self, order: Any, source: Source, host: int, batch_size: int, local: int, augmented: Any):
        self._order, self._source, self._augmented = order, source, augmented
        self._host, self._batch_size, self._local = host, batch_size, local

    def __len__(self) -> int:
        return _ENDLESS // self._batch_size * self._local

    def __getitem__(self, p: int) -> dict[str, Any]:
        g = p // self._local * self._batch_size + self._host * self._local + p % self._local
        return self._augmented(self._source.open(self._order[g]), g)


class _Augment:
    """Random scale, flip and crop of sample number g; image, label and scores go through the same geometry.

    Only the crop is made: it is found in the scaled image first, and resized from the part of the original it shows.
    Before that comes a function of the user's own, after it the jitter of colours.
    """

    def __init__(
        self,
        crop_size: Any,
        scale_range: Any,
        flip: bool,
        seed: int,
        pad_value: Any,
        *,
        strengths: augment.Strengths = (0.0, 0.0, 0.0, 0.0),
        custom: augment.Custom | None = None,
        scores: GivenScores | None = None,
    ):
        self._strengths, self._custom, self._scores = strengths, custom, scores
        self._crop_size, self._scale_range, self._flip = crop_size, scale_range, flip
        self._seed = seed
        self._padding = np.full((*crop_size, 3), pad_value, np.uint8)

    def __call__(self, sample: dict[str, Any], g: int) -> dict[str, Any]:
        rng = np.random.default_rng([self._seed, g])
        image, label = sample["image"], sample["label"]
        if self._custom:
            # A generator of its own: what it draws changes neither scale nor crop.
            own = np.random.default_rng([self._seed, g, 1])
            pixels, label = self._custom(np.array(image), np.array(label), own, sample["id"])
            image = Image.fromarray(pixels)
        scale = rng.uniform(*self._scale_range)
        mirrored = rng.random() < 0.5
        shape = [max(1, round(n * scale)) for n in label.shape]
        # `extra` pixels too many are cropped away, too few are padded; either way at a random offset.
        extra = (n - c for n, c in zip(shape, self._crop_size, strict=True))
        offsets = [int(np.sign(e)) * int(rng.integers(abs(e) + 1)) for e in extra]
        axes = list(zip(offsets, self._crop_size, shape, label.shape, strict=True))
        # Rows and columns of the scaled image that the crop shows, and where in the crop they come to lie.
        (y0, y1), (x0, x1) = shown = [(max(at, 0), min(at + c, n)) for at, c, n, _ in axes]
        rows, cols = (slice(a - at, b - at) for (a, b), (at, _, _, _) in zip(shown, axes, strict=True))
        if flipped := self._flip and mirrored:
            x0, x1 = shape[1] - x1, shape[1] - x0
        dy, dx = (source / n for _, _, n, source in axes)
        image = image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, (x0 * dx, y0 * dy, x1 * dx, y1 * dy))
        nearest_y, nearest_x = (
            ((np.arange(*span) + 0.5) * d).astype(int) for span, d in (((y0, y1), dy), ((x0, x1), dx))
        )
        if flipped:
            image, nearest_x = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), nearest_x[::-1]
        out_image, out_label = self._padding.copy(), np.full(self._crop_size, VOID, np.uint8)
        shows = np.asarray(image)
        out_image[rows, cols] = augment.jitter(shows, rng, self._strengths) if any(self._strengths) else shows
        out_label[rows, cols] = label.take(nearest_y, 0).take(nearest_x, 1)
        valid_box = np.array([rows.start, cols.start, rows.stop, cols.stop], np.int32)
        out = {"image": out_image, "label": out_label, "valid_box": valid_box, "id": sample["id"]}
        if self._scores:
            down, across = ((at / n, (at + c) / n) for at, c, n, _ in axes)
            across = (1 - across[0], 1 - across[1]) if flipped else across
            out["scores"] = self._scores.shown(sample["id"], label.shape, down, across)
        return out


def _window(array: np.ndarray, top: int, left: int, size: tuple[int, int], fill: Any) -> np.ndarray:
    """The window of `size` at (top, left), which may be negative; outside the array it is `fill`."""
    out = np.empty((*size, *array.shape[2:]), array.dtype)
    out[...] = fill
    inside = array[max(top, 0) : max(top + size[0], 0), max(left, 0) : max(left + size[1], 0)]
    y, x = max(-top, 0), max(-left, 0)
    out[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return out


class TrainBatches(Iterator):
    """Endless iterator over training batches; see `train_batches`.

    Attributes:
      step: number of the next batch (counted from the start of the run, not of this iterator).
      samples_seen: samples of all hosts before that batch, `step * batch_size`.
    """

    def __init__(self, view: Any, batch_size: int, local: int, start_step: int, num_threads: int, num_workers: int):
        self._batch_size, self._local = batch_size, local
        self.step = start_step
        self._workers = Workers(view, num_workers) if num_workers else None
        # A thread for each process waits for it.
        self._samples = _iterate(self._workers or view, num_workers or num_threads, local)
        self._samples.set_state({"next_index": start_step * local})

    @property
    def samples_seen(self) -> int:
        return self.step * self._batch_size

    def __next__(self) -> dict[str, Any]:
        samples = [next(self._samples) for _ in range(self._local)]
        self.step += 1
        columns = {key: [s[key] for s in samples] for key in samples[0]}
        return {key: column if key == "id" else np.stack(column) for key, column in columns.items()}

    def close(self) -> None:
        """Stops the reading threads and processes."""
        self._samples.close()
        if self._workers is not None:
            self._workers.close()


def train_batches(
    dataset: Dataset,
    split: str,
    *,
    batch_size: int,
    crop_size: tuple[int, int],
    scale_range: tuple[float, float] = (0.7, 1.2),
    flip: bool = True,
    seed: int = 0,
    start_step: int = 0,
    host: int = 0,
    hosts: int = 1,
    num_threads: int = 2,
    num_workers: int = 0,
    pad_value: tuple[int, int, int] = MEAN_COLOUR,
    jitter: augment.Strengths = (0.0, 0.0, 0.0, 0.0),
    augment_by: str = "",
    scores: GivenScores | None = None,
) -> TrainBatches:
    """Endless shuffled and augmented batches; every epoch is a new permutation of the split.

    Args:
      batch_size: samples per step over all hosts; each host gets b = batch_size // hosts of them, and
        hosts 0, 1, ... together the same global batch whatever their number.
      crop_size: (height, width) of the output; smaller images are padded at random offsets.
      scale_range: images are scaled by a factor drawn uniformly from this range.
      flip: mirror half of the samples left to right.
      seed: of order and augmentation, not negative.
      start_step: resume; batch 0 of `start_step=k` is batch k of a fresh iterator.
      num_threads: reading threads; 0 reads in the calling thread.
      num_workers: processes that read instead of these threads, the same batches; 0: none. They end when the iterator
        is closed and when this process ends, however it does.
      pad_value: RGB colour of padding; its label is void (255).
      jitter: strengths of `augment.jitter`, which what a crop shows of its image goes through.
      augment_by: "module:function" of an `augment.Custom`, called on each whole image; "": none.
      scores: given with the images, on a grid that covers a crop; not with augment_by, which moves them nowhere.

    Returns:
      Iterator of {"image": uint8 [b, h, w, 3], "label": uint8 [b, h, w], "valid_box": int32 [b, 4] (top, left, bottom,
      right of what is not padding, the last two exclusive), "id": list of b str}; with scores also "scores", float32
      [b, *grid, K].

    Raises:
      DataError: an argument out of range, or an unknown or empty split; while iterating, a damaged record, what
        augment_by must not return, or a process that was ended from outside.
      ConfigError: a function augment_by that cannot be loaded.
    """
    import grain

    local = _per_host(batch_size, host, hosts, num_threads)
    crop_size = _check_size("data.crop_size", crop_size)
    low, high = scale_range
    if not 0 < low <= high:
        raise DataError(f"data.scale_range: {tuple(scale_range)} is not 0 < low <= high, such as (0.7, 1.2)")
    if not 0 <= seed < 2**32:
        raise DataError(f"seed: {seed} is outside 0..{2**32 - 1}")
    if num_workers < 0:
        raise DataError(f"data.num_workers: {num_workers} is negative; 0 reads in threads of this process")
    if start_step < 0:
        raise DataError(f"start_step: {start_step} is negative; a fresh run starts at 0")
    if scores and augment_by:
        raise DataError(f"data.augment: {augment_by!r} cannot move the scores of data.scores.dir too; set it to ''")
    source = dataset.source(split)
    # Shuffling indices, not records, keeps Grain's part to the order and ours to the content.
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    custom = augment.Custom(augment_by, len(dataset.class_names)) if augment_by else None
    made = _Augment(
        crop_size, (low, high), flip, seed, pad_value, strengths=tuple(jitter), custom=custom, scores=scores
    )
    view = _TrainView(order, source, host, batch_size, local, made)
    return TrainBatches(view, batch_size, local, start_step, num_threads, num_workers)


class _EvalView:
    """Position p of this host -> (global index, sample), or (global index, None) beyond the end.

    scores: of samples, on the grid of a frame of this size.
    """

    def __init__(
        self, source: Source, host: int, batch_size: int, local: int, *, size: Any, scores: GivenScores | None
    ):
        self._source, self._host, self._batch_size, self._local = source, host, batch_size, local
        self._size, self.scores = size, scores

    def __len__(self) -> int:
        return -(-len(self._source) // self._batch_size) * self._local

    def __getitem__(self, p: int) -> tuple[int, dict[str, Any] | None]:
        g = p // self._local * self._batch_size + self._host * self._local + p % self._local
        return g, (self._read(g) if g < len(self._source) else None)

    def _read(self, g: int) -> dict[str, Any]:
        sample = self._source[g]
        if not self.scores:
            return sample
        shape = sample["label"].shape
        rows, cols = ((0.0, n / m) for n, m in zip(self._size, shape, strict=True))
        return sample | {"scores": self.scores.shown(sample["id"], shape, rows, cols)}


def eval_batches(
    dataset: Dataset,
    split: str,
    *,
    batch_size: int,
    size: tuple[int, int] | None = None,
    host: int = 0,
    hosts: int = 1,
    num_threads: int = 2,
    scores: GivenScores | None = None,
) -> Iterator[dict[str, Any]]:
    """One pass over a split in stored order, nothing scaled, every batch full.

    Images are padded at bottom and right with the mean colour, labels with void. The last batch is filled
    up with all-void entries of id "" and valid_box (0, 0, 0, 0); all hosts yield the same number of batches.

    Args:
      batch_size: images per step over all hosts; each host gets b = batch_size // hosts of them.
      size: (height, width) to pad to. None pads to the largest height and width of the global batch,
        rounded up to multiples of 32; shapes then vary between batches (a compiled step compiles again).
      num_threads: reading threads; 0 reads in the calling thread.
      scores: given with the images, on a grid that covers a frame of `size`, which must be given too.

    Returns:
      Iterator of {"image": uint8 [b, H, W, 3], "label": uint8 [b, H, W], "valid_box": int32 [b, 4]
      as in `train_batches`, here (0, 0, height, width), "id": list of b str}; with scores also "scores", float32
      [b, *grid, K].

    Raises:
      DataError: an argument out of range, or an unknown or empty split; while iterating, a damaged record
        or an image larger than `size`.
    """
    local = _per_host(batch_size, host, hosts, num_threads)
    if size is not None:
        size = _check_size("data.eval_size", size)
    elif scores:
        raise DataError("data.eval_size: scores lie on the grid of a frame of one size; name it")
    source = dataset.source(split)
    view = _EvalView(source, host, batch_size, local, size=size, scores=scores)
    return _eval_iterator(source, view, batch_size, local, size, num_threads)


def check_sizes(dataset: Dataset, split: str, size: tuple[int, int]) -> None:
    """Reads the headers of a split: DataError if an image is larger than `size` (height, width) of `eval_batches`."""
    source = dataset.source(split)
    for i in range(len(source)):
        height, width = source.image_size(i)
        if height > size[0] or width > size[1]:
            _too_large(source[i]["id"], (height, width), size)


def _too_large(name: str, got: tuple[int, int], size: tuple[int, int]) -> None:
    raise DataError(
        f"image {name!r} is {got[0]}x{got[1]} (height x width), larger than data.eval_size "
        f"{size[0]}x{size[1]}; set data.eval_size to at least the largest image of the split"
    )


def _eval_iterator(
    source: Source, view: _EvalView, batch_size: int, local: int, size: Any, num_threads: int
) -> Iterator[dict[str, Any]]:
    samples = _iterate(view, num_threads, local)
    try:
        for step in range(len(view) // local):
            entries = [next(samples)[1] for _ in range(local)]
            shape = size or _common_size(source, range(step * batch_size, (step + 1) * batch_size))
            yield _eval_batch(entries, shape, view.scores)
    finally:
        samples.close()


def _common_size(source: Source, indices: range) -> tuple[int, int]:
    # Headers of the whole global batch, so that all hosts agree on the shape without talking.
    sizes = [source.image_size(i) for i in indices if i < len(source)]
    height, width = (-(-max(n) // 32) * 32 for n in zip(*sizes, strict=True))
    return height, width


def _eval_batch(
    read: list[dict[str, Any] | None], shape: tuple[int, int], scores: GivenScores | None
) -> dict[str, Any]:
    empty: dict[str, Any] = {"image": np.zeros((0, 0, 3), np.uint8), "label": np.zeros((0, 0), np.uint8), "id": ""}
    entries = [entry or empty for entry in read]
    for entry in entries:
        height, width = entry["label"].shape
        if height > shape[0] or width > shape[1]:
            _too_large(entry["id"], (height, width), shape)
    given = {"scores": np.stack([e["scores"] if e["id"] else scores.empty() for e in entries])} if scores else {}
    return given | {
        "image": np.stack([_window(e["image"], 0, 0, shape, MEAN_COLOUR) for e in entries]),
        "label": np.stack([_window(e["label"], 0, 0, shape, VOID) for e in entries]),
        "valid_box": np.array([(0, 0, *e["label"].shape) for e in entries], np.int32),
        "id": [e["id"] for e in entries],
    }


def _iterate(view: Any, num_threads: int, local: int) -> Any:
    import grain

    # Two batches ahead hide a slow record; more only costs memory.
    buffered = max(2 * local, 2 * num_threads) if num_threads else 0
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffered)
    return iter(grain.MapDataset.source(view).to_iter_dataset(options))


def _per_host(batch_size: int, host: int, hosts: int, num_threads: int) -> int:
    if batch_size < 1:
        raise DataError(f"batch_size: {batch_size} is not positive")
    if not 0 <= host < hosts:
        raise DataError(f"host: {host} is not in 0..hosts-1 with hosts={hosts}")
    if batch_size % hosts:
        raise DataError(f"batch_size: {batch_size} is not a multiple of the {hosts} hosts; make it one")
    if num_threads < 0:
        raise DataError(f"data.num_threads: {num_threads} is negative; 0 reads in the calling thread")
    return batch_size // hosts


def _check_size(key: str, size: Any) -> tuple[int, int]:
    if np.shape(size) != (2,) or min(size) < 1:
        raise DataError(f"{key}: {size} is not a positive (height, width)")
    return int(size[0]), int(size[1])
