"""MobileNetV2 at stride 16, with BatchNorm folded into the convolutions."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwcrf_jax.nets.convs import Features, check_skip_layers, conv, layers_before, with_skip_layers
from pwcrf_jax.nets.depthwise import METHODS, DepthwiseConv


class Block(NamedTuple):
    """One inverted residual block: expansion to `expand` channels (0: none), depthwise, projection."""

    name: str
    expand: int
    project: int
    stride: int
    dilation: int
    residual: bool


def _blocks() -> tuple[Block, ...]:
    blocks = [Block("expanded_conv", 0, 16, 1, 1, False)]
    index, channels = 1, 16
    # Channels, number of blocks, stride of the first.
    for project, count, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 1), (320, 1, 1)):
        for i in range(count):
            # The stride of block_13, 2 in the original, is 1 here; the kernels after it are spread by 2.
            dilation = 2 if index > 13 else 1
            blocks.append(Block(f"block_{index}", 6 * channels, project, stride if i == 0 else 1, dilation, i > 0))
            index, channels = index + 1, project
    return tuple(blocks)


BLOCKS = _blocks()


def _layers(block: Block) -> tuple[str, ...]:
    parts = ("expand", "depthwise", "project") if block.expand else ("depthwise", "project")
    return tuple(f"{block.name}_{part}" for part in parts)


def layer_names() -> tuple[str, ...]:
    """Names of all convolutions in order, as Keras Applications names them."""
    return ("Conv1", *(name for block in BLOCKS for name in _layers(block)), "Conv_1")


def skip_layer_names() -> tuple[str, ...]:
    """The layers that `MobileNetV2.skip_layers` may name: expansions, strides 2 (block_1), 4 (2, 3), 8 (4 to 6), 16."""
    return tuple(f"{block.name}_expand" for block in BLOCKS if block.expand)


def output_names() -> tuple[str, ...]:
    """The layers that `MobileNetV2.output` may name, in order: everything at stride 16.

    `block_N_project` is the projection before the residual sum, `block_N` the block's output after it.
    """
    names = [name for block in BLOCKS for name in (*_layers(block), block.name)] + ["Conv_1"]
    return tuple(names[names.index("block_6_depthwise") :])


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1.0, relu6, TensorFlow's "SAME" padding, total stride 16.

    Call: images [B, H, W, 3], already scaled -> [B, ceil(H/16), ceil(W/16), C] in `dtype`, the (activated)
    output of the layer `output`, one of `output_names()`; layers past it are not created. Parameters are
    float32, named as in Keras Applications: `Conv1`, `expanded_conv_depthwise`, ..., `Conv_1`.

    Attributes:
      output: the layer returned; the default `block_13_expand` has 576 channels.
      depthwise: "shifted", "grouped" or "auto"; see `DepthwiseConv`. All compute the same.
      freeze_until: a block's name, such as "block_6"; no gradient passes to the layers before that block, so
          they need no backward pass. "" trains everything.
      skip_layers: some of `skip_layer_names()`, before the output; the call then returns (output, {name: activation}).
      dtype: computed in, float32 or bfloat16.

    Raises:
      ValueError: an unknown `output`, `depthwise`, `freeze_until` or layer in `skip_layers`.
    """

    output: str = "block_13_expand"
    depthwise: str = "auto"
    freeze_until: str = ""
    skip_layers: tuple[str, ...] = ()
    dtype: Any = jnp.float32

    stride = 16  # pixels to a cell

    def __post_init__(self) -> None:
        if self.output not in output_names():
            raise ValueError(
                f"mobilenet_v2: output {self.output!r} is not a layer at stride 16; known: {', '.join(output_names())}"
            )
        if self.depthwise not in METHODS:
            raise ValueError(f"mobilenet_v2: depthwise must be auto, shifted or grouped, got {self.depthwise!r}")
        names = [block.name for block in BLOCKS] + ["Conv_1"]
        if self.freeze_until and self.freeze_until not in names:
            raise ValueError(
                f"mobilenet_v2: freeze_until {self.freeze_until!r} is not a block; known: {', '.join(names)}"
            )
        if self.freeze_until and not self.output.startswith(self.freeze_until):
            order = output_names()
            first = f"{self.freeze_until}_depthwise" if self.freeze_until != "Conv_1" else "Conv_1"
            if first in order and order.index(first) > order.index(self.output):
                raise ValueError(
                    f"mobilenet_v2: freeze_until {self.freeze_until!r} lies past the output {self.output!r}"
                )
        check_skip_layers(
            "mobilenet_v2", self.skip_layers, [n for n in layer_names()[: self._place] if n in skip_layer_names()]
        )
        super().__post_init__()

    @property
    def frozen_layers(self) -> tuple[str, ...]:
        """Those before freeze_until."""
        return layers_before(self.freeze_until, layer_names())

    @property
    def _place(self) -> int:
        """How many layers lie before the output."""
        layers = layer_names()
        return next(i for i, name in enumerate(layers) if self.output in (name, name.rsplit("_", 1)[0]))

    def __call__(self, images: jax.Array) -> Features:
        kept: dict[str, jax.Array] = {}
        return with_skip_layers(self._run(images, kept), kept, self.skip_layers)

    @nn.compact
    def _run(self, images: jax.Array, kept: dict[str, jax.Array]) -> jax.Array:
        x = nn.relu6(conv(32, 3, stride=2, name="Conv1", dtype=self.dtype)(images.astype(self.dtype)))
        for block in BLOCKS:
            if block.name == self.freeze_until:
                x = jax.lax.stop_gradient(x)
            block_input = x
            if block.expand:
                x = nn.relu6(conv(block.expand, 1, name=f"{block.name}_expand", dtype=self.dtype)(x))
                if self.output == f"{block.name}_expand":
                    return x
                kept[f"{block.name}_expand"] = x
            x = nn.relu6(
                DepthwiseConv(
                    stride=block.stride,
                    dilation=block.dilation,
                    method=self.depthwise,
                    dtype=self.dtype,
                    name=f"{block.name}_depthwise",
                )(x)
            )
            if self.output == f"{block.name}_depthwise":
                return x
            x = conv(block.project, 1, name=f"{block.name}_project", dtype=self.dtype)(x)
            if self.output == f"{block.name}_project":
                return x
            if block.residual:
                x = block_input + x
            if self.output == block.name:
                return x
        if self.freeze_until == "Conv_1":
            x = jax.lax.stop_gradient(x)
        return nn.relu6(conv(1280, 1, name="Conv_1", dtype=self.dtype)(x))
