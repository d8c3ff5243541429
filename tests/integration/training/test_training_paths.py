"""Paths of users: homes, URLs; and platforms that are not there: one line and exit code 2, before anything is made."""

import errno
import importlib
import io
import os
import pathlib
import pwd
import re
import subprocess
import sys

import commands
import jax
import pytest
import small
from absl import flags
from rows import full_but, full_row

from pwcrf_jax import config as configs
from pwcrf_jax.cli import check, command
from pwcrf_jax.cli.main import COMMANDS
from pwcrf_jax.config import keys, kinds
from pwcrf_jax.data import load_dataset
from pwcrf_jax.runtime import files
from pwcrf_jax.runtime.files import FileError, expand_path
from pwcrf_jax.runtime.streams import naming_stdout, say
from pwcrf_jax.training import checks, loop

ROOT = pathlib.Path(__file__).parents[3]
URLS = ["s3://b/k", "hdfs://host:9000/a", "https://x.org/a.h5", "file:///x", "GS://b", "gs:/b/x",
        "abfss://c@a.dfs/x", " gs://b", "hf://user/model", "s3a://b/c"]  # fmt: skip
LOCAL = ["runs/demo", "/abs/run", "./~", "a~b/c", "C:/x", "run:1/a", "a/b://c", "", "-", "x.py:variant", "./gs:/x"]


@pytest.mark.parametrize("text", URLS)
def test_urls_are_refused(text):
    with pytest.raises(FileError, match="--workdir=.*only local paths and gs://BUCKET/NAME can be used"):
        expand_path(text, "--workdir")


