"""training.py: refuses what it cannot measure, and its quick form runs whole where PyTorch is installed."""

import importlib
import importlib.util
import json
import os
import pathlib

import commands
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("training")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--starts", "-1"], "--starts must be at least 0"),
        (["--cores", "1", "100000"], "--cores 100000: this process may use 1 to "),
        (["--networks", "vgg16"], "invalid choice: 'vgg16'"),
    ],
)
def test_wrong_arguments_are_refused(training, monkeypatch, capsys, args, said):
    monkeypatch.setattr("sys.argv", ["training.py", *args])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # wrong arguments come first
    with pytest.raises(SystemExit, match="2"):
        training.main()
    assert said in capsys.readouterr().err


def test_without_pytorch_it_says_what_to_install(training, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training.py"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "timm") else True)
    with pytest.raises(SystemExit, match="2"):
        training.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("error: torch, timm not installed: pip install 'pwcrf_jax[bench-torch]'")


def test_full_sizes_and_cores_are_the_default(training, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for words, cores, sizes, repeats in (([], [4, 1], training.FULL, 15), (["--quick"], [4], training.QUICK, 2)):
        monkeypatch.setattr("sys.argv", ["training.py", *words])
        args = training.parsed()
        assert (args.cores, training.sizes_of(args), args.repeats) == (cores, sizes, repeats)


def test_labels_lie_in_blocks_and_some_are_void(training):
    batch = training.batch_of((50, 70), 3)
    label = batch["label"]
    assert batch["image"].shape == (3, 50, 70, 3) and label.shape == (3, 50, 70) and label.dtype == "uint8"
    assert set(label.ravel()) <= {*range(training.NUM_CLASSES), 255} and 255 in label
    assert (label[:, :24, :24] == label[:, :1, :1]).all() and (batch["valid_box"] == [0, 0, 50, 70]).all()


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mobilenet_v2", "efficientnet_lite0"])
def test_quick_form_agrees_with_pytorch(network):
    """Agreement of outputs, losses and counts is the script's own first step: it ends where it fails."""
    for name in ("torch", "torchvision", "timm"):
        pytest.importorskip(name, reason=f"{name} is a dependency of the benchmark alone")
    env = os.environ | {"XLA_FLAGS": ""}  # one device; and the older emitters take minutes for these networks
    done = commands.run(["benchmarks/training.py", "--quick", "--networks", network], env=env, timeout=1500)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    (figures,) = out["figures"].values()
    assert figures["differ"]["scores"] <= 1e-3 and figures["parameters"] > 1e6
    for what in ("training", "evaluation"):
        assert set(figures[what]["images_per_second"]) == {"ours", "PyTorch"} and figures[what]["ratio"] > 0
    assert set(figures["start_up_seconds"]) == {"ours, empty cache", "ours, filled cache", "PyTorch"}
