"""Layouts of files with ImageNet weights: each is opened as named layers that are read when asked for.

A file is not trusted: what it declares is compared with its size and with the network before memory is taken.
"""

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pwcrf_jax.nets import mobilenet_v2, vgg16

BATCH_NORM_EPSILON = 1e-3  # Keras' MobileNetV2
# Positions of the convolutions in torchvision's `features`, ReLU and pooling being entries of their own.
TORCH_VGG16_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
# Beyond these no file of weights goes: levels of groups and objects of an .h5, bytes of a safetensors header.
_MAX_DEPTH, _MAX_OBJECTS, _MAX_HEADER = 16, 10_000, 1 << 23
_FLOATS = ("F16", "F32", "F64")  # as safetensors calls them


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names the file and says why."""


class Layer(NamedTuple):
    """A convolution: kernel [h, w, in, out] and bias [out]."""

    kernel: np.ndarray
    bias: np.ndarray


class StoredArray(NamedTuple):
    """An array in an open file: its shape, known before `read` takes memory for it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


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
        with _reading(self.path):
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


class WeightFile(NamedTuple):
    """An open file. `layers` and `fc1` read on call, while the file is open."""

    name: str
    architecture: str
    scaling: str
    layers: Mapping[str, StoredLayer]
    all_layers: tuple[str, ...]
    fc1: tuple[str, StoredLayer] | None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A damaged file may have its library raise anything."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {_words(error)}"
        raise WeightsError(f"{path}: cannot be read as weights ({told}); download it again") from error


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def fc1_from_keras(weight: np.ndarray) -> np.ndarray:
    """Dense weight [7*7*C, F] as a convolution [7, 7, C, F]: Keras flattens rows, columns, channels."""
    return weight.reshape(7, 7, -1, weight.shape[1])


def fc1_from_torch(weight: np.ndarray) -> np.ndarray:
    """Linear weight [F, C*7*7] as a convolution [7, 7, C, F]: PyTorch flattens channels, rows, columns."""
    return weight.reshape(weight.shape[0], -1, 7, 7).transpose(2, 3, 1, 0)


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


def open_keras(path: Path, stack: ExitStack) -> WeightFile:
    """Opens a Keras Applications file of VGG-16 or MobileNetV2. Raises WeightsError if it is neither."""
    # Imported here, so that networks can be built where no weight files are read.
    import h5py

    with _reading(path):
        try:
            file = stack.enter_context(h5py.File(path, "r"))
        except OSError as error:
            raise WeightsError(f"{path}: not an HDF5 file ({_words(error)})") from error
        found = _keras_layers(path, file)
    if "block1_conv1" in found:
        extra = sorted(name for name in found if re.fullmatch(r"block\d_conv\d", name))
        extra = [name for name in extra if name not in vgg16.layer_names()]
        if extra:
            raise WeightsError(f"{path}: not a VGG-16, it has a layer {extra[0]} (VGG-19?)")
        layers = {name: _keras_conv(path, name, found) for name in vgg16.layer_names() if name in found}
        fc1 = ("fc1", _keras_fc1(path, found)) if "fc1" in found else None
        return WeightFile("keras_vgg16", "vgg16", "caffe", layers, tuple(found), fc1)
    if "Conv1" in found and "expanded_conv_depthwise" in found:
        layers = {
            name: _keras_conv(path, name, found, _batch_norm_name(name))
            for name in mobilenet_v2.layer_names()
            if name in found
        }
        norms = {_batch_norm_name(name) for name in layers}
        names = tuple(name for name in found if name not in norms)
        return WeightFile("keras_mobilenet_v2", "mobilenet_v2", "tf", layers, names, None)
    raise WeightsError(
        f"{path}: not a network known here (VGG-16, MobileNetV2 of Keras); its layers: {_some(list(found))}"
    )


