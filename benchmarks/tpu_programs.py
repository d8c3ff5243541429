"""What the TPU compiler makes of our steps, on a machine without a TPU: bytes, code, operations, collectives.

    pip install -e ".[train,tpu]"
    python benchmarks/tpu_programs.py --rows demo:train:v5e demo:eval:v5e
    python benchmarks/tpu_programs.py                 all of ROWS: VGG-16 takes half an hour each
    python benchmarks/tpu_programs.py --table         what was compiled before

The step is that of `parallel.pmap_train` and `parallel.pmap_eval`, mapped by `shard_map` over a topology's devices, as
pmap wants devices that are there: the same function, the same named axis, state on each device and images in shares.
libtpu compiles it as on a TPU VM; nothing runs, so there are no times of steps. A row says, of one device: bytes of
arguments, temporaries and code, what `pwcrf_jax.plan` says of the whole, seconds to compile, operations by XLA's count,
collectives with the bytes that they leave, and the fusions of the largest outputs.

Each row is kept in benchmarks/results and not compiled again. Ends with one line of JSON.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask which TPU this is
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pwcrf_jax import config as configs
from pwcrf_jax.evaluation import steps as eval_steps
from pwcrf_jax.model.plan import plan
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import parallel
from pwcrf_jax.training import steps
from pwcrf_jax.training.averaging import Averaging
from pwcrf_jax.training.optimizer import make_optimizer

RESULTS = Path(__file__).resolve().parent / "results"
TOPOLOGIES = {"v5e": ("v5e:2x2", "v5litepod-4"), "v4": ("v4:2x2x1", "v4-8")}
# Images a device of a config, and what a folder of images would say.
CONFIGS = {"demo": (4, {}), "camvid_mobilenet_v2": (4, {}), "image_folder": (4, {}), "voc_vgg16": (4, {})}
CONFIGS["image_folder"] = 4, {"num_classes": 21, "crop_size": (384, 384), "eval_size": (512, 512)}
CONFIGS["ade20k_vgg16"] = 1, {}
ROWS = [f"{name}:{mode}:{chip}" for name in CONFIGS for mode in ("train", "eval") for chip in TOPOLOGIES]
ITEMS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def missing():
    """Why nothing can be compiled here, or ""."""
    return "" if importlib.util.find_spec("libtpu") else 'libtpu is missing: pip install "pwcrf_jax[tpu]"'


def lowered(config, mode, images, devices):
    """The step of a config, lowered for devices that need not be there, and its model. images: of each device."""
    model, number = configs.build_model(config), images * len(devices)
    mesh = jax.sharding.Mesh(devices, (parallel.AXIS,))
    whole, shares = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P(parallel.AXIS)))
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((number, *shape), dtype, sharding=shares)
    height, width = config.data.crop_size if mode == "train" else config.data.eval_size
    batch = {"image": of(jnp.uint8, height, width, 3), "label": of(jnp.uint8, height, width)}
    params = restore.abstract_params(model)
    if mode == "train":
        tx = make_optimizer(config.optimizer, config.model, config.train.steps, configs.unary_steps(config))
        averaging = Averaging(config.optimizer.ema_decay, configs.unary_steps(config) or 0)
        first = jax.eval_shape(lambda p: steps.TrainState.create(p, tx, averaging), params)
        step = steps.from_config(config, model, tx, configs.objective(config).stages[-1])
    else:
        rows, settings = configs.table_rows(config), configs.crf_settings(config)
        first, step = params, eval_steps.make_eval_step(model, rows, settings)
        batch["valid_box"] = of(jnp.int32, 4)
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), first)
    out = jax.P() if mode == "train" else (jax.P(), jax.P(parallel.AXIS))
    specs = dict(mesh=mesh, in_specs=(jax.P(), jax.P(parallel.AXIS)), out_specs=out, check_vma=False)
    mapped = jax.jit(jax.shard_map(step, **specs), donate_argnums=0 if mode == "train" else ())
    return mapped.lower(first, batch), model


def config_of(name):
    config = importlib.import_module(f"pwcrf_jax.configs.{name}").get_config()
    config.data.update(CONFIGS[name][1])
    config.train.steps = config.train.steps or 1000
    return config


def devices_of(chip):
    name, kind = TOPOLOGIES[chip]
    os.environ["TPU_ACCELERATOR_TYPE"] = kind
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def bytes_of(shape):
    """Of a shape or a tuple of shapes in the text of a program, such as f32[2,3]{1,0}."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return sum(ITEMS.get(kind, 4) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in found)


