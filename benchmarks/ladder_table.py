"""The table, the intervals and the picture of `ladder.py`'s figures."""

import base64
import json
import zlib
from pathlib import Path

import numpy as np

from pwcrf_jax.model.counts import BAND_WIDTHS
from pwcrf_jax.runtime import files

RESULTS = Path(__file__).parent / "results"
RUNGS = ("baseline", "pyramid", "multiscale", "refined", "contextual", "convs")
# Rungs that are another's run, decoded or refined in another way.
RUN_OF = {"refined": "multiscale", "convs": "contextual", "unrolled_tuned": "unrolled"}
BESIDE = ("joint", "joint_features", "unrolled", "unrolled_tuned", "unrolled_joint")
# Piecewise, through mean field.
OBJECTIVES = (("contextual", "unrolled"), ("contextual", "unrolled_tuned"), ("joint", "unrolled_joint"))
OTHER = "the other ladder's "
# Figures with other ones are of another ladder.
SIZES = ("steps", "batch_size", "crop_size", "pair_steps", "pair_balance", "boxes", "unseen")
EVAL_SPLIT = "val"
BOOTSTRAP = 2000  # draws of an interval
# What a rung's own figure is, and the row that each comparison takes.
ROW = {"baseline": "all", "pyramid": "all", "multiscale": "all", "refined": "refined"}
ROW |= {"contextual": "refined", "convs": "refined"}


def pack(counts):
    return {row: [list(x.shape), base64.b64encode(zlib.compress(x.astype("<i4").tobytes(), 9)).decode()]
            for row, x in counts.items()}  # fmt: skip


def unpack(packed):
    read = lambda shape, text: np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i4").reshape(shape)
    return {row: read(*value).astype(np.int64) for row, value in packed.items()}


