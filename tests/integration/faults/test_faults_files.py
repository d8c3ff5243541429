"""What is written in a workdir: never through a link, whole or not at all, and on the disk when it is said to be."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from faults import states
from faults.kill import ROOT
from ml_collections import ConfigDict
from PIL import Image
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax.data import label_guard
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.report import collect
from pwcrf_jax.runtime import checkpoint, files, lock, logs, step_folders
from pwcrf_jax.runtime.files import FileError

IDENTITY = {"model.hidden": 4}


def _note(workdir):
    (workdir / "checkpoints" / "3").mkdir(parents=True, exist_ok=True)
    checkpoint.Store(str(workdir / "checkpoints"), IDENTITY, 2).note(3, {"score": 1.0})


def _metrics(workdir):
    writer = logs.Writer(str(workdir))
    writer.write(1, {"loss": 1.0}, "train")
    writer.close()


def _taken_back(workdir):
    with contextlib.suppress(FileNotFoundError), open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 9}\n')
    _metrics(workdir)


def _page(workdir):
    page = collect.Report(str(workdir / "report_val.html"))
    page.data = lambda result: {}
    page.write({})


def _lock(workdir):
    with lock.held(str(workdir)):
        pass


WRITERS = {
    "config.json": lambda workdir: configs.save(ConfigDict({"a": 1}), workdir / "config.json"),
    "classes.json": lambda workdir: configs.save_classes(["sky"], [(1, 2, 3)], workdir),
    "tuned.json": lambda workdir: configs.write_tuned({"config": {}}, workdir),
    "eval_val.json": lambda workdir: evaluate.write({"split": "val"}, str(workdir)),
    "report_val.html": _page,
    "metrics.jsonl": _metrics,
    "train.lock": _lock,
    "checkpoints/3/note.json": _note,
    "label_report.json": lambda workdir: label_guard.write_report({"splits": {}}, str(workdir)),
}
"""{file in a workdir: what writes it}"""


@pytest.mark.parametrize("partial", ["", ".partial", ".tmp"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_link_is_not_written_through(name, partial, tmp_path):
    """Also under the names that writers gave to files that are not whole yet."""
    place, foreign = tmp_path / "work" / (name + partial), tmp_path / "thesis.tex"
    place.parent.mkdir(parents=True)
    foreign.write_text("my thesis\n")
    place.symlink_to(foreign)
    try:
        WRITERS[name](tmp_path / "work")
    except FileError as error:
        assert not partial and "link" in str(error) and str(place) in str(error)
    assert foreign.read_text() == "my thesis\n"


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_to_nothing_makes_no_file_elsewhere(name, tmp_path):
    place, foreign = tmp_path / "work" / name, tmp_path / "elsewhere"
    place.parent.mkdir(parents=True)
    place.symlink_to(foreign)
    with contextlib.suppress(FileError):
        WRITERS[name](tmp_path / "work")
    assert not foreign.exists()


@pytest.mark.parametrize("name", WRITERS)
def test_a_fifo_or_folder_of_that_name_is_named(name, tmp_path):
    place = tmp_path / "work" / name
    place.parent.mkdir(parents=True)
    for make in (os.mkfifo, os.mkdir):
        make(place)
        with pytest.raises((FileError, checkpoint.CheckpointError), match="cannot be|could not be") as error:
            WRITERS[name](tmp_path / "work")
        assert str(tmp_path / "work") in str(error.value) and "\n" not in str(error.value)
        os.rmdir(place) if place.is_dir() else os.unlink(place)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/proc/self/comm"])
def test_the_devices_of_a_machine_stay(path, monkeypatch):
    """Root's rename would put a file in their place. Here it can not, whatever the code does."""

    def never(*_):
        raise AssertionError("nothing may be opened or renamed")

    monkeypatch.setattr(files.os, "open", never)
    monkeypatch.setattr(files.os, "replace", never)
    with pytest.raises(FileError, match=f"{path} cannot be written .it is no file"):
        files.write(path, "text")


