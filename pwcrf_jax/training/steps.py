"""The training step, per device (see `pwcrf_jax.runtime.parallel`), without jit."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from pwcrf_jax import config as configs
from pwcrf_jax import mean_field
from pwcrf_jax.model import losses
from pwcrf_jax.runtime.parallel import AXIS


@flax.struct.dataclass
class TrainState:
    """State of training, a pytree.

    Attributes:
      step: int32 scalar, of the steps that were taken: those that `make_train_step` skips do not count.
      params: of the model.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Any, tx: optax.GradientTransformation) -> "TrainState":
        """The state that a run begins with."""
        return cls(step=jnp.int32(0), params=params, opt_state=tx.init(params))

    def trees(self) -> dict[str, Any]:
        """The trees of a checkpoint: "params", which evaluation reads alone, and "rest"."""
        return {"params": self.params, "rest": {"step": self.step, "opt_state": self.opt_state}}

    @classmethod
    def from_trees(cls, trees: dict[str, Any]) -> "TrainState":
        """The state of what `trees` gave."""
        return cls(params=trees["params"], **trees["rest"])


TrainStep = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def from_config(config: Any, model: Any, tx: Any, trained: tuple[str, ...] = losses.TRAINED_FACTORS) -> TrainStep:
    """`make_train_step` of a config."""
    return make_train_step(
        model,
        tx,
        configs.objective(config),
        configs.loss_settings(config),
        inference=configs.crf_settings(config),
        seed=config.seed,
        trained=trained,
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
) -> TrainStep:
    """Builds step(state, batch) -> (state, metrics).

    Args:
      model: a `pwcrf_jax.model.segmenter.Segmenter`.
      tx: the optimizer.
      objective: of `losses.OBJECTIVES`.
      settings: of the loss.
      inference: settings of mean field, for objectives that contain inference; see `losses.Objective.terms`.
      seed: of the sampled offsets, which follow from it and from the number of the step alone.
      trained: a stage of the objective.

    Returns:
      step. batch: image uint8 [B, H, W, 3], label uint8 [B, H, W] and, where it may hold padding, valid_box int32
      [B, 4] of `losses.Objective.terms`. metrics: loss, grad_norm, and nll_NAME of every term, -1 where a step
      has no factor of this kind; skipped: loss or gradient are not finite, the state, its step too, is what it was;
      finite: all of the new state is.
    """
    # The unary alone has one likelihood, whatever comes after it.
    of_stage = objective if "pairwise" in trained else losses.Piecewise()

    def loss_fn(params, batch, step):
        potentials = model.apply({"params": params}, batch["image"])
        names = objective.term_names(potentials)
        if "pairwise" not in trained:
            potentials = potentials._replace(pairwise={}, refinement_logits=None)
        if "unary" not in trained:
            potentials = potentials._replace(unary=jax.lax.stop_gradient(potentials.unary))
        key = jax.random.fold_in(jax.random.key(seed), step)
        box = batch.get("valid_box")
        terms = of_stage.terms(potentials, batch["label"], settings, inference, valid_box=box, key=key)
        weights = of_stage.weights(terms, settings)
        if "unary" not in trained:
            weights.pop("unary", None)
        terms |= {k: (jnp.float32(0), jnp.float32(0)) for k in names if k not in terms}
        # Counts are of labels, not of parameters: summing them here puts no collective into the backward pass.
        terms = {k: (total, jax.lax.psum(count, AXIS)) for k, (total, count) in terms.items()}
        num_images = batch["image"].shape[0] * jax.lax.axis_size(AXIS)
        return losses.negative_log_likelihood(terms, num_images, weights, settings.reduction), terms

    def step(state, batch):
        (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, state.step)
        sums = {k: total for k, (total, _) in terms.items()}
        loss, sums, grads = jax.lax.psum((loss, sums, grads), AXIS)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        nll = lambda total, count: jnp.where(count > 0, -total / jnp.maximum(count, 1e-9), -1.0)
        out = {f"nll_{k}": nll(sums[k], count) for k, (_, count) in terms.items()}
        out |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        # Of sums over all devices, so that all take or skip the step together.
        taken = jnp.isfinite(loss) & jnp.isfinite(out["grad_norm"])
        new = TrainState(state.step + 1, params, opt_state)
        new = jax.tree.map(lambda new, old: jnp.where(taken, new, old), new, state)
        # A finite gradient can still lead out of the numbers.
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]))
        return new, out | {"skipped": ~taken, "finite": finite}

    return step
