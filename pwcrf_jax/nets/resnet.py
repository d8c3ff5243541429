"""ResNet-50 and ResNet-101, with BatchNorm folded into the convolutions."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwcrf_jax.nets.convs import Features, PointwiseConv, with_skip_layers
from pwcrf_jax.nets.layers import LayeredBackbone, Layers
from pwcrf_jax.nets.pooling import max_pool_3x3_stride_2
from pwcrf_jax.nets.state_dicts import Architecture, StateDict
from pwcrf_jax.nets.stored import WeightsError
from pwcrf_jax.nets.torch_layouts import check_unread, count, has, prefix_of

STRIDES = (16, 8)
BATCH_NORM_EPSILON = 1e-5  # torchvision's, timm's and transformers'


def layer_names(depths: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the top level of the parameters in order: `conv1`, `layer1_0`, `layer1_1`, ... as torchvision's."""
    blocks = (f"layer{stage}_{i}" for stage, depth in enumerate(depths, start=1) for i in range(depth))
    return ("conv1", *blocks)


class ResNet50(LayeredBackbone, nn.Module):
    """ResNet-50 (v1.5: the stride lies in the 3x3 convolution) at a total stride of 16 or 8.

    Strides past the total one are left out, and the kernels that follow are spread in their place, as `output_stride`
    of timm and `replace_stride_with_dilation` of torchvision do. Padding is PyTorch's: the same on both sides.

    Call: images [B, H, W, 3], already scaled -> [B, ceil(H/stride), ceil(W/stride), C] in `dtype`, the output of the
    layer `output`; those past it are not created. C is 2048 of stage `layer4`, 1024 of `layer3`, 512 of `layer2`.
    Parameters are float32: `conv1`, and for each block `layer1_0`, ... its `conv1`, `conv2`, `conv3`, and where it
    changes the shape `downsample`.

    Attributes:
      output: a stage or a block at the total stride: `layer3`, `layer4`, `layer4_1`; with stride 8 `layer2` too.
      stride: 16 or 8.
      freeze_until: a stage or a block; no gradient passes to the layers before it. "": to all.
      skip_layers: stages or blocks before the output, or `conv1` (stride 2; `layer1` 4, `layer2` 8); the call then
        returns (output, {name: activation}).
      dtype: computed in, float32 or bfloat16.
      depths: blocks of each stage.
      width: channels of `conv1`.

    Raises:
      ValueError: another stride, or an unknown layer.
    """

    output: str = "layer4"
    stride: int = 16
    freeze_until: str = ""
    skip_layers: tuple[str, ...] = ()
    dtype: Any = jnp.float32
    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        if self.stride not in STRIDES:
            raise ValueError(f"{self._called}: stride must be 16 or 8, got {self.stride!r}")
        self._layers().check(self.freeze_until, self.skip_layers)
        super().__post_init__()

    @property
    def _called(self) -> str:
        return type(self).__name__.lower()

    def _layers(self) -> Layers:
        """Those that are created."""
        layers = Layers(self._called, layer_names(self.depths))
        there = "layer1" if self.stride == 8 else "layer2"  # the last stage of a smaller stride
        output = layers.after(layers.last("output", there)).last("output", self.output)
        return layers.up_to(output)

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        layers = self._layers()
        frozen, kept = layers.frozen(self.freeze_until), {}
        x = nn.relu(_conv(self.width, 7, 2, 1, self.dtype, "conv1")(images.astype(self.dtype)))
        for before, name, block in zip(layers.names[:-1], layers.names[1:], self._blocks(), strict=False):
            kept[before] = x
            if frozen and frozen[-1] == before:
                x = jax.lax.stop_gradient(x)
            if before == "conv1":
                x = max_pool_3x3_stride_2(x)
            x = _Bottleneck(*block, self.dtype, name=name)(x)
        return with_skip_layers(x, layers.kept(kept, self.skip_layers), self.skip_layers)

    def _blocks(self) -> list[tuple[int, int, int, bool]]:
        """Width, stride, dilation of the 3x3 convolution, and whether it is its stage's first, of each block."""
        blocks, total, dilation = [], 4, 1
        for stage, depth in enumerate(self.depths):
            stride, before = (2 if stage else 1), dilation
            if total * stride > self.stride:
                dilation, stride = dilation * stride, 1
            total *= stride
            for i in range(depth):
                # The first block of a stage still sees a map that is as dense as the stage before left it.
                spread = dilation if i else before
                blocks.append((self.width * 2**stage, 1 if i else stride, spread, i == 0))
        return blocks


