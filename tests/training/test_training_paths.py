"""Paths of users: homes, URLs; and platforms that are not there: one line and exit code 2, before anything is made."""

import os
import pathlib
import pwd
import re
import subprocess
import sys

import jax
import pytest
import small
from rows import full_but, full_row

from pwcrf_jax import files
from pwcrf_jax.data import check, load_dataset
from pwcrf_jax.files import FileError, expand_path
from pwcrf_jax.training import cli, loop
from pwcrf_jax.training import config as configs

ROOT = pathlib.Path(__file__).parents[2]
URLS = ["gs://bucket/run", "s3://b/k", "hdfs://host:9000/a", "https://x.org/a.h5", "file:///x", "GS://b", "gs:/b/x",
        "abfss://c@a.dfs/x", " gs://b", "hf://user/model", "s3a://b/c"]  # fmt: skip
LOCAL = ["runs/demo", "/abs/run", "./~", "a~b/c", "C:/x", "run:1/a", "a/b://c", "", "-", "x.py:variant", "./gs:/x"]


@pytest.mark.parametrize("text", URLS)
def test_urls_are_refused(text):
    with pytest.raises(FileError, match="--workdir=.*only local paths can be used"):
        expand_path(text, "--workdir")


@pytest.mark.parametrize("text", LOCAL)
def test_local_paths_stay(text):
    assert expand_path(text, "--workdir") == text


def test_paths_with_nul():
    with pytest.raises(FileError, match="NUL"):
        expand_path("a\0b", "--workdir")


USER = pwd.getpwuid(os.getuid())


@pytest.mark.parametrize(
    "home, text, expected",
    [
        ("/users/me", "~/run", "/users/me/run"),
        ("/users/me", "~", "/users/me"),
        ("/users/me/", "~/a/../b", "/users/me/a/../b"),
        ("/", "~/run", "/run"),
        ("/users/me", f"~{USER.pw_name}/run", os.path.join(USER.pw_dir.rstrip("/"), "run")),
        (None, "~/run", os.path.join(USER.pw_dir.rstrip("/"), "run")),
        ("", "~/run", None),
        ("relative", "~/run", None),
        ("/users/me", "~nobody-of-this-name/run", None),
        ("/users/me", "~~/run", None),
    ],
)
def test_homes(home, text, expected, monkeypatch):
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    if expected:
        assert expand_path(text, "--output") == expected
    else:
        with pytest.raises(FileError, match="--output=~.*no home folder here; write the path in full"):
            expand_path(text, "--output")


