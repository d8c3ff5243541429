"""Evaluation on a split at full resolution, and its table."""

import functools
import math
import os

import jax
import numpy as np

from pwcrf_jax import config as configs
from pwcrf_jax import metrics
from pwcrf_jax.data import eval_batches
from pwcrf_jax.evaluation import steps as eval_steps
from pwcrf_jax.model import segmenter
from pwcrf_jax.model.counts import BAND_WIDTHS, confusions
from pwcrf_jax.prediction import predictor as inference
from pwcrf_jax.prediction import refinement, restore
from pwcrf_jax.runtime import files, parallel
from pwcrf_jax.runtime.logs import bar, log


def eval_step(config, model, marginals_of=None, labels_of=()):
    """The evaluation step of a config, see `eval_steps.make_eval_step`."""
    rows, crf, loss = configs.table_rows(config), configs.crf_settings(config), config.loss
    more = marginals_of, labels_of, loss.pairwise_balance_power
    return eval_steps.make_eval_step(model, rows, crf, loss.balance_power, loss.chunk_edges or None, *more)


def make_eval_fn(config, model, refine="off"):
    """The same, mapped over the devices and compiled.

    It returns (sums, more). more: with a mode of refinement the marginals of the final row; "off": the labels of
    `configs.shown_rows`, whether they are looked at or not, so that training and eval.py compile one program.
    """
    final, shown = configs.final_row(config), configs.shown_rows(config)
    more = dict(labels_of=shown) if refine == "off" else dict(marginals_of=final)
    return parallel.pmap_eval(eval_step(config, model, **more), per_image=True)


def evaluate_params(
    eval_fn, params, dataset, split, config, refine="off", predictor=None, panel=None, report=None
) -> dict:
    """Runs one split.

    refine: "off", or "spatial" or "full" for one more row, the final marginals refined by the dense CRF; `eval_fn`
      must be made for it.
    predictor: an `inference.Predictor`, for one more row, "tta", the means over its views. They are then what is
      refined, and `eval_fn` must be made for "off".
    panel: a `pictures.Panel` that is shown the images and their labels; `eval_fn` must be made for "off".
    report: a `report.Report` that collects what it shows; `eval_fn` must be the one that its `start` returned.

    Returns a dict of plain numbers, None where no valid pixel or edge gives one: `rows` {row: {miou, pixel_accuracy,
    mean_accuracy, fw_iou, iou {class: ...}, boundary_iou {width: ...}}}, `nll` {unary, relation: ...}, `change` {row:
    [largest change of a marginal in each iteration]; of "refined", on this host; not of "tta"}, `num_images`, `classes`
    (names that means are over; none: all).
    """
    batches = eval_batches(
        dataset,
        split,
        batch_size=config.eval.batch_size,
        size=config.data.eval_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
        num_threads=config.data.num_threads,
    )
    rows = list(dict.fromkeys([*configs.table_rows(config), configs.final_row(config)]))
    rows += ["tta"] * bool(predictor) + ["refined"] * (refine != "off")
    confusion, terms, change = {}, {}, {}
    for number, batch in enumerate(bar(batches, f"eval {split}")):
        out, more = eval_fn(params, parallel.split({k: batch[k] for k in ("image", "label", "valid_size")}))
        if panel:
            panel.add(number, batch, more)
        views = figures = None
        if report:
            figures = report.unpack(more)
        if predictor:
            sizes = enumerate(batch["valid_size"])
            views = predictor((i, batch["image"][i, :height, :width]) for i, (height, width) in sizes if height)
        elif report and refine != "off":
            views = report.marginals(batch, figures)
        if views:
            counts, largest, pixels = _image_by_image(
                views, batch, len(dataset.class_names), config.refine, refine, bool(predictor), report
            )
            out["confusion"] |= {row: parallel.sum_over_hosts(x) for row, x in counts.items()}
            out["change"] |= largest
        elif refine != "off":
            marginals = np.asarray(more)
            marginals = marginals.reshape(-1, *marginals.shape[2:])
            counts, out["change"]["refined"] = refinement.refine_batch(marginals, batch, config.refine, refine)
            out["confusion"]["refined"] = parallel.sum_over_hosts(counts)
        if report:
            report.add(batch, figures, pixels if views else {})
        for row, counts in out["confusion"].items():
            confusion[row] = confusion.get(row, 0) + np.asarray(counts, np.int64)
        for row, largest in out["change"].items():
            change[row] = np.maximum(change.get(row, 0.0), np.asarray(largest))
        for name, (total, count) in out["terms"].items():
            terms[name] = terms.get(name, 0.0) + np.array([total, count], np.float64)
    scored = configs.scored_classes(config, dataset.class_names)
    if mean_iou(confusion[rows[-1]][0], scored) is None:
        log.warning("%s", nothing_scored(split, config))
    if report:
        report.confusion = {row: confusion[row][0] for row in rows}
    return dict(
        split=split,
        num_images=len(dataset.source(split)),
        classes=list(config.eval.classes),
        rows={row: _figures(confusion[row], dataset.class_names, scored) for row in rows},
        nll={name: float(-total / count) if count else None for name, (total, count) in terms.items()},
        change={row: [float(x) for x in values] for row, values in change.items()},
    )


