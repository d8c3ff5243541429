"""The training loop: prepare, restore or start, train, evaluate, keep the best."""

import contextlib
import json
import math
import operator
import os
import time

import jax
import jax.numpy as jnp

from pwcrf_jax import config as configs
from pwcrf_jax.config import agreement
from pwcrf_jax.data import check_sizes, load_dataset, train_batches
from pwcrf_jax.data.prepare import builder_class
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.model import losses
from pwcrf_jax.model.plan import plan
from pwcrf_jax.nets import WeightsError, load_pretrained
from pwcrf_jax.prediction import restore
from pwcrf_jax.report import pictures
from pwcrf_jax.runtime import checkpoint, compilation, distributed, files, lock, parallel, preemption
from pwcrf_jax.runtime.logs import METRICS, Progress, Writer, last_step, log
from pwcrf_jax.training import freezing, steps
from pwcrf_jax.training.optimizer import make_optimizer


class NonFiniteError(RuntimeError):
    """Loss, gradient or parameters are NaN or infinite once too often; nothing of that was saved."""


def train_and_evaluate(config, workdir: str) -> dict:
    """Trains the model of a config in a workdir, or goes on where an earlier run in it stopped.

    Everything that can be refused is refused before training: config, data set, classes, weights, checkpoint.
    Writes config.json, classes.json, checkpoints/, best/, metrics.jsonl, tensorboard/.

    Returns:
      The result of the last evaluation (`evaluate.evaluate_params`), or {} if the run was complete already.

    Raises:
      ConfigError, DataError, WeightsError, CheckpointError: what is refused; the last also for a save that failed.
      NonFiniteError: more than config.train.max_skipped_steps steps had no finite loss or gradient.
      preemption.Preempted: the run was asked to stop, and is saved.
    """
    dataset = checked_dataset(config, workdir)
    files.make_folder(workdir)
    with lock.held(workdir):
        if jax.process_index() == 0:
            files.delete_unfinished(workdir)
        return _run(config, workdir, dataset)


def _run(config, workdir, dataset):
    """`train_and_evaluate` in a workdir that nobody else trains in."""
    config, fresh_params = resolve(config, workdir)
    store = lambda name, keep, score="": checkpoint.Store(
        os.path.join(workdir, name), configs.identity(config), keep, dataset.class_names, score
    )
    with store("checkpoints", config.train.keep_checkpoints) as latest, store("best", 1, restore.BEST) as best:
        model = configs.build_model(config)
        tx = make_optimizer(config.optimizer, config.model, config.train.steps, configs.unary_steps(config))
        best_meta = None
        if best.latest is not None:
            best_meta = best.restore({"params": restore.abstract_params(model)})[1]
            best.keep_only(best_meta["step"])
        if latest.latest is None:
            _check_new(workdir, latest, best)
            state, meta = _fresh(model, tx, fresh_params()), {"step": 0, "samples_seen": 0}
        else:
            _check_stages(config, latest.meta())
            abstract = jax.eval_shape(lambda: _fresh(model, tx, restore.init_params(model, config.seed)))
            state, meta = _restore(latest, abstract)
            unread = "; config.init_from is not read again" if config.init_from else ""
            log.info("resumed from step %d of %s%s%s", meta["step"], latest.folder, unread, _other_versions(meta))
        distributed.agree(lambda: _facts(config, dataset, state, meta, best_meta))
        return _train(config, workdir, model, tx, state, meta, dataset, latest, best, best_meta)


def _facts(config, dataset, state, meta, best_meta):
    """What processes that were started alike may still have found otherwise."""
    at = {"the step to go on from": meta["step"], "its samples": meta["samples_seen"], "its score": meta.get("score")}
    at |= {f"the best model's {key}": best_meta and best_meta[key] for key in ("step", restore.BEST)}
    at["config.model.input_scaling"] = config.model.input_scaling
    return at | agreement.of_data(dataset) | agreement.of_arrays(_trees(state))


