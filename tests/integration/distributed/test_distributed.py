"""Several processes on this machine: the same run as one, losses of peers that end, restarts, refusals."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time

import commands
import numpy as np
import pytest
import small
from rows import full_row

from pwcrf_jax import config as configs
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.prediction import restore

ROOT = pathlib.Path(__file__).resolve().parents[3]
DEVICES = 4  # over all processes
HANGS = 540  # seconds, far beyond what any of this takes
KEYS = {
    "optimizer.name": "sgd",  # Adam would hide a gradient that is wrong by a factor
    "optimizer.learning_rate": 0.01,
    "optimizer.warmup_steps": 2,
    "train.eval_every": 6,
    "train.checkpoint_every": 2,
}


def start(tmp_path, workdir, processes, script="train.py", heartbeat=10, other=(), environment=None, **keys):
    """One command of `processes` processes: a list of (process, path of its log).

    other, environment: more flags and variables, of the last process alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    out = []
    for i in range(processes):
        flags = [f"--workdir={workdir}"]
        if script == "train.py":
            flags += small.flags(tmp_path / "prepared", **KEYS | keys)
        if processes > 1:
            flags += [f"--coordinator={address}", f"--num_processes={processes}", f"--process_id={i}"]
            flags += [f"--heartbeat={heartbeat}"]
        variables = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // processes)}
        variables |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # most of the time would be XLA's
        variables |= {"XLA_FLAGS": small.FAST_COMPILATION}
        if i == processes - 1:
            flags, variables = [*flags, *other], variables | (environment or {})
        log = tmp_path / f"{os.path.basename(workdir)}-{time.time_ns()}-{i}.log"
        out.append((commands.start([script, *flags], log, log, env=variables), log))
    return out


def finished(started):
    """Exit codes and logs."""
    try:
        codes = [process.wait(HANGS) for process, _ in started]
    finally:
        for process, _ in started:
            process.kill()
    return codes, [log.read_text() for _, log in started]


def trained(tmp_path, processes, name="", **keys):
    workdir = tmp_path / (name or f"of{processes}")
    codes, logs = finished(start(tmp_path, workdir, processes, **keys))
    assert codes == [0] * processes, logs
    return workdir, logs


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}


def params_of(workdir):
    return restore.restore_params(configs.load(workdir / "config.json"), str(workdir), "latest")[1]


def assert_same_run(one, other):
    import jax

    assert losses(one).keys() == losses(other).keys() == set(range(1, 7))
    np.testing.assert_allclose(list(losses(one).values()), list(losses(other).values()), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params_of(one), params_of(other))


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.full
def test_as_one_process(tmp_path, processes):
    """Training, and then evaluation with the integer confusion matrices of one process."""
    one, _ = trained(tmp_path, 1)
    several, logs = trained(tmp_path, processes)
    assert_same_run(one, several)
    assert "step 6/6" in logs[0] and not any("step 6/6" in log for log in logs[1:])
    codes, logs = finished(start(tmp_path, one, processes, "eval.py"))
    assert codes == [0] * processes, logs
    assert not any("mean IoU" in log for log in logs[1:])
    result = json.loads((one / "eval_val.json").read_text())
    with small.compiled_quickly():
        of_one = evaluate.evaluate(configs.load(one / "config.json"), str(one))
    assert result["num_images"] == of_one["num_images"] == 10
    assert result["rows"] == json.loads(json.dumps(of_one["rows"]))  # quotients of the same integers


@pytest.mark.full
def test_a_lost_process_ends_the_others_and_the_run_goes_on(tmp_path):
    """Killed after its first checkpoint; the number of processes may change, as samples are counted and not steps."""
    whole, _ = trained(tmp_path, 1)
    workdir = tmp_path / "broken"
    started = start(tmp_path, workdir, 2, **{"train.steps": 6, "train.checkpoint_every": 1})
    until = time.monotonic() + HANGS
    while not (workdir / "checkpoints/1").is_dir() and time.monotonic() < until and started[1][0].poll() is None:
        time.sleep(0.02)
    started[1][0].send_signal(signal.SIGKILL)
    codes, logs = finished(started)
    assert codes == [1, -signal.SIGKILL], (codes, logs)
    assert re.search("^error: process 1 on .* is gone", logs[0], re.MULTILINE), logs[0]
    trained(tmp_path, 1, "broken", **{"train.checkpoint_every": 1})
    assert_same_run(whole, workdir)


