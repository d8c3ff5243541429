"""The training step, per device (see `pwcrf_jax.runtime.parallel`), without jit."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from pwcrf_jax import config as configs
from pwcrf_jax import mean_field
from pwcrf_jax.model import losses
from pwcrf_jax.model.segmenter import potentials_of
from pwcrf_jax.runtime.parallel import AXIS
from pwcrf_jax.training.averaging import OFF, Averaging

_DROPOUT, _EVIDENCE = 0x64726F70, 0x65766964  # folded into the key of a step; small numbers are those of relations


@flax.struct.dataclass
class TrainState:
    """State of training, a pytree.

    Attributes:
      step: int32 scalar, of the steps that were taken: those that `make_train_step` skips do not count.
      params: of the model, which the gradient is taken at.
      opt_state: of the optimizer.
      averaged: of `Averaging`, like params; None where it is off.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    averaged: Any = None

    @classmethod
    def create(cls, params: Any, tx: optax.GradientTransformation, averaging: Averaging = OFF) -> "TrainState":
        """The state that a run begins with."""
        copied = jax.tree.map(jnp.copy, params) if averaging.decay else None  # the step takes each buffer once
        return cls(step=jnp.int32(0), params=params, opt_state=tx.init(params), averaged=copied)

    @property
    def evaluated(self) -> Any:
        """The parameters that all but training uses: averaged ones, where there are any."""
        return self.params if self.averaged is None else self.averaged

    def trees(self) -> dict[str, Any]:
        """The trees of a checkpoint: "params", `evaluated`, which evaluation reads alone, and "rest"."""
        rest = {"step": self.step, "opt_state": self.opt_state}
        return {"params": self.evaluated, "rest": rest | ({} if self.averaged is None else {"params": self.params})}

    @classmethod
    def from_trees(cls, trees: dict[str, Any]) -> "TrainState":
        """The state of what `trees` gave."""
        name = "averaged" if "params" in trees["rest"] else "params"
        return cls(**{name: trees["params"]}, **trees["rest"])


TrainStep = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def from_config(config: Any, model: Any, tx: Any, trained: tuple[str, ...] = losses.TRAINED_FACTORS) -> TrainStep:
    """`make_train_step` of a config."""
    begins = 0 if "unary" in trained else configs.unary_steps(config) or 0
    return make_train_step(
        model,
        tx,
        configs.objective(config),
        configs.loss_settings(config),
        inference=configs.crf_settings(config),
        seed=config.seed,
        trained=trained,
        accumulate=config.train.accumulate,
        averaging=Averaging(config.optimizer.ema_decay, begins),
    )


