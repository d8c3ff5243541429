"""The training and the evaluation step, per device (see `pwcrf_jax.training.parallel`), without jit."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from pwcrf_jax import metrics, objectives, piecewise, segmenter
from pwcrf_jax.likelihood import sample_offsets
from pwcrf_jax.training.parallel import AXIS

OBJECTIVES = ("piecewise", "piecewise_staged", "pseudo_likelihood", "unrolled_mean_field")
OBJECTIVES += ("unrolled_mean_field_staged",)
STAGED = "_staged"  # how the names of objectives end that train the unary first, then what stands on it


@flax.struct.dataclass
class TrainState:
    step: jax.Array  # of the steps that were taken: those that `make_train_step` skips do not count
    params: dict
    opt_state: optax.OptState


def piecewise_terms(
    potentials, labels, balance_power=0.0, chunk_edges=None, sampled_offsets=0, key=None, pairwise_balance_power=-1.0
):
    """(sum, count) of the log-likelihood of every kind of factor: {"unary": ..., relation name: ...}.

    And of "refinement_convs", of models that have them: of the unary's own marginals, sharpened, at the cells of the
    finer grid. No inference runs for them either.

    labels: int [B, H, W] of the image; read at the centres of the grid's cells.
    balance_power: of `pwcrf_jax.piecewise.balance_weights`, 0 for none; pairwise_balance_power: that of the relations,
      -1: the same.
    sampled_offsets: of each relation, drawn with `key`; 0, or as many as there are: all.
    """
    grid = piecewise.grid_labels(labels, *potentials.unary.shape[1:3])
    balance = lambda grid, power: piecewise.balance_weights(grid, num_classes, power=power) if power else None
    num_classes = potentials.unary.shape[-1]
    weights = balance(grid, balance_power)
    terms = {"unary": piecewise.unary_log_likelihood(potentials.unary, grid, node_weights=weights)}
    if pairwise_balance_power >= 0:
        weights = balance(grid, pairwise_balance_power)
    for i, (name, potential) in enumerate(potentials.pairwise.items()):
        sample = None
        if 0 < sampled_offsets < len(potential.offsets):
            sample = sample_offsets(jax.random.fold_in(key, i), len(potential.offsets), sampled_offsets)
        terms[name] = piecewise.pairwise_log_likelihood(
            potential, grid, node_weights=weights, chunk_edges=chunk_edges, sample=sample
        )
    if potentials.correction is not None:
        log_marginals = jax.lax.stop_gradient(jax.nn.log_softmax(potentials.unary, axis=-1))
        scores = segmenter.sharpen(log_marginals, potentials.correction)
        fine = piecewise.grid_labels(labels, *scores.shape[1:3])
        weights = balance(fine, balance_power)
        terms["refinement_convs"] = piecewise.unary_log_likelihood(scores, fine, node_weights=weights)
    return terms


def joint_term(potentials, labels, name, crf, balance_power=0.0, inside=None):
    """(sum, count) of one of the objectives of `pwcrf_jax.objectives`, with the settings that inference would have.

    name: "pseudo_likelihood" or "unrolled_mean_field". crf: `mean_field.Settings`, as in `make_eval_step`. Others as in
      `piecewise_terms`.
    inside: int [B, 4], top, left, bottom and right of the image in its crop: cells beyond it are padding; None: all is
      image.
    """
    unary = potentials.unary
    grid = piecewise.grid_labels(labels, *unary.shape[1:3])
    chosen = {name: potentials.pairwise[name] for name in crf.weights}
    node_weights = piecewise.balance_weights(grid, unary.shape[-1], power=balance_power) if balance_power else None
    if name == "pseudo_likelihood":
        return objectives.pseudo_log_likelihood(unary, chosen, grid, crf, node_weights=node_weights)
    mask = None if inside is None else _cells_inside(inside, unary.shape[1:3], labels.shape[1:3])
    return objectives.unrolled_log_likelihood(unary, chosen, grid, crf, node_mask=mask, node_weights=node_weights)


def _cells_inside(inside, grid, size):
    """bool [B, h, w]: cells whose centre lies in the box inside [B, 4] of a crop of a size."""
    axes = []
    for axis in (0, 1):
        centres = (jnp.arange(grid[axis]) + 0.5) * (size[axis] / grid[axis])
        axes.append((centres >= inside[:, axis, None]) & (centres < inside[:, 2 + axis, None]))
    return axes[0][:, :, None] & axes[1][:, None, :]


def objective(terms, num_images, weights, reduction="mean"):
    """Negative log-likelihood of one device's terms, counts already summed over the devices.

    weights: {term: weight}; terms that it does not name are there to be watched.
    mean: each kind of factor by its own count. sum: all factors, by the number of images. The sum over devices of
    this is the loss, and so the sum of its gradients is the gradient.
    """
    loss = 0.0
    for name, weight in weights.items():
        total, count = terms[name]
        loss -= weight * total / (jnp.maximum(count, 1.0) if reduction == "mean" else num_images)
    return loss


KINDS = ("unary", "pairwise")  # of factors; with the second go the refinement convolutions


def make_train_step(model, tx, loss_config, seed=0, crf=None, kinds=KINDS):
    """Builds step(state, batch) -> (state, metrics).

    seed: of the sampled offsets, which follow from it and from the number of the step alone.
    crf: of `make_eval_step`, for the objectives that contain inference.
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


