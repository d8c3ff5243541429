"""Pairwise networks as modules for networks of your own: features and a relation in, its potential out.

The functions of `pwcrf_jax.heads` as a Flax linen module and as a Flax NNX module. Both compute what `PairwiseNet` does
and have its parameters, so that all four can be filled from each other.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from pwcrf_jax import heads, relations
from pwcrf_jax.nets.potentials import PairwiseNet
from pwcrf_jax.potentials import FactoredPairwise, factored_pairwise


class PairwiseHead(nn.Module):
    """`pwcrf_jax.heads.pairwise_apply` as a Flax linen module, one for each relation.

    Call: features float [B, h, w, D], or maps of several grids as `PairwiseNet` takes them, and a relation as in
    `pairwise_apply` (offsets int [num_offsets, 2], or a `pwcrf_jax.Relation`) -> `FactoredPairwise` on the largest
    grid. Parameters are float32, those of `pwcrf_jax.heads.Params`.

    Attributes:
      num_classes: K.
      hidden: M, units of the first layer.
      zero_last: starts the last layer at zero, which is no interaction; False: at random, for the free form.
      dtype: the first layer is computed in, float32 or bfloat16.
    """

    num_classes: int
    hidden: int = 512
    zero_last: bool = True
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """A `PairwiseNet` whose parameters are this module's own, without a name before theirs."""
        self.net = PairwiseNet(self.num_classes, self.hidden, self.zero_last, self.dtype)
        nn.share_scope(self, self.net)

    def __call__(
        self, features: jax.Array | Sequence[jax.Array], relation: relations.Relation | ArrayLike
    ) -> FactoredPairwise:
        parts = self.net(features)
        return factored_pairwise(*parts, heads.offsets_on(relation, parts.hidden_p.shape[-3:-1]))


class NNXPairwiseHead(nnx.Module):
    """`pwcrf_jax.heads.pairwise_apply` as a Flax NNX module, one for each relation.

    Call: features float [..., h, w, D] and a relation as in `pairwise_apply` (offsets int [num_offsets, 2], or a
    `pwcrf_jax.Relation`) -> `FactoredPairwise`. Parameters are float32, by the names of `pwcrf_jax.heads.Params`:
    `nnx.to_pure_dict(nnx.state(head, nnx.Param))` is that tree.

    Attributes:
      features: D, the number of channels.
      hidden: M, units of the first layer.
      num_classes: K.
      zero_last: starts the last layer at zero, which is no interaction; False: at random, for the free form.
      dtype: the first layer is computed in, float32 or bfloat16.
      rngs: `nnx.Rngs`, of which `params` is drawn from.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        num_classes: int,
        *,
        zero_last: bool = True,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        params = heads.pairwise_init(rngs.params(), features, hidden, num_classes, zero_last=zero_last)
        self.first_p = nnx.Dict({name: nnx.Param(leaf) for name, leaf in params["first_p"].items()})
        self.first_q = nnx.Dict({name: nnx.Param(leaf) for name, leaf in params["first_q"].items()})
        self.last_kernel = nnx.Param(params["last_kernel"])
        self.last_bias = nnx.Param(params["last_bias"])
        self.dtype = dtype

    def __call__(self, features: ArrayLike, relation: relations.Relation | ArrayLike) -> FactoredPairwise:
        params = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        return heads.pairwise_apply(params, features, relation, dtype=self.dtype)
