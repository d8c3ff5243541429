"""The text of --help: how the command is used, then each flag with its default and an example.

The help text of a flag ends with "Example: ...", which is shown on a line of its own.
"""

import shlex
import sys
import textwrap
from collections.abc import Collection

from absl import flags

from pwcrf_jax.config import keys

_SHORT, _FULL = {"--help", "-help", "-h", "--helpshort", "-helpshort"}, {"--helpfull", "-helpfull"}


def asked(argv: list[str], doc: str, values: flags.FlagValues = flags.FLAGS, known: Collection[str] = ()) -> str | None:
    """The text to print where the command line asks for help, else None.

    doc: how the command is used. known: keys of its --config; (): all.
    """
    words = set(argv[1 : argv.index("--")] if "--" in argv else argv[1:])
    if words & _FULL:
        return "\n".join([_ours(doc, values), _keys(known), _of_libraries(values)])
    if words & _SHORT:
        return (
            f"{_ours(doc, values)}\n\n--helpfull lists the keys of --config.KEY=VALUE too, and the flags of libraries."
        )
    return None


def _own_flags(values: flags.FlagValues) -> list[flags.Flag]:
    """Flags of the command, in the order in which they were defined."""
    known = list(values)
    return sorted(values.get_key_flags_for_module(sys.argv[0]), key=lambda flag: known.index(flag.name))


def _ours(doc: str, values: flags.FlagValues) -> str:
    lines = [doc.strip(), "", "Flags:", ""]
    for flag in _own_flags(values):
        text, _, example = " ".join(flag.help.split()).partition(" Example: ")
        name = f"[no]{flag.name}" if flag.boolean else flag.name
        choices = ""
        if hasattr(flag.parser, "enum_values"):
            choices = "|".join(flag.parser.enum_values)
            text, choices = text.removeprefix(f"<{choices}>: "), f"={choices}"  # absl puts them there
        default = "none" if flag.default in (None, "") else (flag.default_as_str or "").strip("'")
        lines.append(f"  --{name}{choices}  (default: {default})")
        lines += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append(f"      Example: {example}")
    return "\n".join(lines)


def _keys(known: Collection[str] = ()) -> str:
    """The keys of a configuration, each with its default, the values that it takes and its meaning."""
    entries = keys.KEYS | {f"relations.NAME.{name}": entry for name, entry in keys.RELATION.items()}
    entries = {name: entry for name, entry in entries.items() if not known or name in known}
    lines = ["", "Keys of the configuration, with defaults:", ""]
    for name, entry in entries.items():
        lines.append(f"  --config.{name}={shlex.quote(str(entry.default).replace(' ', ''))}")
        text = f"{entry.meaning} ({entry.kind.wanted})"
        lines += textwrap.wrap(text, 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _of_libraries(values: flags.FlagValues) -> str:
    ours = {flag.name for flag in _own_flags(values)}
    lines = ["", "Flags of libraries:"]
    for module, found in sorted(values.flags_by_module_dict().items()):
        if not ours & {flag.name for flag in found}:
            lines.append(values.module_help(module))
    return "\n".join(lines)
