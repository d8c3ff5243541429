"""What the commands of a trained run share: its workdir, its config, and what tuning chose for it."""

import argparse
import os

from absl import flags
from ml_collections import ConfigDict, config_flags

from pwcrf_jax import config as configs
from pwcrf_jax.prediction import refinement
from pwcrf_jax.runtime.logs import log

_YES = ("true", "t", "1", "yes", "y")


def define_flags(values: flags.FlagValues) -> None:
    """--workdir and --checkpoint."""
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of a training run; must be given. Example: --workdir runs/demo",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "checkpoint",
        "best",
        ["best", "latest"],
        "Best on validation, or the newest. Example: --checkpoint latest",
        flag_values=values,
    )


def define_tuned(values: flags.FlagValues) -> None:
    """--tuned."""
    flags.DEFINE_bool(
        "tuned",
        True,
        "Use what pwcrf tune wrote into the workdir; flags of yours come before it. Example: --notuned",
        flag_values=values,
    )


def define_refine(values: flags.FlagValues) -> None:
    """--refine, off unless it is given."""
    flags.DEFINE_enum(
        "refine",
        "off",
        refinement.MODES,
        "Dense CRF on the upsampled marginals: its smoothness kernel alone (spatial) or both (full). "
        "Example: --refine full",
        flag_values=values,
    )


def define_config(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> dict | None:
    """Defines --config: that of the workdir which argv names, with the values that tuning chose.

    Those are left out for --notuned, and by commands without that flag. Overrides in argv come after them.

    Returns:
      What `configs.apply_tuned` read; None where nothing of it is used.
    """
    workdir = early(argv[1:], "workdir", "")
    config = configs.load_checked(workdir) if workdir else ConfigDict()
    wanted = "tuned" in values and early(argv[1:], "tuned", "true").lower() in _YES
    wanted = wanted and not {"--notuned", "-notuned"} & set(argv)
    tuned = configs.apply_tuned(config, workdir) if workdir and wanted else None
    config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True)
    return tuned


def early(argv: list[str], name: str, default: str) -> str:
    """A flag that is needed before the others are parsed, as the config lies in the workdir."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"-{name}", default=default, nargs="?", const="true")
    return parser.parse_known_args(argv)[0].__dict__[name]


def check_tuned(config: ConfigDict, tuned: dict | None, workdir: str, refine: str = "off") -> None:
    """Says what tuning chose, and refuses it under other conditions than it was chosen under."""
    if not tuned:
        return
    configs.check_tuned(config, tuned, workdir)
    brief = {key: "one for each label" if key == "crf.label_weights" else x for key, x in tuned["config"].items()}
    chosen = ", ".join(f"{key} = {value}" for key, value in brief.items())
    where = f"{os.path.join(workdir, configs.TUNED)}, chosen on split {tuned['split']}"
    log.info("%s for --refine %s, step %s: %s", where, tuned.get("mode"), tuned.get("step"), chosen)
    if refine not in ("off", tuned.get("mode")):
        log.info("these were chosen for another --refine; tune again for this one, or use --notuned")
