"""Heads that turn node features into the scores of the unary and pairwise potentials.

Features are one map, or the maps of several scales (of `FeatMapNet` with joined=False). The first layer of a head is
linear, and so is upsampling, so it is applied to each scale's map where that is small, and its outputs are upsampled:

    W [up(x_1) ; ... ; up(x_S)] + b = sum_s up(W_s x_s) + b,

of the same parameters, for a fraction of the multiply-adds and without the wide concatenated map.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwcrf_jax.arrays import precision
from pwcrf_jax.nets.featmap_net import resize


class _First(nn.Module):
    """A dense layer on the concatenation of maps, those of smaller grids upsampled to the largest."""

    units: int
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array | Sequence[jax.Array]) -> jax.Array:
        maps: list[Any] = list(features) if isinstance(features, list | tuple) else [features]
        channels = [x.shape[-1] for x in maps]
        kernel = self.param("kernel", self.kernel_init, (sum(channels), self.units), jnp.float32).astype(self.dtype)
        grid = max((x.shape[1], x.shape[2]) for x in maps)
        first, out = 0, jnp.zeros((), self.dtype)
        for x, count in zip(maps, channels, strict=True):
            x, rows = x.astype(self.dtype), kernel[first : first + count]
            out += resize(jnp.matmul(x, rows, precision=precision(x, rows)), grid)
            first += count
        if self.use_bias:
            out += self.param("bias", nn.initializers.zeros_init(), (self.units,), jnp.float32).astype(self.dtype)
        return out


def drop_channels(
    features: jax.Array | Sequence[jax.Array], keys: jax.Array | None, rate: float
) -> jax.Array | Sequence[jax.Array]:
    """Dropout of whole channels (Tompson et al., CVPR 2015), as neighbouring cells would tell each other single ones.

    An image keeps each channel of each map with probability 1 - rate, divided by it, and has none of it otherwise.

    Args:
      features: [B, h, w, D], or maps of several grids, see the module.
      keys: a JAX random key for each image, [B]: what an image keeps does not depend on its batch. None: no dropout.
      rate: static, 0 <= rate < 1.

    Returns:
      The features, of the same shapes and dtype.
    """
    if keys is None or not rate:
        return features
    maps: list[Any] = list(features) if isinstance(features, list | tuple) else [features]
    for i, x in enumerate(maps):
        kept = jax.vmap(lambda key, x=x, i=i: jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, x.shape[3:]))
        maps[i] = jnp.where(kept(keys)[:, None, None], x / (1 - rate), 0).astype(x.dtype)
    return maps if isinstance(features, list | tuple) else maps[0]


class UnaryNet(nn.Module):
    """Dense `hidden` with ReLU, then dense `num_classes`.

    Call: features [B, h, w, D], or maps of several grids, see the module -> scores z [B, h, w, K] float32 (the
    potential is U = -z). Parameters are float32: `first`, `last`.

    Attributes:
      num_classes: K.
      hidden: units of the first layer.
      dtype: the first layer is computed in, float32 or bfloat16; the last is in float32.
    """

    num_classes: int
    hidden: int = 512
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array | Sequence[jax.Array]) -> jax.Array:
        x = nn.relu(_First(self.hidden, dtype=self.dtype, name="first")(features))
        return nn.Dense(self.num_classes, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST, name="last")(x)


class PairwiseParts(NamedTuple):
    """Parts of the scores of every edge (p, q), from which they follow without being formed:

        z_pq[k, l] = sum_m relu(hidden_p[p] + hidden_q[q])[m] * kernel[m, k, l] + bias[k, l]

    Attributes:
      hidden_p, hidden_q: [B, h, w, M] in the net's compute dtype.
      kernel: float32 [M, K, K].
      bias: float32 [K, K].
    """

    hidden_p: jax.Array
    hidden_q: jax.Array
    kernel: jax.Array
    bias: jax.Array


class PairwiseNet(nn.Module):
    """Dense `hidden` with ReLU on [x_p ; x_q], then dense K * K, kept in parts.

    The first layer is linear in [x_p ; x_q], so its two halves are applied once per node, not once per edge.

    Call: features [B, h, w, D], or maps of several grids, see the module -> `PairwiseParts` with M = `hidden`.
    Parameters are float32: `first_p/kernel`, `first_p/bias`, `first_q/kernel`, `last_kernel` [M, K, K], `last_bias`
    [K, K].

    Attributes:
      num_classes: K.
      hidden: M, units of the first layer.
      zero_last: starts the last layer at zero, so that all scores are zero.
      dtype: the first layer is computed in, float32 or bfloat16.
    """

    num_classes: int
    hidden: int = 512
    zero_last: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array | Sequence[jax.Array]) -> PairwiseParts:
        # Half the variance of a layer over D inputs: that of one layer over the 2D inputs [x_p ; x_q].
        init = nn.initializers.variance_scaling(0.5, "fan_in", "truncated_normal")
        hidden_p = _First(self.hidden, kernel_init=init, dtype=self.dtype, name="first_p")(features)
        hidden_q = _First(self.hidden, use_bias=False, kernel_init=init, dtype=self.dtype, name="first_q")(features)
        zeros = nn.initializers.zeros_init()
        last_init = zeros if self.zero_last else nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        pairs = (self.num_classes, self.num_classes)
        kernel = self.param("last_kernel", last_init, (self.hidden, *pairs), jnp.float32)
        bias = self.param("last_bias", zeros, pairs, jnp.float32)
        return PairwiseParts(hidden_p, hidden_q, kernel, bias)
