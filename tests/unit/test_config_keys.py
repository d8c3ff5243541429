"""The table of keys: what is made of it agrees with it."""

import importlib.util
import math
import re
from pathlib import Path

import pytest

from pwcrf_jax import config as configs
from pwcrf_jax.cli import usage
from pwcrf_jax.config import keys, kinds, parameters
from pwcrf_jax.nets import BACKBONES

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = keys.KEYS | {f"relations.NAME.{name}": entry for name, entry in keys.RELATION.items()}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_key_takes_its_default_and_says_in_a_line_what_it_means(name):
    entry = ENTRIES[name]
    assert entry.kind.accepts(entry.default)
    assert not entry.kind.accepts(None) and not entry.kind.accepts(math.nan)
    assert 0 < len(entry.meaning) <= 100 and "\n" not in entry.meaning and "|" not in entry.meaning
    assert name.startswith("relations.") or name.rpartition(".")[0] in keys.SECTIONS


def test_defaults_are_the_table():
    flat = dict(configs.flat(configs.defaults()))
    assert {name: value for name, value in flat.items() if not name.startswith("relations.")} == {
        name: entry.default for name, entry in keys.KEYS.items()
    }
    for relation in ("surrounding", "above_below"):
        assert {n.rpartition(".")[2] for n in flat if n.startswith(f"relations.{relation}.")} == set(keys.RELATION)
    configs.check_keys(configs.defaults())


def test_help_lists_every_key():
    text = usage._keys()
    for name, entry in ENTRIES.items():
        assert f"  --config.{name}=" in text
        assert entry.meaning in " ".join(text.split())


def test_help_of_a_part_lists_its_keys_alone():
    shown = re.findall(r"--config\.([\w.]+)=", usage._keys(parameters.KEYS))
    assert sorted(shown) == sorted(parameters.KEYS) == sorted(dict(keys.flat(parameters.crf_defaults())))
    assert "refine.appearance_srgb" in shown and "train.steps" not in shown


def test_the_page_is_the_table():
    """If this fails, run scripts/configuration_page.py."""
    spec = importlib.util.spec_from_file_location("configuration_page", ROOT / "scripts/configuration_page.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page()
    for name in keys.KEYS:
        assert f"| `{name}` |" in script.page()


def test_a_choice_names_the_nearest():
    kind = kinds.Choice(["folded", "table"])
    assert kind.accepts("table") and not kind.accepts("tabel") and not kind.accepts(["table"])
    assert kind.refusal("k", "tabel") == "config.k = 'tabel' is not one of 'folded', 'table'; did you mean 'table'?"
    assert kind.refusal("k", "x").endswith("is not one of 'folded', 'table'")


def test_a_tuple_has_one_of_its_lengths():
    kind = kinds.Tuple(kinds.Number(int, 1, 9), (0, 2))
    assert [kind.accepts(x) for x in ((), (1,), (1, 2), [1, 2], (1, 0))] == [True, False, True, True, False]
    assert kind.wanted == "a tuple of 0 or 2 values, each an integer from 1 to 9"


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbones_keys_have_the_defaults_of_its_class(name):
    fields = BACKBONES[name].__dataclass_fields__
    own = {key: entry.default for key, entry in keys.KEYS.items() if key.startswith(f"model.{name}.")}
    assert own == {key: fields[key.rpartition(".")[2]].default for key in own}
