"""Objects where files are on a disk: written whole, listed, locked, fetched; and what is said where that cannot be."""

import json
import os
import pathlib
import threading
import time

import pytest

from pwcrf_jax.runtime import buckets, files, leases, lock, mirror, step_folders
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.runtime.files import FileError

pytestmark = pytest.mark.full


def test_objects_are_what_files_are(service):
    base = "gs://bucket/files"
    assert not files.exists(base) and not files.is_folder(base) and files.names(base) == []
    files.make_folder(base)
    files.write_json(f"{base}/a b/config.json", {"ä": 1})
    files.write(f"{base}/a b/empty", "")
    with pytest.raises(KeyError), files.replacing(f"{base}/a b/config.json") as file:
        file.write(b"half")
        raise KeyError
    assert files.read_json(f"{base}/a b/config.json", "") == {"ä": 1}
    assert files.names(base) == ["a b"] and files.names(f"{base}/a b") == ["config.json", "empty"]
    assert files.is_folder(f"{base}/a b") and not files.is_folder(f"{base}/a") and files.exists(f"{base}/a b/empty")
    assert buckets.tree(base)["a b/empty"].size == 0 and files.absolute(base) == base
    with pytest.raises(FileNotFoundError):
        files.read_json(f"{base}/none.json", "")
    with pytest.raises(FileError, match="files/a b/empty cannot be used .*; write it again"):
        files.read_json(f"{base}/a b/empty", "write it again")
    buckets.write(f"{base}/.0123456789abcdef.partial", b"")
    files.delete_unfinished(base)
    assert files.names(base) == ["a b"]


def test_a_listing_of_several_pages(service, monkeypatch):
    for i in range(5):
        buckets.write(f"gs://bucket/pages/{i}", b"")
    whole, asked = buckets._system().call, []

    def in_pages(method, path, *args, prefix="", pageToken="0", **options):
        page = whole(method, path, *args, prefix=prefix, **options)
        start = int(pageToken)
        asked.append(start)
        more = {"nextPageToken": str(start + 2)} if start + 2 < len(page["items"]) else {}
        return {"items": page["items"][start : start + 2]} | more

    monkeypatch.setattr(buckets._system(), "call", in_pages, raising=False)
    assert buckets.names("gs://bucket/pages") == list("01234") and asked == [0, 2, 4]


