"""Likelihoods of a CRF other than the piecewise one (`pwcrf_jax.piecewise`): pseudo, unrolled, exact.

All take scores, potentials, labels and `mean_field.Settings`, and return (sum, count) like the piecewise terms:
log-probabilities of the labels, and the nodes they are of. Weights and `average_messages` mean what they mean in
inference, so that what is trained is what is decoded; with means of messages there is no joint distribution behind the
updates. `unary_log_probs` of residual potentials play no part: the unary is in the model already.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pwcrf_jax import inputs, mean_field, piecewise
from pwcrf_jax.arrays import as_array, as_mask, compiled
from pwcrf_jax.labels import VOID, checked, split
from pwcrf_jax.likelihood import Sums
from pwcrf_jax.mean_field import DEFAULT_SETTINGS, Settings, replaced, tempered
from pwcrf_jax.potentials import RULED_OUT, PairwiseTable, Potential, to_table

MAX_LABELLINGS = 2**20
"""The most that `exact_log_likelihood` enumerates: beyond it the table of all labellings takes hundreds of MB."""


def pseudo_log_likelihood(
    unary: ArrayLike,
    potentials: inputs.Potentials,
    labels: ArrayLike,
    settings: Settings = DEFAULT_SETTINGS,
    *,
    void: int | None = VOID,
    node_weights: ArrayLike | None = None,
    **fields: Any,
) -> Sums:
    """Sum and count of log P(y_i | labels of its neighbours, x) (Besag, 1975).

        log P(y_i | y_N(i)) = log softmax(z_i + sum_r w_r m_r)[y_i],
        m_r = sum_{q: (i,q)} z_iq[., y_q] + sum_{p: (p,i)} z_pi[y_p, .]

    One mean-field update from the true labels: no inference, but the neighbours are given the truth that they will not
    have at test time. Costs about one message pass and its gradient.

    Args:
      unary: scores z, float [..., num_nodes, K] for tables or [..., H, W, K] for factored potentials.
      potentials: of one encoding, as in `mean_field.step`.
      labels: int of the nodes' shape, [..., num_nodes] or [..., H, W]; nodes of label `void` count for nothing, send
        nothing and may hold anything. Other labels than 0..K-1 as in `piecewise.unary_log_likelihood`.
      settings: of inference, `mean_field.Settings`; num_iterations and damping have no meaning here.
      void: the void label, static and outside 0..K-1.
      node_weights: float of the nodes' shape or None (1), for the sum and the count.
      fields: of `mean_field.Settings` by name, in place of those of settings.

    Returns:
      (sum, count): float32 scalars.

    Raises:
      TypeError, ValueError: labels as in `piecewise.unary_log_likelihood`, and what `mean_field.run` refuses.
    """
    settings = replaced(settings, fields)
    unary, found, weights = inputs.model(unary, potentials, settings.weights)
    labels = checked(labels, unary.shape[-1], void, unary.shape[:-1])
    unary, settings = tempered(unary, dataclasses.replace(settings, weights=weights, damping=0.0))
    return _pseudo(unary, found, labels, settings, None if node_weights is None else as_array(node_weights))


@compiled()
def _pseudo(
    unary: jax.Array,
    potentials: list[Potential],
    labels: jax.Array,
    settings: Settings,
    node_weights: jax.Array | None,
) -> Sums:
    safe, known = split(labels, unary.shape[-1])
    one_hot = jax.nn.one_hot(safe, unary.shape[-1], dtype=jnp.float32)
    # log 0 without an infinity, which damping would multiply by zero.
    truth = jnp.where(one_hot > 0, 0.0, RULED_OUT)
    log_probs, _ = mean_field.step(truth, unary, potentials, settings, node_mask=known)
    safe = jnp.where(known, safe, -1)
    return piecewise.unary_log_likelihood(log_probs, safe, void=-1, node_weights=node_weights)


def unrolled_log_likelihood(
    unary: ArrayLike,
    potentials: inputs.Potentials,
    labels: ArrayLike,
    settings: Settings = DEFAULT_SETTINGS,
    *,
    void: int | None = VOID,
    node_mask: ArrayLike | None = None,
    node_weights: ArrayLike | None = None,
    **fields: Any,
) -> Sums:
    """Sum and count of log Q_i(y_i) after mean field, back-propagated through all of its iterations.

    The objective of CRF-RNN (Zheng et al., ICCV 2015) with CNN pairwise potentials: inference is inside training. It
    needs the messages of every iteration and their gradients, and may learn parameters that suit few iterations better
    than the model. Void nodes take part (their labels are unknown, not absent) and are not scored.

    Args:
      unary, potentials, labels, void, node_weights, fields: as in `pseudo_log_likelihood`.
      settings: of inference, `mean_field.Settings`. Differentiable in weights and damping too.
      node_mask: bool of the nodes' shape; false nodes (padding) neither send nor receive, and are not scored.

    Returns:
      (sum, count): float32 scalars.

    Raises:
      TypeError, ValueError: labels as in `piecewise.unary_log_likelihood`, and what `mean_field.run` refuses.
    """
    settings = replaced(settings, fields)
    unary, found, weights = inputs.model(unary, potentials, settings.weights)
    mask = as_mask(node_mask)
    labels = checked(labels, unary.shape[-1], void, unary.shape[:-1], mask=mask)
    settings = dataclasses.replace(settings, weights=weights)
    log_marginals, _ = mean_field.run(unary, found, settings, node_mask=mask)
    return _of_nodes(log_marginals, labels, mask, None if node_weights is None else as_array(node_weights))


@compiled()
def _of_nodes(
    log_marginals: jax.Array, labels: jax.Array, node_mask: jax.Array | None, node_weights: jax.Array | None
) -> Sums:
    """The log marginals of the labels, of nodes that have one and are not masked."""
    safe, valid = split(labels, log_marginals.shape[-1])
    labels = jnp.where(valid if node_mask is None else valid & node_mask, safe, -1)
    return piecewise.unary_log_likelihood(log_marginals, labels, void=-1, node_weights=node_weights)


def exact_log_likelihood(
    unary: ArrayLike,
    potentials: inputs.Potentials,
    labels: ArrayLike,
    settings: Settings = DEFAULT_SETTINGS,
    *,
    void: int | None = VOID,
    **fields: Any,
) -> Sums:
    """log P(y | x) of the CRF itself, with its partition function by enumeration: an oracle for tiny graphs.

        log P(y | x) = log sum_{y' agrees with y} exp s(y') - log sum_{y'} exp s(y'),
        s(y) = sum_i z_i[y_i] + sum_r w_r sum_(p,q) z_pq[y_p, y_q]

    where y' agrees with y if it is the same on all nodes that are not void: void nodes are summed out.

    Args:
      unary: scores of one graph, float [num_nodes, K] or [H, W, K]; batch with `jax.vmap`.
      potentials: of `PairwiseTable` or `FactoredPairwise` (which is expanded), as in `mean_field.step`.
      labels: int [num_nodes] or [H, W]; void and others as in `piecewise.unary_log_likelihood`.
      settings: `mean_field.Settings`, of which only weights and the temperature have a meaning here.
      void: the void label, static and outside 0..K-1.
      fields: as in `pseudo_log_likelihood`.

    Returns:
      (sum, count): log P(y | x) and the number of nodes that are not void, float32 scalars.

    Raises:
      TypeError: what is no potential of these encodings.
      ValueError: more than `MAX_LABELLINGS` labellings, shapes that do not fit, or `average_messages`: no joint
        distribution has means of messages.

    Examples:
      >>> agree = pw.PairwiseTable(jnp.log(jnp.array([[[3.0, 1.0], [1.0, 3.0]]])), p=jnp.array([0]), q=jnp.array([1]))
      >>> total, count = pw.exact_log_likelihood(jnp.zeros((2, 2)), [agree], jnp.array([1, 1]))
      >>> round(float(jnp.exp(total)), 3), float(count)  # 3 / (3 + 1 + 1 + 3)
      (0.375, 2.0)
    """
    unary, settings = tempered(unary, replaced(settings, fields))
    if settings.average_messages:
        raise ValueError("the exact likelihood is that of sums of messages: expected average_messages=False, got True")
    found, weights = inputs.relations(potentials, settings.weights)
    expanded = [p if isinstance(p, PairwiseTable) else to_table(p) for p in found]
    unary, tables, weights = inputs.model(unary, expanded, weights)
    labels = checked(labels, unary.shape[-1], void, unary.shape[:-1])
    num_nodes, num_classes = labels.size, unary.shape[-1]
    if num_classes**num_nodes > MAX_LABELLINGS:
        raise ValueError(
            f"{num_classes} classes on {num_nodes} nodes are more than {MAX_LABELLINGS} labellings; take a smaller "
            "graph, or another objective"
        )
    every = np.array(list(itertools.product(range(num_classes), repeat=num_nodes)), np.int32)
    return _exact(unary, tables, labels, weights, as_array(every))


@compiled()
def _exact(unary: jax.Array, tables: list[Any], labels: jax.Array, weights: Any, every: jax.Array) -> Sums:
    num_classes = unary.shape[-1]
    labels, known = split(labels.reshape(-1), num_classes)
    scores = unary.reshape(-1, num_classes).astype(jnp.float32)
    total = jnp.sum(scores[np.arange(len(scores))[None], every], axis=1)
    for i, table in enumerate(tables):
        edges = np.arange(table.p.shape[-1])[None]
        pairs = table.scores.astype(jnp.float32)[edges, every[:, table.p], every[:, table.q]]
        pairs = jnp.where(pairs == -jnp.inf, RULED_OUT, pairs)
        weight = 1.0 if weights is None else jnp.asarray(weights[i], jnp.float32)
        total = total + weight * jnp.sum(pairs, axis=1)
    agrees = jnp.all((every == labels[None]) | ~known[None], axis=1)
    log_p = jax.nn.logsumexp(total, where=agrees) - jax.nn.logsumexp(total)
    return log_p, jnp.sum(known, dtype=jnp.float32)
