"""Backbones of somebody's own, as `config.model.backbone = "own_nets:linen_net"` names them."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

NUMBER = 3


class Linen(nn.Module):
    width: int = 4
    dtype: Any = jnp.float32
    stride: int = 8

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(self.width, (8, 8), 8, dtype=self.dtype)(images)
        return nn.LayerNorm(dtype=self.dtype)(x)


class Nnx(nnx.Module):
    def __init__(self, width, dtype, rngs):
        self.stride = 8
        first = nnx.Conv(3, width, (8, 8), strides=8, dtype=dtype, rngs=rngs)
        self.convs = nnx.List([first, nnx.Conv(width, width, (1, 1), dtype=dtype, rngs=rngs)])

    def __call__(self, images):
        for conv in self.convs:
            images = conv(images)
        return images


class Running(nn.Module):
    stride: int = 1

    @nn.compact
    def __call__(self, images):
        return nn.BatchNorm(use_running_average=True)(images)


class RunningNnx(nnx.Module):
    def __init__(self, rngs):
        self.stride, self.norm = 1, nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, images):
        return self.norm(images)


class Flat(nn.Module):
    stride: int = 8

    @nn.compact
    def __call__(self, images):
        return images.mean((1, 2))


def linen_net(dtype, width=4):
    return Linen(width, dtype)


def nnx_net(dtype, rngs, width=4):
    return Nnx(width, dtype, rngs)


def nnx_of_one_seed(dtype, width=4):
    return Nnx(width, dtype, nnx.Rngs(3))


def another_stride(dtype):
    return Linen(4, dtype, 16)


def no_stride(dtype):
    return nn.Dense(3, dtype=dtype)


def flat(dtype):
    return Flat()


def running(dtype):
    return Running()


def running_nnx(dtype, rngs):
    return RunningNnx(rngs)


def no_module(dtype):
    return lambda images: images


def fails(dtype):
    raise RuntimeError("two\nlines")
