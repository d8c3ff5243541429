"""What data parallelism costs: on paper for three machines that were never used, measured on simulated devices here.

    python benchmarks/scaling.py [--quick] [--no_paper] [--no_measurement]

Paper: work and bytes of a training step from `pwcrf_jax.model.plan.plan`, bytes of the all-reduce from the jaxpr of the
step itself, times from published peaks and bandwidths (`MACHINES`) and the assumptions of docs/scaling.md. Measured:
the demo model's step with a fixed batch on each of 1, 2, 4 and 8 simulated devices, and the all-reduce alone. They
share this machine's cores, so images a second of n devices beside those of one show what the mapping and the sums
cost, not how fast anything is. Interleaved repeats, medians. Ends with one line of JSON.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import timing

from pwcrf_jax import config as configs
from pwcrf_jax.model.plan import plan
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import parallel
from pwcrf_jax.training import steps
from pwcrf_jax.training.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of one device in operations and bytes a second; ring: what it can send in a ring all-reduce."""

    name: str
    devices: int
    hosts: int
    bfloat16: float
    float32: float  # as JAX multiplies float32 by default
    memory: float
    bandwidth: float
    ring: float


# https://cloud.google.com/tpu/docs/v4: 275 T bfloat16, 32 GiB, 1200 GB/s a chip; a v4-32 is 2 x 2 x 4, four a host.
# Links: 1.1 PB/s of all-reduce over 4096 chips of six links; a mesh of that shape holds one ring, used both ways.
# https://cloud.google.com/tpu/docs/v5e: 197 T bfloat16, 16 GiB, 819 GB/s a chip; 4 x 4 chips, four a host. Links: 51.2
# TB/s of all-reduce over 256 chips of four links; a slice of that shape has no wrap-around and holds one ring, too.
# https://www.nvidia.com/en-us/data-center/h100/, SXM, halved where given with sparsity: 989 T bfloat16, 495 T TF32,
# 80 GB, 3.35 TB/s; NVLink 900 GB/s, 450 GB/s of it out of a device.
MACHINES = (
    Machine("TPU v4-32", 16, 4, 275e12, 275e12, 32 * 2**30, 1.2e12, 2 * 1.1e15 / 4096 / 6),
    Machine("TPU v5e-16", 16, 4, 197e12, 197e12, 16 * 2**30, 819e9, 2 * 51.2e12 / 256 / 4),
    Machine("8 x H100 SXM", 8, 1, 989e12, 494.5e12, 80e9, 3.35e12, 450e9),
)
EFFICIENCY = 0.4  # of the peak, in convolutions and matrix products
SCORE_BYTES = 20  # a score of an edge is written and read five times, docs/design.md
# benchmarks/RESULTS.md: the slower of two sets of real photographs, 692 images a second on two cores, 360 x 480 pixels.
IMAGES_PER_CORE, MEASURED_PIXELS = 692 / 2, 360 * 480
STORED_PIXELS = {"voc_vgg16": 375 * 500, "camvid_mobilenet_v2": 360 * 480, "cityscapes_vgg16": 1024 * 2048}
BATCHES = (1, 4, 16)  # a device


def load(name):
    config = importlib.import_module(f"pwcrf_jax.configs.{name}").get_config()
    model = configs.build_model(config)
    return config, model, make_optimizer(config.optimizer, config.model, config.train.steps)


def train_step(config, model, tx, num_devices):
    step = steps.from_config(config, model, tx)
    return parallel.pmap_train(step, devices=jax.devices()[:num_devices])


def initial_state(model, tx):
    params = restore.init_params(model, 0)
    return steps.TrainState(jnp.int32(0), params, tx.init(params))


def summed_bytes(jaxpr):
    """Bytes of what a jaxpr sums over the devices."""
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name.startswith("psum"):
            total += sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.invars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    total += summed_bytes(inner)
    return total


