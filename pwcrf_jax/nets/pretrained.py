"""Reads ImageNet weights from local files into the parameters of a `FeatMapNet`.

Nothing is downloaded. Formats: Keras Applications' `.h5` files of VGG-16 and MobileNetV2, with or without
top, and torchvision's or timm's VGG-16 as `.safetensors`.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pwcrf_jax.nets import mobilenet_v2, vgg16
from pwcrf_jax.nets.weight_files import StoredLayer, WeightFile, WeightsError, open_keras, open_torch_vgg16

__all__ = ["LoadReport", "WeightsError", "load_pretrained"]


_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"
# By backbone: where files of ImageNet weights are published, and what is published to check them by. Keras names MD5
# sums of some of its files and no SHA-256; sizes are those that it downloads.
KNOWN_FILES = {
    "mobilenet_v2": (
        f"{_KERAS}/mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5 (9406464 bytes)",
        f"{_KERAS}/mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224.h5 (14536120 bytes)",
    ),
    "vgg16": (
        f"{_KERAS}/vgg16/vgg16_weights_tf_dim_ordering_tf_kernels.h5 (MD5 64373286793e3c8b2b4e3219cbf3544b)",
        f"{_KERAS}/vgg16/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5 (MD5 6d6bbae143d832006294945121d1f1fc)",
        "https://huggingface.co/timm/vgg16.tv_in1k/resolve/main/model.safetensors "
        "(SHA-256 57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8)",
    ),
}


@dataclass(frozen=True)
class LoadReport:
    """Account of what `load_pretrained` did.

    Attributes:
      source: "keras_vgg16", "keras_mobilenet_v2" or "torch_vgg16".
      scaling: the input scaling these weights were trained with, a name in `INPUT_SCALINGS`.
      loaded: names of the layers read, as paths in the parameters ("backbone/block1_conv1").
      left_random: layers of the parameters the file has nothing for.
      unused: layers of the file with no place in the parameters.
    """

    source: str
    scaling: str
    loaded: tuple[str, ...]
    left_random: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        def names(layers: tuple[str, ...]) -> str:
            return ", ".join(layers) if layers else "none"

        return "\n".join(
            (
                f"pretrained weights: {self.source}; input scaling: {self.scaling}",
                f"  loaded ({len(self.loaded)}): {names(self.loaded)}",
                f"  left random ({len(self.left_random)}): {names(self.left_random)}",
                f"  in the file, not used ({len(self.unused)}): {names(self.unused)}",
            )
        )

    summary = __str__


def load_pretrained(path: str | Path, params: Mapping[str, Any]) -> tuple[dict[str, Any], LoadReport]:
    """A copy of parameters with the weights of a local file, and a report.

    Every layer of the backbone must be in the file. VGG-16's first fully connected layer goes to the `conv1`
    of every block 6 that has its shape (7x7, 512 -> 4096). BatchNorm is folded on reading. New leaves are
    float32 `jax.Array`s.

    Args:
      path: a `.h5`, `.hdf5` or `.safetensors` file; which network it holds is read from it.
      params: the parameters of a `FeatMapNet` (`{"backbone": ..., "block6_0": ...}`) or a tree that contains
        them once, at any depth. Not changed; leaves that are not loaded are the same arrays.

    Returns:
      (parameters, `LoadReport`).

    Raises:
      WeightsError: a ValueError, for a missing or unreadable file, a network it does not know or that is not the
        backbone, a layer that is missing, damaged or of another shape (it is named), parameters without a backbone,
        or a backbone for which no pretrained files exist.
    """
    path = Path(path)
    where, net = _find_featmap(params)
    backbone = net["backbone"]
    expected, order = _architecture(backbone)
    with ExitStack() as stack:
        source = _open(path, stack)
        if source.architecture != expected:
            raise WeightsError(f"{path}: holds {source.architecture} ({source.name}), but the backbone is {expected}")
        new_net = dict(net)
        new_net["backbone"] = _load_backbone(path, source.layers, backbone, order)
        loaded = {f"backbone/{name}" for name in backbone}
        used = set(backbone)
        if source.fc1 is not None:
            name, read = source.fc1
            fitting = [block for block in net if _takes_fc1(block, net[block])]
            if fitting:
                kernel, bias = read((7, 7, 512, 4096))
                for block in fitting:  # arrays of its own each: a training step gives its buffers away, each once
                    conv = {"kernel": jnp.array(kernel, jnp.float32), "bias": jnp.array(bias, jnp.float32)}
                    new_net[block] = {**net[block], "conv1": conv}
                    loaded.add(f"{block}/conv1")
                used.add(name)
    blocks = sorted(name for name in net if name.startswith("block6_"))
    layers = [f"{top}/{layer}" for top in ("backbone", *blocks) for layer in new_net[top]]
    report = LoadReport(
        source=source.name,
        scaling=source.scaling,
        loaded=tuple(name for name in layers if name in loaded),
        left_random=tuple(name for name in layers if name not in loaded),
        unused=tuple(name for name in source.all_layers if name not in used),
    )
    return _replace(params, where, new_net), report


def _open(path: Path, stack: ExitStack) -> WeightFile:
    if not os.path.isfile(path):
        there = "a folder" if os.path.isdir(path) else "no regular file" if os.path.exists(path) else "no such file"
        raise WeightsError(f"{path}: {there}; give the path of a .h5 or .safetensors file (config.init_from)")
    suffix = path.suffix.lower()
    if suffix in (".h5", ".hdf5"):
        return open_keras(path, stack)
    if suffix == ".safetensors":
        return open_torch_vgg16(path, stack)
    raise WeightsError(f"{path}: unknown kind of file {suffix!r}; known: .h5, .hdf5, .safetensors")


def _find_featmap(params: Mapping[str, Any]) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """Path to the tree with "backbone" in it, and that tree."""
    found = []

    def walk(tree: Any, where: tuple[str, ...]) -> None:
        if not isinstance(tree, Mapping):
            return
        if isinstance(tree.get("backbone"), Mapping):
            found.append((where, tree))
            return
        for name, value in tree.items():
            walk(value, (*where, name))

    walk(params, ())
    if len(found) != 1:
        raise WeightsError(f"the parameters must hold one 'backbone', found {len(found)}")
    return found[0]


def _replace(tree: Mapping[str, Any], where: tuple[str, ...], value: Any) -> dict[str, Any]:
    if not where:
        return value
    return {name: _replace(child, where[1:], value) if name == where[0] else child for name, child in tree.items()}


def _architecture(backbone: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The backbone's name, and its layers in the order of the network."""
    for name, module in (("vgg16", vgg16), ("mobilenet_v2", mobilenet_v2)):
        if module.layer_names()[0] in backbone:
            return name, tuple(layer for layer in module.layer_names() if layer in backbone)
    raise WeightsError(
        f"no pretrained weights exist for a backbone with the layers {', '.join(backbone)}; name the workdir of a run "
        "with this backbone, or leave config.init_from empty"
    )


def _takes_fc1(name: str, block: Any) -> bool:
    return name.startswith("block6_") and tuple(block["conv1"]["kernel"].shape) == (7, 7, 512, 4096)


def _load_backbone(
    path: Path, layers: Mapping[str, StoredLayer], backbone: Mapping[str, Any], order: tuple[str, ...]
) -> dict[str, Any]:
    new = {}
    missing = [name for name in order if name not in layers]
    if missing:
        raise WeightsError(f"{path}: has no layer {missing[0]} ({len(missing)} missing in all)")
    for name in order:
        kernel, bias = layers[name](backbone[name]["kernel"].shape)
        new[name] = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    return new
