"""Spoiled configs, made from every key of configs/default.py: refused in a line that names the key, before any work."""

import json
import math
import os
import pathlib
import re
import sys

import commands
import jax
import pytest
from absl import flags
from ml_collections import config_flags
from rows import full_row

from pwcrf_jax import config as configs
from pwcrf_jax.cli import command as cli
from pwcrf_jax.configs import default
from pwcrf_jax.nets import BACKBONES

ROOT = pathlib.Path(__file__).parents[3]
DEFAULTS = dict(configs.flat(default.get_config()))

FREE_TEXT = {"init_from", "data.source_dir", "data.data_dir", "data.scores.dir", "data.train_split", "data.eval_split"}
FREE_TEXT |= {"data.tfds.dataset", "data.tfds.image_key", "data.tfds.label_key"}
NAMES = {"eval.classes", "data.tfds.class_names"}  # known from the data set, which is not read here
SIGNED = {"data.image_folder.seed", "data.tfds.label_offset", "data.tfds.void", "crf.weights"}
SIGNED |= {"refine.smoothness_compat", "refine.appearance_compat"}
SIGNED |= {f"relations.{name}.{axis}" for name in ("surrounding", "above_below") for axis in ("rows", "cols")}


def number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def of_numbers(value):
    return isinstance(value, tuple) and all(number(x) or of_numbers(x) for x in value)


def filled(value, x):
    """A nonempty tuple of numbers like `value`, with x for each of them."""
    return tuple(filled(v, x) if isinstance(v, tuple) else x for v in value)


def wrong_types(value):
    if isinstance(value, bool):
        return ["yes", 1, None]
    if number(value):
        return ["1", True, None, (value,)] + [1.5] * isinstance(value, int)
    if isinstance(value, str):
        return [3, None, ("a",), True]
    return [3, "ab", None, (None,), {"a": 1}] + ([("a",) * len(value)] if value and of_numbers(value) else [(3,)])


def out_of_range(key, value):
    """Values of the right type that no run could use."""
    if isinstance(value, bool) or key in NAMES:
        return []
    if number(value):
        return [10**12 if isinstance(value, int) else 1e39] + [-1 if isinstance(value, int) else -0.5] * (
            key not in SIGNED
        )
    if isinstance(value, str):
        return ["a\0b"] if key in FREE_TEXT else ["nonsense"]
    if of_numbers(value):
        like = value or (1, 1)
        return [filled(like, 1e39)] + [filled(like, -1)] * (key not in SIGNED)
    return [("nonsense",)]


def not_finite(value):
    """NaN and infinities, which JSON and config files can hold, in numbers and in tuples of them."""
    bad = (math.nan, math.inf, -math.inf)
    return [*bad] if number(value) else [filled(value or (1, 1), x) for x in bad] if of_numbers(value) else []


def misspelt(key):
    """Two letters of the name swapped, or one doubled where they are the same."""
    head, dot, name = key.rpartition(".")
    i = len(name) // 2
    swapped = name[: i - 1] + name[i] + name[i - 1] + name[i + 1 :]
    return head + dot + (swapped if swapped != name else name + name[-1])


@pytest.fixture(scope="module", autouse=True)
def nothing_is_compiled():
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield
    jax.monitoring.unregister_event_duration_listener(listener)
    assert not compiled


