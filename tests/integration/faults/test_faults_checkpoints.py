"""Damaged checkpoints are named and passed over, never loaded; failed saves leave what was there."""

import contextlib
import os
import random
import shutil
import sys

import commands
import jax
import numpy as np
import pytest
from faults.states import CLASSES, MODEL, abstract, store, trees

from pwcrf_jax.runtime import checkpoint
from pwcrf_jax.runtime.checkpoint import CheckpointError
from pwcrf_jax.runtime.logs import log


@pytest.fixture(autouse=True)
def _log_is_seen(monkeypatch):
    monkeypatch.setattr(log, "propagate", True)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flips(folder, number, seed):
    """Flips one bit after another in all files of checkpoint 6; how many were harmless, and how many refused."""
    rng, original = random.Random(seed), folder.parent / "original"
    shutil.copytree(folder, original)
    targets = [path.relative_to(original) for path in files(original / "6") if path.stat().st_size]
    harmless = refused = 0
    for i in range(number):
        # Every file in turn, as the large ones would get nearly all otherwise.
        path = folder / targets[i % len(targets)]
        flip(path, rng.randrange(8 * path.stat().st_size))
        got, meta = store(folder, keep=None).restore(abstract())
        if meta["step"] == 6:
            # A note that is damaged is as good as none, see test_notes.
            right = equal(got, trees(6)) and meta["samples_seen"] == 48 and meta.get("score") in (0.1 * 6, None)
            assert right and ("score" in meta or path.name == "note.json"), f"silent: {path}"
            harmless += 1
        else:
            assert meta["step"] == 3 and equal(got, trees(3)), path
            refused += 1
        shutil.copy(original / path.relative_to(folder), path)
    return harmless, refused


def test_no_flipped_bit_is_loaded(folder):
    harmless, refused = flips(folder, 40, 0)
    assert refused > 10


@pytest.mark.slow
def test_none_of_many_flipped_bits_is_loaded(folder):
    harmless, refused = flips(folder, 2000, 1)
    print(f"\n2000 bit flips: {refused} refused, {harmless} in bytes that decide nothing, 0 loaded")
    assert refused > 500


def test_flips_would_be_loaded_without_hashes(tmp_path, monkeypatch):
    """Else the tests above show nothing."""
    monkeypatch.setattr(checkpoint, "hashes", lambda tree: dict.fromkeys(checkpoint.leaves(tree), ""))
    with store(tmp_path) as writer:
        writer.save(3, trees(3), {})
    for path in sorted(files(tmp_path / "3" / "params"), key=lambda path: -path.stat().st_size):
        for bit in range(0, 8 * path.stat().st_size, 997):
            flip(path, bit)
            with contextlib.suppress(CheckpointError):
                if not equal(store(tmp_path, keep=None).restore(abstract())[0], trees(3)):
                    return
            flip(path, bit)
    pytest.fail("Orbax refuses all of them by itself now")


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "spoil", [_truncate, os.remove, lambda path: path.write_bytes(b"")], ids=["cut", "gone", "empty"]
)
def test_every_file_may_be_damaged(folder, spoil):
    shutil.copytree(folder, folder.parent / "original")
    refused = 0
    for path in files(folder / "6"):
        spoil(path)
        got, meta = store(folder, keep=None).restore(abstract())
        assert equal(got, trees(meta["step"])), path
        refused += meta["step"] == 3
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "original", folder)
    assert refused > 5


def test_the_damaged_one_is_named_moved_aside_and_training_goes_on_saving(folder, caplog):
    leaf = max(files(folder / "6" / "params"), key=lambda path: path.stat().st_size)
    leaf.write_bytes(b"\0" * leaf.stat().st_size)
    with store(folder) as writer:
        got, meta = writer.restore(abstract())
        assert meta["step"] == 3 and equal(got, trees(3))
        (line,) = caplog.messages
        assert f"{folder}/6 cannot be read (" in line and "step 3 is taken; now" in line and "6.damaged" in line
        assert (folder / "6.damaged").is_dir() and not (folder / "6").exists()
        writer.save(6, trees(6), {})
    assert store(folder, None).restore(abstract())[1]["step"] == 6
    # The next damage of the same step hides nothing of this one.
    shutil.rmtree(folder / "6" / "params")
    with store(folder) as writer:
        assert writer.restore(abstract())[1]["step"] == 3
    assert sorted(x.name for x in folder.iterdir()) == ["3", "6.damaged", "6.damaged+"]


def test_a_reader_moves_nothing(folder, caplog):
    shutil.rmtree(folder / "6" / "params")
    assert store(folder, None).restore(abstract())[1]["step"] == 3
    assert sorted(x.name for x in folder.iterdir()) == ["3", "6"] and "step 3 is taken" in caplog.text


def test_nothing_whole_is_left(folder):
    for step in (3, 6):
        shutil.rmtree(folder / str(step) / "meta")
    with pytest.raises(CheckpointError, match=r"/6 cannot be read.*/3 cannot be read.*no other is there"):
        store(folder).restore(abstract())
    assert sorted(x.name for x in folder.iterdir()) == ["3", "6"], "what cannot be replaced stays in its place"


def test_a_folder_that_is_named_for_another_step(folder, caplog):
    os.rename(folder / "3", folder / "9")
    assert store(folder, None).restore(abstract())[1]["step"] == 6
    assert "/9 cannot be read (it holds step 3)" in caplog.text


