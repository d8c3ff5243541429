"""Search of message weights and refinement parameters on validation images: `pwcrf tune`.

Two stages. First, by mean IoU, the weights of the mean-field messages, relation by relation, and the number of
iterations, all candidates of a pass over the split decoded from the same potentials; or, by likelihood, what
`pwcrf_jax.evaluation.calibration` seeks. Then, by mean IoU, on the log marginals kept from the first stage, the two
kernels of the dense CRF: a coarse grid, then number by number. Every trial is written down at once under
WORKDIR/tuning, so that a search that was stopped goes on where it was; a calibration, when it is through.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import config as configs
from pwcrf_jax import metrics
from pwcrf_jax.evaluation import calibration, evaluate, evaluators, kernel_search
from pwcrf_jax.evaluation import steps as eval_steps
from pwcrf_jax.model import decode
from pwcrf_jax.model.segmenter import potentials_of
from pwcrf_jax.prediction import refinement, restore
from pwcrf_jax.runtime import files, parallel
from pwcrf_jax.runtime.logs import bar, log

METHODS = ("miou", *calibration.METHODS)
"""Of the first stage: a grid of weights and iterations by mean IoU, or calibration by likelihood."""

WEIGHT_FACTORS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
ITERATIONS = (1, 2, 3, 5, 10, 20)


def tune(
    config, workdir: str, which: str, split: str, mode: str, max_trials: int, row: str = "", *, method: str = "miou"
) -> dict:
    """Searches, and writes the best values to WORKDIR/tuned.json, which `pwcrf eval` reads.

    split: of the data set, "" for config.data.eval_split; a test split is refused.
    mode: "full", or "spatial" to search the smoothness kernel alone.
    max_trials: of the second stage, kernels tried more than once counted once; the first makes one pass over the split,
      one more for each relation, one for the number of iterations and, where another one is better, a last one for the
      weights.
    row: of the table, whose marginals the second stage refines, "all" or "convs"; "" for the model's last one, which is
      what `pwcrf eval` refines: for another one nothing is written.
    method: of the first stage, one of `METHODS`.

    Returns:
      What was written: {"config": {dotted key: value}, "conditions": {dotted key: value} under which they were chosen,
      "split", "classes" (scored), "step", "mode", "method", "miou_before", "miou_messages", "miou_after"}, the last
      three as the config has it, with what the first stage chose, and refined with the best parameters. Of calibration
      also the figures of `calibration.Calibration`.
    """
    split = split or config.data.eval_split
    for part in split.split("+"):
        words = re.split(r"[^a-z]+", part.split("[")[0].lower())
        if any(word.startswith("test") for word in words):
            raise configs.ConfigError(
                f"--split={split}: parameters are never chosen on a test split; name a validation split, or a part of "
                "the training images that was held out"
            )
    if jax.process_count() > 1:
        raise configs.ConfigError("tuning runs in one process; start it on one host alone")
    model, params, step, dataset = restore.load(config, workdir, which, split)
    evaluate.check_scored(config, dataset, split)
    folder = _folder(config, workdir, params, dataset, split, step)
    files.make_folder(folder, inside="" if files.is_url(workdir) else workdir)
    log.info("tuning on %s (%d images), checkpoint of step %d, notes in %s", split, len(dataset.source(split)), step,
             folder)  # fmt: skip
    first = _by_miou if method == "miou" else functools.partial(_by_likelihood, method=method)
    chosen, figures = first(config, model, params, dataset, split, folder)
    decoding = config.copy_and_resolve_references()
    configs.apply_values(decoding, chosen)
    row = row or configs.final_row(config)
    marginals = _marginals(decoding, model, params, dataset, split, folder=folder, row=row)
    notes = os.path.dirname(marginals[0])  # trials of these marginals, not of others
    settings, after = tune_kernels(config, dataset, split, notes, marginals, mode, max_trials)
    result = dict(
        config=chosen | {f"refine.{name}": getattr(settings.params, name) for name in kernel_search.searched(mode)},
        conditions=configs.tuning_conditions(decoding),
        split=split,
        classes=list(config.eval.classes),
        step=step,
        mode=mode,
        method=method,
        miou_after=after,
        **figures,
    )
    log.info("mean IoU on %s: %.2f as configured, %.2f with the best messages, %.2f refined", split,
             100 * result["miou_before"], 100 * result["miou_messages"], 100 * after)  # fmt: skip
    if row == configs.final_row(config):
        configs.write_tuned(result, workdir)
        log.info("wrote %s", os.path.join(workdir, configs.TUNED))
    return result


def _by_miou(config, model, params, dataset, split, folder):
    """(values that the search of weights and iterations chose, {"miou_before", "miou_messages"})."""
    best, before, messages = _tune_messages(config, model, params, dataset, split, folder)
    *weights, iterations = best
    chosen = {"crf.weights": weights, "crf.num_iterations": iterations} if weights and iterations else {}
    given = {"crf.unary_temperature": config.crf.unary_temperature, "crf.label_weights": config.crf.label_weights}
    chosen |= {key: value for key, value in given.items() if value not in (1.0, ())}  # the weights belong to them
    return chosen, dict(miou_before=before, miou_messages=messages)


def _by_likelihood(config, model, params, dataset, split, folder, method):
    """(values that calibration chose, its figures with "miou_before" and "miou_messages")."""
    path = os.path.join(folder, f"{method}.json")
    try:
        chosen, figures = files.read_json(path, "delete it, tune again", lambda found: (dict(found[0]), dict(found[1])))
    except FileNotFoundError:
        found = calibration.calibrate(config, model, params, dataset, split, method)
        chosen = found.config | {"crf.num_iterations": config.crf.num_iterations}
        calibrated = config.copy_and_resolve_references()
        configs.apply_values(calibrated, chosen)
        every = [configs.crf_settings(c) for c in (config, calibrated)]
        before, after = _score(_count_decoded(model, every), config, params, dataset, split, "mean IoU")
        nll = {name: value for name, value in found._asdict().items() if name != "config"}
        figures = nll | dict(miou_before=before, miou_messages=after)
        files.write_json(path, [chosen, figures])
    said = ", ".join(f"{key} = {value}" for key, value in chosen.items() if key != "crf.label_weights")
    log.info("NLL on %s: %.4f of the unary alone, %.4f as configured, %.4f with %s", split, figures["nll_unary"],
             figures["nll_before"], figures["nll_after"], said)  # fmt: skip
    return chosen, figures


def _folder(config, workdir, params, dataset, split, step):
    """One folder for each question: other data, parameters or inference settings start another search.

    For a workdir in a bucket it is one of the user's cache: its files are many, and written one by one.
    """
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        weights.update(np.asarray(leaf).tobytes())
    about = dict(
        identity=configs.identity(config),
        parameters=weights.hexdigest(),
        dtype=config.model.dtype,
        crf=config.crf.to_dict(),
        refine=config.refine.to_dict(),
        eval_size=config.data.eval_size,
        classes=config.eval.classes,
        data=os.path.basename(dataset.folder.rstrip("/")) + os.path.basename(os.path.dirname(dataset.folder)),
        split=split,
        step=step,
    )
    if given := configs.score_files(config):
        times = {name: file.stat().st_mtime_ns for name, file in given.found.items()}
        about |= {"scores": [config.data.scores.to_dict(), times]}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    home = files.cache_folder("tuning") if files.is_url(workdir) else os.path.join(workdir, "tuning")
    return os.path.join(home, digest)


def _tune_messages(config, model, params, dataset, split, folder):
    """(best weights and number of iterations, mean IoU as configured, mean IoU of the best)."""
    given = configs.relation_weights(config)
    relations = tuple(given)
    names = (*relations, "num_iterations")
    configured = best = (*given.values(), config.crf.num_iterations)
    trials = kernel_search.Trials(os.path.join(folder, "messages.jsonl"), names)

    def score(candidates, what):
        missing = [c for c in dict.fromkeys(candidates) if c not in trials.scores]
        if missing:
            scores = _score_messages(config, model, params, dataset, split, missing, what)
            for values, miou in zip(missing, scores, strict=True):
                trials.add(values, miou)
        return max(candidates, key=lambda c: trials.scores[c])  # the first of equals, so that ties change nothing

    def together(factors):
        return score([best, *((*(f * w for w in best[:-1]), best[-1]) for f in factors)], "all weights")

    searched = relations if configured[-1] else ()  # without iterations no message is sent
    best = together(WEIGHT_FACTORS if searched else ())
    for i, name in enumerate(searched if len(searched) > 1 else ()):
        scale = best[i] or configured[i]
        best = score([best, *(best[:i] + (f * scale,) + best[i + 1 :] for f in WEIGHT_FACTORS)], f"weight of {name}")
    if searched:
        before, best = best, score([best, *(best[:-1] + (n,) for n in ITERATIONS)], "number of iterations")
        best = best if best == before else together((0.5, 2.0))  # many iterations take their time
    if searched:
        log.info("messages with weights and number of iterations %s: mean IoU %.2f (as configured, %s: %.2f)",
                 kernel_search.named(names, best), 100 * trials.scores[best], kernel_search.named(names, configured),
                 100 * trials.scores[configured])  # fmt: skip
    return best, trials.scores[configured], trials.scores[best]


def _score_messages(config, model, params, dataset, split, candidates, what):
    """Mean IoU of each candidate, weights and number of iterations, in one pass over the split."""
    groups = {n: [c[:-1] for c in candidates if c[-1] == n] for *_, n in candidates}
    scores = _score(_count_messages(config, model, groups), config, params, dataset, split, what)
    order = [(*weights, n) for n, group in groups.items() for weights in group]
    found = dict(zip(order, scores, strict=True))
    return [found[c] for c in candidates]


def _score(step, config, params, dataset, split, what):
    """Mean IoU of each of the confusion matrices that step(params, batch) gives, in one pass over the split."""
    fn, total = parallel.pmap_eval(step), 0
    for batch in bar(evaluate.batches_of(config, dataset, split), what):
        total = total + np.asarray(fn(params, evaluate.inputs_of(batch)), np.int64)
    return [mean_iou(x, config, dataset, split) for x in total]


def _count_decoded(model, every):
    """Builds step(params, batch) -> int32 [settings, K, K], of each of some settings of mean field."""

    def step(params, batch):
        potentials = potentials_of(model, params, batch)._replace(refinement_logits=None)
        size = batch["label"].shape[1:3]
        decoded = [decode.decode(potentials, batch["valid_box"], size, settings) for settings in every]
        labels = [decode.frame_labels(x, size) for x in decoded]
        counts = [metrics.confusion_matrix(x, batch["label"], model.num_classes) for x in labels]
        return jax.lax.psum(jnp.stack(counts), parallel.AXIS)

    return step


def _count_messages(config, model, groups):
    """Builds step(params, batch) -> int32 [candidates, K, K]; groups: {number of iterations: [weights, ...]}."""
    names = configs.crf_relations(config)

    def step(params, batch):
        potentials = potentials_of(model, params, batch)._replace(refinement_logits=None)
        size = batch["label"].shape[1:3]

        def count(weights, num_iterations):
            settings = _with_messages(config, (*weights, num_iterations))
            decoded = decode.decode(potentials, batch["valid_box"], size, settings)
            return metrics.confusion_matrix(decode.frame_labels(decoded, size), batch["label"], model.num_classes)

        counts = []
        for num_iterations, group in groups.items():
            weights = jnp.asarray(group, jnp.float32).reshape(len(group), len(names))
            counts.append(jax.lax.map(functools.partial(count, num_iterations=num_iterations), weights))
        return jax.lax.psum(jnp.concatenate(counts), parallel.AXIS)

    return step


def _with_messages(config, values):
    """Settings of inference with other message weights, one a relation, and the number of iterations after them."""
    *weights, num_iterations = values
    weights = configs.message_weights(config, dict(zip(configs.crf_relations(config), weights, strict=True)))
    return dataclasses.replace(configs.crf_settings(config), weights=weights, num_iterations=num_iterations)


def _marginals(config, model, params, dataset, split, *, folder, row):
    """File names of the log marginals of a row of the config, of every image, in the folder or computed into it."""
    question = json.dumps([config.crf.to_dict(), row], sort_keys=True)
    digest = hashlib.sha256(question.encode()).hexdigest()[:8]
    home = os.path.join(folder, f"marginals-{digest}")
    files.make_folder(home, inside=folder)
    paths = [os.path.join(home, f"{i:06d}.npy") for i in range(len(dataset.source(split)))]
    if all(map(os.path.exists, paths)):
        return paths
    rows = {"all": configs.crf_relations(config)}
    step = eval_steps.make_eval_step(model, rows, configs.crf_settings(config), keep=(row,))
    fn = parallel.pmap_eval(step, per_image=True)
    for number, batch in enumerate(bar(evaluate.batches_of(config, dataset, split), "marginals")):
        mine = paths[number * config.eval.batch_size :][: config.eval.batch_size]
        if all(map(os.path.exists, mine)):
            continue
        _, per_image = fn(params, evaluate.inputs_of(batch))
        kept = evaluators.without_devices(per_image.rows[row].log_marginals)
        for path, one in zip(mine, kept, strict=False):  # the last batch is filled up
            with files.replacing(path) as file:
                np.save(file, one)
    return paths


def tune_kernels(config, dataset, split, folder, marginals, mode, max_trials):
    """(best settings of the dense CRF, their mean IoU): the second stage, with its notes in a folder.

    marginals: file names of the log marginals float32 [h, w, K] of each image of the split, in order.
    mode, max_trials: of `tune`.
    """
    base = configs.refine_settings(config, mode)
    trials = kernel_search.Trials(os.path.join(folder, f"refine-{mode}.jsonl"), kernel_search.searched(mode))
    score = lambda settings, what: _score_kernels(config, dataset, split, marginals, settings, what)
    return kernel_search.search(score, base, trials, mode, max_trials)


def _score_kernels(config, dataset, split, marginals, settings, what):
    total, index = 0, 0
    for batch in bar(evaluate.batches_of(config, dataset, split), what):
        mine = marginals[index : index + config.eval.batch_size]
        index += len(mine)
        batch = {k: batch[k][: len(mine)] for k in ("image", "label", "valid_box")}
        try:
            kept = np.stack([np.load(path) for path in mine])
        except (ValueError, EOFError) as error:
            raise files.FileError(
                f"{os.path.dirname(mine[0])} cannot be used ({error}); delete it, tune again"
            ) from None
        counts, _ = refinement.refine_batch(kept, batch, settings)
        total = total + counts[0].astype(np.int64)
    return mean_iou(total, config, dataset, split)


def mean_iou(confusion, config, dataset, split):
    """Mean IoU over the classes that are scored; ConfigError where there is none: of nothing no best can be chosen."""
    found = evaluators.mean_iou(confusion, configs.scored_classes(config, dataset.class_names))
    if found is None:
        raise configs.ConfigError(evaluate.nothing_scored(split, config))
    return found
