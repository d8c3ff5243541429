"""Labels images with a trained run, and writes files.

    pwcrf predict --workdir runs/demo --images PATH --output out   (your own images: a file, a folder, "a/*.jpg")
    pwcrf predict --workdir runs/demo --dataset val --output out   (a split of the data set, labelled or not)

writes labels and overlays, and with --probabilities the probabilities of all classes. The formats of benchmark servers
are among those of --format. The last line of standard output is JSON; exit code 1: some image was not predicted.
"""

import json
import sys

from absl import flags

from pwcrf_jax import config as configs
from pwcrf_jax.cli import command, trained
from pwcrf_jax.prediction import image_files, predict
from pwcrf_jax.runtime.logs import log
from pwcrf_jax.runtime.wire import FAILED


def define_flags(values: flags.FlagValues) -> None:
    """--workdir, --checkpoint, --refine, --tuned, where images come from and how labels are written."""
    trained.define_flags(values)
    flags.DEFINE_string(
        "images",
        "",
        "Predict these images: a file, a folder with all below it, or a quoted pattern. "
        'Example: --images "photos/*.jpg" --output out',
        flag_values=values,
    )
    flags.DEFINE_string(
        "dataset",
        "",
        "Predict this split of the run's data set; it needs no labels. Example: --dataset test --output out",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output",
        "",
        "Folder for predictions; must be given. Example: --images photos --output out",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "format",
        "auto",
        ["auto", *predict.FORMATS],
        "Of label images; auto: with --dataset that of the data set's server if it has one, else palette. "
        "Example: --dataset test --output out --format voc",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "probabilities",
        False,
        "Write the probabilities of all classes too, as .npz. Example: --images photos --output out --probabilities",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "overlay",
        True,
        "Write the colours of the classes over the image too. Example: --images photos --output out --nooverlay",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "overwrite",
        False,
        "Write into a folder that is not empty. Example: --images photos --output out --overwrite",
        flag_values=values,
    )
    trained.define_refine(values)
    trained.define_tuned(values)


def check_flags(options: flags.FlagValues) -> None:
    """Refuses no source of images, and two."""
    for name in ("images", "dataset"):
        if options[name].present and not options[name].value:
            raise configs.ConfigError(f"--{name} is empty; name what to predict, or leave the flag out")
    if bool(options.images) == bool(options.dataset):
        two = "are two sources; give one" if options.images else "are the sources; one must be given"
        raise configs.ConfigError(f"--images and --dataset {two}")


def main(tuned: dict | None) -> None:
    """Predicts, and exits with `FAILED` where an image was not predicted."""
    workdir, config, options = command.require("workdir"), command.require("config"), flags.FLAGS
    check_flags(options)
    configs.validate(config, batches=())
    trained.check_tuned(config, tuned, workdir, options.refine)
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
        sys.exit(FAILED)


def run() -> None:
    """Runs the command with the words of the command line."""
    command.run(main, define_flags, doc=__doc__, before_parsing=trained.define_config)
