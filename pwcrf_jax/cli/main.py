"""The command line: `pwcrf COMMAND ...`, which is also `python -m pwcrf_jax COMMAND ...`.

A command is a module of this folder: `run()` reads sys.argv, `define_flags(values)` defines its flags. It is imported
when it is asked for; the list of commands needs no more than the base installation.
"""

import difflib
import importlib
import sys

COMMANDS = {
    "train": "train a model, or go on with a run that was stopped",
    "eval": "score a trained run: the table of mean IoU, and with --report a page that shows what the CRF does",
    "predict": "label your own images, or a split of the data set, into files",
    "tune": "choose message weights, iterations and the dense CRF on a validation split",
    "export": "write the predictor, image to labels, as one file for JAX without this package",
    "check": "check the images and labels of a data set",
    "crf": "refine the scores of any network, in files, by the dense CRF",
}
USAGE = "\n".join(
    [
        "Contextual CRFs with CNN unary and pairwise potentials, trained piecewise.",
        "",
        *(f"    pwcrf {name:8} {line}" for name, line in COMMANDS.items()),
        "",
        "pwcrf COMMAND --help shows the flags of a command.",
    ]
)
REFUSED = 2


def main(command: str = "") -> None:
    """Runs a command with the words of sys.argv: `command`, or the one that they begin with."""
    if command:
        sys.argv[0] = f"pwcrf {command}"
    else:
        command = _first(sys.argv[1:])
        sys.argv[:2] = [f"pwcrf {command}"]
    try:
        module = importlib.import_module(f"pwcrf_jax.cli.{command}")
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "pwcrf_jax":
            raise
        _refuse(f'pwcrf {command} needs more packages, such as {error.name}: pip install "pwcrf_jax[train]"')
    module.run()


def _first(words: list[str]) -> str:
    if not words or words[0] in ("help", "-h", "-help", "--help"):
        print(USAGE)
        sys.exit(0)
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, 1)
        hint = f"did you mean pwcrf {near[0]}?" if near else f"name one of {', '.join(COMMANDS)} first"
        _refuse(f"{words[0]!r} is no command; {hint}")
    return words[0]


def _refuse(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(REFUSED)
