"""tests/fixtures/run-0.1.0.zip: the workdir of a run of version 0.1.0, which later versions go on with.

Four steps of configs/demo.py, made as small as it gets; `hashes.json` in it was computed by that version.
"""

import json
import shutil
import zipfile

import jax
import pytest
from faults import states
from faults.kill import ROOT

from pwcrf_jax.training import checkpoint, evaluate, loop, steps
from pwcrf_jax.training import config as configs
from pwcrf_jax.training.logs import log


@pytest.fixture
def old(tmp_path, tmp_path_factory, monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger=log.name)
    with zipfile.ZipFile(ROOT / "tests" / "fixtures" / "run-0.1.0.zip") as file:
        file.extractall(tmp_path / "old")
    config = configs.load(tmp_path / "old" / "config.json")
    config.data.data_dir = str(tmp_path_factory.getbasetemp() / "prepared")
    return tmp_path / "old", config


def test_all_leaves_are_what_they_were(old, caplog):
    workdir, config = old
    expected = json.loads((workdir / "hashes.json").read_text())
    for kind, abstract in states.abstract_of(config).items():
        store = checkpoint.Store(str(workdir / kind), configs.identity(config))
        trees, meta = store.restore({"params": abstract["params"]})
        if kind == "checkpoints":
            abstract = steps.TrainState(**abstract["rest"], params=abstract["params"])
            state, meta = loop._restore(store, abstract)
            assert jax.tree.structure(state) == jax.tree.structure(abstract)
            trees = loop._trees(state)
        assert meta["step"] == expected[kind]["step"] == 4
        # In order, as the optimizer's state has other names now.
        assert list(checkpoint.hashes(trees).values()) == list(expected[kind]["leaves"].values())
        for name, digest in checkpoint.hashes({"params": trees["params"]}).items():
            assert digest == expected[kind]["leaves"][name]
        assert f"{kind}/4 is of version 0.1, without hashes" in caplog.text


def test_it_is_evaluated_as_it_was(old):
    workdir, config = old
    expected = json.loads((workdir / "eval_val.json").read_text())
    result = evaluate.evaluate(config, str(workdir))
    assert result["step"] == expected["step"] == 4
    for row, figures in expected["rows"].items():
        for key in ("miou", "pixel_accuracy", "mean_accuracy", "fw_iou"):
            assert result["rows"][row][key] == pytest.approx(figures[key], abs=1e-3), (row, key)
    assert result["nll"] == pytest.approx(expected["nll"], rel=1e-4)


def test_training_goes_on_with_it(old, caplog):
    workdir, config = old
    config.train.steps = 6
    loop.train_and_evaluate(config, str(workdir))
    assert f"resumed from step 4 of {workdir}" in caplog.text
    trees, meta = states.read(workdir)
    assert meta["step"] == 6 and trees["rest"]["step"] == 6 and meta["hashes"] and meta["samples_seen"] == 48


def test_a_damaged_state_is_passed_over_for_one_of_it(old, caplog):
    """Though the states differ in layout."""
    workdir, config = old
    config.train.steps, config.train.keep_checkpoints = 6, 2
    loop.train_and_evaluate(config, str(workdir))
    damaged = max((workdir / "checkpoints/6/rest").rglob("d/*"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(bytes(255 - x for x in damaged.read_bytes()))
    loop.train_and_evaluate(config, str(workdir))
    assert "checkpoints/6 cannot be read" in caplog.text and states.read(workdir)[1]["step"] == 6


def test_a_damaged_meta_of_it_is_not_taken_for_old(old):
    """What has other keys than version 0.1 wrote has been spoiled, not written by it."""
    workdir, config = old
    store = checkpoint.Store(str(workdir / "best"), configs.identity(config), 1)
    trees, meta = store.restore(states.abstract_of(config)["best"])
    shutil.rmtree(workdir / "best" / "4")
    store.save(4, trees, {"miou_all": 0.5})
    store.wait()
    strings = next((workdir / "best" / "4" / "meta").glob("_strings.json"))
    for name in ("json", "sha256"):
        whole = strings.read_text()
        assert whole.count(f'"{name}"') or whole.count(name)
        strings.write_text(whole.replace(name, name[:-1] + "x", 1))
        with pytest.raises(checkpoint.CheckpointError, match="best/4 cannot be read"):
            store.restore(states.abstract_of(config)["best"])
        strings.write_text(whole)
    assert store.restore(states.abstract_of(config)["best"])
