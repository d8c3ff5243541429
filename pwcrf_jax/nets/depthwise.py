"""Depthwise convolution with a small odd kernel, in a form that is fast on the backend at hand.

On CPU, XLA is slow at grouped convolutions, most of all at their gradients. There, shifted multiply-adds, one for
each tap, take their place, with a gradient of their own that is made of such multiply-adds too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

METHODS = ("auto", "shifted", "grouped")
"""Ways to compute a depthwise convolution; see `DepthwiseConv`."""


def depthwise_grouped(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Depthwise convolution as a grouped one. x: [B, H, W, C]; kernel: [k, k, 1, C]; "SAME" padding."""
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
    """Depthwise convolution as k * k shifted multiply-adds. x: [B, H, W, C]; kernel: [k, k, 1, C], k odd; "SAME".

    Reverse-mode differentiable. Raises ValueError unless stride is 1, or 2 with dilation 1 and a 3x3 kernel.
    """
    if stride != 1 and (stride, dilation, kernel.shape[0]) != (2, 1, 3):
        raise ValueError(
            "stride must be 1, or 2 with dilation 1 and a 3x3 kernel; "
            f"got stride {stride}, dilation {dilation}, kernel {kernel.shape[:2]}"
        )
    return _shifted(x, kernel, stride, dilation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    rows, cols = (-(-size // stride) for size in x.shape[1:3])
    padded = _pad_same(x, kernel, stride, dilation)
    total = jnp.zeros((), x.dtype)
    for i in range(kernel.shape[0]):
        parts = (
            _every(padded, i * dilation, j * dilation, rows, cols, stride) * kernel[i, j, 0]
            for j in range(kernel.shape[1])
        )
        total = sum(parts, start=total)
        if kernel.shape[0] > 3:  # one loop over 49 taps takes XLA half a minute to compile, and runs slower
            total = lax.optimization_barrier(total)
    return total


def _shifted_forward(
    x: jax.Array, kernel: jax.Array, stride: int, dilation: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _shifted(x, kernel, stride, dilation), (x, kernel)


def _shifted_backward(
    stride: int, dilation: int, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    if stride == 1:
        x_grad = _shifted(grad, kernel[::-1, ::-1], 1, dilation)
    else:
        x_grad = _input_gradient_of_stride_2(x.shape, kernel, grad)
    return x_grad, _kernel_gradient(x, kernel, grad, stride, dilation)


_shifted.defvjp(_shifted_forward, _shifted_backward)


def _taps(kernel: jax.Array) -> list[tuple[int, int]]:
    return [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]


def _same_padding(size: int, stride: int, reach: int) -> tuple[int, int]:
    """TensorFlow's "SAME" padding of a window of reach + 1 cells: what is odd goes to the end."""
    total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
    return total // 2, total - total // 2


def _pad_same(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    rows, cols = (_same_padding(size, stride, (kernel.shape[0] - 1) * dilation) for size in x.shape[1:3])
    return jnp.pad(x, ((0, 0), rows, cols, (0, 0)))


def _every(x: jax.Array, top: int, left: int, rows: int, cols: int, stride: int) -> jax.Array:
    """`rows` x `cols` cells of x, from (top, left) in steps of `stride`."""
    bottom, right = top + (rows - 1) * stride + 1, left + (cols - 1) * stride + 1
    return lax.slice(x, (0, top, left, 0), (x.shape[0], bottom, right, x.shape[3]), (1, stride, stride, 1))


def _input_gradient_of_stride_2(shape: tuple[int, ...], kernel: jax.Array, grad: jax.Array) -> jax.Array:
    # Input cells of each parity of row and column take few taps, all at stride 1; the four are interleaved.
    batch, height, width, channels = shape
    rows, cols = grad.shape[1] + 1, grad.shape[2] + 1
    padded = jnp.pad(grad, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def parity(odd_row: int, odd_col: int) -> jax.Array:
        taps = [(i, j) for i, j in _taps(kernel) if i % 2 == odd_row and j % 2 == odd_col]
        parts = (_every(padded, 1 - i // 2, 1 - j // 2, rows, cols, 1) * kernel[i, j, 0] for i, j in taps)
        return sum(parts, start=jnp.zeros((), grad.dtype))

    even, odd = (jnp.stack([parity(row, 0), parity(row, 1)], axis=3) for row in (0, 1))
    full = jnp.stack([even, odd], axis=2).reshape(batch, 2 * rows, 2 * cols, channels)
    top, left = _same_padding(height, 2, 2)[0], _same_padding(width, 2, 2)[0]
    return full[:, top : top + height, left : left + width]


def _kernel_gradient(x: jax.Array, kernel: jax.Array, grad: jax.Array, stride: int, dilation: int) -> jax.Array:
    padded = _pad_same(x, kernel, stride, dilation)
    if kernel.shape[0] == 3:
        per_tap = _tap_gradients(padded, grad, _taps(kernel), stride, dilation)
    else:  # a row of taps at a time: more sums leave the cache, and are compiled for long
        columns = [(0, j) for j in range(kernel.shape[1])]

        def of_row(_: None, top: jax.Array) -> tuple[None, jax.Array]:
            part = lax.dynamic_slice_in_dim(padded, top, (grad.shape[1] - 1) * stride + 1, axis=1)
            return None, _tap_gradients(part, grad, columns, stride, dilation)

        _, per_tap = lax.scan(of_row, None, dilation * jnp.arange(kernel.shape[0]))
    return per_tap.reshape(kernel.shape).astype(kernel.dtype)


def _tap_gradients(
    padded: jax.Array, grad: jax.Array, taps: Sequence[tuple[int, int]], stride: int, dilation: int
) -> jax.Array:
    """[taps, C] float32, of taps at these rows and columns."""
    # Row after row into sums that stay in the cache. Reducing whole maps is several times slower.
    rows, cols = grad.shape[1:3]
    reach = dilation * max(i for i, _ in taps)

    def add_row(sums: tuple[jax.Array, ...], row: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        band = lax.dynamic_slice_in_dim(padded, row * stride, reach + 1, axis=1)
        band = band.astype(jnp.float32)
        grad_row = lax.dynamic_slice_in_dim(grad, row, 1, axis=1).astype(jnp.float32)
        return tuple(
            total + _every(band, i * dilation, j * dilation, 1, cols, stride) * grad_row
            for total, (i, j) in zip(sums, taps, strict=True)
        ), None

    start = tuple(jnp.zeros((grad.shape[0], 1, cols, grad.shape[3]), jnp.float32) for _ in taps)
    sums, _ = lax.scan(add_row, start, jnp.arange(rows))
    return jnp.stack([total.sum((0, 1, 2)) for total in sums])


class DepthwiseConv(nn.Module):
    """Depthwise convolution with bias and "SAME" padding.

    Call: [B, H, W, C] -> [B, ceil(H/stride), ceil(W/stride), C] in `dtype`. Parameters are float32:
    `kernel` [kernel_size, kernel_size, 1, C], `bias` [C], whatever the method. The size is odd.

    method: "shifted" (`depthwise_shifted`), "grouped" (`depthwise_grouped`), or "auto": the former when JAX's
    default backend is the CPU, else the latter. All compute the same.
    """

    stride: int = 1
    dilation: int = 1
    method: str = "auto"
    dtype: Any = jnp.float32
    kernel_size: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, size = x.shape[-1], self.kernel_size
        kernel = self.param("kernel", nn.initializers.he_normal(), (size, size, 1, channels), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)
        x, kernel, bias = (value.astype(self.dtype) for value in (x, kernel, bias))
        shifted = self.method == "shifted" or (self.method == "auto" and jax.default_backend() == "cpu")
        convolve = depthwise_shifted if shifted else depthwise_grouped
        return convolve(x, kernel, self.stride, self.dilation) + bias
