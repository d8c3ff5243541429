"""tpu_programs.py: our steps by the TPU compiler, where libtpu is; their figures, and the plan beside them."""

import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import pytest

from pwcrf_jax.prediction import restore

ROOT = pathlib.Path(__file__).resolve().parents[3]
needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason='needs the TPU compiler: pip install "pwcrf_jax[tpu]"'
)
TEXT = """
  %all-reduce.1 = (f32[2,3]{1,0:T(8,128)}, bf16[4]{0}) all-reduce(%a, %b), replica_groups={{0,1}}
  %start = f32[10]{0} all-reduce-start(%c), replica_groups={{0,1}}
  %done = f32[10]{0} all-reduce-done(%start)
  %gather = s32[] all-gather(%d)
  ROOT %fusion.2 = f32[100]{0} fusion(%e), kind=kLoop, calls=%all-reduce.computation
  %small = pred[7]{0} fusion(%f), kind=kLoop
"""


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES"):
            patch.setenv(name, "cpu")
        yield importlib.import_module("tpu_programs")


def test_figures_of_a_program_by_hand(script):
    collectives, fusions = script.of_text(TEXT)
    assert collectives == {"all-reduce": [2, 6 * 4 + 4 * 2 + 10 * 4], "all-gather": [1, 4]}
    assert fusions == [["fusion.2", 400], ["small", 7]]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mapped_step_is_one_that_this_machine_compiles_too(script, mode):
    """The twin of the pmapped step, on devices that are here: one sum over them, of all gradients."""
    config, devices = script.config_of("demo"), jax.devices()[:2]
    config.model.hidden = 8
    program, model = script.lowered(config, mode, 2, devices)
    text = program.as_text()
    sums = text.count("stablehlo.all_reduce")
    assert sums and "num_partitions = 2" in text
    if mode == "train":
        assert sums >= len(jax.tree.leaves(restore.abstract_params(model)))


def test_rows_are_of_configs_and_chips_that_there_are(script):
    for row in script.ROWS:
        name, mode, chip = row.split(":")
        assert script.config_of(name).data.num_classes > 1 and chip in script.TOPOLOGIES
    assert any(script.config_of(row.split(":")[0]).data.num_classes == 150 for row in script.ROWS)


def compiled(rows, folder):
    command = [sys.executable, ROOT / "benchmarks/tpu_programs.py", "--results", folder, "--rows", *rows]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"tpu_{row.replace(':', '_')}.json").read_text()) for row in rows]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [*(f"demo:{mode}:{chip}" for mode in ("train", "eval") for chip in ("v5e", "v4")), "image_folder:train:v5e"]
    + ["voc_vgg16:train:v5e"],
)
def test_the_tpu_compiler_takes_our_steps_and_the_plan_is_near(row, tmp_path):
    (found,) = compiled([row], tmp_path)
    assert found["devices"] == 4 and found["code"] > 1e6 and set(found["collectives"]) == {"all-reduce"}
    assert found["planned"] == pytest.approx(found["arguments"] + found["temporaries"], rel=0.2)
