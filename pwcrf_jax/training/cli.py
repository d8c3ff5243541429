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


def _refuse(message) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(REFUSED)


def _one_line(error):
    # Errors of ml_collections hold a message with escaped line ends and quotes around it.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    text = text.replace("\\n", " ").replace("\\'", "'")
    if "Traceback (most recent call last)" in text:  # of a config file that raised: its last line says why
        text = text.strip().splitlines()[-1].strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return f"no key {text!r}" if isinstance(error, KeyError) and " " not in text else " ".join(text.split())


def run(main, before_parsing=None) -> None:
    """app.run for a main(argv) whose refusals end in one line and exit code 2.

    before_parsing(argv): defines flags that depend on the command line.
    """

    def parse(argv):
        # Overrides are applied to the config, and config files are run, while parsing: anything can come out of it.
        try:
            if before_parsing:
                before_parsing(argv)
            rest = flags.FLAGS(argv)
        except ConfigError as error:
            _refuse(_one_line(error))
        except Exception as error:
            given = " ".join(arg for arg in argv[1:] if arg.lstrip("-").startswith("config"))
            _refuse(f"{_one_line(error)} ({type(error).__name__} while reading {given or 'the command line'})")
        if rest[1:]:
            _refuse(f"unknown arguments {' '.join(rest[1:])}; options look like --config.key=value")
        return rest

    def guarded(argv):
        logs.setup()
        try:
            main(argv)
        except (ConfigError, DataError, WeightsError, CheckpointError, OSError) as error:
            _refuse(_one_line(error))
        except NonFiniteError as error:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            sys.exit(FAILED)

    app.run(guarded, flags_parser=parse)


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
