"""Depthwise 3x3 convolution, in a form that is fast on the backend at hand."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def _same_padding(size: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's "SAME" padding of a window of 3: what is odd goes to the end."""
    total = max((-(-size // stride) - 1) * stride + 2 * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def depthwise_grouped(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Depthwise convolution as a grouped one. x: [B, H, W, C]; kernel: [3, 3, 1, C]; "SAME" padding."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def depthwise_shifted(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Depthwise convolution as nine shifted multiply-adds. x: [B, H, W, C]; kernel: [3, 3, 1, C]; "SAME"."""
    height, width = x.shape[1:3]
    rows, cols = -(-height // stride), -(-width // stride)
    padding = [(0, 0), *(_same_padding(size, stride, dilation) for size in (height, width)), (0, 0)]
    x = jnp.pad(x, padding)
    out = None
    for i in range(3):
        for j in range(3):
            top, left = i * dilation, j * dilation
            part = lax.slice(
                x,
                (0, top, left, 0),
                (x.shape[0], top + (rows - 1) * stride + 1, left + (cols - 1) * stride + 1, x.shape[3]),
                (1, stride, stride, 1),
            )
            term = part * kernel[i, j, 0]
            out = term if out is None else out + term
    return out


class DepthwiseConv(nn.Module):
    """Depthwise 3x3 convolution with bias and "SAME" padding.

    Call: [B, H, W, C] -> [B, ceil(H/stride), ceil(W/stride), C] in `dtype`. Parameters are float32:
    `kernel` [3, 3, 1, C], `bias` [C], whatever the method.

    method: "shifted" sums nine shifted products (the gradient of a grouped convolution is slow on CPU),
    "grouped" is one grouped convolution, "auto" takes the former when JAX's default backend is the CPU.
    """

    stride: int = 1
    dilation: int = 1
    method: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.he_normal(), (3, 3, 1, channels), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)
        x, kernel, bias = (value.astype(self.dtype) for value in (x, kernel, bias))
        shifted = self.method == "shifted" or (self.method == "auto" and jax.default_backend() == "cpu")
        convolve = depthwise_shifted if shifted else depthwise_grouped
        return convolve(x, kernel, self.stride, self.dilation) + bias
