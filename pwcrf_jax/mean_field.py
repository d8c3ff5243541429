"""Mean-field inference over a unary and any number of pairwise potentials (Lin et al., CVPR 2016, section 3).

    log Q_i(k) = z_i[k] / T + sum_relations w_r message_{r,i}[k] - const         (messages: `pwcrf_jax.messages`)

The schedule is parallel: all nodes are updated at once from the marginals of the iteration before. That is fast on
wide hardware but it is *not* a descent method: with strong couplings the free energy can rise and labels can flip for
ever. Damping mixes the old log marginals into the new ones; 0.5 converged in every random small graph tried. The
returned change per iteration shows which case one is in.

A score of -inf rules a label out: its marginal is 0. A pair score of -inf counts as `pwcrf_jax.potentials.RULED_OUT`. A
node all of whose labels are ruled out has no marginals: they are NaN, and it neither sends nor receives, like a masked
one.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pwcrf_jax import inputs
from pwcrf_jax.arrays import as_array, as_mask, batch_spec, compiled, level, seen
from pwcrf_jax.messages import ALGORITHMS, compute_prepared_messages, prepare_messages
from pwcrf_jax.potentials import PairwiseTable, Potential

_STATIC = dict(static=True)
_Shares = tuple[ArrayLike, ArrayLike]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of inference, a pytree: weights, damping and temperature may be traced and differentiated; rest static.

    Attributes:
      num_iterations: int, at least 0; the paper uses 3.
      weights: of the relations' messages, float: one number for all, a sequence or array of one a relation [R], or with
        a mapping of potentials one of the same names. None: 1 (the paper). Piecewise-trained potentials over-count, so
        weights below 1 are worth choosing on held-out data. That of a relation may be an array [K, K] of its pairs of
        labels.
      unary_temperature: T, scalar above 0, that the unary's scores are divided by; None: 1. Above 1 it is less sure.
      damping: scalar, 0 (none) to below 1, the share of the old log marginals.
      average_messages: bool, divide each node's messages by their number, relation by relation, so that one weight
        serves maps and boxes of any size; False: plain sums (the paper).
      algorithm: str, how messages of a factored potential are computed, "auto", "factored" or "table"; see
        `pwcrf_jax.messages.prepare_messages`. The marginals are the same, time and memory are not.
      chunk_edges: int or None, of `pwcrf_jax.messages.compute_messages`.

    Raises:
      ValueError: a negative num_iterations, an unknown algorithm, chunk_edges below 1. What data hold is checked where
        they are used: trees of gradients and of layouts are `Settings` too.
    """

    num_iterations: int = dataclasses.field(default=3, metadata=_STATIC)
    weights: inputs.Weights = None
    unary_temperature: ArrayLike | None = None
    damping: ArrayLike = 0.0
    average_messages: bool = dataclasses.field(default=False, metadata=_STATIC)
    algorithm: str = dataclasses.field(default="auto", metadata=_STATIC)
    chunk_edges: int | None = dataclasses.field(default=None, metadata=_STATIC)

    def __post_init__(self) -> None:
        if operator.index(self.num_iterations) < 0:
            raise ValueError(f"num_iterations must be at least 0, got {self.num_iterations}")
        # Static settings are compared and hashed, which arrays cannot be.
        object.__setattr__(self, "num_iterations", operator.index(self.num_iterations))
        object.__setattr__(self, "average_messages", bool(self.average_messages))
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {self.algorithm!r}")
        inputs.check_chunk_edges(self.chunk_edges)


DEFAULT_SETTINGS = Settings()
"""Three iterations of plain sums of messages, weight 1, no damping (int 3, float 1 and 0): the paper's."""


class MeanFieldInfo(NamedTuple):
    """change: float32 [num_iterations, ...batch], the largest |Q_new - Q_old| over nodes and classes."""

    change: jax.Array


def init(unary: ArrayLike) -> jax.Array:
    """Log marginals before any message: the log softmax of the unary scores.

    Args:
      unary: scores z, float [..., K].

    Returns:
      float32, the shape of unary.
    """
    return jax.nn.log_softmax(as_array(unary).astype(jnp.float32), axis=-1)


