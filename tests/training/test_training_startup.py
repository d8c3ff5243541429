"""What a start pays for: imports, and compilation, which the cache in the workdir saves the next start."""

import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import config_flags

from pwcrf_jax.training import cli, compilation, evaluate
from pwcrf_jax.training import config as configs

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    "module, not_loaded",
    [
        (
            "pwcrf_jax",
            "tensorflow tensorflow_datasets orbax grain matplotlib flax optax tensorboardX h5py PIL absl.flags",
        ),
        ("pwcrf_jax.training.cli", "tensorflow tensorflow_datasets grain matplotlib"),  # all that a refusal needs
    ],
)
def test_imports(module, not_loaded):
    code = f"import sys, {module}; print([m for m in {not_loaded.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the cache of compiled programs, in whole runs ---------------------------------------------------------

COUNTING = """
import atexit, collections, json, runpy, sys
import jax
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.rpartition("/")[2]]))
atexit.register(lambda: print(json.dumps(seen)))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script, workdir, *arguments, **env):
    """({event of JAX: how often}, standard error) of a script that went well."""
    env = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **env}
    command = [sys.executable, "-c", COUNTING, ROOT / script, f"--workdir={workdir}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A function that trains two steps in a workdir, on eight devices as all tests."""
    data = tmp_path_factory.getbasetemp() / "prepared"
    options = dict(
        data=dict(data_dir=data, synthetic=dict(num_train=24, num_val=8), crop_size="(96,128)"),
        model=dict(hidden=8, tiny=dict(features="(4,4,8,8)")),
        train=dict(batch_size=8, steps=2, log_every=1),
        eval=dict(batch_size=8),
    )

    def flat(options, prefix="--config"):
        for key, value in options.items():
            name = f"{prefix}.{key}"
            yield from flat(value, name) if isinstance(value, dict) else [f"{name}={value}"]

    return lambda workdir, *more: run("train.py", workdir, "--config=configs/demo.py", *flat(options), *more)


@pytest.fixture(scope="module")
def without(train, tmp_path_factory):
    """Workdir of a run whose cache cannot be: there is a file of that name."""
    workdir = tmp_path_factory.mktemp("without")
    (workdir / compilation.FOLDER).write_text("")
    seen, said = train(workdir)
    assert not seen.get("cache_hits") and not seen.get("cache_misses")
    assert re.search(rf"no compilation cache: .*{compilation.FOLDER} \(Not a directory\)", said)
    return workdir


@pytest.fixture(scope="module")
def cold(train, tmp_path_factory):
    """Workdir of a run that filled its cache."""
    workdir = tmp_path_factory.mktemp("cold")
    seen, _ = train(workdir)
    assert seen["cache_misses"] > 3
    return workdir


def entries(workdir):
    return {
        path.name: path.read_bytes() for path in (workdir / compilation.FOLDER).iterdir() if path.name != "index.json"
    }


def index(workdir):
    return json.loads((workdir / compilation.FOLDER / "index.json").read_text())


def figures(workdir):
    """Parameters and logged losses, to the last bit."""
    params = evaluate.restore_params(configs.load(workdir / "config.json"), str(workdir), "latest")[1]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(params)], lines


def test_the_cache_changes_no_number(without, cold):
    assert figures(cold) == figures(without)
    assert index(cold).keys() == entries(cold).keys()


