"""Training and evaluation against PyTorch: the same network, one run, the two in turns.

    python benchmarks/training.py [--networks mobilenet_v2 efficientnet_lite0] [--cores 2 1] [--quick]

Networks: the unary of configs/camvid_mobilenet_v2.py, and that of configs/image_folder.py (EfficientNet-Lite0), both
with CamVid's 11 classes. PyTorch has torchvision's and timm's backbones, BatchNorm folded, of the same layers, and
the same scales, pooling, heads, frozen layers, class balance, clipping and AdamW (training_torch.py).

* agreement, before anything is timed: numbers of parameters, shapes, and with our parameters carried over and
  TensorFlow's padding: scores to 1e-3 of their size, losses and gradient norms of three steps to 1e-2, pixels that are
  counted elsewhere at most 1e-3. The run ends here where one differs.
* training: a step of 4 x 240 x 320 pixels, from the batch on the host to the loss on the host.
* evaluation: 4 x 360 x 480 pixels, with upsampling, argmax and all that evaluation counts: three confusion matrices (of
  the frame and of two bands along boundaries) and the likelihood.
* start-up: seconds from the start of a process to the end of its first training step, ours with an empty and with a
  filled compilation cache. Our first two calls of each step are given beside it.

Each number of cores has a process of its own that sees no others. --compiled adds torch.compile as one more rival,
which needs a C++ compiler. Needs `pip install -e ".[bench-torch]"`. Ends with one line of JSON: images a second, and
ratios; one above 1 means that ours is faster.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

NETWORKS = ("mobilenet_v2", "efficientnet_lite0")
LIBRARIES = ("torch", "torchvision", "timm")
OURS, RIVAL, COMPILED = "ours", "PyTorch", "PyTorch compiled"


class Sizes(NamedTuple):
    """(height, width) of a training crop and of a frame, images a batch."""

    train: tuple[int, int]
    evaluation: tuple[int, int]
    batch: int


LIMITS = {"scores": 1e-3, "likelihood": 1e-3, "counts": 1e-3, "steps": 1e-2}
"""Of `agreement`, each relative to the largest value."""
NUM_CLASSES = 11
FULL, QUICK = Sizes((240, 320), (360, 480), 4), Sizes((64, 96), (72, 96), 2)


def sizes_of(args):
    return QUICK if args.quick else FULL


# The processes that measure. What they use is imported there, once they have their cores.


def batch_of(size, num_images, num_classes=NUM_CLASSES, seed=0):
    """Noise, and labels in blocks, a part of them void."""
    import numpy as np

    rng = np.random.default_rng(seed)
    height, width = size
    blocks = rng.integers(0, num_classes + 1, (num_images, -(-height // 24), -(-width // 24))).astype(np.uint8)
    blocks[blocks == num_classes] = 255
    return {
        "image": rng.integers(0, 256, (num_images, height, width, 3)).astype(np.uint8),
        "label": np.ascontiguousarray(np.kron(blocks, np.ones((1, 24, 24), np.uint8))[:, :height, :width]),
        "valid_box": np.tile(np.int32([0, 0, height, width]), (num_images, 1)),
    }


def ours_of(args):
    import training_ours

    return training_ours.Ours(args.networks[0], sizes_of(args), NUM_CLASSES)


def torch_of(args, ours=None, padding="own", compiled=False):
    """ours: whose configuration and parameters it takes; None: a configuration from the file, as a process of its own
    that loads no JAX."""
    import torch
    import training_torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    text = ours.config.to_json() if ours else Path(args.settings).read_text()
    return training_torch.Torch(text, padding, ours.layers() if ours else None, compiled)


def agreement(args, batches):
    """How far the two differ, and the configuration; SystemExit where they are not the same network."""
    import numpy as np

    ours, network = ours_of(args), args.networks[0]
    rival = torch_of(args, ours, "same")
    if ours.num_params() != rival.num_params():
        raise SystemExit(f"{network}: {ours.num_params()} parameters here, {rival.num_params()} in PyTorch")
    mine, theirs = (side.scores(batches["evaluation"]["image"]) for side in (ours, rival))
    if mine.shape != theirs.shape:
        raise SystemExit(f"{network}: scores {mine.shape} here, {theirs.shape} in PyTorch")
    (counts, terms), (their_counts, their_terms) = (side.evaluate(batches["evaluation"]) for side in (ours, rival))
    steps = [np.array([side.train(batches["training"]) for _ in range(3)]) for side in (ours, rival)]
    apart = lambda a, b: float(np.max(np.abs(np.subtract(a, b))) / np.max(np.abs(b)))
    differ = {
        "scores": apart(mine, theirs),
        "likelihood": max(map(apart, terms, their_terms)),
        "counts": float(np.abs(counts - their_counts).sum() / counts.sum()),
        "steps": max(map(apart, steps[0].T, steps[1].T)),
    }
    for name, limit in LIMITS.items():
        if not differ[name] <= limit:
            raise SystemExit(f"{network}: {name} differ by {differ[name]:.1e}, more than {limit:.0e}")
    differ = {name: float(f"{value:.1e}") for name, value in differ.items()}
    found = {"parameters": ours.num_params(), "scores": mine.shape, "differ": differ}
    return found | {"settings": ours.config.to_json()}


STEPS = {"training": "train", "evaluation": "evaluate"}


def measure(args, batches):
    """{training, evaluation: {side: median seconds}}, and the seconds of our first two calls, which compile."""
    import timing

    ours, first = ours_of(args), {}
    sides = {OURS: ours, RIVAL: torch_of(args, ours)}
    if args.compiled:
        sides[COMPILED] = torch_of(args, ours, compiled=True)
    call = lambda side, what: getattr(side, STEPS[what])(batches[what])
    for what in STEPS:
        first[what] = [timing.timed(call, ours, what) for _ in range(2)]
    found = {"first calls": first}
    for what in STEPS:
        turns = {name: partial(timing.timed, call, side, what) for name, side in sides.items()}
        found[what] = timing.medians(turns, args.repeats, warm=2)
    return found


def begin(args, batches):
    """The first training step of a process; the time at which it has ended."""
    if args.task == "begin ours":
        from pwcrf_jax.runtime import compilation

        compilation.use()  # as `pwcrf train` does
    side = ours_of(args) if args.task == "begin ours" else torch_of(args)
    side.train(batches["training"])
    return {"ended": time.monotonic()}


def work(args):
    """What a process of its own is for; its last line is JSON."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sizes = sizes_of(args)
    batches = {"training": batch_of(sizes.train, sizes.batch), "evaluation": batch_of(sizes.evaluation, sizes.batch)}
    print(json.dumps({"agreement": agreement, "measure": measure}.get(args.task, begin)(args, batches)))


