"""Trains a model, or goes on with a run that was stopped.

    python train.py --config configs/demo.py --workdir runs/demo             (built-in data, minutes on a CPU)
    python train.py --config configs/demo.py --workdir runs/demo --dry-run   (what it would be and cost; trains nothing)
    python train.py --config configs/demo.py --workdir runs/short --config.train.steps=200   (any key of the config)

Start the same command again, with the same --workdir, and a run goes on from its newest checkpoint. SIGTERM makes it
save and leave with exit code 143. Then: python eval.py --workdir DIR
"""

import sys

from absl import flags
from ml_collections import config_flags

from pwcrf_jax.cli import command as cli
from pwcrf_jax.runtime import distributed, preemption
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.training import loop

config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file; must be given. Its keys are flags too. Example: --config configs/demo.py --config.train.steps=200",
    lock_config=True,
)
flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run: config, checkpoints, logs; must be given. Made if it is not there. "
    "Example: --workdir runs/demo",
)
flags.DEFINE_bool(
    "dry-run",
    False,
    "Print the model, the plan of memory and multiply-adds, write one training batch as a picture, and exit. "
    "Example: --dry-run",
)
flags.DEFINE_string(
    "picture",
    "",
    "Of --dry-run: the picture's file; none: WORKDIR/dry_run.png. Example: --dry-run --picture batch.png",
)
distributed.define_flags()
flags.adopt_module_key_flags(distributed)


def start():
    preemption.install()
    distributed.start()


def main(_):
    if flags.FLAGS["dry-run"].value:
        from pwcrf_jax.training import dry_run

        dry_run.run(cli.require("config"), flags.FLAGS.workdir or "", flags.FLAGS.picture)
        return
    if flags.FLAGS["picture"].present:
        raise ConfigError("--picture is of --dry-run: add that, or leave it out")
    try:
        loop.train_and_evaluate(cli.require("config"), cli.require("workdir"))
    except preemption.Preempted:
        sys.exit(preemption.EXIT_CODE)


if __name__ == "__main__":
    cli.run(
        main,
        before_main=start,
        interrupted="stopped by Ctrl-C; start the same command again, with the same --workdir, and the run goes on "
        "from its newest checkpoint",
    )