def step(
    log_marginals: ArrayLike,
    unary: ArrayLike,
    potentials: inputs.Potentials,
    settings: Settings = DEFAULT_SETTINGS,
    *,
    node_mask: ArrayLike | None = None,
    **fields: Any,
) -> tuple[jax.Array, jax.Array]:
    """One parallel update of all nodes.

        log Q_new = (1 - damping) log_softmax(z / T + sum_r w_r m_r(Q)) + damping log Q_old, normalised

    Args:
      log_marginals: float32 [..., num_nodes, K] or [..., H, W, K].
      unary: scores z, float, same shape.
      potentials: sequence of `PairwiseTable`, or of `FactoredPairwise` and `GridScores`, one a relation; a mapping of
        names to them; or one alone. May be empty: then a unary of three axes or more is read as [..., H, W, K].
      settings: `Settings`; num_iterations has no meaning here.
      node_mask: bool [..., num_nodes] or [..., H, W]; false nodes (void, padding) neither send nor receive, and may
        hold anything.
      fields: of `Settings` by name, in place of those of settings, such as weights=0.5.

    Returns:
      (log_marginals, change): the new state, float32, and the largest |Q_new - Q_old| of each image, float32
      [...batch].

    Raises:
      TypeError, ValueError: as `run`.
    """
    scores, found, settings, shares = _checked(unary, potentials, replaced(settings, fields))
    return _step(as_array(log_marginals), scores, found, settings, shares, as_mask(node_mask))


def run(
    unary: ArrayLike,
    potentials: inputs.Potentials,
    settings: Settings = DEFAULT_SETTINGS,
    *,
    node_mask: ArrayLike | None = None,
    **fields: Any,
) -> tuple[jax.Array, MeanFieldInfo]:
    """Mean field from the unary: parallel updates, `settings.num_iterations` of them, in a `lax.scan`.

    Args:
      unary: scores z (= -U), float [..., num_nodes, K] for tables or [..., H, W, K] for factored potentials.
      potentials: as in `step`. Tables of graphs and potentials on grids do not mix.
      settings: `Settings`.
      node_mask, fields: as in `step`.

    Returns:
      (log_marginals, MeanFieldInfo): float32, the shape of unary; changes [num_iterations, ...batch].

    Raises:
      TypeError: what is no potential; names that are no fields of `Settings`.
      ValueError: mixed encodings, a number of weights other than the number of potentials, damping outside [0, 1) or a
        temperature not above 0 where they can be seen, other classes or another grid in a potential than in the unary,
        names of weights other than those of the potentials, weights of pairs of labels that are not [K, K].

    Examples:
      >>> unary = jnp.array([[0.0, 2.0], [0.0, 0.0]])  # node 0 is for class 1, node 1 undecided
      >>> agree = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])  # one edge, on which equal labels score higher
      >>> table = pw.PairwiseTable(agree, p=jnp.array([0]), q=jnp.array([1]))
      >>> log_marginals, info = pw.mean_field.run(unary, [table])
      >>> [round(p, 2) for p in jnp.exp(log_marginals)[1].tolist()]  # of node 1
      [0.3, 0.7]
      >>> log_marginals, info = pw.mean_field.run(unary, [table], weights=0.5, num_iterations=5)
      >>> info.change.shape
      (5,)
    """
    scores, found, settings, shares = _checked(unary, potentials, replaced(settings, fields))
    return _run(scores, found, settings, shares, as_mask(node_mask))


def replaced(settings: Settings, fields: dict[str, Any]) -> Settings:
    """`settings` with other values of these fields, of the types of `Settings`: int, bool, str, float or arrays [R].

    Raises:
      TypeError: a name that is no field of `Settings`.
    """
    known = [field.name for field in dataclasses.fields(Settings)]
    if unknown := [name for name in fields if name not in known]:
        raise TypeError(f"{unknown[0]!r} is no field of mean_field.Settings; it has {', '.join(known)}")
    return dataclasses.replace(settings, **fields)


def tempered(unary: ArrayLike, settings: Settings) -> tuple[jax.Array, Settings]:
    """The unary's scores at the temperature of the settings, z / T, and the settings without it.

    Args:
      unary: scores z, float [..., K].
      settings: `Settings`.

    Returns:
      (scores, settings): float32, or what was given where T is 1; -inf and NaN stay.

    Raises:
      ValueError: a temperature not above 0 where it can be seen.
    """
    scores, temperature = as_array(unary), settings.unary_temperature
    settings = dataclasses.replace(settings, unary_temperature=None)
    if temperature is None:
        return scores, settings
    if seen(temperature):
        number = float(temperature)  # type: ignore[arg-type]  # a scalar
        if not number > 0:
            raise ValueError(f"unary_temperature must be above 0, got {temperature}")
        if number == 1:
            return scores, settings
    scores = scores.astype(jnp.float32)
    finite = jnp.isfinite(scores)  # minus infinity times a gradient of 0 would be NaN
    return jnp.where(finite, jnp.where(finite, scores, 0) / jnp.asarray(temperature, jnp.float32), scores), settings


