"""Facts that the processes of a run must have in common, as {key: JSON value}; `distributed.agree` compares them.

Gradients are summed over all of them, but each applies the update to parameters of its own. So whatever makes these
or the batches differ would not be seen: what is saved were not what was measured.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

import pwcrf_jax
from pwcrf_jax.config.keys import flat
from pwcrf_jax.data import Dataset
from pwcrf_jax.runtime import checkpoint, files

Facts = dict[str, Any]

# Each host may have data of its own: what lies there, but for scores, is compared.
_LOCAL = ("data.source_dir", "data.data_dir", "data.scores.dir")
_LOCAL_FLAGS = ("config", "distributed", "coordinator", "num_processes", "process_id", "heartbeat")
_PACKAGES = ("grain", "array_record", "pillow", "scipy")  # beside those of a checkpoint: they make the batches
_NUMERICS = (  # of jax.config
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_numpy_dtype_promotion",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_debug_nans",
    "jax_debug_infs",
)
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_BLOCKS, _BLOCK = 64, 2**16  # of a file of prepared data that are read; one of 4 MiB is read whole


def of_start(config: ConfigDict) -> Facts:
    """The command, the config and what runs it. Starts the devices."""
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    facts: Facts = {"the program": os.path.basename(sys.argv[0])}
    facts |= {f"--{flag.name}": flag.value for flag in own if flag.name not in _LOCAL_FLAGS}
    if "--workdir" in facts:
        facts["--workdir"] = files.absolute(os.path.expanduser(facts["--workdir"] or ""))
    facts |= {f"config.{key}": value for key, value in flat(config) if key not in _LOCAL}
    return facts | of_environment()


def of_environment() -> Facts:
    """Versions, the code of this package, devices and settings of JAX and XLA."""
    facts: Facts = {f"the version of {name}": version for name, version in checkpoint.versions().items()}
    facts |= {f"the version of {name}": importlib.metadata.version(name) for name in _PACKAGES}
    facts["the version of Python"] = ".".join(map(str, sys.version_info[:2]))
    facts["the source code of pwcrf_jax (its hash)"] = of_code(pathlib.Path(pwcrf_jax.__file__).parent)
    facts |= {f"jax.config.{name}": getattr(jax.config, name, None) for name in _NUMERICS}
    # Where XLA writes what it compiles changes nothing.
    words = lambda name: sorted(x for x in os.environ.get(name, "").split() if not x.startswith("--xla_dump"))
    facts |= {f"the environment variable {name}": " ".join(words(name)) for name in _ENVIRONMENT}
    devices = jax.local_devices()
    return facts | {"the devices": f"{len(devices)} of {devices[0].platform}, {devices[0].device_kind}"}


def of_code(folder: pathlib.Path) -> str:
    """Hash of the Python files in a folder, with their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def of_data(dataset: Dataset) -> Facts:
    """Classes and splits of a prepared data set, and hashes of the files of its records, wherever they lie.

    Of a large file blocks at equal distances are read: that shows another file, not each bit that flipped in it, which
    the format's own checksums do.
    """
    facts: Facts = {f"class {i}": name for i, name in enumerate(dataset.class_names)}
    facts |= {f"the size of split {name}": count for name, count in dataset.splits.items()}
    for path in sorted(pathlib.Path(dataset.folder).glob("*.array_record*")):
        facts[f"the prepared data, {path.name} (its hash)"] = _hash_of_blocks(path)
    return facts


def _hash_of_blocks(path: pathlib.Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def of_arrays(trees: Mapping[str, Any]) -> Facts:
    """The hash of each array of a tree."""
    return {f"{name} (its hash)": digest[:16] for name, digest in checkpoint.hashes(trees).items()}