def checked_dataset(config, workdir=""):
    """The data set of a config; what is wrong with the config or the set is refused here.

    workdir: a run in it goes on, and needs nothing to start from; "": it begins.
    """
    configs.validate(config)
    _check_reached(config)
    if not (workdir and checkpoint.exists(os.path.join(workdir, "checkpoints"))):
        _check_start(config)
    if names := getattr(builder_class(config.data.name), "class_names", ()):
        configs.check_classes(config, names)  # before the set is prepared, which may take hours
    dataset = load_dataset(**configs.dataset_options(config))
    configs.check_classes(config, dataset.class_names)
    for split in (config.data.train_split, config.data.eval_split):
        dataset.check_labelled(split)
    dataset.source(config.data.train_split)  # unknown and empty splits are refused here
    check_sizes(dataset, config.data.eval_split, config.data.eval_size)
    evaluate.check_scored(config, dataset, config.data.eval_split)
    return dataset


def _check_start(config):
    config = config.copy_and_resolve_references()
    config.init_from = path = files.expand_path(config.init_from, "config.init_from")
    if path and not (os.path.isfile(path) or os.path.isdir(path)):
        there = "is neither a file nor a folder" if os.path.exists(path) else "does not exist"
        raise WeightsError(f"config.init_from = {path!r} {there}")
    freezing.check_before_data(config)


def _check_reached(config):
    """All objectives but piecewise ones train what inference uses. A finished model may be decoded with less."""
    name, crf = config.loss.objective, config.crf
    left_out = {
        "relations": set(config.model.relations) - set(configs.crf_relations(config)),
        "weights": 0 in crf.weights,
        "num_iterations": name.startswith("unrolled") and not crf.num_iterations,
    }
    if not name.startswith("piecewise") and any(left_out.values()):
        key = next(key for key, found in left_out.items() if found)
        raise configs.ConfigError(
            f"config.crf.{key} = {crf[key]!r} leaves relations out, which config.loss.objective = {name!r} then does "
            "not train; change it, or take them out of config.model.relations"
        )


def _check_new(workdir, latest, best):
    """A run does not begin over what is left of one whose checkpoints are gone, or over files of another program."""
    told, file = last_step(workdir), os.path.join(workdir, configs.CONFIG)
    # The save of a step is through when the next one begins, whose step may be told by then.
    stored = configs.load_checked(workdir) if os.path.lexists(file) else None  # refuses another program's
    saved = told and stored and told > 2 * stored.train.checkpoint_every
    left = [f"{best.folder} holds a model"] if best.latest is not None else []
    left += [f"{latest.folder} holds {', '.join(latest.damaged)}"] if latest.damaged else []
    left += [f"{os.path.join(workdir, METRICS)} tells of {told} steps"] if saved else []
    others = [] if stored else [os.path.join(workdir, name) for name in (METRICS, configs.CLASSES)]
    left += [f"{path} is there without a {configs.CONFIG}" for path in others if os.path.lexists(path)]
    if left:
        raise checkpoint.CheckpointError(
            f"{left[0]}, but {latest.folder} has no whole checkpoint, so the run cannot go on; put one there, use "
            "another --workdir, or move what is left of the run away"
        )


def _other_versions(meta):
    now = checkpoint.versions()
    others = [f"{name} {x}, now {now[name]}" for name, x in meta.get("versions", now).items() if x != now.get(name)]
    return f"; saved with {', '.join(others)}" if others else ""


def _check_stages(config, meta):
    """A run goes on in the stages it began with: relations that were trained stay on the features they know."""
    before, now = meta.get("unary_steps"), configs.unary_steps(config)
    said = lambda steps: "without stages" if steps is None else f"with {steps} steps of the unary alone"
    if before != now:
        share = "" if before is None else f", and set config.loss.unary_share to {before / config.train.steps:g}"
        raise configs.ConfigError(
            f"this run began {said(before)}, now it would be {said(now)}; keep config.loss.objective{share}"
        )


