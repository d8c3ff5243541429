"""MobileNetV2 at three scales of 360 x 480: depthwise convolutions as shifted sums against XLA's grouped convolution.

    python benchmarks/depthwise.py [--quick]

Interleaved repeats in one process, medians; ends with one line of JSON. A ratio above 1 means shifted is faster.
"""

import argparse
import json
import os
import statistics
import sys
import time

import jax
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from pwcrf_jax.nets import FeatMapNet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the image, three repeats")
    args = parser.parse_args()
    height, width, repeats = (180, 240, 3) if args.quick else (360, 480, 7)
    images = np.random.default_rng(0).normal(0, 0.5, (1, height, width, 3)).astype(np.float32)

    def net(method):
        options = {"depthwise": method}
        return FeatMapNet("mobilenet_v2", options, scales=(1.2, 0.8, 0.4), block6=(), pyramid_windows=())

    params = jax.jit(net("shifted").init)(jax.random.key(0), images)
    runs = {}
    for method in ("shifted", "grouped"):
        model = net(method)
        forward = jax.jit(lambda p, x, model=model: model.apply(p, x).sum())
        runs[method, "forward"] = forward
        runs[method, "gradient"] = jax.jit(jax.grad(lambda p, x, forward=forward: forward(p, x)))
    seconds = {key: [] for key in runs}
    for repeat in range(repeats + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(params, images))
            if repeat:  # the first compiles
                seconds[key].append(time.perf_counter() - start)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    out = {"image": [height, width], "device": jax.devices()[0].device_kind, "repeats": repeats}
    for what in ("forward", "gradient"):
        ours, rival = median["shifted", what], median["grouped", what]
        print(f"{what:10s} shifted {ours:.3f} s   grouped {rival:.3f} s   ratio {rival / ours:.2f}")
        out |= {f"{what}_ratio": round(rival / ours, 3), f"{what}_seconds": round(ours, 4)}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
