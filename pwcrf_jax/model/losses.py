"""Objectives of training: potentials and labels in, (sum, count) of log-likelihoods out.

An objective is data, one of `OBJECTIVES`: its terms, their weights, its stages, and what a config may ask of it.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from pwcrf_jax import likelihood, mean_field, objectives, piecewise
from pwcrf_jax.likelihood import Sums, sample_offsets
from pwcrf_jax.model import decode
from pwcrf_jax.model.segmenter import Potentials

Terms = dict[str, Sums]
"""{kind of factor: (sum, count) of log-likelihoods, float32 scalars}."""

TRAINED_FACTORS = ("unary", "pairwise")
"""Kinds of factors that a step may train: both, or one, in a stage. Refinement convolutions go with the second."""

UNARY_TERMS = ("unary", "label_smoothing", "dice")
"""Terms of the unary's factors; the last two are there where `Settings` asks for them."""

EVIDENCE_NOISE = ("evidence_temperature", "evidence_dropout")
"""Names of `Settings` that `with_evidence_noise` reads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the loss, the same for all objectives; `Objective.unused` names those that do nothing for one.

    Attributes:
      reduction: "mean", each kind of factor by its own count, or "sum", all factors by the number of images (the
        paper's).
      pairwise_weight: of the terms of relations, at least 0.
      balance_power: of `pwcrf_jax.piecewise.balance_weights`; 0: none.
      pairwise_balance_power: that of the relations; -1: the same.
      sampled_offsets: of each relation, drawn anew in every step; 0, or as many as there are: all.
      chunk_edges: edges whose scores are held at a time; None: chosen from the shapes.
      label_smoothing: share of the unary's targets that is uniform over the classes, 0 <= x < 1.
      dice_weight: of 1 - soft Dice of the unary's marginals, beside its cross-entropy, at least 0.
      evidence_temperature: (low, high) of `with_evidence_noise`, above 0.
      evidence_dropout: share of the nodes whose evidence it makes uniform, 0 <= x < 1.
    """

    reduction: str = "mean"
    pairwise_weight: float = 1.0
    balance_power: float = 0.0
    pairwise_balance_power: float = -1.0
    sampled_offsets: int = 0
    chunk_edges: int | None = None
    label_smoothing: float = 0.0
    dice_weight: float = 0.0
    evidence_temperature: tuple[float, float] = (1.0, 1.0)
    evidence_dropout: float = 0.0

    @property
    def has_evidence_noise(self) -> bool:
        """Whether `with_evidence_noise` changes anything."""
        return tuple(self.evidence_temperature) != (1.0, 1.0) or self.evidence_dropout > 0


DEFAULT_SETTINGS, DEFAULT_INFERENCE = Settings(), mean_field.DEFAULT_SETTINGS


def piecewise_terms(
    potentials: Potentials,
    labels: jax.Array,
    settings: Settings = DEFAULT_SETTINGS,
    *,
    key: jax.Array | None = None,
) -> Terms:
    """(sum, count) of the log-likelihood of every kind of factor: {"unary": ..., relation name: ...}.

    And of "refinement_convs", of models that have them: of the unary's own marginals, refined, at the cells of the
    finer grid. No inference runs for them either. Where settings ask for them, of "label_smoothing"
    (`pwcrf_jax.piecewise.uniform_log_likelihood`) and "dice" (`pwcrf_jax.piecewise.soft_dice` less 1).

    Args:
      potentials: of a `Segmenter`.
      labels: int [B, H, W] of the image; read at the centres of the grid's cells.
      settings: reduction and pairwise_weight have no meaning here.
      key: that offsets are sampled with; None: all offsets count.
    """
    grid = piecewise.grid_labels(labels, *potentials.unary.shape[1:3])
    num_classes = potentials.unary.shape[-1]
    weights = _balance(grid, num_classes, settings.balance_power)
    terms = {"unary": piecewise.unary_log_likelihood(potentials.unary, grid, node_weights=weights)}
    if settings.label_smoothing:
        terms["label_smoothing"] = piecewise.uniform_log_likelihood(potentials.unary, grid, node_weights=weights)
    if settings.dice_weight:
        total, count = piecewise.soft_dice(potentials.unary, grid)
        terms["dice"] = total - count, count
    if settings.pairwise_balance_power >= 0:
        weights = _balance(grid, num_classes, settings.pairwise_balance_power)
    for i, (name, potential) in enumerate(potentials.pairwise.items()):
        sample, num_offsets = None, len(potential.offsets)
        if key is not None and 0 < settings.sampled_offsets < num_offsets:
            sample = sample_offsets(jax.random.fold_in(key, i), num_offsets, settings.sampled_offsets)
        terms[name] = likelihood.pairwise_log_likelihood(
            potential, grid, node_weights=weights, chunk_edges=settings.chunk_edges, sample=sample
        )
    if potentials.refinement_logits is not None:
        log_marginals = jax.lax.stop_gradient(jax.nn.log_softmax(potentials.unary, axis=-1))
        scores = decode.apply_refinement(log_marginals, potentials.refinement_logits)
        fine = piecewise.grid_labels(labels, *scores.shape[1:3])
        weights = _balance(fine, num_classes, settings.balance_power)
        terms["refinement_convs"] = piecewise.unary_log_likelihood(scores, fine, node_weights=weights)
    return terms


