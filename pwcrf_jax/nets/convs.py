"""Convolutions in forms that are fast on the backend at hand."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Features = jax.Array | tuple[jax.Array, dict[str, jax.Array]]
"""The output of a backbone, or (output, {layer: activation}) where skip layers are asked for."""


class PointwiseConv(nn.Module):
    """1x1 convolution with bias, as one matrix product: much the faster gradient on CPU, the same elsewhere.

    Call: [B, H, W, C] -> [B, H, W, features] in `dtype`. Parameters are float32 and those of a convolution:
    `kernel` [1, 1, C, features], `bias` [features].
    """

    features: int
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1, 1, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        x, kernel, bias = (value.astype(self.dtype) for value in (x, kernel, bias))
        rows = jnp.dot(x.reshape(-1, x.shape[-1]), kernel[0, 0]) + bias
        return rows.reshape(*x.shape[:-1], self.features)


class PatchConv(nn.Module):
    """Convolution of patches that do not overlap, with bias, as one matrix product.

    Call: [B, H, W, C] -> [B, H / patch, W / patch, features] in `dtype`; H and W are multiples of `patch`. Parameters
    are float32 and those of a convolution: `kernel` [patch, patch, C, features], `bias` [features].
    """

    features: int
    patch: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        side, rows, cols = self.patch, height // self.patch, width // self.patch
        shape = (side, side, channels, self.features)
        kernel = self.param("kernel", nn.initializers.truncated_normal(0.02), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        x, kernel, bias = (value.astype(self.dtype) for value in (x, kernel, bias))
        x = x.reshape(batch, rows, side, cols, side, channels).transpose(0, 1, 3, 2, 4, 5)
        out = jnp.dot(x.reshape(batch * rows * cols, -1), kernel.reshape(-1, self.features)) + bias
        return out.reshape(batch, rows, cols, self.features)


class LayerNorm(nn.Module):
    """scale * (x - mean) / sqrt(variance + epsilon) + bias, over the last axis.

    Call: [..., C], epsilon -> [..., C] in `dtype`; computed in float32. Parameters are float32: `scale`, `bias` [C].
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, epsilon: jax.Array | float = 1e-6) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
        return (x * scale + bias).astype(self.dtype)


def pad_to_multiple(images: jax.Array, multiple: int) -> jax.Array:
    """Images [B, H, W, C] with zeros at the bottom and right, up to multiples of `multiple`."""
    rows, cols = (-size % multiple for size in images.shape[1:3])
    return jnp.pad(images, ((0, 0), (0, rows), (0, cols), (0, 0))) if rows or cols else images


def conv(features: int, kernel: int, *, name: str, dtype: Any, stride: int = 1) -> nn.Module:
    """A square convolution with bias, "SAME" padding and He initialisation. Parameters: `kernel`, `bias`."""
    if kernel == 1 and stride == 1:
        return PointwiseConv(features, dtype=dtype, name=name)
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding="SAME",
        kernel_init=nn.initializers.he_normal(),
        dtype=dtype,
        name=name,
    )


def check_skip_layers(backbone: str, wanted: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError where a backbone is asked for a layer that it does not have before its output."""
    for name in wanted:
        if name not in known:
            raise ValueError(f"{backbone}: no layer {name!r} before the output; known: {', '.join(known)}")


def layers_before(block: str, layers: Sequence[str]) -> tuple[str, ...]:
    """The layers ahead of a block, whose own are BLOCK or begin with BLOCK_; none where block is ""."""
    if not block:
        return ()
    return tuple(layers[: next(i for i, name in enumerate(layers) if name == block or name.startswith(f"{block}_"))])


def with_skip_layers(output: jax.Array, kept: Mapping[str, jax.Array], wanted: Sequence[str]) -> Features:
    """A backbone's output, with those of the activations that are wanted, if any."""
    return (output, {name: kept[name] for name in wanted}) if wanted else output
