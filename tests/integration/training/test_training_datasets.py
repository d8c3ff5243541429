"""Every data set, from a tiny copy in its official layout: prepared, checked, one training step, evaluation."""

import importlib
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from pwcrf_jax import config as configs
from pwcrf_jax.data import DATASETS, load_dataset
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.training import loop

ROOT = pathlib.Path(__file__).parents[3]
LAYOUTS = sorted(path.stem for path in (ROOT / "tests" / "layouts").glob("*.py"))
CONFIGS = {"camvid": "camvid_mobilenet_v2", "tfds": "pet_vgg16"}


def config_of(name, source_dir, data_dir):
    """The set's own config with a network small enough for a test."""
    config = importlib.import_module(f"configs.{CONFIGS.get(name, name + '_vgg16')}").get_config()
    config.data.source_dir, config.data.data_dir, config.data.partial = str(source_dir), str(data_dir), True
    config.model.backbone, config.model.hidden, config.model.block6 = "tiny", 4, ()
    config.model.tiny.features = (4, 4, 8, 8)
    config.model.scales, config.model.pyramid_windows, config.model.dtype = (1.0,), (), "float32"
    config.data.crop_size = (64, 96)
    config.train.batch_size = config.eval.batch_size = jax.device_count()
    config.train.steps = 1
    return config


def test_every_data_set_has_a_tiny_copy():
    assert set(LAYOUTS) == set(DATASETS) - {"synthetic"}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.full
def test_from_archive_to_score(name, tmp_path):
    counts = importlib.import_module(f"layouts.{name}").make(tmp_path / "source", np.random.default_rng(0))
    config = config_of(name, tmp_path / "source", tmp_path / "prepared")
    if name == "tfds":
        config.data.tfds.update(importlib.import_module("layouts.tfds").OPTIONS)
    dataset = load_dataset(**configs.dataset_options(config))
    if name == "image_folder":  # the only set whose classes are the user's
        config.data.num_classes = dataset.num_classes
    assert {split: dataset.splits[split] for split in counts} == counts
    assert dataset.num_classes == config.data.num_classes == len(set(dataset.class_names)) == len(dataset.palette)
    report = json.loads((pathlib.Path(dataset.folder) / "label_report.json").read_text())
    assert set(report["splits"]) >= set(counts) - set(dataset.unlabelled)
    for split in (config.data.train_split, config.data.eval_split):
        assert split.split("[")[0] in dataset.splits and split not in dataset.unlabelled
    sizes = [dataset.source(split).image_size(i) for split in dataset.splits for i in range(dataset.splits[split])]
    config.data.eval_size = tuple(-(-max(n) // 16) * 16 for n in zip(*sizes, strict=True))
    result = loop.train_and_evaluate(config, str(tmp_path / "work"))
    assert result["num_images"] == len(dataset.source(config.data.eval_split))
    assert result["rows"]["all"]["miou"] is not None
    again = evaluate.evaluate(configs.load(tmp_path / "work" / "config.json"), str(tmp_path / "work"))
    assert again["rows"] == result["rows"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder"), [("camvid", "camvid"), ("voc", "voc2012_animals")])
def test_real_files_from_folder_to_score(name, folder, tmp_path):
    source = pathlib.Path(os.environ.get("PWCRF_DATA", ROOT.parent / "shared" / "data")) / folder
    if not source.is_dir():
        pytest.skip(f"no {folder} in PWCRF_DATA or ../shared/data")
    config = config_of(name, source, tmp_path / "prepared")
    config.data.train_split, config.data.eval_split, config.data.eval_size = "train", "val[:10%]", (512, 512)
    result = loop.train_and_evaluate(config, str(tmp_path / "work"))
    assert result["num_images"] == {"camvid": 10, "voc": 22}[name] and result["rows"]["all"]["miou"] > 0
    report = load_dataset(**configs.dataset_options(config)).label_report()
    assert report["splits"]["train"]["images"] == {"camvid": 367, "voc": 437}[name]
