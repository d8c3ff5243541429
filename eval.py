"""Evaluates a trained workdir: python eval.py --workdir DIR [--split NAME] [--config.key=value ...]

Prints one table (unary alone, each relation added, all), writes it to WORKDIR/eval_SPLIT.json, and ends with one line
of JSON on standard output.
"""

import argparse
import json
import os

from absl import flags
from ml_collections import ConfigDict, config_flags

from pwcrf_jax.training import cli, evaluate
from pwcrf_jax.training import config as configs

flags.DEFINE_string("workdir", None, "Folder of a training run.")
flags.DEFINE_string("split", "", "Split of the data set; default: data.eval_split of the run's config.")
flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "Best on validation, or the newest.")


def _workdir_of(argv):
    """The config lies in the workdir, and its flags must exist before the others are parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workdir", "-workdir", default="")
    return parser.parse_known_args(argv)[0].workdir


def main(_):
    workdir = cli.require("workdir")
    result = evaluate.evaluate(cli.require("config"), workdir, flags.FLAGS.checkpoint, flags.FLAGS.split)
    print(evaluate.table(result), flush=True)
    evaluate.write(result, workdir)
    print(json.dumps(evaluate.summary(result)))


def _define_config(argv):
    workdir = _workdir_of(argv[1:])
    config = configs.load(os.path.join(workdir, "config.json")) if workdir else ConfigDict()
    config_flags.DEFINE_config_dict("config", config, lock_config=True)  # reads the overrides in argv


if __name__ == "__main__":
    cli.run(main, before_parsing=_define_config)