def _image_by_image(views, batch, num_classes, settings, refine, augmented, report):
    """Rows that are made of one image after the other: "tta" if augmented and, with refine, "refined".

    views: (position in the batch, image, marginals) of this host's images.
    Returns ({row: int32 [1 + bands, K, K]}, {row: change}, {position: {row: `report.Pixels`}}).
    """
    rows = ["tta"] * augmented + ["refined"] * (refine != "off")
    counts = {row: np.zeros((1 + len(BAND_WIDTHS), num_classes, num_classes), np.int32) for row in rows}
    change = {"refined": np.zeros(settings["num_iterations"], np.float32)} if refine != "off" else {}
    pixels = {}
    for i, image, marginals in views:
        predictions, log_probs = {}, {}
        if augmented:
            predictions["tta"] = marginals.labels()
        if refine != "off" or report:
            log_probs["tta"] = marginals.log_probs()
        if refine != "off":
            log_probs["refined"], largest = refinement.refine_image(log_probs["tta"], image, settings, refine)
            predictions["refined"] = log_probs["refined"].argmax(-1)
            change["refined"] = np.maximum(change["refined"], largest)
        if report:
            pixels[i] = {row: report.read(log_probs[row]) for row in rows}
        truth = batch["label"][i]
        for row, labels in predictions.items():
            framed = np.zeros_like(truth)
            framed[: labels.shape[0], : labels.shape[1]] = labels
            counts[row] = counts[row] + np.asarray(_count(framed, truth, batch["valid_size"][i], num_classes))
    return counts, change, pixels


@functools.partial(jax.jit, static_argnums=3)
def _count(predictions, labels, valid_size, num_classes):
    """`confusions` of one image in a frame [H, W]."""
    valid = segmenter.grid_mask(valid_size[None], labels.shape, labels.shape)[0]
    return confusions(predictions, labels, valid, num_classes)


def mean_iou(confusion, scored) -> float | None:
    """Mean IoU over the classes that are scored (indices; None: all). None where the truth has no pixel of any."""
    figures = metrics.scores(confusion, scored)
    return None if math.isnan(figures.mean_accuracy) else figures.mean_iou


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


def _figures(confusions, class_names, scored):
    none = lambda x: None if math.isnan(x) else float(x)
    whole = metrics.scores(confusions[0], scored)
    miou, *bands = (mean_iou(confusion, scored) for confusion in confusions)
    return dict(
        miou=miou,
        pixel_accuracy=none(whole.pixel_accuracy),
        mean_accuracy=none(whole.mean_accuracy),
        fw_iou=none(whole.frequency_weighted_iou),
        boundary_iou=dict(zip(map(str, BAND_WIDTHS), bands, strict=True)),
        iou={name: none(x) for name, x in zip(class_names, whole.iou_per_class, strict=True)},
    )


def row_title(row: str) -> str:
    """What a row of the table is called."""
    titles = {
        "unary": "unary",
        "all": "all relations",
        "convs": "+ middle layers",
        "tta": "+ augmentation",
        "refined": "+ refinement",
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
    refine, report: of `evaluate_params`.
    """
    split = split or config.data.eval_split
    model, params, step, dataset = restore.load(config, workdir, which, split)
    log.info("%s checkpoint of step %d, split %s", which, step, split)
    predictor = inference.Predictor(config, model, params) if configs.augments(config) else None
    if report:
        eval_fn = report.start(config, model, params, dataset)
    else:
        eval_fn = make_eval_fn(config, model, "off" if predictor else refine)
    result = evaluate_params(eval_fn, params, dataset, split, config, refine, predictor, report=report)
    return result | dict(step=step, checkpoint=which, refine=refine, config=config.to_dict())


def write(result: dict, workdir: str) -> str:
    """Writes the result of `evaluate` to WORKDIR/eval_SPLIT.json and returns that path."""
    path = os.path.join(workdir, f"eval_{file_name(result['split'])}.json")
    files.write_json(path, result)
    return path


def file_name(split: str) -> str:
    """A split's name as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in split)
