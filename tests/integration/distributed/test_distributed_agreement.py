"""What the processes of a run are compared in: each kind of difference shows, and nothing else does."""

import os
import shutil
import sys

import jax
import numpy as np
import pytest
import small
from absl import flags
from ml_collections import config_flags
from PIL import Image

from pwcrf_jax import config as configs
from pwcrf_jax.config import agreement, keys
from pwcrf_jax.data import load_dataset
from pwcrf_jax.runtime import wire
from pwcrf_jax.training import loop


def _differs(facts, others):
    """The first key that differs; None: there is none."""
    line = wire.difference({0: facts, 1: others}, {0: "a", 1: "b"})
    return line and line.removeprefix("the processes differ in ").partition(": ")[0]


# --- The start -------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path):
    """of(words) -> facts of a program with these words on its command line."""

    def of(*words, script="train.py", **changes):
        values = flags.FlagValues()
        flags.DEFINE_string("workdir", "", "", flag_values=values)
        flags.DEFINE_string("checkpoint", "best", "", flag_values=values)
        flags.DEFINE_integer("process_id", 0, "", flag_values=values)
        config_flags.DEFINE_config_dict("config", small.config(tmp_path, **changes), flag_values=values)
        for flag in list(values):
            values.register_key_flag_for_module(script, values[flag])
        monkeypatch.setattr(sys, "argv", [script, *words])
        monkeypatch.setattr(agreement.flags, "FLAGS", values)
        values([script, *words])
        return agreement.of_start(values.config)

    return of


CHANGES = {
    "seed": 3,
    "optimizer.learning_rate": 0.5,
    "train.steps": 9,
    "data.flip": False,
    "data.crop_size": (64, 96),
    "data.num_threads": 7,
    "model.relations": ("surrounding",),
    "relations.surrounding.grid": 3,
    "init_from": "weights.h5",
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_of_the_config(command, key):
    assert _differs(command(), command(**{key: CHANGES[key]})) == f"config.{key}"


def test_every_key_of_the_config_is_compared_but_where_data_lie(command):
    missing = {key for key in keys.KEYS if f"config.{key}" not in command()}
    assert missing == {"data.source_dir", "data.data_dir", "data.scores.dir"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--checkpoint=latest"], "--checkpoint"),
        (["--workdir=elsewhere"], "--workdir"),
        (["--workdir=."], None),  # the same folder
        (["--workdir", os.path.join("docs", "..")], None),
        (["--process_id=1"], None),
    ],
)
def test_flags(command, words, said):
    assert _differs(command(), command(*words)) == said


def test_another_program(command):
    assert _differs(command(), command(script="eval.py")) == "the program"


@pytest.mark.parametrize(
    ("name", "value", "differs"),
    [
        ("XLA_FLAGS", "--xla_allow_excess_precision=false", True),
        ("XLA_FLAGS", "--xla_dump_to=dumps", False),
        ("NVIDIA_TF32_OVERRIDE", "0", True),
        ("LIBTPU_INIT_ARGS", "--x=1", True),
        ("HOSTNAME", "other", False),
    ],
)
def test_the_environment(monkeypatch, name, value, differs):
    before = agreement.of_environment()
    monkeypatch.setenv(name, f"{os.environ.get(name, '')} {value}".strip())
    assert _differs(before, agreement.of_environment()) == (f"the environment variable {name}" if differs else None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_default_matmul_precision", "highest"),
        ("jax_threefry_partitionable", None),
        ("jax_default_prng_impl", "rbg"),
        ("jax_numpy_dtype_promotion", "strict"),
    ],
)
def test_settings_of_jax(name, value):
    before, old = agreement.of_environment(), getattr(jax.config, name)
    jax.config.update(name, not old if value is None else value)
    try:
        assert _differs(before, agreement.of_environment()) == f"jax.config.{name}"
    finally:
        jax.config.update(name, old)


@pytest.mark.parametrize("package", ["jax", "numpy", "pillow", "optax", "grain"])
def test_versions_of_packages(monkeypatch, package):
    before, version = agreement.of_environment(), agreement.importlib.metadata.version
    agreement.checkpoint.versions.cache_clear()
    monkeypatch.setattr(
        agreement.importlib.metadata, "version", lambda name: "0.0" if name == package else version(name)
    )
    try:
        assert _differs(before, agreement.of_environment()) == f"the version of {package}"
    finally:
        agreement.checkpoint.versions.cache_clear()


