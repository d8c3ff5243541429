"""Disks that are full, read-only or another's while a set is prepared: one line, and nothing half-made is left."""

import errno
import logging
import os
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from layouts import image_folder as layout

from pwcrf_jax.data import DataError, load_dataset
from pwcrf_jax.data.readers import disk
from pwcrf_jax.data.readers.disk import locked, refusal
from pwcrf_jax.data.sets.synthetic import Synthetic
from pwcrf_jax.runtime import files

ROOT = Path(__file__).parents[3]
FULL = os.strerror(errno.ENOSPC)


def _load(data_dir):
    return load_dataset("synthetic", data_dir=str(data_dir), num_train=3, num_val=2, image_size=(128, 192))


def _raised(error, cause=None):
    error.__cause__ = cause
    return error


def _system(name):
    code = getattr(errno, name)
    return OSError(code, os.strerror(code), "somewhere")


# What array_record and TFDS make of the system's errors: the words may be all that is left of them.
DISK_ERRORS = {
    "array_record at the end": RuntimeError(f'Failed to finalize writing: write() failed: {FULL}; writing x\n at y'),
    "array_record in between": RuntimeError("write() failed: Disk quota exceeded; writing x.array_record"),
    "array_record on opening": RuntimeError("open() failed: Read-only file system; writing x.array_record"),
    "of a library, with a cause": _raised(RuntimeError("Failed to construct dataset"), _system("ENOSPC")),
    "with a cause of a cause": _raised(ValueError("a"), _raised(RuntimeError("b"), _system("EDQUOT"))),
    "full": _system("ENOSPC"),
    "quota": _system("EDQUOT"),
    "read-only": _system("EROFS"),
    "broken": _system("EIO"),
    "not permitted": _system("EACCES"),
}  # fmt: skip


@pytest.mark.parametrize("case", DISK_ERRORS)
def test_disks_that_refuse_while_a_set_is_prepared(case, tmp_path, monkeypatch):
    def prepare(builder, **_):
        raise DISK_ERRORS[case]

    monkeypatch.setattr(Synthetic, "download_and_prepare", prepare)
    with pytest.raises(DataError) as told:
        _load(tmp_path)
    line = str(told.value)
    assert str(tmp_path) in line and "cannot be written" in line and "data.data_dir" in line and "\n" not in line
    monkeypatch.undo()
    assert _load(tmp_path).splits == {"train": 3, "val": 2}


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyError("x"), TypeError("no"), RecursionError("deep")])
def test_other_errors_are_not_taken_for_the_disk(error, tmp_path, monkeypatch):
    assert refusal(error) is None

    def prepare(builder, **_):
        raise error

    monkeypatch.setattr(Synthetic, "download_and_prepare", prepare)
    with pytest.raises(type(error)):
        _load(tmp_path)


@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
def test_a_report_that_cannot_be_written_leaves_nothing(function, tmp_path, monkeypatch):
    writing, called = files.write_json, []

    def write_on_a_full_disk(*args):
        def refuse(*_):
            called.append(function)
            raise _system("ENOSPC")

        with monkeypatch.context() as full:
            full.setattr(files.os, function, refuse)
            writing(*args)

    monkeypatch.setattr(files, "write_json", write_on_a_full_disk)
    data = _load(tmp_path)
    monkeypatch.undo()
    assert called and not [name for name in os.listdir(data.folder) if "report" in name or "partial" in name]
    assert data.label_report()["splits"]["train"]["images"] == 3  # made anew


def _needs_mounts():
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")


@pytest.mark.parametrize("options", ["size=40k", "size=1m,nr_inodes=6", "ro"])
@pytest.mark.parametrize("packed", [False, True])
def test_small_disks(packed, options, tmp_path):
    """A folder, or an archive; a disk without room, without room for more files, or read-only."""
    _needs_mounts()
    source, small = tmp_path / "source", tmp_path / "small"
    small.mkdir()
    if packed:
        noise = np.random.default_rng(0).bytes(30_000)
        for i in range(3):
            (source / "VOCdevkit/VOC2012/JPEGImages").mkdir(parents=True, exist_ok=True)
            (source / f"VOCdevkit/VOC2012/JPEGImages/{i}.jpg").write_bytes(noise)
        with tarfile.open(tmp_path / "VOCtrainval_11-May-2012.tar", "w") as archive:
            archive.add(source / "VOCdevkit", "VOCdevkit")
        name, source = "voc", tmp_path
    else:
        layout.make(source, np.random.default_rng(0))
        name = "image_folder"
    command = [sys.executable, "-m", "pwcrf_jax", "check", name, f"--source_dir={source}", f"--data_dir={small}"]
    script = f'mount -t tmpfs -o {options} none {small} && "$@"; code=$?; find {small} -type f >&2; exit $code'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    (line,) = done.stdout.splitlines()
    reason = "Read-only file system" if options == "ro" else "are needed" if packed and options == "size=40k" else FULL
    assert line.startswith("refused") and str(small) in line and reason in line and "data.data_dir" in line
    left = [path for path in done.stderr.splitlines() if not path.endswith(".lock")]
    assert done.returncode == 2 and not left, done.stderr


# --- the lock ------------------------------------------------------------------------------------------------


def test_one_at_a_time_and_the_others_say_that_they_wait(tmp_path, caplog):
    inside, count = [], []

    def work():
        with locked(tmp_path / "lock", "busy, waiting") as held:
            inside.append(1)
            count.append((held, len(inside)))
            while "busy, waiting" not in caplog.messages:
                time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert count == [(True, 1)] * 3


@pytest.mark.parametrize("kind", ["link to a file", "link to nothing", "FIFO", "folder", "read-only"])
def test_odd_things_where_the_lock_should_be(kind, tmp_path, monkeypatch):
    """None hangs, and none is followed."""
    lock, other = tmp_path / "lock", tmp_path / "other"
    match kind:
        case "link to a file":
            other.write_text("mine")
            lock.symlink_to(other)
        case "link to nothing":
            lock.symlink_to(other)
        case "FIFO":
            os.mkfifo(lock)
        case "folder":
            lock.mkdir()
        case "read-only":  # another user's; root may write all the same
            lock.touch()
            real = os.open
            refuse = lambda path, flags, *mode: real(path, flags, *mode) if not flags & os.O_RDWR else _refuse()
            monkeypatch.setattr(disk.os, "open", refuse)
    if "link" in kind:
        with pytest.raises(OSError, match="symbolic links"), locked(lock, "busy"):
            pass
        assert other.exists() == (kind == "link to a file") and (not other.exists() or other.read_text() == "mine")
    else:
        with locked(lock, "busy") as held:
            assert held


def _refuse():
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize("code", ["ENOLCK", "ENOTSUP", "EBADF", "EINVAL"])
def test_file_systems_without_locks(code, tmp_path, monkeypatch, caplog):
    """The work goes on, and what another process may be writing is not deleted."""

    def flock(*_):
        raise _system(code)

    folder = Path(_load(tmp_path).folder)
    folder.rename(folder.with_name("old"))
    (folder.parent / "incomplete.other").mkdir()
    monkeypatch.setattr(disk.fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING):
        assert _load(tmp_path).splits == {"train": 3, "val": 2}
    assert "no lock" in caplog.text and (folder.parent / "incomplete.other").is_dir()