def refusal(action, key):
    """The message, one line with the key in it."""
    with pytest.raises(configs.ConfigError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and re.search(rf"config\.{re.escape(key)}\b", message), message
    return message


def stored(tmp_path, change):
    """The defaults with a change, by way of config.json, which like a Python file can hold anything."""
    config = json.loads(json.dumps(default.get_config().to_dict()))
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return configs.load(tmp_path / "config.json")


def put(config, key, value):
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    config[name] = value


def take(config, key):
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    return config.pop(name)


def options_needed(key):
    """What makes the model read a key."""
    section = key.split(".")[1] if key.startswith("model.") else ""
    return {"model.backbone": section} if section in BACKBONES else {}


def parsed(monkeypatch, *arguments):
    """What train.py does with its command line, but for starting."""
    argv = ["train.py", f"--config={ROOT}/configs/default.py", *arguments]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for the overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    cli.parse(argv, values)
    configs.validate(values["config"].value, num_devices=1)


def test_the_defaults_themselves_are_fine(tmp_path, monkeypatch):
    configs.validate(stored(tmp_path, lambda config: None), num_devices=1)
    parsed(monkeypatch)


@pytest.mark.parametrize("key", DEFAULTS)
def test_misspelt_on_the_command_line(key, monkeypatch):
    value = DEFAULTS[key]
    said = refusal(lambda: parsed(monkeypatch, f"--config.{misspelt(key)}={value}"), misspelt(key))
    assert f"did you mean config.{key}?" in said


@pytest.mark.parametrize("key", DEFAULTS)
def test_misspelt_in_a_file(key, tmp_path):
    config = stored(tmp_path, lambda config: put(config, misspelt(key), take(config, key)))
    assert f"did you mean config.{key}?" in refusal(lambda: configs.validate(config), misspelt(key))


@pytest.mark.parametrize("key", DEFAULTS)
def test_missing(key, tmp_path):
    config = stored(tmp_path, lambda config: take(config, key))
    assert "configs/default.py" in refusal(lambda: configs.validate(config), key)


@pytest.mark.parametrize("key", [key for key, value in DEFAULTS.items() if not isinstance(value, (str, tuple))])
def test_wrong_type_on_the_command_line(key, monkeypatch):
    for text in ("abc", "", "()", "1,5", "None"):
        said = refusal(lambda text=text: parsed(monkeypatch, f"--config.{key}={text}"), key)
        assert re.search("must be (an |a |True)|is not one of", said)


@pytest.mark.parametrize("kind", ["type", "range", "finite"])
@pytest.mark.parametrize("key", DEFAULTS)
def test_wrong_value(key, kind, tmp_path):
    value = DEFAULTS[key]
    spoiled = {"type": wrong_types(value), "range": out_of_range(key, value), "finite": not_finite(value)}[kind]
    for bad in spoiled:
        config = stored(tmp_path, lambda config, bad=bad: put(config, key, bad))
        config.update_from_flattened_dict(options_needed(key))
        said = refusal(lambda config=config: configs.validate(config, num_devices=1), key)
        assert re.search("must be|is not one of|known:|must hold", said), said


@pytest.mark.parametrize("key", ["train.batch_size", "eval.batch_size"])
@pytest.mark.parametrize("value", [1, 12, 63])
def test_batch_that_devices_do_not_divide(key, value, tmp_path):
    config = stored(tmp_path, lambda config: put(config, key, value))
    assert f"such as {8 * math.ceil(value / 8)}" in refusal(lambda: configs.validate(config, num_devices=8), key)


@pytest.mark.parametrize("key, value", [("rows", (-9000.0, 9000.0)), ("cols", (-500.0, 500.0))])
def test_box_that_no_machine_could_list(key, value, tmp_path):
    def change(config):
        config["relations"]["surrounding"] |= {"grid": 0, "rows": (-0.5, 9000.0), key: value}

    config = stored(tmp_path, change)
    assert "set its grid" in refusal(lambda: configs.validate(config, num_devices=1), "relations.surrounding")


@pytest.mark.parametrize("section", ["train", "relations", "relations.surrounding", "data.synthetic"])
def test_section_that_is_a_value(section, tmp_path):
    config = stored(tmp_path, lambda config: put(config, section, 3))
    assert "must be a section" in refusal(lambda: configs.validate(config, num_devices=1), section)


HEAD = "from pwcrf_jax.configs import default\ndef get_config():\n    c = default.get_config()\n"


@pytest.mark.parametrize(
    "text, says",
    [
        (
            HEAD + "    c.train.steps = 'many'\n    return c",
            r"line 4: c\.train\.steps.*config\.train\.steps must be an int",
        ),
        (HEAD + "    c.trian.steps = 3\n    return c", r"line 4: c\.trian\.steps = 3 .*Did you mean .train."),
        (HEAD + "    c.train = 3\n    return c", r"line 4: c\.train = 3"),
        (HEAD + "    c.optimizer.learning_rate = 10**400\n    return c", r"config\.optimizer\.learning_rate must be"),
        (HEAD, "must return an ml_collections.ConfigDict, not NoneType"),
        (HEAD + "    return c.to_dict()", "must return an ml_collections.ConfigDict, not dict"),
        ("def get_config(:", "invalid syntax"),
        ("import nothing_there", "nothing_there"),
        ("x = 1", "get_config"),
        ("def get_config():\n    raise SystemError('a\\nb')", "line 2: raise SystemError.*a b"),
    ],
)
def test_spoiled_config_files(text, says, tmp_path, monkeypatch):
    path = tmp_path / "spoiled.py"
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={path}"])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    monkeypatch.setattr(cli.flags, "FLAGS", values)
    with pytest.raises(configs.ConfigError) as error:
        cli.parse(sys.argv, values)
        cli.require("config")
    assert re.search(says, str(error.value)) and "\n" not in str(error.value)


# --- the scripts themselves ------------------------------------------------------------------------------


def run(*arguments, script="train.py", **env):
    """(exit code, standard output, standard error, CPU seconds). There is no device, so nothing may ask for one."""
    env = {**os.environ, "JAX_PLATFORMS": "absent", **env}
    done = commands.run([script, *arguments], env=env)
    return done.returncode, done.stdout, done.stderr, done.seconds


def check_refused(done, says):
    code, out, err, _ = done
    assert code == 2 and not out, err
    assert re.fullmatch(rf"error: [^\n]*({says})[^\n]*\n", err), err


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["--config.train.batch_szie=8"], r"did you mean config\.train\.batch_size\?"),
        full_row((["--config.optimizer.lr=0.1"], r"config\.optimizer has name, learning_rate, ")),
        full_row((["--config.learning_rate=0.1"], r"did you mean config\.optimizer\.learning_rate\?")),
        (["--config.train.steps=1e3"], r"config\.train\.steps = '1e3' must be an integer from 0"),
        full_row(
            (["--config.optimizer.learning_rate=nan"], r"config\.optimizer\.learning_rate = nan must be a finite")
        ),
        full_row(
            (["--config.model.relations=('left',)"], r"config\.model\.relations = 'left' is not one of 'above_below'")
        ),
        full_row((["--config.relations.surronding.grid=3"], "Did you mean .surrounding.")),
        full_row((["--noconfig.data.flop"], r"did you mean config\.data\.flip\?")),
        (["--wrokdir=x"], "Did you mean: workdir"),
    ],
)
def test_exit_code_and_one_line(overrides, says, tmp_path):
    done = run("--config=configs/demo.py", f"--workdir={tmp_path / 'work'}", *overrides)
    check_refused(done, says)
    assert not (tmp_path / "work").exists()