@pytest.fixture
def foreign(tmp_path):
    """A folder of somebody else's, with what looks like checkpoints."""
    for name in ("3", "6", "9.deleted", "12.orbax-checkpoint-tmp", "notes"):
        (tmp_path / "foreign" / name).mkdir(parents=True)
        (tmp_path / "foreign" / name / "thesis.tex").write_text("my thesis")
    return tmp_path / "foreign"


def _content(folder):
    return sorted((str(path.relative_to(folder)), path.is_file() and path.read_text()) for path in folder.rglob("*"))


FOLDERS = {
    "checkpoints": lambda workdir: checkpoint.Store(str(workdir / "checkpoints"), IDENTITY, 2),
    "best": lambda workdir: checkpoint.Store(str(workdir / "best"), IDENTITY, 1, score="miou_all").keep_only(3),
    "best/3": lambda workdir: checkpoint.Store(str(workdir / "best"), IDENTITY, 1).note(3, {"score": 1.0}),
    "checkpoints/3": lambda workdir: checkpoint.Store(str(workdir / "checkpoints"), IDENTITY).meta(),
    "tensorboard": _metrics,
    "tuning": lambda workdir: files.make_folder(workdir / "tuning" / "3", inside=workdir),
    "tuning/3": lambda workdir: files.make_folder(workdir / "tuning" / "3" / "marginals", inside=workdir),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_a_link_is_neither_written_to_nor_cleaned(name, tmp_path, foreign):
    place, before = tmp_path / "work" / name, _content(foreign)
    place.parent.mkdir(parents=True)
    place.symlink_to(foreign)
    with pytest.raises(FileError, match="is a link, which is not followed; delete it") as error:
        FOLDERS[name](tmp_path / "work")
    assert str(place) in str(error.value) and _content(foreign) == before


@pytest.mark.parametrize("name", ["7.deleted", "7.orbax-checkpoint-tmp", "7.damaged", "notes"])
def test_what_is_cleared_beside_checkpoints_is_not_followed(name, tmp_path, foreign):
    before = _content(foreign)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).symlink_to(foreign)
    checkpoint.Store(str(tmp_path / "checkpoints"), IDENTITY, 2)
    assert _content(foreign) == before
    assert os.path.lexists(tmp_path / "checkpoints" / name) == (name in ("7.damaged", "notes"))


def test_damaged_checkpoints_are_set_aside_beside_links_of_that_name(tmp_path):
    place = tmp_path / "checkpoints"
    (place / "7").mkdir(parents=True)
    (place / "7.damaged").symlink_to(tmp_path / "nothing")
    assert step_folders.set_aside(str(place), 7) == str(place / "7.damaged+")
    assert sorted(os.listdir(place)) == ["7.damaged", "7.damaged+"] and not (tmp_path / "nothing").exists()


def test_a_workdir_may_be_a_link_of_the_users_own(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "work").symlink_to(tmp_path / "disk")
    for write in WRITERS.values():
        write(tmp_path / "work")
    assert all((tmp_path / "disk" / name).is_file() for name in WRITERS)