@pytest.mark.parametrize(
    "do, says",
    [
        (
            lambda: files.make_folder("gs://no-such/run"),
            r"run/\.\w+\.partial cannot be written \(there is no bucket no-s",
        ),
        (lambda: files.make_folder("gs://read-only/run"), r"written \(permission denied\); ask its owner"),
        (lambda: files.read_lines("gs://secret/x"), r"gs://secret/x cannot be read \(permission denied\)"),
        (lambda: files.names("gs://secret/x"), r"gs://secret/x cannot be listed \(permission denied\)"),
        (lambda: mirror.local("gs://bucket/none"), r"gs://bucket/none does not exist"),
        (lambda: mirror.local("gs://no-such/none"), r"gs://no-such/none does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_line(do, says, service):
    with pytest.raises(FileError, match=says) as error:
        do()
    assert "\n" not in str(error.value)


def test_a_service_that_is_gone_is_waited_for(service, monkeypatch):
    buckets.write("gs://bucket/gone/a", b"1")
    service.gone(2)
    assert buckets.read("gs://bucket/gone/a") == b"1"
    monkeypatch.setattr(buckets, "PATIENCE", 0.0)
    service.trouble = lambda method, path: 503
    try:
        monkeypatch.setattr("gcsfs.retry.asyncio.sleep", _at_once)
        with pytest.raises(FileError, match="gone/a cannot be read .*503.*; see to the network"):
            buckets.read("gs://bucket/gone/a")
    finally:
        service.trouble = lambda method, path: 0


async def _at_once(_):
    pass


def test_a_log_grows_in_whole_objects(service, monkeypatch):
    url, now = "gs://bucket/log/metrics.jsonl", time.monotonic()
    monkeypatch.setattr(buckets.time, "monotonic", lambda: now)
    with files.append(url) as file:
        file.write(b"1\n")
        file.flush()
        assert files.read_lines(url) == []
        now += buckets.PERIOD + 1
        file.flush()
        assert files.read_lines(url) == ["1\n"]
        file.write(b"2\n")
        files.sync(file)
        assert files.read_lines(url) == ["1\n", "2\n"]
        requests = service.requests
        files.sync(file)
        assert service.requests == requests
    with files.append(url) as file:
        file.write(b"3\n")
    assert files.read_lines(url) == ["1\n", "2\n", "3\n"]
    parts = buckets.Parts("gs://bucket/log/events")
    for content in (b"a", b"b", b""):
        parts.write(content)
        parts.sync()
    parts.close()
    assert service.objects["log/events"] == b"a" and service.objects["log/events.00001"] == b"b"


def test_one_run_trains_in_a_workdir(service):
    with lock.held("gs://bucket/lock"):
        with pytest.raises(ConfigError, match=rf"another training run \(process {os.getpid()} on .*--workdir gs://b"):
            with lock.held("gs://bucket/lock"):
                pass
    assert not files.exists("gs://bucket/lock")
    with lock.held("gs://bucket/lock"):
        pass


def _other(**changes):
    return json.dumps(leases._about() | {"token": "other"} | changes).encode()


@pytest.mark.parametrize("content", [_other(process=2**22 + 1), _other(began="1"), b"", b"[]"])
def test_a_lock_of_a_process_that_is_gone_is_taken(content, service, monkeypatch):
    monkeypatch.setattr(leases, "LEFT", 0.0 if content in (b"", b"[]") else 600.0)
    monkeypatch.setattr(leases, "_ASKED", 0.01)
    buckets.write("gs://bucket/gone/train.lock", content)
    with lock.held("gs://bucket/gone"):
        assert service.objects["gone/train.lock"] != content


def test_a_lock_of_another_machine_is_watched(service, monkeypatch):
    """Renewed it is refused, left alone it is taken."""
    said = []
    monkeypatch.setattr(leases, "LEFT", 1.0)
    monkeypatch.setattr(leases, "_ASKED", 0.1)
    monkeypatch.setattr(lock.log, "info", lambda text, *values: said.append(text % values))
    url, other = "gs://bucket/far/train.lock", _other(machine="elsewhere", name="process 1 on far")
    stop = threading.Event()

    def renew():
        while not stop.wait(0.2):
            buckets.write(url, other)

    buckets.write(url, other)
    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(ConfigError, match=r"another training run \(process 1 on far\)"):
        with lock.held("gs://bucket/far"):
            pass
    stop.set()
    thread.join()
    began = time.monotonic()
    with lock.held("gs://bucket/far"):
        assert time.monotonic() - began >= 1
    assert "process 1 on far: looking whether that still runs" in said[0]


def test_of_many_one_has_it_and_the_others_wait(service, monkeypatch):
    monkeypatch.setattr(leases, "_ASKED", 0.01)
    url, inside, most = "gs://bucket/many.lock", [], []

    def work():
        with leases.held(url, most.append, lambda _: None, waits="busy"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6 and not files.exists(url)


def test_a_lock_is_renewed_and_its_loss_is_told(service, monkeypatch):
    monkeypatch.setattr(leases, "RENEWED", 0.05)
    url, told = "gs://bucket/lost.lock", threading.Event()
    with leases.held(url, lambda who: told.set(), lambda _: None):
        first = service.versions["lost.lock"]
        time.sleep(0.5)
        assert service.versions["lost.lock"] != first and not told.is_set()
        buckets.write(url, _other())
        assert told.wait(5)
    assert service.objects["lost.lock"] == _other()  # it is not ours to delete


def test_a_copy_follows_the_bucket(service, tmp_path, monkeypatch):
    base = "gs://bucket/copy"
    for name in ("a.png", "sub/b.png", "sub/"):
        buckets.write(f"{base}/{name}", name.encode())
    folder = pathlib.Path(mirror.local(base))
    found = lambda: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found() == {"a.png": b"a.png", "sub/b.png": b"sub/b.png"}
    first = (folder / "a.png").stat()
    requests = service.requests
    assert mirror.local(base) == str(folder) and service.requests == requests + 1
    buckets.write(f"{base}/sub/b.png", b"other")
    buckets.delete(f"{base}/a.png")
    buckets.write(f"{base}/c.png", b"")
    assert str(folder) == mirror.local(base) and found() == {"sub/b.png": b"other", "c.png": b""}
    assert mirror.local("a/b") == "a/b" and mirror.local("") == ""
    file = mirror.local(f"{base}/sub/b.png")
    assert pathlib.Path(file).read_bytes() == b"other" and file.endswith("/b.png")
    assert mirror.origin(f"{file}: no image") == f"{base}/sub/b.png: no image"
    assert mirror.origin(f"{folder}/c.png") == f"{base}/c.png" and mirror.origin("/x/y") == "/x/y"
    assert mirror.pattern(f"{base}/sub/*.png") == str(folder / "sub" / "*.png")
    # The same times on another machine, whatever its clock.
    buckets.write(f"{base}/a.png", b"a.png")
    mirror.local(base)
    here = (folder / "a.png").stat().st_mtime_ns
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert os.stat(f"{mirror.local(base)}/a.png").st_mtime_ns == here != first.st_mtime_ns


def test_a_checkpoint_is_there_when_its_last_object_is(service):
    folder = "gs://bucket/steps"
    for name in ("3/state/d/1", "3/commit_success.txt", "6/state/d/1", "x/commit_success.txt", "03/commit_success.txt"):
        buckets.write(f"{folder}/{name}", b"1")
    assert step_folders.steps(folder) == [3]
    step_folders.clear(folder)
    assert set(buckets.tree(folder)) == {"3/state/d/1", "3/commit_success.txt", "x/commit_success.txt",
                                         "03/commit_success.txt"}  # fmt: skip
    assert step_folders.set_aside(folder, 3) == f"{folder}/3.damaged" and step_folders.steps(folder) == []
    assert step_folders.damaged(folder) == ["3.damaged"] and "3.damaged/state/d/1" in buckets.tree(folder)
    buckets.write(f"{folder}/4/commit_success.txt", b"1")
    step_folders.delete(folder, 4)
    assert step_folders.steps(folder) == []
