"""How commands start and end: flags in, one readable line out when something is refused."""

import difflib
import importlib
import os
import pathlib
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection
from typing import Any, NoReturn

import jax
from absl import app, flags
from ml_collections import ConfigDict

from pwcrf_jax import configs
from pwcrf_jax.cli import usage
from pwcrf_jax.cli.main import COMMANDS
from pwcrf_jax.config import agreement, keys, unknown
from pwcrf_jax.data import DataError
from pwcrf_jax.nets import WeightsError
from pwcrf_jax.runtime import compilation, distributed, files, logs, streams
from pwcrf_jax.runtime.checkpoint import CheckpointError
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.runtime.wire import FAILED, REFUSED
from pwcrf_jax.training.guard import NonFiniteError

PATHS = ("config", "workdir", "picture", "images", "output", "report", "scores", "masks", "classes", "parameters",
         "config.init_from", "config.data.source_dir", "config.data.data_dir", "config.data.scores.dir")  # fmt: skip
"""Flags that name a file or a folder."""
MOVED = {"tune-refinement": "tune", "export": "export", "export_size": "export"}
"""Flags that became commands."""
INTERRUPTED = 128 + signal.SIGINT  # what a shell says of a process that Ctrl-C ended
_EXPLAINED = 5.0  # seconds in which a process whose end breaks a sum is known to be gone


def _end(code: int, line: str) -> NoReturn:
    """Ends this process and, of several, the others."""
    print(line, file=sys.stderr)
    distributed.end(code, line.removeprefix("error: "))
    sys.exit(code)


def _one_line(error: BaseException) -> str:
    # Errors of ml_collections hold a message with escaped line ends and quotes around it.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    text = text.replace("\\n", " ").replace("\\'", "'")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return f"no key {text!r}" if isinstance(error, KeyError) and " " not in text else " ".join(text.split())


def _reason(error: Exception, argv: list[str]) -> str:
    """Of what went wrong while the command line was read: the key and what it takes, where it is one."""
    if isinstance(error, flags.UnrecognizedFlagError) and (elsewhere := _elsewhere(error.flagname)):
        return elsewhere
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
    words = " ".join(arg for arg in argv[1:] if arg.lstrip("-").startswith(("config", "noconfig")))
    return f"{_one_line(error)} ({type(error).__name__} while reading {words or 'the command line'})"


def _elsewhere(name: str) -> str | None:
    """A sentence on a flag that other commands have; None: none has it."""
    owners = [MOVED[name]] if name in MOVED else []
    for command in COMMANDS:
        if command != "check":  # which takes a data set, and no workdir
            values = flags.FlagValues()
            importlib.import_module(f"pwcrf_jax.cli.{command}").define_flags(values)
            owners += [command] * (name in values or name.removeprefix("no") in values)
    if owners:
        return f"--{name} is of pwcrf {', '.join(owners)}: see pwcrf {owners[0]} --help"
    return None


def _line_of_file(error: BaseException | None) -> str | None:
    """Where a config file raised, and what its line should have set; None for what was raised elsewhere."""
    while error is not None:
        lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "get_config"]
        if lines:
            at, key = lines[-1], re.match(r"\w+\.([\w.]+)\s*=", lines[-1].line or "")
            entry = keys.of(key[1]) if key else None
            must = f"; config.{key[1]} must be {entry.kind.wanted}" if key and entry else ""
            where = f"{os.path.relpath(at.filename)}, line {at.lineno}: {at.line}"
            return f"{where} ({type(error).__name__}: {_one_line(error)}){must}"
        error = error.__context__  # ml_collections and absl each raise another one
    return None


def define(define_flags: Callable[[flags.FlagValues], None], values: flags.FlagValues) -> None:
    """Defines the flags of a command; they are then the key flags of the program, which --help shows."""
    before = set(values)
    define_flags(values)
    for name in set(values) - before:
        values.register_key_flag_for_module(sys.argv[0], values[name])


def parse(
    argv: list[str],
    values: flags.FlagValues = flags.FLAGS,
    before_parsing: Callable[[list[str]], Any] | None = None,
) -> Any:
    """Reads the command line into flags. Overrides are applied to the config, and config files are run, here.

    Returns:
      What before_parsing(argv) returned.

    Raises:
      ConfigError, FileError: whatever is wrong, in one line.
    """
    try:
        # What a --flagfile holds is of the command line like the rest: its paths, and what is read before the others.
        argv[1:] = values.read_flags_from_files(argv[1:], force_gnu=False)
        _expand_paths(argv)
        read = before_parsing(argv) if before_parsing else None
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
    return read


