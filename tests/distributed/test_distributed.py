"""Several processes on this machine: the same run as one, losses of peers that end, restarts, refusals."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import small

from pwcrf_jax.training import config as configs
from pwcrf_jax.training import evaluate

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEVICES = 4  # over all processes
HANGS = 540  # seconds, far beyond what any of this takes
KEYS = {
    "optimizer.name": "sgd",  # Adam would hide a gradient that is wrong by a factor
    "optimizer.learning_rate": 0.01,
    "optimizer.warmup_steps": 2,
    "train.eval_every": 6,
    "train.checkpoint_every": 2,
}


def start(tmp_path, workdir, processes, script="train.py", heartbeat=10, **keys):
    """One command of `processes` processes: a list of (process, path of its log)."""
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
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // processes)}
        environment.pop("XLA_FLAGS", None)
        log = tmp_path / f"{workdir.name}-{time.time_ns()}-{i}.log"
        with open(log, "w") as file:
            process = subprocess.Popen(
                [sys.executable, ROOT / script, *flags], stdout=file, stderr=file, cwd=ROOT, env=environment
            )
        out.append((process, log))
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
    return evaluate.restore_params(configs.load(workdir / "config.json"), str(workdir), "latest")[1]


def assert_same_run(one, other):
    import jax

    assert losses(one).keys() == losses(other).keys() == set(range(1, 7))
    np.testing.assert_allclose(list(losses(one).values()), list(losses(other).values()), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params_of(one), params_of(other))


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_as_one_process(tmp_path, processes):
    """Training, and then evaluation with the integer confusion matrices of one process."""
    one, _ = trained(tmp_path, 1)
    several, logs = trained(tmp_path, processes)
    assert_same_run(one, several)
    assert "step 6/6" in logs[0] and not any("step 6/6" in log for log in logs[1:])
    results = []
    for count in (1, processes):
        codes, logs = finished(start(tmp_path, one, count, "eval.py"))
        assert codes == [0] * count, logs
        assert not any("mean IoU" in log for log in logs[1:])
        results.append(json.loads((one / "eval_val.json").read_text()))
    assert results[0]["num_images"] == results[1]["num_images"] == 10
    assert results[0]["rows"] == results[1]["rows"]  # quotients of the same integers


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
    assert codes[1] == -signal.SIGKILL and codes[0] != 0, (codes, logs)
    assert re.search("heartbeat|unhealthy|connection|another task", logs[0], re.IGNORECASE), logs[0]
    trained(tmp_path, 1, "broken", **{"train.checkpoint_every": 1})
    assert_same_run(whole, workdir)


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


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_read_by_bash_and_start_train_py(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    assert "train.py" in script.read_text() and "--distributed" in script.read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coordinator=127.0.0.1:2"], "belong together"),
        (["--num_processes=2", "--process_id=0"], "belong together"),
        (["--coordinator=nowhere", "--num_processes=2", "--process_id=0"], "must be HOST:PORT"),
        (["--coordinator=127.0.0.1:99999", "--num_processes=2", "--process_id=0"], "must be HOST:PORT"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "count from 0"),
        (["--distributed", "--process_id=1"], "give it alone"),
        (["--distributed"], "JAX finds no cluster here"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, flags, said):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "train.py",
            f"--config={ROOT / 'configs/demo.py'}",
            f"--workdir={tmp_path / 'w'}",
            *flags,
        ],
        capture_output=True,
        text=True,
        timeout=HANGS,
        cwd=ROOT,
    )
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
