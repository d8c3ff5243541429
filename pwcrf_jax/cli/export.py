"""Writes the predictor of a trained run, image to labels, as one file that JAX runs without this package.

    pwcrf export --workdir runs/demo --output predictor.stablehlo

Beside it predictor.stablehlo.json says what goes in and comes out. Prints how to load it; the last line of standard
output is JSON. Needs the package flatbuffers: pip install "pwcrf_jax[export]"
"""

import json

from absl import flags

from pwcrf_jax import config as configs
from pwcrf_jax.cli import command, trained
from pwcrf_jax.prediction import export
from pwcrf_jax.runtime.streams import say


def define_flags(values: flags.FlagValues) -> None:
    """--workdir, --checkpoint, --output, --size, --overwrite and --tuned."""
    trained.define_flags(values)
    flags.DEFINE_string(
        "output", "", "File to write; must be given. Example: --output predictor.stablehlo", flag_values=values
    )
    flags.DEFINE_string(
        "size",
        "",
        "Largest image, HEIGHTxWIDTH in pixels; none: data.eval_size of the run's config. "
        "Example: --output predictor.stablehlo --size 480x640",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "overwrite",
        False,
        "Write over a file of before. Example: --output predictor.stablehlo --overwrite",
        flag_values=values,
    )
    trained.define_tuned(values)


def main(tuned: dict | None) -> None:
    """Writes the file, and prints how to load it."""
    workdir, config, options = command.require("workdir"), command.require("config"), flags.FLAGS
    configs.validate(config, batches=())
    trained.check_tuned(config, tuned, workdir)
    file = command.require("output")
    about = export.export_predictor(config, workdir, file, options.checkpoint, options.size, options.overwrite)
    say("\n".join(about["load"]))
    print(json.dumps({"file": file} | {k: about[k] for k in ("step", "size", "batch", "bytes")}))


def run() -> None:
    """Runs the command with the words of the command line."""
    command.run(main, define_flags, doc=__doc__, before_parsing=trained.define_config)
