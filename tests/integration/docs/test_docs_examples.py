"""The programs of examples/ run as they are and show what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(folder, name, *arguments):
    """What an example prints, run in a folder of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures(text, label):
    """The numbers of the line that starts with a label."""
    (line,) = [line for line in text.splitlines() if line.startswith(label)]
    return [float(number) for number in re.findall(r"\d+\.?\d*", line.removeprefix(label))]


def told(name):
    """The row of an example in examples/README.md."""
    return re.search(rf"\[{re.escape(name)}\]\({re.escape(name)}\) \|(.*)", (ROOT / "examples/README.md").read_text())[
        1
    ]


def test_every_example_is_run_here_and_listed():
    source = Path(__file__).read_text()
    assert len(EXAMPLES) == 4
    for name in EXAMPLES:
        assert f'run(tmp_path, "{name}"' in source and told(name)


@pytest.mark.slow
def test_toy_grid(tmp_path):
    text = run(tmp_path, "toy_grid.py")
    rows = {label: figures(text, label) for label in ("piecewise", "pseudo-likelihood", "exact likelihood")}
    for unary, mean_field, exact, error in rows.values():
        assert unary + 5 < mean_field <= exact + 1 and 0 < error < 0.2
    # Piecewise training comes near what the exact likelihood reaches, but not beyond it.
    assert rows["exact likelihood"][2] - 3 < rows["piecewise"][2] <= rows["exact likelihood"][2] + 0.5
    for figure in (rows["piecewise"][0], rows["piecewise"][1], rows["exact likelihood"][1]):
        assert any(abs(figure - float(x)) < 0.5 for x in re.findall(r"(\d+\.\d) %", told("toy_grid.py")))


@pytest.mark.slow
def test_dense_crf_photo_on_its_own_picture(tmp_path):
    text = run(tmp_path, "dense_crf_photo.py")
    (before,), (after,) = figures(text, "right before:"), figures(text, "right after:")
    assert 65 < before < 75 and after > 99
    if "not installed" not in text:
        assert figures(text, "same label as pydensecrf:")[0] > 99
    assert Image.open(tmp_path / "dense_crf.png").size == (3 * 160, 120)


@pytest.mark.slow
def test_dense_crf_photo_on_a_photograph(tmp_path):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    coarse.save(tmp_path / "photo.jpg")
    text = run(tmp_path, "dense_crf_photo.py", tmp_path / "photo.jpg", "--output", tmp_path / "out.png")
    assert "right" not in text and figures(text, "changed:")[0] < 50
    assert Image.open(tmp_path / "out.png").size == (3 * 500, 375)


@pytest.mark.slow
def test_nnx_crf(tmp_path):
    text = run(tmp_path, "nnx_crf.py")
    assert figures(text, "step 400: loss")[0] < figures(text, "step 0: loss")[0] / 2
    unary, crf = figures(text, "unary:"), figures(text, "unary + CRF:")
    assert unary[0] < 95 and crf[0] > 98
    assert unary[1] < 70 and crf[1] > 95  # boats and cars: a guess for the network, not for the CRF


@pytest.mark.full
def test_plain_jax_crf(tmp_path):
    source = (ROOT / "examples/plain_jax_crf.py").read_text()
    assert len(source.splitlines()) < 40
    assert re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE) == ["jax", "jax", "numpy", "pwcrf_jax"]
    text = run(tmp_path, "plain_jax_crf.py")
    (unary,), (crf,) = figures(text, "unary:"), figures(text, "unary + CRF:")
    assert unary < 75 and crf > unary + 15
    said = re.findall(r"(\d+\.\d) %", told("plain_jax_crf.py"))
    assert abs(unary - float(said[0])) < 3 and abs(crf - float(said[1])) < 3
