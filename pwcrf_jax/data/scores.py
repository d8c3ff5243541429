"""Scores of anybody's network as files: found by name, told apart by shape and values, read as log-probabilities.

A file holds one image: `.npy`, `.npz` or `.safetensors` with an array [H, W, K] ("hwc") or [K, H, W] ("chw") of
logits, probabilities or log-probabilities, or a label image (`.png`) that is right with a given confidence. Maps may be
smaller than their image. Axes of length 1 beside these three are left out, as a batch of one has it.

What a shape or a value leaves open is refused, with what settles it; nothing is guessed.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pwcrf_jax.data.readers import array_files
from pwcrf_jax.data.readers.array_files import ArrayFile
from pwcrf_jax.data.readers.files import DataError, read_image_file
from pwcrf_jax.data.readers.image_io import VOID, decode_label, image_size

SUFFIXES = (*array_files.SUFFIXES, ".png")
LAYOUTS = ("hwc", "chw")
KINDS = ("logits", "probabilities", "log_probabilities")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_ASPECT = 2.5  # of the sides of an image that is made square for a network, at most

Size = tuple[int, int]  # (height, width)


class ScoresError(DataError):
    """Scores that cannot be used; the message names the file, the value and what to do, in one line."""


class Form(NamedTuple):
    """What all files of a folder share.

    Attributes:
      layout: of `LAYOUTS`; "labels": they are label images.
      num_classes: K.
    """

    layout: str
    num_classes: int


def find(folder: str | Path) -> dict[str, Path]:
    """{name: file} of the scores in a folder and below it, sorted; a name is the path below it without suffix.

    Raises:
      ScoresError: no such folder, no scores there, or two of one name.
    """
    root, others = Path(folder), 0
    found: dict[str, Path] = {}
    if not root.is_dir():
        raise ScoresError(f"{root}: is no folder; name the folder of the scores")
    seen: set[str] = set()
    for place, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # links in a circle
            folders[:], names = [], []
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(place, name) for name in sorted(names) if not name.startswith(".")):
            if file.suffix.lower() not in SUFFIXES:
                others += 1
                continue
            name = str(file.relative_to(root).with_suffix(""))
            if name in found:
                raise ScoresError(f"{found[name]} and {file}: two scores for one image; remove or rename one of them")
            found[name] = file
    if not found:
        had = f", {others} files of other kinds" if others else ""
        raise ScoresError(f"{root}: holds no scores{had}; they are files {', '.join(SUFFIXES)}, one an image")
    return dict(sorted(found.items()))


def shape_of(path: Path) -> tuple[int, ...]:
    """The shape of the scores, 3 axes in the order of the file, from its header; of a label image (height, width).

    Raises:
      ScoresError: no such array there, or two.
      DataError: the file is damaged.
    """
    if path.suffix.lower() == ".png":
        return image_size(read_image_file(path), str(path))
    return _three(_stored(path).shape)


def form(files: Mapping[str, Path], sizes: Mapping[str, Size], layout: str = "auto", num_classes: int = 0) -> Form:
    """The layout and number of classes of all files, from their headers alone.

    Args:
      files: of `find`.
      sizes: of the images by the same names; {}: not known, then layouts may have to be given more often.
      layout: "auto", or one of `LAYOUTS`.
      num_classes: 0: not known. Label images need it.

    Raises:
      ScoresError: files do not fit each other or their images; or the layout is open.
    """
    labels = [path for path in files.values() if path.suffix.lower() == ".png"]
    if labels and len(labels) < len(files):
        other = next(path for path in files.values() if path.suffix.lower() != ".png")
        raise ScoresError(f"{labels[0]} is a label image, {other} holds scores; use a folder of one kind")
    if labels:
        if num_classes < 2:
            raise ScoresError(f"{labels[0]}: label images do not tell how many classes there are; name the number")
        for name, path in files.items():
            _fits_image(path, shape_of(path), sizes.get(name))
        return Form("labels", num_classes)
    shapes = {name: shape_of(path) for name, path in files.items()}
    ways = LAYOUTS if layout == "auto" else (layout,)
    ranks = {way: _rank(way, shapes, sizes, num_classes) for way in ways}
    likely = [way for way in ways if ranks[way] == max(ranks.values())]
    first = next(iter(files))
    if ranks[likely[0]] < 0:  # no layout fits all: what is wrong is told of the one that is best for the first file
        likely = sorted(ways, key=lambda way: -_rank(way, {first: shapes[first]}, sizes, 0))
    elif len(likely) > 1:
        raise ScoresError(
            f"{files[first]}: shape {shapes[first]} may be [H, W, classes] or [classes, H, W]; add --layout hwc or "
            "--layout chw, or --num_classes"
        )
    wanted = num_classes or _axes(shapes[first], likely[0])[2]
    for name, shape in shapes.items():
        *grid, count = _axes(shape, likely[0])
        if ranks[likely[0]] < 0 and 1 in (shape[0], shape[2]):
            raise ScoresError(
                f"{files[name]}: has one map (shape {shape}); save one a class, of two classes p and 1 - p"
            )
        if count != wanted:
            where = "were asked for" if num_classes else f"are in {files[first]}"
            raise ScoresError(
                f"{files[name]}: has {count} classes (shape {shape} as {likely[0]}), and {wanted} {where}; use scores "
                "of one network, or add another --layout"
            )
        _fits_image(files[name], (grid[0], grid[1]), sizes.get(name))
    if layout == "auto" and ranks[likely[0]] < 0:
        raise ScoresError(
            f"{files[first]}: shape {shapes[first]} has no likely [H, W, classes] or [classes, H, W] for its image; "
            "add --layout hwc or --layout chw"
        )
    return Form(likely[0], wanted)


def read(
    path: Path,
    layout: str = "auto",
    kind: str = "auto",
    num_classes: int = 0,
    *,
    size: Size | None = None,
    confidence: float = 0.0,
) -> np.ndarray:
    """The scores of an image as log-probabilities, float32 [h, w, K] of the size that they have in the file.

    Args:
      layout: one of `LAYOUTS`; "auto": found out, as `form` does of one file; "labels": of a label image, optional.
      kind: one of `KINDS`; "auto": found out by the values, see `kind_of`.
      num_classes: that there must be; 0: any. Label images need it.
      size: of the image, for layout "auto".
      confidence: probability in (0, 1) that a label image is right where it has a class; other classes share the rest,
        and where it is void all are equally likely.

    Raises:
      ScoresError: NaN, infinite values, another number of classes, or a form that is open or not the one named.
      DataError: the file is damaged.
    """
    if path.suffix.lower() == ".png":
        return _read_labels(path, num_classes, confidence)
    return log_probabilities(read_values(path, layout, num_classes, size=size), kind, path)


def read_values(path: Path, layout: str = "auto", num_classes: int = 0, *, size: Size | None = None) -> np.ndarray:
    """The values of a file as they are, float32 [h, w, K], finite; see `read`."""
    way, _ = form({"": path}, {"": size} if size else {}, layout, num_classes)
    stored = _stored(path)
    values = stored.read().reshape(_three(stored.shape))
    values = values if way == "hwc" else np.moveaxis(values, 0, -1)
    with np.errstate(over="ignore"):  # what it leads to is looked for next
        given = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(given).all():
        y, x, k = (int(axis[0]) for axis in np.nonzero(~np.isfinite(given)))
        raise ScoresError(
            f"{path}: holds {values[y, x, k]} at row {y}, column {x}, class {k}; save finite values (logits, or "
            "probabilities before their logarithm)"
        )
    return given


def kind_of(values: np.ndarray, path: Path) -> str:
    """What scores float32 [h, w, K] are by their values: one of `KINDS`.

    Probabilities lie in 0..1 and sum to 1 over the classes, log-probabilities do so once exp is taken, and logits are
    all others, but for values that may be two of these.

    Raises:
      ScoresError: they may be two kinds, or are energies.
    """
    off, low, high, total = _rounding(values)[0], float(values.min()), float(values.max()), values.sum(-1)
    one = bool((np.abs(total - 1) <= off).all())
    settle = "add --kind logits or --kind probabilities"
    if low >= 0 and high <= 1 + off and one:
        return "probabilities"
    if one and low > -1:
        raise ScoresError(
            f"{path}: holds {low:.3g} to {high:.3g} with sums of 1 over the classes, logits or probabilities that were "
            f"resized; {settle}"
        )
    if low >= 0 and high <= 1:
        raise ScoresError(
            f"{path}: holds {low:.3g} to {high:.3g} with sums of {total.min():.3g} to {total.max():.3g} over the "
            f"classes, logits or probabilities of a sigmoid; {settle}"
        )
    off = max(off, 1e-2)
    if low >= 0 and (np.abs(np.exp(-values).sum(-1) - 1) <= off).all():
        raise ScoresError(f"{path}: holds energies (-log P, {low:.3g} to {high:.3g}); save them with the other sign")
    if high <= off and (np.abs(_log_sum_exp(values)) <= off).all():
        return "log_probabilities"
    return "logits"


def check_kind(values: np.ndarray, kind: str, path: Path) -> None:
    """Refuses scores that are another kind than those of the files before, whose kind was found out.

    Raises:
      ScoresError: naming the file and what it holds.
    """
    try:
        found = kind_of(values, path)
    except ScoresError:
        if kind == "probabilities" or not values.any():
            raise
        return  # logits that happen to lie in 0..1
    if (found == "probabilities") != (kind == "probabilities"):
        raise ScoresError(f"{path}: holds {found}, the files before it {kind}; save one kind, or add --kind")


def log_probabilities(values: np.ndarray, kind: str, path: Path) -> np.ndarray:
    """Log-probabilities float32 [h, w, K] of scores float32 [h, w, K] of a kind; "auto": of `kind_of`.

    A probability of 0 counts as the least one that its type can hold.

    Raises:
      ScoresError: as `kind_of`, or the values are not of the kind named.
    """
    kind = kind_of(values, path) if kind == "auto" else kind
    low, high = float(values.min()), float(values.max())
    if kind == "probabilities":
        if low < -0.1 or high > 1.1:
            raise ScoresError(f"{path}: holds {low:.3g} to {high:.3g}, no probabilities; add another --kind")
        values = np.log(np.maximum(values, np.float32(_rounding(values)[1])))
    elif kind == "log_probabilities" and high > 0.1:
        raise ScoresError(f"{path}: holds {low:.3g} to {high:.3g}, no log-probabilities; add another --kind")
    return values - _log_sum_exp(values)[..., None]


def _rounding(values: np.ndarray) -> tuple[float, float]:
    """(how far probabilities may be from a sum of 1, the least one) by the type that float32 values were rounded to."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if (half == values).all():
        return 2e-2, float(np.finfo(np.float16).smallest_subnormal)
    bfloat16 = not (values.view(np.uint32) & 0xFFFF).any()
    return 2e-2 if bfloat16 else 1e-3, float(np.finfo(np.float32).tiny)


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    highest = x.max(-1)
    return highest + np.log(np.exp(x - highest[..., None]).sum(-1))


