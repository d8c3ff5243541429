"""A run small enough for a test: 192 x 256 synthetic scenes, the tiny backbone, a handful of steps."""

import contextlib
import fcntl
import importlib.metadata
import os

OPTIMIZED = os.environ.get("PWCRF_TESTS_OPTIMIZED", "") not in ("", "0")
"""Programs are those that users run, with all of XLA's optimisations; see tests/conftest.py."""
_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # newer ones end the process at flags that they do not know
FAST_COMPILATION = "" if OPTIMIZED else " ".join(_FLAGS)
"""XLA's older emitters, and programs not split for threads: both compile in a third of the time. For XLA_FLAGS."""
KEYS = {
    "data.synthetic.num_train": 24,
    "data.synthetic.num_val": 10,  # the last batch is padded
    "data.crop_size": (96, 128),
    "model.tiny.features": (4, 4, 8, 8),
    "model.hidden": 8,
    "train.batch_size": 8,
    "train.steps": 6,
    "train.log_every": 1,
    "train.eval_every": 3,
    "train.checkpoint_every": 3,
    "eval.batch_size": 8,
    "crf.num_iterations": 3,
}
"""What differs from configs/demo.py."""


def config(data_dir, **changes):
    """configs/demo.py with `KEYS`; changes: {dotted key: value}."""
    from pwcrf_jax.configs import demo  # tests of the core run where jax and numpy are all there is

    config = demo.get_config()
    for key, value in (KEYS | {"data.data_dir": str(data_dir)} | changes).items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return config


def flags(data_dir, **changes):
    """The same for the command line of train.py."""
    values = KEYS | {"data.data_dir": data_dir} | changes
    return ["--config=configs/demo.py", *(f"--config.{key}={value}" for key, value in values.items())]


@contextlib.contextmanager
def programs(tmp_path_factory):
    """In here all runs of a test session share what is compiled, fast: most of their time would be XLA's.

    Runs that are held against one another belong in here alike. Fixtures of a session come before those of a module.
    """
    with compiled_once(session_folder(tmp_path_factory) / "compiled"), compiled_quickly():
        yield


def session_folder(tmp_path_factory):
    """The folder of a test session, one for all of its processes."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def workdir(tmp_path_factory, name, config):
    """Workdir of a run of a config, trained by the first process of the test session that asks; only to be read."""
    from pwcrf_jax.training import loop

    folder = session_folder(tmp_path_factory)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            with programs(tmp_path_factory):
                loop.train_and_evaluate(config, str(folder / f"{name}-unfinished"))
            os.rename(folder / f"{name}-unfinished", folder / name)
    return folder / name


@contextlib.contextmanager
def compiled_once(folder):
    """In here JAX keeps what it compiles in a folder, for runs of one config."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    values = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def compiled_quickly():
    """In here programs are compiled fast and run slow, unless `OPTIMIZED`: for tests whose time is mostly XLA's."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not OPTIMIZED)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