def test_a_user_whom_nobody_knows(monkeypatch):
    def unknown(_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(FileError, match="you have no home folder"):
        expand_path("~/run", "--workdir")


@pytest.mark.parametrize("flag", cli.PATHS)
@pytest.mark.parametrize("dashes", ["-", "--"])
def test_every_flag_that_names_a_path(flag, dashes, monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    argv = ["eval.py", f"{dashes}{flag}=~/a", f"{dashes}{flag}", "~/b", f"{dashes}{flag}=c", f"{dashes}{flag}"]
    cli._expand_paths(argv)
    assert argv == ["eval.py", f"{dashes}{flag}=/users/me/a", f"{dashes}{flag}", "/users/me/b", f"{dashes}{flag}=c",
                    f"{dashes}{flag}"]  # fmt: skip
    for words in ([f"{dashes}{flag}=s3://a/b"], [f"{dashes}{flag}", "s3://a/b"]):
        with pytest.raises(FileError, match=f"{dashes}{flag}=s3://a/b: only local"):
            cli.parse(["eval.py", *words])


def test_no_flag_that_names_a_path_is_forgotten():
    """Path flags say in their help that they name a file or folder, path keys have a kind of their own."""
    code = "import sys, {0}; from absl import flags; print(*(f.name for f in flags.FLAGS.get_key_flags_for_module({0}) "
    code += "if f.flag_type() == 'string' and any(w in f.help for w in ('older', 'ile', 'images:'))))"
    found = set()
    for script in ("train", "eval"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(script)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        found |= set(done.stdout.split())
    assert {"workdir", "output", "images"} <= found <= {*cli.PATHS, "export_size"}
    keys = {f"config.{key}" for key, kind in configs.schema.SCHEMA.items() if isinstance(kind, configs.schema.Path)}
    assert keys == {name for name in cli.PATHS if "." in name}


@pytest.mark.parametrize("key", ["init_from", "data.source_dir", "data.data_dir"])
@pytest.mark.parametrize("value", ["gs://bucket/a", "~nobody-of-this-name/a", "hdfs://host/a"])
def test_keys_of_a_config_file(key, value, tmp_path):
    config = small.config(tmp_path, **{key: value})
    with pytest.raises(configs.ConfigError, match=rf"config\.{key} = .*must be the path of a local file or folder"):
        loop.train_and_evaluate(config, str(tmp_path / "work"))
    assert not list(tmp_path.iterdir())


def test_a_tilde_in_keys_of_a_config_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = small.config("~/sets", **{"init_from": "~/weights.h5"})
    config.data.synthetic.update(num_train=8, num_val=8)
    assert load_dataset(**configs.dataset_options(config)).folder.startswith(str(tmp_path / "sets"))
    with pytest.raises(Exception, match=f"config.init_from = .*{tmp_path}/weights.h5.* does not exist"):
        loop.checked_dataset(config)
    assert os.listdir(tmp_path) == ["sets"]


@pytest.mark.parametrize("where", ["data_dir", "source_dir", "TFDS_DATA_DIR"])
@pytest.mark.parametrize("value", ["gs://bucket/tfds", "~nobody-of-this-name/x", "s3://b"])
def test_the_check_command(where, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["synthetic", f"--{where}={value}"] if "_DIR" not in where else ["synthetic"]
    if "_DIR" in where:
        monkeypatch.setenv(where, value)
    assert check.main(words) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{where}={value}: " in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    full_but(["print('x' * 10)", "print('x' * 10**6)", "print('x', flush=True)", "open('/a/b')"], "print('x' * 10)"),
)
def test_output_that_cannot_be_written(words):
    """In one line, and not once more when Python ends."""
    code = "from absl import flags; from pwcrf_jax.training import cli; flags.DEFINE_string('workdir', '', ''); "
    code += f"flags.DEFINE_string('config', '', ''); cli.run(lambda _: {words})"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    where = r"/a/b cannot be used \(No such" if "open" in words else r"standard output cannot be used \(No space left"
    assert done.returncode == 2 and re.fullmatch(rf"error: {where}.*; .*\n", done.stderr), done.stderr


# --- platforms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, says",
    [
        (RuntimeError("Unable to initialize backend 'gpu0': Backend 'gpu0' is not in the list of known backends: "
                      "['cpu', 'tpu']. (set JAX_PLATFORMS='' to ...)"), "gpu0.*known backends"),
        (RuntimeError("Unable to initialize backend 'tpu':\nUNAVAILABLE: in use by process 1"), "in use by process 1"),
        (RuntimeError(""), "finds no device of that kind"),
        (AssertionError(), "finds no device of that kind"),
    ],
)  # fmt: skip
def test_a_platform_that_is_not_there(error, says, tmp_path, monkeypatch):
    def fails():
        raise error

    monkeypatch.setattr(jax, "device_count", fails)
    with pytest.raises(configs.ConfigError, match=f"{says}.*set JAX_PLATFORMS to what is there, such as cpu") as found:
        loop.train_and_evaluate(small.config(tmp_path), str(tmp_path / "work"))
    assert "\n" not in str(found.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("platform, words", [
    ("gpu0", ["train.py", "--workdir=work"]),
    full_row(("cuda", ["train.py", "--workdir=work", "--dry-run"])),
    ("cpu,metal", ["eval.py", "--workdir=trained", "--report=page.html"]),
    full_row(("CPU", ["eval.py", "--workdir=trained", "--tune-refinement"])),
])  # fmt: skip
def test_commands_without_their_platform(platform, words, tmp_path):
    script, *flags = words
    files.make_folder(tmp_path / "trained")
    configs.save(small.config("sets"), tmp_path / "trained" / "config.json")
    flags += small.flags("sets") if script == "train.py" else []
    flags = [flag.replace("configs/", f"{ROOT}/configs/") for flag in flags]
    done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"JAX_PLATFORMS": platform})  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith(f"error: JAX_PLATFORMS={platform}: "), done.stderr
    assert done.stderr.count("\n") == 1 and os.listdir(tmp_path) == ["trained"]
    assert os.listdir(tmp_path / "trained") == ["config.json"]
