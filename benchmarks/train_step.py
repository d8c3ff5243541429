"""Images a second of the complete train step, for `pairwise.py`."""

import gc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import timing
from memory import FITS, available_bytes, needed_bytes, out_of_memory

from pwcrf_jax import config as configs
from pwcrf_jax.configs import voc_vgg16
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import parallel
from pwcrf_jax.training import steps
from pwcrf_jax.training.optimizer import make_optimizer


def paper_config():
    config = voc_vgg16.get_config()
    for relation in config.relations.values():
        relation.grid = 0
    return config


def train_step_rows(config, image_size=(375, 500), dtypes=("float32", "bfloat16"), repeats=5, max_batch=None):
    """Images per second of the train step on one device, random images, the batch doubled while it fits."""
    device, rng, rows = jax.devices()[0], np.random.default_rng(0), []
    print(f"\ntrain step, {config.model.backbone}, {image_size[0]} x {image_size[1]}, one device")
    print(f"{'':14s}{'batch':>8s}{'seconds':>12s}{'images/s':>12s}{'needs GB':>12s}", flush=True)
    for dtype in dtypes:
        gc.collect()
        limit = FITS * available_bytes(device)
        config.model.dtype = dtype
        model = configs.build_model(config)
        tx = make_optimizer(config.optimizer, config.model, config.train.steps)
        step = parallel.pmap_train(steps.from_config(config, model, tx), devices=[device])
        params = jax.jit(lambda model=model: restore.init_params(model, config.seed))()
        state = steps.TrainState(jnp.int32(0), params, jax.jit(tx.init)(params))
        del params  # donated with the state
        batch = 1
        while max_batch is None or batch <= max_batch:
            shape = batch, *image_size
            arrays = parallel.split(
                {
                    "image": rng.integers(0, 256, (*shape, 3)).astype(np.uint8),
                    "label": rng.integers(0, config.data.num_classes, shape).astype(np.uint8),
                },
                1,
            )
            arrays = {name: jax.device_put(x, device) for name, x in arrays.items()}
            try:
                compiled = step.lower(state, arrays).compile()
                needs = needed_bytes(compiled.memory_analysis())
                if needs > limit:
                    print(f"{dtype:14s}{batch:8d}  does not fit: needs {needs / 1e9:.1f} of {limit / 1e9:.1f} GB")
                    break

                def take(compiled=compiled, arrays=arrays):
                    nonlocal state  # the one before is donated
                    state, metrics = compiled(state, arrays)
                    return state, metrics

                median = timing.medians({"step": partial(timing.timed, take)}, repeats)["step"]
            except jax.errors.JaxRuntimeError as error:
                if not out_of_memory(error):
                    raise
                print(f"{dtype:14s}{batch:8d}  does not fit: {str(error).splitlines()[0]}")
                break
            row = dict(dtype=dtype, batch=batch, seconds=median, images_per_second=batch / median, bytes=needs)
            rows.append(row)
            print(f"{dtype:14s}{batch:8d}{median:12.4f}{batch / median:12.2f}{needs / 1e9:12.2f}", flush=True)
            batch *= 2
        del state
    return rows
