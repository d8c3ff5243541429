"""Piecewise training against its alternatives: seconds and memory of a step, and what it reaches.

    python benchmarks/objectives.py                                    (steps of the demo's and of CamVid's model)
    python benchmarks/objectives.py --full_box [--models camvid]       (with every neighbour of each box)
    python benchmarks/objectives.py --train --runs runs/objectives     (and mean IoU on the synthetic set)
    python benchmarks/objectives.py --quick

* step: one training step (forward, backward, update) of each objective on the same model, batch and graph, compiled
  ahead; medians of interleaved calls. Objectives that end in "_staged": the mean of their two stages, the unary's and
  the relations' on its features, as config.loss.unary_share weighs them. crf: the same from the nets' outputs on, loss
  and gradient with respect to scores and potentials: what the objectives differ in. Memory is what XLA plans for
  temporaries. With --full_box also those that end in "_sampled": piecewise on 24 neighbours of each box drawn anew in
  every step, an unbiased estimate of the same likelihood (config.loss.sampled_offsets); inference has no such choice,
  it needs the whole graph in every iteration.
* train: each objective from the same start, for the same number of steps, and for as many as fit into the time that
  `piecewise` takes for these ("equal time", by the seconds of a step measured above; a run of its own, with its own
  learning rate schedule). Mean IoU of the unary and of all relations, on 200 scenes of another seed, after the last
  step: with three iterations and message weights of 1, as unrolled mean field was trained, and with the number and the
  weights that `pwcrf tune` finds best for each run on training scenes that were held out.

Messages are means (the demo's setting). Figures go to benchmarks/results (--results), those of --quick nowhere. Ends
with one line of JSON: `step_ratio` and `crf_ratio` are unrolled mean field over piecewise, and over the other kinds of
it that were measured; `step_ratio_of_staged` is in stages over in stages (`_sampled`: piecewise alone).
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import timing

from pwcrf_jax import config as configs
from pwcrf_jax.configs import camvid_mobilenet_v2, demo
from pwcrf_jax.evaluation import evaluate, tuning
from pwcrf_jax.model import losses
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import files, logs, parallel
from pwcrf_jax.training import loop, steps
from pwcrf_jax.training.optimizer import make_optimizer

RESULTS = Path(__file__).parent / "results"
OBJECTIVES = ("piecewise", "piecewise_staged", "pseudo_likelihood", "unrolled_mean_field")
ITERATIONS = 3  # of mean field, that unrolled training goes through
STEPS = (*OBJECTIVES, "unrolled_mean_field_staged")  # those whose steps are measured
SAMPLED = 24  # neighbours of each box, as many as a 5 x 5 grid has
SCENES = 500, 300  # of training and of validation; slices are of a fixed shuffle
TRAIN, HELD_OUT, SCORED = "train[:400]", "train[400:]", "val[100:]"
SCORED_SEED = 1  # of the scenes that are scored: none of them is one that training or earlier comparisons saw
CONFIGS = {"demo": demo.get_config, "camvid": camvid_mobilenet_v2.get_config}


def batch_of(config):
    rng = np.random.default_rng(0)
    size = (config.train.batch_size, *config.data.crop_size)
    labels = rng.integers(0, config.data.num_classes, (size[0], -(-size[1] // 16), -(-size[2] // 16)), np.uint8)
    labels = labels.repeat(16, 1).repeat(16, 2)[:, : size[1], : size[2]]
    return {"image": rng.integers(0, 256, (*size, 3), np.uint8), "label": labels}


def compiled_step(config, name, batch, kinds=losses.TRAINED_FACTORS):
    """(turn of `timing.interleaved` that runs a step on fresh state, bytes of temporaries)."""
    _choose(config, name)
    model = configs.build_model(config)
    tx = make_optimizer(config.optimizer, config.model, config.train.steps, configs.unary_steps(config))
    state = jax.jit(lambda: _fresh(config, model, tx))()
    step = steps.from_config(config, model, tx, kinds)
    one = jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name=parallel.AXIS)  # a single device, without donation
    inputs = parallel.split(batch, 1)
    compiled = jax.jit(one).lower(state, inputs).compile()
    return partial(timing.timed, compiled, state, inputs), compiled.memory_analysis().temp_size_in_bytes


def _choose(config, name):
    config.loss.objective = name.removesuffix("_sampled")
    config.loss.sampled_offsets = SAMPLED if name.endswith("_sampled") else 0


def _fresh(config, model, tx):
    params = restore.init_params(model, 0)
    return steps.TrainState(jnp.int32(0), params, tx.init(params))


def compiled_crf(config, name, batch):
    """The same for loss and gradient from the nets' outputs on."""
    _choose(config, name)
    model = configs.build_model(config)
    params = restore.init_params(model, 0)
    potentials = jax.jit(lambda: model.apply({"params": params}, batch["image"]))()
    crf, labels = configs.crf_settings(config), jnp.asarray(batch["label"])
    objective, settings, key = configs.objective(config), configs.loss_settings(config), jax.random.key(0)

    def loss(potentials):
        terms = objective.terms(potentials, labels, settings, crf, key=key)
        return losses.negative_log_likelihood(terms, len(labels), objective.weights(terms, settings))

    compiled = jax.jit(jax.value_and_grad(loss, allow_int=True)).lower(potentials).compile()
    return partial(timing.timed, compiled, potentials), compiled.memory_analysis().temp_size_in_bytes


