"""Processes that read training images: the batches of threads, and none of them is ever left."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small
from faults import kill

from pwcrf_jax import config as configs
from pwcrf_jax.data import DataError, load_dataset, train_batches

OPTIONS = dict(batch_size=4, crop_size=(64, 96), scale_range=(0.7, 1.2), seed=3)
LIMIT = 300  # seconds; against hangs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "prepared"


@pytest.fixture(scope="module")
def dataset(prepared):
    return load_dataset(**configs.dataset_options(small.config(prepared)))


def take(dataset, count, **options):
    batches = train_batches(dataset, "train", **OPTIONS, **options)
    out = [next(batches) for _ in range(count)]
    batches.close()
    return out


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command(pid):
    """Empty of a zombie; waited for where a process is just about to become another program."""
    while not (text := pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()) and alive(pid):
        time.sleep(0.01)
    return text


def children(pid):
    """Of a living process, those with what is their command."""
    found = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(x) for x in found if b"workers.serve" in command(x)]


def gone(pids):
    until = time.monotonic() + LIMIT
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < until:
        time.sleep(0.01)
    return not left


@pytest.mark.parametrize("workers, start", [(1, 0), (3, 7)])
def test_the_batches_of_threads(dataset, workers, start):
    """Bit for bit, also from the middle of an epoch of 24 samples on; processes are gone when they are closed."""
    before = set(children(os.getpid()))
    batches = train_batches(dataset, "train", **OPTIONS, num_workers=workers, start_step=start)
    started = set(children(os.getpid())) - before
    assert len(started) == workers
    got = [next(batches) for _ in range(6)]
    assert batches.samples_seen == 4 * (start + 6)
    batches.close()
    assert not any(map(alive, started))
    for batch, expected in zip(got, take(dataset, start + 6)[start:], strict=True):
        assert batch["id"] == expected["id"]
        for key in ("image", "label", "valid_box"):
            assert batch[key].dtype == expected[key].dtype
            np.testing.assert_array_equal(batch[key], expected[key])


def test_one_that_is_killed_is_an_error(dataset):
    before = set(children(os.getpid()))
    batches = train_batches(dataset, "train", **OPTIONS, num_workers=2)
    next(batches)
    started = set(children(os.getpid())) - before
    os.kill(victim := started.pop(), signal.SIGKILL)
    with pytest.raises(DataError, match=rf"process {victim}, one of data.num_workers = 2, was ended by SIGKILL; start"):
        for _ in range(100):
            next(batches)
    batches.close()
    assert gone(started)


def test_errors_come_as_they_are(dataset, monkeypatch):
    with pytest.raises(DataError, match="data.num_workers: -1"):
        take(dataset, 1, num_workers=-1)
    source = dataset.source("train")
    monkeypatch.setattr(dataset, "source", lambda split: Failing(source))
    for workers in (0, 1):
        with pytest.raises(DataError, match="record 5 of 24 is damaged"):
            take(dataset, 9, num_workers=workers)


class Failing:
    """A source with a record that cannot be read."""

    def __init__(self, source):
        self._source = source

    def __len__(self):
        return len(self._source)

    def open(self, index):
        if index == 5:
            raise DataError(f"record 5 of {len(self)} is damaged")
        return self._source.open(index)


ENDLESS = """
import sys
from pwcrf_jax.data import load_dataset, train_batches
dataset = load_dataset("synthetic", data_dir=sys.argv[1], num_train=24, num_val=10)
for i, batch in enumerate(train_batches(dataset, "train", batch_size=4, crop_size=(64, 96), num_workers=2)):
    if i == 3: print("ready", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_they_end_with_their_parent(dataset, prepared, how):
    """Though nobody tells them; and none has anything in shared memory that could be left there."""
    parent = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, prepared], stdout=subprocess.PIPE, text=True, cwd=kill.ROOT
    )
    assert parent.stdout.readline() == "ready\n"
    workers = children(parent.pid)
    assert len(workers) == 2 and all(map(alive, workers))
    for pid in (parent.pid, *workers):
        assert "/dev/shm" not in pathlib.Path(f"/proc/{pid}/maps").read_text()
    parent.send_signal(how)
    assert parent.wait(LIMIT) == -how
    assert gone(workers)


def test_signals_to_all_are_the_parents(dataset):
    """Ctrl-C and a batch system's SIGTERM go to workers too, who must go on until the run has saved."""
    before = set(children(os.getpid()))
    batches = train_batches(dataset, "train", **OPTIONS, num_workers=1)
    next(batches)
    (worker,) = set(children(os.getpid())) - before
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
    for _ in range(8):
        next(batches)
    assert alive(worker)
    batches.close()


@pytest.mark.slow
def test_runs_with_workers_that_are_killed(tmp_path):
    """Training is that of threads bit for bit, and no process is left; `kill.py --workers=2` does it at length."""
    whole = kill.undisturbed(tmp_path, devices=2)
    for signal_is_kill in (True, False):
        summary = kill.campaign(whole, 6, signal_is_kill, seed=3, workers=2)
        assert not summary["violations"] and summary["finished runs"], summary
