"""The training loop: prepare, restore or start, train, evaluate, keep the best."""

import math
import os
import time

import jax
import jax.numpy as jnp

from pwcrf_jax.data import check_sizes, load_dataset, train_batches
from pwcrf_jax.nets import load_pretrained
from pwcrf_jax.planning import plan
from pwcrf_jax.training import checkpoint, evaluate, parallel, steps
from pwcrf_jax.training import config as configs
from pwcrf_jax.training.logs import Progress, Writer, log
from pwcrf_jax.training.optimizer import make_optimizer


class NonFiniteError(RuntimeError):
    """The loss is NaN or infinite; nothing of that state was saved."""


def train_and_evaluate(config, workdir: str) -> dict:
    """Trains the model of a config in a workdir, or goes on where an earlier run in it stopped.

    Everything that can be refused is refused before training: config, data set, classes, weights, checkpoint.
    Writes config.json, classes.json, checkpoints/, best/, metrics.jsonl, tensorboard/.

    Returns:
      The result of the last evaluation (`evaluate.evaluate_params`), or {} if the run was complete already.
    """
    configs.validate(config)
    dataset = load_dataset(**configs.dataset_options(config))
    configs.check_classes(config, dataset.class_names)
    for split in (config.data.train_split, config.data.eval_split):
        dataset.check_labelled(split)
    dataset.source(config.data.train_split)  # unknown and empty splits are refused here
    check_sizes(dataset, config.data.eval_split, config.data.eval_size)
    config, fresh_params = _resolve(config, workdir)
    identity = configs.identity(config)
    with (
        checkpoint.Store(os.path.join(workdir, "checkpoints"), identity, config.train.keep_checkpoints) as latest,
        checkpoint.Store(os.path.join(workdir, "best"), identity, 1) as best,
    ):
        model = configs.build_model(config)
        tx = make_optimizer(config.optimizer, config.model, config.train.steps, configs.unary_steps(config))
        if latest.latest is None:
            if best.latest is not None:
                raise checkpoint.CheckpointError(
                    f"{best.folder} holds a model, but {latest.folder} is empty, so the run cannot go on; "
                    "use another --workdir, or move that folder away"
                )
            state, meta = _fresh(model, tx, fresh_params()), {"samples_seen": 0, "score": None}
        else:
            _check_stages(config, latest.meta())
            abstract = jax.eval_shape(lambda: _fresh(model, tx, evaluate.init_params(model, config.seed)))
            trees, meta = latest.restore(_trees(abstract))
            state = steps.TrainState(**trees["rest"], params=trees["params"])
            unread = "; config.init_from is not read again" if config.init_from else ""
            log.info("resumed from step %d of %s%s", meta["step"], latest.folder, unread)
        return _train(config, workdir, model, tx, state, meta, dataset, latest, best)


def _check_stages(config, meta):
    """A run goes on in the stages it began with: relations that were trained stay on the features they know."""
    before, now = meta.get("unary_steps"), configs.unary_steps(config)
    said = lambda steps: "without stages" if steps is None else f"with {steps} steps of the unary alone"
    if before != now:
        share = "" if before is None else f", and set config.loss.unary_share to {before / config.train.steps:g}"
        raise configs.ConfigError(
            f"this run began {said(before)}, now it would be {said(now)}; keep config.loss.objective{share}"
        )


def _resolve(config, workdir):
    """The config with input_scaling settled, and a function that makes the parameters of a fresh run.

    The scaling belongs to the weights a run started from: a run that goes on has it in its config.json.
    """
    config = config.copy_and_resolve_references()
    os.makedirs(workdir, exist_ok=True)
    if checkpoint.exists(os.path.join(workdir, "checkpoints")):
        if config.model.input_scaling == "auto":
            config.model.input_scaling = configs.load(os.path.join(workdir, "config.json")).model.input_scaling
        return config, None
    params, scaling = _fresh_params(config)
    if config.model.input_scaling == "auto":
        config.model.input_scaling = scaling
    return config, lambda: params


def _fresh_params(config):
    """Random parameters with the pretrained weights read into them, and the input scaling of those."""
    model = configs.build_model(config)
    params = jax.jit(lambda: evaluate.init_params(model, config.seed))()
    if not config.init_from:
        return params, "tf"
    if os.path.isdir(config.init_from):
        return _from_run(config.init_from, params)
    featmap, report = load_pretrained(config.init_from, params["featmap"])
    log.info("%s", report)
    given = config.model.input_scaling
    if given not in ("auto", report.scaling):
        log.info("config.model.input_scaling = %s, but these weights were trained with %s", given, report.scaling)
    return {**params, "featmap": featmap}, report.scaling


def _from_run(folder, params):
    """Parameters of the best checkpoint of another run where names and shapes agree, and its input scaling."""
    source = configs.load(os.path.join(folder, "config.json"))
    _, trained, step = evaluate.restore_params(source, folder)
    known = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trained)}
    new = []

    def take(path, leaf):
        name = jax.tree_util.keystr(path)
        if name in known and known[name].shape == leaf.shape:
            return known[name]
        new.append(jax.tree_util.keystr(path[:2], simple=True, separator="/"))
        return leaf

    params = jax.tree_util.tree_map_with_path(take, params)
    if len(new) == len(jax.tree.leaves(params)):
        raise configs.ConfigError(f"config.init_from = {folder!r}: that run has no parameter of this model")
    log.info("parameters of step %d of %s%s", step, folder, f"; new: {', '.join(dict.fromkeys(new))}" if new else "")
    return params, source.model.input_scaling