def of_text(text):
    """Collectives {kind: [number, bytes]} of a compiled program, and its fusions of the largest outputs."""
    collectives, fusions = {}, []
    for shape, kind in re.findall(rf"= (.+?) ({COLLECTIVES})(?:-start)?\(", text):
        number, size = collectives.get(kind, (0, 0))
        collectives[kind] = [number + 1, size + bytes_of(shape)]
    for name, shape in re.findall(r"%?([\w.-]+) = (.+?) fusion\(", text):
        fusions.append([name, bytes_of(shape)])
    return collectives, sorted(fusions, key=lambda x: -x[1])[:3]


def compile_row(row):
    name, mode, chip = row.split(":")
    config, images, devices = config_of(name), CONFIGS[name][0], devices_of(chip)
    began = time.monotonic()
    program, model = lowered(config, mode, images, devices)
    compiled = program.compile()
    seconds, memory = time.monotonic() - began, compiled.memory_analysis()
    size = config.data.crop_size if mode == "train" else config.data.eval_size
    tx = make_optimizer(config.optimizer, config.model, config.train.steps, configs.unary_steps(config))
    offsets = config.loss.sampled_offsets
    planned = plan(model, tuple(size), images, inference=configs.crf_settings(config), num_sampled_offsets=offsets,
                   optimizer=tx)  # fmt: skip
    collectives, fusions = of_text(compiled.as_text())
    return dict(
        row=row, images=images, devices=len(devices), size=list(size), seconds=round(seconds),
        arguments=memory.argument_size_in_bytes, temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes, flops=compiled.cost_analysis().get("flops"),
        planned=planned["training step" if mode == "train" else "inference"].bytes,
        collectives=collectives, fusions=fusions, jax=jax.__version__, libtpu=importlib.metadata.version("libtpu"),
    )  # fmt: skip


def table(results):
    head = "config", "step", "chip", "images", "arguments", "temporaries", "planned", "code", "compiled", "operations"
    lines = [f"| {' | '.join(head)} | collectives |", "|---" * (len(head) + 1) + "|"]
    size = lambda n: f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
    for x in results:
        sums = ", ".join(f"{n} {kind} of {size(total)}" for kind, (n, total) in x["collectives"].items()) or "none"
        figures = [size(x[key]) for key in ("arguments", "temporaries", "planned", "code")]
        named = [*x["row"].split(":"), str(x["images"]), *figures, f"{x['seconds']} s", f"{x['flops']:.3g}"]
        lines.append(f"| {' | '.join(named)} | {sums} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="CONFIG:STEP:CHIP")
    parser.add_argument("--table", action="store_true", help="print what is there; compile nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    args = parser.parse_args()
    path = lambda row: args.results / f"tpu_{row.replace(':', '_')}.json"
    if not args.table:
        if why := missing():
            parser.error(why)
        for row in args.rows:
            if not path(row).exists():
                result = compile_row(row)
                path(row).write_text(json.dumps(result, indent=1) + "\n")
                print(table([result]).splitlines()[-1], flush=True)
    results = [json.loads(path(row).read_text()) for row in args.rows if path(row).exists()]
    print(table(results))
    print(json.dumps({x["row"]: [x["arguments"] + x["temporaries"], x["planned"], x["code"]] for x in results}))


if __name__ == "__main__":
    main()