def resolve(config, workdir):
    """The config with what a run settles once, and a function that makes the parameters of a fresh run.

    Settled are input_scaling, which belongs to the weights a run started from, and the offsets of the relations, which
    belong to the grid that they are trained on: a run that goes on has both in its config.json.
    """
    config = config.copy_and_resolve_references()
    config.init_from = files.expand_path(config.init_from, "config.init_from")
    if checkpoint.exists(os.path.join(workdir, "checkpoints")):
        stored = configs.load_checked(workdir)
        if config.model.input_scaling == "auto":
            config.model.input_scaling = stored.model.input_scaling
        configs.keep_offsets(config, stored)
        return config, None
    configs.keep_offsets(config)
    params, scaling = _fresh_params(config)
    if config.model.input_scaling == "auto":
        config.model.input_scaling = scaling
    return config, lambda: params


def _fresh_params(config):
    """Random parameters with the pretrained weights read into them, and the input scaling of those."""
    model = configs.build_model(config)
    params = jax.jit(lambda: restore.init_params(model, config.seed))()
    if not config.init_from:
        return params, "tf"
    if os.path.isdir(config.init_from):
        start, scaling = _from_run(config.init_from, params, configs.relations(config))
        freezing.check(config, params, jax.tree.map(operator.is_, start, params))
        return start, scaling
    featmap, report = load_pretrained(config.init_from, params["featmap"])
    log.info("%s", report)
    given = config.model.input_scaling
    if given not in ("auto", report.scaling):
        log.info("config.model.input_scaling = %s, but these weights were trained with %s", given, report.scaling)
    params = {**params, "featmap": featmap}
    if "featmap_pairwise" in params:
        params["featmap_pairwise"], _ = load_pretrained(config.init_from, params["featmap_pairwise"])
    return params, report.scaling


def _from_run(folder, params, relations):
    """Parameters of the best checkpoint of another run where names and shapes agree, and its input scaling.

    Features that relations have of their own start from that run's features, where it has none of the kind. It is said
    where a relation has offsets, relations[name], at which its net was not trained there.
    """
    source = configs.load_checked(folder)
    _, trained, step = restore.restore_params(source, folder)
    known = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trained)}
    new = []
    if "featmap_pairwise" in trained and "featmap_pairwise" not in params:
        if any(name.startswith("pairwise_") and name in trained for name in params):
            raise configs.ConfigError(
                f"config.init_from = {folder!r}: the relations of that run stand on features of their own, which this "
                "model does not have; set config.model.pairwise_features to 'own'"
            )

    def take(path, leaf):
        name = jax.tree_util.keystr(path)
        shared = name.replace("['featmap_pairwise']", "['featmap']", 1)
        for source in (name, shared):
            if source in known and known[source].shape == leaf.shape:
                return jnp.array(known[source])  # a copy: the training step takes its buffers, each once
        new.append(jax.tree_util.keystr(path[:2], simple=True, separator="/"))
        return leaf

    params = jax.tree_util.tree_map_with_path(take, params)
    if len(new) == len(jax.tree.leaves(params)):
        raise configs.ConfigError(f"config.init_from = {folder!r}: that run has no parameter of this model")
    log.info("parameters of step %d of %s%s", step, folder, f"; new: {', '.join(dict.fromkeys(new))}" if new else "")
    for name, theirs in configs.relations(source).items():
        others = set(map(tuple, relations.get(name, []))) - set(map(tuple, theirs))
        if others and not any(module.startswith(f"pairwise_{name}/") for module in new):
            log.warning("pairwise_%s was trained at other distances there: %d of its %d offsets here are new to it",
                        name, len(others), len(relations[name]))  # fmt: skip
    return params, source.model.input_scaling


def _fresh(model, tx, params):
    return steps.TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))


def _trees(state):
    return {"params": state.params, "rest": {"step": state.step, "opt_state": state.opt_state}}


def _restore(latest, abstract):
    """(state, meta) of the newest checkpoint that is whole; abstract: the state's shapes."""
    trees, meta = latest.restore(_trees(abstract))
    return steps.TrainState(**trees["rest"], params=trees["params"]), meta


def batches_from(config, dataset, step):
    """This process' share of the training batches, from that of a step (counted from 0) on."""
    return train_batches(
        dataset,
        config.data.train_split,
        batch_size=config.train.batch_size,
        crop_size=config.data.crop_size,
        scale_range=config.data.scale_range,
        flip=config.data.flip,
        seed=config.seed,
        start_step=step,
        host=jax.process_index(),
        hosts=jax.process_count(),
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
    )


