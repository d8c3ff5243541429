"""own_images.py: each choice changes what its name says, effects are those of stored counts, nothing is mixed."""

import argparse
import importlib
import json
import pathlib
import sys

import numpy as np
import pytest

from pwcrf_jax import config as configs
from pwcrf_jax.configs import image_folder, image_folder_mobilenet_v2

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setattr(importlib.import_module("ladder_table"), "BOOTSTRAP", 20)
        yield importlib.import_module("own_images")


def options(**more):
    return argparse.Namespace(**(dict(set="camvid", source_dir="", data_dir="", init_from="FILE", steps=0) | more))


def test_each_part_is_on_in_half_of_the_runs_and_there_each_other_in_half(script):
    table = np.array([[part in parts for part in script.PARTS] for parts in script.DESIGN])
    assert (table.sum(0) == 2).all() and (table.astype(int).T @ table == 1 + np.eye(3)).all()


@pytest.mark.parametrize("which", ["camvid", "animals"])
def test_the_unary_of_own_images_on_each_backbone(script, which):
    for name in script.BACKBONES:
        config = script.on(script.config_of(options(set=which), "train[:80%]"), name, "FILE")
        module = image_folder_mobilenet_v2 if name.startswith("mobilenet") else image_folder
        section, own = config.model.backbone, module.get_config()
        output = {"efficientnet_lite_whole": "stage6_0", "mobilenet_v2_whole": "block_16"}.get(name)
        assert section == own.model.backbone and config.model[section].freeze_until == own.model[section].freeze_until
        assert config.model[section].output == (output or own.model[section].output)
        assert config.init_from == ("FILE" if name.startswith("mobilenet") else own.init_from)
        assert config.loss.dice_weight == own.loss.dice_weight > 0 and not config.model.relations
        cut = name in ("efficientnet_lite", "efficientnet_lite_whole")
        assert config.model.block6 == (((3, 192),) if cut else own.model.block6)
        assert config.model.efficientnet_lite.deep == ("" if cut else "stage6_0")
        configs.build_model(config)


def result(script, right, **about):
    """Stored figures of 12 images, of a share of whose pixels the label is right."""
    rng = np.random.default_rng(0)
    counts = np.zeros((12, 3, 3, 2), np.int64)
    counts[:, :, 1:] = 1000  # of the truth and predicted
    counts[:, :, 0] = rng.binomial(1000, right, (12, 3, 2))
    packed = importlib.import_module("ladder_table").pack
    rows = dict.fromkeys(("unary", "last", "averaged"), counts)
    miou = dict.fromkeys(rows, 50.0)
    return about | dict(set="camvid", steps=9, class_indices=[0, 1], miou=miou, counts=packed(rows))


def test_summary_gives_effects_and_compares_the_seeds_that_both_have(script, tmp_path, capsys, monkeypatch):
    write = lambda name, value: (tmp_path / f"own_camvid_{name}.json").write_text(json.dumps(value))
    for i, parts in enumerate((*script.DESIGN, ("dice",))):
        write(f"recipe{i}", result(script, 0.5 + 0.1 * ("dice" in parts), kind="recipe", parts=parts))
    write("seconds", {"efficientnet_lite": 1.0})
    for kind, backbone, seed, right in (
        ("backbone", script.DEFAULT, 0, 0.5), ("backbone", script.DEFAULT, 1, 0.9),
        ("backbone", "mobilenet_v2", 0, 0.6), ("held out", "mobilenet_v2", 1, 0.6),
    ):  # fmt: skip
        write(f"{kind}{backbone}{seed}", result(script, right, kind=kind, backbone=backbone, seed=seed))
    monkeypatch.setattr(sys, "argv", ["own_images.py", "summary", f"--results={tmp_path}"])
    script.main()
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(out) == {
        "camvid jitter", "camvid dropout", "camvid dice", "camvid dice alone", "camvid averaged",
        "camvid backbone mobilenet_v2",
    }  # fmt: skip
    more = ("dice", "dice alone", "backbone mobilenet_v2")
    for key, about in (*((key, 9.5) for key in more), ("jitter", 0), ("averaged", 0)):
        gain, low, high = out[f"camvid {key}"][:3]
        assert low <= gain <= high and abs(gain - about) < 2, key


@pytest.mark.parametrize(
    "words, told",
    [
        (("recipe", "--set=camvid"), "--source_dir '' does not exist"),
        (
            ("backbones", "--set=camvid", f"--source_dir={ROOT}", "--init_from=nowhere"),
            "--init_from 'nowhere' does",
        ),
        (("recipe", f"--source_dir={ROOT}"), "--set is needed"),
    ],
)
def test_what_is_not_there_is_refused(script, words, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["own_images.py", *words])
    with pytest.raises(SystemExit):
        script.main()
    assert told in capsys.readouterr().err
