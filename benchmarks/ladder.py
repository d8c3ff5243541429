"""The paper's ladder on real images: does each part help, and by how much, with seeds and confidence intervals.

    python benchmarks/ladder.py --set camvid --source_dir PATH/camvid --init_from FILE --runs runs/ladder
    python benchmarks/ladder.py --set animals --source_dir PATH/voc2012_animals --init_from FILE --runs runs/ladder
    python benchmarks/ladder.py --set nyudv2 --source_dir PATH/nyudv2_train --runs runs/ladder
    python benchmarks/ladder.py --set nyudv2 --source_dir PATH/nyudv2_train --runs runs/ladder --final --seeds 0
    python benchmarks/ladder.py --set camvid ... --curve    (what relations gain over unaries of several strengths)
    python benchmarks/ladder.py --summary

Rungs: baseline (one scale) -> pyramid (+ sliding pyramid pooling) -> multiscale (+ two more scales) -> refined (+ the
dense CRF on that model's unary) -> contextual (+ relations, trained on the multiscale model's features while they
stand still, with the dense CRF on top) -> convs (+ refinement convolutions on skip layers, trained beside those
relations, ahead of the dense CRF). Beside the ladder: ensemble (the unary and that of the next seed, their
probabilities averaged cell by cell, with the dense CRF on top: twice the parameters, and the time of two unaries, or
less with --ensemble_steps), joint (unary and relations together from the start, as the config has it: the relations do
not train the features), joint_features (they do), and two that are trained through mean field, with message weights of
1 and the class balance of the unary, so that no weight is chosen: unrolled in place of the contextual rung's relations,
unrolled_joint in place of joint. unrolled_tuned is unrolled, decoded with weights and a number of iterations that are
chosen as those of the contextual rung are.

Nothing is chosen on the images that are scored. Message weights, the number of iterations and the dense CRF's
parameters come from a pilot: the multiscale and the contextual model trained on a part of the training images, tuned on
the rest (pwcrf tune), each rung's dense CRF on the marginals that it refines, once a set; every run then
takes its last checkpoint.

nyudv2 has no images to score on but its training images. These are cut into 25 blocks of neighbouring numbers, as
neighbours often show one room; each of 5 folds scores every fifth block with models that were trained on the other
twenty, and a seed's figure is that of all the images of its folds. What is chosen for fold 0 comes from --tune_blocks
blocks that fold 1 scores, with models that have not seen them, what is chosen for the others from fold 0: no image
chooses what it is scored with. The recipe is configs/nyudv2.py; with --trials 0 so are weights and dense CRF. --final
trains its whole model on all images in one run, which the same command goes on with after a stop, and leaves beside it
what fold 0 chose, if that was run; it prints the command that scores it. Curves of held-out mean IoU by step (--evals
points) are kept with the figures.

Steps, crops and batches are sized for two CPU cores (`ladder_models.SETS`): three seeds take some hours a set. --steps,
--crop, --batch, --pair_steps, --pair_balance, --boxes and --unseen make it another ladder, and --results names a folder
for it: figures of different ladders are never mixed. With --unseen relations are trained on images that their unary has
not seen: on those it was trained on, its features and its log-probabilities, which relations start from, are better
than they will ever be again.

--curve: relations on the features of unaries that trained for an eighth, a quarter, a half and the whole of the steps,
and on those of the baseline, with fixed message weights: nothing is chosen, every weight is reported.

Each run lies in its own workdir below --runs and goes on where it was stopped; what is finished is not done again. What
was chosen for its last rung lies in its tuned.json: `pwcrf eval --workdir RUN --checkpoint latest --refine full` scores
it, with --split test as well. Figures go to benchmarks/results, one JSON a set, rung, seed and fold, with the counts of
each image, from which --summary makes its table: means over seeds, 95 % intervals from a paired bootstrap over images.

Ends with one line of JSON, of each set, null where not measured: `crf_gain`, mean IoU of the contextual model over its
own unary, and `ensemble_gain`, of two unaries averaged over the first of them, which is the same one; without any dense
CRF, and as `crf_gain_refined` and `ensemble_gain_refined` with a dense CRF of its own on either side; each with `_low`
and `_high`, the ends of the 95 % interval over images and seeds together; and `best_miou`, the best row's mean over
seeds.
"""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

import jax
from ladder_arguments import add_arguments, check_arguments, check_run
from ladder_counts import (
    counts_of_ensemble,
    counts_of_images,
    curve_of,
    of_classes,
    parameters_of,
    seconds_of,
    tune_ensemble,
)
from ladder_models import (
    ANIMALS,
    BOXES,
    ON_UNARY,
    SETS,
    blocks_of,
    by_id,
    config_of,
    different,
    final_config,
    held_out,
    parts,
    sizes_of,
    splits_of,
    tuned_on,
)
from ladder_summary import summary
from ladder_table import BESIDE, RUN_OF, RUNGS, pack, scores, sizes_in