def _train(config, workdir, model, tx, state, meta, dataset, latest, best, best_meta):
    c = config.train
    step, samples_seen = meta["step"], meta["samples_seen"]
    best_score = best_meta and best_meta[restore.BEST]
    unary_steps = configs.unary_steps(config)
    about = {"config": json.loads(json.dumps(config.to_dict())), "unary_steps": unary_steps}
    evaluates = lambda step: step == c.steps or bool(c.eval_every) and step % c.eval_every == 0

    def save_best(score):
        nonlocal best_score
        # Of a run that fell back to an older state, the step may be there already.
        if score is not None and (best_score is None or score > best_score) and step != best.latest:
            best_score = score
            best.save(step, {"params": state.params}, about | {restore.BEST: score})
            best.wait()

    save_best(meta.get("score"))  # of the state to go on from, where that was lost
    evaluate_first = step > 0 and "score" not in meta and evaluates(step)  # where it stopped in an evaluation
    if step >= c.steps and not evaluate_first:
        log.info("already trained for %d steps; raise config.train.steps to go on", step)
        return {}
    if jax.process_index() == 0:
        configs.save(config, os.path.join(workdir, configs.CONFIG))
        configs.save_classes(dataset.class_names, dataset.palette, workdir)
    batches = batches_from(config, dataset, samples_seen // c.batch_size)
    crf = configs.crf_settings(config)
    # A program a stage: in the branch of one for both, XLA's CPU convolutions are several times slower.
    step_of = lambda *kinds: parallel.pmap_train(
        steps.make_train_step(model, tx, config.loss.to_dict(), config.seed, crf, kinds)
    )
    both, unary_alone, pairwise_alone = step_of(*losses.KINDS), *map(step_of, losses.KINDS)
    state = parallel.replicated(state)
    eval_fn = evaluate.make_eval_fn(config, model)
    writer = Writer(workdir, step, not evaluate_first) if jax.process_index() == 0 else None
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    log.info(
        "%s: %d training images, %s; %s parameters; %d devices of kind %s",
        dataset.name, len(dataset.source(config.data.train_split)), f"batches of {c.batch_size}",
        f"{num_params:,}", jax.device_count(), jax.devices()[0].device_kind,
    )  # fmt: skip
    log.info("%s", planned(config, model, tx).summary())
    guard = _Guard(c.max_skipped_steps, step - int(state.step))
    started, progress, result, stop = time.monotonic(), None, {}, False

    def train_step(*args):
        """The step of this stage. Which one it is depends on the steps taken; skipped ones do not count."""
        if unary_steps is None:
            return both(*args)
        if step - guard.skipped == unary_steps:
            guard.flush()  # was the last one taken?
        return (unary_alone if step - guard.skipped < unary_steps else pairwise_alone)(*args)

    def interruptible(*args):
        if preemption.requested():
            raise preemption.Preempted
        return eval_fn(*args)

    def evaluation():
        """Of this step, whose state is saved; False where the run was asked to stop meanwhile."""
        nonlocal result
        latest.wait()
        split, batch_size, panel = config.data.eval_split, config.eval.batch_size, None
        if config.eval.panel:
            indices = pictures.chosen(len(dataset.source(split)), batch_size, config.eval.panel)
            rows = configs.shown_rows(config)
            panel = pictures.Panel(indices if writer else (), batch_size, rows, dataset.palette)
        try:
            with preemption.nothing_to_save():
                result = evaluate.evaluate_params(interruptible, state.params, dataset, split, config, panel=panel)
        except preemption.Preempted:
            return False
        log.info("step %d, %s\n%s", step, result["split"], evaluate.table(result))
        if writer:
            numbers = evaluate.summary(result)
            writer.write(step, {k: v for k, v in numbers.items() if isinstance(v, float)}, "val")
            if panel:
                writer.picture(step, f"val/image_truth_{'_'.join(panel.rows)}", panel.picture())
            writer.sync()
        score = result["rows"][configs.final_row(config)]["miou"]
        save_best(score)
        latest.note(step, {"score": score})  # now the evaluation is done
        if progress:
            progress.restart(step)
        return True

    with contextlib.ExitStack() as stack:
        if writer:
            stack.callback(writer.close)
        stack.callback(latest.wait)
        stack.callback(batches.close)
        if evaluate_first:
            stop = not evaluation()
        while step < c.steps and not stop:
            batch = next(batches)
            state, metrics = train_step(state, parallel.split({k: batch[k] for k in ("image", "label", "inside")}))
            step, samples_seen = step + 1, samples_seen + c.batch_size
            guard.add(step, batch["id"], metrics)
            latest.check()
            if progress is None:  # the first step compiles: it would spoil the rate
                jax.block_until_ready(metrics)
                preemption.begin()
                log.info("first step after %.1f s", time.monotonic() - started)
                compilation.seal()  # also for a run that is killed before its first save
                progress = Progress(step, c.steps, c.batch_size)
                stack.callback(progress.close)
            if step % c.log_every == 0 or step == c.steps:
                guard.flush()
                values = _finite_values(metrics) | ({"skipped_steps": guard.skipped} if guard.skipped else {})
                rate = progress.report(step, values)
                if writer:
                    writer.write(step, values | ({"images_per_second": rate} if rate else {}), "train")
            stop = preemption.requested()
            if evaluates(step) or step % c.checkpoint_every == 0 or stop:
                guard.flush()  # what is saved is finite
                if writer:
                    writer.sync()
                latest.save(step, _trees(state), about | {"samples_seen": samples_seen})
                compilation.seal()
            if evaluates(step) and not stop:
                stop = not evaluation()
    if stop:
        log.info("stopped by SIGTERM; step %d is saved, the same command goes on from there", step)
        raise preemption.Preempted
    found = f"mean IoU {100 * best_score:.1f}" if best_score is not None else "mean IoU: none, and no best checkpoint"
    log.info("trained %d steps in %.0f s; best %s %s", step, time.monotonic() - started, config.data.eval_split, found)
    return result


class _Guard:
    """Tells of steps that the device skipped. It looks at each step one step later, so that the device stays busy."""

    def __init__(self, limit, skipped):
        self._limit, self.skipped, self._last = limit, skipped, None

    def add(self, step, ids, metrics):
        self.flush()
        self._last = step, ids, metrics

    def flush(self):
        if self._last is None:
            return
        (step, ids, metrics), self._last = self._last, None
        if metrics["finite"] and not metrics["skipped"]:
            return
        wrong = ", ".join(f"{k} {float(metrics[k])}" for k in ("loss", "grad_norm") if not math.isfinite(metrics[k]))
        images = f"images of that step: {', '.join(map(str, ids))}"
        advice = "The newest checkpoint is of before; try a lower config.optimizer.learning_rate or dtype float32"
        if not metrics["finite"]:
            raise NonFiniteError(f"step {step} led to parameters that are not finite ({images}). {advice}")
        self.skipped += 1
        if self.skipped > self._limit:
            raise NonFiniteError(
                f"step {step}: {wrong} ({images}). It is one more than config.train.max_skipped_steps = {self._limit}. "
                f"{advice}"
            )
        log.warning("step %d is skipped: %s (%s); %d of %d", step, wrong, images, self.skipped, self._limit)


def _finite_values(metrics):
    values = {k: float(v) for k, v in metrics.items() if k not in ("skipped", "finite")}
    absent = lambda k, v: not math.isfinite(v) or k.startswith("nll_") and v == -1  # -1: no such factor
    return {k: v for k, v in values.items() if not absent(k, v)}


def planned(config, model, tx):
    """Multiply-adds and memory of a device, inference at the size and batch of training."""
    crf = configs.crf_settings(config)
    return plan(
        model,
        config.data.crop_size,
        config.train.batch_size // jax.device_count(),
        num_iterations=crf.num_iterations,
        num_sampled_offsets=config.loss.sampled_offsets,
        chunk_edges=config.loss.chunk_edges or None,
        message_chunk_edges=crf.chunk_edges,
        algorithm=crf.algorithm,
        message_relations=tuple(crf.weights),
        optimizer=tx,
    )