# --- disks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, remedy",
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room, your quota"),
        (errno.EROFS, "read-only, name another place"),
        (errno.EACCES, "change the permissions"),
        (errno.EIO, "look at its disk"),
        (errno.ESTALE, "name another place"),
    ],
)
@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"train.lock", "metrics.jsonl", "label_report.json"}))
def test_what_cannot_be_written_is_named_with_a_remedy(name, code, remedy, tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    WRITERS[name](tmp_path)
    before = _content(tmp_path)

    def fails(number):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises((FileError, checkpoint.CheckpointError)) as error:
        WRITERS[name](tmp_path)
    if name == "checkpoints/3/note.json":
        assert "checkpoints/3 could not be written" in str(error.value)
    else:
        assert f"{tmp_path / name} cannot be written ({os.strerror(code)}); " in str(error.value)
        assert remedy in str(error.value)
    assert _content(tmp_path) == before  # nothing half-made is left


FILLED = """
import os, pathlib, sys, tempfile
from faults import test_faults_files as tests
work = pathlib.Path(sys.argv[1])
failed = []
for name, write in tests.WRITERS.items():
    (work / "checkpoints" / "3").mkdir(parents=True, exist_ok=True)
    write(work)
with open(work / "filler", "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
for name in set(tests.WRITERS) - {"train.lock"}:
    try:
        tests.WRITERS[name](work)
    except (tests.FileError, tests.checkpoint.CheckpointError) as error:
        failed.append(name)
        print(error)
tests.WRITERS["train.lock"](work)  # its name is not worth a run
print(sorted(failed) == sorted(set(tests.WRITERS) - {"train.lock"}))
"""


def test_a_full_disk(tmp_path):
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*command, "mount -t tmpfs none /mnt"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    mount = f'mount -t tmpfs -o size=400k none {tmp_path} && exec "$@"'
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/integration")))
    done = subprocess.run(
        [*command, mount, "sh", sys.executable, "-c", FILLED, tmp_path],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    *lines, all_of_them = done.stdout.splitlines()
    assert all_of_them == "True", done.stdout + done.stderr
    assert all("No space left on device" in line and "ake room" in line for line in lines), lines


@pytest.mark.parametrize("name", ["a" * 300 + ".json", "é" * 140, "a" * 5000, "x\n" * 200])
def test_names_that_are_too_long(name, tmp_path):
    with pytest.raises(FileError, match="File name too long.*take a shorter name"):
        files.write(tmp_path / name, "")
    assert not list(tmp_path.iterdir())


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    files.write(tmp_path / "a", "before")
    for error in (ValueError, KeyboardInterrupt, MemoryError):
        with pytest.raises(error), files.replacing(tmp_path / "a") as file:
            file.write(b"half")
            raise error
    assert _content(tmp_path) == [("a", "before")]


def test_what_a_killed_writer_left_is_deleted_and_nothing_else(tmp_path):
    left = [f".{'0123456789abcdef'[i:] + '0123456789abcdef'[:i]}.partial" for i in range(4)]
    kept = [".partial", ".0123.partial", "0123456789abcdef.partial", ".0123456789ABCDEF.partial", "a"]
    for name in [*left, *kept]:
        (tmp_path / name).write_text("")
    os.unlink(tmp_path / left[0])
    (tmp_path / left[0]).symlink_to(tmp_path / "a")
    with files.replacing(tmp_path / "b") as file:
        file.write(b"whole")
        files.delete_unfinished(tmp_path)  # as another process may
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "b", left[0]} and (tmp_path / "a").exists()
    assert (tmp_path / "b").read_bytes() == b"whole"


# --- power --------------------------------------------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch):
    """Paths that were synced, under the names that they had then."""
    paths, fsync = [], os.fsync

    def recording(number):
        paths.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    monkeypatch.setattr(os, "fsync", recording)
    return paths


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"train.lock", "metrics.jsonl"}))
def test_files_and_their_folders_are_synced(name, tmp_path, synced):
    WRITERS[name](tmp_path)
    folder = str((tmp_path / name).parent)
    assert synced[-1] == folder and os.path.dirname(synced[-2]) == folder and synced[-2].endswith(".partial")


def test_metrics_are_synced_where_it_is_asked(tmp_path, synced):
    writer = logs.Writer(str(tmp_path))
    writer.write(1, {"loss": 1.0}, "train")
    writer.sync()
    writer.close()
    assert [path for path in synced if "tensorboard" not in path] == [str(tmp_path / "metrics.jsonl")]