def with_evidence_noise(potentials: Potentials, keys: jax.Array, settings: Settings) -> Potentials:
    """Potentials whose residual relations train beside a unary that is less sure than it is.

        e'_p = log softmax(e_p / T),    log T ~ uniform(log low, log high), one of each image
        e'_p = -log K                   with the probability of evidence_dropout, each node by itself

    e: `unary_log_probs` (`pwcrf_jax.potentials`). A unary is surer of the images that it trained on than of others.

    Args:
      potentials: of a `Segmenter`; those of relations without unary_log_probs stay what they are.
      keys: a JAX random key for each image, [B]: its noise is the same for all relations, whatever its batch.
      settings: evidence_temperature and evidence_dropout.

    Returns:
      `Potentials`; the unary is what it was.
    """
    low, high = map(math.log, settings.evidence_temperature)

    def noisy(evidence: jax.Array, key: jax.Array) -> jax.Array:
        of_temperature, of_nodes = jax.random.split(key)
        temperature = jnp.exp(jax.random.uniform(of_temperature, minval=low, maxval=high))
        cooled = jax.nn.log_softmax(evidence / temperature, axis=-1)
        dropped = jax.random.bernoulli(of_nodes, settings.evidence_dropout, evidence.shape[:-1])
        return jnp.where(dropped[..., None], -math.log(evidence.shape[-1]), cooled)

    pairwise = {
        name: potential
        if potential.unary_log_probs is None
        else dataclasses.replace(potential, unary_log_probs=jax.vmap(noisy)(potential.unary_log_probs, keys))
        for name, potential in potentials.pairwise.items()
    }
    return potentials._replace(pairwise=pairwise)


