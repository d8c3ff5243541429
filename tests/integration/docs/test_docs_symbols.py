"""Every public symbol is documented, with shapes, dtypes or units and refusals, and stands on the site's API pages.

Public is: a name in `__all__` of `pwcrf_jax` and `pwcrf_jax.nets`; in the modules of the functional API and in
`pwcrf_jax.model.segmenter` each function, class and constant at the top without a leading underscore; and methods and
properties of those classes without one. Read from the source, so that constants can have docstrings too: the string
after them, as tools read it.
"""

import ast
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import pwcrf_jax
from pwcrf_jax import nets

ROOT = Path(__file__).resolve().parents[3]
MODULES = (
    *("costs", "dense_crf", "gaussian", "heads", "mean_field", "metrics", "objectives", "permutohedral", "piecewise"),
    "pixels",
    *("potentials", "messages", "likelihood", "relations", "model.plan", "model.segmenter", "model.decode"),
)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

# What neither takes nor returns an array: numbers, names, sizes and trees of them.
NO_ARRAYS = {
    *("costs.Cost", "costs.default_chunk_edges", "costs.sender_runs", "costs.chunk_rows", "costs.pairwise_loss"),
    *("costs.factored_messages", "costs.table_messages", "costs.algorithm", "gaussian.pair", "gaussian.radius_of"),
    *("plan.Row", "plan.Plan", "plan.plan", "relations.Relation", "dense_crf.frame_side", "gaussian.resolve_method"),
    *("nets.LoadReport", "nets.WeightsError", "nets.grid_size", "nets.load_pretrained"),
}

SHAPE = re.compile(r"(?<![\w\])])\[[\w\s.,*+/()']*\]|\bscalars?\b")
DTYPE = re.compile(r"\b(u?int\d*|integers?|float\d*|floating|bool|str|numbers?|dtype|bytes|strings?|exception)\b")
UNIT = re.compile(r"\b(bytes|multiply-adds|cells|edges|pixels|rows|names?|layers|images|standard deviations?)\b")


class Symbol(NamedTuple):
    name: str  # without the package: "relations.offsets", "plan.Plan.summary"
    node: ast.AST
    doc: str
    helpers: dict  # functions of its module by name


def top_level(source, module):
    """The public symbols that a module defines, those of classes included."""
    tree = ast.parse(source)
    helpers = {node.name: node for node in tree.body if isinstance(node, FUNCTION)}
    found = []
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            members = [
                m for m in getattr(node, "body", ()) if isinstance(node, ast.ClassDef) and isinstance(m, FUNCTION)
            ]
            found.append((node.name, node, ast.get_docstring(node)))
            found += [(f"{node.name}.{m.name}", m, ast.get_docstring(m)) for m in members]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            told = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(target, ast.Name):
                found.append((target.id, node, following.value.value if told else None))
    return [
        Symbol(f"{module}.{name}", node, doc or "", helpers)
        for name, node, doc in found
        if not any(part.startswith("_") for part in name.split("."))
    ]


def public():
    files = {m.rpartition(".")[2]: ROOT / "pwcrf_jax" / f"{m.replace('.', '/')}.py" for m in MODULES}
    symbols = [s for name, path in files.items() for s in top_level(path.read_text(), name)]
    for path in sorted((ROOT / "pwcrf_jax/nets").glob("*.py")):
        for symbol in top_level(path.read_text(), "nets"):
            if symbol.name.split(".")[1] in nets.__all__:
                symbols.append(symbol)
    return symbols


def arguments(node):
    """What a caller gives: parameters of a function; annotated fields of a class."""
    if isinstance(node, FUNCTION):
        a = node.args
        named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        return [x.arg for x in named if x.arg not in ("self", "cls")]
    fields = [x.target.id for x in getattr(node, "body", ()) if isinstance(x, ast.AnnAssign)]
    return fields


