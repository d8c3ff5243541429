"""Depthwise convolution, in a form that is fast on the backend at hand.

On CPU, XLA is slow at grouped convolutions, most of all at their gradients. There, shifted multiply-adds, one for each
tap of the kernel, take their place, with a gradient of their own that is made of such multiply-adds too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

_AT_ONCE = 5
"""Kernels beyond this size go by rows of taps: one loop over 49 takes XLA half a minute to compile, and runs slower."""

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
    """Depthwise convolution as shifted multiply-adds. x: [B, H, W, C]; kernel: [k, k, 1, C], k odd; "SAME".

    Reverse-mode differentiable. Raises ValueError unless stride is 1, or 2 with dilation 1.
    """
    if stride != 1 and (stride, dilation) != (2, 1):
        raise ValueError(f"stride must be 1, or 2 with dilation 1; got stride {stride}, dilation {dilation}")
    return _shifted(x, kernel, stride, dilation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    rows, cols = (-(-size // stride) for size in x.shape[1:3])
    padded = _pad_same(x, kernel.shape[0], stride, dilation)
    total = jnp.zeros((), x.dtype)
    for i, j in _taps(kernel):
        total = total + _every(padded, i * dilation, j * dilation, rows, cols, stride) * kernel[i, j, 0]
        if kernel.shape[0] > _AT_ONCE and j == kernel.shape[1] - 1:
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


def _same_padding(size: int, window: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's "SAME" padding: what is odd goes to the end."""
    total = max((-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _pad_same(x: jax.Array, window: int, stride: int, dilation: int) -> jax.Array:
    rows, cols = (_same_padding(size, window, stride, dilation) for size in x.shape[1:3])
    return jnp.pad(x, ((0, 0), rows, cols, (0, 0)))


def _every(x: jax.Array, top: int, left: int, rows: int, cols: int, stride: int) -> jax.Array:
    """`rows` x `cols` cells of x, from (top, left) in steps of `stride`."""
    bottom, right = top + (rows - 1) * stride + 1, left + (cols - 1) * stride + 1
    return lax.slice(x, (0, top, left, 0), (x.shape[0], bottom, right, x.shape[3]), (1, stride, stride, 1))


def _input_gradient_of_stride_2(shape: tuple[int, ...], kernel: jax.Array, grad: jax.Array) -> jax.Array:
    # Input cells of each parity of row and column take few taps, all at stride 1; the four are interleaved.
    batch, height, width, channels = shape
    window = kernel.shape[0]
    half = window // 2
    rows, cols = grad.shape[1] + half, grad.shape[2] + half
    padded = jnp.pad(grad, ((0, 0), (half, half), (half, half), (0, 0)))

    def parity(odd_row: int, odd_col: int) -> jax.Array:
        taps = [(i, j) for i, j in _taps(kernel) if i % 2 == odd_row and j % 2 == odd_col]
        parts = (_every(padded, half - i // 2, half - j // 2, rows, cols, 1) * kernel[i, j, 0] for i, j in taps)
        return sum(parts, start=jnp.zeros((), grad.dtype))

    even, odd = (jnp.stack([parity(row, 0), parity(row, 1)], axis=3) for row in (0, 1))
    full = jnp.stack([even, odd], axis=2).reshape(batch, 2 * rows, 2 * cols, channels)
    top, left = _same_padding(height, window, 2, 1)[0], _same_padding(width, window, 2, 1)[0]
    return full[:, top : top + height, left : left + width]


def _kernel_gradient(x: jax.Array, kernel: jax.Array, grad: jax.Array, stride: int, dilation: int) -> jax.Array:
    window = kernel.shape[0]
    padded = _pad_same(x, window, stride, dilation)
    if window <= _AT_ONCE:
        per_tap = _tap_gradients(padded, grad, _taps(kernel), stride, dilation)
    else:

        def of_row(_: None, top: jax.Array) -> tuple[None, jax.Array]:
            part = lax.dynamic_slice_in_dim(padded, top, (grad.shape[1] - 1) * stride + 1, axis=1)
            return None, _tap_gradients(part, grad, [(0, j) for j in range(window)], stride, dilation)

        _, per_tap = lax.scan(of_row, None, dilation * jnp.arange(window))
    return per_tap.reshape(kernel.shape).astype(kernel.dtype)


def _tap_gradients(
    padded: jax.Array, grad: jax.Array, taps: Sequence[tuple[int, int]], stride: int, dilation: int
) -> jax.Array:
    """[taps, C] float32: the gradient of each of these taps (row, column)."""
    # Row after row into sums that stay in the cache. Reducing whole maps is several times slower.
    rows, cols = grad.shape[1:3]
    height = dilation * max(i for i, _ in taps) + 1

    def add_row(sums: tuple[jax.Array, ...], row: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        band = lax.dynamic_slice_in_dim(padded, row * stride, height, axis=1)
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
    """Depthwise convolution with a square kernel of odd size, bias and "SAME" padding.

    Call: [B, H, W, C] -> [B, ceil(H/stride), ceil(W/stride), C] in `dtype`. Parameters are float32:
    `kernel` [k, k, 1, C], `bias` [C], whatever the method.

    window: k.
    method: "shifted" (`depthwise_shifted`), "grouped" (`depthwise_grouped`), or "auto": the former when JAX's
    default backend is the CPU, else the latter. All compute the same.
    """

    window: int = 3
    stride: int = 1
    dilation: int = 1
    method: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        shape = (self.window, self.window, 1, channels)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)
        x, kernel, bias = (value.astype(self.dtype) for value in (x, kernel, bias))
        shifted = self.method == "shifted" or (self.method == "auto" and jax.default_backend() == "cpu")
        convolve = depthwise_shifted if shifted else depthwise_grouped
        return convolve(x, kernel, self.stride, self.dilation) + bias
