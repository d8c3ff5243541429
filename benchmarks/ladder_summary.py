"""The table, the line of JSON and the pictures that `ladder.py --summary` makes of stored figures."""

import json
from pathlib import Path

import numpy as np
from ladder_table import EVAL_SPLIT, ROW, RUNGS, Figures, bootstrap, figures_in, unpack

from pwcrf_jax.runtime import files

# Piecewise, through mean field.
OBJECTIVES = (("contextual", "unrolled"), ("contextual", "unrolled_tuned"), ("joint", "unrolled_joint"))
OTHER = "the other ladder's "
# Always in the JSON of a set, null where not measured.
KEYS = ("crf_gain", "crf_gain_low", "crf_gain_refined", "crf_gain_refined_low", "best_miou")
KEYS += ("ensemble_gain", "ensemble_gain_low", "ensemble_gain_refined", "ensemble_gain_refined_low")
# (rung, row) over (rung, row): over the same model's unary, without any dense CRF and with one on either side.
GAINS = {
    "crf_gain": (("contextual", "unary"), ("contextual", "all"), "contextual pairwise over the same model's unary"),
    "crf_gain_refined": (("refined", "refined"), ("contextual", "refined"), "the same, both with their dense CRF"),
    "ensemble_gain": (("ensemble", "unary"), ("ensemble", "all"), "two unaries averaged over the first of them"),
    "ensemble_gain_refined": (("refined", "refined"), ("ensemble", "refined"), "the same, both with their dense CRF"),
    "over_ensemble_refined": (
        ("ensemble", "refined"), ("contextual", "refined"), "contextual pairwise over two unaries, with dense CRFs",
    ),
}  # fmt: skip


def summary(args):
    """Prints the table of the figures in args.results, and one line of JSON.

    args.against: folder of another ladder whose objectives and unary are compared with, or None. args.picture: file of
    a picture, or None.
    """
    out = {}
    for name in sorted({path.name.split("_")[1] for path in args.results.glob("ladder_*_[0-9]*.json")}):
        others = figures_in(args.against, name) if args.against else {}
        figures = Figures(figures_in(args.results, name) | {OTHER + rung: runs for rung, runs in others.items()})
        print_rungs(name, figures)
        out[name] = dict.fromkeys(KEYS) | print_gains(figures) | print_beside(figures)
        print_against(figures)
        out[name]["best_miou"] = best(figures)
        print_curve(args, name)
        if args.picture:
            picture(Path(args.picture).with_stem(f"{Path(args.picture).stem}_{name}"), name, figures)
    print(json.dumps(out))


def print_rungs(name, figures):
    print(f"\n{name}: mean over seeds (range), % ; gain over the rung before with its 95 % interval over images")
    before = None
    for rung in (r for r in (*RUNGS, "ensemble") if r in figures.found):
        values, folds = figures.values(rung, ROW[rung])
        gain = figures.compare((before, ROW[before]), (rung, ROW[rung])) if before and rung in RUNGS else None
        said = f"{gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}]" if gain else ""
        miou, of = values.pop("miou"), f", {folds} fold{'s' * (folds > 1)}" if _has_folds(figures, rung) else ""
        spread = f"{np.mean(miou):6.2f} ({min(miou):.2f}-{max(miou):.2f}), {len(miou)} seeds{of}"
        print(f"  {rung:12s} {spread}   {said:24s} "
              + "  ".join(f"{k} {np.mean(x):.2f}" for k, x in values.items()))  # fmt: skip
        before = rung


def _has_folds(figures, rung):
    return any(cell.fold is not None for cell in figures.found[rung])


def print_gains(figures):
    """Those of `GAINS`, each with the ends of its interval over images and seeds."""
    out = {}
    for key, (first, second, title) in GAINS.items():
        if gain := figures.compare(first, second):
            _, low, high, count = figures.compare(first, second, over_seeds=True)
            print(f"  {title}: {gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}]; "
                  f"over seeds too [{low:+.2f}, {high:+.2f}], {count} seeds")  # fmt: skip
            out |= {key: gain[0], f"{key}_low": low, f"{key}_high": high}
            out |= dict(seeds=count) if key == "crf_gain" else {}
    return out


def print_beside(figures):
    out = {}
    if convs := figures.compare(("contextual", "all"), ("contextual", "convs")):
        print(f"  refinement convolutions, without any dense CRF: {convs[0]:+.2f} [{convs[1]:+.2f}, {convs[2]:+.2f}]")
        out["convs_gain_without_dense_crf"] = convs[0]
    for rung, key in (("joint", "joint_unary_minus_alone"), ("joint_features", "joint_features_unary_minus_alone")):
        if joint := figures.compare(("multiscale", "unary"), (rung, "unary")):
            gain = figures.compare((rung, "unary"), (rung, "all"))
            print(f"  {rung}: unary minus the unary alone {joint[0]:+.2f} [{joint[1]:+.2f}, {joint[2]:+.2f}], "
                  f"its relations {gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}], {gain[3]} seeds")  # fmt: skip
            out[key] = joint[0]
    for rung in ("unrolled", "unrolled_tuned"):
        if gain := figures.compare((rung, "unary"), (rung, "all")):
            print(f"  {rung}: its relations {gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}], {gain[3]} seeds")
            out |= {f"{rung}_gain": gain[0], f"{rung}_gain_low": gain[1]}
    return out