def raised(node, helpers, seen=()):
    """Names of the exceptions that it raises, or the functions of its module that it calls."""
    names = set()
    for x in ast.walk(node):
        if isinstance(x, ast.Raise) and x.exc:
            names.add(ast.unparse(x.exc.func if isinstance(x.exc, ast.Call) else x.exc))
        elif isinstance(x, ast.Call) and isinstance(x.func, ast.Name) and x.func.id in helpers:
            if x.func.id not in seen and helpers[x.func.id] is not node:
                names |= raised(helpers[x.func.id], helpers, (*seen, x.func.id))
    return names


def faults(symbol):
    """What a docstring lacks, in words."""
    name, node, doc, helpers = symbol
    if not doc:
        return ["no docstring"]
    found = [f"argument {a} is not told" for a in arguments(node) if not re.search(rf"\b{a}\b", doc)]
    member = name.count(".") == 2
    if isinstance(node, (*FUNCTION, ast.ClassDef)) and not member:
        if name not in NO_ARRAYS and not SHAPE.search(doc):
            found.append("no shape")
        if not (DTYPE.search(doc) or (name in NO_ARRAYS and UNIT.search(doc))):
            found.append("no dtype and no unit")
    for exception in raised(node, helpers):
        if not re.search(rf"Raises\b.*\b{exception}", doc, re.DOTALL):
            found.append(f"raises {exception} untold")
    return found


def test_public_symbols_are_told_whole():
    symbols = public()
    assert len(symbols) > 100
    lacking = {symbol.name: missing for symbol in symbols if (missing := faults(symbol))}
    assert not lacking, "\n".join(f"{name}: {', '.join(missing)}" for name, missing in sorted(lacking.items()))
    assert not NO_ARRAYS - {symbol.name for symbol in symbols}


def test_everything_exported_is_public_here():
    known = {symbol.name.rpartition(".")[2] for symbol in public()} | set(MODULES)
    assert not set(pwcrf_jax.__all__) - known
    assert not set(nets.__all__) - known


def test_api_pages_hold_every_module_and_the_navigation_every_page():
    pages = {path.name: path.read_text() for path in (ROOT / "docs/api").glob("*.md")}
    configuration = (ROOT / "mkdocs.yml").read_text()
    for module in (*MODULES, "nets"):
        page = f"{module.rpartition('.')[2]}.md"
        assert f"::: pwcrf_jax.{module}\n" in pages[page]
        assert f"api/{page}" in configuration
    overview = pages["index.md"]
    missing = {name for name in pwcrf_jax.__all__ if f"`pwcrf_jax.{name}`" not in overview}
    assert not missing, "add these to the table of docs/api/index.md"


def test_site_is_built_holds_every_symbol_and_asks_no_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inventory = zlib.decompress((tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    documented = {line.split()[0] for line in inventory.splitlines()}
    assert not {s.name for s in public() if not {f"pwcrf_jax.{s.name}", f"pwcrf_jax.model.{s.name}"} & documented}
    requests = r'<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"'
    asked = {m for page in tmp_path.rglob("*.html") for m in re.findall(requests, page.read_text())}
    assert not {m for m in asked if 'rel="canonical"' not in m}


def test_planted_faults_are_found():
    source = '''
CONSTANT = 3

def bare(x): ...

def poor(x, y):
    """Adds x."""
    _check(x)

def good(x):
    """Adds x, float [N]. Raises ValueError: for others."""
    _check(x)

def _check(x):
    raise ValueError(x)

class Box:
    """A box of x, int []."""
    x: int
    def method(self): ...
'''
    found = {symbol.name: faults(symbol) for symbol in top_level(source, "m")}
    assert found["m.CONSTANT"] == found["m.bare"] == found["m.Box.method"] == ["no docstring"]
    untold = ["argument y is not told", "no shape", "no dtype and no unit", "raises ValueError untold"]
    assert found["m.poor"] == untold
    assert found["m.good"] == found["m.Box"] == []
    assert set(found) == {"m.CONSTANT", "m.bare", "m.poor", "m.good", "m.Box", "m.Box.method"}
