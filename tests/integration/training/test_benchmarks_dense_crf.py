"""The benchmark of the dense CRF runs whole where its rival is installed, and its last line holds every figure."""

import json
import os
import pathlib

import commands
import numpy as np
import pytest
import small
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[3]


def run(*args):
    env = os.environ | {"XLA_FLAGS": small.FAST_COMPILATION}  # eight devices would share the cores
    return commands.run(["benchmarks/dense_crf.py", *args], env=env)


def test_quick_on_a_folder_of_images(tmp_path):
    pytest.importorskip("pydensecrf", reason="the rival is a dependency of the benchmark alone")
    smooth = np.random.default_rng(0).integers(0, 255, (4, 5, 3)).astype(np.uint8)
    Image.fromarray(smooth).resize((60, 44), Image.Resampling.BILINEAR).save(tmp_path / "one.png")
    done = run("--quick", "--images", tmp_path, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert 0.99 <= out["label_agreement"] <= 1 and 0 <= out["mean_abs_diff"] < 0.01
    assert out["speed_ratio"] > 0 and out["speed_ratio_k60"] > 0
    for ours, theirs in out["filter_errors"].values():
        assert ours <= theirs * 1.001
    assert "colour classes as unaries" in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--images", "nowhere"), "--images nowhere: no such folder"),
        (("--workdir", "nowhere"), "--workdir nowhere: no config.json there"),
        (("--count", "0"), "--count must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(args, said):
    pytest.importorskip("pydensecrf", reason="the rival is a dependency of the benchmark alone")
    done = run(*args)
    assert done.returncode == 2 and said in done.stderr