def print_against(figures):
    """Objectives beside one another; and longer trainings beside the other ladder's unary, which took as much time."""
    pairs = [(a + first, b + second) for first, second in OBJECTIVES for a, b in (("", ""), (OTHER, ""), ("", OTHER))]
    for first, second in pairs:
        if more := figures.compare((first, "all"), (second, "all")):
            print(f"  {second} over {first}: {more[0]:+.2f} [{more[1]:+.2f}, {more[2]:+.2f}], {more[3]} seeds")
    alone = OTHER + "multiscale", "unary"
    for row, kinds in (("unary", ("steps",)), ("all", ("steps", "pair_steps"))):
        if more := figures.compare(alone, ("contextual", row)):
            _, low, high, _ = figures.compare(alone, ("contextual", row), over_seeds=True)
            one, other = (next(iter(figures.found[rung].values())) for rung in ("contextual", alone[0]))
            print(f"  contextual, row {row} ({' + '.join(str(one[k]) for k in kinds)} steps) "
                  f"over {OTHER}unary ({other['steps']}): {more[0]:+.2f} [{more[1]:+.2f}, {more[2]:+.2f}]; "
                  f"over seeds too [{low:+.2f}, {high:+.2f}], {more[3]} seeds")  # fmt: skip


def best(figures):
    """The highest mean over seeds of mean IoU, of any row of this ladder."""
    refines = ("refined", "contextual", "convs", "ensemble")  # multiscale's files may hold one of an earlier pilot
    means = [
        np.mean(figures.values(rung, row)[0]["miou"])
        for rung, runs in figures.counts.items() if not rung.startswith(OTHER)
        for row in sorted(set().union(*runs.values())) if row != "refined" or rung in refines
    ]  # fmt: skip
    return round(float(max(means)), 2)


def print_curve(args, name):
    paths = sorted(args.results.glob(f"curve_{name}_*.json"))
    results = sorted(
        (json.loads(path.read_text()) for path in paths), key=lambda r: (r["unary"], r["share"], r["seed"])
    )
    if results:
        print("  relations on unaries of several strengths: mean IoU of the unary, then gain at each message weight")
    for r in results:
        counts, rng = unpack(r["counts"]), np.random.default_rng(0)
        gains = [
            bootstrap([counts["unary"]], [counts[row]], r["class_indices"], rng) for row in counts if row != "unary"
        ]
        said = "  ".join(f"{row[7:]}: {g:+.2f} [{low:+.2f}, {high:+.2f}]" for row, (g, low, high) in
                         zip([row for row in counts if row != "unary"], gains, strict=True))  # fmt: skip
        print(
            f"    {r['unary']:10s} {r['share']:5g} x steps, seed {r['seed']}: {r['rows']['unary']['miou']:.2f}   {said}"
        )


def picture(path, name, figures):
    """The rungs with their intervals; beside them, where runs were watched, mean IoU by step of training."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--picture needs matplotlib: pip install -e '.[bench]'") from None

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = curves_of(figures)
    shape = dict(ncols=2, figsize=(12, 4)) if curves else dict(figsize=(7, 3.5))
    figure, axes = pyplot.subplots(squeeze=False, **shape)
    _draw_rungs(axes[0, 0], name, figures)
    if curves:
        _draw_curves(axes[0, 1], curves)
    figure.tight_layout()
    with files.replacing(path) as file:
        figure.savefig(file, dpi=120, format=Path(path).suffix[1:] or None)
    pyplot.close(figure)


def curves_of(figures):
    """{rung: [[(step, mean IoU), ...] of each training]}, of the row that its model answers with, unrefined."""
    out = {}
    for rung in ("baseline", "pyramid", "multiscale", "contextual"):
        found = [r["curve"] for r in figures.found.get(rung, {}).values() if r.get("curve")]
        if found:
            out[rung] = [curve["all"] for curve in found]
    return out


def _draw_rungs(axes, name, figures):
    rungs = [r for r in (*RUNGS, "ensemble") if r in figures.found]
    means = np.array([figures.interval(rung, ROW[rung]) for rung in rungs])
    ladder = [i for i, r in enumerate(rungs) if r in RUNGS]
    axes.plot(ladder, means[ladder, 0], "-", color="#3182bd", linewidth=1)
    ends = np.abs(means[:, 1:] - means[:, :1]).T
    said = dict(color="#3182bd", markersize=12, capsize=3, label="mean, 95 % over images and seeds")
    axes.errorbar(range(len(rungs)), means[:, 0], ends, fmt="_", **said)
    for i, rung in enumerate(rungs):
        values = figures.values(rung, ROW[rung])[0]["miou"]
        axes.plot([i] * len(values), values, "k.", label="" if i else "a seed")
    where = "held-out blocks" if any(_has_folds(figures, r) for r in rungs) else EVAL_SPLIT
    axes.set(title=f"{name}, {where}", ylabel="mean IoU, %")
    axes.set_xticks(range(len(rungs)), rungs)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right")


def _draw_curves(axes, curves):
    for i, (rung, runs) in enumerate(curves.items()):
        for run in runs:
            axes.plot(*zip(*run, strict=True), color=f"C{i}", alpha=0.3, linewidth=1)
        steps = sorted(set.intersection(*({step for step, _ in run} for run in runs)))
        mean = [np.mean([dict(run)[step] for run in map(list, runs)]) for step in steps]
        axes.plot(steps, mean, ".-", color=f"C{i}", label=rung)
    axes.set(title="by step of each rung's training", xlabel="step", ylabel="mean IoU, %")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right")
