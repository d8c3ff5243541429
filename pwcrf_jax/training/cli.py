"""What train.py and eval.py share: flags in, one readable line out when something is refused."""

import sys

from absl import app, flags

from pwcrf_jax.data import DataError
from pwcrf_jax.nets import WeightsError
from pwcrf_jax.training import logs
from pwcrf_jax.training.checkpoint import CheckpointError
from pwcrf_jax.training.config import ConfigError
from pwcrf_jax.training.loop import NonFiniteError

REFUSED = 2
FAILED = 1


def _parse(argv):
    """Flag values are applied to the config while parsing: a misspelled key fails there."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError, ImportError, OSError, SyntaxError) as error:
        given = " ".join(arg for arg in argv[1:] if arg.lstrip("-").startswith("config"))
        print(f"error: {_one_line(error)} (while reading {given})", file=sys.stderr)
        sys.exit(REFUSED)


def _one_line(error):
    # Errors of ml_collections hold a message with escaped line ends and quotes around it.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    text = text.replace("\\n", " ").replace("\\'", "'")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return " ".join(text.split())


def run(main) -> None:
    """app.run for a main(argv) whose refusals end in one line and exit code 2."""

    def guarded(argv):
        if argv[1:]:
            print(
                f"error: unknown arguments {' '.join(argv[1:])}; options look like --config.key=value", file=sys.stderr
            )
            sys.exit(REFUSED)
        logs.setup()
        try:
            main(argv)
        except (ConfigError, DataError, WeightsError, CheckpointError) as error:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            sys.exit(REFUSED)
        except NonFiniteError as error:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            sys.exit(FAILED)

    app.run(guarded, flags_parser=_parse)


def require(name: str):
    """The value of a flag that must be given."""
    try:
        value = flags.FLAGS[name].value
        hasattr(value, "keys")  # where the config file is not there, ml_collections says so at the first access
    except OSError as error:
        raise ConfigError(f"--{name}: {error}") from None
    if value is None or value == "":
        raise ConfigError(f"--{name} must be given")
    return value