def _read_labels(path: Path, num_classes: int, confidence: float) -> np.ndarray:
    if num_classes < 2 or not 0 < confidence < 1:
        raise ScoresError(
            f"{path}: a label image needs the number of classes and a confidence between 0 and 1, got {num_classes} "
            f"and {confidence}"
        )
    labels = decode_label(read_image_file(path), str(path))
    known = labels != VOID
    if known.any() and (largest := int(labels[known].max())) >= num_classes:
        raise ScoresError(f"{path}: has label {largest}; labels are 0..{num_classes - 1}, and {VOID} for unknown")
    if not labels[known].any() and not known.all() and num_classes == 2:
        raise ScoresError(f"{path}: holds 0 and 255 alone, and 255 is unknown; save the classes as 0 and 1")
    rest, even = np.log((1 - confidence) / (num_classes - 1)), -np.log(num_classes)
    made = np.full((*labels.shape, num_classes), rest, np.float32)
    np.put_along_axis(made, np.where(known, labels, 0)[..., None], np.float32(np.log(confidence)), -1)
    made[~known] = even
    return made


def _stored(path: Path) -> ArrayFile:
    """The array of a file that may be scores."""
    found = array_files.arrays_of(path)
    fitting = [array for array in found if len(_without_ones(array.shape)) == 3 and array.dtype in _FLOATS]
    if len(fitting) > 1:
        names = ", ".join(array.name for array in fitting[:4])
        raise ScoresError(f"{path}: holds {len(fitting)} arrays that may be scores ({names}); save one of them")
    if not fitting:
        held = ", ".join(f"{array.dtype} {list(array.shape)}" for array in found[:3]) or "nothing"
        raise ScoresError(f"{path}: holds {held}; scores are float16 to float64 of [H, W, classes] or [classes, H, W]")
    if 0 in fitting[0].shape:
        raise ScoresError(f"{path}: holds an empty array of shape {fitting[0].shape}; write it again")
    return fitting[0]


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape of more than 3 axes without those of length 1."""
    sides = tuple(shape)
    return tuple(n for n in sides if n != 1) if len(sides) > 3 else sides


_three = _without_ones


def _axes(shape: tuple[int, ...], layout: str) -> tuple[int, int, int]:
    """(height, width, number of classes)."""
    a, b, c = shape
    return (a, b, c) if layout == "hwc" else (b, c, a)


def _rank(layout: str, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Size], num_classes: int) -> int:
    """How well a layout fits: 3 the images' own sizes, 2 those by a whole stride, 1 by any, 0 squares; less: not."""
    counts = {_axes(shape, layout)[2] for shape in shapes.values()}
    if len(counts | ({num_classes} if num_classes else set())) > 1:
        return -2
    if counts <= {0, 1}:
        return -3
    return min(_rank_of_map(_axes(shape, layout)[:2], sizes.get(name)) for name, shape in shapes.items())


