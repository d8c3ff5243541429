"""Arrays and layers of an open file of weights, which are read when asked for.

A file is not trusted: what it declares is compared with its size and with the network before memory is taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

BATCH_NORM_EPSILON = 1e-3  # MobileNetV2's of Keras, EfficientNet's


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names the file and says why."""


class Layer(NamedTuple):
    """A convolution: kernel [h, w, in, out] and bias [out]."""

    kernel: np.ndarray
    bias: np.ndarray


class StoredArray(NamedTuple):
    """An array in an open file: its shape, known before `read` takes memory for it, and why it is no weight, if so."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    fault: str = ""


@dataclass(frozen=True)
class StoredLayer:
    """A layer in an open file, read on call.

    Attributes:
      path, name: for messages.
      arrays: gives the kernel, and {name: array} of what has one value for each output.
      check: raises WeightsError for a kernel's shape in the file.
      layout: the kernel as this package has it, as a view.
      combine: makes the layer of the kernel in this layout and the other arrays.
    """

    path: Path
    name: str
    arrays: Callable[[], tuple[StoredArray, Mapping[str, StoredArray]]]
    check: Callable[[Path, str, tuple[int, ...]], None]
    layout: Callable[[np.ndarray], np.ndarray] = lambda kernel: kernel
    combine: Callable[..., Layer] = Layer

    def __call__(self, expected: Sequence[int] | None = None) -> Layer:
        """Reads the layer, float32.

        Args:
          expected: shape of the kernel, in this package's layout; None: any.

        Raises:
          WeightsError: a missing or damaged part, another shape, or values that are not finite.
        """
        with reading(self.path):
            kernel, others = self.arrays()
            self.check(self.path, self.name, kernel.shape)
            shape = self.layout(np.broadcast_to(np.float32(0), kernel.shape)).shape  # takes no memory
            if expected is not None and shape != tuple(expected):
                raise WeightsError(
                    f"{self.path}: layer {self.name} has a kernel of shape {shape}, the network needs {tuple(expected)}"
                )
            for name, array in others.items():
                if array.shape != shape[-1:]:
                    raise WeightsError(f"{self.path}: the {name} has shape {array.shape}, not {shape[-1:]}")
            with np.errstate(all="ignore"):  # what it leads to is looked for below
                read = lambda array: array.read().astype(np.float32)
                layer = self.combine(self.layout(read(kernel)), *map(read, others.values()))
            if not all(np.isfinite(part).all() for part in layer):
                raise WeightsError(f"{self.path}: layer {self.name} has values that are not finite; download it again")
            return layer


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes whatever is raised a WeightsError: a damaged file may have its library raise anything."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {words(error)}"
        raise WeightsError(f"{path}: cannot be read as weights ({told}); download it again") from error


def words(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:200]


def some(names: Sequence[str]) -> str:
    """The first of the names, in printable letters."""
    shown = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[:40]) for name in names[:4])
    return ", ".join(shown) or "none"


def check_rank(path: Path, layer: str, shape: tuple[int, ...]) -> None:
    """Raises WeightsError where a kernel has not 4 axes."""
    if len(shape) != 4:
        raise WeightsError(f"{path}: layer {layer} has a kernel of shape {shape}, not 4 axes")


def check_flat(axis: int) -> Callable[[Path, str, tuple[int, ...]], None]:
    """A check of a weight of two axes, of which `axis` holds 7x7 windows, laid out flat."""

    def check(path: Path, layer: str, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or shape[axis] % 49:
            raise WeightsError(f"{path}: layer {layer} has a weight of shape {shape}, not of 7x7 windows")

    return check


def fold_batch_norm(
    kernel: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    epsilon: float = BATCH_NORM_EPSILON,
) -> Layer:
    """Convolution without bias followed by BatchNorm, as one convolution. kernel: [h, w, in, out]."""
    factor = gamma / np.sqrt(variance + epsilon)
    return Layer(kernel * factor, beta - mean * factor)