def measure(which, args):
    """{"step" or "crf": {objective: (seconds, bytes)}} of a config."""
    out = {}
    print(f"\n{which}: seconds and temporaries of a step, medians of {args.repeats} interleaved calls")
    for part, build in (("step", compiled_step), ("crf", compiled_crf)):
        config = CONFIGS[which]()
        config.crf.num_iterations = ITERATIONS
        if args.full_box:
            for relation in config.relations.values():
                relation.grid = 0
        names = STEPS + ("piecewise_sampled", "piecewise_staged_sampled") * args.full_box
        staged = [name for name in names if "_staged" in name]
        built = {name: build(config, name, batch_of(config)) for name in names if name not in staged}
        if part == "step":
            built["unary"] = build(config, staged[0], batch_of(config), ("unary",))  # the same in all
            for name in staged:
                built[f"pairwise {name}"] = build(config, name, batch_of(config), ("pairwise",))
        seconds = timing.medians({name: turn for name, (turn, _) in built.items()}, args.repeats)
        out[part] = {name: (seconds[name], built[name][1]) for name in names if name in built}
        if part == "step":
            share, unary = config.loss.unary_share, seconds["unary"]
            print(f"  stage of the unary {1e3 * unary:.1f} ms, of the relations "
                  + ", ".join(f"{1e3 * seconds[f'pairwise {name}']:.1f} ms ({name})" for name in staged))  # fmt: skip
            for name in staged:
                pair = f"pairwise {name}"
                mean = share * unary + (1 - share) * seconds[pair]
                out[part][name] = mean, max(built["unary"][1], built[pair][1])
        for name, (value, size) in out[part].items():
            ratio = value / out[part]["piecewise"][0]
            print(f"  {part:5s} {name:26s} {1e3 * value:8.1f} ms  {ratio:5.2f} x   {size / 2**20:8.1f} MiB", flush=True)
    return out


