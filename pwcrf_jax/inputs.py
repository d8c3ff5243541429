"""What callers may give for potentials, weights and settings of inference, brought into one form and checked."""

import operator
from collections.abc import Mapping

import jax.numpy as jnp

from pwcrf_jax import pairwise
from pwcrf_jax.arrays import as_array, of_arrays, seen

ENCODINGS = (pairwise.PairwiseTable, pairwise.FactoredPairwise, pairwise.GridScores)


def relations(potentials, weights=None):
    """(list of potentials, list or array of weights or None).

    Args:
      potentials: one potential, a sequence of them, or a mapping {name: potential}.
      weights: a number for all, a sequence or array of one each, or with a mapping of potentials one {name: weight};
        None: 1.

    Raises:
      TypeError: what is no potential.
      ValueError: a number of weights, or names, other than those of the potentials.
    """
    names = list(potentials) if isinstance(potentials, Mapping) else None
    if names is not None:
        potentials = potentials.values()
    elif isinstance(potentials, ENCODINGS):
        potentials = [potentials]
    potentials = [of_arrays(p) if isinstance(p, pairwise.PairwiseTable) else p for p in potentials]
    for p in potentials:
        if not isinstance(p, ENCODINGS):
            kinds = " or ".join(encoding.__name__ for encoding in ENCODINGS)
            raise TypeError(f"expected potentials, each a {kinds}, got {type(p).__name__}")
    if isinstance(weights, Mapping):
        if names is None or set(weights) != set(names):
            wanted = "one a potential, in order" if names is None else f"of the potentials' names {names}"
            raise ValueError(f"expected weights {wanted}, got those of {list(weights)}")
        weights = [weights[name] for name in names]
    elif weights is not None and not isinstance(weights, (list, tuple)) and jnp.ndim(weights) == 0:
        weights = [weights] * len(potentials)
    if weights is not None and len(weights) != len(potentials):
        raise ValueError(f"expected {len(potentials)} weights, one a potential, got {len(weights)}")
    return potentials, list(weights) if isinstance(weights, tuple) else weights


def model(unary, potentials, weights=None):
    """(unary as an array, potentials and weights as `relations` gives them), of one kind, grid and number of classes.

    Raises:
      TypeError, ValueError: as `relations`; mixed encodings; other classes or another grid than the unary's.
    """
    unary = as_array(unary)
    potentials, weights = relations(potentials, weights)
    if len({isinstance(p, pairwise.PairwiseTable) for p in potentials}) > 1:
        raise ValueError("potentials mix PairwiseTable and FactoredPairwise: expand with `pairwise.to_table` first")
    for p in potentials:
        if p.num_classes != unary.shape[-1]:
            raise ValueError(f"unary scores have {unary.shape[-1]} classes, a potential has {p.num_classes}")
        if not isinstance(p, pairwise.PairwiseTable) and p.grid != unary.shape[-3:-1]:
            raise ValueError(f"unary grid is {unary.shape[-3:-1]}, a potential's is {p.grid}")
    return unary, potentials, weights


def check_schedule(num_iterations, damping, route="auto"):
    """ValueError: a negative number of iterations, damping outside [0, 1) where it can be seen, an unknown route."""
    if operator.index(num_iterations) < 0:
        raise ValueError(f"num_iterations must be at least 0, got {num_iterations}")
    if seen(damping) and not 0 <= float(damping) < 1:
        raise ValueError(f"damping must lie in [0, 1), got {damping}")
    if route not in pairwise.ROUTES:
        raise ValueError(f"route must be one of {pairwise.ROUTES}, got {route!r}")


def mask(node_mask):
    """node_mask as an array of bool, or None."""
    return None if node_mask is None else as_array(node_mask).astype(bool)
