"""Two checkpoints, and a run small enough for a test."""

import jax
import pytest
from faults import states
from jax.experimental.compilation_cache import compilation_cache

from configs import demo


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    """Most runs here are of one config."""
    values = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 3 and 6."""
    with states.store(tmp_path / "checkpoints") as writer:
        for step in (3, 6):
            writer.save(step, states.trees(step), {"samples_seen": 8 * step})
            writer.wait()
            writer.note(step, {"score": 0.1 * step})
    return tmp_path / "checkpoints"


@pytest.fixture
def config(tmp_path_factory):
    return _config(tmp_path_factory)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Workdir of a run of `config` that nothing disturbs, with checkpoints 3 and 6; not to be written to."""
    from pwcrf_jax.training import loop

    workdir = tmp_path_factory.mktemp("whole") / "work"
    loop.train_and_evaluate(_config(tmp_path_factory), str(workdir))
    return workdir


def _config(tmp_path_factory):
    config = demo.get_config()
    config.data.data_dir = str(tmp_path_factory.getbasetemp() / "prepared")
    config.data.synthetic = dict(num_train=24, num_val=8, image_size=(192, 256), seed=0)
    config.data.crop_size = (96, 128)
    config.model.tiny.features = (4, 4, 8, 8)
    config.model.hidden = 8
    config.loss.sampled_offsets = 3
    config.train.batch_size = 8
    config.train.steps = 6
    config.train.log_every = 1
    config.train.eval_every = 3
    config.train.checkpoint_every = 3
    config.eval.batch_size = 8
    return config