def test_exit_code_where_devices_do_not_divide_the_batch(tmp_path):
    env = dict(JAX_PLATFORMS="cpu", JAX_LOG_COMPILES="1")
    done = run("--config=configs/demo.py", f"--workdir={tmp_path}", "--config.train.batch_size=12", **env)
    check_refused(done, r"config\.train\.batch_size = 12 is not divisible by the 8 devices; use a multiple, such as 16")


def test_exit_code_of_eval(tmp_path):
    stored(tmp_path, lambda config: None)
    check_refused(
        run(f"--workdir={tmp_path}", "--config.eval.batch_szie=8", script="eval.py"), r"config\.eval\.batch_size\?"
    )
    stored(tmp_path, lambda config: put(config, "crf.damping", math.nan))
    check_refused(run(f"--workdir={tmp_path}", script="eval.py"), r"config\.crf\.damping = nan must be a finite number")


@pytest.mark.slow
def test_a_hundred_spoiled_command_lines(tmp_path):
    """Prints the CPU seconds of each after its imports, `pytest -m slow -s`."""
    cases = []
    for i, (key, value) in enumerate(DEFAULTS.items()):
        texts = [] if key in NAMES else [*out_of_range(key, value), *not_finite(value)]
        texts = [text for text in texts if "\0" not in str(text)]  # which no command line can hold
        cases.append(f"--config.{key}={texts[i % len(texts)]}" if texts else f"--config.{misspelt(key)}=x")
        cases.append(f"--config.{misspelt(key)}=x" if i % 2 or isinstance(value, (str, tuple)) else f"--config.{key}=x")
    seconds = []
    for case in cases:
        backbone = [
            f"--config.{name}={value}" for name, value in options_needed(case.removeprefix("--config.")).items()
        ]
        done = run("--config=configs/default.py", f"--workdir={tmp_path / 'work'}", *backbone, case)
        check_refused(done, re.escape(case[2:].partition("=")[0]))
        seconds.append((done[-1], case))
    assert len(cases) > 100
    print(f"\n{len(cases)} spoiled command lines, {sum(s for s, _ in seconds) / len(cases):.2f} CPU s each; slowest:")
    print("\n".join(f"{s:.2f} s  {case}" for s, case in sorted(seconds)[-3:]))
