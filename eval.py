"""Evaluates a trained workdir, predicts with it, or exports it.

    python eval.py --workdir runs/demo                                    (the table of the validation split)
    python eval.py --workdir runs/demo --refine full --split "val[:50%]"  (and the dense CRF on top, on a part of it)
    python eval.py --workdir runs/demo --config.crf.num_iterations=5      (any key of the config of the run)

prints one table (unary alone, each relation added, all, and with --refine the dense CRF on top), writes it to
WORKDIR/eval_SPLIT.json, and ends with one line of JSON on standard output.

    python eval.py --workdir runs/demo --report

also writes WORKDIR/report_SPLIT.html, a page that shows what the CRF does (docs/report.md).

    python eval.py --workdir runs/demo --tune-refinement

chooses message weights, iterations and the parameters of the dense CRF on a validation split, into WORKDIR/tuned.json,
from where later evaluations take them.

    python eval.py --workdir runs/demo --images PATH --output out    (your own images: a file, a folder, "a/*.jpg")
    python eval.py --workdir runs/demo --dataset val --output out    (a split of the data set, labelled or not)

predicts into files; the formats of benchmark servers are among those of --format.

    python eval.py --workdir runs/demo --export predictor.stablehlo

writes the predictor, image to labels, as one file that JAX runs without this package.
"""

import argparse
import json
import os
import sys

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from pwcrf_jax import config as configs
from pwcrf_jax.cli import command
from pwcrf_jax.evaluation import evaluate, tuning
from pwcrf_jax.prediction import image_files, predict, refinement
from pwcrf_jax.runtime import distributed
from pwcrf_jax.runtime.logs import log
from pwcrf_jax.runtime.streams import say

flags.DEFINE_string("workdir", None, "Folder of a training run; must be given. Example: --workdir runs/demo")
flags.DEFINE_string(
    "split",
    "",
    'Split of the data set, or a part of one; none: data.eval_split of the run\'s config. Example: --split "val[:50%]"',
)
flags.DEFINE_enum(
    "checkpoint", "best", ["best", "latest"], "Best on validation, or the newest. Example: --checkpoint latest"
)
flags.DEFINE_enum(
    "refine",
    "off",
    refinement.MODES,
    "Dense CRF on the upsampled marginals as one more row: its smoothness kernel alone (spatial) or both (full). "
    "Example: --refine full",
)
flags.DEFINE_bool(
    "tune-refinement",
    False,
    "Choose message weights, iterations and config.refine on a validation split instead of evaluating. "
    'Example: --tune-refinement --split "val[:50%]"',
)
flags.DEFINE_integer(
    "trials",
    40,
    "Of --tune-refinement: settings of the dense CRF tried at most. Example: --tune-refinement --trials 100",
    lower_bound=1,
)
flags.DEFINE_bool(
    "tuned",
    True,
    "Use what --tune-refinement wrote into the workdir; flags of yours come before it. Example: --notuned",
)
flags.DEFINE_string(
    "images",
    "",
    "Predict these images: a file, a folder with all below it, or a quoted pattern. "
    'Example: --images "photos/*.jpg" --output out',
)
flags.DEFINE_string(
    "dataset",
    "",
    "Predict this split of the run's data set; it needs no labels. Example: --dataset test --output out",
)
flags.DEFINE_string("output", "", "Folder for predictions. Example: --images photos --output out")
flags.DEFINE_enum(
    "format",
    "auto",
    ["auto", *predict.FORMATS],
    "Of label images; auto: with --dataset that of the data set's server if it has one, else palette. "
    "Example: --dataset test --output out --format voc",
)
flags.DEFINE_bool(
    "probabilities",
    False,
    "Of predictions: write the probabilities of all classes too, as .npz. "
    "Example: --images photos --output out --probabilities",
)
flags.DEFINE_bool(
    "overlay",
    True,
    "Of predictions: write the colours of the classes over the image too. "
    "Example: --images photos --output out --nooverlay",
)
flags.DEFINE_bool(
    "overwrite",
    False,
    "Write predictions into a folder that is not empty, or --export over a file of before. "
    "Example: --images photos --output out --overwrite",
)
flags.DEFINE_string(
    "export",
    "",
    "Write the predictor, image to labels, for JAX without this package, and FILE.json with what it takes. "
    "Example: --export predictor.stablehlo",
)
flags.DEFINE_string(
    "export_size",
    "",
    "Of --export: largest image, HEIGHTxWIDTH in pixels; none: data.eval_size of the run's config. "
    "Example: --export predictor.stablehlo --export_size 480x640",
)
flags.DEFINE_bool(
    "report",
    False,
    "Write a page, one HTML file, that shows what the CRF does, to WORKDIR/report_SPLIT.html or the file named after "
    "it. Example: --report what_the_crf_does.html",
)
flags.DEFINE_string(
    "report_file", "", "The same, for scripts: the file of --report. Example: --report --report_file what_it_does.html"
)
flags.DEFINE_integer(
    "report_images",
    100,
    "Of --report: images in its gallery at most; of more, those that gained and lost most are shown. "
    "Example: --report --report_images 30",
    lower_bound=0,
)
flags.DEFINE_integer(
    "report_inspect",
    None,
    "Of --report: images of the gallery whose cells and messages can be looked into, at most; none: 12. "
    "Example: --report --report_inspect 20",
    lower_bound=0,
)
distributed.define_flags()
flags.adopt_module_key_flags(distributed)
_REPORTING = ("report_file", "report_images", "report_inspect")
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
    if options["export"].present:
        _check_export(options)
    elif options["export_size"].present:
        raise configs.ConfigError("--export_size is of --export: name its file too, or leave the flag out")
    given = [name for name in _PREDICTING if options[name].present and not (options.export and name == "overwrite")]
    if given and not sources:
        raise configs.ConfigError(f"--{given[0]} is of predictions: name --images or --dataset too")
    given = [name for name in _REPORTING if options[name].present]
    if given and not options.report:
        raise configs.ConfigError(f"--{given[0]} is of --report: add --report, or leave the flag out")
    for name in ("images", "dataset", "tune-refinement", "export"):
        if options.report and options[name].value:
            raise configs.ConfigError(f"--report is of evaluation and does not go with --{name}")
    for name in ("split", "tune-refinement"):
        if sources and options[name].value:
            raise configs.ConfigError(f"--{name} is of evaluation and does not go with --{sources[0]}")
    return bool(sources)


