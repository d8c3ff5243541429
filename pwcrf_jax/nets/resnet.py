"""ResNet-50 and ResNet-101, with BatchNorm folded into the convolutions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwcrf_jax.nets.convs import Features, PointwiseConv, with_skip_layers
from pwcrf_jax.nets.layers import Layers
from pwcrf_jax.nets.pooling import max_pool_3x3_stride_2

STRIDES = (16, 8)


def layer_names(depths: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the top level of the parameters in order: `conv1`, `layer1_0`, `layer1_1`, ... as torchvision's."""
    blocks = (f"layer{stage}_{i}" for stage, depth in enumerate(depths, start=1) for i in range(depth))
    return ("conv1", *blocks)


class ResNet50(nn.Module):
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

    def layer_names(self) -> tuple[str, ...]:
        """Top level of the parameters, in order."""
        return self._layers().names

    def frozen_layers(self) -> tuple[str, ...]:
        """Those of `layer_names()` that no gradient reaches."""
        return self._layers().frozen(self.freeze_until)

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
    """ResNet-101: `ResNet50` with 23 blocks in its third stage."""

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
