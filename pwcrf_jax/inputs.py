"""Potentials and relation weights as callers give them, brought into one form and checked."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pwcrf_jax.arrays import as_array, of_arrays
from pwcrf_jax.potentials import FactoredPairwise, GridScores, PairwiseTable, Potential, weighted

ENCODINGS = (PairwiseTable, FactoredPairwise, GridScores)

Potentials = Potential | Sequence[Potential] | Mapping[str, Potential]
Weights = ArrayLike | Sequence[ArrayLike] | Mapping[str, ArrayLike] | None


def relations(potentials: Potentials, weights: Weights = None) -> tuple[list[Potential], Any]:
    """(list of potentials, list or array of numbers that weigh them, or None).

    Args:
      potentials: one potential, a sequence of them, or a mapping {name: potential}.
      weights: a number for all, a sequence or array of one each, or with a mapping of potentials one {name: weight};
        None: 1. One of [K, K], of the pairs of labels, becomes part of the scores (`pwcrf_jax.potentials.weighted`).

    Raises:
      TypeError: what is no potential.
      ValueError: a number of weights, or names, other than those of the potentials; a weight of another shape.
    """
    names = list(potentials) if isinstance(potentials, Mapping) else None
    if isinstance(potentials, Mapping):
        given: Iterable[Potential] = potentials.values()
    else:
        given = [potentials] if isinstance(potentials, ENCODINGS) else potentials
    found = [of_arrays(p) if isinstance(p, PairwiseTable) else p for p in given]
    for p in found:
        if not isinstance(p, ENCODINGS):
            kinds = " or ".join(encoding.__name__ for encoding in ENCODINGS)
            raise TypeError(f"expected potentials, each a {kinds}, got {type(p).__name__}")
    each: Any = weights
    if isinstance(weights, Mapping):
        if names is None or set(weights) != set(names):
            wanted = "one a potential, in order" if names is None else f"of the potentials' names {names}"
            raise ValueError(f"expected weights {wanted}, got those of {list(weights)}")
        each = [weights[name] for name in names]
    elif weights is not None and not isinstance(weights, (list, tuple)) and jnp.ndim(as_array(weights)) == 0:
        each = [weights] * len(found)
    if each is not None and len(each) != len(found):
        raise ValueError(f"expected {len(found)} weights, one a potential, got {len(each)}")
    if each is not None and (isinstance(each, (list, tuple)) or as_array(each).ndim > 1):
        each = list(each)
        of_pairs = [as_array(weight).ndim > 0 for weight in each]
        found = [weighted(p, w) if pairs else p for p, w, pairs in zip(found, each, of_pairs, strict=True)]
        each = [1.0 if pairs else weight for weight, pairs in zip(each, of_pairs, strict=True)]
    return found, each


def model(unary: ArrayLike, potentials: Potentials, weights: Weights = None) -> tuple[jax.Array, list[Potential], Any]:
    """(unary as an array, potentials and weights as `relations` gives them), of one kind, grid and number of classes.

    Raises:
      TypeError, ValueError: as `relations`; mixed encodings; other classes or another grid than the unary's.
    """
    unary = as_array(unary)
    found, weights = relations(potentials, weights)
    if len({isinstance(p, PairwiseTable) for p in found}) > 1:
        raise ValueError("potentials mix PairwiseTable and FactoredPairwise: expand with `to_table` first")
    for p in found:
        if p.num_classes != unary.shape[-1]:
            raise ValueError(f"unary scores have {unary.shape[-1]} classes, a potential has {p.num_classes}")
        if not isinstance(p, PairwiseTable) and p.grid != unary.shape[-3:-1]:
            raise ValueError(f"unary grid is {unary.shape[-3:-1]}, a potential's is {p.grid}")
    return unary, found, weights


def check_chunk_edges(chunk_edges: int | None) -> None:
    """ValueError: fewer edges at a time than one; None leaves the number to the cost model."""
    if chunk_edges is not None and chunk_edges < 1:
        raise ValueError(f"chunk_edges must be at least 1, or None to choose it, got {chunk_edges}")
