"""What --help says: how the script is used, then each flag with its default and an example.

The help text of a flag ends with "Example: ...", which is shown on a line of its own.
"""

import shlex
import sys
import textwrap

from absl import flags

from pwcrf_jax.config import keys

_SHORT, _FULL = {"--help", "-help", "-h", "--helpshort", "-helpshort"}, {"--helpfull", "-helpfull"}


def asked(argv) -> str | None:
    """What to print where the command line asks for help, else None."""
    words = set(argv[1 : argv.index("--")] if "--" in argv else argv[1:])
    if words & _FULL:
        return "\n".join([_ours(), _keys(), _of_libraries()])
    if words & _SHORT:
        return f"{_ours()}\n\n--helpfull lists the keys of --config.KEY=VALUE too, and the flags of libraries."
    return None


def _own_flags():
    """Of the script and of modules whose flags it adopted, in the order in which they were defined."""
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    known = list(flags.FLAGS)
    return sorted(own, key=lambda flag: known.index(flag.name))


def _ours():
    lines = [sys.modules["__main__"].__doc__.strip(), "", "Flags:", ""]
    for flag in _own_flags():
        text, _, example = " ".join(flag.help.split()).partition(" Example: ")
        name = f"[no]{flag.name}" if flag.boolean else flag.name
        values = ""
        if hasattr(flag.parser, "enum_values"):
            values = "|".join(flag.parser.enum_values)
            text, values = text.removeprefix(f"<{values}>: "), f"={values}"  # absl puts them there
        default = "none" if flag.default in (None, "") else (flag.default_as_str or "").strip("'")
        lines.append(f"  --{name}{values}  (default: {default})")
        lines += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append(f"      Example: {example}")
    return "\n".join(lines)


def _keys():
    """The keys of a configuration, each with its default, the values that it takes and its meaning."""
    entries = keys.KEYS | {f"relations.NAME.{name}": entry for name, entry in keys.RELATION.items()}
    lines = ["", "Keys of the configuration, with defaults:", ""]
    for name, entry in entries.items():
        lines.append(f"  --config.{name}={shlex.quote(str(entry.default).replace(' ', ''))}")
        text = f"{entry.meaning} ({entry.kind.wanted})"
        lines += textwrap.wrap(text, 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _of_libraries():
    ours = {flag.name for flag in _own_flags()}
    lines = ["", "Flags of libraries:"]
    for module, found in sorted(flags.FLAGS.flags_by_module_dict().items()):
        if not ours & {flag.name for flag in found}:
            lines.append(flags.FLAGS.module_help(module))
    return "\n".join(lines)
