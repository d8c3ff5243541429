"""VGG-16's convolutional blocks 1-5."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwcrf_jax.nets.convs import Features, check_skip_layers, conv, with_skip_layers
from pwcrf_jax.nets.pooling import max_pool_2x2

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def layer_names() -> tuple[str, ...]:
    """Names of the convolutions in order, as Keras Applications names them."""
    return tuple(
        f"block{block}_conv{index}"
        for block, widths in enumerate(BLOCKS, start=1)
        for index in range(1, len(widths) + 1)
    )


class VGG16(nn.Module):
    """Blocks 1-5 of VGG-16 at a total stride of 16 (the last max pool has stride 1).

    Call: images [B, H, W, 3], already scaled -> features [B, ceil(H/16), ceil(W/16), 512] in `dtype`.
    Parameters are float32, named `block1_conv1` ... `block5_conv3`.

    Attributes:
      skip_layers: some of those names; the call then returns (features, {name: activation}).
      dtype: computed in, float32 or bfloat16.

    Raises:
      ValueError: an unknown layer in `skip_layers`.
    """

    skip_layers: tuple[str, ...] = ()
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_skip_layers("vgg16", self.skip_layers, layer_names())
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        x = images.astype(self.dtype)
        kept: dict[str, jax.Array] = {}
        for block, widths in enumerate(BLOCKS, start=1):
            for index, features in enumerate(widths, start=1):
                name = f"block{block}_conv{index}"
                x = kept[name] = nn.relu(conv(features, 3, name=name, dtype=self.dtype)(x))
            x = max_pool_2x2(x, stride=2 if block < len(BLOCKS) else 1)
        return with_skip_layers(x, kept, self.skip_layers)
