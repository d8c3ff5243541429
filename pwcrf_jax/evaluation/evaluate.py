"""Evaluation on a split at full resolution, and its table."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

from pwcrf_jax import config as configs
from pwcrf_jax.data import eval_batches
from pwcrf_jax.evaluation import evaluators
from pwcrf_jax.evaluation import steps as eval_steps
from pwcrf_jax.model.losses import piecewise_terms
from pwcrf_jax.prediction import predictor as inference
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import files, parallel
from pwcrf_jax.runtime.logs import bar, log


def make_eval_fn(config, model, *, keep: Sequence[str] = (), figures: Callable | None = None, devices=None):
    """The evaluation step of a config, see `eval_steps.make_eval_step`, mapped over the devices and compiled.

    keep, figures: of `make_eval_step`; `configs.shown_rows` are kept whether they are looked at or not, so that
    training and evaluation compile one program.
    """
    # Likelihoods alone: what training adds to them says nothing beside those of other runs.
    plain = dataclasses.replace(configs.loss_settings(config), label_smoothing=0.0, dice_weight=0.0)
    terms = functools.partial(piecewise_terms, settings=plain)
    rows, settings = configs.table_rows(config), configs.crf_settings(config)
    keep = tuple(dict.fromkeys([*configs.shown_rows(config), configs.final_row(config), *keep]))
    step = eval_steps.make_eval_step(model, rows, settings, keep=keep, terms=terms, figures=figures)
    return parallel.pmap_eval(step, devices, per_image=True)


def batches_of(config, dataset, split: str):
    """This process' share of the batches of a split, each in a frame of config.data.eval_size."""
    return eval_batches(
        dataset,
        split,
        batch_size=config.eval.batch_size,
        size=config.data.eval_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
        num_threads=config.data.num_threads,
        scores=configs.given_scores(config, config.data.eval_size, config.data.scores.per_cell),
    )


def inputs_of(batch, num_devices: int | None = None):
    """What a step reads of a batch, an axis of devices first."""
    return parallel.split({k: batch[k] for k in batch if k != "id"}, num_devices)


def evaluate_params(eval_fn, params, dataset, split: str, config, more: Sequence[evaluators.Evaluator] = ()) -> dict:
    """Runs one split: every batch through `eval_fn` of `make_eval_fn`, and by every evaluator.

    more: evaluators; those that make rows of the table, then those that look on.

    Returns a dict of plain numbers, None where no valid pixel or edge gives one: `rows` {row: {miou, pixel_accuracy,
    mean_accuracy, fw_iou, iou {class: ...}, boundary_iou {width: ...}}}, `nll` {unary, relation: ...}, `change` {row:
    [largest change of a marginal in each iteration]; of "refined", on this host; not of "tta"}, `num_images`, `classes`
    (names that means are over; none: all).
    """
    scored = configs.scored_classes(config, dataset.class_names)
    order = [*configs.table_rows(config), configs.final_row(config)]
    every = [*more, evaluators.Rows(order, dataset.class_names, scored), evaluators.Terms()]
    for number, batch in enumerate(bar(batches_of(config, dataset, split), f"eval {split}")):
        sums, per_image = eval_fn(params, inputs_of(batch))
        seen = evaluators.Seen(number, batch, per_image, *sums)
        for evaluator in every:
            evaluator.add(seen)
    sections: dict[str, dict] = dict(rows={}, nll={}, change={})
    for evaluator in every:
        for name, value in evaluator.results():
            section, _, key = name.partition("/")
            sections[section][key] = value
    if list(sections["rows"].values())[-1]["miou"] is None:
        log.warning("%s", nothing_scored(split, config))
    about = dict(split=split, num_images=len(dataset.source(split)), classes=list(config.eval.classes))
    return about | sections


def check_scored(config, dataset, split: str) -> None:
    """ConfigError where a split is known to have no pixel of a class that is scored: its mean IoU would say nothing."""
    about = dataset.label_report()["splits"]
    counts = [about.get(part.split("[")[0].strip(), {}).get("pixels") for part in split.split("+")]
    scored = configs.scored_classes(config, dataset.class_names)
    if None not in counts and not np.sum(counts, axis=0)[slice(None) if scored is None else scored].any():
        raise configs.ConfigError(nothing_scored(split, config))


def nothing_scored(split: str, config) -> str:
    """What is said of a split without a pixel of a class that is scored."""
    of = f"of config.eval.classes = {config.eval.classes}" if config.eval.classes else "that is not void"
    return f"split {split!r} has no pixel {of}, so it has no mean IoU; name another split or check its labels"