def test_a_warm_start_compiles_only_what_was_damaged(train, cold):
    """In the same folder, as its path is among what JAX tells programs apart by."""
    expected, before, known, folder = figures(cold), entries(cold), index(cold), cold / compilation.FOLDER
    for path in set(cold.iterdir()) - {folder}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    torn, flipped, unsealed = sorted(before, key=lambda name: -len(before[name]))[:3]
    (folder / torn).write_bytes(before[torn][:1000])
    middle = bytearray(before[flipped])
    middle[len(middle) // 2] ^= 16
    (folder / flipped).write_bytes(middle)
    (folder / "index.json").write_text(json.dumps({k: v for k, v in known.items() if k != unsealed}))
    seen, said = train(cold)
    assert seen["cache_misses"] == 3 and seen["cache_hits"] >= len(before) - 3 and "Error reading" not in said
    assert figures(cold) == expected
    assert entries(cold).keys() == index(cold).keys() == before.keys()
    undamaged = before.keys() - {torn, flipped, unsealed}
    assert {name: index(cold)[name] for name in undamaged} == {name: known[name] for name in undamaged}


def test_eval_shares_the_cache(cold):
    before = entries(cold)
    seen, _ = run("eval.py", cold)
    assert (
        seen["cache_hits"] > 0
        and entries(cold).items() >= before.items()
        and entries(cold).keys() == index(cold).keys()
    )


# --- its parts ---------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    """This process without a cache, before and after."""
    yield
    compilation_cache.set_cache_dir(None)
    compilation_cache.reset_cache()
    compilation._folder = None


@pytest.mark.parametrize("wanted", [True, False])
def test_the_switch(wanted, tmp_path, monkeypatch):
    values, used = flags.FlagValues(), []
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={ROOT}/configs/demo.py", f"--workdir={tmp_path}"])
    sys.argv += [] if wanted else ["--config.compilation_cache=False"]
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    cli.parse(sys.argv, values)
    monkeypatch.setattr(cli.flags, "FLAGS", values)
    monkeypatch.setattr(compilation, "use", used.append)
    cli._use_cache()
    assert used == [str(tmp_path / "compile_cache")] * wanted


def test_a_cache_of_the_users_own_stays(fresh, tmp_path):
    compilation_cache.set_cache_dir(str(tmp_path / "own"))  # as JAX_COMPILATION_CACHE_DIR does
    write(tmp_path / "cache", a=b"1")
    compilation.use(str(tmp_path / "cache"))
    compilation.seal()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert os.listdir(tmp_path / "cache") == ["a"]


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_what_was_not_sealed_is_deleted(fresh, tmp_path):
    folder = tmp_path / "cache"
    write(folder, a=b"1", b=b"2")
    compilation.use(str(folder))
    assert not entries_of(folder)  # nobody knows them
    write(folder, a=b"1", b=b"2")
    compilation.seal()
    write(folder, b=b"3", c=b"4")
    compilation.use(str(folder))
    compilation_cache.set_cache_dir(None)
    compilation.use(str(folder))
    assert entries_of(folder) == {"a"}


def entries_of(folder):
    return {path.name for path in folder.iterdir()} - {"index.json"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 3}', b"\xff\xfe"])
def test_an_index_that_cannot_be_read_is_an_empty_one(fresh, tmp_path, content):
    write(tmp_path, a=b"1", **{"index.json": content})
    compilation.use(str(tmp_path))
    assert not entries_of(tmp_path) and jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_the_folder_is_not_made_before_it_is_needed(fresh, tmp_path):
    compilation.use(str(tmp_path / "work" / "cache"))
    compilation.seal()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_cannot_be_written(fresh, tmp_path, monkeypatch, caplog, exists):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compilation.os, "access", lambda *_: False)
    monkeypatch.setattr(compilation.os, "replace", denied)
    if exists:
        (tmp_path / "cache").mkdir()
    with caplog.at_level(logging.INFO, "pwcrf_jax"):
        monkeypatch.setattr(compilation.log, "propagate", True)
        compilation.use(str(tmp_path / "cache"))
    assert caplog.messages == [f"no compilation cache: {tmp_path}/cache (Permission denied)"]
    assert jax.config.jax_compilation_cache_dir is None
    compilation.seal()


def test_a_disk_that_is_full_when_sealing(fresh, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    compilation.use(str(tmp_path))
    write(tmp_path, a=b"1")
    monkeypatch.setattr(compilation.os, "replace", full)
    compilation.seal()
    assert json.loads((tmp_path / "index.json").read_text()) == {}
