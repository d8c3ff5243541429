"""Vision transformers: ViT-S and ViT-B, of ImageNet and of DINOv2."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwcrf_jax.nets.convs import Features, LayerNorm, PatchConv, pad_to_multiple, with_skip_layers
from pwcrf_jax.nets.layers import LayeredBackbone, Layers

PATCHES = {8: 28, 14: 37, 16: 14}
"""Sizes of patches, with the cells a side of published position embeddings: 224 / 8, 518 / 14, 224 / 16."""
EPSILON, LAYER_SCALE = 1e-6, 1e-5  # at the start of training


def layer_names(depth: int) -> tuple[str, ...]:
    """Names of the top level of the parameters in order: `embed`, `blocks_0`, ..., `norm`."""
    return ("embed", *(f"blocks_{i}" for i in range(depth)), "norm")


class ViTSmall(LayeredBackbone, nn.Module):
    """ViT-S: patches as tokens through blocks of attention, all of which see the whole image. The patch is the stride.

    An image is padded with zeros at the bottom and right to a multiple of the patch. Position embeddings are resized to
    its grid as timm does with `dynamic_img_size`: bicubic (a = -1/2), antialiased where the grid is smaller.

    Call: images [B, H, W, 3], already scaled -> [B, ceil(H/patch), ceil(W/patch), C] in `dtype`, the tokens of the
    patches after the layer `output`; those past it are not created. C is 384; 768 of ViT-B. Parameters are float32:
    `embed` with the patches' convolution `conv`, `class_token` [C], `register_tokens` [registers, C] and `positions`
    [grid, grid, C] (the class token's own is part of it); `blocks_0`, ...; `norm`, the last layer norm. `embed` also
    holds `epsilon` [], that of all layer norms: it differs between sources of weights, so it comes with them. It is
    not trained.

    Attributes:
      output: `norm`, or a block, such as `blocks_8`, whose output is taken without a layer norm.
      patch: 8, 14 or 16 pixels.
      registers: number of register tokens; 4 in DINOv2 "with registers".
      layer_scale: whether the branches of blocks are multiplied by a factor for each channel, as in DINOv2.
      grid: cells a side of the position embeddings that are kept; 0: those of published weights (`PATCHES`).
      freeze_until: a block; no gradient passes to the layers before it. "": to all.
      skip_layers: blocks before the output, all at the stride of the patch; the call then returns (output, {name:
        activation}).
      dtype: computed in, float32 or bfloat16; layer norms and the softmax of attention in float32.
      depth, width, heads: blocks, channels, heads of attention.

    Raises:
      ValueError: another patch, a negative number of registers or cells, or an unknown layer.
    """

    output: str = "norm"
    patch: int = 16
    registers: int = 0
    layer_scale: bool = False
    grid: int = 0
    freeze_until: str = ""
    skip_layers: tuple[str, ...] = ()
    dtype: Any = jnp.float32
    depth: int = 12
    width: int = 384
    heads: int = 6

    def __post_init__(self) -> None:
        if self.patch not in PATCHES:
            raise ValueError(f"{self._called}: patch must be one of {', '.join(map(str, PATCHES))}, got {self.patch!r}")
        for name, value in (("registers", self.registers), ("grid", self.grid)):
            if value < 0:
                raise ValueError(f"{self._called}: {name} must not be negative, got {value}")
        self._layers().check(self.freeze_until, self.skip_layers)
        super().__post_init__()

    @property
    def _called(self) -> str:
        return "vit_base" if isinstance(self, ViTBase) else "vit_small"

    @property
    def stride(self) -> int:
        """Pixels to a cell."""
        return self.patch

    def _layers(self) -> Layers:
        """Those that are created."""
        layers = Layers(self._called, layer_names(self.depth))
        return layers.up_to(layers.after("embed").last("output", self.output))

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        layers = self._layers()
        frozen, kept = layers.frozen(self.freeze_until), {}
        images = pad_to_multiple(images.astype(self.dtype), self.patch)
        cells = images.shape[1] // self.patch, images.shape[2] // self.patch
        side = self.grid or PATCHES[self.patch]
        tokens, epsilon = _Embed(self.width, self.patch, side, self.registers, self.dtype, name="embed")(images)
        extra = 1 + self.registers
        patches = lambda tokens: tokens[:, extra:].reshape(tokens.shape[0], *cells, self.width)
        for before, name in zip(layers.names[:-1], layers.names[1:], strict=True):
            kept[before] = patches(tokens)
            if frozen and frozen[-1] == before:
                tokens = jax.lax.stop_gradient(tokens)
            if name == "norm":
                tokens = LayerNorm(dtype=self.dtype, name=name)(tokens, epsilon)
            else:
                tokens = Block(self.heads, self.layer_scale, dtype=self.dtype, name=name)(tokens, epsilon)
        return with_skip_layers(patches(tokens), layers.kept(kept, self.skip_layers), self.skip_layers)


class ViTBase(ViTSmall):
    """ViT-B: `ViTSmall` of twice the width.

    Call: images [B, H, W, 3], already scaled -> [B, ceil(H/patch), ceil(W/patch), 768] in `dtype`, as `ViTSmall`.

    Attributes:
      width, heads: channels, heads of attention; all others are those of `ViTSmall`.
    """

    width: int = 768
    heads: int = 12


def resize_positions(positions: jax.Array, cells: tuple[int, int]) -> jax.Array:
    """Position embeddings [h, w, C] on a grid of another size: bicubic, antialiased; the same array at equal size."""
    if positions.shape[:2] == cells:
        return positions
    return jax.image.resize(positions, (*cells, positions.shape[2]), "cubic", antialias=True)


class _Embed(nn.Module):
    """Images, of whole patches, as tokens [B, 1 + registers + patches, width], and the epsilon of layer norms."""

    width: int
    patch: int
    grid: int
    registers: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = PatchConv(self.width, self.patch, dtype=self.dtype, name="conv")(images)
        small = nn.initializers.truncated_normal(0.02)
        class_token = self.param("class_token", small, (self.width,), jnp.float32)
        positions = self.param("positions", small, (self.grid, self.grid, self.width), jnp.float32)
        epsilon = self.param("epsilon", nn.initializers.constant(EPSILON), (), jnp.float32)
        x = x + resize_positions(positions, (x.shape[1], x.shape[2])).astype(self.dtype)
        extra = class_token[None]
        if self.registers:
            registers = self.param("register_tokens", small, (self.registers, self.width), jnp.float32)
            extra = jnp.concatenate([extra, registers])
        extra = jnp.broadcast_to(extra.astype(self.dtype), (x.shape[0], *extra.shape))
        tokens = jnp.concatenate([extra, x.reshape(x.shape[0], -1, self.width)], axis=1)
        return tokens, jax.lax.stop_gradient(epsilon)


class Block(nn.Module):
    """One block of a ViT, [B, N, C] -> [B, N, C], "pre-norm".

    x + s1 * out(attention(norm1(x))), then x + s2 * project(GELU(expand(norm2(x)))), expanded to four times the
    channels. Queries, keys and values are one product `qkv`, each head's side by side; their softmax is float32.

    Attributes:
      heads: of attention.
      layer_scale: whether there are s1, s2 [C] (`scale1`, `scale2`), else 1.
      dtype: computed in; norms and softmax in float32.
    """

    heads: int
    layer_scale: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, epsilon: jax.Array) -> jax.Array:
        batch, tokens, channels = x.shape
        y = LayerNorm(dtype=self.dtype, name="norm1")(x, epsilon)
        y = self._dense(3 * channels, "qkv")(y).reshape(batch, tokens, 3, self.heads, -1)
        y = jax.nn.dot_product_attention(y[:, :, 0], y[:, :, 1], y[:, :, 2])  # [B, N, heads, C / heads]
        y = self._dense(channels, "out")(y.reshape(x.shape))
        x = x + self._scaled(y, "scale1")
        y = LayerNorm(dtype=self.dtype, name="norm2")(x, epsilon)
        y = nn.gelu(self._dense(4 * channels, "expand")(y), approximate=False)
        return x + self._scaled(self._dense(channels, "project")(y), "scale2")

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, kernel_init=nn.initializers.truncated_normal(0.02), dtype=self.dtype, name=name)

    def _scaled(self, x: jax.Array, name: str) -> jax.Array:
        if not self.layer_scale:
            return x
        scale = self.param(name, nn.initializers.constant(LAYER_SCALE), (x.shape[-1],), jnp.float32)
        return x * scale.astype(self.dtype)
