"""What a start pays for: imports, and compilation, which the user's cache saves the next start."""

import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys

import commands
import jax
import numpy as np
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import config_flags

from pwcrf_jax import config as configs
from pwcrf_jax.cli import command as cli
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import compilation

ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.parametrize(
    "module, not_loaded",
    [
        (
            "pwcrf_jax",
            "tensorflow tensorflow_datasets orbax grain matplotlib flax optax tensorboardX h5py PIL absl.flags",
        ),
        ("pwcrf_jax.cli.command", "tensorflow tensorflow_datasets grain matplotlib"),  # all that a refusal needs
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


def run(script, workdir, *arguments):
    """({event of JAX: how often}, standard error) of a script that went well. Caches lie beside the workdir."""
    caches = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(workdir.parent / "caches")}
    env = {**os.environ, **caches, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = commands.run(["-c", COUNTING, ROOT / script, f"--workdir={workdir}", *arguments], env=env)
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
    """Workdir of a run whose cache cannot be: there is a file of that name. A cache in the workdir is not read."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "caches").write_text("")
    (folder / "work" / "compile_cache").mkdir(parents=True)
    (folder / "work" / "compile_cache" / "a-cache").write_text("")
    seen, said = train(folder / "work")
    assert not seen.get("cache_hits") and not seen.get("cache_misses")
    assert re.search(r"no compilation cache: .*caches", said)
    assert os.listdir(folder / "work" / "compile_cache") == ["a-cache"]
    return folder / "work"


@pytest.fixture(scope="module")
def cold(train, tmp_path_factory):
    """Workdir of a run that filled its cache."""
    workdir = tmp_path_factory.mktemp("cold") / "work"
    seen, _ = train(workdir)
    assert seen["cache_misses"] > 3 and not (workdir / "compile_cache").exists()
    assert programs(workdir).stat().st_mode & 0o777 == 0o700
    return workdir


def programs(workdir):
    return workdir.parent / "caches" / "pwcrf_jax" / "programs"


def entries(workdir):
    return {path.name: path.read_bytes() for path in programs(workdir).iterdir() if path.name != "index.json"}


def index(workdir):
    return json.loads((programs(workdir) / "index.json").read_text())


def figures(workdir):
    """Parameters and logged losses, to the last bit."""
    params = restore.restore_params(configs.load(workdir / "config.json"), str(workdir), "latest")[1]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(params)], lines


@pytest.mark.full
def test_the_cache_changes_no_number(without, cold):
    assert figures(cold) == figures(without)
    assert index(cold).keys() == entries(cold).keys()


@pytest.mark.full
def test_a_warm_start_compiles_only_what_was_damaged(train, cold):
    expected, before, known, folder = figures(cold), entries(cold), index(cold), programs(cold)
    shutil.rmtree(cold)
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


@pytest.mark.full
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
def home(tmp_path, monkeypatch):
    """The folder of programs in a cache home of the test's own; this process without a cache, before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(compilation.log, "propagate", True)
    yield tmp_path / "caches" / "pwcrf_jax" / "programs"
    compilation_cache.set_cache_dir(None)
    compilation_cache.reset_cache()
    compilation._folder = None


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "pwcrf_jax")
    return caplog


@pytest.mark.parametrize("wanted", [True, False])
def test_the_switch(wanted, tmp_path, monkeypatch):
    values, used = flags.FlagValues(), []
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={ROOT}/configs/demo.py", f"--workdir={tmp_path}"])
    sys.argv += [] if wanted else ["--config.compilation_cache=False"]
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    cli.parse(sys.argv, values)
    monkeypatch.setattr(cli.flags, "FLAGS", values)
    monkeypatch.setattr(compilation, "use", lambda: used.append(1))
    cli._use_cache()
    assert used == [1] * wanted


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.parent.chmod(0o700)
    for name, content in files.items():
        (folder / f"{name}-cache").write_bytes(content)


def entries_of(folder):
    return {path.name.removesuffix("-cache") for path in folder.iterdir()} - {"index.json"}


def test_a_cache_that_was_named_otherwise_stays(home, tmp_path):
    compilation_cache.set_cache_dir(str(tmp_path / "own"))  # as JAX_COMPILATION_CACHE_DIR does
    write(home, a=b"1")
    compilation.use()
    compilation.seal()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert os.listdir(home) == ["a-cache"]


def test_what_was_not_sealed_is_deleted(home):
    write(home, a=b"1", b=b"2")
    compilation.use()
    assert not entries_of(home)  # nobody knows them
    write(home, a=b"1", b=b"2")
    compilation.seal()
    write(home, b=b"3", c=b"4")
    compilation_cache.set_cache_dir(None)
    compilation.use()
    assert entries_of(home) == {"a"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"a-cache": 3}', b"\xff\xfe", b"[" * 10**5])
def test_an_index_that_cannot_be_read_is_an_empty_one(home, content):
    write(home, a=b"1")
    (home / "index.json").write_bytes(content)
    compilation.use()
    assert not entries_of(home) and jax.config.jax_compilation_cache_dir == str(home)


def test_the_oldest_programs_go_first(home, monkeypatch):
    monkeypatch.setattr(compilation, "LIMIT", 25)
    compilation.use()
    write(home, a=b"0123456789", b=b"0123456789", c=b"0123456789")
    for i, name in enumerate("bca"):
        os.utime(home / f"{name}-cache", (i, i))
    compilation.seal()
    compilation_cache.set_cache_dir(None)
    compilation.use()
    assert entries_of(home) == {"a", "c"}


@pytest.mark.parametrize(
    "cache, user, expected",
    [
        ("/caches", "/users/me", "/caches/pwcrf_jax/programs"),
        ("", "/users/me", "/users/me/.cache/pwcrf_jax/programs"),
        ("relative/caches", "/users/me", "/users/me/.cache/pwcrf_jax/programs"),
        ("~/caches", "/users/me", "/users/me/.cache/pwcrf_jax/programs"),
        (None, "/", "/.cache/pwcrf_jax/programs"),
        ("", "", None),
        (None, "relative", None),
    ],
)
def test_the_folder_is_that_of_the_user(cache, user, expected, monkeypatch):
    for name, value in (("XDG_CACHE_HOME", cache), ("HOME", user)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    if expected:
        assert compilation.user_folder() == expected
    else:
        with pytest.raises(OSError, match="you have no home folder"):
            compilation.user_folder()


def _link(home):
    elsewhere = home.parents[2] / "elsewhere"
    write(elsewhere, thesis=b"1")
    home.parent.mkdir(parents=True)
    home.symlink_to(elsewhere)
    return elsewhere


def _link_above(home):
    elsewhere = home.parents[2] / "elsewhere"
    write(elsewhere / "programs", thesis=b"1")
    home.parents[1].mkdir()
    home.parent.symlink_to(elsewhere)
    return elsewhere / "programs"


def _open_to_all(home):
    write(home, thesis=b"1")
    home.chmod(0o777)
    return home


def _open_to_the_group(home):
    write(home, thesis=b"1")
    home.parent.chmod(0o770)
    return home


def _of_another(home):
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    write(home, thesis=b"1")
    os.chown(home, 12345, 12345)
    return home


@pytest.mark.parametrize("make", [_link, _link_above, _open_to_all, _open_to_the_group, _of_another])
def test_a_folder_into_which_others_can_write_is_left_alone(home, said, make):
    folder = make(home)
    compilation.use()
    compilation.seal()
    (line,) = said.messages
    assert line.startswith("no compilation cache: ") and "nobody else can write" in line
    assert jax.config.jax_compilation_cache_dir is None and os.listdir(folder) == ["thesis-cache"]


@pytest.mark.parametrize("where", ["caches", "caches/pwcrf_jax", "caches/pwcrf_jax/programs"])
def test_a_file_in_the_place_of_the_folder(home, said, where):
    place = home.parents[2] / where
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    place.write_text("")
    compilation.use()
    assert len(said.messages) == 1 and str(place) in said.text and jax.config.jax_compilation_cache_dir is None


def test_a_disk_that_is_full(home, said, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    compilation.use()
    write(home, a=b"1")
    with monkeypatch.context() as patch:
        patch.setattr(compilation.files, "replacing", full)
        compilation.seal()
        assert json.loads((home / "index.json").read_text()) == {}
        compilation_cache.set_cache_dir(None)
        compilation.use()
    assert "no compilation cache: [Errno 28] No space left on device" in said.text
    assert jax.config.jax_compilation_cache_dir is None