# The process that asks them.


def ask(args, network, cores, task, settings="", cache=None):
    """The answer of a process of its own; its "started" is when it was asked."""
    words = ["--networks", network, "--cores", cores, "--repeats", args.repeats, "--task", task, "--settings", settings]
    words += ["--quick"] * args.quick + ["--compiled"] * args.compiled
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": cache} if cache else {}
    if args.quick or task == "agreement":  # nothing of speed: on a busy machine waiting threads would take the cores
        env |= {"OMP_WAIT_POLICY": "PASSIVE"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], env=env, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{network}, {task}: the process ended with {done.returncode}, see above")
    return json.loads(done.stdout.splitlines()[-1]) | {"started": started}


def start_up(args, network, cores, settings):
    """{how: median seconds from the start of a process to the end of its first step}, interleaved."""
    seconds = {"ours, empty cache": [], "ours, filled cache": [], RIVAL: []}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "settings.json")
        file.write_text(settings)
        for turn in range(args.starts):
            for how, values in seconds.items():
                task = "begin torch" if how == RIVAL else "begin ours"
                answer = ask(args, network, cores, task, file, os.path.join(scratch, str(turn)))
                values.append(answer["ended"] - answer["started"])
    return {how: statistics.median(values) for how, values in seconds.items()}


def report(args, network, cores):
    """Measures one network on so many cores, prints its rows and returns their figures."""
    found = ask(args, network, cores, "agreement")
    print(f"\n{network}, {cores} core{'s' * (cores > 1)}: {found['parameters']} parameters, scores {found['scores']}")
    print("  differences: " + ", ".join(f"{name} {value:.0e}" for name, value in found["differ"].items()), flush=True)
    times, batch = ask(args, network, cores, "measure"), sizes_of(args).batch
    out = {"parameters": found["parameters"], "differ": found["differ"]}
    for what in STEPS:
        for side, seconds in times[what].items():
            ratio = f"   ours {seconds / times[what][OURS]:5.2f} x" * (side != OURS)
            print(f"  {what:10s} {side:18s} {1e3 * seconds:8.1f} ms {batch / seconds:8.2f} images/s{ratio}", flush=True)
        rates = {side: round(batch / seconds, 3) for side, seconds in times[what].items()}
        best = max(rate for side, rate in rates.items() if side != OURS)
        out[what] = {"images_per_second": rates, "ratio": round(rates[OURS] / best, 3)}
    out["first_calls_seconds"] = {what: [round(x, 2) for x in values] for what, values in times["first calls"].items()}
    for what, (first, second) in out["first_calls_seconds"].items():
        print(f"  our first and second call: {what} {first:.2f} s, {second:.2f} s", flush=True)
    out["start_up_seconds"] = {}
    for how, seconds in start_up(args, network, cores, found["settings"]).items() if args.starts else ():
        print(f"  start-up   {how:18s} {seconds:8.2f} s", flush=True)
        out["start_up_seconds"][how] = round(seconds, 2)
    return out


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--cores", nargs="+", type=int, help="numbers of cores, each measured (all, and 1)")
    parser.add_argument("--repeats", type=int, help="timed turns of each step (15; quick: 2)")
    parser.add_argument("--starts", type=int, help="timed starts of each kind (3; quick: 1; 0: none)")
    parser.add_argument("--compiled", action="store_true", help="torch.compile as one more rival")
    parser.add_argument("--quick", action="store_true", help="small images, 2 a batch, all cores: does it work")
    parser.add_argument("--task", default="", help=argparse.SUPPRESS)
    parser.add_argument("--settings", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    there = len(os.sched_getaffinity(0))
    args.cores = args.cores or ([there] if args.quick else sorted({there, 1}, reverse=True))
    for name, whole, quick, least in (("repeats", 15, 2, 1), ("starts", 3, 1, 0)):
        value = getattr(args, name)
        setattr(args, name, (quick if args.quick else whole) if value is None else value)
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    for cores in args.cores:
        if not 1 <= cores <= there:
            parser.error(f"--cores {cores}: this process may use 1 to {there}")
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed: pip install 'pwcrf_jax[bench-torch]'")
    return args


def main():
    args = parsed()
    if args.task:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores[0]])
        work(args)
        return
    versions = {name: importlib.metadata.version(name) for name in ("jax", *LIBRARIES)}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    cores = len(os.sched_getaffinity(0))
    print(f"{platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}; {said}", flush=True)
    figures = {}
    for network in args.networks:
        for cores in args.cores:
            figures[f"{network}, {cores} cores"] = report(args, network, cores)
    print(f"\nload {os.getloadavg()[0]:.1f}")
    print(json.dumps({"versions": versions, "sizes": sizes_of(args)._asdict(), "figures": figures}))


if __name__ == "__main__":
    main()