def make_train_step(
    model: Any,
    tx: optax.GradientTransformation,
    objective: losses.Objective,
    settings: losses.Settings = losses.DEFAULT_SETTINGS,
    *,
    inference: mean_field.Settings = mean_field.DEFAULT_SETTINGS,
    seed: int = 0,
    trained: tuple[str, ...] = losses.TRAINED_FACTORS,
    accumulate: int = 1,
    averaging: Averaging = OFF,
) -> TrainStep:
    """Builds step(state, batch) -> (state, metrics).

    Args:
      model: a `pwcrf_jax.model.segmenter.Segmenter`.
      tx: the optimizer.
      objective: of `losses.OBJECTIVES`.
      settings: of the loss.
      inference: settings of mean field, for objectives that contain inference; see `losses.Objective.terms`.
      seed: of the sampled offsets, of dropout and of the evidence's noise, which follow from it and from the number of
        the step alone.
      trained: a stage of the objective.
      accumulate: parts that a device's images are done in, one after the other; it divides their number. The step is
        that of all of them at once, up to rounding.
      averaging: that of the state's `averaged`, where it has them.

    Returns:
      step. batch: image uint8 [B, H, W, 3], label uint8 [B, H, W], the scores of a model that is given them and, where
      it may hold padding, valid_box int32 [B, 4] of `losses.Objective.terms`. metrics: loss, grad_norm, and nll_NAME of
      every term, -1 where a step has no factor of this kind; skipped: loss or gradient are not finite, the state, its
      step too, is what it was; finite: all of the new state is.
    """
    loss_fn = _Loss(model, objective, settings, inference, seed, trained, accumulate)

    def step(state, batch):
        before = averaging.start(state.params, state.averaged, state.step)
        loss, terms, grads = loss_fn.gradient(before, loss_fn.with_keys(batch, state.step), state.step)
        sums = {k: total for k, (total, _) in terms.items()}
        loss, sums, grads = jax.lax.psum((loss, sums, grads), AXIS)
        updates, opt_state = tx.update(grads, state.opt_state, before)
        params = optax.apply_updates(before, updates)
        nll = lambda total, count: jnp.where(count > 0, -total / jnp.maximum(count, 1e-9), -1.0)
        out = {f"nll_{k}": nll(sums[k], count) for k, (_, count) in terms.items()}
        out |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        # Of sums over all devices, so that all take or skip the step together.
        taken = jnp.isfinite(loss) & jnp.isfinite(out["grad_norm"])
        averaged = averaging.update(params, state.averaged, state.step)
        new = TrainState(state.step + 1, params, opt_state, averaged)
        new = jax.tree.map(lambda new, old: jnp.where(taken, new, old), new, state)
        # A finite gradient can still lead out of the numbers.
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]))
        return new, out | {"skipped": ~taken, "finite": finite}

    return step


Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The loss of one device's images and its gradient; attributes as in `make_train_step`."""

    model: Any
    objective: losses.Objective
    settings: losses.Settings
    inference: mean_field.Settings
    seed: int
    trained: tuple[str, ...]
    accumulate: int

    def with_keys(self, batch: Batch, step: jax.Array) -> Batch:
        """The batch, with a key of each image for dropout and one for the noise of evidence, where there is such."""
        kinds = {"dropout_keys": _DROPOUT} if self.model.dropout else {}
        kinds |= {"evidence_keys": _EVIDENCE} if self.settings.has_evidence_noise else {}
        for name, kind in kinds.items():
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), step), kind)
            # By the place in the batch of all devices: neither their number nor that of parts changes anything.
            count = batch["image"].shape[0]
            places = jax.lax.axis_index(AXIS) * count + jnp.arange(count)
            batch = batch | {name: jax.vmap(functools.partial(jax.random.fold_in, key))(places)}
        return batch

    def gradient(self, params: Any, batch: Batch, step: jax.Array) -> tuple[jax.Array, losses.Terms, Any]:
        """(loss, terms, gradient), counts summed over the devices, the rest this device's share."""
        num_images = batch["image"].shape[0] * jax.lax.axis_size(AXIS)

        def loss_fn(params, batch, counts=None):
            terms, weights = self._terms(params, batch, step)
            if counts is None:
                # Counts are of labels, not of parameters: summing them here puts no collective into the backward pass.
                counts = {k: jax.lax.psum(count, AXIS) for k, (_, count) in terms.items()}
            terms = {k: (total, counts[k]) for k, (total, _) in terms.items()}
            return losses.negative_log_likelihood(terms, num_images, weights, self.settings.reduction), terms

        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        if self.accumulate == 1:
            (loss, terms), grads = value_and_grad(params, batch)
            return loss, terms, grads
        # Each part is divided by the counts of all. These need no net, so the compiler leaves the nets out here.
        counts = {k: jax.lax.psum(count, AXIS) for k, (_, count) in self._terms(params, batch, step)[0].items()}
        parts = jax.tree.map(lambda x: x.reshape(self.accumulate, -1, *x.shape[1:]), batch)

        def add(so_far, part):
            (loss, terms), grads = value_and_grad(params, part, counts)
            sums = {k: total for k, (total, _) in terms.items()}
            return jax.tree.map(jnp.add, so_far, (loss, sums, grads)), None

        zeros = jnp.float32(0), dict.fromkeys(counts, jnp.float32(0)), jax.tree.map(jnp.zeros_like, params)
        # In a loop, XLA's CPU convolutions are several times slower; beyond eight parts, compilation would be.
        unroll = min(self.accumulate, 8) if jax.default_backend() == "cpu" else 1
        (loss, sums, grads), _ = jax.lax.scan(add, zeros, parts, unroll=unroll)
        return loss, {k: (sums[k], counts[k]) for k in counts}, grads

    def _terms(self, params: Any, batch: Batch, step: jax.Array) -> tuple[losses.Terms, dict[str, float]]:
        """(sum, count) of each kind of factor, those that this stage does not train too, and the weights of its own."""
        dropout = {"dropout_keys": batch["dropout_keys"], "dropped": self.trained} if "dropout_keys" in batch else {}
        potentials = potentials_of(self.model, params, batch, **dropout)
        names = self.objective.term_names(potentials)
        # The unary alone has one likelihood, whatever comes after it.
        of_stage = self.objective if "pairwise" in self.trained else losses.Piecewise()
        if "pairwise" not in self.trained:
            potentials = potentials._replace(pairwise={}, refinement_logits=None)
        if "evidence_keys" in batch:
            potentials = losses.with_evidence_noise(potentials, batch["evidence_keys"], self.settings)
        if "unary" not in self.trained:
            potentials = potentials._replace(unary=jax.lax.stop_gradient(potentials.unary))
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        box = batch.get("valid_box")
        terms = of_stage.terms(potentials, batch["label"], self.settings, self.inference, valid_box=box, key=key)
        weights = of_stage.weights(terms, self.settings)
        if "unary" not in self.trained:
            weights = {k: weight for k, weight in weights.items() if k not in losses.UNARY_TERMS}
        return terms | {k: (jnp.float32(0), jnp.float32(0)) for k in names if k not in terms}, weights
