"""Files of Keras Applications: VGG-16 and MobileNetV2 as `.h5`."""

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pwcrf_jax.nets import mobilenet_v2, vgg16
from pwcrf_jax.nets.stored import (
    StoredArray,
    StoredLayer,
    WeightsError,
    check_flat,
    check_rank,
    fold_batch_norm,
    reading,
    some,
    words,
)

_MAX_DEPTH, _MAX_OBJECTS = 16, 10_000  # levels of groups, and objects: beyond these no file of weights goes


class WeightFile(NamedTuple):
    """An open file with a known network. `layers` and `fc1` read on call, while the file is open.

    Attributes:
      source: what it holds, for the report: "keras_vgg16".
      backbone: the network, as in `BACKBONES`.
      scaling: the input scaling that it was trained with, as in `INPUT_SCALINGS`.
      layers: its convolutions by our names.
      all_layers: names of all layers in the file, ours where there is one.
      fc1: VGG-16's first fully connected layer, if it is there, and its name in the file.
    """

    source: str
    backbone: str
    scaling: str
    layers: Mapping[str, StoredLayer]
    all_layers: tuple[str, ...]
    fc1: tuple[str, StoredLayer] | None = None


def fc1_from_keras(weight: np.ndarray) -> np.ndarray:
    """Dense weight [7*7*C, F] as a convolution [7, 7, C, F]: Keras flattens rows, columns, channels."""
    return weight.reshape(7, 7, -1, weight.shape[1])


def open_keras(path: Path, stack: ExitStack) -> WeightFile:
    """Opens a Keras Applications file of VGG-16 or MobileNetV2. Raises WeightsError if it is neither."""
    # Imported here, so that networks can be built where no weight files are read.
    import h5py

    with reading(path):
        try:
            file = stack.enter_context(h5py.File(path, "r"))
        except OSError as error:
            raise WeightsError(f"{path}: not an HDF5 file ({words(error)})") from error
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
        f"{path}: not a network known here (VGG-16, MobileNetV2 of Keras); its layers: {some(list(found))}"
    )


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
                link = some(["/".join(where)])
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
        return StoredLayer(path, name, arrays, check_rank)
    # Keras 3 calls a depthwise kernel "kernel".
    kernel = "depthwise_kernel" if "depthwise_kernel" in found.get(name, {}) else "kernel"
    parts = ("gamma", "beta", "moving_mean", "moving_variance")
    arrays = lambda: (array(name, kernel), {f"{part} of layer {norm}": array(norm, part) for part in parts})
    depthwise = lambda kernel: kernel.transpose(0, 1, 3, 2)
    layout = depthwise if name.endswith("_depthwise") else lambda kernel: kernel
    return StoredLayer(path, name, arrays, check_rank, layout, fold_batch_norm)


def _keras_fc1(path: Path, found: Mapping[str, Mapping[str, Any]]) -> StoredLayer:
    array = lambda part: _keras_array(path, "fc1", found, part)
    arrays = lambda: (array("kernel"), {"bias of layer fc1": array("bias")})
    return StoredLayer(path, "fc1", arrays, check_flat(0), fc1_from_keras)
