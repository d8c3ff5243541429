"""Trains a model: python train.py --config configs/X.py --workdir DIR [--config.key=value ...]

A run that was stopped goes on by itself when it is started again with the same --workdir. SIGTERM makes it save and
leave with exit code 143.
"""

import sys

from absl import flags
from ml_collections import config_flags

from pwcrf_jax.training import cli, distributed, loop, preemption

config_flags.DEFINE_config_file("config", None, "Config file, such as configs/demo.py.", lock_config=True)
flags.DEFINE_string("workdir", None, "Folder of the run: config, checkpoints, logs. Made if it is not there.")
distributed.define_flags()


def start():
    preemption.install()
    distributed.start()


def main(_):
    try:
        loop.train_and_evaluate(cli.require("config"), cli.require("workdir"))
    except preemption.Preempted:
        sys.exit(preemption.EXIT_CODE)


if __name__ == "__main__":
    cli.run(main, before_main=start)
