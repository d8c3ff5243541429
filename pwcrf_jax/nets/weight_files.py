"""Layouts of files with ImageNet weights: each is opened as named layers that are read when asked for."""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pwcrf_jax.nets import mobilenet_v2, vgg16

BATCH_NORM_EPSILON = 1e-3  # Keras' MobileNetV2
# Positions of the convolutions in torchvision's `features`, ReLU and pooling being entries of their own.
TORCH_VGG16_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names the file and says why."""


class Layer(NamedTuple):
    """A convolution: kernel [h, w, in, out] and bias [out]."""

    kernel: np.ndarray
    bias: np.ndarray


class WeightFile(NamedTuple):
    """An open file. `layers` and `fc1` read on call, while the file is open."""

    name: str
    architecture: str
    scaling: str
    layers: Mapping[str, Callable[[], Layer]]
    all_layers: tuple[str, ...]
    fc1: tuple[str, Callable[[], Layer]] | None


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

    try:
        file = stack.enter_context(h5py.File(path, "r"))
    except OSError as error:
        raise WeightsError(f"{path}: not an HDF5 file ({error})") from error
    found = _keras_layers(file)
    if "block1_conv1" in found:
        extra = sorted(name for name in found if re.fullmatch(r"block\d_conv\d", name))
        extra = [name for name in extra if name not in vgg16.layer_names()]
        if extra:
            raise WeightsError(f"{path}: not a VGG-16, it has a layer {extra[0]} (VGG-19?)")
        layers = {name: _reader(path, name, found) for name in vgg16.layer_names() if name in found}
        fc1 = ("fc1", lambda: _keras_fc1(path, found)) if "fc1" in found else None
        return WeightFile("keras_vgg16", "vgg16", "caffe", layers, tuple(found), fc1)
    if "Conv1" in found and "expanded_conv_depthwise" in found:
        layers = {
            name: _reader(path, name, found, _batch_norm_name(name))
            for name in mobilenet_v2.layer_names()
            if name in found
        }
        norms = {_batch_norm_name(name) for name in layers}
        names = tuple(name for name in found if name not in norms)
        return WeightFile("keras_mobilenet_v2", "mobilenet_v2", "tf", layers, names, None)
    some = ", ".join(list(found)[:4]) or "none"
    raise WeightsError(f"{path}: not a network known here (VGG-16, MobileNetV2 of Keras); its layers: {some}")


def open_torch_vgg16(path: Path, stack: ExitStack) -> WeightFile:
    """Opens torchvision's or timm's VGG-16 as safetensors. Raises WeightsError if it is something else."""
    from safetensors import SafetensorError, safe_open

    try:
        file = stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a safetensors file ({error})") from error
    keys = sorted(file.keys())
    convs = sorted(int(m[1]) for key in keys if (m := re.fullmatch(r"features\.(\d+)\.weight", key)))
    if not convs:
        some = ", ".join(keys[:4]) or "none"
        raise WeightsError(f"{path}: not a network known here (VGG-16 of torchvision, timm); its keys: {some}")
    if tuple(convs) != TORCH_VGG16_CONVS:
        raise WeightsError(
            f"{path}: not a VGG-16, its convolutions are features {convs}, "
            f"not {list(TORCH_VGG16_CONVS)} (another VGG, or one with BatchNorm?)"
        )

    def read(prefix: str) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for part in ("weight", "bias"):
            key = f"{prefix}.{part}"
            if key not in keys:
                raise WeightsError(f"{path}: has no tensor {key}")
            try:
                parts.append(file.get_tensor(key).astype(np.float32))
            except (SafetensorError, TypeError) as error:
                raise WeightsError(f"{path}: cannot read the tensor {key} ({error})") from error
        return parts[0], parts[1]

    def conv(prefix: str) -> Layer:
        weight, bias = read(prefix)
        _check_rank(path, prefix, weight, 4)
        return Layer(weight.transpose(2, 3, 1, 0), bias)

    def linear(prefix: str) -> Layer:
        weight, bias = read(prefix)
        _check_flat(path, prefix, weight, axis=1)
        return Layer(fc1_from_torch(weight), bias)

    fc1 = None
    if "classifier.0.weight" in keys:
        fc1 = ("classifier.0", lambda: linear("classifier.0"))
    elif "pre_logits.fc1.weight" in keys:
        fc1 = ("pre_logits.fc1", lambda: conv("pre_logits.fc1"))
    names = dict(zip((f"features.{index}" for index in convs), vgg16.layer_names(), strict=True))
    layers = {ours: (lambda prefix=prefix: conv(prefix)) for prefix, ours in names.items()}
    prefixes = dict.fromkeys(key.rpartition(".")[0] for key in keys)
    all_layers = tuple(names.get(prefix, prefix) for prefix in prefixes)
    return WeightFile("torch_vgg16", "vgg16", "torch", layers, all_layers, fc1)


def _keras_layers(file: Any) -> dict[str, dict[str, Any]]:
    """Datasets by layer and weight. A dataset's group carries the layer's name, however deep it lies."""
    import h5py

    layers: dict[str, dict[str, Any]] = {}

    def visit(path: str, item: Any) -> None:
        parts = path.split("/")
        if not isinstance(item, h5py.Dataset) or len(parts) < 2 or parts[0] == "optimizer_weights":
            return
        weight = parts[-1].split(":")[0]
        # Keras 1 called them block1_conv1_W_1 and block1_conv1_b_1.
        old = re.fullmatch(r".*_([Wb])(_\d+)?", weight)
        if old:
            weight = {"W": "kernel", "b": "bias"}[old[1]]
        layers.setdefault(parts[-2], {})[weight] = item

    file.visititems(visit)
    return layers


def _batch_norm_name(layer: str) -> str:
    return {"Conv1": "bn_Conv1", "Conv_1": "Conv_1_bn"}.get(layer, f"{layer}_BN")


def _read(path: Path, layer: str, found: Mapping[str, Mapping[str, Any]], *names: str) -> list[np.ndarray]:
    missing = [name for name in names if name not in found.get(layer, {})]
    if missing:
        raise WeightsError(f"{path}: layer {layer} has no {missing[0]}")
    return [np.asarray(found[layer][name], np.float32) for name in names]


def _reader(
    path: Path, name: str, found: Mapping[str, Mapping[str, Any]], norm: str | None = None
) -> Callable[[], Layer]:
    def read() -> Layer:
        if norm is None:
            kernel, bias = _read(path, name, found, "kernel", "bias")
            _check_rank(path, name, kernel, 4)
            return Layer(kernel, bias)
        depthwise = name.endswith("_depthwise")
        # Keras 3 calls a depthwise kernel "kernel".
        older = "depthwise_kernel" in found.get(name, {})
        (kernel,) = _read(path, name, found, "depthwise_kernel" if older else "kernel")
        _check_rank(path, name, kernel, 4)
        if depthwise:
            kernel = kernel.transpose(0, 1, 3, 2)
        values = _read(path, norm, found, "gamma", "beta", "moving_mean", "moving_variance")
        for value in values:
            if value.shape != kernel.shape[3:]:
                raise WeightsError(f"{path}: layer {norm} has shape {value.shape}, not {kernel.shape[3:]}")
        return fold_batch_norm(kernel, *values)

    return read


def _keras_fc1(path: Path, found: Mapping[str, Mapping[str, Any]]) -> Layer:
    weight, bias = _read(path, "fc1", found, "kernel", "bias")
    _check_flat(path, "fc1", weight, axis=0)
    return Layer(fc1_from_keras(weight), bias)


def _check_rank(path: Path, layer: str, kernel: np.ndarray, rank: int) -> None:
    if kernel.ndim != rank:
        raise WeightsError(f"{path}: layer {layer} has a kernel of shape {kernel.shape}, not {rank} axes")


def _check_flat(path: Path, layer: str, weight: np.ndarray, axis: int) -> None:
    if weight.ndim != 2 or weight.shape[axis] % 49:
        raise WeightsError(f"{path}: layer {layer} has a weight of shape {weight.shape}, not of 7x7 windows")
