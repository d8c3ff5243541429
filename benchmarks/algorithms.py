"""One thing computed in two ways: is the package's way the faster, and by how much.

    python benchmarks/algorithms.py [--parts depthwise heads messages rows] [--quick]

* depthwise: MobileNetV2 at three scales of 360 x 480; depthwise convolutions as shifted sums, against XLA's grouped
  convolution.
* heads: gradient, with respect to parameters and maps, of one Unary-Net and two Pairwise-Nets on maps of the sizes that
  CamVid's configuration and the paper's VOC configuration give them; first layers on each scale's own map, against the
  same on the upsampled, concatenated features. Both are the same function: the largest difference of an output is
  printed, relative to its largest entry. (tests/unit/nets/test_nets_layers.py compares gradients; at these sizes some
  ReLU lies so near zero that rounding decides it.) Memory is what XLA plans for temporaries.
* messages: of one relation, float32, over a range of shapes; "factored" against "table". Columns: seconds of one and of
  ten iterations by each ("table" forms its scores before the first), what `costs.algorithm` chooses for 3 and for 10
  iterations, and what that costs beside the faster one (1.00: it is the faster). Tables above `costs.TABLE_BYTES` are
  left out.
* rows: inference of an evaluation step with two relations on 33 x 42 cells, 40 classes, 10 iterations: the rows unary
  and all (`config.eval.each_relation=False`), against these and a row of each relation.

Medians of interleaved calls in one process. Ends with one line of JSON; a ratio above 1 means that ours is faster.
"""

import argparse
import json
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import timing

from pwcrf_jax import config as configs
from pwcrf_jax import costs, mean_field, nets, relations
from pwcrf_jax.configs import camvid_mobilenet_v2, voc_vgg16
from pwcrf_jax.evaluation.steps import decode_rows
from pwcrf_jax.messages import compute_messages, prepare_messages
from pwcrf_jax.model.segmenter import Potentials
from pwcrf_jax.potentials import factored_pairwise

# Depthwise convolutions.


def depthwise(repeats, quick):
    height, width = (180, 240) if quick else (360, 480)
    images = np.random.default_rng(0).normal(0, 0.5, (1, height, width, 3)).astype(np.float32)

    def net(method):
        options = {"depthwise": method}
        return nets.FeatMapNet("mobilenet_v2", options, scales=(1.2, 0.8, 0.4), block6=(), pyramid_windows=())

    params = jax.jit(net("shifted").init)(jax.random.key(0), images)
    turns = {}
    for method in ("shifted", "grouped"):
        model = net(method)
        forward = lambda p, x, model=model: model.apply(p, x).sum()
        turns[method, "forward"] = partial(timing.timed, jax.jit(forward), params, images)
        turns[method, "gradient"] = partial(timing.timed, jax.jit(jax.grad(forward)), params, images)
    median, out = timing.medians(turns, repeats), {"image": [height, width]}
    for what in ("forward", "gradient"):
        ours, rival = median["shifted", what], median["grouped", what]
        print(f"  {what:10s} shifted {ours:.3f} s   grouped {rival:.3f} s   ratio {rival / ours:.2f}", flush=True)
        out |= {f"{what}_ratio": round(rival / ours, 3), f"{what}_seconds": round(ours, 4)}
    return out


# First layers of the heads.

CONFIGS = {"camvid": camvid_mobilenet_v2.get_config, "voc": voc_vgg16.get_config}


def heads_of(config, batch):
    """{"apart", "concatenated": (turn, bytes of temporaries, outputs)}."""
    m, classes = config.model, config.data.num_classes
    channels = m.block6[-1][1] * (1 + len(m.pyramid_windows))
    stride = configs.featmap_net(config).stride
    sizes = [nets.grid_size(config.data.crop_size, (scale,), stride) for scale in m.scales]
    rng = np.random.default_rng(0)
    maps = [jnp.asarray(rng.normal(size=(batch, *size, channels)).clip(0), jnp.float32) for size in sizes]
    grid = max(sizes)
    of_all = {"unary": nets.UnaryNet(classes, m.hidden)}
    of_all |= {name: nets.PairwiseNet(classes, m.hidden) for name in m.relations}
    params = {name: head.init(jax.random.key(0), maps) for name, head in of_all.items()}
    resize = lambda x: jax.image.resize(x, (batch, *grid, channels), "bilinear") if x.shape[1:3] != grid else x
    join = lambda maps: jnp.concatenate([resize(x) for x in maps], axis=-1)

    def build(of):
        def outputs(params, maps):
            features = of(maps)
            unary, *pairs = (head.apply(params[name], features) for name, head in of_all.items())
            return [unary, *(x for parts in pairs for x in parts[:2])]

        loss = lambda *args: sum(jnp.mean(jnp.square(x)) for x in outputs(*args))
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, maps).compile()
        turn = partial(timing.timed, compiled, params, maps)
        return turn, compiled.memory_analysis().temp_size_in_bytes, jax.jit(outputs)(params, maps)

    return {"apart": build(lambda maps: maps), "concatenated": build(join)}


def heads(repeats, quick):
    out = {}
    for which in ("camvid",) if quick else CONFIGS:
        built = heads_of(CONFIGS[which](), 1 if quick else 2)
        apart = lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max())
        differs = max(map(apart, *(outputs for _, _, outputs in built.values())))
        median = timing.medians({name: turn for name, (turn, _, _) in built.items()}, repeats)
        for name, (_, size, _) in built.items():
            print(f"  {which:7s} {name:13s} {1e3 * median[name]:8.1f} ms   {size / 2**20:7.1f} MiB", flush=True)
        ratio = median["concatenated"] / median["apart"]
        print(f"  {which:7s} {ratio:.2f} x as fast, outputs differ by {differs:.1e}", flush=True)
        out[which] = dict(ratio=round(ratio, 2), differs=differs)
    return out


