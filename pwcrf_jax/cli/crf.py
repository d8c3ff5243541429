"""Refines the scores of any network by the dense CRF, in a folder of images.

    pwcrf crf --images photos --scores scores --output out
    pwcrf crf --images photos --scores scores --output out --tune --evaluate --masks masks

Scores are a file for each image, at the same place under the same name: .npy, .npz or .safetensors with an array
[H, W, classes] or [classes, H, W] of logits, probabilities or log-probabilities, of the image's size or smaller; or
label images (.png) with a --confidence. --tune chooses the parameters on labelled images and writes them to
OUTPUT/parameters.json; --evaluate reports others, before and after. Labels go to OUTPUT/labels. The same command again
goes on with what was stopped. The last line of standard output is JSON; exit code 1: some image could not be read.
"""

import json
import sys
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from pwcrf_jax import config as configs
from pwcrf_jax.cli import command, trained
from pwcrf_jax.config import parameters
from pwcrf_jax.data import scores
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.evaluation import score_folder as scoring
from pwcrf_jax.prediction import crf_folder, image_files, output_files, score_folder
from pwcrf_jax.runtime import files
from pwcrf_jax.runtime.logs import log
from pwcrf_jax.runtime.streams import say
from pwcrf_jax.runtime.wire import FAILED


def define_flags(values: flags.FlagValues) -> None:
    """Where images, scores and masks lie, what form they have, what is chosen and reported, and what is written."""
    _define_inputs(values)
    flags.DEFINE_string(
        "output",
        "",
        "Folder for labels and all else; must be given. Example: --images photos --scores scores --output out",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "overlays",
        False,
        "Write the colours of the classes over the image too. Example: --overlays",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "probabilities",
        False,
        "Write the probabilities of all classes too, as .npy [H, W, classes]. Example: --probabilities",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "precision",
        "float16",
        crf_folder.PRECISIONS,
        "Of --probabilities. Example: --probabilities --precision float32",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "overwrite",
        False,
        "Write into a folder that is not empty, and make all again. Example: --output out --overwrite",
        flag_values=values,
    )
    _define_choices(values)