def _check_export(options):
    if not options.export:
        raise configs.ConfigError("--export is empty; name the file to write, or leave the flag out")
    for name in ("images", "dataset", "split", "tune-refinement"):
        if options[name].value:
            raise configs.ConfigError(f"--{name} does not go with --export, which writes the predictor alone")
    if options.refine != "off":
        raise configs.ConfigError("--refine: the dense CRF is not part of an exported predictor; leave it out")


def main(_):
    workdir, config = command.require("workdir"), command.require("config")
    options = flags.FLAGS
    predicting = _check_flags(options)
    configs.validate(config, batches=())
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
    if options.export:
        from pwcrf_jax.prediction import export

        about = export.export_predictor(
            config, workdir, options.export, options.checkpoint, options.export_size, options.overwrite
        )
        say("\n".join(about["load"]))
        print(json.dumps({"file": options.export} | {k: about[k] for k in ("step", "size", "batch", "bytes")}))
        return
    page = None
    if options.report:
        from pwcrf_jax.report import collect

        file = options.report_file or collect.default_file(workdir, options.split or config.data.eval_split)
        page = collect.Report(file, options.report_images, options.report_inspect)
    result = evaluate.evaluate(config, workdir, options.checkpoint, options.split, options.refine, page)
    result["tuned_on"] = _TUNED.get("split")
    if _TUNED and result["step"] != _TUNED.get("step"):
        log.info("the tuned values were chosen for step %s, this is step %s", _TUNED.get("step"), result["step"])
    if jax.process_index():
        return
    say(evaluate.table(result))
    evaluate.write(result, workdir)
    if page:
        size = page.write(result)
        log.info("wrote %s, %.1f MB: open it in a browser", page.file, size / 1e6)
    print(json.dumps(evaluate.summary(result)))


def _predict(config, workdir, options):
    result = predict.predict(
        config,
        workdir,
        command.require("output"),
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
        named = [*map(image_files.shown, result["failed"][:20]), *["..."] * (len(result["failed"]) > 20)]
        log.info("%d images were not predicted: %s", len(result["failed"]), ", ".join(named))
    print(json.dumps(result))
    if result["failed"]:
        sys.exit(command.FAILED)


def _name_report(argv):
    """`--report FILE` and `--report=FILE` become --report --report_file=FILE."""
    for i, word in enumerate(argv):
        name, _, file = word.partition("=")
        if name in ("--report", "-report") and file.lower() not in (*_YES, "false", "f", "0", "no"):
            last = i + 1
            if not file and argv[last : last + 1] and not argv[last].startswith("-"):
                file, last = argv[last], last + 1
            argv[i:last] = ["--report", *([f"--report_file={file}"] if file else [])]
            return


def _define_config(argv):
    _name_report(argv)
    workdir = _early(argv[1:], "workdir", "")
    config = configs.load_checked(workdir) if workdir else ConfigDict()
    tuning_now = _early(argv[1:], "tune-refinement", "false").lower() in _YES
    off = _early(argv[1:], "tuned", "true").lower() not in _YES or {"--notuned", "-notuned"} & set(argv)
    if workdir and not off and not tuning_now:
        _TUNED.update(configs.apply_tuned(config, workdir) or {})
    config_flags.DEFINE_config_dict("config", config, lock_config=True)  # reads the overrides in argv


if __name__ == "__main__":
    command.run(main, before_parsing=_define_config, before_main=distributed.start)
