"""Flags that leave something out without a word, and folders of other programs: one line, and nothing is touched."""

import json

import pytest
from absl import flags

from pwcrf_jax import config as configs
from pwcrf_jax.cli import command
from pwcrf_jax.runtime import checkpoint
from pwcrf_jax.runtime.files import FileError
from pwcrf_jax.training import loop

CONFIGS = {
    "of a language model": {"model_type": "bert", "hidden_size": 768},
    "of a detector": {"model": {"backbone": "resnet50"}, "train": {"steps": 3}},
    "a list": [1, 2],
    "of other values": {"seed": 0, "model": 3},
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_a_config_of_another_program_is_not_written_over(config, tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises((configs.ConfigError, FileError), match=r"config\.json cannot be used"):
        loop.train_and_evaluate(config, str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text()) == content


@pytest.mark.parametrize("name", ["metrics.jsonl", "classes.json"])
@pytest.mark.parametrize("content", ['{"loss": 1}\n', "", "[]"])
def test_files_of_another_program_are_not_written_over(config, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} is there without a config.json.* another --workdir"):
        loop.train_and_evaluate(config, str(tmp_path))
    assert (tmp_path / name).read_text() == content


def test_checkpoints_of_another_program_are_not_touched(config, tmp_path):
    for name in ("checkpoints/100/state/a.bin", "checkpoints/epoch_1.pt", "best/model.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"weights")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((checkpoint.CheckpointError, configs.ConfigError), match="checkpoints|config.json"):
        loop.train_and_evaluate(config, str(tmp_path))
    assert set(before) <= set(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "given",
    [["--images=a", "--images=b"], ["--images", "a", "--images", "a"], ["--tuned", "--notuned"], ["--output="] * 3],
)
def test_flags_given_twice_are_refused(given):
    values = flags.FlagValues()
    for name in ("images", "output"):
        flags.DEFINE_string(name, "", "", flag_values=values)
    flags.DEFINE_bool("tuned", True, "", flag_values=values)
    name = given[0].lstrip("-").partition("=")[0]
    with pytest.raises(
        command.ConfigError, match=f"--{name} is given {3 if '=' in given[-1][-1] else 2} times; .* once"
    ):
        command.parse(["eval.py", *given], values)