from pwcrf_jax import config as configs
from pwcrf_jax.evaluation import tuning
from pwcrf_jax.runtime import files, logs
from pwcrf_jax.training import loop

# What choices.py takes from here.
__all__ = ["ANIMALS", "BOXES", "SETS", "add_arguments", "check_arguments", "config_of", "held_out"]
__all__ += ["of_classes", "parts"]
# Whose held-out images chose what a rung is decoded and refined with.
PILOT_OF = {"refined": "multiscale", "contextual": "contextual", "convs": "convs", "unrolled_tuned": "unrolled"}
PILOT_OF["ensemble"] = "ensemble"
REFINED = {"refined": "all", "contextual": "all", "convs": "convs"}  # the row that a rung's dense CRF refines
CURVE = (("baseline", 1.0), ("multiscale", 0.125), ("multiscale", 0.25), ("multiscale", 0.5), ("multiscale", 1.0))
CURVE_WEIGHTS = (0.5, 1.0, 2.0, 4.0)


def kept(args, path):
    """A result of before, or None.

    Raises:
      SystemExit: it is of other sizes.
    """
    if not path.exists():
        return None
    result, sizes = json.loads(path.read_text()), sizes_of(args)
    if found := {k: v for k, v in sizes_in(result).items() if v != sizes[k]}:
        raise SystemExit(
            f"{path} holds figures of {found}, this ladder has {sizes}: name another folder with --results, or make "
            "them the same"
        )
    return result


def trained(args, rung, seed, split, name, unary="multiscale", share=1.0):
    """The workdir of a finished run; arguments as in `config_of`."""
    config = config_of(args, rung, seed, parts(split, args.unseen)[rung in ON_UNARY], unary, share)
    shorter = f"{share:g}x" if share != 1 else ""
    if rung in ON_UNARY:
        config.init_from = str(trained(args, unary, seed, split, name, share=share))
        rung += f"-on-{unary}" if (unary, share) != ("multiscale", 1.0) else ""
    workdir = Path(args.runs) / args.set / f"{name}-{rung}{shorter}-{seed}"
    return finished(config, workdir)


def finished(config, workdir):
    """The workdir of a run of a config, trained to its end.

    Raises:
      SystemExit: it is there already, and is of another one.
    """
    loop.train_and_evaluate(config, str(workdir))
    found = configs.load(workdir / "config.json")  # a finished run is taken as it is
    if key := different(config, found):
        has, wanted = (dict(configs.flat(c))[key] for c in (found, config))
        raise SystemExit(
            f"{workdir} was trained with config.{key} = {has}, this ladder has {wanted}: name another folder with "
            "--runs"
        )
    return workdir


def ensemble_of(args, seed, split, name):
    """Workdirs of a seed's unary and of the next one's, which trains for --ensemble_steps."""
    seeds = args.seeds if seed in args.seeds and len(args.seeds) > 1 else [seed, seed + 1]
    other = seeds[(seeds.index(seed) + 1) % len(seeds)]
    share = args.ensemble_steps / sizes_of(args)["steps"] if args.ensemble_steps else 1.0
    of = lambda seed, share: trained(args, "multiscale", seed, split, name, share=share)
    return [of(seed, 1.0), of(other, share)]


# --- what is chosen ---------------------------------------------------------------------------------


def pilot(args, rungs, fold=None):
    """{pilot: tuned values of crf and refine}, from held-out training images, of those that the rungs need.

    The dense CRF is tuned on the marginals that it refines; that of the unrolled model is not searched.
    fold: that is scored; its pilot is the run of another one.
    """
    path, trains, tunes, run_name = _pilot(args, fold)
    found = kept(args, path) or sizes_of(args)
    needed = list(dict.fromkeys(PILOT_OF[rung] for rung in rungs if rung in PILOT_OF))
    for name in needed:
        if _key(args, name) not in found:
            found[_key(args, name)] = _tuned(args, name, trains, tunes, run_name)
            write(path, found)
    return {name: found[_key(args, name)]["config"] for name in needed}


def _pilot(args, fold):
    """File of what a pilot chose, the splits that it is trained and tuned on, the name of its runs."""
    if fold is None:
        return args.results / f"ladder_{args.set}_pilot.json", *held_out(args.set), "pilot"
    at = tuned_on(fold)
    blocks = blocks_of(args.set, at)[: args.tune_blocks]
    path = args.results / f"ladder_{args.set}_pilot-fold{at}.json"
    return path, splits_of(args.set, at)[0], by_id(args.set, blocks), f"fold{at}"