def make_potentials_step(model, names):
    """Builds step(params, {"image": uint8 [B, H, W, 3]}) -> ((), (unary [B, h, w, K], {relation: (p, q)}, correction)).

    p, q: hidden_p and hidden_q [B, h, w, M] of the potentials of the named relations. correction: of
    `pwcrf_jax.segmenter.Potentials`.
    """

    def step(params, batch):
        unary, potentials, correction = model.apply({"params": params}, batch["image"])
        return (), (unary, {name: (potentials[name].hidden_p, potentials[name].hidden_q) for name in names}, correction)

    return step


BAND_WIDTHS = (3, 5)  # pixels on either side of the boundaries that boundary IoU looks at


def confusions(predictions, labels, valid, num_classes):
    """int32 [1 + bands, K, K]: confusion matrices over the image and over the bands along its boundaries."""
    bands = [jnp.where(metrics.boundary_band(labels, w, valid), labels, piecewise.VOID) for w in BAND_WIDTHS]
    return jnp.stack([metrics.confusion_matrix(predictions, x, num_classes) for x in (labels, *bands)])


def make_eval_step(
    model,
    rows,
    crf,
    balance_power=0.0,
    loss_chunk_edges=None,
    marginals_of=None,
    labels_of=(),
    pairwise_balance_power=-1.0,
):
    """Builds step(params, batch) -> sums over all devices.

    rows: {row of the table: names of the relations whose messages count}.
    crf: `mean_field.Settings`, with the weights of all of these by name.
    batch: image, label as in training and valid_size int32 [B, 2].
    A model with refinement convolutions has one row more, "convs": what "all" says, sharpened.
    Returns {"confusion": {row: int32 [1 + bands, K, K], see `confusions`}, "terms": {kind of factor: (sum, count)},
    "change": {row: float32 [num_iterations], the largest change of a marginal in each iteration}}.
    marginals_of: a row; the step then returns (sums, that row's log marginals float32 [B, h, w, K], of "convs" on the
      finer grid and not normalised).
    labels_of: rows; the step then returns (sums, {row: predicted labels uint8 [B, H, W]}). One of both.
    """

    def step(params, batch):
        potentials = model.apply({"params": params}, batch["image"])
        size = batch["label"].shape[1:3]
        mask = segmenter.grid_mask(batch["valid_size"], potentials.unary.shape[1:3], size)
        valid = segmenter.grid_mask(batch["valid_size"], size, size)
        confusion, change, kept, shown = {}, {}, None, {}
        for row, names in rows.items():
            settings = dataclasses.replace(crf, weights={name: crf.weights[name] for name in names})
            log_marginals, info = segmenter.infer(potentials, settings, node_mask=mask)
            labels = jnp.argmax(segmenter.upsample(log_marginals, *size, mask), axis=-1)
            confusion[row] = confusions(labels, batch["label"], valid, model.num_classes)
            shown[row] = labels
            change[row] = jax.lax.pmax(jnp.max(info.change, axis=-1), AXIS)
            kept = log_marginals if row == marginals_of else kept
            if row == "all" and potentials.correction is not None:
                sharp = segmenter.sharpen(log_marginals, potentials.correction, mask)
                fine = segmenter.grid_mask(batch["valid_size"], sharp.shape[1:3], size)
                labels = jnp.argmax(segmenter.upsample(sharp, *size, fine), axis=-1)
                confusion["convs"] = confusions(labels, batch["label"], valid, model.num_classes)
                shown["convs"] = labels
                kept = sharp if marginals_of == "convs" else kept
        terms = piecewise_terms(
            potentials,
            batch["label"],
            balance_power,
            loss_chunk_edges,
            pairwise_balance_power=pairwise_balance_power,
        )
        confusion, terms = jax.lax.psum((confusion, terms), AXIS)
        sums = {"confusion": confusion, "terms": terms, "change": change}
        if labels_of:
            return sums, {row: shown[row].astype(jnp.uint8) for row in labels_of}
        return sums if marginals_of is None else (sums, kept)

    return step