def row_title(row: str) -> str:
    """What a row of the table is called."""
    titles = {
        "unary": "unary",
        "all": "all relations",
        "convs": "+ skip layers",
        "tta": "+ augmentation",
        "refined": "+ refinement",
        "scores": "scores",
        "crf": "+ dense CRF",
    }
    return titles.get(row, f"+ {row}")


def table(result: dict) -> str:
    """The table a person reads; figures in percent. "IoU w px": mean IoU in the band of w pixels along boundaries."""
    percent = lambda x: "-" if x is None else f"{100 * x:.1f}"
    rows = result["rows"]
    widths = list(next(iter(rows.values()))["boundary_iou"])
    of = f" of {len(result['classes'])}" if result["classes"] else ""
    lines = [["", f"mean IoU{of}", *(f"IoU {w} px" for w in widths), "pixel acc", "mean acc", "fw IoU"]]
    for row, r in rows.items():
        figures = [r["miou"], *r["boundary_iou"].values(), r["pixel_accuracy"], r["mean_accuracy"], r["fw_iou"]]
        lines.append([row_title(row), *map(percent, figures)])
    classes = [["IoU per class", *map(row_title, rows)]]
    for name in next(iter(rows.values()))["iou"]:
        title = name if not of or name in result["classes"] else f"({name})"
        classes.append([title, *(percent(r["iou"][name]) for r in rows.values())])
    return "\n\n".join(map(_columns, (lines, classes)))


def _columns(lines):
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    cells = lambda line: [
        x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True))
    ]
    return "\n".join("  ".join(cells(line)).rstrip() for line in lines)


def summary(result: dict) -> dict:
    """The figures of the table as one flat dict: miou_unary, miou_RELATION, miou_all, ..., in percent."""
    out = {"split": result["split"], "num_images": result["num_images"]}
    for key in ("miou", "pixel_accuracy", "mean_accuracy", "fw_iou"):
        for row, figures in result["rows"].items():
            out[f"{key}_{row}"] = _rounded(figures[key])
    for row, figures in result["rows"].items():
        out |= {f"boundary_iou_{width}px_{row}": _rounded(x) for width, x in figures["boundary_iou"].items()}
    out |= {f"nll_{name}": value if value is None else round(value, 4) for name, value in result["nll"].items()}
    return out


def _rounded(fraction):
    return None if fraction is None else round(100 * fraction, 3)


def evaluate(config, workdir: str, which: str = "best", split: str = "", refine: str = "off", report=None) -> dict:
    """Evaluates a trained workdir; returns `evaluate_params`' dict, with step, checkpoint, refine and config.

    which: "best" (by validation mean IoU) or "latest".
    split: of the data set; "": config.data.eval_split.
    refine, report: of `evaluate_model`.
    """
    split = split or config.data.eval_split
    model, params, step, dataset = restore.load(config, workdir, which, split)
    log.info("%s checkpoint of step %d, split %s", which, step, split)
    result = evaluate_model(config, model, params, dataset, split, refine=refine, report=report)
    return result | dict(step=step, checkpoint=which, refine=refine, config=config.to_dict())


def evaluate_model(config, model, params, dataset, split: str, *, refine: str = "off", report=None) -> dict:
    """`evaluate_params` with all rows that a config asks for: also "tta", and "refined" with a mode of refinement.

    refine: "off", or "spatial" or "full" for one more row, the final marginals, of "tta" if there, refined by the dense
      CRF.
    report: a `pwcrf_jax.report.collect.Report` that collects what it shows.
    """
    predictor = inference.Predictor(config, model, params) if configs.augments(config) else None
    final, settings = configs.final_row(config), configs.refine_settings(config, refine)
    more: list[evaluators.Evaluator] = []
    options = report.start(config, model, params, dataset) if report else {}
    if predictor or (report and settings):
        watch = report.watch if report else None
        more.append(evaluators.ImageByImage(predictor, final, settings, watch, configs.score_files(config)))
    elif settings:
        more.append(evaluators.Refined(final, settings))
    eval_fn = make_eval_fn(config, model, **options)
    params = parallel.replicated(params)  # as training has them: one program for both
    return evaluate_params(eval_fn, params, dataset, split, config, [*more, *([report] if report else [])])


def write(result: dict, workdir: str) -> str:
    """Writes the result of `evaluate` to WORKDIR/eval_SPLIT.json and returns that path."""
    path = os.path.join(workdir, f"eval_{file_name(result['split'])}.json")
    files.write_json(path, result)
    return path


def file_name(split: str) -> str:
    """A split's name as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in split)
