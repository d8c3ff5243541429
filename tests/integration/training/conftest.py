"""Runs small enough for a test."""

import h5py
import jax
import numpy as np
import pytest
import small

from pwcrf_jax.nets import MobileNetV2


@pytest.fixture(scope="module", autouse=True)
def _shared_programs(request, tmp_path_factory):
    """Compiled once for all runs here and the processes that they start; only the cache's own tests do without.

    And quickly: most of the time of runs as short as these would be XLA's optimisation.
    """
    if request.path.stem == "test_training_startup":
        yield
        return
    folder = small.session_folder(tmp_path_factory) / "compiled"
    with small.programs(tmp_path_factory), pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


def _config(tmp_path_factory):
    return small.config(tmp_path_factory.getbasetemp() / "prepared", **{"train.log_every": 2})


@pytest.fixture
def config(tmp_path_factory):
    return _config(tmp_path_factory)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Workdir of a run of one step of `config`; not to be written to."""
    config = _config(tmp_path_factory)
    config.train.steps = 1
    return small.workdir(tmp_path_factory, "trained", config)


@pytest.fixture
def mobilenet_file(tmp_path):
    """A Keras MobileNetV2 file of the right layout with random values."""
    init = MobileNetV2(output="Conv_1").init
    params = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
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
