"""The training step, per device (see `pwcrf_jax.runtime.parallel`), without jit."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from pwcrf_jax.model.losses import KINDS, STAGED, joint_term, objective, piecewise_terms
from pwcrf_jax.runtime.parallel import AXIS


@flax.struct.dataclass
class TrainState:
    step: jax.Array  # of the steps that were taken: those that `make_train_step` skips do not count
    params: dict
    opt_state: optax.OptState


def make_train_step(model, tx, loss_config, seed=0, crf=None, kinds=KINDS):
    """Builds step(state, batch) -> (state, metrics).

    seed: of the sampled offsets, which follow from it and from the number of the step alone.
    crf: `mean_field.Settings`, for the objectives that contain inference.
    kinds: of the factors that train: both, or one, which is a stage of an objective in stages.

    batch: image uint8 [B, H, W, 3], label uint8 [B, H, W] and, where it may hold padding, inside int32 [B, 4], see
    `joint_term`. metrics: loss, grad_norm, and nll_NAME of every term, -1 where a step has no factor of this kind;
    skipped: loss or gradient are not finite, the state, its step too, is what it was; finite: all of the new state is.
    """
    name = loss_config["objective"].removesuffix(STAGED)

    def loss_fn(params, batch, step):
        potentials = model.apply({"params": params}, batch["image"])
        if "pairwise" not in kinds:
            potentials = potentials._replace(pairwise={}, correction=None)
        if "unary" not in kinds:
            potentials = potentials._replace(unary=jax.lax.stop_gradient(potentials.unary))
        balance, chunk_edges = loss_config["balance_power"], loss_config["chunk_edges"] or None
        of_pairs = loss_config["pairwise_balance_power"]
        key = jax.random.fold_in(jax.random.key(seed), step)
        if name == "piecewise" or "pairwise" not in kinds:
            sampled = loss_config["sampled_offsets"]
            terms = piecewise_terms(potentials, batch["label"], balance, chunk_edges, sampled, key, of_pairs)
            names = [name for name, _ in model.relations] if name == "piecewise" else [name]
            weights = {k: loss_config["pairwise_weight"] if k in names else 1.0 for k in terms}
            if "unary" not in kinds:
                del weights["unary"]
            names += ["refinement_convs"] * bool(dict(model.featmap).get("middle"))
            terms |= {k: (jnp.float32(0), jnp.float32(0)) for k in names if k not in terms}
        else:
            unary = piecewise_terms(potentials._replace(pairwise={}), batch["label"], balance)
            joint = joint_term(potentials, batch["label"], name, crf, balance, batch.get("inside"))
            terms = unary | {name: joint}
            weights = {name: 1.0}
        # Counts are of labels, not of parameters: summing them here puts no collective into the backward pass.
        terms = {k: (total, jax.lax.psum(count, AXIS)) for k, (total, count) in terms.items()}
        num_images = batch["image"].shape[0] * jax.lax.axis_size(AXIS)
        return objective(terms, num_images, weights, loss_config["reduction"]), terms

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
