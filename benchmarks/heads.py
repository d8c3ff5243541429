"""First layers of the heads on each scale's own map, against the same on the upsampled, concatenated features.

    python benchmarks/heads.py
    python benchmarks/heads.py --quick

Gradient, with respect to parameters and maps, of one Unary-Net and two Pairwise-Nets on maps of the sizes that
CamVid's configuration and the paper's VOC configuration give them. Both are the same function: the largest difference
of an output is printed, relative to its largest entry. (Gradients are compared in tests/nets/test_nets_layers.py; at
these sizes some ReLU lies so near zero that rounding decides it.) Medians of interleaved calls. Memory is what XLA
plans for temporaries. Ends with one line of JSON: `ratio` is concatenated over apart.
"""

import argparse
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from objectives import interleaved

from pwcrf_jax import nets
from pwcrf_jax.configs import camvid_mobilenet_v2, voc_vgg16

CONFIGS = {"camvid": camvid_mobilenet_v2.get_config, "voc": voc_vgg16.get_config}


def calls(config, batch):
    """{"apart", "concatenated": (call, bytes of temporaries, outputs)}."""
    m, classes = config.model, config.data.num_classes
    channels = m.block6[-1][1] * (1 + len(m.pyramid_windows))
    sizes = [nets.grid_size(config.data.crop_size, (scale,)) for scale in m.scales]
    rng = np.random.default_rng(0)
    maps = [jnp.asarray(rng.normal(size=(batch, *size, channels)).clip(0), jnp.float32) for size in sizes]
    grid = max(sizes)
    heads = {"unary": nets.UnaryNet(classes, m.hidden)}
    heads |= {name: nets.PairwiseNet(classes, m.hidden) for name in m.relations}
    params = {name: head.init(jax.random.key(0), maps) for name, head in heads.items()}
    resize = lambda x: jax.image.resize(x, (batch, *grid, channels), "bilinear") if x.shape[1:3] != grid else x
    join = lambda maps: jnp.concatenate([resize(x) for x in maps], axis=-1)

    def build(of):
        def outputs(params, maps):
            features = of(maps)
            unary, *pairs = (head.apply(params[name], features) for name, head in heads.items())
            return [unary, *(x for parts in pairs for x in parts[:2])]

        loss = lambda *args: sum(jnp.mean(jnp.square(x)) for x in outputs(*args))
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, maps).compile()
        call = lambda: jax.block_until_ready(compiled(params, maps))
        return call, compiled.memory_analysis().temp_size_in_bytes, jax.jit(outputs)(params, maps)

    return {"apart": build(lambda maps: maps), "concatenated": build(join)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="CamVid's alone, one image")
    args = parser.parse_args()
    device, out = jax.devices()[0], {}
    print(f"{device.platform}, {device.device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}", flush=True)
    for which in ("camvid",) if args.quick else CONFIGS:
        built = calls(CONFIGS[which](), 1 if args.quick else 2)
        apart = lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max())
        differs = max(map(apart, *(outputs for _, _, outputs in built.values())))
        median = interleaved({name: call for name, (call, _, _) in built.items()}, args.repeats)
        for name, (_, size, _) in built.items():
            print(f"  {which:7s} {name:13s} {1e3 * median[name]:8.1f} ms   {size / 2**20:7.1f} MiB", flush=True)
        ratio = median["concatenated"] / median["apart"]
        print(f"  {which:7s} {ratio:.2f} x as fast, outputs differ by {differs:.1e}", flush=True)
        out[which] = dict(ratio=round(ratio, 2), differs=differs)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
