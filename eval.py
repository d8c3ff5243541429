"""Evaluates a trained workdir: python eval.py --workdir DIR [--split NAME] [--refine full] [--config.key=value ...]

Prints one table (unary alone, each relation added, all, and with --refine the dense CRF on top), writes it to
WORKDIR/eval_SPLIT.json, and ends with one line of JSON on standard output.

    python eval.py --workdir DIR --tune-refinement [--split NAME]

chooses message weights and the parameters of the dense CRF on a validation split and writes them to WORKDIR/tuned.json,
from where later evaluations take them.

    python eval.py --workdir DIR --images PATH --output DIR     (your own images: a file, a folder, a quoted pattern)
    python eval.py --workdir DIR --dataset SPLIT --output DIR   (a split of the data set, with or without labels)

predicts into files; the formats of benchmark servers are among those of --format.
"""

import argparse
import json
import os
import sys

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from pwcrf_jax.training import cli, distributed, evaluate, predict, refinement, tuning
from pwcrf_jax.training import config as configs
from pwcrf_jax.training.logs import log

flags.DEFINE_string("workdir", None, "Folder of a training run.")
flags.DEFINE_string("split", "", "Split of the data set; default: data.eval_split of the run's config.")
flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "Best on validation, or the newest.")
flags.DEFINE_enum(
    "refine",
    "off",
    refinement.MODES,
    "Dense CRF on the upsampled marginals as one more row: its smoothness kernel alone (spatial) or both (full).",
)
flags.DEFINE_bool(
    "tune-refinement", False, "Choose message weights and config.refine on a validation split instead of evaluating."
)
flags.DEFINE_integer("trials", 40, "Of --tune-refinement: settings of the dense CRF tried at most.", lower_bound=1)
flags.DEFINE_bool("tuned", True, "Use what --tune-refinement wrote into the workdir; flags of yours come before it.")
flags.DEFINE_string("images", "", "Predict these images: a file, a folder with all below it, or a quoted pattern.")
flags.DEFINE_string("dataset", "", "Predict this split of the run's data set; it needs no labels.")
flags.DEFINE_string("output", "", "Folder for predictions.")
flags.DEFINE_enum(
    "format",
    "auto",
    ["auto", *predict.FORMATS],
    "Of label images; auto: with --dataset that of the data set's server if it has one, else palette.",
)
flags.DEFINE_bool("probabilities", False, "Of predictions: write the probabilities of all classes too, as .npz.")
flags.DEFINE_bool("overlay", True, "Of predictions: write the colours of the classes over the image too.")
flags.DEFINE_bool("overwrite", False, "Of predictions: write into a folder that is not empty.")
distributed.define_flags()
_PREDICTING = ("output", "format", "probabilities", "overlay", "overwrite")

_TUNED = {}
_YES = ("true", "t", "1", "yes", "y")


def _early(argv, name, default):
    """A flag that is needed before the others are parsed, as the config lies in the workdir."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"-{name}", default=default, nargs="?", const="true")
    return parser.parse_known_args(argv)[0].__dict__[name.replace("-", "_")]


def _check_flags(options):
    """Refuses flags that the task would not read."""
    sources = [name for name in ("images", "dataset") if options[name].value]
    if len(sources) == 2:
        raise configs.ConfigError("--images and --dataset are two sources; give one")
    for name in ("images", "dataset"):
        if options[name].present and not options[name].value:
            raise configs.ConfigError(f"--{name} is empty; name what to predict, or leave the flag out")
    given = [name for name in _PREDICTING if options[name].present]
    if given and not sources:
        raise configs.ConfigError(f"--{given[0]} is of predictions: name --images or --dataset too")
    for name in ("split", "tune-refinement"):
        if sources and options[name].value:
            raise configs.ConfigError(f"--{name} is of evaluation and does not go with --{sources[0]}")
    return bool(sources)


def main(_):
    workdir, config = cli.require("workdir"), cli.require("config")
    options = flags.FLAGS
    predicting = _check_flags(options)
    if options["tune-refinement"].value:
        mode = "spatial" if options.refine == "spatial" else "full"
        result = tuning.tune(config, workdir, options.checkpoint, options.split, mode, options.trials)
        print(json.dumps(result))
        return
    if _TUNED:
        configs.check_tuned(config, _TUNED, workdir)
        chosen = ", ".join(f"{key} = {value}" for key, value in _TUNED["config"].items())
        where = f"{os.path.join(workdir, configs.TUNED)}, chosen on split {_TUNED['split']}"
        log.info("%s for --refine %s, step %s: %s", where, _TUNED.get("mode"), _TUNED.get("step"), chosen)
        if options.refine not in ("off", _TUNED.get("mode")):
            log.info("these were chosen for another --refine; tune again for this one, or use --notuned")
    if predicting:
        _predict(config, workdir, options)
        return
    result = evaluate.evaluate(config, workdir, options.checkpoint, options.split, options.refine)
    result["tuned_on"] = _TUNED.get("split")
    if _TUNED and result["step"] != _TUNED.get("step"):
        log.info("the tuned values were chosen for step %s, this is step %s", _TUNED.get("step"), result["step"])
    if jax.process_index():
        return
    print(evaluate.table(result), flush=True)
    evaluate.write(result, workdir)
    print(json.dumps(evaluate.summary(result)))


def _predict(config, workdir, options):
    result = predict.predict(
        config,
        workdir,
        cli.require("output"),
        images=options.images,
        split=options.dataset,
        which=options.checkpoint,
        refine=options.refine,
        format_name=options.format,
        probabilities=options.probabilities,
        overlay=options.overlay,
        overwrite=options.overwrite,
    )
    if result["failed"]:
        log.info("%d images could not be read: %s", len(result["failed"]), ", ".join(result["failed"]))
    print(json.dumps(result))
    if result["failed"]:
        sys.exit(cli.FAILED)


def _define_config(argv):
    workdir = _early(argv[1:], "workdir", "")
    config = configs.load(os.path.join(workdir, "config.json")) if workdir else ConfigDict()
    tuning_now = _early(argv[1:], "tune-refinement", "false").lower() in _YES
    off = _early(argv[1:], "tuned", "true").lower() not in _YES or {"--notuned", "-notuned"} & set(argv)
    if workdir and not off and not tuning_now:
        _TUNED.update(configs.apply_tuned(config, workdir) or {})
    config_flags.DEFINE_config_dict("config", config, lock_config=True)  # reads the overrides in argv


if __name__ == "__main__":
    cli.run(main, before_parsing=_define_config, before_main=distributed.start)
