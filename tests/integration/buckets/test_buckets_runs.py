"""A run whose workdir, data and output lie in buckets is the same run."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import commands
import jax
import numpy as np
import pytest
import small
from distributed.test_distributed import finished, start, trained
from faults import kill, states
from PIL import Image

from pwcrf_jax.data import load_dataset
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.runtime import buckets, checkpoint, files
from pwcrf_jax.training import loop

WORKDIR = "gs://bucket/runs/small"


def _config(tmp_path_factory, **changes):
    return small.config(tmp_path_factory.getbasetemp() / "prepared", **{"data.synthetic.num_val": 8} | changes)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory, programs):
    workdir = tmp_path_factory.mktemp("disk") / "work"
    loop.train_and_evaluate(_config(tmp_path_factory), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def in_bucket(service, tmp_path_factory, programs):
    """Trained to step 3 of 6, and then on."""
    for steps in (3, 6):
        loop.train_and_evaluate(_config(tmp_path_factory, **{"train.steps": steps}), WORKDIR)
    return WORKDIR


def _copied(service, name, folder):
    for key, content in service.objects.items():
        if key.startswith(f"{name}/"):
            path = pathlib.Path(folder, key.removeprefix(f"{name}/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


@pytest.mark.full
def test_a_run_that_goes_on_in_a_bucket_is_that_of_a_disk(in_bucket, on_disk, service, tmp_path):
    copy = _copied(service, "runs/small", tmp_path)
    assert states.final(copy) == states.final(on_disk)
    assert not files.exists(f"{WORKDIR}/train.lock")
    events = [content for name, content in service.objects.items() if "/tensorboard/" in name]
    assert len(events) > 2 and b"brain.Event:2" in b"".join(events) and b"train/loss" in b"".join(events)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in gs://bucket/none"):
        checkpoint.Store("gs://bucket/none", {})


@pytest.mark.full
def test_commands_on_buckets(in_bucket, service, tmp_path):
    """Evaluation with its page, and prediction of images of a bucket into another."""
    pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)
    for name in ("a.png", "sub/b.jpg"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels).save(file)
        buckets.send(str(file), f"gs://bucket/photos/{name}")
    buckets.write("gs://bucket/photos/notes.txt", b"no image")
    done = _run(["eval.py", "--workdir", WORKDIR, "--report", "auto", "--report_images", "2"])
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers == json.loads(json.dumps(evaluate.summary(json.loads(service.objects["runs/small/eval_val.json"]))))
    assert {"eval_val.json", "report_val.html"} <= set(files.names(WORKDIR))
    words = ["-m", "pwcrf_jax", "predict", "--workdir", WORKDIR, "--images", "gs://bucket/photos", "--output"]
    done = _run([*words, "gs://bucket/predicted"])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["num_images"] == 2 and result["left_out"] == ["gs://bucket/photos/notes.txt"] and not result["failed"]
    assert set(buckets.tree("gs://bucket/predicted")) == {
        *("classes.json", "labels/a.png", "labels/sub/b.png", "overlays/a.jpg", "overlays/sub/b.jpg")
    }
    again = commands.run([*words, "gs://bucket/predicted"])
    assert again.returncode == 2 and "is not empty; name another one, or add --overwrite" in again.stderr
    local = _run([*words[:6], str(tmp_path / "photos"), "--output", str(tmp_path / "out")])
    assert json.loads(local.stdout.splitlines()[-1])["num_images"] == 2
    assert (tmp_path / "out/labels/a.png").read_bytes() == service.objects["predicted/labels/a.png"]
    for url, says in {
        "gs://secret/run": "permission denied",
        "gs://no-such/run": "does not exist: is this the --workdir of a training run?",
        "gs://bucket/nothing": "does not exist: is this the --workdir of a training run?",
    }.items():
        done = commands.run(["eval.py", "--workdir", url])
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(lines) == 1 and says in lines[0] and "Traceback" not in done.stderr, done


def _run(words):
    done = commands.run(words)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.full
def test_a_run_starts_from_weights_and_runs_in_buckets(in_bucket, tmp_path_factory, programs):
    config = _config(tmp_path_factory, **{"init_from": WORKDIR, "train.steps": 1, "train.eval_every": 0})
    loop.train_and_evaluate(config, "gs://bucket/runs/started")
    assert files.exists("gs://bucket/runs/started/checkpoints/1/commit_success.txt")
    config.init_from = f"{WORKDIR}x"
    with pytest.raises(Exception, match=f"config.init_from = '{WORKDIR}x' does not exist"):
        loop.train_and_evaluate(config, "gs://bucket/runs/none")


@pytest.mark.slow
def test_a_save_while_the_service_is_gone_for_half_a_minute(service, tmp_path):
    """Nothing is lost: the save, and what of it failed, is done when the service is back."""
    held = threading.Event()

    def gone(method, path):
        if not held.is_set() and method == "POST" and "%2Fd%2F" in path or "_METADATA" in path and not held.is_set():
            held.set()
            threading.Thread(target=service.gone, args=(30,)).start()
        return 0

    trees = states.trees(3)
    with states.store("gs://bucket/outage/checkpoints") as store:
        service.trouble = gone
        try:
            store.save(3, trees, {"samples_seen": 3})
            store.wait()
        finally:
            service.trouble = lambda method, path: 0
        found, meta = store.restore(states.abstract())
    assert held.is_set() and meta["step"] == 3
    assert jax.tree.all(jax.tree.map(np.array_equal, found, trees))


@pytest.mark.slow
def test_a_service_that_is_gone_does_not_make_a_checkpoint_damaged(service, monkeypatch):
    with states.store("gs://bucket/unread/checkpoints") as store:
        for step in (3, 6):
            store.save(step, states.trees(step), {"samples_seen": step})
            store.wait()
        service.trouble = lambda method, path: 403 if "checkpoints%2F6" in path or "checkpoints/6" in path else 0
        try:
            with pytest.raises(checkpoint.CheckpointError, match="checkpoints/6 cannot be read .*see to the network"):
                store.restore(states.abstract())
        finally:
            service.trouble = lambda method, path: 0
        assert store.restore(states.abstract())[1]["step"] == 6 and not store.damaged


def _images(tmp_path, url, count=12):
    """A folder of images and masks, as objects."""
    source = tmp_path / "source"
    for name in ("images", "masks"):
        (source / name).mkdir(parents=True)
    (source / "classes.txt").write_text("sky\nwater\n")
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 255, (40, 50, 3), np.uint8)).save(source / f"images/{i}.png")
        Image.fromarray(random.integers(0, 2, (40, 50), np.uint8)).save(source / f"masks/{i}.png")
    for path in source.rglob("*.*"):
        buckets.send(str(path), f"{url}/{path.relative_to(source)}")


@pytest.mark.full
def test_data_in_a_bucket_is_prepared_once(service, tmp_path, monkeypatch):
    """Each machine has a cache of its own."""
    _images(tmp_path, "gs://bucket/own/source")
    found = []
    for machine in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        dataset = load_dataset("image_folder", source_dir="gs://bucket/own/source", data_dir="gs://bucket/own/sets")
        found.append([dataset.source("train")[i] for i in range(len(dataset.source("train")))])
        assert dataset.folder.startswith(str(tmp_path / machine)) and dataset.label_report()["splits"]
    for one, other in zip(*found, strict=True):
        assert one["id"] == other["id"] and np.array_equal(one["image"], other["image"])
    versions = {name: version for name, version in service.versions.items() if name.startswith("own/sets/")}
    assert len([name for name in versions if name.endswith("/whole.json")]) == 1
    # A machine that was stopped between preparing and sending sends.
    for name in versions:
        buckets.delete(f"gs://bucket/{name}")
    load_dataset("image_folder", source_dir="gs://bucket/own/source", data_dir="gs://bucket/own/sets")
    assert {name for name in service.versions if name.startswith("own/sets/")} == set(versions)
    with pytest.raises(files.FileError, match="gs://read-only/sets/.*cannot be written .permission denied"):
        load_dataset("image_folder", source_dir="gs://bucket/own/source", data_dir="gs://read-only/sets")
    with pytest.raises(files.FileError, match="gs://bucket/own/none does not exist"):
        load_dataset("image_folder", source_dir="gs://bucket/own/none", data_dir="gs://bucket/own/sets")


@pytest.mark.slow
def test_data_in_a_bucket_is_prepared_by_one_of_two_processes(service, tmp_path):
    """As two machines do it at once: each has a cache of its own."""
    _images(tmp_path, "gs://bucket/source")
    words = ["check", "image_folder", "--source_dir", "gs://bucket/source", "--data_dir", "gs://bucket/sets"]
    started = []
    for i in range(2):
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / f"host{i}")}
        command = [sys.executable, "-m", "pwcrf_jax", *words]
        started.append(
            subprocess.Popen(command, cwd=kill.ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
        )  # fmt: skip
    ended = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    hosts = [tmp_path / f"host{i}/pwcrf_jax/buckets/bucket/sets" for i in range(2)]
    of = lambda host: {str(p.relative_to(host)): p.read_bytes() for p in host.rglob("*") if p.is_file()}
    first, second = map(of, hosts)
    records = {name for name in first if "array_record" in name}
    assert records and first.keys() == second.keys() and all(first[name] == second[name] for name in records)
    whole = [name for name in service.versions if name.startswith("sets/") and name.endswith("whole.json")]
    assert len(whole) == 1 and not [name for name in service.versions if name.startswith("sets/") and "lock" in name]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_with_all_in_buckets_are_those_on_a_disk(service, tmp_path, processes):
    """Where no disk is shared: the workdir and the prepared data."""
    pod = f"gs://bucket/pod{processes}"
    for steps in (4, 6):  # the rate's schedule ends at the last step
        on_disk, _ = trained(tmp_path, processes, **{"train.steps": steps})
        keys = {"data.data_dir": f"{pod}/sets", "train.steps": steps}
        codes, logs = finished(start(tmp_path, f"{pod}/run", processes, **keys))
        assert codes == [0] * processes, logs
    codes, logs = finished(start(tmp_path, f"{pod}/run", processes, "eval.py"))
    assert codes == [0] * processes and files.exists(f"{pod}/run/eval_val.json"), logs
    copy = _copied(service, f"pod{processes}/run", tmp_path / "copy")
    assert states.read(copy)[1]["hashes"] == states.read(on_disk)[1]["hashes"]
    assert states.lines(copy) == states.lines(on_disk)


SAVES = """
import sys
sys.path[:0] = ["tests", "tests/integration"]
import jax, numpy as np
from faults import states
from pwcrf_jax.runtime import lock, logs
url = sys.argv[1]
with lock.held(url), states.store(f"{url}/checkpoints") as store:
    step = 0
    if store.latest is not None:
        found, meta = store.restore(states.abstract())
        step = meta["step"]
        assert step == store.latest and jax.tree.all(jax.tree.map(np.array_equal, found, states.trees(step)))
    writer = logs.Writer(url, step)
    print("goes on from", step, flush=True)
    while True:
        step += 1
        writer.write(step, {"loss": step}, "train")
        writer.sync()
        store.save(step, states.trees(step), {"samples_seen": step})
        store.wait()