def open_torch_vgg16(path: Path, stack: ExitStack) -> WeightFile:
    """Opens torchvision's or timm's VGG-16 as safetensors. Raises WeightsError if it is something else."""
    from safetensors import SafetensorError, safe_open

    with _reading(path):
        try:
            with open(path, "rb") as start:
                (header,) = struct.unpack("<Q", start.read(8).ljust(8, b"\0"))
            if header > _MAX_HEADER:
                raise WeightsError(f"{path}: not a safetensors file (it declares a header of {header} bytes)")
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: not a safetensors file ({_words(error)})") from error
        keys = sorted(file.keys())
        convs = sorted(int(m[1]) for key in keys if (m := re.fullmatch(r"features\.(\d{1,9})\.weight", key)))
    if not convs:
        raise WeightsError(f"{path}: not a network known here (VGG-16 of torchvision, timm); its keys: {_some(keys)}")
    if tuple(convs) != TORCH_VGG16_CONVS:
        raise WeightsError(
            f"{path}: not a VGG-16, its convolutions are features {convs[:32]}, "
            f"not {list(TORCH_VGG16_CONVS)} (another VGG, or one with BatchNorm?)"
        )

    def layer(prefix: str, check: Callable, layout: Callable) -> StoredLayer:
        array = lambda part: _torch_array(path, file, keys, f"{prefix}.{part}")
        arrays = lambda: (array("weight"), {f"bias of {prefix}": array("bias")})
        return StoredLayer(path, prefix, arrays, check, layout)

    conv = lambda prefix: layer(prefix, _check_rank, lambda weight: weight.transpose(2, 3, 1, 0))
    fc1 = None
    if "classifier.0.weight" in keys:
        fc1 = ("classifier.0", layer("classifier.0", _check_flat(1), fc1_from_torch))
    elif "pre_logits.fc1.weight" in keys:
        fc1 = ("pre_logits.fc1", conv("pre_logits.fc1"))
    names = dict(zip((f"features.{index}" for index in convs), vgg16.layer_names(), strict=True))
    layers = {ours: replace(conv(prefix), name=ours) for prefix, ours in names.items()}
    prefixes = dict.fromkeys(key.rpartition(".")[0] for key in keys)
    all_layers = tuple(names.get(prefix, prefix) for prefix in prefixes)
    return WeightFile("torch_vgg16", "vgg16", "torch", layers, all_layers, fc1)


def _torch_array(path: Path, file: Any, keys: Sequence[str], key: str) -> StoredArray:
    if key not in keys:
        raise WeightsError(f"{path}: has no tensor {key}")
    about = file.get_slice(key)  # the library has compared shapes with the file's size
    if about.get_dtype() not in _FLOATS:
        raise WeightsError(
            f"{path}: the tensor {key} holds {about.get_dtype()}, which NumPy does not know or is no weight; save it "
            "as F32"
        )
    return StoredArray(tuple(about.get_shape()), lambda: file.get_tensor(key))


def _keras_layers(path: Path, file: Any) -> dict[str, dict[str, Any]]:
    """Datasets by layer and weight. A dataset's group carries the layer's name, however deep it lies."""
    import h5py

    layers: dict[str, dict[str, Any]] = {}
    seen = 0

    def visit(group: Any, parts: tuple[str, ...]) -> None:
        nonlocal seen
        for name in group:
            seen += 1
            if seen > _MAX_OBJECTS or len(parts) >= _MAX_DEPTH:
                raise WeightsError(f"{path}: not weights of Keras, it has more groups than any network")
            where = (*parts, name)
            if where == ("optimizer_weights",):
                continue
            # Links lead out of the file, or round in circles; Keras writes none.
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                link = _some(["/".join(where)])
                raise WeightsError(f"{path}: {link} is a link, as Keras writes none; download it again")
            item = group[name]
            if isinstance(item, h5py.Group):
                visit(item, where)
            elif isinstance(item, h5py.Dataset) and parts:
                layers.setdefault(parts[-1], {})[_weight_name(name)] = item

    visit(file, ())
    return layers