def _rank_of_map(grid: Size, size: Size | None) -> int:
    if size is None:
        return 0
    if grid == size:
        return 3
    if any(cells > pixels for cells, pixels in zip(grid, size, strict=True)):
        return -1
    if _by_whole_stride(grid, size):
        return 2
    if _by_stride(grid, size):
        return 1
    return 0 if grid[0] == grid[1] and max(size) < _ASPECT * min(size) else -1  # images made square for the network


def _by_whole_stride(grid: Size, size: Size) -> bool:
    """Whether a map has one cell for so many whole pixels, the last one of a side perhaps cut or left out."""
    least, most = size[0] // (grid[0] + 1), size[0] // max(grid[0] - 1, 1)
    sides = [*zip(grid, size, strict=True)]
    strides = range(max(least, 1), most + 2)
    return any(all(cells in (pixels // s, -(-pixels // s)) for cells, pixels in sides) for s in strides)


def _by_stride(grid: Size, size: Size) -> bool:
    """Whether a map has one cell for so many pixels, the same down and across, but for rounding."""
    low = max(pixels / (cells + 1) for cells, pixels in zip(grid, size, strict=True))
    high = min(pixels / max(cells - 1, 1e-9) for cells, pixels in zip(grid, size, strict=True))
    return low <= high


def _fits_image(path: Path, grid: tuple[int, ...], size: Size | None) -> None:
    height, width = grid
    if size is None or _rank_of_map((height, width), size) > 0:
        return
    if size[0] != size[1] and _rank_of_map((width, height), size) > 0:
        raise ScoresError(
            f"{path}: has maps of {height} x {width} for an image of {size[0]} x {size[1]} (height x width); height "
            "and width are swapped: transpose them, or turn the image upright"
        )
    if height > size[0] or width > size[1]:
        raise ScoresError(
            f"{path}: has maps of {height} x {width}, larger than the image of {size[0]} x {size[1]} (height x width); "
            "name the images that the scores were made of, or another --layout"
        )
