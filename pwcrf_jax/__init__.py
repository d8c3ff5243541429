"""Contextual CRFs with CNN unary and pairwise potentials, trained piecewise: the functional API.

Everything named here imports jax and numpy only. What computes with arrays is differentiable and batched, and compiles
itself once for each combination of shapes and settings; `costs` and `plan` say beforehand what it will cost.
"""

from pwcrf_jax import (
    costs,
    dense_crf,
    gaussian,
    heads,
    likelihood,
    mean_field,
    messages,
    metrics,
    objectives,
    permutohedral,
    piecewise,
    pixels,
    potentials,
    relations,
)
from pwcrf_jax.heads import pairwise_apply, pairwise_init
from pwcrf_jax.likelihood import pairwise_log_likelihood, sample_offsets
from pwcrf_jax.mean_field import MeanFieldInfo
from pwcrf_jax.messages import compute_messages, prepare_messages
from pwcrf_jax.metrics import confusion_matrix, scores
from pwcrf_jax.model.plan import Plan, plan
from pwcrf_jax.objectives import exact_log_likelihood, pseudo_log_likelihood, unrolled_log_likelihood
from pwcrf_jax.piecewise import (
    balance_weights,
    grid_labels,
    piecewise_loss,
    soft_dice,
    unary_log_likelihood,
    uniform_log_likelihood,
)
from pwcrf_jax.pixels import Decoded, decode
from pwcrf_jax.potentials import FactoredPairwise, GridScores, PairwiseTable, factored_pairwise, to_table
from pwcrf_jax.relations import ABOVE_BELOW, SURROUNDING, EdgeList, Relation, edge_list, offsets, validity_mask

__version__ = "0.2.0"

__all__ = [
    "ABOVE_BELOW",
    "Decoded",
    "EdgeList",
    "FactoredPairwise",
    "GridScores",
    "MeanFieldInfo",
    "PairwiseTable",
    "Plan",
    "Relation",
    "SURROUNDING",
    "balance_weights",
    "compute_messages",
    "confusion_matrix",
    "costs",
    "decode",
    "dense_crf",
    "edge_list",
    "exact_log_likelihood",
    "factored_pairwise",
    "gaussian",
    "grid_labels",
    "heads",
    "likelihood",
    "mean_field",
    "messages",
    "metrics",
    "objectives",
    "offsets",
    "pairwise_apply",
    "pairwise_init",
    "pairwise_log_likelihood",
    "permutohedral",
    "piecewise",
    "piecewise_loss",
    "pixels",
    "plan",
    "potentials",
    "prepare_messages",
    "pseudo_log_likelihood",
    "relations",
    "sample_offsets",
    "scores",
    "soft_dice",
    "to_table",
    "unary_log_likelihood",
    "uniform_log_likelihood",
    "unrolled_log_likelihood",
    "validity_mask",
]