class ResNet101(ResNet50):
    """ResNet-101: `ResNet50` with 23 blocks in its third stage.

    Call: images [B, H, W, 3], already scaled -> [B, ceil(H/stride), ceil(W/stride), C] in `dtype`, as `ResNet50`.

    Attributes:
      depths: blocks of each stage; all others are those of `ResNet50`.
    """

    depths: tuple[int, ...] = (3, 4, 23, 3)


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and a residual sum: [B, h, w, C] -> [B, ceil(h/stride), ceil(w/stride), 4 width]."""

    width: int
    stride: int
    dilation: int
    first: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(PointwiseConv(self.width, dtype=self.dtype, name="conv1")(x))
        y = nn.relu(_conv(self.width, 3, self.stride, self.dilation, self.dtype, "conv2")(y))
        # Without BatchNorm, branches of full size would double the variance at every sum, if nothing is loaded.
        small = nn.initializers.variance_scaling(0.1, "fan_in", "normal")
        y = PointwiseConv(4 * self.width, dtype=self.dtype, kernel_init=small, name="conv3")(y)
        if self.first:
            x = x[:, :: self.stride, :: self.stride] if self.stride > 1 else x
            x = PointwiseConv(4 * self.width, dtype=self.dtype, name="downsample")(x)
        return nn.relu(x + y)


def _conv(features: int, kernel: int, stride: int, dilation: int, dtype: Any, name: str) -> nn.Conv:
    """With PyTorch's padding, which differs from "SAME" where the stride is 2."""
    pad = dilation * (kernel // 2)
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=dilation,
        kernel_init=nn.initializers.he_normal(),
        dtype=dtype,
        name=name,
    )


class _Layout(NamedTuple):
    """Names in files of one library.

    Attributes:
      source: the library, for reports.
      endings: names that such a file has, after a prefix.
      blocks: what the names of blocks of a stage begin with, before their number.
      names: (convolution, BatchNorm) of a part of a layer.
    """

    source: str
    endings: tuple[str, ...]
    blocks: Callable[[int], str]
    names: Callable[[str, str], tuple[str, str]]


def _torchvision_names(layer: str, part: str) -> tuple[str, str]:
    if layer == "conv1":
        return "conv1", "bn1"
    block = layer.replace("_", ".")
    if part == "downsample":
        return f"{block}.downsample.0", f"{block}.downsample.1"
    return f"{block}.{part}", f"{block}.bn{part[-1]}"


def _transformers_names(layer: str, part: str) -> tuple[str, str]:
    if layer == "conv1":
        at = "embedder.embedder"
    else:
        stage, block = layer.removeprefix("layer").split("_")
        at = f"encoder.stages.{int(stage) - 1}.layers.{block}."
        at += "shortcut" if part == "downsample" else f"layer.{int(part[-1]) - 1}"
    return f"{at}.convolution", f"{at}.normalization"


_LAYOUTS = (
    # A third convolution in a block: ResNet-18 and -34 have two.
    _Layout("torch", ("conv1.weight", "layer1.0.conv3.weight"), lambda stage: f"layer{stage}.", _torchvision_names),
    _Layout(
        "transformers",
        ("embedder.embedder.convolution.weight", "encoder.stages.0.layers.0.layer.2.convolution.weight"),
        lambda stage: f"encoder.stages.{stage - 1}.layers.",
        _transformers_names,
    ),
)


def _convert(layout: _Layout, state: StateDict, backbone: Mapping[str, Any]) -> dict[str, Any]:
    prefix = prefix_of(state, *layout.endings) or ""

    def conv(layer: str, part: str, kernel: Any) -> dict[str, Any]:
        name, norm = (f"{prefix}{name}" for name in layout.names(layer, part))
        label = f"{layer}/{part}" if part else layer
        return state.conv(name, kernel.shape, norm=norm, epsilon=BATCH_NORM_EPSILON, label=label)

    depths = [count(state, f"{prefix}{layout.blocks(stage)}") for stage in range(1, 5)]
    _check_depths(state, depths, backbone)
    new = {"conv1": conv("conv1", "", backbone["conv1"]["kernel"])}
    for layer in backbone:
        if layer != "conv1":
            new[layer] = {part: conv(layer, part, values["kernel"]) for part, values in backbone[layer].items()}
    unread = [f"{layout.blocks(s)}{i}" for s in range(1, 5) for i in range(depths[s - 1]) if f"layer{s}_{i}" not in new]
    check_unread(state, prefix, unread)
    return new


def _check_depths(state: StateDict, depths: list[int], backbone: Mapping[str, Any]) -> None:
    """Stages must have as many blocks as the backbone's; at least as many its last, which may end early."""
    ours = [sum(layer.startswith(f"layer{stage}_") for layer in backbone) for stage in range(1, 5)]
    last = max(i for i, depth in enumerate(ours) if depth)
    # ResNet-50 and -101 differ in their third stage alone, of which all 6 blocks of the former may be the output.
    whole = ours[:last] == depths[:last] and depths[last] >= ours[last]
    if not whole or (last == 2 and ours[2] == ResNet50.depths[2] and depths[2] == ResNet101.depths[2]):
        raise WeightsError(
            f"{state.path}: holds a ResNet with stages of {', '.join(map(str, depths))} blocks, but the backbone has "
            f"{', '.join(str(depth) for depth in ours if depth)}; resnet50 is 3, 4, 6, 3 and resnet101 is 3, 4, 23, 3 "
            "(config.model.backbone)"
        )


def _architecture(layout: _Layout) -> Architecture:
    recognise: Callable[[Collection[str]], bool] = lambda names: has(names, *layout.endings)
    convert = lambda state, backbone: _convert(layout, state, backbone)
    return Architecture(f"{layout.source}_resnet", "resnet", "layer1_0", "torch", recognise, convert)


ARCHITECTURES = tuple(map(_architecture, _LAYOUTS))
"""torchvision's and timm's files of ResNet-50 and -101, and those of transformers."""
