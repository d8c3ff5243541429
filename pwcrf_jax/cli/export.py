"""Writes the predictor of a trained run, image to labels, as one file that JAX or a runtime of ONNX runs without this
package.

    pwcrf export --workdir runs/demo --output predictor.stablehlo
    pwcrf export --workdir runs/demo --format onnx --output predictor.onnx

Beside it predictor.stablehlo.json says what goes in and comes out. Prints how to load it; the last line of standard
output is JSON. Needs a package: pip install "pwcrf_jax[export]", or "pwcrf_jax[onnx]" for --format onnx
"""

import json

from absl import flags

from pwcrf_jax import config as configs
from pwcrf_jax.cli import command, trained
from pwcrf_jax.prediction import export, onnx_export
from pwcrf_jax.runtime.streams import say


def define_flags(values: flags.FlagValues) -> None:
    """--workdir, --checkpoint, --output, --format, --size, --batch, --overwrite and --tuned."""
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
    flags.DEFINE_enum(
        "format",
        "stablehlo",
        ["stablehlo", "onnx"],
        "For JAX, or for runtimes of ONNX. Example: --format onnx --output predictor.onnx",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batch",
        None,
        "Images at a time, of --format onnx alone; none: 1. Example: --format onnx --batch 8",
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
    given = (config, workdir, file, options.checkpoint, options.size, options.overwrite)
    if options.format == "onnx":
        about = onnx_export.export_onnx(*given, batch=1 if options.batch is None else options.batch)
    elif options.batch is not None:
        raise configs.ConfigError(f"--batch={options.batch} is of --format onnx; StableHLO takes any number of images")
    else:
        about = export.export_predictor(*given)
    say("\n".join(about["load"]))
    told = ("step", "size", "batch", "bytes") + ("checked",) * (options.format == "onnx")
    print(json.dumps({"file": file} | {k: about[k] for k in told}))


def run() -> None:
    """Runs the command with the words of the command line."""
    command.run(main, define_flags, doc=__doc__, before_parsing=trained.define_config)
