"""The training loop: start or go on, train, evaluate, keep the best."""

import contextlib
import json
import math
import os
import time
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from pwcrf_jax import config as configs
from pwcrf_jax.config import agreement
from pwcrf_jax.data import train_batches
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.model.plan import Plan, plan
from pwcrf_jax.model.segmenter import Segmenter
from pwcrf_jax.prediction import restore
from pwcrf_jax.report import pictures
from pwcrf_jax.runtime import checkpoint, compilation, distributed, files, functions, lock, parallel, preemption
from pwcrf_jax.runtime.logs import Progress, Writer, how_to_see_curves, log
from pwcrf_jax.training import checks, initial, steps
from pwcrf_jax.training.averaging import Averaging
from pwcrf_jax.training.guard import Guard
from pwcrf_jax.training.optimizer import make_optimizer
from pwcrf_jax.training.patience import Patience


def train_and_evaluate(config: ConfigDict, workdir: str) -> dict[str, Any]:
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
    config = checks.settle_data(config, workdir)
    dataset = checks.load_and_validate(config, workdir)
    files.make_folder(workdir)
    with lock.held(workdir):
        if jax.process_index() == 0:
            files.delete_unfinished(workdir)
        config, params = initial.resolve_init(config, workdir)
        store = lambda name, keep, score="": checkpoint.Store(
            os.path.join(workdir, name), configs.identity(config), keep, dataset.class_names, score
        )
        with store("checkpoints", config.train.keep_checkpoints) as latest, store("best", 1, restore.BEST) as best:
            run = Run(config, workdir, dataset, latest, best)
            run.start(params)
            return run.train()


