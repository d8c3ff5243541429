"""Scores a trained run on a split of its data set.

    pwcrf eval --workdir runs/demo                                    (the table of the validation split)
    pwcrf eval --workdir runs/demo --refine full --split "val[:50%]"  (and the dense CRF on top, on a part of it)
    pwcrf eval --workdir runs/demo --config.crf.num_iterations=5      (any key of the config of the run)

prints one table (unary alone, each relation added, all, and with --refine the dense CRF on top), writes it to
WORKDIR/eval_SPLIT.json, and ends with one line of JSON on standard output.

    pwcrf eval --workdir runs/demo --report auto

also writes WORKDIR/report_SPLIT.html, a page that shows what the CRF does (docs/report.md).
"""

import json

import jax
from absl import flags
from ml_collections import ConfigDict

from pwcrf_jax import config as configs
from pwcrf_jax.cli import command, trained
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.report import collect
from pwcrf_jax.runtime import distributed
from pwcrf_jax.runtime.logs import log
from pwcrf_jax.runtime.streams import say

AUTO = "auto"  # as the file of --report


def define_flags(values: flags.FlagValues) -> None:
    """--workdir, --checkpoint, --split, --refine, --tuned, those of the report, and those of several processes."""
    trained.define_flags(values)
    flags.DEFINE_string(
        "split",
        "",
        "Split of the data set, or a part of one; none: data.eval_split of the run's config. "
        'Example: --split "val[:50%]"',
        flag_values=values,
    )
    trained.define_refine(values)
    trained.define_tuned(values)
    flags.DEFINE_string(
        "report",
        "",
        "Write a page, one HTML file, that shows what the CRF does; auto: WORKDIR/report_SPLIT.html. "
        "Example: --report what_the_crf_does.html",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "report_images",
        100,
        "Of --report: images in its gallery at most; of more, those that gained and lost most are shown. "
        "Example: --report auto --report_images 30",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "report_inspect",
        None,
        "Of --report: images of the gallery whose cells and messages can be looked into, at most; none: 12. "
        "Example: --report auto --report_inspect 20",
        lower_bound=0,
        flag_values=values,
    )
    distributed.define_flags(values)


def check_flags(options: flags.FlagValues) -> None:
    """Refuses flags that evaluation would not read."""
    for name in ("report_images", "report_inspect"):
        if options[name].present and not options.report:
            raise configs.ConfigError(f"--{name} is of --report: add --report FILE, or leave the flag out")


def _page(config: ConfigDict, workdir: str, options: flags.FlagValues) -> collect.Report | None:
    if not options.report:
        return None
    split = options.split or config.data.eval_split
    file = collect.default_file(workdir, split) if options.report == AUTO else options.report
    return collect.Report(file, options.report_images, options.report_inspect)


def main(tuned: dict | None) -> None:
    """Prints and writes the table, and writes the report."""
    workdir, config, options = command.require("workdir"), command.require("config"), flags.FLAGS
    check_flags(options)
    configs.validate(config, batches=())
    trained.check_tuned(config, tuned, workdir, options.refine)
    page = _page(config, workdir, options)
    result = evaluate.evaluate(config, workdir, options.checkpoint, options.split, options.refine, page)
    result["tuned_on"] = tuned and tuned.get("split")
    if tuned and result["step"] != tuned.get("step"):
        log.info("the tuned values were chosen for step %s, this is step %s", tuned.get("step"), result["step"])
    if jax.process_index():
        return
    say(evaluate.table(result))
    evaluate.write(result, workdir)
    if page:
        size = page.write(result)
        log.info("wrote %s, %.1f MB: open it in a browser", page.file, size / 1e6)
    print(json.dumps(evaluate.summary(result)))


def run() -> None:
    """Runs the command with the words of the command line."""
    command.run(main, define_flags, doc=__doc__, before_parsing=trained.define_config, before_main=distributed.start)