def run(
    main: Callable[[Any], object],
    define_flags: Callable[[flags.FlagValues], None] = lambda values: None,
    *,
    doc: str | None = "",
    before_parsing: Callable[[list[str]], Any] | None = None,
    before_main: Callable[[], object] | None = None,
    interrupted: str = "stopped by Ctrl-C",
    config_keys: Collection[str] = (),
) -> NoReturn:
    """app.run for a main whose refusals end in one line and exit code 2.

    main(read): gets what before_parsing returned.
    define_flags(values): defines the flags. doc: how the command is used, which --help shows before them.
    before_parsing(argv): defines flags that depend on the command line. before_main(): what comes before all else.
    interrupted: the line that Ctrl-C ends with; the exit code is then 130.
    config_keys: that --config has; (): all of `pwcrf_jax.config.keys`.
    """

    def flags_parser(argv: list[str]) -> Any:
        logs.setup()
        try:
            define(define_flags, flags.FLAGS)
            if text := usage.asked(argv, doc or "", known=config_keys):
                with streams.naming_stdout():
                    print(text)
                sys.exit(0)
            return parse(argv, before_parsing=before_parsing)
        except (ConfigError, files.FileError) as error:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            distributed.refuse(argv, REFUSED, _one_line(error))
            sys.exit(REFUSED)

    def guarded(read: Any) -> None:
        try:
            with streams.naming_stdout():
                if before_main:
                    before_main()
                distributed.agree(lambda: agreement.of_start(require("config")))
                _use_cache()
                main(read)
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


def _of_system(error: OSError) -> files.FileError:
    """The FileError of what the system refused; where it names no file, such as for a socket, it says who asked."""
    if error.filename is not None:
        return files.refused(error.filename, "cannot be used", error)
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(os.path.dirname(at.filename))}/{os.path.basename(at.filename)}, line {at.lineno}"
    return files.FileError(f"the system refused what {where} asked for ({error.strerror or error}); see to its limits, "
                           "memory and network, and start the same command again")  # fmt: skip


def _expand_paths(argv: list[str]) -> None:
    """In place, before anything reads one: a shell expands the tilde of `--workdir ~/x`, not of `--workdir=~/x`."""
    for i, word in enumerate(argv[1:], 1):
        name, equals, value = word.partition("=")
        if name.lstrip("-") not in PATHS or not name.startswith("-"):
            continue
        expanded = lambda value, name=name: files.expand_path(
            config_file(value) if name.lstrip("-") == "config" else value, name
        )
        if equals:
            argv[i] = f"{name}={expanded(value)}"
        elif argv[i + 1 : i + 2]:
            if argv[i + 1].startswith("-"):
                raise ConfigError(f"{name} takes a value, and {argv[i + 1]} follows it")
            argv[i + 1] = expanded(argv[i + 1])


def config_file(value: str) -> str:
    """The file of a config given by name, NAME or NAME:VARIANT; a path (with a dot or a slash) stays as it is.

    Raises:
      ConfigError: the package has no config of that name.
    """
    named = re.fullmatch(r"(\w+)(:\w+)?", value)
    if not named:
        return value
    name, variant = named.groups("")
    folder = pathlib.Path(str(configs.__file__)).parent
    known = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
        raise ConfigError(f"--config={value}: the package has no config of that name; {hint} Files end in .py")
    return f"{folder / name}.py{variant}"


def _use_cache() -> None:
    config = flags.FLAGS["config"].value
    # What main will refuse is left to it.
    # Processes that start together would delete what another is writing.
    if (
        not jax.distributed.is_initialized()
        and isinstance(config, ConfigDict)
        and dict(keys.flat(config)).get("compilation_cache") is True
    ):
        compilation.use()


def require(name: str) -> Any:
    """The value of a flag that must be given."""
    try:
        value = flags.FLAGS[name].value
        hasattr(value, "keys")  # where the config file is not there, ml_collections says so at the first access
    except OSError as error:
        file = getattr(flags.FLAGS[name], "config_filename", "")  # perhaps with a variant, "FILE:NAME"
        if file and not os.path.exists(file.partition(":")[0]):
            raise ConfigError(f"--{name}={file}: there is no such file; name one, or a config such as demo") from None
        raise ConfigError(f"--{name}: {error}") from None
    if name == "config" and flags.FLAGS[name].present and not isinstance(value, ConfigDict):
        raise ConfigError(
            f"--config: get_config() must return an ml_collections.ConfigDict, not {type(value).__name__}"
        )
    if value is None or value == "":
        raise ConfigError(f"--{name} must be given")
    return value
