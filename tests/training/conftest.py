"""A run small enough for a test: 48 x 64 synthetic scenes, the tiny backbone, a handful of steps."""

import h5py
import jax
import numpy as np
import pytest

from configs import demo
from pwcrf_jax.nets import MobileNetV2


@pytest.fixture
def config(tmp_path_factory):
    return _config(tmp_path_factory)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Workdir of a run of one step of `config`; not to be written to."""
    from pwcrf_jax.training import loop

    config, workdir = _config(tmp_path_factory), tmp_path_factory.mktemp("trained") / "work"
    config.train.steps = 1
    loop.train_and_evaluate(config, str(workdir))
    return workdir


def _config(tmp_path_factory):
    config = demo.get_config()
    config.data.data_dir = str(tmp_path_factory.getbasetemp() / "prepared")
    config.data.synthetic = dict(num_train=24, num_val=10, image_size=(192, 256), seed=0)
    config.data.crop_size = (96, 128)
    config.model.tiny.features = (4, 4, 8, 8)
    config.model.hidden = 8
    config.train.batch_size = 8
    config.train.steps = 6
    config.train.log_every = 2
    config.train.eval_every = 3
    config.train.checkpoint_every = 3
    config.eval.batch_size = 8
    return config


@pytest.fixture
def mobilenet_file(tmp_path):
    """A Keras MobileNetV2 file of the right layout with random values."""
    params = MobileNetV2(output="Conv_1").init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    rng = np.random.default_rng(0)
    path = tmp_path / "mobilenet.h5"
    with h5py.File(path, "w") as file:
        for name, leaves in params.items():
            kernel = rng.normal(0, 0.05, leaves["kernel"].shape).astype(np.float32)
            depthwise = name.endswith("depthwise")
            if depthwise:
                kernel = kernel.reshape(3, 3, -1, 1)
            file[f"{name}/{name}/{'depthwise_kernel' if depthwise else 'kernel'}:0"] = kernel
            norm = {"Conv1": "bn_Conv1", "Conv_1": "Conv_1_bn"}.get(name, f"{name}_BN")
            channels = leaves["bias"].shape
            for key, value in (("gamma", 1), ("beta", 0), ("moving_mean", 0), ("moving_variance", 1)):
                file[f"{norm}/{norm}/{key}:0"] = np.full(channels, value, np.float32)
    return str(path)