def _key(args, name):
    return f"{name} {args.ensemble_steps}" if name == "ensemble" and args.ensemble_steps else name


def _tuned(args, name, trains, tunes, run_name):
    """What one pilot chooses."""
    if name == "ensemble":
        workdirs = ensemble_of(args, 0, trains, run_name)
        config, notes = configs.load(workdirs[0] / "config.json"), workdirs[0] / "tuning" / workdirs[1].name
        return tune_ensemble(config, workdirs, tunes, notes, args.trials)
    workdir = trained(args, RUN_OF.get(name, name), 0, trains, run_name)
    config, there = configs.load(workdir / "config.json"), workdir / configs.TUNED
    trials, row = args.trials if name != "unrolled" else 1, "convs" if name == "convs" else "all"
    before = there.read_bytes() if there.exists() else b""
    chosen = tuning.tune(config, str(workdir), "latest", tunes, "full", trials, row)
    if SETS[args.set].folds:  # this run is scored as well, and not with what its own images chose
        there.write_bytes(before) if before else there.unlink(missing_ok=True)
    return {key: chosen[key] for key in ("split", "config", "miou_before", "miou_messages", "miou_after")}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(content, indent=1) + "\n")


def apply(config, tuned):
    """Sets what was chosen."""
    for key, value in tuned.items():
        section, name = key.split(".")
        config[section][name] = tuple(value) if isinstance(value, list) else value


def leave(config, tuned, split, workdir):
    """Writes what was chosen beside a run, so that pwcrf eval --refine full decodes and refines it so."""
    conditions = configs.tuning_conditions(config)
    configs.write_tuned(dict(config=tuned, conditions=conditions, split=split), workdir)


# --- figures ----------------------------------------------------------------------------------------


def run(args):
    for fold in args.folds if SETS[args.set].folds else [None]:
        missing = [rung for rung in args.rungs if not all(kept(args, path_of(args, rung, s, fold)) for s in args.seeds)]
        if "multiscale" in missing and "refined" in args.rungs and "refined" not in missing:
            missing.append("refined")  # one pass for both rungs, see `run_rung`
        chosen = pilot(args, missing, fold) if args.trials else {}
        for seed in args.seeds:
            for rung in args.rungs:
                if not kept(args, path_of(args, rung, seed, fold)):
                    run_rung(args, rung, seed, fold, chosen)


def path_of(args, rung, seed, fold):
    return args.results / f"ladder_{args.set}_{rung}_{seed}{'' if fold is None else f'-fold{fold}'}.json"


def run_rung(args, rung, seed, fold, chosen):
    """Trains a rung, or takes it as it is, counts, and writes its figures."""
    (split, scored), name = splits_of(args.set, fold), "run" if fold is None else f"fold{fold}"
    about = dict(seed=seed, split=scored) | ({} if fold is None else dict(fold=fold))
    about |= dict(tuned_on=tuned_on(fold)) if fold is not None and chosen else {}
    if rung == "ensemble":
        workdirs = ensemble_of(args, seed, split, name)
        config, tuned = configs.load(workdirs[0] / "config.json"), chosen.get("ensemble", {})
        apply(config, tuned)
        counts, ids, names = counts_of_ensemble(config, workdirs, scored)
        about |= dict(tuned=tuned or None, runs=[workdir.name for workdir in workdirs], rung=rung)
        about |= cost_of(config, workdirs) | dict(parameters=parameters_of(config) * len(workdirs))
        write(path_of(args, rung, seed, fold), result_of(args, config, names, ids, counts, **about))
        return
    workdir = trained(args, RUN_OF.get(rung, rung), seed, split, name)
    config, refined = configs.load(workdir / "config.json"), REFINED.get(rung, "")
    if rung == "multiscale" and "refined" in args.rungs:
        refined = "all"  # one pass for both rungs, which have the same marginals
    named = "refined" if refined and rung == "multiscale" else rung
    tuned = chosen.get(PILOT_OF[named], {}) if named in PILOT_OF else {}
    tuned = {k: v for k, v in tuned.items() if refined or k.startswith("crf.")}
    apply(config, tuned)
    counts, ids, names = counts_of_images(config, workdir, refined, scored)
    if tuned and refined == configs.final_row(config):  # so that pwcrf eval --refine full has this rung's figures
        leave(config, tuned, _pilot(args, fold)[2], workdir)
    about |= dict(tuned=tuned or None)
    if curve := curve_of(workdir):
        on = Path(config.init_from) if RUN_OF.get(rung, rung) in ON_UNARY else None
        about |= dict(curve=curve, parameters=parameters_of(config)) | cost_of(config, [*([on] if on else []), workdir])
    for same in (rung, "refined") if rung == "multiscale" and refined else (rung,):
        write(path_of(args, same, seed, fold), result_of(args, config, names, ids, counts, rung=same, **about))


