"""Chooses message weights, iterations and the parameters of the dense CRF of a trained run, on a validation split.

    pwcrf tune --workdir runs/demo --split "val[:50%]"
    pwcrf tune --workdir runs/demo --split "val[:50%]" --method nll

writes them to WORKDIR/tuned.json, from where pwcrf eval, predict and export take them. The last line of standard output
is JSON. A search that was stopped goes on where it was.
"""

import json

from absl import flags

from pwcrf_jax import config as configs
from pwcrf_jax.cli import command, trained
from pwcrf_jax.evaluation import tuning


def define_flags(values: flags.FlagValues) -> None:
    """--workdir, --checkpoint, --split, --method, --refine and --trials."""
    trained.define_flags(values)
    flags.DEFINE_string(
        "split",
        "",
        "Validation split of the data set, or a part of one; none: data.eval_split of the run's config. "
        'Example: --split "val[:50%]"',
        flag_values=values,
    )
    flags.DEFINE_enum(
        "method",
        "miou",
        tuning.METHODS,
        "How messages are chosen: weights and iterations by mean IoU, or by likelihood the temperature of the unary "
        "and the weights (nll), and weights of labels too (nll_labels). Example: --method nll",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "refine",
        "full",
        ["spatial", "full"],
        "Kernels of the dense CRF that are searched: smoothness alone (spatial) or both (full). "
        "Example: --refine spatial",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "trials",
        40,
        "Settings of the dense CRF tried at most. Example: --trials 100",
        lower_bound=1,
        flag_values=values,
    )


def main(_: object) -> None:
    """Searches, and prints what was chosen."""
    workdir, config, options = command.require("workdir"), command.require("config"), flags.FLAGS
    configs.validate(config, batches=())
    given = options.checkpoint, options.split, options.refine, options.trials
    print(json.dumps(tuning.tune(config, workdir, *given, method=options.method)))


def run() -> None:
    """Runs the command with the words of the command line."""
    command.run(main, define_flags, doc=__doc__, before_parsing=trained.define_config)
