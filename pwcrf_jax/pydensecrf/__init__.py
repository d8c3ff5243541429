"""The names, arguments and arrays of pydensecrf, computed by this package: no compiler, several cores, any NumPy.

    import pwcrf_jax.pydensecrf.densecrf as dcrf
    from pwcrf_jax.pydensecrf.utils import unary_from_softmax

or, for a program that imports `pydensecrf`, `pwcrf_jax.pydensecrf.install()` before it does. What differs is listed in
docs/from-pydensecrf.md.
"""

import sys

from pwcrf_jax.pydensecrf import densecrf, eigen, utils

__all__ = ["densecrf", "eigen", "install", "utils"]


def install() -> None:
    """From here on `import pydensecrf` in this process means this package; call it before the first such import.

    Raises:
      RuntimeError: another pydensecrf has been imported already; what holds its classes would go on using them.
    """
    ours = sys.modules[__name__]
    found = sys.modules.get("pydensecrf", ours)
    if found is not ours:
        where = getattr(found, "__file__", None) or "a module without a file"
        raise RuntimeError(f"install(): expected to come before `import pydensecrf`; got it imported already, {where}")
    sys.modules["pydensecrf"] = ours
    for module in (densecrf, eigen, utils):
        sys.modules[f"pydensecrf.{module.__name__.rpartition('.')[2]}"] = module
