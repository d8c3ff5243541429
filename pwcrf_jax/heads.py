"""Pairwise networks of a network of your own: parameters and features in, potentials out. Functions of JAX alone.

    z_pq[k, l] = bias[k, l] + sum_m relu(W1 [x_p ; x_q] + b1)[m] W2[m, k, l]        (Lin et al., CVPR 2016, section 3)

The same as Flax modules: `pwcrf_jax.nets.PairwiseHead` (linen) and `pwcrf_jax.nets.NNXPairwiseHead`. All have one tree
of parameters, which is that of `pwcrf_jax.nets.PairwiseNet` too: those of a trained model's relation fit here. Train
with `pwcrf_jax.piecewise_loss`, decode with `pwcrf_jax.decode`; both have the defaults of `pwcrf train`.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from pwcrf_jax import relations
from pwcrf_jax.arrays import as_array, batch_spec, compiled, level, precision
from pwcrf_jax.potentials import FactoredPairwise, factored_pairwise

Params = Mapping[str, Any]
"""Parameters of one relation, float: first_p: kernel [D, M], bias [M]; first_q: kernel [D, M]; last_kernel [M, K, K];
last_bias [K, K]."""


def pairwise_init(
    key: jax.Array, features: int, hidden: int, num_classes: int, *, zero_last: bool = True
) -> dict[str, Any]:
    """Parameters of a pairwise network, one set for each relation.

    Args:
      key: a JAX random key.
      features: D, the number of channels of the feature map, int.
      hidden: M, units of the first layer, int; the paper has 512.
      num_classes: K, int.
      zero_last: starts the last layer at zero, which is no interaction, as training in residual form begins
        (docs/math.md); False: at random, as in the free form.

    Returns:
      `Params`, float32: W1 in two halves [D, M], W2 [M, K, K] and their biases; plain dicts, for any optimizer. W1 is
      drawn as a layer over the 2D inputs [x_p ; x_q], truncated normal of variance 1 / 2D.

    Raises:
      TypeError: sizes that are no integers.
      ValueError: sizes below 1.

    Examples:
      >>> params = pw.pairwise_init(jax.random.key(0), features=8, hidden=16, num_classes=3)
      >>> params["first_p"]["kernel"].shape, params["last_kernel"].shape
      ((8, 16), (16, 3, 3))
    """
    sizes = []
    for name, size in (("features", features), ("hidden", hidden), ("num_classes", num_classes)):
        try:
            sizes.append(operator.index(size))
        except TypeError:
            got = getattr(size, "shape", None) or repr(size)
            raise TypeError(f"{name}: expected an integer, the number of them, got {got}") from None
        if sizes[-1] < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    d, m, k = sizes
    return _drawn(key, d=d, m=m, k=k, zero_last=bool(zero_last))


@compiled()
def _drawn(key: jax.Array, *, d: int, m: int, k: int, zero_last: bool) -> dict[str, Any]:
    of_p, of_q, of_last = jax.random.split(key, 3)
    first = jax.nn.initializers.variance_scaling(0.5, "fan_in", "truncated_normal")
    last = jax.nn.initializers.zeros if zero_last else jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
    return {
        "first_p": {"kernel": first(of_p, (d, m), jnp.float32), "bias": jnp.zeros(m, jnp.float32)},
        "first_q": {"kernel": first(of_q, (d, m), jnp.float32)},
        "last_kernel": last(of_last, (m, k, k), jnp.float32),
        "last_bias": jnp.zeros((k, k), jnp.float32),
    }


def pairwise_apply(
    params: Params, features: ArrayLike, relation: relations.Relation | ArrayLike, *, dtype: DTypeLike = jnp.float32
) -> FactoredPairwise:
    """The potential of one relation: the pairwise network on a feature map, its two halves applied once a node.

        hidden_p = W1_p x + b1,   hidden_q = W1_q x,   z_pq = bias + relu(hidden_p[p] + hidden_q[q]) W2

    Args:
      params: `Params`, of `pairwise_init`, or of this relation in another of our models.
      features: float [..., H, W, D], a map of nodes; leading axes are images.
      relation: int [num_offsets, 2], (row, column) of q - p in cells, from `pwcrf_jax.offsets`; static. Or a
        `pwcrf_jax.Relation`, which becomes the offsets of its box on the map at hand. The network knows the distances
        it was trained at and no others: where maps have several sizes, give the offsets of those of training.
      dtype: the first layer is computed in, float32 or bfloat16; scores are float32.

    Returns:
      `FactoredPairwise` with hidden_p, hidden_q [..., H, W, M] in dtype and no unary_log_probs: `piecewise_loss` adds
      them.

    Raises:
      ValueError: params of another tree, features of another number of channels than params, offsets that are none.

    Examples:
      >>> params = pw.pairwise_init(jax.random.key(0), features=8, hidden=16, num_classes=3)
      >>> features = jnp.ones((2, 5, 6, 8))  # two images of 5 x 6 cells
      >>> around = pw.pairwise_apply(params, features, pw.SURROUNDING)
      >>> around.grid, around.num_classes, len(around.offsets)
      ((5, 6), 3, 8)
    """
    x = as_array(features)
    first_p, bias_p, first_q, kernel, bias = _leaves(params)
    if x.ndim < 3 or x.shape[-1] != first_p.shape[0]:
        raise ValueError(f"expected features [..., H, W, D] with D = {first_p.shape[0]} of params, got {x.shape}")
    hidden_p, hidden_q = _first_layer(x, first_p, bias_p, first_q, dtype=jnp.dtype(dtype))
    return factored_pairwise(hidden_p, hidden_q, kernel, bias, offsets_on(relation, x.shape[-3:-1]))


def offsets_on(relation: relations.Relation | ArrayLike, grid: Sequence[int]) -> ArrayLike:
    """Offsets int [num_offsets, 2] in cells: those of a `Relation` on a grid, or what was given in place of one.

    Args:
      relation: as in `pairwise_apply`.
      grid: (height, width) in cells.

    Returns:
      int [num_offsets, 2].
    """
    if isinstance(relation, relations.Relation):
        return relations.offsets(relation, *grid)
    return relation


def _leaves(params: Params) -> list[jax.Array]:
    """Arrays of params: first_p of kernel and bias, first_q, last_kernel, last_bias."""
    try:
        first_p, first_q = params["first_p"], params["first_q"]
        found = (first_p["kernel"], first_p["bias"], first_q["kernel"], params["last_kernel"], params["last_bias"])
    except (KeyError, TypeError, IndexError):
        got = ", ".join(map(str, params)) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            "expected params of pairwise_init, of one relation: first_p (kernel, bias), first_q (kernel), "
            f"last_kernel, last_bias; got {got}"
        ) from None
    return [as_array(leaf) for leaf in found]


def _first_layout(features: jax.Array, *_: jax.Array, dtype: Any) -> Any:
    spec: Any = jax.P  # in place of arrays
    batch = batch_spec(features, 3)
    return spec(*batch), spec(*batch)


@compiled(_first_layout)
def _first_layer(
    features: jax.Array, kernel_p: jax.Array, bias_p: jax.Array, kernel_q: jax.Array, *, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    x = features.astype(dtype)
    of_p, of_q = (jnp.matmul(x, kernel.astype(dtype), precision=precision(x)) for kernel in (kernel_p, kernel_q))
    of_p, bias = level(of_p, bias_p.astype(dtype))
    return of_p + bias, of_q
