"""Trains a model, or goes on with a run that was stopped.

    pwcrf train --config demo --workdir runs/demo             (built-in data, minutes on a CPU)
    pwcrf train --config demo --workdir runs/demo --dry-run   (what it would be and cost; trains nothing)
    pwcrf train --config demo --workdir runs/short --config.train.steps=200   (any key of the config)

--config takes the name of a config of the package, or the path of a file of your own. Start the same command again,
with the same --workdir, and a run goes on from its newest checkpoint. SIGTERM makes it save and leave with exit code
143. Then: pwcrf eval --workdir DIR
"""

import sys

from absl import flags
from ml_collections import config_flags

from pwcrf_jax.cli import command
from pwcrf_jax.runtime import distributed, preemption
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.training import dry_run, loop


def define_flags(values: flags.FlagValues) -> None:
    """--config, --workdir, --dry-run, --picture, and those of several processes."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config, by name or by path; must be given. Its keys are flags too. "
        "Example: --config demo --config.train.steps=200",
        flag_values=values,
        lock_config=True,
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run: config, checkpoints, logs; must be given. Made if it is not there. "
        "Example: --workdir runs/demo",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "dry-run",
        False,
        "Print the model, the plan of memory and multiply-adds, write one training batch as a picture, and exit. "
        "Example: --dry-run",
        flag_values=values,
    )
    flags.DEFINE_string(
        "picture",
        "",
        "Of --dry-run: the picture's file; none: WORKDIR/dry_run.png. Example: --dry-run --picture batch.png",
        flag_values=values,
    )
    distributed.define_flags(values)


def main(_: object) -> None:
    """Trains, or with --dry-run shows what would be trained."""
    options = flags.FLAGS
    if options["dry-run"].value:
        dry_run.run(command.require("config"), options.workdir or "", options.picture)
        return
    if options["picture"].present:
        raise ConfigError("--picture is of --dry-run: add that, or leave it out")
    try:
        loop.train_and_evaluate(command.require("config"), command.require("workdir"))
    except preemption.Preempted:
        sys.exit(preemption.EXIT_CODE)


def _start() -> None:
    preemption.install()
    distributed.start()
    preemption.watch_notices()


def run() -> None:
    """Runs the command with the words of the command line."""
    command.run(
        main,
        define_flags,
        doc=__doc__,
        before_main=_start,
        interrupted="stopped by Ctrl-C; start the same command again, with the same --workdir, and the run goes on "
        "from its newest checkpoint",
    )
