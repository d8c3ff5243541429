"""ConvNeXt-Tiny."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwcrf_jax.nets.convs import Features, LayerNorm, PatchConv, pad_to_multiple, with_skip_layers
from pwcrf_jax.nets.depthwise import METHODS, DepthwiseConv
from pwcrf_jax.nets.layers import LayeredBackbone, Layers
from pwcrf_jax.nets.state_dicts import Architecture, StateDict
from pwcrf_jax.nets.stored import WeightsError
from pwcrf_jax.nets.torch_layouts import check_unread, count, has, prefix_of

STRIDES = (16, 8)
LAYER_SCALE = 1e-6  # at the start of training


def layer_names(depths: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the top level of the parameters in order: `stem`, `stages_0_0`, ..., `stages_1_downsample`, ..."""
    names = ["stem"]
    for stage, depth in enumerate(depths):
        names += [f"stages_{stage}_downsample"] * bool(stage) + [f"stages_{stage}_{i}" for i in range(depth)]
    return tuple(names)


class ConvNeXtTiny(LayeredBackbone, nn.Module):
    """ConvNeXt-Tiny at a total stride of 16 or 8.

    The 2x2 downsampling of stride 2 that would go past the total stride (that of `stages_3`; with stride 8 that of
    `stages_2` too) has stride 1, padding at the bottom and right, and taps as far apart as the kernels before it; the
    7x7 kernels after it are spread by 2 (then 4): what `output_stride` of timm does. An image is padded with zeros at
    the bottom and right to a multiple of the stride.

    Call: images [B, H, W, 3], already scaled -> [B, ceil(H/stride), ceil(W/stride), C] in `dtype`, the output of the
    layer `output`; those past it are not created. C is 768 of `stages_3`, 384 of `stages_2`, 192 of `stages_1`.
    Parameters are float32: `stem` and `stages_N_downsample` with a convolution and a layer norm, and for each block
    `stages_0_0`, ... its `depthwise`, `norm`, `expand`, `project` and `layer_scale`.

    Attributes:
      output: a stage or a block at the total stride: `stages_2`, `stages_3`, `stages_3_1`; `stages_1` with stride 8.
      stride: 16 or 8.
      depthwise: "shifted", "grouped" or "auto"; see `DepthwiseConv`. All compute the same.
      freeze_until: a stage or a block; no gradient passes to the layers before it. "": to all.
      skip_layers: stages or blocks before the output (`stages_0` has stride 4, `stages_1` 8); the call then returns
        (output, {name: activation}).
      dtype: computed in, float32 or bfloat16; layer norms in float32.
      depths: blocks of each stage.
      width: channels of the first stage.

    Raises:
      ValueError: another stride or `depthwise`, or an unknown layer.
    """

    output: str = "stages_3"
    stride: int = 16
    depthwise: str = "auto"
    freeze_until: str = ""
    skip_layers: tuple[str, ...] = ()
    dtype: Any = jnp.float32
    depths: tuple[int, ...] = (3, 3, 9, 3)
    width: int = 96

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        if self.stride not in STRIDES:
            raise ValueError(f"convnext_tiny: stride must be 16 or 8, got {self.stride!r}")
        if self.depthwise not in METHODS:
            raise ValueError(f"convnext_tiny: depthwise must be auto, shifted or grouped, got {self.depthwise!r}")
        self._layers().check(self.freeze_until, self.skip_layers)
        super().__post_init__()

    def _layers(self) -> Layers:
        """Those that are created."""
        layers = Layers("convnext_tiny", layer_names(self.depths))
        smaller = "stages_0" if self.stride == 8 else "stages_1"
        deep = layers.after(layers.last("output", smaller))
        deep = deep._replace(names=tuple(name for name in deep.names if not name.endswith("downsample")))
        return layers.up_to(deep.last("output", self.output))

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        layers = self._layers()
        frozen, kept = layers.frozen(self.freeze_until), {}
        x = _Stem(self.width, dtype=self.dtype, name="stem")(pad_to_multiple(images.astype(self.dtype), self.stride))
        for before, (name, width, stride, dilation) in zip(layers.names[:-1], self._parts(), strict=False):
            kept[before] = x
            if frozen and frozen[-1] == before:
                x = jax.lax.stop_gradient(x)
            if name.endswith("downsample"):
                x = _Downsample(width, stride, dilation, dtype=self.dtype, name=name)(x)
            else:
                x = _Block(dilation, self.depthwise, dtype=self.dtype, name=name)(x)
        return with_skip_layers(x, layers.kept(kept, self.skip_layers), self.skip_layers)

    def _parts(self) -> list[tuple[str, int, int, int]]:
        """Name, channels, stride and dilation of everything after the stem."""
        parts, total, dilation = [], 4, 1
        for stage, depth in enumerate(self.depths):
            width = self.width * 2**stage
            if stage:
                stride = 2 if 2 * total <= self.stride else 1
                total *= stride
                parts.append((f"stages_{stage}_downsample", width, stride, dilation))
                dilation *= 2 // stride
            parts += [(f"stages_{stage}_{i}", width, 1, dilation) for i in range(depth)]
        return parts


