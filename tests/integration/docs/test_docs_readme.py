"""The documents against the code: examples run, paths and names exist, commands are accepted."""

import importlib
import io
import re
import runpy
import shlex
import sys
import tokenize
import types
from pathlib import Path

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from pwcrf_jax import config as configs
from pwcrf_jax.cli import check, command, crf
from pwcrf_jax.data import DATASETS
from pwcrf_jax.runtime import buckets

ROOT = Path(__file__).resolve().parents[3]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "benchmarks/RESULTS.md")
DOCS = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(path.relative_to(ROOT)) for path in DOCS]
URL = re.search(r"^url = (\S+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = "pwcrf_jax|configs|tests|docs|benchmarks|examples|scripts"

each_document = pytest.mark.parametrize("path", DOCS, ids=IDS)


def blocks(text, language):
    return [body for name, body in FENCE.findall(text) if name == language]


def spans(text):
    """What stands between single backticks, outside the fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def paths(text):
    """Words that can only be paths of the repository: below a folder of it, or a source file at its top."""
    words = " ".join([*spans(text), *blocks(text, "bash")])
    below = rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*"
    top = r"(?<![\w/.-])[A-Za-z_]\w*\.(?:py|cfg|toml)(?![\w.])"
    return {word.rstrip(".") for word in re.findall(rf"{below}|{top}", words)}


def anchors(text):
    """GitHub's anchors of the headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def names(text):
    return set(re.findall(r"(?<![\w/.])pwcrf_jax(?:\.[A-Za-z_]\w*)+", text))


def resolve(name):
    """The object of a dotted name; AttributeError where there is none."""
    module, *rest = name.split(".")
    found = importlib.import_module(module)
    for part in rest:
        module = f"{module}.{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError:
                raise AttributeError(name) from None
        found = getattr(found, part)
    return found


def commands(text):
    """Lines of the bash blocks that run our commands and scripts, continuations joined, split into words."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words[:1] in (["python"], ["pwcrf"])]


def keys(text):
    """Config keys in running text: `config.KEY` and `--config.KEY=value`, NAME standing for a relation."""
    found = [re.match(r"(?:--)?config\.([\w.]+)", word) for span in spans(text) for word in span.split()]
    return {m[1].replace("NAME", "surrounding") for m in found if m} - {"json"}


def config_of(argument):
    """The config that an argument of --config names: by name or path, perhaps with a variant."""
    name, _, variant = argument.partition(":")
    get_config = importlib.import_module(f"pwcrf_jax.configs.{Path(name).stem}").get_config
    return get_config(variant) if variant else get_config()


def parse(words, monkeypatch, trained_with=None):
    """The config that a command ends with, checked as the command does.

    trained_with: the config argument of the training run that the command belongs to.
    """
    monkeypatch.chdir(ROOT)
    module, values = importlib.import_module(f"pwcrf_jax.cli.{words[1]}"), flags.FlagValues()
    module.define_flags(values)
    argv = [f"pwcrf {words[1]}", *words[2:]]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for the overrides
    if trained_with:
        config_flags.DEFINE_config_dict("config", config_of(trained_with), flag_values=values, lock_config=True)
    monkeypatch.setattr(buckets, "_NEEDED", ())  # what is installed here is of no interest
    command.parse(argv, values)
    getattr(module, "check_flags", lambda values: None)(values)  # flags that do not go together
    configs.validate(configs.filled(values["config"].value), num_devices=1)
    return values["config"].value


def flag(words, name):
    """Value of --name=value or --name value."""
    joined = " ".join(words)
    found = re.search(rf"--{name}[= ](\S+)", joined)
    return found and found[1]


# --- the documents -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_compilation")
def test_readme_examples_run():
    (code,) = blocks((ROOT / "README.md").read_text(), "python")
    scope = {}
    with jax.default_device(jax.devices("cpu")[0]):
        exec(compile(code, "README.md", "exec"), scope)
    assert scope["log_marginals"].shape == scope["unary"].shape
    assert jax.numpy.isfinite(scope["loss"]) and scope["info"].change.shape == (3, 2)


@pytest.mark.usefixtures("quick_compilation")
def test_dense_crf_example_runs():
    (code,) = blocks((ROOT / "docs/dense-crf.md").read_text(), "python")
    scope = {}
    with jax.default_device(jax.devices("cpu")[0]):
        exec(compile(code, "dense-crf.md", "exec"), scope)
    assert scope["labels"].shape == (2, 40, 60) and jax.numpy.isfinite(scope["to_crf"]) and scope["to_crf"] != 0
    (with_calls_of_pydensecrf,) = blocks((ROOT / "docs/from-pydensecrf.md").read_text(), "python")
    exec(compile(with_calls_of_pydensecrf, "from-pydensecrf.md", "exec"), scope)
    labels, probs = scope["labels"], scope["softmax"]
    assert labels.shape == (12, 18) and (labels != probs.argmax(0)).any() and len(set(labels.flat)) > 1


@pytest.mark.usefixtures("quick_compilation")
def test_examples_of_other_pages_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # its example is tested with the hook
    own_tests = "README.md", "tutorial.md", "dense-crf.md", "from-pydensecrf.md", "behind-other-networks.md"
    pages = [path for path in DOCS if path.name not in own_tests]
    run = 0
    for path in pages:
        for code in blocks(path.read_text(), "python"):
            exec(compile(code, path.name, "exec"), {})
            run += 1
    assert run


def test_tutorial_has_40_lines_and_the_crf_helps(capsys):
    (code,) = blocks((ROOT / "docs" / "tutorial.md").read_text(), "python")
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    lines = {n for t in tokens if t.type not in layout for n in range(t.start[0], t.end[0] + 1)}
    assert len(lines) <= 40
    with jax.default_device(jax.devices("cpu")[0]):
        exec(compile(code, "tutorial.md", "exec"), {})
    unary, crf = (float(x) for x in re.findall(r"([\d.]+)% of cells right", capsys.readouterr().out))
    assert unary < 75 and crf > 90


@each_document
def test_paths_and_links_exist(path):
    text = path.read_text()
    missing = {word for word in paths(text) if not (ROOT / word).exists()}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = in_repository(file) or (path.parent / file if file else path)
        if not in_repository(file) and re.match(r"\w+:", target):
            continue
        if not linked.exists() or (anchor and anchor not in anchors(linked.read_text())):
            missing.add(target)
    assert not missing


def in_repository(link):
    """The file of this repository that an absolute link leads to, or None."""
    for prefix in (f"{URL}/blob/main/", f"{URL}/main/".replace("github.com", "raw.githubusercontent.com")):
        if link.startswith(prefix):
            return ROOT / link.removeprefix(prefix)


def test_readme_can_be_read_elsewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    assert not [x for x in re.findall(r"\]\(([^)\s]+)\)", text) if not x.startswith("https://")], "PyPI has no files"
    (picture,) = re.findall(r"!\[[^]]+\]\((\S+)\)", text)
    assert in_repository(picture).stat().st_size < 150_000


def test_commands_of_tables_have_flags_that_exist():
    for path in DOCS:
        for span in spans(path.read_text()):
            if found := re.match(r"python ((?:benchmarks|scripts)/\w+\.py)", span):
                # Some benchmarks share the arguments of others.
                source = "".join(x.read_text() for x in (ROOT / found[1]).parent.glob("*.py"))
                assert not {x for x in re.findall(r"--\w+", span) if f'"{x}"' not in source}, span


@each_document
def test_dotted_names_exist(path):
    for name in sorted(names(path.read_text())):
        resolve(name)


def test_math_names_the_functional_core():
    assert len(names((ROOT / "docs" / "math.md").read_text())) > 20


def test_design_names_every_room():
    text = (ROOT / "docs" / "design.md").read_text()
    rooms = {f"`{path.parent.relative_to(ROOT)}/`" for path in (ROOT / "pwcrf_jax").rglob("*.py")}
    rooms -= {"`pwcrf_jax/configs/`"}
    assert not {room for room in rooms if room not in text}, "add these to the table of rooms of docs/design.md"


@each_document
def test_config_keys_exist(path):
    config = importlib.import_module("pwcrf_jax.configs.default").get_config()
    assert not {key for key in keys(path.read_text()) if not _has(config, key)}


def _has(config, key):
    for part in key.split("."):
        if part not in config:
            return False
        config = config[part]
    return True


@each_document
def test_commands_are_accepted(path, monkeypatch):
    trained = {"runs/demo-seed0": "configs/demo.py"} if "make demo\n" in path.read_text() else {}
    for words in commands(path.read_text()):
        if words[:2] == ["pwcrf", "check"]:
            assert check.parser().parse_args(words[2:]).dataset in DATASETS
            continue
        if words[:2] == ["pwcrf", "crf"]:
            values = flags.FlagValues()
            crf.define_flags(values)
            command.parse(["pwcrf crf", *words[2:]], values)
            crf.check_flags(values)
            continue
        if words[1].startswith(("examples/", "scripts/")):
            assert (ROOT / words[1]).is_file()  # run by test_docs_examples and test_docs_commands
            if words[1].startswith("scripts/"):
                runpy.run_path(str(ROOT / words[1]))  # what it imports is there
            continue
        workdir = flag(words, "workdir")
        if words[:2] == ["pwcrf", "train"]:
            parse(words, monkeypatch)
            trained[workdir] = flag(words, "config")
        else:
            assert workdir in trained, f"{words} evaluates a workdir that no command before it trains"
            if words[0] == "pwcrf":
                parse(words, monkeypatch, trained[workdir])


@each_document
def test_settings_in_running_text_are_accepted(path, monkeypatch):
    for span in spans(path.read_text()):
        if span.startswith("--config.") and "=" in span:
            parse(shlex.split(f"pwcrf train --config=default {span}"), monkeypatch)


# --- no names of one machine ---------------------------------------------------------------------------

MACHINE = re.compile(r"(?<![\w.~$}/])/(?:work|tmp|root|home)\b/?")
NEIGHBOUR = re.compile(r"\.\./shared")


def sources():
    top = [p for p in ROOT.iterdir() if p.is_file() and p.suffix in {".py", ".md", ".cfg", ".toml"}]
    below = [p for name in FOLDERS.split("|") for p in (ROOT / name).rglob("*") if p.suffix in {".py", ".md"}]
    return [*top, *below, ROOT / "Makefile"]


def test_nothing_names_paths_of_one_machine():
    found = []
    for path in sources():
        if path == Path(__file__).resolve():
            continue
        text = path.read_text()
        inside_tests = ROOT / "tests" in path.parents  # they may look for data beside the checkout
        for pattern in (MACHINE,) if inside_tests else (MACHINE, NEIGHBOUR):
            found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in pattern.finditer(text)]
    assert not found


# --- the readers themselves: each finds a planted fault ------------------------------------------------


def test_planted_faults_are_found(monkeypatch):
    assert paths("`pwcrf_jax/nothing.py` and `nothing.py`, `SegmentationClass/x.png`, `config.json`") == {
        "pwcrf_jax/nothing.py",
        "nothing.py",
    }
    assert names("`pwcrf_jax.metrics.nothing`.") == {"pwcrf_jax.metrics.nothing"}
    with pytest.raises(AttributeError):
        resolve("pwcrf_jax.metrics.nothing")
    with pytest.raises(AttributeError):
        resolve("pwcrf_jax.nothing.metrics")
    assert keys("`--config.nothing.here=3` `config.json` `pwcrf_jax.config.settings`") == {"nothing.here"}
    block = "```bash\npwcrf train --config demo \\\n    --config.nothing=3  # a comment\n```\n"
    (words,) = commands(block)
    assert words[-1] == "--config.nothing=3"
    with pytest.raises(configs.ConfigError, match="config.nothing is not a key"):
        parse(words, monkeypatch)
    for right in ("eval --refine full", "eval --report page.html", "predict --images a.jpg --output out"):
        parse(["pwcrf", *right.split(), "--workdir", "runs/demo"], monkeypatch, "demo")
    for wrong in ("eval --refine fulll", "tune --trials=0", "eval --report auto --report_images=many", "eval --nothing",
                  "eval --tuned=perhaps", "eval --images=a", "predict --output out"):  # fmt: skip
        with pytest.raises(configs.ConfigError):
            parse(["pwcrf", *wrong.split(), "--workdir", "runs/demo"], monkeypatch, "configs/demo.py")
    with pytest.raises(configs.ConfigError, match="num_processes"):
        parse(["pwcrf", "train", "--config=demo", "--num_processes=two"], monkeypatch)
    assert MACHINE.search("in /tmp/run") and not MACHINE.search("~/tmp/run, a/work/b, https://x.org/work")
