"""The rooms of the package and its rules, read from the source with `ast` (docs/design.md)."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pwcrf_jax

PACKAGE = Path(pwcrf_jax.__file__).parent
ROOMS = (
    *("core", "pydensecrf", "nets", "model", "runtime", "data", "config", "prediction", "evaluation", "report"),
    *("training", "cli"),
)
"""Nothing imports from a room that stands after its own. The core is what lies at the top of the package."""
LIBRARIES = {
    # Beside the standard library and those of the rooms before. `data` takes none but its own: it knows no jax.
    "core": {"jax", "numpy"},
    "pydensecrf": set(),
    "nets": {"flax", "h5py", "safetensors"},
    "model": set(),
    "runtime": {"orbax", "absl", "tqdm", "tensorboardX", "etils", "optax", "PIL", "fsspec", "gcsfs"},
    "data": {"numpy", "PIL", "grain", "tensorflow_datasets", "array_record", "scipy", "h5py", "yaml", "pycocotools",
             "importlib_resources", "tqdm", "etils"},
    "config": {"ml_collections"},
    "prediction": {"flatbuffers", "onnx", "onnxruntime"},
    "evaluation": set(),
    "report": set(),
    "training": {"optax"},
    "cli": set(),
}  # fmt: skip
PRIVATE = ("jax._src", "jax.lib", "jax.config.update")
FILE, FUNCTION, PARAMETERS = 400, 60, 7  # lines, lines without docstring, positional parameters


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "core"


def sources():
    found = sorted(PACKAGE.rglob("*.py"))
    assert len(found) > 50
    return [(path, path.read_text()) for path in found]


def imported(source: str, package: str = "pwcrf_jax") -> set[str]:
    """Dotted names that an import statement, or a call of import_module, may load; of `from a import b` a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(filter(None, [*parent, node.module]))
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    return names


def upward(source: str, here: str, package: str = "pwcrf_jax") -> set[str]:
    """Imports of rooms after `here`."""
    ours = {n for n in imported(source, package) if n.partition(".")[0] == "pwcrf_jax" and "." in n}
    of = lambda name: name.split(".")[1] if name.split(".")[1] in ROOMS else "core"
    return {name for name in ours if ROOMS.index(of(name)) > ROOMS.index(here)}


def foreign(source: str, here: str, package: str = "pwcrf_jax") -> set[str]:
    """Imports of libraries that a room does not have: neither its own nor those of rooms before it."""
    before = ROOMS[: ROOMS.index(here) + 1] if here != "data" else ("data",)
    allowed = {"pwcrf_jax", *sys.stdlib_module_names}.union(*(LIBRARIES[r] for r in before))
    return {n for n in imported(source, package) if n.partition(".")[0] not in allowed}


def uses(source: str) -> set[str]:
    """Dotted attribute chains, with the names that imports renamed put back."""
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


def private(source: str) -> set[str]:
    below = lambda name: any(name == root or name.startswith(f"{root}.") for root in PRIVATE)
    return {n for n in imported(source) | uses(source) if below(n)}