class _Stem(nn.Module):
    """4x4 convolution of stride 4, layer norm."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = PatchConv(self.width, 4, dtype=self.dtype, name="conv")(images)
        return LayerNorm(dtype=self.dtype, name="norm")(x)


class _Downsample(nn.Module):
    """Layer norm, 2x2 convolution of stride 2; or of stride 1, and then dilated."""

    width: int
    stride: int
    dilation: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = LayerNorm(dtype=self.dtype, name="norm")(x)
        if self.stride == 2:
            return PatchConv(self.width, 2, dtype=self.dtype, name="conv")(x)
        return nn.Conv(
            self.width,
            (2, 2),
            padding="SAME",
            kernel_dilation=self.dilation,
            kernel_init=nn.initializers.truncated_normal(0.02),
            dtype=self.dtype,
            name="conv",
        )(x)


class _Block(nn.Module):
    """x + layer_scale * project(GELU(expand(norm(depthwise(x))))), expanded to four times the channels."""

    dilation: int
    depthwise: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        dense = lambda features, name: nn.Dense(
            features, kernel_init=nn.initializers.truncated_normal(0.02), dtype=self.dtype, name=name
        )
        y = DepthwiseConv(window=7, dilation=self.dilation, method=self.depthwise, dtype=self.dtype, name="depthwise")(
            x
        )
        y = LayerNorm(dtype=self.dtype, name="norm")(y)
        y = nn.gelu(dense(4 * channels, "expand")(y), approximate=False)
        y = dense(channels, "project")(y)
        scale = self.param("layer_scale", nn.initializers.constant(LAYER_SCALE), (channels,), jnp.float32)
        return x + y * scale.astype(self.dtype)


class _Layout(NamedTuple):
    """Names in files of one library.

    Attributes:
      source: the library, for reports.
      endings: names that such a file has, after a prefix.
      stem: its convolution and layer norm.
      stage: a stage, with its number in place of {}.
      blocks, downsample: of a stage, after its name; the latter with parts 0, the norm, and 1, the convolution.
      depthwise, norm, expand, project, layer_scale: parts of a block, after its number.
    """

    source: str
    endings: tuple[str, ...]
    stem: tuple[str, str]
    stage: str
    blocks: str
    downsample: str
    depthwise: str
    norm: str
    expand: str
    project: str
    layer_scale: str


_LAYOUTS = (
    _Layout(
        "timm",
        ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"),
        ("stem.0", "stem.1"),
        "stages.{}",
        "blocks",
        "downsample",
        "conv_dw",
        "norm",
        "mlp.fc1",
        "mlp.fc2",
        "gamma",
    ),
    _Layout(
        "transformers",
        ("embeddings.patch_embeddings.weight", "encoder.stages.0.layers.0.dwconv.weight"),
        ("embeddings.patch_embeddings", "embeddings.layernorm"),
        "encoder.stages.{}",
        "layers",
        "downsampling_layer",
        "dwconv",
        "layernorm",
        "pwconv1",
        "pwconv2",
        "layer_scale_parameter",
    ),
)


def _convert(layout: _Layout, state: StateDict, backbone: Mapping[str, Any]) -> dict[str, Any]:
    prefix = prefix_of(state, *layout.endings) or ""
    stage_of = lambda stage: f"{prefix}{layout.stage.format(stage)}"
    depths = [count(state, f"{stage_of(stage)}.{layout.blocks}.") for stage in range(4)]
    _check_depths(state, depths, backbone)
    conv = lambda name, like: state.conv(name, like["kernel"].shape)

    def norm(name: str, like: Any) -> dict[str, Any]:
        shape = like["scale"].shape
        return {"scale": state.array(f"{name}.weight", shape), "bias": state.array(f"{name}.bias", shape)}

    def block(at: str, like: Any) -> dict[str, Any]:
        return {
            "depthwise": conv(f"{at}.{layout.depthwise}", like["depthwise"]),
            "norm": norm(f"{at}.{layout.norm}", like["norm"]),
            "expand": state.linear(f"{at}.{layout.expand}", like["expand"]["kernel"].shape),
            "project": state.linear(f"{at}.{layout.project}", like["project"]["kernel"].shape),
            "layer_scale": state.array(f"{at}.{layout.layer_scale}", like["layer_scale"].shape),
        }

    new = {}
    for layer, like in backbone.items():
        if layer == "stem":
            first, second = (f"{prefix}{name}" for name in layout.stem)
            new[layer] = {"conv": conv(first, like["conv"]), "norm": norm(second, like["norm"])}
            continue
        _, stage, part = layer.split("_")
        if part == "downsample":
            at = f"{stage_of(stage)}.{layout.downsample}"
            new[layer] = {"norm": norm(f"{at}.0", like["norm"]), "conv": conv(f"{at}.1", like["conv"])}
        else:
            new[layer] = block(f"{stage_of(stage)}.{layout.blocks}.{part}", like)
    # The last layer norm stands after the mean over the map, before the classifier.
    unread = [layout.stage.format(stage) for stage in range(4) if f"stages_{stage}_{depths[stage] - 1}" not in new]
    check_unread(state, prefix, [*unread, "layernorm"])
    return new


def _check_depths(state: StateDict, depths: list[int], backbone: Mapping[str, Any]) -> None:
    """The numbers of blocks of each stage must be those of ConvNeXt-Tiny, or of a backbone of other ones."""
    ours = [sum(layer.startswith(f"stages_{s}_") and layer[-1].isdigit() for layer in backbone) for s in range(4)]
    last = max(stage for stage, depth in enumerate(ours) if depth)
    known = list(ConvNeXtTiny.depths)
    expected = [*ours[:last], max(ours[last], known[last])] if ours[:last] == known[:last] else ours[: last + 1]
    if depths[: last + 1] != expected:
        raise WeightsError(
            f"{state.path}: holds a ConvNeXt with stages of {', '.join(map(str, depths))} blocks, but the backbone has "
            f"{', '.join(map(str, expected))}; take a file of ConvNeXt-Tiny"
        )


def _architecture(layout: _Layout) -> Architecture:
    recognise: Callable[[Collection[str]], bool] = lambda names: has(names, *layout.endings)
    convert = lambda state, backbone: _convert(layout, state, backbone)
    return Architecture(f"{layout.source}_convnext", "convnext_tiny", "stages_0_0", "torch", recognise, convert)


ARCHITECTURES = tuple(map(_architecture, _LAYOUTS))
"""Files of ConvNeXt-Tiny of timm and of transformers."""