@pytest.mark.parametrize(
    "text", ["gs://bucket/run", "gs://my_bucket.org/a b/c=1/*.jpg", "gs://bucket", "gs://bucket/a/"]
)
def test_buckets(text, monkeypatch):
    """Only syntax and the packages are looked at here."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert expand_path(text, "--workdir") == text.rstrip("/")
    with pytest.raises(FileError, match="--config=gs:.*only local paths can be used"):
        expand_path(text, "--config")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else name)
    with pytest.raises(FileError, match=r"--workdir=gs:.*read with gcsfs: pip install \"pwcrf_jax\[gcs\]\""):
        expand_path(text, "--workdir")


@pytest.mark.parametrize("flag", ["config", "scores", "masks", "classes", "parameters"])
def test_flags_that_take_no_bucket(flag):
    with pytest.raises(FileError, match=f"--{flag}=gs://bucket/x: only local paths can be used"):
        expand_path("gs://bucket/x", f"--{flag}")
    with pytest.raises(FileError, match="--output=gs://bucket/x: only local paths can be used here"):
        files.check_local("gs://bucket/x", "--output")


@pytest.mark.parametrize("text", ["gs://", "gs://b", "gs:///a", "gs://Bucket/a", "gs://bucket//a", "gs://bucket/../a",
                                  "gs://bucket/a\nb", "gs://bucket/./a"])  # fmt: skip
def test_urls_that_name_no_bucket(text):
    with pytest.raises(FileError, match="is no gs://BUCKET/NAME"):
        expand_path(text, "--output")


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


@pytest.mark.parametrize("flag", command.PATHS)
@pytest.mark.parametrize("dashes", ["-", "--"])
def test_every_flag_that_names_a_path(flag, dashes, monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    argv = ["eval.py", f"{dashes}{flag}=~/a", f"{dashes}{flag}", "~/b", f"{dashes}{flag}=c.d", f"{dashes}{flag}"]
    command._expand_paths(argv)
    assert argv == ["eval.py", f"{dashes}{flag}=/users/me/a", f"{dashes}{flag}", "/users/me/b", f"{dashes}{flag}=c.d",
                    f"{dashes}{flag}"]  # fmt: skip
    for words in ([f"{dashes}{flag}=s3://a/b"], [f"{dashes}{flag}", "s3://a/b"]):
        with pytest.raises(FileError, match=f"{dashes}{flag}=s3://a/b: only local"):
            command.parse(["eval.py", *words])


def test_no_flag_that_names_a_path_is_forgotten():
    """Path flags say in their help that they name a file or folder, path keys have a kind of their own."""
    found = set()
    for name in set(COMMANDS) - {"check"}:
        values = flags.FlagValues()
        importlib.import_module(f"pwcrf_jax.cli.{name}").define_flags(values)
        of_files = lambda flag: any(word in flag.help for word in ("older", "ile", "images:"))
        found |= {f.name for f in map(values.__getitem__, values) if f.flag_type() == "string" and of_files(f)}
    assert found == {name for name in command.PATHS if "." not in name} - {"config"}
    named = {f"config.{key}" for key, entry in keys.KEYS.items() if isinstance(entry.kind, kinds.Path)}
    assert named == {name for name in command.PATHS if "." in name}


@pytest.mark.parametrize("key", ["init_from", "data.source_dir", "data.data_dir"])
@pytest.mark.parametrize("value", ["gs://bucket//a", "gs://../a", "~nobody-of-this-name/a", "hdfs://host/a"])
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
        checks.load_and_validate(config)
    assert os.listdir(tmp_path) == ["sets"]


@pytest.mark.parametrize("where", ["data_dir", "source_dir", "TFDS_DATA_DIR"])
@pytest.mark.parametrize("value", ["gs://bucket//tfds", "~nobody-of-this-name/x", "s3://b"])
def test_the_check_command(where, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["synthetic", f"--{where}={value}"] if "_DIR" not in where else ["synthetic"]
    if "_DIR" in where:
        monkeypatch.setenv(where, value)
    assert check.main(words) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{where}={value}: " in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["--workdir=~/a", "--workdir\n~/a", "# mine\n\n  -workdir=~/a\n", "--flagfile=other"])
@pytest.mark.parametrize("form", [["--flagfile=given"], ["--flagfile", "given"], ["--trials=3", "-flagfile=given"]])
def test_paths_in_a_file_of_flags(given, form, tmp_path, monkeypatch):
    """They are expanded, and seen by what is read before the other flags, such as the workdir of eval.py."""
    monkeypatch.setenv("HOME", "/users/me")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("--workdir=~/a\n")
    values, seen = _flag_values(), []
    for text, refusal in ((given, None), (given.replace("~/a", "s3://b/a"), "s3://b/a: only local")):
        (tmp_path / "given").write_text(text)
        argv = ["eval.py", *form]
        if refusal and "flagfile" not in text:
            with pytest.raises(FileError, match=refusal):
                command.parse(argv, _flag_values())
        else:
            command.parse(argv, values if not refusal else _flag_values(), seen.append)
            assert {"--workdir=/users/me/a", "-workdir=/users/me/a"} & set(seen[0]) or "/users/me/a" in seen[0]
    assert values.workdir == "/users/me/a"


def _flag_values():
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    flags.DEFINE_string("flagfile", "", "", flag_values=values)
    flags.DEFINE_integer("trials", 1, "", flag_values=values)
    return values


def test_a_file_of_flags_that_is_not_there():
    with pytest.raises(configs.ConfigError, match="flagfile.*gs://x") as error:
        command.parse(["eval.py", "--flagfile=gs://x"], _flag_values())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["data_dir=/x", "source_dir=gs://b", "partial=True", "name=voc"])
def test_options_of_the_check_command_that_are_arguments(option, capsys):
    with pytest.raises(SystemExit) as end:
        check.main(["synthetic", "--option", option])
    key = option.partition("=")[0]
    says = f"{key!r} is no option of a data set; give it as {'DATASET' if key == 'name' else f'--{key}'}"
    assert end.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    full_but(
        [
            "print('x' * 10)",
            "print('x' * 10**6)",
            "print('x', flush=True)",
            "open('/a/b')",
            "os.kill(2**22 + 1, 0)",
        ],
        "print('x' * 10)",
        "os.kill(2**22 + 1, 0)",
    ),
)
def test_output_that_cannot_be_written(words):
    """In one line, and not once more when Python ends. Only what is written there is told by its name."""
    code = "import os; from absl import flags; from pwcrf_jax.cli import command; "
    code += "flags.DEFINE_string('workdir', '', ''); "
    code += f"flags.DEFINE_string('config', '', ''); command.run(lambda _: {words})"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    where = {"open": r"/a/b cannot be used \(No such", "os.k": r"the system refused .* \(No such process"}.get(
        words[:4], r"standard output cannot be used \(No space left"
    )
    assert done.returncode == 2 and re.fullmatch(rf"error: {where}.*; .*\n", done.stderr), done.stderr


class _Full(io.StringIO):
    def __init__(self, fails):
        super().__init__()
        self.fails = fails

    def write(self, text):
        return self._take("write") or super().write(text)

    def flush(self):
        self._take("flush")

    def _take(self, name):
        if name == self.fails:
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))


@pytest.mark.parametrize("fails", ["write", "flush"])
@pytest.mark.parametrize("kind", [print, say])
def test_standard_output_is_named(fails, kind, monkeypatch):
    monkeypatch.setattr(sys, "stdout", _Full(fails))
    with pytest.raises(FileError, match=r"standard output cannot be used \(Broken pipe\); "), naming_stdout():
        kind("text")


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "refused"), OSError(24, "Too many open files"),
                                   TimeoutError("in time"), MemoryError(), OSError("no image")])  # fmt: skip
def test_what_others_raise_is_not_of_standard_output(error, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(type(error)) as raised, naming_stdout():
        print("text")
        raise error
    if getattr(error, "errno", None):
        said = str(command._of_system(raised.value))
        assert "test_training_paths.py, line" in said and error.strerror in said and "standard" not in said


@pytest.mark.parametrize("stream", [None, "closed"])
def test_no_standard_output(stream, monkeypatch):
    if stream:
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    with naming_stdout():
        say("text")


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
    full_row(("CPU", ["-m", "pwcrf_jax", "tune", "--workdir=trained"])),
])  # fmt: skip
def test_commands_without_their_platform(platform, words, tmp_path):
    script, *flags = words
    script = ROOT / script if script.endswith(".py") else script
    files.make_folder(tmp_path / "trained")
    configs.save(small.config("sets"), tmp_path / "trained" / "config.json")
    flags += small.flags("sets") if words[0] == "train.py" else []
    flags = [flag.replace("configs/", f"{ROOT}/configs/") for flag in flags]
    done = commands.run([script, *flags], cwd=tmp_path, env=os.environ | {"JAX_PLATFORMS": platform})
    assert done.returncode == 2 and done.stderr.startswith(f"error: JAX_PLATFORMS={platform}: "), done.stderr
    assert done.stderr.count("\n") == 1 and os.listdir(tmp_path) == ["trained"]
    assert os.listdir(tmp_path / "trained") == ["config.json"]
