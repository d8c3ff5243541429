"""Evaluation on a split at full resolution, and its table."""

import json
import math
import os
import sys

import jax
import numpy as np
from tqdm import tqdm

from pwcrf_jax import metrics
from pwcrf_jax.data import check_sizes, eval_batches, load_dataset
from pwcrf_jax.training import checkpoint, parallel, steps
from pwcrf_jax.training import config as configs
from pwcrf_jax.training.logs import log


def eval_step(config, model):
    """The evaluation step of a config, see `steps.make_eval_step`."""
    rows, crf, loss = configs.table_rows(config), configs.crf_settings(config), config.loss
    return steps.make_eval_step(model, rows, crf, loss.balance_power, loss.chunk_edges or None)


def make_eval_fn(config, model):
    """The same, mapped over the devices and compiled."""
    return parallel.pmap_eval(eval_step(config, model))


def evaluate_params(eval_fn, params, dataset, split, config) -> dict:
    """Runs one split.

    Returns a dict of plain numbers: `rows` {row: {miou, pixel_accuracy, mean_accuracy, fw_iou, iou {class: ...}}},
    `nll` {unary, relation: ...}, `change` {row: [largest change of a marginal in each iteration]}, `num_images`.
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
    confusion, terms, change, num_images = {}, {}, {}, 0
    for batch in tqdm(batches, unit="batch", desc=f"eval {split}", disable=not sys.stderr.isatty(), leave=False):
        num_images += sum(1 for name in batch["id"] if name)
        out = eval_fn(params, parallel.split({k: batch[k] for k in ("image", "label", "valid_size")}))
        for row, counts in out["confusion"].items():
            confusion[row] = confusion.get(row, 0) + np.asarray(counts, np.int64)
            change[row] = np.maximum(change.get(row, 0.0), np.asarray(out["change"][row]))
        for name, (total, count) in out["terms"].items():
            terms[name] = terms.get(name, 0.0) + np.array([total, count], np.float64)
    return dict(
        split=split,
        num_images=num_images,
        rows={row: _figures(metrics.scores(confusion[row]), dataset.class_names) for row in configs.table_rows(config)},
        nll={name: float(-total / max(count, 1.0)) for name, (total, count) in terms.items()},
        change={row: [float(x) for x in values] for row, values in change.items()},
    )


def _figures(scores, class_names):
    none = lambda x: None if math.isnan(x) else float(x)
    return dict(
        miou=none(scores.mean_iou),
        pixel_accuracy=none(scores.pixel_accuracy),
        mean_accuracy=none(scores.mean_accuracy),
        fw_iou=none(scores.frequency_weighted_iou),
        iou={name: none(x) for name, x in zip(class_names, scores.iou_per_class, strict=True)},
    )


def _row_title(row):
    return {"unary": "unary", "all": "all relations"}.get(row, f"+ {row}")


def table(result: dict) -> str:
    """The table a person reads; figures in percent."""
    percent = lambda x: "-" if x is None else f"{100 * x:.1f}"
    rows = result["rows"]
    head = ["", "mean IoU", "pixel acc", "mean acc", "fw IoU"]
    lines = [head]
    for row, r in rows.items():
        lines.append([_row_title(row), *(percent(r[k]) for k in ("miou", "pixel_accuracy", "mean_accuracy", "fw_iou"))])
    classes = [["IoU per class", *map(_row_title, rows)]]
    for name in next(iter(rows.values()))["iou"]:
        classes.append([name, *(percent(r["iou"][name]) for r in rows.values())])
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
            out[f"{key}_{row}"] = None if figures[key] is None else round(100 * figures[key], 3)
    out |= {f"nll_{name}": round(value, 4) for name, value in result["nll"].items()}
    return out


def abstract_params(model):
    """Shapes of the parameters, nothing computed."""
    return jax.eval_shape(lambda: init_params(model, 0))


def init_params(model, seed):
    """Parameters from a seed. They do not depend on the size of images, so a small one is traced."""
    return model.init(jax.random.key(seed), np.zeros((1, 64, 64, 3), np.uint8))["params"]


def evaluate(config, workdir: str, which: str = "best", split: str = "") -> dict:
    """Evaluates a trained workdir; returns `evaluate_params`' dict, with step, checkpoint and config.

    which: "best" (by validation mean IoU) or "latest".
    split: of the data set; "": config.data.eval_split.
    """
    configs.validate(config, batches=("eval.batch_size",))
    model, params, step = restore_params(config, workdir, which)
    dataset = load_dataset(**configs.dataset_options(config))
    configs.check_classes(config, dataset.class_names)
    split = split or config.data.eval_split
    check_sizes(dataset, split, config.data.eval_size)
    log.info("%s checkpoint of step %d, split %s", which, step, split)
    result = evaluate_params(make_eval_fn(config, model), params, dataset, split, config)
    return result | dict(step=step, checkpoint=which, config=config.to_dict())


def restore_params(config, workdir: str, which: str = "best"):
    """(model, parameters, step) of a trained workdir; which as in `evaluate`."""
    folder = {"best": "best", "latest": "checkpoints"}[which]
    model = configs.build_model(config)
    with checkpoint.Store(os.path.join(workdir, folder), configs.identity(config)) as store:
        trees, meta = store.restore({"params": abstract_params(model)})
    return model, trees["params"], meta["step"]


def write(result: dict, workdir: str) -> str:
    """Writes the result of `evaluate` to WORKDIR/eval_SPLIT.json and returns that path."""
    path = os.path.join(workdir, f"eval_{_file_name(result['split'])}.json")
    with open(path, "w") as f:
        json.dump(result, f, indent=2)
    return path


def _file_name(split):
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in split)
