"""Mean-field inference over a unary and any number of pairwise potentials (Lin et al., CVPR 2016, section 3).

    log Q_i(k) = z_i[k] + sum_relations w_r message_{r,i}[k] - const          (messages: `pwcrf_jax.pairwise.messages`)

The schedule is parallel: all nodes are updated at once from the marginals of the iteration before. That is fast on
wide hardware but it is *not* a descent method: with strong couplings the free energy can rise and labels can flip for
ever. Damping mixes the old log marginals into the new ones; 0.5 converged in every random small graph tried. The
returned change per iteration shows which case one is in.

A score of -inf rules a label out: its marginal is 0. A pair score of -inf counts as `pairwise.RULED_OUT`. A node all of
whose labels are ruled out has no marginals: they are NaN, and it neither sends nor receives, like a masked one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pwcrf_jax import inputs, pairwise
from pwcrf_jax.arrays import as_array, batch_spec, compiled, level


class MeanFieldInfo(NamedTuple):
    """change: float32 [num_iterations, ...batch], the largest |Q_new - Q_old| over nodes and classes."""

    change: jax.Array


def init(unary):
    """Log marginals before any message: the log softmax of the unary scores.

    Args:
      unary: scores z, float [..., K].

    Returns:
      float32, the shape of unary.
    """
    return jax.nn.log_softmax(as_array(unary).astype(jnp.float32), axis=-1)


def step(
    log_marginals,
    unary,
    potentials,
    weights=None,
    damping=0.0,
    normalize=False,
    node_mask=None,
    chunk_edges=None,
    route="folded",
):
    """One parallel update of all nodes.

        log Q_new = (1 - damping) log_softmax(z + sum_r w_r m_r(Q)) + damping log Q_old, normalised

    Args:
      log_marginals: float32 [..., num_nodes, K] or [..., H, W, K].
      unary: scores z, float, same shape.
      potentials: sequence of `PairwiseTable`, or of `FactoredPairwise` and `GridScores`, one a relation; a mapping of
        names to them; or one alone. May be empty: then a unary of three axes or more is read as [..., H, W, K].
      weights: sequence or array of one weight a relation; a mapping of the same names; or one number for all. None: 1
        (the paper). Piecewise-trained potentials over-count, so weights below 1 are worth choosing on held-out data.
        Differentiable.
      damping: 0 (none) to below 1, the share of the old log marginals. May be traced.
      normalize: divide each node's messages by their number, relation by relation, so that one weight serves maps and
        boxes of any size; False: plain sums (the paper).
      node_mask: bool [..., num_nodes] or [..., H, W]; false nodes (void, padding) neither send nor receive, and may
        hold anything.
      chunk_edges: of `pairwise.messages`.
      route: of `pairwise.prepare_messages`, for this one step.

    Returns:
      (log_marginals, change): the new state, float32, and the largest |Q_new - Q_old| of each image, float32
      [...batch].

    Raises:
      ValueError: as `run`.
    """
    unary, potentials, weights = inputs.model(unary, potentials, weights)
    inputs.check_schedule(1, damping, route)
    arrays = (as_array(log_marginals), unary, potentials, weights, (1.0 - damping, damping), inputs.mask(node_mask))
    return _step(*arrays, normalize=bool(normalize), chunk_edges=chunk_edges, route=route)


def _step_layout(state, unary, potentials, *rest, **settings):
    batch = batch_spec(unary, -_image_axes(unary, potentials)[0])
    return jax.P(*batch), jax.P(*batch)


@compiled(_step_layout)
def _step(state, unary, potentials, weights, shares, node_mask, *, normalize, chunk_edges, route):
    unary, takes_part, empty = _sound(unary, node_mask, state)
    state = jnp.where(empty[..., None], 0.0, state)
    potentials = [pairwise.prepare_messages(p, 1, route, takes_part) for p in potentials]
    new, change = _update(state, unary, potentials, weights, shares, takes_part, normalize, chunk_edges)
    return jnp.where(empty[..., None], jnp.nan, new), change


def _sound(unary, node_mask, *others):
    """(unary, float32, with zeros at empty nodes; which nodes send and receive; which are empty, both [...] bool).

    Empty are nodes without marginals: all labels are ruled out, or a mask hides that they are not numbers.
    """
    unary = unary.astype(jnp.float32)
    best = jnp.max(unary, axis=-1)
    takes_part = best != -jnp.inf
    if node_mask is not None:
        takes_part = jnp.logical_and(*level(takes_part, node_mask))
    holds = jnp.isfinite(best)
    for other in others:
        holds &= jnp.isfinite(jnp.max(other, axis=-1))
    empty = ~takes_part & ~holds
    return jnp.where(empty[..., None], 0.0, unary), takes_part, empty


def _update(state, unary, potentials, weights, shares, takes_part, normalize, chunk_edges):
    """`step` of what is sound."""
    marginals = jnp.exp(state)
    total = unary
    for i, potential in enumerate(potentials):
        message, count = pairwise.prepared_messages(potential, marginals, takes_part, chunk_edges)
        if normalize:
            message = message / jnp.maximum(count, 1.0)[..., None]
        total = total + (1.0 if weights is None else jnp.asarray(weights[i], jnp.float32)) * message
    updated = jax.nn.log_softmax(total, axis=-1)
    new, old = (jnp.asarray(share, jnp.float32) for share in shares)
    # Minus infinity times a share of 0 would be NaN.
    finite = lambda x: jnp.maximum(x, jnp.finfo(jnp.float32).min)
    rules_out = lambda x, share: (x == -jnp.inf) & (share > 0)
    mixed = new * finite(updated) + old * finite(state)
    mixed = jnp.where(rules_out(updated, new) | rules_out(state, old), -jnp.inf, mixed)
    updated = jax.nn.log_softmax(mixed, axis=-1)
    change = jnp.where(takes_part[..., None], jnp.abs(jnp.exp(updated) - marginals), 0.0)
    return updated, jnp.max(change, axis=_image_axes(unary, potentials))


def run(
    unary,
    potentials,
    num_iterations=3,
    weights=None,
    damping=0.0,
    normalize=False,
    node_mask=None,
    route="auto",
    chunk_edges=None,
):
    """Mean field from the unary, `num_iterations` parallel updates with `lax.scan`.

    Args:
      unary: scores z (= -U), float [..., num_nodes, K] for tables or [..., H, W, K] for factored potentials.
      potentials: as in `step`. Tables of graphs and potentials on grids do not mix.
      num_iterations: static, at least 0; the paper uses 3.
      weights, damping, normalize, node_mask, chunk_edges: as in `step`.
      route: how messages of a factored potential are computed, "auto", "folded" or "table"; see
        `pairwise.prepare_messages`. The marginals are the same, time and memory are not.

    Returns:
      (log_marginals, MeanFieldInfo): float32, the shape of unary; changes [num_iterations, ...batch].

    Raises:
      TypeError: what is no potential.
      ValueError: mixed encodings, an unknown route, a number of weights other than the number of potentials, damping
        outside [0, 1) where it can be seen, a negative number of iterations, other classes or another grid in
        a potential than in the unary, names of weights other than those of the potentials.

    Examples:
      >>> unary = jnp.array([[0.0, 2.0], [0.0, 0.0]])  # node 0 is for class 1, node 1 undecided
      >>> agree = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])  # one edge, on which equal labels score higher
      >>> table = pw.PairwiseTable(agree, p=jnp.array([0]), q=jnp.array([1]))
      >>> log_marginals, info = pw.mean_field.run(unary, [table])
      >>> [round(p, 2) for p in jnp.exp(log_marginals)[1].tolist()]  # of node 1
      [0.3, 0.7]
      >>> info.change.shape
      (3,)
    """
    unary, potentials, weights = inputs.model(unary, potentials, weights)
    inputs.check_schedule(num_iterations, damping, route)
    arrays = (unary, potentials, weights, (1.0 - damping, damping), inputs.mask(node_mask))
    settings = dict(num_iterations=int(num_iterations), normalize=bool(normalize), route=route, chunk_edges=chunk_edges)
    return _run(*arrays, **settings)


def _run_layout(unary, potentials, *rest, **settings):
    batch = batch_spec(unary, -_image_axes(unary, potentials)[0])
    return jax.P(*batch), MeanFieldInfo(jax.P(None, *batch))


@compiled(_run_layout)
def _run(unary, potentials, weights, shares, node_mask, *, num_iterations, normalize, route, chunk_edges):
    if not potentials:
        batch = unary.shape[: len(_image_axes(unary, potentials)) * -1]
        return init(unary), MeanFieldInfo(jnp.zeros((num_iterations, *batch), jnp.float32))
    unary, takes_part, empty = _sound(unary, node_mask)
    potentials = [pairwise.prepare_messages(p, num_iterations, route, takes_part) for p in potentials]

    def body(state, _):
        return _update(state, unary, potentials, weights, shares, takes_part, normalize, chunk_edges)

    # Rematerialised: else the scan keeps the hidden units of all edges, as they are the same in each iteration.
    state, change = jax.lax.scan(jax.checkpoint(body), init(unary), None, length=num_iterations)
    return jnp.where(empty[..., None], jnp.nan, state), MeanFieldInfo(change)


def _image_axes(unary, potentials) -> tuple[int, ...]:
    """The axes of one image, nodes and classes."""
    grid = unary.ndim > 2 if not potentials else not isinstance(potentials[0], pairwise.PairwiseTable)
    return (-3, -2, -1) if grid else (-2, -1)