# Messages.

GRID5 = relations.Relation("grid5", (-0.2, 0.2), (-0.2, 0.2), grid=5)
FULL = relations.SURROUNDING
SHAPES = [  # height, width, relation, hidden, classes
    (29, 38, FULL, 512, 6),
    (29, 38, FULL, 512, 11),
    (29, 38, FULL, 512, 21),
    (29, 38, FULL, 128, 11),
    (29, 38, FULL, 64, 21),
    (29, 38, GRID5, 512, 6),
    (29, 38, GRID5, 512, 21),
    (29, 38, GRID5, 512, 40),
    (29, 38, GRID5, 512, 60),
    (12, 16, FULL, 64, 6),
    (12, 16, FULL, 512, 11),
    (12, 16, FULL, 512, 40),
    (60, 60, GRID5, 256, 19),
]
QUICK = [(12, 16, FULL, 64, 6), (12, 16, GRID5, 128, 21)]


def iterate(iterations, algorithm):
    def run(potential, marginals):
        prepared = prepare_messages(potential, iterations, algorithm=algorithm)

        def body(q, _):
            message, count = compute_messages(prepared, q)
            return jax.nn.softmax(message / count[..., None]), None

        return jax.lax.scan(body, marginals, None, length=iterations)[0]

    return jax.jit(run)


def messages(repeats, quick):
    rng, rows = np.random.default_rng(0), []
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    print("  map    offsets hidden classes | factored 1   10 | table 1     10 | choice 3, cost | choice 10, cost")
    for height, width, relation, hidden, k in QUICK if quick else SHAPES:
        box = relations.offsets(relation, height, width)
        if costs.table_messages(box, height, width, k, hidden).temp_bytes > costs.TABLE_BYTES:
            continue
        hidden_p, hidden_q = draw(2, height, width, hidden)
        potential = factored_pairwise(hidden_p, hidden_q, 0.1 * draw(hidden, k, k), draw(k, k), box)
        marginals = jax.nn.softmax(draw(height, width, k))
        kinds = [(algorithm, n) for algorithm in ("factored", "table") for n in (1, 10)]
        turns = {(a, n): partial(timing.timed, iterate(n, a), potential, marginals) for a, n in kinds}
        median = timing.medians(turns, repeats)
        row = dict(height=height, width=width, offsets=len(box), hidden=hidden, classes=k)
        row |= {f"{algorithm}_{n}": round(s, 5) for (algorithm, n), s in median.items()}
        for n in (3, 10):
            at = {r: median[r, 1] + (n - 1) * (median[r, 10] - median[r, 1]) / 9 for r in ("factored", "table")}
            choice = costs.algorithm(box, height, width, k, hidden, num_iterations=n)
            row |= {f"choice_{n}": choice, f"regret_{n}": round(at[choice] / min(at.values()), 3)}
        rows.append(row)
        print(
            f"{height:2d} x {width:2d} {len(box):9d} {hidden:6d} {k:7d} |"
            f" {row['factored_1']:8.4f} {row['factored_10']:6.3f} | {row['table_1']:7.4f} {row['table_10']:6.3f} |"
            f" {row['choice_3']:6s} {row['regret_3']:7.2f} | {row['choice_10']:6s} {row['regret_10']:8.2f}",
            flush=True,
        )
    return {"worst_regret": max(row[f"regret_{n}"] for row in rows for n in (3, 10)), "rows": rows}


# Rows of the evaluation table.


def rows(repeats, quick):
    height, width, k, hidden = (12, 16, 11, 64) if quick else (33, 42, 40, 192)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    boxes = {"surrounding": GRID5, "above_below": relations.Relation("above", (-0.4, 0.0), (-0.2, 0.2), grid=5)}
    pairs = {}
    for name, box in boxes.items():
        sides = draw(1, height, width, hidden), draw(1, height, width, hidden)
        offsets = relations.offsets(box, height, width)
        pairs[name] = factored_pairwise(*sides, 0.1 * draw(hidden, k, k), draw(k, k), offsets)
    potentials = Potentials(draw(1, height, width, k), pairs)
    settings = mean_field.Settings(num_iterations=10, weights=dict.fromkeys(pairs, 1.0), average_messages=True)
    size = 16 * height, 16 * width
    valid = np.int32([[0, 0, *size]])
    few = {"unary": (), "all": tuple(pairs)}
    turns = {}
    for kind, of in (("two", few), ("four", few | {name: (name,) for name in pairs})):
        run = jax.jit(lambda p, of=of: {row: x[0] for row, x in decode_rows(p, of, settings, valid, size).items()})
        turns[kind] = partial(timing.timed, run, potentials)
    median = timing.medians(turns, repeats)
    ratio = median["four"] / median["two"]
    print(f"  two rows {median['two']:.3f} s   four rows {median['four']:.3f} s   ratio {ratio:.2f}", flush=True)
    return {"ratio": round(ratio, 3), **{f"{kind}_seconds": round(s, 4) for kind, s in median.items()}}


PARTS = {"depthwise": depthwise, "heads": heads, "messages": messages, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, help="timed turns (7; quick: 3)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the image, CamVid's heads, two shapes")
    args = parser.parse_args()
    device, repeats = jax.devices()[0], args.repeats or (3 if args.quick else 7)
    print(f"{device.platform}, {device.device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}", flush=True)
    out = {"device": device.device_kind, "repeats": repeats}
    for name in args.parts:
        print(f"\n{name}", flush=True)
        out[name] = PARTS[name](repeats, args.quick)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
