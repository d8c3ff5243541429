"""Convolutions that sharpen a coarse score map with the backbone's skip layers."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwcrf_jax.nets.convs import conv


class RefinementConvs(nn.Module):
    """A correction of upsampled scores, from the unary's scores and the activations of skip layers.

    The paper's best VOC model has "refinement convs on middle-layer features" of a form it does not give; this one is a
    choice of ours. Every input goes through a 1x1 convolution to `width` channels and is resized to the finest skip
    map; their sum, a ReLU, two 3x3 convolutions with ReLU, and a dense layer that starts at zero, so that an untrained
    correction is none.

    Call: scores [B, h, w, K], skip maps [B, h_i, w_i, C_i] -> [B, h', w', K] float32, (h', w') that of the finest
    map. No gradient passes to the inputs. Parameters are float32: `from_scores`, `from_0`, ..., `conv1`, `conv2`,
    `last`.

    Attributes:
      num_classes: K.
      width: channels of the convolutions.
      dtype: computed in, float32 or bfloat16; the last layer is in float32.
    """

    num_classes: int
    width: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, scores: jax.Array, skipped: Sequence[jax.Array]) -> jax.Array:
        scores, *skipped = jax.lax.stop_gradient([jax.nn.softmax(scores.astype(jnp.float32)), *skipped])
        grid = max((x.shape[1:3] for x in skipped), key=lambda size: size[0] * size[1])
        narrow = lambda name, x: _resize(conv(self.width, 1, name=name, dtype=self.dtype)(x), grid)
        total = narrow("from_scores", scores)
        for i, x in enumerate(skipped):
            total = total + narrow(f"from_{i}", x)
        x = nn.relu(total)
        for i in (1, 2):
            x = nn.relu(conv(self.width, 3, name=f"conv{i}", dtype=self.dtype)(x))
        zeros = nn.initializers.zeros_init()
        return nn.Dense(self.num_classes, kernel_init=zeros, dtype=jnp.float32, name="last")(x)


def _resize(x: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    if x.shape[1:3] == grid:
        return x
    return jax.image.resize(x, (x.shape[0], *grid, x.shape[3]), "bilinear").astype(x.dtype)
