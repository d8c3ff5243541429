"""Refusals that no other test meets: one line, exit code 2, and nothing is made."""

import os

import commands
import pytest
import small

from pwcrf_jax import config as configs
from pwcrf_jax.model.plan import Plan, Row


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    configs.save(small.config(tmp_path / "sets"), folder / configs.CONFIG)
    return folder


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "--config=demo", "--picture=a.png"], "--picture is of --dry-run: add that, or leave it out"),
        (["train", "--config=demo", "--workdir=a"], "--workdir is given 2 times; give it once"),
        (["predict", "--images="], "--images is empty; name what to predict, or leave the flag out"),
        (["predict", "--images=a", "--dataset=val"], "--images and --dataset are two sources; give one"),
        (["eval", "--report_images=3"], "--report_images is of --report: add --report FILE, or leave the flag out"),
        (["eval", "--size=3x4"], "--size is of pwcrf export: see pwcrf export --help"),
    ],
)
def test_flags_that_do_not_go_together(words, line, workdir):
    done = commands.run(["-m", "pwcrf_jax", *words, f"--workdir={workdir}"], cwd=workdir.parent)
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")
    assert os.listdir(workdir) == [configs.CONFIG]


def test_a_row_that_the_plan_does_not_have():
    plan = Plan(1, (8, 8), (2, 2), (Row("unary", 1, 2), Row("step", 1, 2)))
    assert plan["step"].name == "step"
    with pytest.raises(KeyError, match="the plan has no row 'loss'; it has 'unary', 'step'"):
        plan["loss"]