class Run:
    """A training run: `start` gives it a state, `train` takes it to the last step.

    Attributes:
      state: `steps.TrainState`; its own step does not count those that were skipped.
      step, samples_seen: int, how far it has come.
      best_score: float, of the best evaluation; None: of none.
      result: dict, of the last evaluation since `start`.
    """

    state: steps.TrainState
    step: int
    samples_seen: int
    best_score: float | None
    result: dict[str, Any]

    def __init__(
        self, config: ConfigDict, workdir: str, dataset: Any, latest: checkpoint.Store, best: checkpoint.Store
    ):
        """config: settled, see `initial.resolve_init`. latest, best: of states, and of the best one's parameters."""
        self.config, self.workdir, self.dataset, self.latest, self.best = config, workdir, dataset, latest, best
        self.model = configs.build_model(config)
        self.unary_steps = configs.unary_steps(config)
        self.tx = make_optimizer(config.optimizer, config.model, config.train.steps, self.unary_steps)
        self.averaging = Averaging(config.optimizer.ema_decay)
        self.patience = Patience(config.train.patience, self.unary_steps or 0)
        self.result = {}
        self._progress: Progress | None = None
        self._about = {"config": json.loads(json.dumps(config.to_dict())), "unary_steps": self.unary_steps}
        self._about |= {"averaged": bool(self.averaging.decay)}

    def start(self, params: Any) -> None:
        """Takes the state to begin with or to go on from; params: to begin with, of `initial.resolve_init`.

        The order matters. Batches and sampled offsets have no state: they follow from samples_seen, step and seed.
        """
        config, best_meta = self.config, None
        # 1. The best model so far, whose score is to be beaten.
        if self.best.latest is not None:
            best_meta = self.best.restore({"params": restore.abstract_params(self.model)})[1]
            self.best.keep_only(best_meta["step"])
        # 2. The newest checkpoint that is whole; only where there is none, params.
        if self.latest.latest is None:
            checks.check_new(self.workdir, self.latest, self.best)
            meta = {"step": 0, "samples_seen": 0}
            self.state = steps.TrainState.create(params, self.tx, self.averaging)
        else:
            checks.check_stages(config, self.latest.meta())
            checks.check_averaged(config, self.latest.meta())
            start = lambda: restore.init_params(self.model, config.seed)
            fresh = lambda: steps.TrainState.create(start(), self.tx, self.averaging)
            trees, meta = self.latest.restore(jax.eval_shape(fresh).trees())
            self.state = steps.TrainState.from_trees(trees)
            unread = "; config.init_from is not read again" if config.init_from else ""
            where = self.latest.folder
            log.info("resumed from step %d of %s%s%s", meta["step"], where, unread, _other_versions(meta))
        # 3. All processes have found the same.
        distributed.agree(lambda: _facts(config, self.dataset, self.state, meta, best_meta))
        self.step, self.samples_seen = meta["step"], meta["samples_seen"]
        self.best_score = best_meta[restore.BEST] if best_meta else None
        self.patience.restore(meta)
        # 4. The state to go on from may be the best, if the run stopped before that was saved.
        self._save_best(meta.get("score"))
        # 5. It may have stopped in the evaluation of that step, which `train` then begins with.
        self._evaluate_first = self.step > 0 and "score" not in meta and self._evaluates()

    def train(self) -> dict[str, Any]:
        """Trains to the last step; `train_and_evaluate` says what it returns and raises."""
        c = self.config.train
        if self.step >= c.steps and not self._evaluate_first:
            log.info("already trained for %d steps; raise config.train.steps to go on", self.step)
            return {}
        if self.patience.is_over and not self._evaluate_first:
            log.info("ended at step %d: %s; raise it to go on", self.step, self.patience.why())
            return {}
        with contextlib.ExitStack() as stack:
            batches, started = self._prepare(stack), time.monotonic()
            stop = self._evaluate_first and not self.evaluate()
            while self.step < c.steps and not stop and not self.patience.is_over:
                metrics = self.train_step(*next(batches))
                if self._progress is None:  # the first step compiles: it would spoil the rate
                    jax.block_until_ready(metrics)
                    preemption.begin()
                    log.info("first step after %.1f s", time.monotonic() - started)
                    compilation.seal()  # also for a run that is killed before its first save
                    relations = [name for name, _ in self.model.relations]
                    self._progress = Progress(self.step, c.steps, c.batch_size, relations)
                    stack.callback(self._progress.close)
                if self._every(c.log_every):
                    self._report(metrics, self._progress)
                stop = preemption.requested()
                if self._evaluates() or self.step % c.checkpoint_every == 0 or stop:
                    self.save()
                if self._evaluates() and not stop:
                    stop = not self.evaluate()
        if stop:
            log.info("stopped by SIGTERM; step %d is saved, the same command goes on from there", self.step)
            raise preemption.Preempted
        best = self.best_score
        found = f"mean IoU {100 * best:.1f}" if best is not None else "mean IoU: none, and no best checkpoint"
        split, seconds = self.config.data.eval_split, time.monotonic() - started
        if self.patience.is_over and self.step < c.steps:
            log.info("step %d is the last: %s", self.step, self.patience.why())
        log.info("trained %d steps in %.0f s; best %s %s", self.step, seconds, split, found)
        return self.result

    def _prepare(self, stack: contextlib.ExitStack) -> Any:
        """Makes what training needs beside the state; the stack closes it. Returns the batches, from this step on."""
        config, c = self.config, self.config.train
        if jax.process_index() == 0:
            configs.save(config, os.path.join(self.workdir, configs.CONFIG))
            configs.save_classes(self.dataset.class_names, self.dataset.palette, self.workdir)
        batches = batches_from(config, self.dataset, self.samples_seen // c.batch_size)
        self._guard = Guard(c.max_skipped_steps, self.step - int(self.state.step))
        # A program a stage: in the branch of one for all, XLA's CPU convolutions are several times slower.
        step_of = lambda trained: parallel.pmap_train(steps.from_config(config, self.model, self.tx, trained))
        self._steps = list(map(step_of, configs.objective(config).stages))
        self._eval_fn = evaluate.make_eval_fn(config, self.model)
        self.state = parallel.replicated(self.state)
        first = jax.process_index() == 0
        hook = functions.load(c.hook, "train.hook") if c.hook and first else None
        self._writer = Writer(self.workdir, self.step, not self._evaluate_first, hook) if first else None
        if self._writer:
            stack.callback(self._writer.close)
            log.info("%s", how_to_see_curves(self.workdir))
        stack.callback(self.latest.wait)
        stack.callback(batches.close)
        stack.callback((on_devices := parallel.ahead(batches)).close)
        num_params = sum(x.size for x in jax.tree.leaves(self.state.params))
        log.info(
            "%s: %d training images, %s; %s parameters; %d devices of kind %s",
            self.dataset.name, len(self.dataset.source(config.data.train_split)), f"batches of {c.batch_size}",
            f"{num_params:,}", jax.device_count(), jax.devices()[0].device_kind,
        )  # fmt: skip
        log.info("%s", estimate_cost(config, self.model, self.tx).summary())
        return on_devices

    def train_step(self, arrays: dict[str, jax.Array], ids: Any) -> dict[str, jax.Array]:
        """One step on this process' share of a batch, of `parallel.ahead`; returns its metrics."""
        self.state, metrics = self._steps[self._stage()](self.state, arrays)
        self.step, self.samples_seen = self.step + 1, self.samples_seen + self.config.train.batch_size
        self._guard.add(self.step, ids, metrics)
        self.latest.check()
        return metrics

    def _stage(self) -> int:
        """Which stage comes depends on the steps that were taken; skipped ones do not count."""
        if self.unary_steps is None:
            return 0
        if self.step - self._guard.skipped == self.unary_steps:
            self._guard.flush()  # was the last one taken?
        return int(self.step - self._guard.skipped >= self.unary_steps)

    def _report(self, metrics: dict[str, jax.Array], progress: Progress) -> None:
        self._guard.flush()
        values, skipped = _finite_values(metrics), self._guard.skipped
        values |= {"skipped_steps": skipped} if skipped else {}
        rate = progress.report(self.step, values)
        if self._writer:
            self._writer.write(self.step, values | ({"images_per_second": rate} if rate else {}), "train")

    def save(self) -> None:
        """Saves the state of this step."""
        self._guard.flush()  # what is saved is finite
        if self._writer:
            self._writer.sync()
        about = self._about | {"samples_seen": self.samples_seen} | self.patience.meta()
        self.latest.save(self.step, self.state.trees(), about)
        compilation.seal()

    def evaluate(self) -> bool:
        """Evaluates this step, whose state is saved; False where the run was asked to stop meanwhile."""
        config, dataset, writer = self.config, self.dataset, self._writer
        self.latest.wait()
        split, batch_size, panel = config.data.eval_split, config.eval.batch_size, None
        if config.eval.panel:
            indices = pictures.chosen(len(dataset.source(split)), batch_size, config.eval.panel)
            rows = configs.shown_rows(config)
            panel = pictures.Panel(indices if writer else (), batch_size, rows, dataset.palette)

        def interruptible(*args):
            if preemption.requested():
                raise preemption.Preempted
            return self._eval_fn(*args)

        try:
            with preemption.nothing_to_save():
                more = [panel] if panel else []
                result = evaluate.evaluate_params(interruptible, self.state.evaluated, dataset, split, config, more)
        except preemption.Preempted:
            return False
        self.result = result
        log.info("step %d, %s\n%s", self.step, result["split"], evaluate.table(result))
        if writer:
            numbers = evaluate.summary(result)
            writer.write(self.step, {k: v for k, v in numbers.items() if isinstance(v, float)}, "val")
            if panel:
                writer.picture(self.step, f"val/image_truth_{'_'.join(panel.rows)}", panel.picture())
            writer.sync()
        score = result["rows"][configs.final_row(config)]["miou"]
        self._save_best(score)
        self.patience.add(self.step, score)
        self.latest.note(self.step, {"score": score} | self.patience.meta())  # now the evaluation is done
        if self._progress:
            self._progress.restart(self.step)
        return True

    def _save_best(self, score: float | None) -> None:
        # Of a run that fell back to an older state, the step may be there already.
        better = score is not None and (self.best_score is None or score > self.best_score)
        if better and self.step != self.best.latest:
            self.best_score = score
            self.best.save(self.step, {"params": self.state.evaluated}, self._about | {restore.BEST: score})
            self.best.wait()

    def _every(self, interval: int) -> bool:
        """Whether something is due at this step: at every `interval`-th (0: none), and at the last."""
        return self.step == self.config.train.steps or bool(interval) and self.step % interval == 0

    def _evaluates(self) -> bool:
        return self._every(self.config.train.eval_every)


def _facts(
    config: ConfigDict, dataset: Any, state: steps.TrainState, meta: dict[str, Any], best_meta: dict[str, Any] | None
) -> dict[str, Any]:
    """Facts that processes which were started alike may still have found otherwise."""
    at = {"the step to go on from": meta["step"], "its samples": meta["samples_seen"], "its score": meta.get("score")}
    at |= {f"the best model's {key}": best_meta and best_meta[key] for key in ("step", restore.BEST)}
    at["config.model.input_scaling"] = config.model.input_scaling
    return at | agreement.of_data(dataset) | agreement.of_arrays(state.trees())


def _other_versions(meta: dict[str, Any]) -> str:
    now = checkpoint.versions()
    others = [f"{name} {x}, now {now[name]}" for name, x in meta.get("versions", now).items() if x != now.get(name)]
    return f"; saved with {', '.join(others)}" if others else ""


def batches_from(config: ConfigDict, dataset: Any, step: int) -> Any:
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
        jitter=config.data.jitter,
        augment_by=config.data.augment,
        scores=configs.given_scores(config, config.data.crop_size),
    )


def _finite_values(metrics: dict[str, Any]) -> dict[str, float]:
    values = {k: float(v) for k, v in metrics.items() if k not in ("skipped", "finite")}
    absent = lambda k, v: not math.isfinite(v) or k.startswith("nll_") and v == -1  # -1: no such factor
    return {k: v for k, v in values.items() if not absent(k, v)}


def estimate_cost(config: ConfigDict, model: Segmenter, tx: optax.GradientTransformation) -> Plan:
    """Multiply-adds and memory of a device, inference at the size and batch of training."""
    loss = configs.loss_settings(config)
    # Averaged parameters are as large as the parameters.
    averaged = optax.GradientTransformation(lambda params: (tx.init(params), params), tx.update)
    return plan(
        model,
        config.data.crop_size,
        config.train.batch_size // jax.device_count() // config.train.accumulate,
        inference=configs.crf_settings(config),
        num_sampled_offsets=loss.sampled_offsets,
        chunk_edges=loss.chunk_edges,
        optimizer=averaged if config.optimizer.ema_decay else tx,
    )