def cost_of(config, workdirs):
    """Seconds of the trainings behind a figure, in order."""
    return dict(seconds=[seconds_of(w, configs.load(Path(w) / "config.json")) for w in workdirs])


def result_of(args, config, names, ids, counts, **about):
    """What is kept of a run, and a line of it on the terminal."""
    index = configs.scored_classes(config, names) or list(range(len(names)))
    figures = {row: scores(x.sum(0), index) for row, x in counts.items()}
    said = ", ".join(f"{row} {f['miou']:.2f}" for row, f in figures.items())
    print(f"{args.set} {about['rung']} seed {about['seed']}: {said}", flush=True)
    return dict(
        set=args.set, **about, images=len(ids), **sizes_of(args),
        date=datetime.date.today().isoformat(), jax=jax.__version__,
        python=platform.python_version(), device=jax.devices()[0].device_kind, cores=os.cpu_count(),
        classes=[names[i] for i in index], class_indices=index,
        rows={row: {k: round(float(v), 3) for k, v in f.items()} for row, f in figures.items()}, counts=pack(counts),
    )  # fmt: skip


def run_curve(args):
    """What relations gain over unaries of several strengths, at each message weight."""
    split, scored = splits_of(args.set, None)
    for seed in args.seeds:
        for unary, share in CURVE:
            path = args.results / f"curve_{args.set}_{unary}_{share:g}_{seed}.json"
            if kept(args, path):
                continue
            workdir = trained(args, "contextual", seed, split, "run", unary, share)
            config, counts = configs.load(workdir / "config.json"), {}
            for weight in CURVE_WEIGHTS:
                config.crf.weights = (weight,)
                found, ids, names = counts_of_images(config, workdir)
                counts |= {"unary": found["unary"], f"weight {weight:g}": found["all"]}
            write(path, result_of(args, config, names, ids, counts, seed=seed, rung=f"contextual on {unary}",
                                  unary=unary, share=share, split=scored))  # fmt: skip


def final(args):
    """Trains the whole model on all images, one run a seed, and leaves beside it what the pilot of fold 0 chose."""
    path, _, tunes, _ = _pilot(args, 1)
    chosen = kept(args, path) or {}
    for seed in args.seeds:
        workdir, config = Path(args.runs) / args.set / f"final-{seed}", final_config(args, seed)
        there = workdir / "config.json"
        if there.exists() and (key := different(config, configs.load(there))):
            raise SystemExit(f"{workdir} is of another config.{key}: name another folder with --runs")
        finished(config, workdir)
        config = configs.load(there)
        tuned = chosen.get("convs" if configs.final_row(config) == "convs" else "contextual", {}).get("config")
        if tuned:
            apply(config, tuned)
            leave(config, tuned, tunes, workdir)
        print(f"decoded and refined with {f'what {path} chose' if tuned else 'the values of its config'}; score it:\n"
              f"pwcrf eval --workdir {workdir} --checkpoint latest --refine full --split test "
              "--config.data.source_dir=PATH", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true", help="print the table of what was run")
    parser.add_argument(
        "--against", type=Path, help="with --summary: folder of another ladder, whose objectives and unary are compared"
    )
    parser.add_argument("--picture", help="with --summary: file of a picture, one for each set (.png, .svg)")
    add_arguments(parser)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS + BESIDE, help="the ladder's, of nyudv2 ensemble too")
    parser.add_argument("--folds", type=int, nargs="+", help="of nyudv2, those to score; all if left out")
    parser.add_argument("--final", action="store_true", help="instead of the rungs: the whole model on all images")
    parser.add_argument(
        "--curve", action="store_true", help="instead of the rungs: gain over unaries of several strengths"
    )
    trials = "settings of the dense CRF that the pilot tries at most; 0: no pilot, all as the set's config has it"
    parser.add_argument("--trials", type=int, default=16, help=trials)
    parser.add_argument("--tune_blocks", type=int, default=2, help="of nyudv2, blocks that a pilot is tuned on")
    args = parser.parse_args()
    if args.unseen and (together := [r for r in args.rungs or () if r.startswith(("joint", "unrolled_joint"))]):
        parser.error(f"--unseen {args.unseen}: {', '.join(together)} train unary and relations on the same images")
    if args.against and not args.against.is_dir():
        parser.error(f"--against {args.against} does not exist")
    if args.summary:
        summary(args)
        return
    check_arguments(parser, args)
    check_run(parser, args)
    logs.setup()
    if args.final:
        final(args)
        return
    (run_curve if args.curve else run)(args)
    summary(args)


if __name__ == "__main__":
    main()