def test_a_checkpoint_is_on_the_disk_before_the_one_before_it_goes(tmp_path, synced, monkeypatch):
    with states.store(tmp_path / "checkpoints", keep=1) as store:
        deleted = []
        delete = store._delete
        monkeypatch.setattr(store, "_delete", lambda steps: (deleted.append((steps, set(synced))), delete(steps)))
        for step in (3, 6):
            store.save(step, states.trees(step), {})
            store.wait()
            new = {str(path) for path in (tmp_path / "checkpoints" / str(step)).rglob("*")}
            assert len(new) > 5 and {str(tmp_path / "checkpoints"), *new} <= deleted[-1][1]
    assert deleted[-1][0] == [3]


@pytest.mark.full
def test_a_run_syncs_its_metrics_with_each_checkpoint(config, tmp_path, synced):
    from pwcrf_jax.training import loop

    config.train.update(steps=2, eval_every=0, checkpoint_every=1)
    loop.train_and_evaluate(config, str(tmp_path / "work"))
    assert synced.count(str(tmp_path / "work" / "metrics.jsonl")) == 3  # and before the last evaluation counts as done


SPOILED = {"empty": b"", "zeros": bytes(4096), "cut": b'{"seed": 0, "data', "noise": b"\xff\xfe\x00", "list": b"[1]"}


@pytest.mark.parametrize("kind", ["checkpoints", "best"])
@pytest.mark.parametrize("spoiled", ["missing", *SPOILED])
def test_checkpoints_stand_in_for_a_config_that_power_loss_took(spoiled, kind, whole, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logs.log, "propagate", True)
    (tmp_path / "work").mkdir()
    shutil.copytree(whole / kind, tmp_path / "work" / kind)
    path = tmp_path / "work" / "config.json"
    if spoiled in SPOILED:
        path.write_bytes(SPOILED[spoiled])
    assert configs.load(path).to_dict() == configs.load(whole / "config.json").to_dict()
    assert f"{kind}/" in caplog.text and "is taken instead" in caplog.text and str(path) in caplog.text


@pytest.mark.parametrize("spoiled", full_but(["missing", "zeros"], "zeros"))
def test_a_run_goes_on_without_its_config(spoiled, whole, config, tmp_path):
    from pwcrf_jax.training import loop

    work = shutil.copytree(whole, tmp_path / "work")
    (work / "config.json").unlink()
    if spoiled in SPOILED:
        (work / "config.json").write_bytes(SPOILED[spoiled])
    assert evaluate.evaluate(configs.load(work / "config.json"), str(work))["num_images"]
    config.train.steps = 7
    loop.train_and_evaluate(config, str(work))
    assert states.read(work)[1]["step"] == 7 and json.loads((work / "config.json").read_text())["train"]["steps"] == 7


NOISE = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
LIBRARIES = {kind: lambda file, kind=kind: Image.fromarray(NOISE).save(file, kind) for kind in ("JPEG", "PNG", "WEBP")}
LIBRARIES |= {"TIFF": lambda file: Image.fromarray(NOISE).save(file, "TIFF", compression="tiff_lzw")}
LIBRARIES |= {"npy": lambda file: np.save(file, NOISE), "npz": lambda file: np.savez_compressed(file, a=NOISE)}


@pytest.mark.parametrize("room", [100, 1000, 30_000])
@pytest.mark.parametrize("kind", LIBRARIES)
def test_what_libraries_write_is_whole_or_refused(kind, room, tmp_path):
    """Given a descriptor, Pillow cuts a JPEG off without a word, and NumPy forgets why."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        with pytest.raises(FileError, match=r"/file cannot be written \(File too large\); raise the limit"):
            with files.replacing(tmp_path / "file") as file:
                LIBRARIES[kind](file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not list(tmp_path.iterdir())
    with files.replacing(tmp_path / "file") as file:
        LIBRARIES[kind](file)
    assert (tmp_path / "file").stat().st_size > 30_000
