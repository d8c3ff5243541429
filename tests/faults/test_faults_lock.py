"""Two runs never train in one workdir at a time, and a lock never outlives its process."""

import errno
import fcntl
import subprocess
import sys

import pytest
from faults import kill

from pwcrf_jax.training import lock
from pwcrf_jax.training.config import ConfigError

HOLDER = """
import sys, time
from pwcrf_jax.training import lock
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
            ConfigError, match=rf"another train.py \(process {holder.pid} on .*is training in --workdir"
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
