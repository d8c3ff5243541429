"""Eight simulated devices, set before JAX starts; tests that need fewer name them."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()

import gc  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

RUNS = ("training", "faults", "distributed")  # folders of tests that train
OWN_CACHE = ("test_training_startup", "test_faults_kill")  # how the cache of a workdir fares


@pytest.fixture(scope="module", autouse=True)
def _shared_programs(request, tmp_path_factory):
    """What takes long to compile is compiled once for all runs, in this process and in those that it starts."""
    if request.path.parent.name not in RUNS or request.path.stem in OWN_CACHE:
        yield
        return
    folder = str(tmp_path_factory.getbasetemp() / "compiled")
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        compilation_cache.set_cache_dir(folder)
        compilation_cache.reset_cache()  # else a folder that was in use before would stay
        yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.set_cache_dir(None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def _programs_of_other_modules():
    """Compiled programs are dropped after each file: each holds memory maps, of which a process may have 65,530."""
    yield
    jax.clear_caches()
    gc.collect()
