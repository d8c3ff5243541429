"""Two runs never train in one workdir at a time, and a lock never outlives its process."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile

import commands
import pytest
from faults import kill
from rows import full_but

from pwcrf_jax.runtime import lock
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.runtime.files import FileError

HOLDER = """
import sys, time
from pwcrf_jax.runtime import lock
with lock.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_by_name_until_the_first_ends_however_it_does(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True, cwd=kill.ROOT
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            ConfigError, match=rf"another training run \(process {holder.pid} on .*is training in --workdir"
        ):
            with lock.held(str(tmp_path)):
                pass
    finally:
        holder.kill()
        holder.wait()
    for _ in range(2):
        with lock.held(str(tmp_path)):
            with pytest.raises(ConfigError, match="let it end, or name another"):
                with lock.held(str(tmp_path)):
                    pass


def test_where_the_file_system_has_no_locks_the_log_says_so(tmp_path, monkeypatch):
    said = []

    def refuses(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    monkeypatch.setattr(lock.log, "info", lambda text, *values: said.append(text % values))
    with lock.held(str(tmp_path)):
        pass
    assert said == [f"no lock on {tmp_path} (No locks available): see to it that no other run trains there"]


def test_of_several_processes_the_first_holds_it_for_all(tmp_path, monkeypatch):
    with lock.held(str(tmp_path)):
        monkeypatch.setattr(lock.jax, "process_index", lambda: 1)
        with lock.held(str(tmp_path)):
            pass


SECOND = """
import os, sys
from pwcrf_jax.runtime import lock
import jax
jax.process_index()
path, umask = sys.argv[1], int(sys.argv[2], 8)
told, tell = os.pipe(), os.pipe()
if not os.fork():
    os.umask(umask)
    os.setuid(1000)
    with lock.held(path):
        os.write(told[1], b"x")
        os.read(tell[0], 1)
    os._exit(0)
os.read(told[0], 1)
os.setuid(1001)
for attempt in range(2):
    try:
        with lock.held(path):
            print("held")
    except lock.ConfigError as error:
        print(error)
    os.write(tell[1], b"x")
    if not attempt:
        os.wait()
"""


@pytest.mark.parametrize("umask", full_but(["022", "002", "077", "007", "000"], "022", "077"))
def test_another_user_of_a_group_is_kept_out_too_and_comes_in_later(umask, tmp_path):
    if os.geteuid():
        pytest.skip("only root can be two users")
    shared = tempfile.mkdtemp()  # tmp_path is below a folder that others cannot enter
    try:
        os.chmod(shared, 0o777)
        done = commands.run(["-c", SECOND, shared, umask])
        refused, later = done.stdout.splitlines()
        assert "another training run (process " in refused and "let it end" in refused, done.stderr
        assert later == "held"
    finally:
        shutil.rmtree(shared)


def test_a_lock_that_may_only_be_read_locks(tmp_path, monkeypatch):
    (tmp_path / lock.FILE).write_text("process 1 on elsewhere")
    opened = lock.files.open_regular

    def read_only(path, flags):
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags)

    monkeypatch.setattr(lock.files, "open_regular", read_only)
    with lock.held(str(tmp_path)):
        with pytest.raises(ConfigError, match="let it end, or name another"):
            with lock.held(str(tmp_path)):
                pass


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.parent / "notes"), "denied"])
def test_a_lock_that_cannot_be_opened_is_no_leave_to_train(make, tmp_path, monkeypatch):
    if make == "denied":

        def denied(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(lock.files, "open_regular", denied)
    else:
        make(tmp_path / lock.FILE)
    with pytest.raises(FileError, match=f"{tmp_path}/train.lock cannot be opened .*; "):
        with lock.held(str(tmp_path)):
            pass


@pytest.mark.parametrize("text", ["", "\x1b[31mred", "a\nb", "\xff"])
def test_what_the_file_says_is_not_printed_blindly(text, tmp_path):
    with lock.held(str(tmp_path)):
        (tmp_path / lock.FILE).write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError) as error:
            with lock.held(str(tmp_path)):
                pass
    assert str(error.value).isprintable()
