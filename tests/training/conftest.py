"""A run small enough for a test: 48 x 64 synthetic scenes, the tiny backbone, a handful of steps."""

import pytest
from configs import demo


@pytest.fixture
def config(tmp_path_factory):
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