def _define_inputs(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "images",
        "",
        "Refine the labels of these images: a file, a folder with all below it, or a quoted pattern; must be given. "
        "Example: --images photos --scores scores --output out",
        flag_values=values,
    )
    flags.DEFINE_string(
        "scores",
        "",
        "Folder of the scores, one file an image; must be given. Example: --images photos --scores scores --output out",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "layout",
        "auto",
        ["auto", *scores.LAYOUTS],
        "Of the axes of scores: height, width, classes or classes, height, width; auto: found out by the images. "
        "Example: --layout chw",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "kind",
        "auto",
        ["auto", *scores.KINDS],
        "What scores are; auto: found out by their values. Example: --kind logits",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_classes",
        0,
        "Number of classes; 0: that of --classes, or of the scores. Example: --num_classes 21",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_string(
        "classes",
        "",
        "File of names and colours of the classes, one a line, as classes.txt of one's own images. "
        "Example: --classes mine/classes.txt",
        flag_values=values,
    )
    flags.DEFINE_float(
        "confidence",
        0.0,
        "Of label images as scores: how likely a label is right, between 0 and 1. "
        "Example: --scores labels --num_classes 21 --confidence 0.7",
        flag_values=values,
    )


def _define_choices(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "masks",
        "",
        "Folder of masks, for --tune and --evaluate: PNG files of class indices, 255 is void; or as --classes says. "
        "Example: --evaluate --masks masks",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "tune",
        False,
        "Choose the parameters on images with a mask. Example: --tune --masks masks",
        flag_values=values,
    )
    flags.DEFINE_float(
        "tune_share",
        0.0,
        "Share of the images with a mask that --tune takes, those whose names have the least SHA-256; with --evaluate "
        "the others are reported. 0: half with --evaluate, else all. Example: --tune --evaluate --tune_share 0.3",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "trials",
        40,
        "Settings that --tune tries at most. Example: --tune --trials 100",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "evaluate",
        False,
        "Print the table before and after the CRF, of images with a mask that --tune did not take. "
        "Example: --evaluate --masks masks",
        flag_values=values,
    )
    flags.DEFINE_string(
        "parameters",
        "",
        "File of parameters that --tune has written. Example: --parameters out/parameters.json",
        flag_values=values,
    )


def define_config(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> dict[str, str]:
    """Defines --config, the keys of `parameters.KEYS` with the values of --parameters; overrides come after these.

    Returns:
      {name: SHA-256} of the images that --parameters were chosen on.
    """
    config = parameters.crf_defaults()
    path = trained.early(argv[1:], "parameters", "")
    images = parameters.apply_parameters(config, path) if path else {}
    config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True)
    return images


def check_flags(options: flags.FlagValues) -> None:
    """Refuses flags that do not go together."""
    wanting = [name for name in ("tune", "evaluate") if options[name].value]
    if wanting and not options.masks:
        raise configs.ConfigError(f"--{wanting[0]} needs the truth: add --masks DIR")
    if options.masks and not wanting:
        raise configs.ConfigError("--masks is of --tune and --evaluate: add one of them, or leave it out")
    for name, of in (("tune_share", "tune"), ("trials", "tune"), ("precision", "probabilities")):
        if options[name].present and not options[of].value:
            raise configs.ConfigError(f"--{name} is of --{of}: add that, or leave it out")
    if options.tune and options.parameters:
        raise configs.ConfigError("--tune chooses parameters and --parameters names chosen ones; give one of them")
    if options.tune and options.evaluate and options.tune_share == 1:
        raise configs.ConfigError("--tune_share=1: leaves --evaluate no image to report; name a smaller share")


class _Parts(NamedTuple):
    """Images with a mask: those to choose parameters on, and those to report."""

    tuned: list[score_folder.Item]
    reported: list[score_folder.Item]
    share: float


def _parts(folder: score_folder.Folder, options: flags.FlagValues, chosen_on: dict[str, str]) -> _Parts:
    labelled = folder.labelled()
    if not options.tune:
        return _Parts([], scoring.unseen(labelled, chosen_on) if options.evaluate else [], 0.0)
    share = options.tune_share or (0.5 if options.evaluate else 1.0)
    tuned, others = scoring.divide(labelled, share)
    return _Parts(tuned, others if options.evaluate else [], share)


def _tell(folder: score_folder.Folder, parts: _Parts, output: str) -> None:
    """Says what is done, of which images and scores."""
    log.info("%d images with %s of %d classes (%s) into %s", len(folder.items), folder.kind, folder.num_classes,
             folder.layout, output)  # fmt: skip
    output_files.tell(folder.found)
    if parts.tuned:
        log.info(
            "parameters are chosen on %d of the %d images with a mask (--tune_share %g, those whose names have the "
            "least SHA-256)%s", len(parts.tuned), len(folder.labelled()), parts.share,
            f", and the other {len(parts.reported)} are reported" if parts.reported else "",
        )  # fmt: skip


def main(chosen_on: dict[str, str]) -> None:
    """Refines, and exits with `FAILED` where an image could not be read."""
    config, options = command.require("config"), flags.FLAGS
    images, score_files, output = (command.require(name) for name in ("images", "scores", "output"))
    check_flags(options)
    for name, path in (("images", images), ("output", output)):
        files.check_local(path, f"--{name}")
    parameters.check_crf(config)
    given = score_folder.Given(options.layout, options.kind, options.num_classes, options.confidence, options.classes)
    folder = score_folder.scan(images, score_files, output, given, options.masks, config.data.max_pixels)
    configs.check_scored(config, folder.class_names)
    scored = configs.scored_classes(config, folder.class_names)
    parts, settings = _parts(folder, options, chosen_on), configs.refine_settings(config, "full")
    assert settings
    tuning = None
    if options.tune:
        tuning = scoring.tuning_question(parts.tuned, parts.share, options.trials, config.eval.classes)
    wanted = crf_folder.Wanted(options.overlays, options.precision if options.probabilities else "")
    asked = crf_folder.question(folder, settings, wanted, tuning)
    with crf_folder.claimed(output, asked, options.overwrite):
        _tell(folder, parts, output)
        about: dict[str, Any] = {}
        if options.tune:
            settings, found = scoring.tune(
                folder, parts.tuned, settings, output, options.trials, asked=asked, scored=scored
            )
            about = {f"tuned_{name}": round(100 * found[name], 3) for name in ("miou_scores", "miou_crf")}
        failed = crf_folder.refine_folder(folder, settings, output, wanted)
        if options.evaluate:
            about |= _report(folder, parts, output, failed, scored, tuned=bool(options.tune or chosen_on))
    result = dict(
        num_images=len(folder.items) - len(failed), failed=failed, left_out=list(folder.found.left_out),
        num_classes=folder.num_classes, layout=folder.layout, kind=folder.kind, **about, output=output,
    )  # fmt: skip
    if failed:
        log.info("%d images have no results: %s", len(failed), ", ".join(map(image_files.shown, failed[:20])))
    print(json.dumps(result))
    if failed:
        sys.exit(FAILED)


def _report(folder, parts, output, failed, scored, *, tuned) -> dict[str, Any]:
    """Prints the table and what it says; returns its figures in percent."""
    result = scoring.evaluate(folder, parts.reported, output, failed, scored)
    say(f"{evaluate.table(result)}\n\n{scoring.interval_lines(result)}\n{scoring.verdict(result, tuned)}")
    gains = {name: [round(100 * x, 3) for x in rows["gain"]] for name, rows in result["intervals"].items()}
    about = {f"miou_{row}": round(100 * figures["miou"], 3) for row, figures in result["rows"].items()}
    return about | {"reported": result["num_images"], "gain": gains}


def run() -> None:
    """Runs the command with the words of the command line."""
    command.run(
        main,
        define_flags,
        doc=__doc__,
        before_parsing=define_config,
        interrupted="stopped by Ctrl-C; the same command goes on",
        config_keys=parameters.KEYS,
    )