def _balance(grid: jax.Array, num_classes: int, power: float) -> jax.Array | None:
    return piecewise.balance_weights(grid, num_classes, power=power) if power else None


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """An objective of training; `OBJECTIVES` has them by name.

    Attributes:
      staged: the unary trains first and alone, then what stands on its features, frozen.
      contains_inference: it trains what inference uses, with the settings of inference, and nothing else.
      iterates: of one that contains inference: mean field runs in it, and trains no relation in 0 iterations.
      trains_refinement_convs: it has a term of refinement convolutions.
    """

    staged: bool = False
    contains_inference: ClassVar[bool] = False
    iterates: ClassVar[bool] = False
    trains_refinement_convs: ClassVar[bool] = False

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of `Settings` that do nothing for it."""
        return ()

    @property
    def needs_relations(self) -> bool:
        """There must be relations, or of `trains_refinement_convs` these."""
        return self.staged or self.contains_inference

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Kinds of factors that each stage trains, of `TRAINED_FACTORS`, in order."""
        return tuple((kind,) for kind in TRAINED_FACTORS) if self.staged else (TRAINED_FACTORS,)

    @abc.abstractmethod
    def term_names(self, potentials: Potentials) -> tuple[str, ...]:
        """Names of all terms of a model with these potentials, whichever the stage; not of those of settings."""

    @abc.abstractmethod
    def terms(
        self,
        potentials: Potentials,
        labels: jax.Array,
        settings: Settings = DEFAULT_SETTINGS,
        inference: mean_field.Settings = DEFAULT_INFERENCE,
        *,
        valid_box: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Terms:
        """(sum, count) of each kind of factor.

        Args:
          potentials, labels, settings, key: of `piecewise_terms`.
          inference: settings of mean field; where its weights are a mapping, they name the relations that take part.
          valid_box: int [B, 4], where the image lies in its crop (`pwcrf_jax.model.decode`); None: all is image.
        """

    @abc.abstractmethod
    def weights(self, terms: Terms, settings: Settings = DEFAULT_SETTINGS) -> dict[str, float]:
        """The weight of each term in the loss; those that it leaves out are there to be watched."""


@dataclasses.dataclass(frozen=True)
class Piecewise(Objective):
    """Every factor by itself (Lin et al., CVPR 2016, section 4): no inference in training."""

    trains_refinement_convs = True

    def term_names(self, potentials: Potentials) -> tuple[str, ...]:
        return ("unary", *potentials.pairwise, *["refinement_convs"] * (potentials.refinement_logits is not None))

    def terms(
        self, potentials, labels, settings=DEFAULT_SETTINGS, inference=DEFAULT_INFERENCE, *, valid_box=None, key=None
    ):
        return piecewise_terms(potentials, labels, settings, key=key)

    def weights(self, terms: Terms, settings: Settings = DEFAULT_SETTINGS) -> dict[str, float]:
        smoothing = settings.label_smoothing
        own = {"unary": 1.0 - smoothing, "label_smoothing": smoothing, "dice": settings.dice_weight}
        return {k: (own | {"refinement_convs": 1.0}).get(k, settings.pairwise_weight) for k in terms}


@dataclasses.dataclass(frozen=True)
class Joint(Objective):
    """One likelihood of all factors together, beside which the unary's own is watched.

    Attributes:
      term: its name among the terms.
    """

    term: ClassVar[str]
    contains_inference = True

    @property
    def unused(self) -> tuple[str, ...]:
        # The unary's own terms train where it has a stage of its own.
        of_unary = () if self.staged else ("label_smoothing", "dice_weight")
        return "sampled_offsets", "pairwise_weight", "pairwise_balance_power", *EVIDENCE_NOISE, *of_unary

    def term_names(self, potentials: Potentials) -> tuple[str, ...]:
        return "unary", self.term

    def terms(
        self, potentials, labels, settings=DEFAULT_SETTINGS, inference=DEFAULT_INFERENCE, *, valid_box=None, key=None
    ):
        alone = piecewise_terms(potentials._replace(pairwise={}), labels, settings)
        grid = piecewise.grid_labels(labels, *potentials.unary.shape[1:3])
        mask = None if valid_box is None else decode.grid_mask(valid_box, grid.shape[1:], labels.shape[1:3])
        weights = _balance(grid, potentials.unary.shape[-1], settings.balance_power)
        if isinstance(inference.weights, Mapping):
            potentials = potentials._replace(pairwise={name: potentials.pairwise[name] for name in inference.weights})
        own = self.log_likelihood(potentials, grid, inference, node_mask=mask, node_weights=weights)
        return alone | {self.term: own}

    def weights(self, terms: Terms, settings: Settings = DEFAULT_SETTINGS) -> dict[str, float]:
        return {self.term: 1.0}

    @abc.abstractmethod
    def log_likelihood(
        self,
        potentials: Potentials,
        grid: jax.Array,
        inference: mean_field.Settings,
        *,
        node_mask: jax.Array | None = None,
        node_weights: jax.Array | None = None,
    ) -> Sums:
        """(sum, count) of its own term; grid: int [B, h, w], the labels of the cells."""


@dataclasses.dataclass(frozen=True)
class PseudoLikelihood(Joint):
    """Each label given its neighbours' (`pwcrf_jax.objectives.pseudo_log_likelihood`)."""

    term = "pseudo_likelihood"

    def log_likelihood(self, potentials, grid, inference, *, node_mask=None, node_weights=None):
        # Padding is void, which sends nothing.
        return objectives.pseudo_log_likelihood(
            potentials.unary, potentials.pairwise, grid, inference, node_weights=node_weights
        )


@dataclasses.dataclass(frozen=True)
class UnrolledMeanField(Joint):
    """Marginals after mean field (`pwcrf_jax.objectives.unrolled_log_likelihood`)."""

    term = "unrolled_mean_field"
    iterates = True

    def log_likelihood(self, potentials, grid, inference, *, node_mask=None, node_weights=None):
        return objectives.unrolled_log_likelihood(
            potentials.unary, potentials.pairwise, grid, inference, node_mask=node_mask, node_weights=node_weights
        )


OBJECTIVES = {
    "piecewise": Piecewise(),
    "piecewise_staged": Piecewise(staged=True),
    "pseudo_likelihood": PseudoLikelihood(),
    "unrolled_mean_field": UnrolledMeanField(),
    "unrolled_mean_field_staged": UnrolledMeanField(staged=True),
}
"""By the name that config.loss.objective has for it."""


def negative_log_likelihood(
    terms: Terms, num_images: int, weights: dict[str, float], reduction: str = "mean"
) -> jax.Array:
    """The loss of one device's terms, counts already summed over the devices.

    The sum over devices of this is the loss, and so the sum of its gradients is the gradient.

    Args:
      terms: of `Objective.terms`.
      num_images: on all devices.
      weights: of `Objective.weights`.
      reduction: of `Settings`.
    """
    loss = jnp.float32(0)
    for name, weight in weights.items():
        total, count = terms[name]
        loss -= weight * total / (jnp.maximum(count, 1.0) if reduction == "mean" else num_images)
    return loss