def train(args, seconds, keep):
    """{"steps" or "time": {objective: {seed: figures}}} on the synthetic set.

    figures: {"steps", "unary", "all" (mean IoU with message weights of 1), "weights" and "iterations" (chosen), "tuned"
      (with them)}.
    keep: called with it after each seed.
    """
    out = {"steps": {}, "time": {}}
    for seed in args.seeds:
        for name in OBJECTIVES:
            whole = args.steps or demo.get_config().train.steps
            fitting = max(1, int(whole * seconds["piecewise"] / seconds[name]))
            for equal, count in {"steps": whole, "time": fitting}.items():
                if equal == "time" and count == whole:
                    out[equal].setdefault(name, {})[str(seed)] = out["steps"][name][str(seed)]
                    continue
                config = demo.get_config()
                config.seed, config.loss.objective, config.train.steps = seed, name, count
                config.crf.num_iterations = ITERATIONS
                config.data.data_dir, config.data.train_split, config.data.eval_split = args.data_dir, TRAIN, SCORED
                config.data.synthetic.num_train, config.data.synthetic.num_val = SCENES
                config.train.eval_every = 0  # only after the last step
                config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, count // 4)
                workdir = str(Path(args.runs) / f"{name}-{count}-{seed}")
                loop.train_and_evaluate(config, workdir)
                ours, config = config.data, configs.load(workdir + "/config.json")  # a finished run is taken as it is
                if any(config.data[k] != ours[k] for k in ("train_split", "synthetic")):
                    raise SystemExit(f"{workdir} was trained on other scenes: name another folder with --runs")
                chosen = tuning.tune(config, workdir, "latest", HELD_OUT, "spatial", 1)["config"]
                config.data.synthetic.seed = SCORED_SEED
                rows = evaluate.evaluate(config, workdir, "latest")["rows"]
                weights, iterations = chosen["crf.weights"], chosen["crf.num_iterations"]
                config.crf.weights, config.crf.num_iterations = tuple(weights), iterations
                tuned = evaluate.evaluate(config, workdir, "latest")["rows"]["all"]["miou"]
                found = dict(steps=count, unary=rows["unary"]["miou"], all=rows["all"]["miou"], tuned=tuned)
                found = {k: v if k == "steps" else round(100 * v, 2) for k, v in found.items()}
                found |= dict(weights=weights, iterations=iterations)
                out[equal].setdefault(name, {})[str(seed)] = found
                print(f"  seed {seed} {name}: {found}", flush=True)
        keep(out)
    budget = whole * seconds["piecewise"]
    print(f"\nsynthetic set, mean IoU, means over seeds {args.seeds}: unary, all relations, with chosen weights")
    for equal, title in {"steps": f"after {whole} steps", "time": f"after {budget:.0f} s"}.items():
        print(f"  {title}")
        for name in OBJECTIVES:
            mean = {k: np.mean([v[k] for v in out[equal][name].values()]) for k in ("unary", "all", "tuned", "steps")}
            print(f"    {name:20s} {mean['unary']:6.2f} {mean['all']:6.2f} {mean['tuned']:6.2f}"
                  f"   ({mean['steps']:.0f} steps)", flush=True)  # fmt: skip
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS), help="whose steps")
    parser.add_argument("--full_box", action="store_true", help="all offsets of each box instead of a 5 x 5 grid")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--runs", default="runs/objectives")
    parser.add_argument("--data_dir", default="runs/tfds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="of --train; 0: the demo's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--quick", action="store_true", help="the demo's model alone, 3 calls")
    args = parser.parse_args()
    if args.train and args.full_box:
        parser.error("--train takes the demo's own grid of neighbours: leave --full_box out")
    if args.quick:
        args.models, args.repeats = ["demo"], 3
    if args.train and "demo" not in args.models:
        parser.error("--train trains the demo for the time that its steps take: --models has to name it")
    synthetic = args.results / "objectives_synthetic.json"
    if args.train and not args.quick and synthetic.exists():
        runs = json.loads(synthetic.read_text())["reached"]["steps"]["piecewise"]
        found = [{run["steps"] for run in runs.values()}, {int(seed) for seed in runs} - set(args.seeds)]
        if found != [{args.steps or demo.get_config().train.steps}, set()]:
            parser.error(f"{synthetic} holds seeds {', '.join(runs)} of {found[0].pop()} steps, which this run would "
                         "not make again: name another folder with --results")  # fmt: skip
    logs.setup()
    device = jax.devices()[0]
    print(f"{device.platform}, {device.device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}", flush=True)
    about = dict(device=device.device_kind, cores=os.cpu_count(), jax=jax.__version__, full_box=args.full_box)
    # A benchmark that goes on keeps the numbers of steps it began with, and so what it measured.
    measured = Path(args.runs) / f"measured{'_quick' if args.quick else ''}.json"
    if args.train and measured.exists():
        about, found = json.loads(measured.read_text())
        print(f"goes on with the seconds of {measured}; delete it and the runs beside it to measure anew")
    else:
        found = {which: measure(which, args) for which in args.models}
    if args.train:
        measured.parent.mkdir(parents=True, exist_ok=True)
        files.write(measured, json.dumps([about, found]) + "\n")
    out = {}
    for part in ("step", "crf"):
        for name in (x for x in next(iter(found.values()))[part] if x.startswith("piecewise")):
            ratio = lambda f, part=part, name=name: f[part]["unrolled_mean_field"][0] / f[part][name][0]
            key = f"{part}_ratio" + name.removeprefix("piecewise")
            out[key] = {which: round(ratio(f), 2) for which, f in found.items()}
    for kind in ("staged", "staged_sampled"):
        ratio = lambda f, kind=kind: f["step"]["unrolled_mean_field_staged"][0] / f["step"][f"piecewise_{kind}"][0]
        if all({"unrolled_mean_field_staged", f"piecewise_{kind}"} <= f["step"].keys() for f in found.values()):
            # Neither the boxes of a grid nor earlier runs that go on have all of them.
            out[f"step_ratio_of_{kind}"] = {which: round(ratio(f), 2) for which, f in found.items()}
    if not args.quick:
        args.results.mkdir(parents=True, exist_ok=True)
        some = "_".join(["", *args.models]) if len(args.models) < len(CONFIGS) else ""
        path = args.results / f"objectives_steps{'_full_box' if args.full_box else ''}{some}.json"
        files.write(path, json.dumps(about | dict(seconds_and_bytes=found, **out), indent=1) + "\n")
    if args.train:
        seconds = {name: found["demo"]["step"][name][0] for name in OBJECTIVES}

        def keep(reached):
            if not args.quick:
                files.write(synthetic, json.dumps(about | dict(seconds_per_step=seconds, reached=reached)) + "\n")

        reached = train(args, seconds, keep)
        out["reached"] = {
            equal: {
                name: [np.mean([v[k] for v in runs.values()]).round(2) for k in ("all", "tuned")]
                for name, runs in by_name.items()
            }
            for equal, by_name in reached.items()
        }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