@pytest.mark.parametrize("change", ["edit", "add", "delete", "rename", "none"])
def test_the_code(tmp_path, change):
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "sub").mkdir(parents=True)
    for name in ("a.py", "b.py", "sub/c.py"):
        (one / name).write_text(f"x = {name!r}\n")
    shutil.copytree(one, other)
    (other / "__pycache__").mkdir()
    (other / "__pycache__/a.pyc").write_bytes(b"compiled")
    if change == "edit":
        (other / "sub/c.py").write_text("x = 1\n")
    elif change == "add":
        (other / "d.py").write_text("")
    elif change == "delete":
        (other / "b.py").unlink()
    elif change == "rename":
        (other / "b.py").rename(other / "e.py")
    assert (agreement.of_code(one) == agreement.of_code(other)) == (change == "none")


# --- Data and state --------------------------------------------------------------------------------------


def _folder(path, changed=None, number=6):
    random = np.random.default_rng(0)
    for part in ("images", "masks"):
        (path / part).mkdir(parents=True)
    for k in range(number):
        image = random.integers(0, 255, (32, 48, 3), np.uint8)
        mask = np.repeat(random.integers(0, 3, (4, 6), np.uint8), 8, 0).repeat(8, 1)
        if changed == f"image {k}":
            image[0, 0, 0] ^= 1
        if changed == f"mask {k}":
            mask[:8, :8] = (mask[:8, :8] + 1) % 3
        Image.fromarray(image).save(path / f"images/{k}.png")
        Image.fromarray(mask).save(path / f"masks/{k}.png")
    (path / "classes.txt").write_text("a\nb\nc\n" if changed != "class" else "a\nc\nb\n")
    return path


def _data(path, **kwargs):
    source = _folder(path / "source", **kwargs)
    options = dict(val_fraction=0.5, seed=0)
    return load_dataset("image_folder", source_dir=str(source), data_dir=str(path / "data"), **options)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (dict(changed="image 3"), "the prepared data, "),
        (dict(changed="mask 0"), "the prepared data, "),
        (dict(changed="class"), "class 1"),
        (dict(number=8), "the size of split train"),
        ({}, None),  # copied elsewhere, later
    ],
)
def test_other_data(tmp_path, other, said):
    one, two = (agreement.of_data(_data(tmp_path / str(k), **kwargs)) for k, kwargs in enumerate(({}, other)))
    assert any("array_record" in key for key in one)
    assert (_differs(one, two) or "").startswith(said or "") and (_differs(one, two) is None) == (said is None)


@pytest.mark.parametrize("at", [0, 10_000_000, 19_999_999])
def test_large_files_of_another_content(tmp_path, at):
    """Of which not all is read: a record of another length shifts all behind it."""
    content = np.random.default_rng(0).bytes(20_000_000)
    (tmp_path / "one").write_bytes(content)
    (tmp_path / "other").write_bytes(content[:at] + b"xyz" + content[at:])
    (tmp_path / "copy").write_bytes(content)
    one, other, copy = (agreement._hash_of_blocks(tmp_path / name) for name in ("one", "other", "copy"))
    assert one == copy != other


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(step=8), "the step to go on from"),
        (dict(samples_seen=9), "its samples"),
        (dict(score=0.5), "its score"),
        (dict(best=None), "the best model's step"),
        (dict(scaling="caffe"), "config.model.input_scaling"),
        (dict(weight=1), "params/w (its hash)"),
        (dict(momentum=1), "rest/opt_state/0 (its hash)"),
        ({}, None),
    ],
)
def test_what_a_run_goes_on_from(tmp_path, change, said):
    config = small.config(tmp_path)
    dataset = load_dataset(**configs.dataset_options(config))

    def facts(step=4, samples_seen=32, score=None, best=4, scaling="tf", weight=0, momentum=0):
        config.model.input_scaling = scaling
        params, opt_state = {"w": np.full(3, weight, np.float32)}, (np.full(3, momentum, np.float32),)
        state = loop.steps.TrainState(step=np.int32(4), params=params, opt_state=opt_state)
        meta = {"step": step, "samples_seen": samples_seen, "score": score}
        return loop._facts(config, dataset, state, meta, best and {"step": best, loop.restore.BEST: 0.25})

    assert _differs(facts(), facts(**change)) == said
