"""SIGTERM, seen by one process itself and by several together."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import small
from faults.kill import ROOT

from pwcrf_jax.runtime import preemption

LIMIT = 300  # seconds; against hangs


def _start(code, *args):
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def _until(process, text):
    while text not in (line := process.stdout.readline()):
        assert line, process.communicate(timeout=LIMIT)
    return line


def test_the_code_is_that_of_a_terminated_process():
    shell = subprocess.run(["sh", "-c", "sh -c 'kill -TERM $$'; echo $?"], capture_output=True, text=True)
    assert preemption.EXIT_CODE == 143 == int(shell.stdout)


def test_before_there_is_anything_to_save():
    """Even where the main thread does not come back to Python, as in a compilation."""
    process = _start(
        "from pwcrf_jax.runtime import preemption; import hashlib; preemption.install(); print('ready', flush=True)\n"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    )
    _until(process, "ready")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == preemption.EXIT_CODE
    assert err == "stopped by SIGTERM with nothing to save; start the same command again\n"


def test_a_second_signal_changes_nothing_and_a_child_has_its_own():
    process = _start(
        "import os, signal, time\n"
        "from pwcrf_jax.runtime import preemption as p\n"
        "p.install(); p.begin(); assert not p.requested()\n"
        "child = os.fork()\n"
        "if not child: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM\n"
        "time.sleep(0.5); assert not p.requested()\n"
        "print('ready', flush=True)\n"
        "while not p.requested(): time.sleep(0.01)\n"
        "print('asked', flush=True)\n"
        "time.sleep(1); assert p.requested(); print('saved', flush=True)\n"
    )
    _until(process, "ready")
    process.send_signal(signal.SIGTERM)
    _until(process, "asked")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and out == "saved\n", err


def test_two_processes_stop_at_the_same_step():
    """The signal goes to one of them, at different numbers of steps; each step has a collective."""
    code = """
import json, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
from pwcrf_jax.runtime import preemption
preemption.install()
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
from jax.experimental import multihost_utils
preemption.begin()
for step in range(10_000):
    multihost_utils.process_allgather(jax.numpy.ones(()))
    time.sleep(0.01)
    if step == 5: print("ready", flush=True)
    if preemption.requested(): break
print(json.dumps({"step": step}), flush=True)
jax.distributed.shutdown()
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_start(code, port, i) for i in range(2)]
    try:
        for process in processes:
            _until(process, "ready")
        processes[1].send_signal(signal.SIGTERM)
        time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        steps = [json.loads(_until(process, "step"))["step"] for process in processes]
        assert steps[0] == steps[1] < 9_999
        assert [process.wait(LIMIT) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


class _Metadata(http.server.BaseHTTPRequestHandler):
    """Answers of a metadata server in turn; None: it is not well."""

    answers, asked = [], []

    def do_GET(self):
        type(self).asked.append((self.path, self.headers["Metadata-Flavor"]))
        answer = type(self).answers.pop(0)
        self.send_response(503 if answer is None else 200)
        self.send_header("ETag", f"tag{len(self.asked)}")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata():
    _Metadata.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield _Metadata, f"127.0.0.1:{server.server_port}"
        server.shutdown()


NONE = {"maintenanceEvent": "NONE", "preempted": "FALSE"}
MOVED = NONE | {"maintenanceEvent": "MIGRATE_ON_HOST_MAINTENANCE"}


@pytest.mark.parametrize(
    "last", [NONE | {"preempted": "TRUE"}, NONE | {"maintenanceEvent": "TERMINATE_ON_HOST_MAINTENANCE"}]
)
def test_a_notice_of_google_cloud_is_a_signal(metadata, monkeypatch, capfd, last):
    """A machine that is moved alive is left alone, and so is one whose server does not answer."""
    server, host = metadata
    server.answers = [NONE, None, MOVED, {}, last]
    sent = []
    monkeypatch.setattr(preemption, "_PAUSE", 0)
    monkeypatch.setattr(preemption.os, "kill", lambda *x: sent.append(x))
    preemption._wait_for_notice(host)
    assert sent == [(os.getpid(), signal.SIGTERM)] and not server.answers
    assert "as if by SIGTERM" in capfd.readouterr().err
    tags = [path.rpartition("last_etag=")[2] for path, _ in server.asked]
    assert tags == ["0", "tag1", "tag1", "tag3", "tag4"] and {flavor for _, flavor in server.asked} == {"Google"}


def test_elsewhere_nobody_is_asked(monkeypatch):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(preemption.Path, "read_text", lambda *_: "Another Machine\n")
    monkeypatch.setattr(preemption.threading, "Thread", lambda **_: pytest.fail("a thread was started"))
    preemption.watch_notices()


@pytest.mark.full
def test_a_run_saves_itself_at_a_notice(metadata, tmp_path):
    server, host = metadata
    server.answers = [NONE] + [None] * 10**4
    flags = small.flags(tmp_path / "prepared", **{"train.steps": 100_000, "train.eval_every": 0})
    command = [sys.executable, "train.py", f"--workdir={tmp_path / 'work'}", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"GCE_METADATA_HOST": host}, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "step 2" in line:
            break
    server.answers = [NONE | {"preempted": "TRUE"}]
    said = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == preemption.EXIT_CODE and "as if by SIGTERM" in said
    assert any((tmp_path / "work" / "checkpoints").iterdir())
