"""Files of vision transformers of timm and of transformers."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from pwcrf_jax.nets.state_dicts import Architecture, StateDict
from pwcrf_jax.nets.stored import WeightsError
from pwcrf_jax.nets.torch_layouts import check_unread, count, has, prefix_of

_MASK_TOKEN = "embeddings.mask_token"  # of pretraining alone


class _Layout(NamedTuple):
    """Names in files of one library.

    Attributes:
      source: for reports.
      scaling: the input scaling of published weights; files do not say it.
      epsilon: of layer norms.
      patches: the convolution of patches.
      class_token, registers, positions: arrays; registers: "" where there are none.
      blocks: what the names of blocks begin with.
      norms: of a block, ahead of its attention and of its dense layers.
      qkv: queries, keys and values, in one layer or in three.
      dense: after the attention, then expanding and projecting.
      scales: arrays of layer scale, () where there are none.
      last_norm: after the blocks.
    """

    source: str
    scaling: str
    epsilon: float
    patches: str
    class_token: str
    registers: str
    positions: str
    blocks: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    dense: tuple[str, str, str]
    scales: tuple[str, ...]
    last_norm: str

    @property
    def endings(self) -> tuple[str, ...]:
        """Names that such a file has, after a prefix."""
        first = f"{self.blocks}0."
        parts = [f"{first}{self.qkv[0]}.weight", f"{first}{self.norms[0]}.weight"]
        return (f"{self.patches}.weight", self.positions, *parts, *(f"{first}{name}" for name in self.scales))


_TIMM = _Layout(
    source="timm_vit",
    scaling="tf",
    epsilon=1e-6,
    patches="patch_embed.proj",
    class_token="cls_token",
    registers="reg_token",
    positions="pos_embed",
    blocks="blocks.",
    norms=("norm1", "norm2"),
    qkv=("attn.qkv",),
    dense=("attn.proj", "mlp.fc1", "mlp.fc2"),
    scales=(),
    last_norm="norm",
)
_TRANSFORMERS = _Layout(
    source="transformers_vit",
    scaling="tf",
    epsilon=1e-12,
    patches="embeddings.patch_embeddings.projection",
    class_token="embeddings.cls_token",
    registers="embeddings.register_tokens",
    positions="embeddings.position_embeddings",
    blocks="encoder.layer.",
    norms=("layernorm_before", "layernorm_after"),
    qkv=tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    dense=("attention.output.dense", "intermediate.dense", "output.dense"),
    scales=(),
    last_norm="layernorm",
)
_LAYOUTS = (
    _TIMM._replace(source="timm_dinov2", scaling="torch", scales=("ls1.gamma", "ls2.gamma")),
    _TRANSFORMERS._replace(
        source="transformers_dinov2",
        scaling="torch",
        epsilon=1e-6,
        norms=("norm1", "norm2"),
        dense=("attention.output.dense", "mlp.fc1", "mlp.fc2"),
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    ),
    _TIMM,
    _TRANSFORMERS,
)


class _Form(NamedTuple):
    """What makes one ViT another one, of a file or of a backbone, in the words of the backbone's options."""

    width: int
    patch: int
    registers: int
    layer_scale: bool
    grid: int
    blocks: int


def _form_of_file(layout: _Layout, state: StateDict, prefix: str) -> tuple[_Form, bool]:
    """The form, and whether the class token has a position embedding of its own."""
    shape = lambda name: state[f"{prefix}{name}"].shape if f"{prefix}{name}" in state else ()
    weight, positions = shape(f"{layout.patches}.weight"), shape(layout.positions)
    if len(weight) != 4 or len(positions) != 3 or shape(layout.class_token) != (1, 1, weight[0]):
        raise WeightsError(
            f"{state.path}: not a ViT known here, its patches, class token and position embeddings have the shapes "
            f"{weight}, {shape(layout.class_token)}, {positions}"
        )
    cells = positions[1]
    grid = math.isqrt(cells)
    own = grid * grid != cells
    if own and (grid := math.isqrt(cells - 1)) ** 2 != cells - 1:
        raise WeightsError(f"{state.path}: its {cells} position embeddings are those of no square, which is not read")
    registers = (shape(layout.registers) or (1, 0))[1]
    blocks = count(state, f"{prefix}{layout.blocks}")
    return _Form(weight[0], weight[2], registers, bool(layout.scales), grid, blocks), own