def _fresh(model, tx, params):
    return steps.TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))


def _trees(state):
    return {"params": state.params, "rest": {"step": state.step, "opt_state": state.opt_state}}


def _train(config, workdir, model, tx, state, meta, dataset, latest, best):
    c = config.train
    step = int(state.step)
    best_score = best.meta()["miou_all"] if best.latest is not None else None
    if meta["score"] is not None and (best_score is None or meta["score"] > best_score):
        # Stopped between the two saves of an evaluation.
        best_score = meta["score"]
        best.save(step, {"params": state.params}, {"miou_all": best_score})
    if step >= c.steps:
        best.wait()
        log.info("already trained for %d steps; raise config.train.steps to go on", step)
        return {}
    configs.save(config, os.path.join(workdir, "config.json"))
    configs.save_classes(dataset.class_names, dataset.palette, workdir)
    batches = train_batches(
        dataset,
        config.data.train_split,
        batch_size=c.batch_size,
        crop_size=config.data.crop_size,
        scale_range=config.data.scale_range,
        flip=config.data.flip,
        seed=config.seed,
        start_step=meta["samples_seen"] // c.batch_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
        num_threads=config.data.num_threads,
    )
    crf, unary_steps = configs.crf_settings(config), configs.unary_steps(config)
    train_step = steps.make_train_step(model, tx, config.loss.to_dict(), config.seed, crf, unary_steps)
    train_step = parallel.pmap_train(train_step)
    eval_fn = evaluate.make_eval_fn(config, model)
    samples_seen, score, result = meta["samples_seen"], None, {}
    writer = Writer(workdir) if jax.process_index() == 0 else None
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    log.info(
        "%s: %d training images, %s; %s parameters; %d devices of kind %s",
        dataset.name, len(dataset.source(config.data.train_split)), f"batches of {c.batch_size}",
        f"{num_params:,}", jax.device_count(), jax.devices()[0].device_kind,
    )  # fmt: skip
    log.info("%s", _plan(config, model, tx).summary())

    def save():
        about = {"samples_seen": samples_seen, "score": score, "unary_steps": unary_steps}
        latest.save(step, _trees(state), about)

    started, progress = time.monotonic(), None
    try:
        for batch in batches:
            state, metrics = train_step(state, parallel.split({k: batch[k] for k in ("image", "label", "inside")}))
            step, samples_seen = step + 1, samples_seen + c.batch_size
            if progress is None:  # the first step compiles: it would spoil the rate
                jax.block_until_ready(metrics)
                log.info("first step after %.1f s", time.monotonic() - started)
                progress = Progress(step, c.steps, c.batch_size)
            last = step == c.steps
            evaluate_now = last or (c.eval_every and step % c.eval_every == 0)
            save_now = evaluate_now or step % c.checkpoint_every == 0
            if step % c.log_every == 0 or save_now:
                values = {k: float(v) for k, v in metrics.items()}
                values = {k: v for k, v in values.items() if not (k.startswith("nll_") and v == -1)}  # no such factor
                _check_finite(values, step, batch["id"], latest)
                if step % c.log_every == 0 or last:
                    rate = progress.report(step, values)
                    if writer:
                        writer.write(step, values | ({"images_per_second": rate} if rate else {}), "train")
            if evaluate_now:
                result = evaluate.evaluate_params(eval_fn, state.params, dataset, config.data.eval_split, config)
                score = result["rows"]["all"]["miou"] or 0.0
                log.info("step %d, %s\n%s", step, result["split"], evaluate.table(result))
                if writer:
                    numbers = evaluate.summary(result)
                    writer.write(step, {k: v for k, v in numbers.items() if isinstance(v, float)}, "val")
                progress.restart(step)
            if save_now:
                save()
            if score is not None and (best_score is None or score > best_score):
                # After the state that would save it again, were this one lost.
                latest.wait()
                best_score = score
                best.save(step, {"params": state.params}, {"miou_all": score})
            score = None
            if last:
                break
    finally:
        batches.close()
        latest.wait()
        best.wait()
        if progress:
            progress.close()
        if writer:
            writer.close()
    log.info("trained %d steps in %.0f s; best %s mean IoU %.1f", step, time.monotonic() - started,
             config.data.eval_split, 100 * best_score)  # fmt: skip
    return result


def _plan(config, model, tx):
    """Multiply-adds and memory of a device, inference at the size and batch of training."""
    crf = configs.crf_settings(config)
    return plan(
        model,
        config.data.crop_size,
        config.train.batch_size // jax.device_count(),
        num_iterations=crf["num_iterations"],
        num_sampled_offsets=config.loss.sampled_offsets,
        chunk_edges=config.loss.chunk_edges or None,
        message_chunk_edges=crf["chunk_edges"],
        route=crf["route"],
        message_relations=tuple(crf["relation_weights"]),
        optimizer=tx,
    )


def _check_finite(values, step, ids, latest):
    bad = [k for k, v in values.items() if not math.isfinite(v)]
    if bad:
        raise NonFiniteError(
            f"by step {step}: {', '.join(bad)} not finite (images of that step: {', '.join(map(str, ids))}). "
            f"The newest checkpoint, step {latest.latest}, is of before; "
            "try a lower config.optimizer.learning_rate or dtype float32"
        )
