"""The pairwise benchmark runs whole on a small map, and its last line holds every figure."""

import importlib.util
import json
import math
import os
from pathlib import Path

import commands
import pytest
import small

from pwcrf_jax import likelihood

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "benchmarks" / "pairwise.py"
FIGURES = (
    "loss_speedup_k21",
    "loss_memory_ratio_k21",
    "mf_speedup_k21",
    "mf_speedup_k60",
    "mf_memory_ratio_k60",
    "mf_temp_gb_k150",
    "gemm_share_k60",
)
MEAN_FIELD = {"tables", "ours", "ours factored", "ours table"}


def positive(x):
    return isinstance(x, (int, float)) and math.isfinite(x) and x > 0


def run(*args):
    env = os.environ | {"XLA_FLAGS": small.FAST_COMPILATION}  # eight devices would share the cores
    return commands.run([SCRIPT, *args], env=env)


@pytest.mark.slow
def test_quick(tmp_path):
    plots = importlib.util.find_spec("matplotlib") is not None
    done = run("--quick", "--no-train-step", *(["--output", tmp_path] if plots else []))
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    for name in FIGURES:
        assert positive(out[name]), (name, out[name])
    rivals = {}
    for row in out["rows"]:
        rivals.setdefault((row["task"], row["classes"]), set()).add(row["rival"])
        assert all(positive(row[key]) for key in ("seconds", "temp_bytes", "gflops_per_second", "gemm_share")), row
    assert rivals == {
        ("loss", 21): {"concat", "tables", "ours"},
        ("loss", 60): {"tables", "ours"},
        ("mean field", 21): {"concat", *MEAN_FIELD},
        ("mean field", 60): MEAN_FIELD,
        ("mean field", 150): {"ours"},
    }
    assert all(positive(row["seconds"]) and positive(row["temp_bytes"]) for row in out["sweep"]["rows"])
    assert math.isfinite(out["sweep"]["seconds"]["r_squared"])
    assert [path.name for path in tmp_path.iterdir()] == (["pairwise_offsets.png"] if plots else [])


def test_unknown_names_are_refused():
    done = run("--tasks", "losses")
    assert done.returncode == 2 and "'losses' is not one of mean field, loss, sweep" in done.stderr


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("pairwise")


def test_disagreement_is_refused(script, monkeypatch):
    original = likelihood.pairwise_log_likelihood
    wrong = lambda *args: (1.01 * original(*args)[0], None)
    monkeypatch.setattr(likelihood, "pairwise_log_likelihood", wrong)
    with pytest.raises(SystemExit, match="ours and concat differ in"):
        script.measure("loss", script.Size(4, 5, 8, 8, product_rows=8), "full", 3, repeats=1, patience=1.0)


def test_rivals_that_do_not_fit_are_scaled(script, monkeypatch, capsys):
    size = script.Size(6, 7, 8, 8, product_rows=8, concat_up_to=0)
    measure = lambda: script.measure("loss", size, "full", 20, repeats=1, patience=1.0)
    tables = measure()[0]
    monkeypatch.setattr(script, "available_bytes", lambda device: tables["temp_bytes"])
    capsys.readouterr()
    scaled = measure()[0]
    assert scaled["rival"] == tables["rival"] == "tables" and tables["scaled_from_edges"] is None
    assert 0 < scaled["scaled_from_edges"] < tables["edges"] == scaled["edges"]
    assert scaled["temp_bytes"] == pytest.approx(tables["temp_bytes"], rel=0.5)
    printed = capsys.readouterr().out
    assert "* tables: does not fit in" in printed and f"of {tables['edges']} edges" in printed


def test_train_step_doubles_the_batch_while_it_fits(script, config, monkeypatch, capsys):
    config.model.parameterisation = "free"
    config.model.relations = ("surrounding",)
    needs = iter([1, 10**18])
    module = importlib.import_module("train_step")  # beside the script
    monkeypatch.setattr(module, "needed_bytes", lambda memory: next(needs))
    rows = module.train_step_rows(config, (48, 64), ("float32",), repeats=1)
    assert [row["batch"] for row in rows] == [1]
    assert positive(rows[0]["images_per_second"])
    assert "2  does not fit" in capsys.readouterr().out