def oversized(source: str) -> set[str]:
    """Names of functions that are too long or take too much by position."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        doc = node.body[0] if ast.get_docstring(node) else None
        lines = node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)
        positional = [a.arg for a in node.args.posonlyargs + node.args.args]
        if lines > FUNCTION or len(positional) - (positional[:1] in (["self"], ["cls"])) > PARAMETERS:
            found.add(node.name)
    return found


def by_string_key(source: str) -> set[str]:
    """Settings that are read as SETTINGS["key"], SETTINGS.get("key") or getattr(SETTINGS, "key")."""
    found = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Subscript | ast.Call)}
    ways = r"""(getattr\()?(\w+\.)*(\w*config|\w*settings|crf)(\.\w+)*(\[|\.get\(|, )f?['"]"""
    calls = lambda text: text.startswith("getattr(") or ", " not in re.match(ways, text)[0]
    return {text for text in found if re.match(ways, text) and calls(text)}


def test_every_folder_is_a_room():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and list(p.glob("*.py"))} - {"__pycache__", "configs"}
    assert folders == set(ROOMS) - {"core"}


def test_nothing_imports_upwards():
    found = {}
    for path, source in sources():
        package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
        if path.parent == PACKAGE and path.name in ("__init__.py", "__main__.py"):
            continue  # they name what the package shows; see test_the_base_needs_jax_and_numpy_alone
        if room(path) != "configs" and (names := upward(source, room(path), package)):
            found[str(path.relative_to(PACKAGE))] = names
    assert not found


def test_nothing_imports_what_its_room_does_not_have():
    found = {}
    for path, source in sources():
        package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
        if room(path) != "configs" and (names := foreign(source, room(path), package)):
            found[str(path.relative_to(PACKAGE))] = names
    assert not found


def test_data_knows_no_array_of_a_device():
    ours = tuple(f"pwcrf_jax.{r}" for r in ("nets", "model"))
    core = {f"pwcrf_jax.{p.stem}" for p in PACKAGE.glob("*.py")}
    for path, source in sources():
        if room(path) == "data":
            names = imported(source)
            assert not {n for n in names if n.startswith(ours) or ".".join(n.split(".")[:2]) in core}, path


def test_static_arithmetic_knows_no_jax():
    for name in ("relations", "costs"):
        names = imported((PACKAGE / f"{name}.py").read_text())
        assert not {n for n in names if n.partition(".")[0] in ("jax", "jaxlib", "pwcrf_jax")}, name


def test_nets_know_no_loss_and_no_inference():
    losses = tuple(f"pwcrf_jax.{m}" for m in ("piecewise", "objectives", "likelihood", "messages", "mean_field"))
    assert not {n for p, source in sources() if room(p) == "nets" for n in imported(source) if n.startswith(losses)}


def test_public_jax_alone_and_no_global_settings():
    assert not {(path.name, name) for path, source in sources() for name in private(source)}


def test_files_and_functions_are_short():
    found = {str(p.relative_to(PACKAGE)) for p, source in sources() if len(source.splitlines()) > FILE}
    found |= {f"{p.relative_to(PACKAGE)}:{name}" for p, source in sources() for name in oversized(source)}
    assert not found


def test_settings_are_read_by_string_key_in_config_alone():
    found = {p.name: names for p, source in sources() if room(p) != "config" if (names := by_string_key(source))}
    assert not found


def test_the_core_is_typed_by_rule():
    """setup.cfg names each file of the core, as it has no pattern for files of a folder alone; and the drop-in."""
    settings = configparser.ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg")
    (named,) = [name for name in settings.sections() if name.startswith("mypy-pwcrf_jax.")]
    core = {f"pwcrf_jax.{p.stem}" for p in PACKAGE.glob("*.py")} - {"pwcrf_jax.__init__", "pwcrf_jax.__main__"}
    core |= {"pwcrf_jax.pydensecrf.*"}
    assert set(named.removeprefix("mypy-").split(",")) == core
    assert settings[named].getboolean("disallow_untyped_defs")


def test_the_base_needs_jax_and_numpy_alone():
    code = (
        "import sys\nbefore = set(sys.modules)\nimport jax, jax.export, numpy\nbase = set(sys.modules)\n"
        "import pwcrf_jax\nnew = {m.partition('.')[0] for m in set(sys.modules) - base}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'pwcrf_jax', 'jax', 'jaxlib', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the readers themselves: each rule finds a planted violation ------------------------------------


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import jax._src.core", "jax._src.core"),
        ("from jax import lib", "jax.lib"),
        ("from jax.lib import xla_bridge", "jax.lib.xla_bridge"),
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
    ("source", "here"),
    [
        ("from pwcrf_jax import nets", "core"),
        ("def f():\n    from pwcrf_jax.training import loop", "evaluation"),
        ("from pwcrf_jax.model import segmenter", "nets"),
        ("import importlib\nimportlib.import_module('pwcrf_jax.cli.train')", "training"),
    ],
)
def test_upward_imports_are_found(source, here):
    assert upward(source, here)
    assert not upward("from pwcrf_jax import relations\nfrom pwcrf_jax.nets import tiny", "model")
    assert upward("from . import cli", "core") and not upward("from ..piecewise import x", "nets", "pwcrf_jax.nets")


@pytest.mark.parametrize(
    ("source", "here"),
    [
        ("import flax.linen as nn", "core"),
        ("import jax", "data"),
        ("def f():\n    import optax", "nets"),
        ("import configs", "training"),
        ("import importlib\nimportlib.import_module('absl')", "model"),
    ],
)
def test_foreign_imports_are_found(source, here):
    assert foreign(source, here)
    assert not foreign("import math\nimport jax.numpy as jnp\nimport flax", "nets")


@pytest.mark.parametrize(
    "source",
    [
        "loss_config['reduction']", "a.settings['x']", "config.crf['x']", "config[f'{x}']", "config.get('x')",
        "getattr(config.crf, 'x')",
    ],
)  # fmt: skip
def test_settings_by_string_key_are_found(source):
    assert by_string_key(source)
    assert not by_string_key("config.crf.damping\nresult['config']\nsettings[0]\nconfig.relations[name]")


def test_oversized_functions_are_found():
    assert oversized("def f(a, b, c, d, e, f, g, h):\n    pass") == {"f"}
    assert oversized("def f():\n" + "    x = 1\n" * FUNCTION) == {"f"}
    assert not oversized("class C:\n    def f(self, a, b, c, d, e, f, g, *, h):\n        pass")
    assert not oversized("def f():\n    '''" + "doc\n" * 70 + "'''\n" + "    x = 1\n" * (FUNCTION - 1))
