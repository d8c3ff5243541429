"""Runs that are stopped, damaged or out of room: they end with one line, and go on as if nothing had been."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys

import commands
import pytest
import small
from faults import states
from faults.kill import KEYS, ROOT
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pwcrf_jax import config as configs
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import checkpoint, logs, preemption
from pwcrf_jax.runtime.files import FileError
from pwcrf_jax.runtime.logs import log
from pwcrf_jax.training import checks, loop


@pytest.fixture(autouse=True)
def _log_is_seen(monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger=log.name)


@pytest.fixture
def work(whole, tmp_path):
    """A copy of the whole run, to be spoiled."""
    return shutil.copytree(whole, tmp_path / "work")


def _stop_at(monkeypatch, call):
    """The request to stop comes with this call of `requested`: one a step, and one a batch of evaluation."""
    answers = iter([False] * (call - 1) + [True] * 99)
    monkeypatch.setattr(preemption, "requested", lambda: next(answers))


def _stopped(config, workdir, monkeypatch, call):
    with monkeypatch.context() as m:
        _stop_at(m, call)
        with pytest.raises(preemption.Preempted):
            loop.train_and_evaluate(config, str(workdir))
    return states.read(workdir)[1]


@pytest.mark.full
def test_asked_to_stop_in_training_and_in_evaluations(config, whole, tmp_path, monkeypatch, caplog):
    meta = _stopped(config, tmp_path, monkeypatch, 2)
    assert meta["step"] == 2 and "score" not in meta and "stopped by SIGTERM; step 2 is saved" in caplog.text
    meta = _stopped(config, tmp_path, monkeypatch, 2)  # in the evaluation after step 3
    assert meta["step"] == 3 and "score" not in meta and not (tmp_path / "best" / "3").exists()
    meta = _stopped(config, tmp_path, monkeypatch, 5)  # it is made up for; then in the evaluation after step 6
    assert meta["step"] == 6 and "score" not in meta and (tmp_path / "best" / "3").exists()
    assert [line["step"] for line in states.lines(tmp_path) if "val/miou_all" in line] == [3]
    result = loop.train_and_evaluate(config, str(tmp_path))
    assert result["rows"]["all"]["miou"] == states.read(whole)[1]["score"]
    assert states.final(tmp_path) == states.final(whole)


@pytest.mark.full
def test_falling_back_changes_nothing_in_the_end(config, work, whole, caplog):
    damaged = max((work / "checkpoints" / "6" / "rest").rglob("d/*"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(bytes(255 - x for x in damaged.read_bytes()))
    loop.train_and_evaluate(config, str(work))
    assert "checkpoints/6 cannot be read" in caplog.text and "resumed from step 3" in caplog.text
    assert (work / "checkpoints" / "6.damaged").is_dir()
    assert states.final(work) == states.final(whole)


def test_a_damaged_best_is_refused_everywhere(config, work):
    (step,) = (work / "best").iterdir()
    largest = max((step / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(255 - x for x in largest.read_bytes()))
    config.train.steps = 9
    stored = configs.load(work / "config.json")
    match = rf"best/{step.name} cannot be read .*no other is there.*move it away"
    for task, given in ((loop.train_and_evaluate, config), (evaluate.evaluate, stored)):
        with pytest.raises(checkpoint.CheckpointError, match=match):
            task(given, str(work))
    assert evaluate.evaluate(stored, str(work), "latest")["step"] == 6
    shutil.rmtree(step)
    assert loop.train_and_evaluate(config, str(work))


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(config, work):
    """While anything is left of it: its best model, damaged checkpoints, or figures of steps that had been saved."""
    for path in sorted((work / "checkpoints").iterdir())[:-1]:
        shutil.rmtree(path)
    (last,) = (work / "checkpoints").iterdir()
    aside = last.with_name(f"{last.name}.damaged")
    last.rename(aside)
    config.train.checkpoint_every = 2
    configs.save(config, str(work / "config.json"))
    before = (work / "metrics.jsonl").read_bytes()
    for left in (work / "best", aside, work / "metrics.jsonl"):
        with pytest.raises(checkpoint.CheckpointError, match=rf"{re.escape(str(left.parent))}.* (holds|tells of) .*has "
                           "no whole checkpoint"):  # fmt: skip
            loop.train_and_evaluate(config, str(work))
        assert (work / "metrics.jsonl").read_bytes() == before
        left.rename(work.parent / left.name)
    config.train.steps = 1
    assert loop.train_and_evaluate(config, str(work))
    assert states.read(work)[1]["step"] == 1


@pytest.mark.parametrize("order", [(3, 6), pytest.param((6, 3), marks=pytest.mark.full)])
@pytest.mark.full
def test_of_two_best_models_the_better_is_kept(work, config, order):
    """A kill between a save and the deletion of what it replaces leaves two; after a fallback either may be newer."""
    (there,) = (work / "best").iterdir()
    identity = configs.identity(configs.load(work / "config.json"))
    trees, _ = states.read(work, "best")
    shutil.rmtree(there)
    for step, score in zip(order, (0.1, 0.9), strict=True):
        with checkpoint.Store(str(work / "best"), identity, 2) as store:
            store.save(step, trees, {"miou_all": score})
    reader = checkpoint.Store(str(work / "best"), identity, score="miou_all")
    assert reader.meta()["miou_all"] == 0.9
    assert evaluate.evaluate(configs.load(work / "config.json"), str(work))["step"] == order[1]
    config.train.steps = 7
    loop.train_and_evaluate(config, str(work))
    assert [path.name for path in (work / "best").iterdir()] == [str(order[1])]


@pytest.mark.parametrize("content", ["", '{"step": 4, "train/loss": 1.0}\n'], ids=["cut off", "redone"])
def test_metrics_of_steps_that_are_done_again(tmp_path, content):
    lines = [{"step": 3, "train/loss": 2.0}, {"step": 3, "val/miou_all": 1.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + content + '{"step": 3, "train/lo')
    logs.Writer(str(tmp_path), 3).close()
    assert (tmp_path / "metrics.jsonl").read_text() == text
    logs.Writer(str(tmp_path), 3, evaluated=False).close()
    assert states.lines(tmp_path) == lines[:1]
    logs.Writer(str(tmp_path)).close()
    assert not states.lines(tmp_path)


def test_a_disk_without_room_for_a_line(tmp_path):
    writer = logs.Writer(str(tmp_path))
    writer._jsonl.close()
    writer._jsonl = open("/dev/full", "wb")
    with pytest.raises(FileError, match=r"metrics.jsonl cannot be written \(No space left on device\); make room"):
        writer.write(1, {"loss": 1.0}, "train")
    writer.close()


def _events(path):
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])  # between two checksums of 4 bytes
        data = data[16 + length :]


def test_tensorboard_hides_what_is_done_again(tmp_path):
    for step, values in ((0, (1.0, 2.0)), (1, (3.0,))):
        writer = logs.Writer(str(tmp_path), step)
        for i, value in enumerate(values, step + 1):
            writer.write(i, {"loss": value}, "train")
        writer.close()
    found = [list(_events(path)) for path in sorted((tmp_path / "tensorboard").iterdir())]
    assert [events[0].file_version for events in found] == ["brain.Event:2"] * 2
    assert [(e.step, e.summary.value[0].simple_value) for events in found for e in events[2:]] == [
        (1, 1),
        (2, 2),
        (2, 3),
    ]
    # What TensorBoard goes by: a start at a step takes back all from that step on.
    assert [(e.step, e.session_log.status) for e in (events[1] for events in found)] == [(1, SessionLog.START), (2, 1)]


@pytest.mark.parametrize("module", [checks, restore])
def test_other_classes_of_the_same_number(config, work, monkeypatch, module):
    load = module.load_dataset

    def renamed(**options):
        dataset = load(**options)
        dataset.class_names = tuple(reversed(dataset.class_names))
        return dataset

    monkeypatch.setattr(module, "load_dataset", renamed)
    with pytest.raises(checkpoint.CheckpointError, match="class 0 is 'sky' in the checkpoint and 'car'"):
        if module is checks:
            loop.train_and_evaluate(config, str(work))
        else:
            evaluate.evaluate(configs.load(work / "config.json"), str(work))


def test_a_checkpoint_carries_its_config(whole):
    for kind in ("checkpoints", "best"):
        meta = states.read(whole, kind)[1]
        assert meta["config"] == json.loads((whole / "config.json").read_text())
        assert meta["class_names"][0] == "sky" and meta["versions"] == checkpoint.versions()


def test_other_versions_are_told(monkeypatch):
    assert loop._other_versions({}) == loop._other_versions({"versions": checkpoint.versions()}) == ""
    older = checkpoint.versions() | {"jax": "0.1"}
    assert loop._other_versions({"versions": older}) == f"; saved with jax 0.1, now {checkpoint.versions()['jax']}"


# --- disks ----------------------------------------------------------------------------------------------


def _train(workdir, data_dir, mount="", after="", **keys):
    """train.py in a process with one device; mount, after: what a shell does around it in mounts of its own."""
    command = [sys.executable, "train.py", f"--workdir={workdir}", *small.flags(data_dir, **KEYS | keys)]
    if mount:
        script = f'{mount} || exit 9; "$@"; code=$?; {after or ":"}; exit $code'
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command]
    environment = os.environ | {"XLA_FLAGS": small.FAST_COMPILATION}
    if not mount:
        return commands.run(command[1:], env=environment)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)


def _needs_mounts():
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")


def test_a_read_only_workdir(work, config):
    _needs_mounts()
    mount = f"mount --bind {work} {work} && mount -o remount,bind,ro {work}"
    done = _train(work, config.data.data_dir, mount)
    (last,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and f"{work} cannot be written (Read-only file system); its disk is read-only" in last
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_a_disk_that_runs_full(tmp_path, config):
    """A disk with room for some checkpoints. The last good one stays, and where there is room the run goes on."""
    _needs_mounts()
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    keys = {"train.steps": 12, "train.keep_checkpoints": 5, "train.eval_every": 0}
    mount, carry = f"mount -t tmpfs -o size=800k none {disk}", f"cp -r {disk}/work {kept}"
    done = _train(disk / "work", config.data.data_dir, mount, carry, **keys)
    (last,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    newest = states.read(kept)[1]["step"]
    assert "could not be written (No space left on device)" in last and f"step {newest}, is as it was" in last
    done = _train(kept, config.data.data_dir, **keys)
    assert done.returncode == 0 and f"resumed from step {newest}" in done.stderr, done.stderr
    assert states.read(kept)[1]["step"] == 12 and not list(kept.rglob("*orbax-checkpoint-tmp*"))