def _weight_name(name: str) -> str:
    weight = name.split(":")[0]
    # Keras 1 called them block1_conv1_W_1 and block1_conv1_b_1.
    old = re.fullmatch(r".*_([Wb])(_\d+)?", weight)
    return {"W": "kernel", "b": "bias"}[old[1]] if old else weight


def _some(names: Sequence[str]) -> str:
    shown = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[:40]) for name in names[:4])
    return ", ".join(shown) or "none"


def _batch_norm_name(layer: str) -> str:
    return {"Conv1": "bn_Conv1", "Conv_1": "Conv_1_bn"}.get(layer, f"{layer}_BN")


def _keras_array(path: Path, layer: str, found: Mapping[str, Mapping[str, Any]], name: str) -> StoredArray:
    """A dataset, refused where reading it would take more than the file holds, or read another file."""
    if name not in found.get(layer, {}):
        raise WeightsError(f"{path}: layer {layer} has no {name}")
    data, there = found[layer][name], path.stat().st_size
    kind = data.dtype
    if kind.kind != "f" or kind.itemsize > 8:
        raise WeightsError(f"{path}: the {name} of layer {layer} holds {kind}, not floating-point numbers")
    if data.shape is None or 0 in data.shape:
        raise WeightsError(f"{path}: the {name} of layer {layer} is empty")
    if data.is_virtual or data.external:
        raise WeightsError(f"{path}: the {name} of layer {layer} lies in another file, as Keras writes none")
    declared = kind.itemsize * max(math.prod(data.shape), math.prod(data.chunks or ()))
    if declared > there:
        raise WeightsError(
            f"{path}: the {name} of layer {layer} declares {declared:,} bytes, the file has {there:,}; download it "
            "again"
        )
    if data.fletcher32:  # HDF5 2.0 ends the process where a chunk is shorter than its checksum
        raise WeightsError(f"{path}: the {name} of layer {layer} has checksums, as Keras writes none")
    return StoredArray(data.shape, lambda: data[()])


def _keras_conv(path: Path, name: str, found: Mapping[str, Mapping[str, Any]], norm: str | None = None) -> StoredLayer:
    array = lambda layer, part: _keras_array(path, layer, found, part)
    if norm is None:
        arrays = lambda: (array(name, "kernel"), {f"bias of layer {name}": array(name, "bias")})
        return StoredLayer(path, name, arrays, _check_rank)
    # Keras 3 calls a depthwise kernel "kernel".
    kernel = "depthwise_kernel" if "depthwise_kernel" in found.get(name, {}) else "kernel"
    parts = ("gamma", "beta", "moving_mean", "moving_variance")
    arrays = lambda: (array(name, kernel), {f"{part} of layer {norm}": array(norm, part) for part in parts})
    depthwise = lambda kernel: kernel.transpose(0, 1, 3, 2)
    layout = depthwise if name.endswith("_depthwise") else lambda kernel: kernel
    return StoredLayer(path, name, arrays, _check_rank, layout, fold_batch_norm)


def _keras_fc1(path: Path, found: Mapping[str, Mapping[str, Any]]) -> StoredLayer:
    array = lambda part: _keras_array(path, "fc1", found, part)
    arrays = lambda: (array("kernel"), {"bias of layer fc1": array("bias")})
    return StoredLayer(path, "fc1", arrays, _check_flat(0), fc1_from_keras)


def _check_rank(path: Path, layer: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 4:
        raise WeightsError(f"{path}: layer {layer} has a kernel of shape {shape}, not 4 axes")


def _check_flat(axis: int) -> Callable[[Path, str, tuple[int, ...]], None]:
    """axis: which holds 7x7 windows, laid out flat."""

    def check(path: Path, layer: str, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or shape[axis] % 49:
            raise WeightsError(f"{path}: layer {layer} has a weight of shape {shape}, not of 7x7 windows")

    return check