def scores(counts, classes):
    """Mean IoU of whole images and of each band, pixel and mean accuracy, in %; counts [..., 1 + bands, 3, K]."""
    hit, true, predicted = np.moveaxis(counts.astype(np.float64), -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = (hit / (true + predicted - hit))[..., classes]
        accuracy = (hit / true)[..., 0, classes]
        pixel = hit[..., 0, :].sum(-1) / true[..., 0, :].sum(-1)
    mean = np.nanmean(iou, axis=-1)
    names = ("miou", *(f"boundary_iou_{w}px" for w in BAND_WIDTHS))
    figures = dict(zip(names, np.moveaxis(mean, -1, 0), strict=False))
    return {
        k: 100 * v for k, v in (figures | dict(pixel_accuracy=pixel, mean_accuracy=np.nanmean(accuracy, -1))).items()
    }


def sizes_in(result):
    """The sizes that a result depends on."""
    rung = RUN_OF.get(result.get("rung"), result.get("rung"))
    without = {"contextual": (), "unrolled": ("pair_balance",), "joint": ("pair_steps", "pair_balance")}
    without |= dict.fromkeys(("joint_features", "unrolled_joint"), without["joint"])
    without = without.get(rung, ("pair_steps", "pair_balance", "boxes") if rung in RUNGS else ())
    return {k: result.get(k, 0 if k == "unseen" else None) for k in SIZES if k not in without}


def bootstrap(first, second, classes, rng, over_seeds=False):
    """Difference second - first of mean IoU, averaged over seeds, and its 95 % interval over images.

    first, second: lists of counts [images, 1 + bands, 3, K], one a seed, of the same images.
    over_seeds: the interval is over seeds as well, which are drawn as the images are.
    """
    gain = lambda a, b, pick: scores(b[pick].sum(0), classes)["miou"] - scores(a[pick].sum(0), classes)["miou"]
    pairs, every = list(zip(first, second, strict=True)), np.arange(len(first[0]))
    mean = lambda pick, pairs: np.mean([gain(*pair, pick) for pair in pairs])
    drawn = []
    for _ in range(BOOTSTRAP):
        chosen = rng.choice(len(pairs), len(pairs)) if over_seeds else range(len(pairs))
        drawn.append(mean(rng.choice(every, len(every)), [pairs[i] for i in chosen]))
    return mean(every, pairs), *np.percentile(drawn, (2.5, 97.5))


def figures_in(folder, name):
    """{rung: {seed: result}} of a set.

    Raises:
      SystemExit: they are of different sizes, or of different pilots.
    """
    found = {}
    for rung in (*RUNGS, *BESIDE):
        for path in sorted(folder.glob(f"ladder_{name}_{rung}_[0-9]*.json")):
            result = json.loads(path.read_text())
            found.setdefault(rung, {})[result["seed"]] = result
    sizes = [sizes_in(r) for runs in found.values() for r in runs.values()]
    if mixed := [k for k in SIZES if len({json.dumps(s[k]) for s in sizes if k in s}) > 1]:
        raise SystemExit(f"{folder}: figures of {name} with different {', '.join(mixed)}: not one ladder")
    said = lambda tuned, start: json.dumps({k: v for k, v in sorted((tuned or {}).items()) if k.startswith(start)})
    for rungs, start, what in (
        (("contextual", "convs"), "crf.", "weights or iterations"),  # the same messages
        (("unrolled_tuned",), "crf.", "weights or iterations"),
        *(((rung,), "refine.", f"dense CRFs of rung {rung}") for rung in ("refined", "contextual", "convs")),
    ):
        if len({said(r.get("tuned"), start) for rung in rungs for r in found.get(rung, {}).values()}) > 1:
            raise SystemExit(f"{folder}: figures of {name} with different {what}: not of one pilot")
    return found


def summary(args):
    """Prints the table of the figures in args.results, and one line of JSON.

    args.against: folder of another ladder whose objectives and unary are compared with, or None. args.picture: file of
    a picture, or None.
    """
    out = {}
    for name in sorted({path.name.split("_")[1] for path in args.results.glob("ladder_*_[0-9]*.json")}):
        found = figures_in(args.results, name)
        classes = next(iter(next(iter(found.values())).values()))["class_indices"]
        others = {OTHER + rung: runs for rung, runs in figures_in(args.against, name).items()} if args.against else {}
        counts = {
            rung: {seed: unpack(r["counts"]) for seed, r in runs.items()} for rung, runs in (found | others).items()
        }

        def compare(a, b, counts=counts, classes=classes, over_seeds=False):
            """(rung, row) against (rung, row), over the seeds that both have."""
            have = lambda which: {seed for seed, rows in counts.get(which[0], {}).items() if which[1] in rows}
            seeds = sorted(have(a) & have(b))
            if not seeds:
                return None
            pick = lambda which: [counts[which[0]][seed][which[1]] for seed in seeds]
            rng = np.random.default_rng(0)  # of its own, so that an interval does not depend on what else there is
            return [round(float(x), 2) for x in bootstrap(pick(a), pick(b), classes, rng, over_seeds)] + [len(seeds)]

        print(f"\n{name}: mean over seeds (range), % ; gain over the rung before with its 95 % interval over images")
        before = None
        for rung in (r for r in RUNGS if r in found):
            runs = [r["rows"][ROW[rung]] for r in found[rung].values()]
            value = lambda key, runs=runs: np.array([r[key] for r in runs])
            miou, gain = value("miou"), compare((before, ROW[before]), (rung, ROW[rung])) if before else None
            said = f"{gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}]" if gain else ""
            spread = f"{miou.mean():6.2f} ({miou.min():.2f}-{miou.max():.2f}), {len(runs)} seeds"
            print(f"  {rung:12s} {spread}   {said:24s} "
                  + "  ".join(f"{k} {value(k).mean():.2f}" for k in runs[0] if k != "miou"))  # fmt: skip
            before = rung
        figures = {}
        if crf := compare(("contextual", "unary"), ("contextual", "all")):
            _, low, high, _ = compare(("contextual", "unary"), ("contextual", "all"), over_seeds=True)
            print(f"  contextual pairwise over the same model's unary: {crf[0]:+.2f} [{crf[1]:+.2f}, {crf[2]:+.2f}]; "
                  f"over seeds too [{low:+.2f}, {high:+.2f}]")  # fmt: skip
            figures |= dict(crf_gain=crf[0], crf_gain_low=crf[1], crf_gain_high=crf[2], seeds=crf[3])
            figures |= dict(crf_gain_low_over_seeds=low, crf_gain_high_over_seeds=high)
        if convs := compare(("contextual", "all"), ("contextual", "convs")):
            print(
                f"  refinement convolutions, without any dense CRF: {convs[0]:+.2f} [{convs[1]:+.2f}, {convs[2]:+.2f}]"
            )
            figures |= dict(convs_gain_without_dense_crf=convs[0])
        for rung, key in (("joint", "joint_unary_minus_alone"), ("joint_features", "joint_features_unary_minus_alone")):
            if joint := compare(("multiscale", "unary"), (rung, "unary")):
                gain = compare((rung, "unary"), (rung, "all"))
                print(f"  {rung}: unary minus the unary alone {joint[0]:+.2f} [{joint[1]:+.2f}, {joint[2]:+.2f}], "
                      f"its relations {gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}], {gain[3]} seeds")  # fmt: skip
                figures |= {key: joint[0]}
        for rung in ("unrolled", "unrolled_tuned"):
            if gain := compare((rung, "unary"), (rung, "all")):
                print(f"  {rung}: its relations {gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}], {gain[3]} seeds")
                figures |= {f"{rung}_gain": gain[0], f"{rung}_gain_low": gain[1]}
        pairs = [
            (a + first, b + second) for first, second in OBJECTIVES for a, b in (("", ""), (OTHER, ""), ("", OTHER))
        ]
        for first, second in pairs:
            if more := compare((first, "all"), (second, "all")):
                print(f"  {second} over {first}: {more[0]:+.2f} [{more[1]:+.2f}, {more[2]:+.2f}], {more[3]} seeds")
        alone = OTHER + "multiscale", "unary"
        for row, kinds in (("unary", ("steps",)), ("all", ("steps", "pair_steps"))):
            if more := compare(alone, ("contextual", row)):
                _, low, high, _ = compare(alone, ("contextual", row), over_seeds=True)
                one, other = (next(iter(runs.values())) for runs in (found["contextual"], others[alone[0]]))
                print(f"  contextual, row {row} ({' + '.join(str(one[k]) for k in kinds)} steps) "
                      f"over {OTHER}unary ({other['steps']}): {more[0]:+.2f} [{more[1]:+.2f}, {more[2]:+.2f}]; "
                      f"over seeds too [{low:+.2f}, {high:+.2f}], {more[3]} seeds")  # fmt: skip
        refines = ("refined", "contextual", "convs")  # multiscale's files may hold a dense CRF of an earlier pilot
        best = max(
            scores(n.sum(0), classes)["miou"]
            for rung in found
            for rows in counts[rung].values()
            for row, n in rows.items()
            if row != "refined" or rung in refines
        )
        print_curve(args, name)
        out[name] = figures | {f"best_{name}_val_miou": round(best, 2)}
        if args.picture:
            picture(Path(args.picture).with_stem(f"{Path(args.picture).stem}_{name}"), name, found)
    print(json.dumps(out))


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


def picture(path, name, found):
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--picture needs matplotlib: pip install -e '.[bench]'") from None

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rungs = [r for r in RUNGS if r in found]
    values = [[r["rows"][ROW[rung]]["miou"] for r in found[rung].values()] for rung in rungs]
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    axes.plot(rungs, [np.mean(v) for v in values], "_-", color="#3182bd", markersize=30, linewidth=1, label="mean")
    for i, v in enumerate(values):
        axes.plot([i] * len(v), v, "k.", label="" if i else "a seed")
    axes.set(title=f"{name}, {EVAL_SPLIT}", ylabel="mean IoU, %")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    with files.replacing(path) as file:
        figure.savefig(file, dpi=120, format=Path(path).suffix[1:] or None)
    pyplot.close(figure)