"""


@pytest.mark.slow
def test_killed_in_saves_again_and_again(service, tmp_path, kills=20):
    """`kill -9` in a save, in the deletion after it, or between: the newest checkpoint is whole, and so is the log."""
    place, rng, newest = kill.Bucket(tmp_path / "saves", service), random.Random(5), 0
    for number in range(kills):
        process = commands.start(["-c", SAVES, place.path], place.log, place.log)
        alive = lambda process=process: process.poll() is None
        began = lambda: "goes on from" in place.log.read_text()
        while alive() and not began():
            time.sleep(0.01)
        for _ in range(rng.randrange(1, 4)):
            while alive() and not place.temporary():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.5))
        assert alive(), place.log.read_text()
        process.send_signal(signal.SIGKILL)
        process.wait()
        cut = bool(place.temporary())
        with place.on_disk() as copy:
            if not newest and not checkpoint.exists(str(copy / "checkpoints")):
                continue  # killed in the first save
            reader = states.store(copy / "checkpoints", keep=None)
            found, meta = reader.restore(states.abstract())
            assert meta["step"] == reader.latest >= newest and "cannot be read" not in place.log.read_text()
            assert jax.tree.all(jax.tree.map(np.array_equal, found, states.trees(meta["step"])))
            newest = meta["step"]
            steps = [line["step"] for line in states.lines(copy)]
            assert steps[:newest] == list(range(1, newest + 1)) and len(steps) <= newest + 2, steps
        print(f"kill {number + 1}: newest step {newest}, {'in a save or a deletion' * cut}", flush=True)


@pytest.mark.slow
def test_killed_with_the_workdir_in_a_bucket(service, tmp_path_factory):
    whole = kill.undisturbed(tmp_path_factory.mktemp("lives"), devices=2, forked=True)
    summary = kill.campaign(whole, 20, seed=3, service=service)
    print(summary)
    assert not summary["violations"] and summary["finished runs"] and summary["kills"] == 20