def _form_of_backbone(backbone: Mapping[str, Any]) -> _Form:
    embed = backbone["embed"]
    patch, _, _, width = embed["conv"]["kernel"].shape
    registers = embed["register_tokens"].shape[0] if "register_tokens" in embed else 0
    blocks = sum(layer.startswith("blocks_") for layer in backbone)
    return _Form(width, patch, registers, "scale1" in backbone["blocks_0"], embed["positions"].shape[0], blocks)


def _check_form(state: StateDict, theirs: _Form, ours: _Form, whole: bool) -> None:
    """whole: whether the backbone has all blocks; else the file may have more."""
    if not whole and theirs.blocks > ours.blocks:
        theirs = theirs._replace(blocks=ours.blocks)
    different = [name for name in _Form._fields if getattr(theirs, name) != getattr(ours, name)]
    if different:
        told = lambda form: ", ".join(f"{name} {getattr(form, name)}" for name in different)
        raise WeightsError(
            f"{state.path}: holds a ViT of {told(theirs)}, but the backbone has {told(ours)}; set its options to the "
            "file's (config.model.vit_small is of width 384, vit_base of 768, both of 12 blocks)"
        )


def _convert(layout: _Layout, state: StateDict, backbone: Mapping[str, Any]) -> dict[str, Any]:
    prefix = prefix_of(state, *layout.endings) or ""
    theirs, own = _form_of_file(layout, state, prefix)
    _check_form(state, theirs, _form_of_backbone(backbone), "norm" in backbone)

    def norm(name: str, like: Any) -> dict[str, Any]:
        shape = like["scale"].shape
        return {"scale": state.array(f"{name}.weight", shape), "bias": state.array(f"{name}.bias", shape)}

    new = {}
    for layer, like in backbone.items():
        if layer == "embed":
            new[layer] = _embed(layout, state, prefix, like, own)
        elif layer == "norm":
            new[layer] = norm(f"{prefix}{layout.last_norm}", like)
        else:
            at = f"{prefix}{layout.blocks}{layer.removeprefix('blocks_')}"
            new[layer] = _block(layout, state, at, like)
            new[layer] |= {f"norm{i}": norm(f"{at}.{name}", like["norm1"]) for i, name in enumerate(layout.norms, 1)}
    allowed = [f"{layout.blocks}{i}" for i in range(theirs.blocks) if f"blocks_{i}" not in new]
    allowed += [] if "norm" in backbone else [layout.last_norm]
    check_unread(state, prefix, [*allowed, _MASK_TOKEN])
    return new


def _embed(layout: _Layout, state: StateDict, prefix: str, like: Mapping[str, Any], own: bool) -> dict[str, Any]:
    width, grid = like["class_token"].shape[0], like["positions"].shape[0]
    positions = state.array(f"{prefix}{layout.positions}", (1, grid * grid + own, width))[0]
    class_token = state.array(f"{prefix}{layout.class_token}", (1, 1, width))[0, 0]
    new = {
        "conv": state.conv(f"{prefix}{layout.patches}", like["conv"]["kernel"].shape),
        "class_token": class_token + positions[0] if own else class_token,
        "positions": positions[int(own) :].reshape(grid, grid, width),
        "epsilon": np.float32(layout.epsilon),
    }
    if "register_tokens" in like:
        shape = (1, *like["register_tokens"].shape)
        new["register_tokens"] = state.array(f"{prefix}{layout.registers}", shape)[0]
    return new


def _block(layout: _Layout, state: StateDict, at: str, like: Mapping[str, Any]) -> dict[str, Any]:
    """All but its layer norms."""
    width, three = like["qkv"]["kernel"].shape
    parts = [state.linear(f"{at}.{name}", (width, three // len(layout.qkv))) for name in layout.qkv]
    new: dict[str, Any] = {"qkv": {key: np.concatenate([part[key] for part in parts], -1) for key in parts[0]}}
    for ours, name in zip(("out", "expand", "project"), layout.dense, strict=True):
        new[ours] = state.linear(f"{at}.{name}", like[ours]["kernel"].shape)
    for ours, name in zip(("scale1", "scale2"), layout.scales, strict=False):
        new[ours] = state.array(f"{at}.{name}", (width,))
    return new


def _architecture(layout: _Layout) -> Architecture:
    recognise: Callable[[Collection[str]], bool] = lambda names: has(names, *layout.endings)
    convert = lambda state, backbone: _convert(layout, state, backbone)
    return Architecture(layout.source, "vit", "blocks_0", layout.scaling, recognise, convert)


ARCHITECTURES = tuple(map(_architecture, _LAYOUTS))
"""ViTs with layer scale (DINOv2) of timm and of transformers, then those without."""