def test_deleted_by_hand(folder):
    shutil.rmtree(folder / "6")
    with store(folder) as writer:
        assert writer.latest == 3 and equal(writer.restore(abstract())[0], trees(3))


def test_leftovers_are_cleared_by_the_next_writer_alone(folder):
    for name in ("9.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-12", "1.deleted"):
        shutil.copytree(folder / "3", folder / name)
    store(folder, None).restore(abstract())
    assert len(list(folder.iterdir())) == 5
    store(folder)
    assert sorted(x.name for x in folder.iterdir()) == ["3", "6"]


def test_the_newest_are_kept(folder):
    with store(folder, keep=2) as writer:
        for step in (9, 12):
            writer.save(step, trees(step), {})
    assert sorted(x.name for x in folder.iterdir()) == ["12", "9"]
    with store(folder, keep=1) as writer:
        writer.save(10, trees(10), {})  # of a run that fell back
    assert [x.name for x in folder.iterdir()] == ["10"]


def test_notes(folder):
    with store(folder) as writer:
        assert writer.meta()["score"] == 0.1 * 6
        writer.note(6, {"score": 2})
        assert writer.restore(abstract())[1]["score"] == writer.meta()["score"] == 2
        (folder / "6" / "note.json.partial").write_text("{")
        assert writer.meta()["score"] == 2
        flip(folder / "6" / "note.json", 100)
        assert "score" not in writer.meta()
        (folder / "6" / "note.json").unlink()
        assert "score" not in writer.meta()
        writer.note(6, {"score": 3})
        assert writer.meta()["score"] == 3
        shutil.rmtree(folder / "6")
        with pytest.raises(CheckpointError, match="/6 could not be written"):
            writer.note(6, {"score": 3})


def test_a_reader_beside_a_run_that_deletes(folder, monkeypatch):
    reader, load = store(folder, None), checkpoint._load

    def late(path, wanted):
        if path.endswith("/6"):  # listed, but deleted before it is read
            with store(folder, keep=1) as writer:
                writer.save(9, trees(9), {})
        return load(path, wanted)

    monkeypatch.setattr(checkpoint, "_load", late)
    assert reader.restore(abstract())[1]["step"] == 9


# --- what belongs together ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("model.backbone", "vgg16", r"model\.backbone is 'tiny' in the checkpoint and 'vgg16'"),
        ("model.relations", ["surrounding"], r"model\.relations is \['surrounding', 'above_below'\]"),
    ],
)
def test_another_model_is_no_damage(folder, key, value, match):
    with pytest.raises(CheckpointError, match=rf"belongs to another model: {match}"):
        store(folder, model=MODEL | {key: value}).restore(abstract())


@pytest.mark.parametrize(
    "classes, match",
    [
        (("sky", "boat", "water"), "class 1 is 'water' in the checkpoint and 'boat'"),
        (("sky", "water"), "class 2 is 'boat' in the checkpoint and absent"),
    ],
)
def test_other_classes(folder, classes, match):
    with pytest.raises(CheckpointError, match=match):
        store(folder, classes=classes).restore(abstract())
    store(folder, classes=()).restore(abstract())  # not compared


def test_what_a_checkpoint_says_of_itself(folder):
    meta = store(folder).meta()
    assert meta["class_names"] == list(CLASSES) and meta["model"] == MODEL
    import flax
    import optax
    import orbax.checkpoint

    import pwcrf_jax

    expected = dict(pwcrf_jax=pwcrf_jax, jax=jax, flax=flax, optax=optax, numpy=np)
    expected["orbax-checkpoint"] = orbax.checkpoint
    assert {name: module.__version__ for name, module in expected.items()}.items() <= meta["versions"].items()


# --- saves that fail ------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_full_disk(folder):
    """A limit of the size of files, in a process of its own, as it stays for good."""
    code = f"""
import resource, signal, sys
sys.path[:0] = {sys.path!r}
from faults.states import store, trees
from pwcrf_jax.runtime import checkpoint, logs
logs.setup()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
with store({str(folder)!r}) as writer:
    try:
        writer.save(9, trees(9), dict())
        writer.wait()
    except checkpoint.CheckpointError as error:
        sys.exit(str(error))
"""
    done = commands.run(["-c", code])
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{folder}/9 could not be written (" in done.stderr and "step 6, is as it was" in done.stderr
    assert equal(store(folder).restore(abstract())[0], trees(6))
    assert sorted(x.name for x in folder.iterdir()) == ["3", "6"]


def test_a_process_that_writes_nothing_may_be_there_before_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.jax, "process_index", lambda: 1)
    other = store(tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()
    assert other.latest is None and other.damaged == []


def test_a_failed_save_is_told_by_the_next_check(folder, monkeypatch):
    class Response:
        def result(self, timeout):
            answers = {0: TimeoutError(), 1: ValueError("RESOURCE_EXHAUSTED: ... No space left on device [28]")}
            raise answers[min(next(calls), 1)]

    calls = iter(range(9))
    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", lambda *_: Response())
    writer = store(folder)
    writer.save(9, trees(9), {})
    writer.check()  # not through yet
    with pytest.raises(CheckpointError, match=r"/9 could not be written \(No space left on device\).*step 6, is as it"):
        writer.check()
    writer.check()
    assert sorted(x.name for x in folder.iterdir()) == ["3", "6"]
