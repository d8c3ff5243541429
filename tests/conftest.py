"""Eight simulated devices and fast compilation, set before JAX starts; tests that need fewer devices name them.

Programs compiled fast are not those that users run. With PWCRF_TESTS_OPTIMIZED=1 in the environment all tests compile
as users do: neither `small.FAST_COMPILATION` nor the fixture `quick_compilation` changes anything, and it takes longer.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import small

_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8 {small.FAST_COMPILATION}".strip()

import atexit  # noqa: E402
import gc  # noqa: E402
import logging  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402

import pytest  # noqa: E402

# What scripts compile goes where nothing of the user's is.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_other_modules():
    """Compiled programs are dropped after each file: each holds memory maps, of which a process may have 65,530."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _a_log_as_it_was():
    """A run in this process shows what it does, which tests of warnings alone would take for one."""
    logger = logging.getLogger("pwcrf_jax")
    level, handlers, propagate = logger.level, logger.handlers[:], logger.propagate
    yield
    logger.setLevel(level)
    logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture
def quick_compilation():
    """Programs are compiled fast and run slow: for tests of which most of the time is XLA's."""
    with small.compiled_quickly():
        yield
