"""What train.py and eval.py share: flags in, one readable line out when something is refused."""

import os
import re
import signal
import sys
import time
import traceback

import jax
from absl import app, flags
from ml_collections import ConfigDict

from pwcrf_jax.cli import usage
from pwcrf_jax.config import agreement, keys, unknown
from pwcrf_jax.data import DataError
from pwcrf_jax.nets import WeightsError
from pwcrf_jax.runtime import compilation, distributed, files, logs, streams
from pwcrf_jax.runtime.checkpoint import CheckpointError
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.runtime.wire import FAILED, REFUSED
from pwcrf_jax.training.guard import NonFiniteError

PATHS = ("config", "workdir", "picture", "images", "output", "export", "report", "report_file", "config.init_from",
         "config.data.source_dir", "config.data.data_dir")  # fmt: skip
"""Flags that name a file or a folder."""
INTERRUPTED = 128 + signal.SIGINT  # what a shell says of a process that Ctrl-C ended


_EXPLAINED = 5.0  # seconds in which a process whose end breaks a sum is known to be gone


def _end(code, line) -> None:
    """Ends this process and, of several, the others."""
    print(line, file=sys.stderr)
    distributed.end(code, line.removeprefix("error: "))
    sys.exit(code)


def _one_line(error):
    # Errors of ml_collections hold a message with escaped line ends and quotes around it.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    text = text.replace("\\n", " ").replace("\\'", "'")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return f"no key {text!r}" if isinstance(error, KeyError) and " " not in text else " ".join(text.split())


def _reason(error, argv):
    """Of what went wrong while the command line was read: the key and what it takes, where it is one."""
    for arg in argv[1:]:
        if (key := re.match(r"--?(?:no)?config\.([\w.]+)", arg)) and (sentence := unknown(key[1])):
            return sentence
    wrong = re.match(r"flag --(?:no)?config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
    if wrong and (entry := keys.of(wrong[1])):
        return entry.kind.refusal(wrong[1], wrong[2])
    if in_file := _line_of_file(error):
        return in_file
    if given := re.match(r"flag --config=(.*):(\w+): .*get_config\(\) takes 0 positional", str(error), re.DOTALL):
        return f"--config={given[1]}:{given[2]}: {given[1]} has no variants; leave out :{given[2]}"
    given = " ".join(arg for arg in argv[1:] if arg.lstrip("-").startswith(("config", "noconfig")))
    return f"{_one_line(error)} ({type(error).__name__} while reading {given or 'the command line'})"


def _line_of_file(error):
    """Where a config file raised, and what its line should have set; None for what was raised elsewhere."""
    while error is not None:
        lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "get_config"]
        if lines:
            at, key = lines[-1], re.match(r"\w+\.([\w.]+)\s*=", lines[-1].line)
            entry = keys.of(key[1]) if key else None
            must = f"; config.{key[1]} must be {entry.kind.wanted}" if entry else ""
            where = f"{os.path.relpath(at.filename)}, line {at.lineno}: {at.line}"
            return f"{where} ({type(error).__name__}: {_one_line(error)}){must}"
        error = error.__context__  # ml_collections and absl each raise another one
    return None


def parse(argv, values=flags.FLAGS, before_parsing=None) -> None:
    """Reads the command line into flags. Overrides are applied to the config, and config files are run, here.

    Raises:
      ConfigError, FileError: whatever is wrong, in one line.
    """
    try:
        # What a --flagfile holds is of the command line like the rest: its paths, and what is read before the others.
        argv[1:] = values.read_flags_from_files(argv[1:], force_gnu=False)
        _expand_paths(argv)
        if before_parsing:
            before_parsing(argv)
        rest = values(argv)
    except (ConfigError, files.FileError):
        raise
    except Exception as error:  # a config file may raise anything
        raise ConfigError(_reason(error, argv)) from None
    # The last one would count, and the others be left out without a word; of overrides that is what is meant.
    if twice := [name for name in values if values[name].present > 1 and not name.startswith("config.")]:
        raise ConfigError(f"--{twice[0]} is given {values[twice[0]].present} times; give it once")
    if rest[1:]:
        raise ConfigError(f"unknown arguments {' '.join(rest[1:])}; options look like --config.key=value")


