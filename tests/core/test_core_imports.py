"""Who may import whom, read from the source with `ast`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pwcrf_jax

PACKAGE = Path(pwcrf_jax.__file__).parent
CORE = (
    "arrays",
    "labels",
    "inputs",
    "relations",
    "costs",
    "potentials",
    "likelihood",
    "edge_likelihood",
    "messages",
    "piecewise",
    "objectives",
    "mean_field",
    "arguments",
    "permutohedral",
    "gaussian",
    "dense_crf",
    "metrics",
    "planning",
)
ALLOWED_IN_CORE = {"jax", "numpy", *sys.stdlib_module_names}
FLAGS_AND_CONFIGS = {"absl", "ml_collections"}
PRIVATE = ("jax._src", "jax.lib", "jax.config.update")


def files(folder="."):
    return sorted((PACKAGE / folder).rglob("*.py"))


def imported(source, package="pwcrf_jax"):
    """Every dotted name that an import statement anywhere in the source may load.

    `from a import b` loads a and, where b is a module, a.b: both are listed.
    package resolves relative imports.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(filter(None, [*parent, node.module]))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            names |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    return names


def imports_of(path):
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    return imported(path.read_text(), package)


def uses(source):
    """Every dotted attribute chain, with the names that imports renamed put back."""
    tree, renamed = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            renamed |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            renamed |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    chains = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            chains.add(".".join([renamed.get(first, first), *rest]))
    return chains


def below(name, *roots):
    return any(name == root or name.startswith(root + ".") for root in roots)


def top(name):
    return name.partition(".")[0]


def outside_core(names):
    """Imports that a core module may not have."""
    ours = ("pwcrf_jax", *(f"pwcrf_jax.{m}" for m in CORE))
    exported = {f"pwcrf_jax.{n}" for n in pwcrf_jax.__all__}
    return {
        n
        for n in names
        if top(n) not in ALLOWED_IN_CORE and n not in exported and n != "pwcrf_jax" and not below(n, *ours[1:])
    }


def private(source):
    return {n for n in imported(source) | uses(source) if below(n, *PRIVATE)}


@pytest.mark.parametrize("name", ["__init__", *CORE])
def test_core_imports_jax_numpy_and_core_only(name):
    assert not outside_core(imports_of(PACKAGE / f"{name}.py"))


@pytest.mark.parametrize("name", ["relations", "costs"])
def test_static_arithmetic_knows_no_jax(name):
    assert not {n for n in imports_of(PACKAGE / f"{name}.py") if top(n) in ("jax", "jaxlib") or below(n, "pwcrf_jax")}


def test_nets_know_no_loss_and_no_inference():
    forbidden = tuple(f"pwcrf_jax.{m}" for m in ("piecewise", "mean_field", "training"))
    assert files("nets")
    found = {(p.name, n) for p in files("nets") for n in imports_of(p) if below(n, *forbidden)}
    assert not found


def test_data_knows_no_jax():
    found = {(p.name, n) for p in files("data") for n in imports_of(p) if top(n) in ("jax", "jaxlib", "flax")}
    assert not found
    # Nor by way of our own core, which imports it.
    core = tuple(f"pwcrf_jax.{m}" for m in ("potentials", "piecewise", "mean_field", "metrics", "nets", "training"))
    found = {(p.name, n) for p in files("data") for n in imports_of(p) if below(n, *core)}
    assert not found


def test_no_private_jax_and_no_global_settings():
    assert len(files()) > len(CORE)
    assert not {(p.name, n) for p in files() for n in private(p.read_text())}


def test_flags_and_configs_stay_in_training():
    inside = PACKAGE / "training"
    found = {
        (p.name, n) for p in files() if inside not in p.parents for n in imports_of(p) if top(n) in FLAGS_AND_CONFIGS
    }
    assert not found


def test_importing_the_package_loads_no_framework():
    heavy = "flax tensorflow tensorflow_datasets orbax optax grain matplotlib absl.flags ml_collections".split()
    code = f"import sys, pwcrf_jax; print([m for m in {heavy} if m in sys.modules])"
    path = str(PACKAGE.parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the reader itself: each rule finds a planted violation ----------------------------------------


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import jax._src.core", "jax._src.core"),
        ("from jax import lib", "jax.lib"),
        ("from jax.lib import xla_bridge", "jax.lib"),
        ("import jax\njax.config.update('jax_enable_x64', True)", "jax.config.update"),
        ("from jax import config\nconfig.update('a', 1)", "jax.config.update"),
        ("import jax as j\ndef f():\n    j.config.update('a', 1)", "jax.config.update"),
        ("import jax\nx = jax._src.core.Tracer", "jax._src.core.Tracer"),
    ],
)
def test_private_names_are_found(source, name):
    assert name in private(source)
    assert not private("import jax\nfrom jax import numpy as jnp\nx = jax.library\nconfig.update(a=1)")


@pytest.mark.parametrize(
    "source",
    [
        "import flax.linen as nn",
        "from pwcrf_jax import nets",
        "def f():\n    import optax",
        "from . import training",
        "from .nets import tiny",
        "import importlib\nimportlib.import_module('absl')",
    ],
)
def test_imports_outside_the_core_are_found(source):
    assert outside_core(imported(source))


def test_imports_within_the_core_are_allowed():
    assert not outside_core(imported("import math\nimport jax.numpy as jnp\nfrom pwcrf_jax import messages, relations"))
    assert not outside_core(imported("from pwcrf_jax.potentials import PairwiseTable\nfrom . import relations"))
    assert imported("from ..piecewise import x", "pwcrf_jax.nets") >= {"pwcrf_jax.piecewise"}
