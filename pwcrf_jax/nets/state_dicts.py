"""Weights under the names of PyTorch, and what a backbone says of the files that it starts from.

`open_state` opens a `.safetensors` file, or a `.pth` or `.pt` of `torch.save`, as named arrays that are read when asked
for; torch is not needed, and no code in a file runs. An `Architecture` says how a file of one source is known, and
makes the parameters of one backbone of it.
"""

import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pwcrf_jax.nets.stored import (
    BATCH_NORM_EPSILON,
    Layer,
    StoredArray,
    StoredLayer,
    WeightsError,
    check_rank,
    fold_batch_norm,
    reading,
    some,
    words,
)
from pwcrf_jax.nets.torch_files import torch_tensors

SUFFIXES = (".safetensors", ".pth", ".pt")
_MAX_HEADER = 1 << 23  # bytes of a safetensors header: beyond this no file of weights goes
_FLOATS = ("F16", "F32", "F64")  # as safetensors calls them
_NORM = ("weight", "bias", "running_mean", "running_var")


class StateDict(Mapping[str, StoredArray]):
    """The arrays of an open file by name. What is read is noted, for `unused`."""

    def __init__(self, path: Path, arrays: Mapping[str, StoredArray]) -> None:
        self.path = path
        self._arrays = arrays
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> StoredArray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def array(self, name: str, shape: Sequence[int] | None = None) -> np.ndarray:
        """One array, float32.

        Args:
          name: as in the file.
          shape: that it must have there; None: any.

        Raises:
          WeightsError: it is missing, has another shape, or holds values that are not finite or no floats.
        """
        stored = self.stored(name)
        if shape is not None and stored.shape != tuple(shape):
            raise WeightsError(
                f"{self.path}: {some([name])} has the shape {stored.shape}, the network needs {tuple(shape)}"
            )
        with reading(self.path):
            values = stored.read().astype(np.float32)
        if not np.isfinite(values).all():
            raise WeightsError(f"{self.path}: {some([name])} has values that are not finite; download it again")
        return values

    def stored(self, name: str) -> StoredArray:
        """`self[name]`, noted as read. Raises WeightsError where it is missing or no weight."""
        if name not in self._arrays:
            raise WeightsError(f"{self.path}: has no tensor {some([name])}")
        if self._arrays[name].fault:
            raise WeightsError(f"{self.path}: the tensor {some([name])} {self._arrays[name].fault}")
        self._read.add(name)
        return self._arrays[name]

    def conv(
        self,
        name: str,
        shape: Sequence[int],
        *,
        norm: str = "",
        epsilon: float = BATCH_NORM_EPSILON,
        bias: bool = True,
        label: str = "",
    ) -> dict[str, np.ndarray]:
        """A convolution as `{"kernel": [h, w, in, out], "bias": [out]}`, float32; grouped ones have in / groups.

        Args:
          name: the layer's in the file, whose `.weight` is [out, in, h, w].
          shape: of the kernel, as the network has it.
          norm: the BatchNorm that follows, which is folded into it; "": none.
          epsilon: of that BatchNorm.
          bias: whether a convolution without BatchNorm has a bias in the file; if not, zeros.
          label: what messages call the layer; "": name.

        Raises:
          WeightsError: a part is missing, has another shape, or holds values that are not finite.
        """
        weight = self.stored(f"{name}.weight")
        combine: Callable[..., Layer] = Layer
        if norm:
            others = {f"{part} of {norm}": self.stored(f"{norm}.{part}") for part in _NORM}
            combine = partial(fold_batch_norm, epsilon=epsilon)
        elif bias:
            others = {f"bias of {name}": self.stored(f"{name}.bias")}
        else:
            others = {}
            combine = lambda kernel: Layer(kernel, np.zeros(kernel.shape[-1:], np.float32))
        layer = StoredLayer(self.path, label or name, lambda: (weight, others), check_rank, _from_torch, combine)
        return layer(shape)._asdict()

    def linear(self, name: str, shape: Sequence[int]) -> dict[str, np.ndarray]:
        """A dense layer, [out, in] in the file: `{"kernel": [in, out], "bias": [out]}`, float32. Raises as `array`."""
        kernel = self.array(f"{name}.weight", tuple(shape)[::-1]).T
        return {"kernel": kernel, "bias": self.array(f"{name}.bias", shape[-1:])}

    def unread(self) -> tuple[str, ...]:
        """Names, in the order of the file, of arrays that were not read."""
        return tuple(name for name in self if name not in self._read)

    def unused(self) -> tuple[str, ...]:
        """Layers, in the order of the file, of which nothing was read."""
        prefix = lambda name: name.rpartition(".")[0] or name
        used = {prefix(name) for name in self._read}
        return tuple(dict.fromkeys(prefix(name) for name in self if prefix(name) not in used))


def _from_torch(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(2, 3, 1, 0)


@dataclass(frozen=True)
class Architecture:
    """One source of weights for a backbone.

    Attributes:
      source: its name in reports, such as "torch_vgg16".
      backbone: the network: a name in `BACKBONES`, or what several of them are sizes of ("resnet", "vit").
      mark: a layer that the parameters of this backbone have, and those of no other.
      scaling: the input scaling that the weights were trained with, a name in `INPUT_SCALINGS`.
      recognise: whether a file with these names holds this network from this source.
      convert: makes the backbone's parameters, a tree as the given one, of NumPy arrays in the shapes of its leaves.
        It reads from the state alone what the tree needs, and raises WeightsError for what is missing or does not fit.
      fc1: VGG-16's first fully connected layer, if the file has it.
    """

    source: str
    backbone: str
    mark: str
    scaling: str
    recognise: Callable[[Collection[str]], bool]
    convert: Callable[[StateDict, Mapping[str, Any]], Mapping[str, Any]]
    fc1: Callable[[StateDict], StoredLayer | None] = lambda state: None


@contextmanager
def open_state(path: str | Path) -> Iterator[StateDict]:
    """Opens a file of PyTorch weights, `.safetensors`, `.pth` or `.pt`.

    Raises:
      WeightsError: one line, for a file that is damaged, or holds anything but named tensors.
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        with _open_safetensors(path) as arrays:
            yield StateDict(path, arrays)
        return
    with reading(path):
        arrays = torch_tensors(path)
    yield StateDict(path, arrays)


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Mapping[str, StoredArray]]:
    # Imported here, so that networks can be built where no weight files are read.
    from safetensors import SafetensorError, safe_open

    with reading(path):
        try:
            with open(path, "rb") as start:
                (header,) = struct.unpack("<Q", start.read(8).ljust(8, b"\0"))
            if header > _MAX_HEADER:
                raise WeightsError(f"{path}: not a safetensors file (it declares a header of {header} bytes)")
            file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: not a safetensors file ({words(error)})") from error
    with file:
        with reading(path):  # the library has compared shapes with the file's size
            arrays = {key: _safetensor(file, key) for key in sorted(file.keys())}
        yield arrays


def _safetensor(file: Any, key: str) -> StoredArray:
    about = file.get_slice(key)
    kind, fault = about.get_dtype(), ""
    if kind not in _FLOATS:
        fault = f"holds {kind}, which NumPy does not know or is no weight; save it as F32"
    return StoredArray(tuple(about.get_shape()), lambda: file.get_tensor(key), fault)