def run(main, before_parsing=None, before_main=None, interrupted="stopped by Ctrl-C") -> None:
    """app.run for a main(argv) whose refusals end in one line and exit code 2.

    before_parsing(argv): defines flags that depend on the command line. before_main(): what comes before all else.
    interrupted: the line that Ctrl-C ends with; the exit code is then 130.
    """

    def flags_parser(argv):
        logs.setup()
        try:
            if text := usage.asked(argv):
                with streams.naming_stdout():
                    print(text)
                sys.exit(0)
            parse(argv, before_parsing=before_parsing)
        except (ConfigError, files.FileError) as error:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            distributed.refuse(argv, REFUSED, _one_line(error))
            sys.exit(REFUSED)
        return argv[:1]

    def guarded(argv):
        try:
            with streams.naming_stdout():
                if before_main:
                    before_main()
                distributed.agree(lambda: agreement.of_start(require("config")))
                _use_cache()
                main(argv)
        except (ConfigError, DataError, WeightsError, CheckpointError, files.FileError) as error:
            _end(REFUSED, f"error: {_one_line(error)}")
        except NonFiniteError as error:
            _end(FAILED, f"error: {_one_line(error)}")
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one ends what is left without a word
            _end(INTERRUPTED, interrupted)
        except Exception as error:
            if isinstance(error, OSError) and error.errno:  # by the system; libraries raise some of their own
                _end(REFUSED, f"error: {_one_line(_of_system(error))}")
            if not distributed.several():
                raise
            time.sleep(_EXPLAINED)  # where another process has broken a sum, its end is told meanwhile
            traceback.print_exc()
            _end(FAILED, f"error: {type(error).__name__}: {_one_line(error)}")
        finally:  # a good end, or an exit that all share, such as of a run that was asked to stop
            distributed.done()

    app.run(guarded, flags_parser=flags_parser)


def _of_system(error):
    """The FileError of what the system refused; where it names no file, such as for a socket, it says who asked."""
    if error.filename is not None:
        return files.refused(error.filename, "cannot be used", error)
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(os.path.dirname(at.filename))}/{os.path.basename(at.filename)}, line {at.lineno}"
    return files.FileError(f"the system refused what {where} asked for ({error.strerror or error}); see to its limits, "
                           "memory and network, and start the same command again")  # fmt: skip


def _expand_paths(argv):
    """In place, before anything reads one: a shell expands the tilde of `--workdir ~/x`, not of `--workdir=~/x`."""
    for i, word in enumerate(argv[1:], 1):
        name, equals, value = word.partition("=")
        if name.lstrip("-") not in PATHS or not name.startswith("-"):
            continue
        if equals:
            argv[i] = f"{name}={files.expand_path(value, name)}"
        elif argv[i + 1 : i + 2]:
            argv[i + 1] = files.expand_path(argv[i + 1], name)


def _use_cache():
    config = flags.FLAGS["config"].value
    # What main will refuse is left to it.
    # Processes that start together would delete what another is writing.
    if (
        not jax.distributed.is_initialized()
        and isinstance(config, ConfigDict)
        and config.get("compilation_cache") is True
    ):
        compilation.use()


def require(name: str):
    """The value of a flag that must be given."""
    try:
        value = flags.FLAGS[name].value
        hasattr(value, "keys")  # where the config file is not there, ml_collections says so at the first access
    except OSError as error:
        file = getattr(flags.FLAGS[name], "config_filename", "")  # perhaps with a variant, "FILE:NAME"
        if file and not os.path.exists(file.partition(":")[0]):
            raise ConfigError(f"--{name}={file}: there is no such file; name one such as configs/demo.py") from None
        raise ConfigError(f"--{name}: {error}") from None
    if name == "config" and flags.FLAGS[name].present and not isinstance(value, ConfigDict):
        raise ConfigError(
            f"--config: get_config() must return an ml_collections.ConfigDict, not {type(value).__name__}"
        )
    if value is None or value == "":
        raise ConfigError(f"--{name} must be given")
    return value