def _checked(
    unary: ArrayLike, potentials: inputs.Potentials, settings: Settings
) -> tuple[jax.Array, list[Potential], Settings, _Shares]:
    """(unary, list of potentials, settings with a weight for each, (share of the new log marginals, of the old))."""
    damping: Any = settings.damping
    if seen(damping) and not 0 <= float(damping) < 1:
        raise ValueError(f"damping must lie in [0, 1), got {damping}")
    scores, found, weights = inputs.model(unary, potentials, settings.weights)
    scores, settings = tempered(scores, settings)
    return scores, found, dataclasses.replace(settings, weights=weights), (1.0 - damping, damping)


def _step_layout(state: jax.Array, unary: jax.Array, potentials: list[Potential], *_: Any) -> Any:
    batch = batch_spec(unary, -_image_axes(unary, potentials)[0])
    return jax.P(*batch), jax.P(*batch)


@compiled(_step_layout)
def _step(
    state: jax.Array,
    unary: jax.Array,
    potentials: list[Potential],
    settings: Settings,
    shares: _Shares,
    node_mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    unary, takes_part, empty = _sound(unary, node_mask, state)
    state = jnp.where(empty[..., None], 0.0, state)
    prepare = functools.partial(prepare_messages, algorithm=settings.algorithm, node_mask=takes_part)
    new, change = _update(state, unary, [prepare(p, 1) for p in potentials], settings, shares, takes_part)
    return jnp.where(empty[..., None], jnp.nan, new), change


def _run_layout(unary: jax.Array, potentials: list[Potential], *_: Any) -> Any:
    spec: Any = jax.P  # in place of arrays
    batch = batch_spec(unary, -_image_axes(unary, potentials)[0])
    return spec(*batch), MeanFieldInfo(spec(None, *batch))


@compiled(_run_layout)
def _run(
    unary: jax.Array,
    potentials: list[Potential],
    settings: Settings,
    shares: _Shares,
    node_mask: jax.Array | None,
) -> tuple[jax.Array, MeanFieldInfo]:
    num_iterations = settings.num_iterations
    if not potentials:
        batch = unary.shape[: len(_image_axes(unary, potentials)) * -1]
        return init(unary), MeanFieldInfo(jnp.zeros((num_iterations, *batch), jnp.float32))
    unary, takes_part, empty = _sound(unary, node_mask)
    prepare = functools.partial(prepare_messages, algorithm=settings.algorithm, node_mask=takes_part)
    potentials = [prepare(p, num_iterations) for p in potentials]

    def body(state: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return _update(state, unary, potentials, settings, shares, takes_part)

    # Rematerialised: else the scan keeps the hidden units of all edges, as they are the same in each iteration.
    state, change = jax.lax.scan(jax.checkpoint(body), init(unary), None, length=num_iterations)
    return jnp.where(empty[..., None], jnp.nan, state), MeanFieldInfo(change)


def _sound(unary: jax.Array, node_mask: jax.Array | None, *others: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
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


def _update(
    state: jax.Array,
    unary: jax.Array,
    potentials: list[Potential],
    settings: Settings,
    shares: _Shares,
    takes_part: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`step` of what is sound."""
    marginals, weights = jnp.exp(state), _weights(settings, len(potentials))
    total = unary
    for potential, weight in zip(potentials, weights, strict=True):
        message, count = compute_prepared_messages(potential, marginals, takes_part, chunk_edges=settings.chunk_edges)
        if settings.average_messages:
            message = message / jnp.maximum(count, 1.0)[..., None]
        total = total + weight * message
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


def _weights(settings: Settings, number: int) -> list[Any]:
    given: Any = settings.weights
    return [1.0 if given is None else jnp.asarray(given[i], jnp.float32) for i in range(number)]


def _image_axes(unary: jax.Array, potentials: list[Potential]) -> tuple[int, ...]:
    """The axes of one image, nodes and classes."""
    grid = unary.ndim > 2 if not potentials else not isinstance(potentials[0], PairwiseTable)
    return (-3, -2, -1) if grid else (-2, -1)