def volume(config, model, tx):
    state = jax.eval_shape(lambda: initial_state(model, tx))
    size = config.data.crop_size
    batch = {
        "image": jax.ShapeDtypeStruct((1, 1, *size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((1, 1, *size), jnp.uint8),
    }
    return summed_bytes(jax.make_jaxpr(train_step(config, model, tx, 1))(state, batch))


def work(config, model, tx, batch):
    """Of one device: operations of the nets and of the pairwise loss, bytes it holds, bytes it moves at least."""
    p = plan(
        model,
        config.data.crop_size,
        batch,
        num_sampled_offsets=config.loss.sampled_offsets,
        chunk_edges=config.loss.chunk_edges or None,
        optimizer=tx,
    )
    losses = [row for row in p.rows if row.name.startswith("pairwise loss ")]
    pairs = sum(row.multiply_adds for row in losses)
    classes = config.data.num_classes
    edges = pairs / (config.model.hidden * (3 * classes**2 + 2 * p.grid[0]))
    parameters, state = p["parameters"].bytes, p["optimizer state"].bytes
    # Parameters are read forward and backward; gradients, parameters and optimizer state are each written and read.
    moved = (
        2 * p["activations"].bytes + 2 * parameters + 2 * (2 * parameters + state) + SCORE_BYTES * edges * classes**2
    )
    return dict(
        nets=2 * (p["training step"].multiply_adds - pairs), pairs=2 * pairs, held=p["training step"].bytes, moved=moved
    )


def on_paper(names):
    rows = []
    for name in names:
        config, model, tx = load(name)
        summed = volume(config, model, tx)
        for batch in BATCHES:
            row = dict(config=name, dtype=config.model.dtype, batch=batch, summed=summed)
            rows.append(row | work(config, model, tx, batch))
    print("A training step, of one device\n")
    print("| config | images | operations | of them pairwise | held | moved, at least | all-reduced |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        total = r["nets"] + r["pairs"]
        sizes = (total / 1e12, r["pairs"] / total, *(r[key] / 1e9 for key in ("held", "moved", "summed")))
        text = "{:.2f} T | {:.0%} | {:.2f} GB | {:.2f} GB | {:.3f} GB".format(*sizes)
        print(f"| {r['config']} | {r['batch']} | {text} |", flush=True)
    for machine in MACHINES:
        print(f"\n{machine.name}, {machine.devices} devices; milliseconds\n")
        print(
            "| config | images a device | products, peak | products, 40 % | memory | all-reduce | step | images/s |",
            end="",
        )
        print(" of linear | cores a host |\n|---|---|---|---|---|---|---|---|---|---|")
        for r in rows:
            print(times(machine, r), flush=True)
    return rows


def times(machine, r):
    """A row of the table of a machine; its figures are added to r."""
    if r["held"] > machine.memory:
        return f"| {r['config']} | {r['batch']} | does not fit | | | | | | | |"
    peak = r["nets"] / getattr(machine, r["dtype"]) + r["pairs"] / machine.float32
    memory = r["moved"] / machine.bandwidth
    # A ring: each device sends the whole twice, but for its own share.
    reduce = 2 * (machine.devices - 1) / machine.devices * r["summed"] / machine.ring
    alone = max(peak / EFFICIENCY, memory)
    step = alone + reduce  # one sum after the backward pass: nothing overlaps it
    rate = machine.devices * r["batch"] / step
    per_core = IMAGES_PER_CORE * min(1.0, MEASURED_PIXELS / STORED_PIXELS[r["config"]])
    cores = rate / machine.hosts / per_core
    r[machine.name] = dict(step=step, images_per_second=rate, of_linear=alone / step, cores_per_host=cores)
    cells = [f"{1000 * x:.1f}" for x in (peak, peak / EFFICIENCY, memory, reduce, step)]
    cells += [f"{rate:.0f}", f"{alone / step:.0%}", f"{cores:.1f}"]
    return f"| {r['config']} | {r['batch']} | {' | '.join(cells)} |"


def measure(repeats):
    config, model, tx = load("demo")
    batch, size, counts = 4, (96, 128), (1, 2, 4, 8)
    rng = np.random.default_rng(0)
    runs = {}
    for n in counts:
        data = {
            "image": rng.integers(0, 256, (n, batch, *size, 3), np.uint8),
            "label": rng.integers(0, config.data.num_classes, (n, batch, *size), np.uint8),
        }
        runs["step", n] = stepping(train_step(config, model, tx, n), initial_state(model, tx), data)
        runs["sum", n] = summing(n)
    median = timing.medians({key: partial(timing.timed, run) for key, run in runs.items()}, repeats)
    rows = []
    print(
        f"\nSimulated devices on {os.cpu_count()} cores: demo model, {batch} images of {size[0]} x {size[1]} on each\n"
    )
    print("| devices | step, ms | images/s | beside one device | all-reduce of 21 MB, ms |\n|---|---|---|---|---|")
    for n in counts:
        rate = n * batch / median["step", n]
        row = dict(devices=n, step=median["step", n], images_per_second=rate, all_reduce=median["sum", n])
        rows.append(row | {"beside_one": rate / rows[0]["images_per_second"] if rows else 1.0})
        ms = f"{1000 * row['step']:.0f} | {rate:.0f} | {rows[-1]['beside_one']:.2f} | {1000 * row['all_reduce']:.1f}"
        print(f"| {n} | {ms} |", flush=True)
    return rows


def stepping(step, state, batch):
    def run():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return run


def summing(n):
    """The all-reduce of as many bytes as configs/camvid_mobilenet_v2.py has gradients."""
    run = jax.pmap(lambda x: jax.lax.psum(x, "data"), axis_name="data", out_axes=None, devices=jax.devices()[:n])
    rows = jax.device_put(np.ones((n, 21_100_000 // 4), np.float32))
    return lambda: run(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one config, three repeats")
    parser.add_argument("--no_paper", action="store_true")
    parser.add_argument("--no_measurement", action="store_true")
    args = parser.parse_args()
    names = ["camvid_mobilenet_v2"] if args.quick else list(STORED_PIXELS)
    paper = [] if args.no_paper else on_paper(names)
    measured = [] if args.no_measurement else measure(3 if args.quick else 15)
    print(json.dumps({"paper": paper, "measured": measured}))


if __name__ == "__main__":
    main()
