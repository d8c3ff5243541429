"""Checks a data set's images and labels, as training would when it prepares it.

    pwcrf check image_folder --source_dir DIR [--data_dir DIR] [--partial] [--option seed=1] [--scores DIR]

prepares the data set and prints what the label guard saw; with --scores also whether each image of train and val has
scores of its classes, and how right these are. Exit code 2: data, a flag or a path is refused.
"""

import argparse
import ast
import logging
import sys
from collections.abc import Sequence
from typing import Any

from pwcrf_jax.data import DataError, advice, given_scores, label_guard, load_dataset
from pwcrf_jax.data.scores import KINDS, LAYOUTS
from pwcrf_jax.runtime import files
from pwcrf_jax.runtime.streams import naming_stdout, say
from pwcrf_jax.runtime.wire import REFUSED

_ARGUMENTS = {"name": "DATASET"} | {name: f"--{name}" for name in ("source_dir", "data_dir", "partial")}
"""Arguments of `load_dataset` beside the options of a data set: how the command has them."""


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    if key in _ARGUMENTS or key == "cls":  # which Python takes itself
        own = f"; give it as {_ARGUMENTS[key]}" if key in _ARGUMENTS else ""
        raise argparse.ArgumentTypeError(f"{key!r} is no option of a data set{own}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="pwcrf check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="what data.name of a config is")
    parser.add_argument("--source_dir", default="", help="folder of your copy")
    parser.add_argument("--data_dir", default="", help="where prepared data sets are kept")
    parser.add_argument("--partial", action="store_true", help="accept splits without the official number of images")
    parser.add_argument("--option", action="append", default=[], type=_option, metavar="KEY=VALUE",
                        help="an option of the data set")  # fmt: skip
    parser.add_argument("--scores", default="", help="folder of score files, one an image, for the config scores")
    parser.add_argument("--layout", default="auto", choices=("auto", *LAYOUTS), help="axes of a score file")
    parser.add_argument("--kind", default="auto", choices=("auto", *KINDS), help="what a score file holds")
    parser.add_argument("--confidence", default=0.0, type=float, help="of label images as scores, above 0, below 1")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Prints the report or the refusal; returns the exit code."""
    args = parser().parse_args(arguments)
    log = logging.getLogger("pwcrf_jax.data.prepare")
    level = log.level
    log.setLevel(logging.ERROR)  # the report has its warnings
    try:
        data = load_dataset(
            args.dataset,
            source_dir=args.source_dir,
            data_dir=args.data_dir,
            partial=args.partial,
            **dict(args.option),
        )
        report = data.label_report()
        report["warnings"] += advice.of_split(data, "val") if "val" in data.splits else ()
        told = ""
        if args.scores:
            folder = files.expand_path(args.scores, "--scores")
            of = given_scores.ScoreFiles(folder, data.num_classes, args.layout, args.kind, args.confidence)
            told, warnings = given_scores.compared(data, "train", "val", of)
            report["warnings"] += warnings
    except (DataError, files.FileError) as e:
        say(f"refused: {e}")
        return REFUSED
    finally:
        log.setLevel(level)
    read_as = f"read as: {data.form}, {sum(data.splits.values())} images\n" if data.form else ""
    said = label_guard.format_report(report) + f"\n{told}" * bool(told)
    say(f"{args.dataset}, prepared in {data.folder}\n{read_as}{said}")
    return 0


def run() -> None:
    """Runs the command with the words of the command line."""
    try:
        with naming_stdout():
            code = main(sys.argv[1:])
    except files.FileError as e:  # of standard output
        print(f"refused: {e}", file=sys.stderr)
        code = REFUSED
    sys.exit(code)