@pytest.mark.full
def test_sigterm_to_one_stops_all_at_one_step(tmp_path):
    workdir = tmp_path / "stopped"
    started = start(tmp_path, workdir, 2, **{"train.steps": 2000, "train.eval_every": 0})
    until = time.monotonic() + HANGS
    while not (workdir / "checkpoints/2").is_dir() and time.monotonic() < until and started[1][0].poll() is None:
        time.sleep(0.02)
    started[1][0].terminate()
    codes, logs = finished(started)
    assert codes == [143, 143], (codes, logs)
    newest = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())
    assert f"step {newest} is saved" in logs[0]


def patched_package(folder):
    """A copy of the package with one line more, and the environment in which it is the one that is imported."""
    shutil.copytree(ROOT / "pwcrf_jax", folder / "pwcrf_jax", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "pwcrf_jax/metrics.py", "a") as file:
        file.write("# another version\n")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1"}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("other", "environment", "said"),
    [
        (["--config.optimizer.learning_rate=0.02"], {}, "config.optimizer.learning_rate: 0.01 in process 0"),
        full_row((["--config.train.steps=abc"], {}, "config.train.steps = 'abc' must be")),
        pytest.param(["--heartbeat=x"], {}, "flag --heartbeat=x", marks=slow),
        pytest.param(["--num_processes=3"], {}, "--num_processes=3, process 0", marks=slow),
        pytest.param(["--process_id=0"], {}, "two processes were started with --process_id=0", marks=slow),
        pytest.param(["--config=configs/voc_vgg16.py"], {}, "config.", marks=slow),
        pytest.param([], {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"}, "jax_default_matmul_precision", marks=slow),
        pytest.param([], {"JAX_NUM_CPU_DEVICES": "1"}, "the devices: ", marks=slow),
        pytest.param([], "patched", "the source code of pwcrf_jax", marks=slow),
    ],
    ids=lambda x: str(x)[:40],
)
def test_processes_that_are_started_differently_are_refused(tmp_path, other, environment, said):
    """All with one line that says the same, before the workdir is made."""
    if environment == "patched":
        environment = patched_package(tmp_path / "patched")
    started = start(tmp_path, tmp_path / "w", 2, other=other, environment=environment, **{"train.steps": 10**6})
    codes, logs = finished(started)
    assert codes == [2, 2], logs
    lines = [[line for line in log.splitlines() if line.startswith("error: ")] for log in logs]
    assert all(len(line) == 1 and said in line[0] for line in lines), logs
    assert "Traceback" not in "".join(logs) and not (tmp_path / "w").exists()


@slow
def test_processes_that_evaluate_differently_are_refused(tmp_path):
    workdir, _ = trained(tmp_path, 1)
    codes, logs = finished(start(tmp_path, workdir, 2, "eval.py", other=["--checkpoint=latest"]))
    assert codes == [2, 2] and all("--checkpoint: " in log for log in logs), logs


# A program of two processes that sum for ever; one of them has a fault at its 20th sum.
SUMS = """
import os, sys
import jax
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import config_flags
from pwcrf_jax.nets import WeightsError
from pwcrf_jax.cli import command as cli
from pwcrf_jax.runtime import distributed
from pwcrf_jax.training.guard import NonFiniteError
config_flags.DEFINE_config_file("config", "configs/demo.py")
flags.DEFINE_string("workdir", "", "")
distributed.define_flags()
def main(_):
    for step in range(10**9):
        multihost_utils.process_allgather(jax.numpy.ones(()))
        if step == 20 and jax.process_index() == int(os.environ["AT"]):
            exec(os.environ["FAULT"])
cli.run(main, before_main=distributed.start)
"""


def sums(tmp_path, at, fault, found=False, platform="cpu"):
    """Starts `SUMS`: a list of (process, path of its log). found: as in Slurm, else with a coordinator.

    platform: JAX_PLATFORMS of the process `at`.
    """
    script = tmp_path / "sums.py"
    script.write_text(SUMS)
    environment = {"FAULT": fault, "AT": str(at), "PYTHONPATH": str(ROOT)}
    cluster = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for i in range(2):
        flags = ["--distributed"] if found else [f"--coordinator={address}", "--num_processes=2", f"--process_id={i}"]
        flags += ["--heartbeat=5"]
        of_slurm = cluster | {"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"} if found else {}
        log = tmp_path / f"{i}.log"
        variables = os.environ | {"JAX_PLATFORMS": platform if i == at else "cpu"} | environment | of_slurm
        started.append((commands.start([script, *flags], log, log, env=variables), log))
    return started


@pytest.mark.parametrize(
    ("at", "fault", "code", "said"),
    [
        (1, "raise OSError(28, 'No space left', 'w/best')", 2, "w/best cannot be used (No space left)"),
        pytest.param(0, "raise WeightsError('x.h5 is damaged')", 2, "x.h5 is damaged", marks=slow),
        pytest.param(1, "raise NonFiniteError('step 7')", 1, "step 7", marks=slow),
        pytest.param(0, "raise KeyError('lost')", 1, "KeyError: ", marks=slow),
        pytest.param(1, "raise KeyboardInterrupt", 130, "stopped by Ctrl-C", marks=slow),
        pytest.param(1, "os.kill(os.getpid(), 9)", 1, "is gone (killed", marks=slow),
        pytest.param(1, "os._exit(0)", 1, "is gone (killed", marks=slow),
    ],
)
@pytest.mark.parametrize("found", [False, pytest.param(True, marks=slow)], ids=["coordinator", "slurm"])
def test_the_end_of_one_is_the_end_of_all(tmp_path, at, fault, code, said, found):
    """With the code and the line of the one that has the fault, while the other waits for it in a sum."""
    codes, logs = finished(sums(tmp_path, at, fault, found))
    assert codes[1 - at] == code and said in logs[1 - at], (codes, logs)
    assert f"error: process {at} on " in logs[1 - at] and "Traceback" not in logs[1 - at]
    if "os." not in fault:
        assert codes[at] == code and said in logs[at]


@slow
@pytest.mark.parametrize("platform", ["none", "cuda"])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("found", [False, True], ids=["coordinator", "slurm"])
def test_one_without_its_platform_ends_all(tmp_path, at, found, platform):
    """Where JAX finds the cluster there is no connection yet: its service ends the others, by heartbeat."""
    codes, logs = finished(sums(tmp_path, at, "", found, platform))
    line = f"JAX_PLATFORMS={platform}: JAX cannot start"
    assert codes[at] == 2 and f"error: {line}" in logs[at] and "Traceback" not in logs[at], (codes, logs)
    assert codes[1 - at] != 0 and "Traceback" not in logs[1 - at], (codes, logs)
    if not found:
        assert codes[1 - at] == 2 and f"error: process {at} on " in logs[1 - at] and line in logs[1 - at]


@slow
def test_one_that_falls_silent_ends_the_others(tmp_path):
    """Its connections stay, as where a host loses power: JAX's own service tells."""
    started = sums(tmp_path, 1, "os.kill(os.getpid(), 19)")
    try:
        assert started[0][0].wait(HANGS) == -signal.SIGABRT, started[0][1].read_text()
    finally:
        started[1][0].kill()


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=slow)])
@pytest.mark.full
def test_a_port_that_is_in_use_is_one_line(tmp_path, index):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        command = ["train.py", "--config=configs/demo.py", f"--workdir={tmp_path / 'w'}"]
        command += [f"--coordinator={address}", "--num_processes=2", f"--process_id={index}"]
        done = commands.run(command, timeout=HANGS)
    said = f"--coordinator={address}: process 0 cannot listen on port" if index == 0 else "is not process 0 of this run"
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_read_by_bash_and_start_train_py(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    assert "train.py" in script.read_text() and "--distributed" in script.read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coordinator=127.0.0.1:2"], "belong together"),
        full_row((["--num_processes=2", "--process_id=0"], "belong together")),
        full_row((["--coordinator=nowhere", "--num_processes=2", "--process_id=0"], "must be HOST:PORT")),
        full_row((["--coordinator=127.0.0.1:99999", "--num_processes=2", "--process_id=0"], "must be HOST:PORT")),
        full_row((["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"], "count from 0")),
        full_row((["--distributed", "--process_id=1"], "give it alone")),
        (["--distributed"], "JAX finds no cluster here"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, flags, said):
    done = commands.run(["train.py", "--config=configs/demo.py", f"--workdir={tmp_path / 'w'}", *flags])
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
