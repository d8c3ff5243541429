"""The figures of `ladder.py`: what is kept of a run, means over seeds, intervals, which of them may be compared."""

import base64
import itertools
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pwcrf_jax.model.counts import BAND_WIDTHS

RESULTS = Path(__file__).parent / "results"
RUNGS = ("baseline", "pyramid", "multiscale", "refined", "contextual", "convs")
# Rungs that are another's run, decoded or refined in another way.
RUN_OF = {"refined": "multiscale", "convs": "contextual", "unrolled_tuned": "unrolled", "ensemble": "multiscale"}
BESIDE = ("ensemble", "joint", "joint_features", "unrolled", "unrolled_tuned", "unrolled_joint")
# Figures with other ones are of another ladder.
SIZES = ("steps", "batch_size", "crop_size", "pair_steps", "pair_balance", "boxes", "unseen")
SIZES += ("folds", "init_from", "ensemble_steps")
_UNSAID = {"unseen": 0, "folds": 0, "init_from": "", "ensemble_steps": 0}  # of results that do not say
EVAL_SPLIT = "val"
BOOTSTRAP = 2000  # draws of an interval
# What a rung's own figure is, and the row that each comparison takes.
ROW = {"baseline": "all", "pyramid": "all", "multiscale": "all", "refined": "refined"}
ROW |= {"contextual": "refined", "convs": "refined", "ensemble": "refined"}


class Cell(NamedTuple):
    """Which training of a rung: its seed, and the fold that it was scored on; None where a set has no folds."""

    seed: int
    fold: int | None = None


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
    said = result.get("rung")
    rung, of_pairs = RUN_OF.get(said, said), ("pair_steps", "pair_balance", "boxes")
    without = {"contextual": (), "unrolled": ("pair_balance",), "joint": ("pair_steps", "pair_balance")}
    without |= dict.fromkeys(("joint_features", "unrolled_joint"), without["joint"])
    without = without.get(rung, of_pairs if rung in RUNGS else ())
    without += () if said == "ensemble" else ("ensemble_steps",)
    return {k: result.get(k, _UNSAID.get(k)) for k in SIZES if k not in without}


def drawn_scores(seeds, classes, picks):
    """Mean IoU of each seed over images that were drawn, float [seeds, draws].

    seeds: counts [images, 1 + bands, 3, K], one a seed, of the same images. picks: int [draws, images], their indices.
    """
    times = np.stack([np.bincount(pick, minlength=len(seeds[0])) for pick in picks]).astype(np.float64)
    of = lambda x: (times @ x[:, 0].reshape(len(x), -1)).reshape(len(picks), 1, *x.shape[2:])
    return np.stack([scores(of(x), classes)["miou"] for x in seeds])


def bootstrap(first, second, classes, rng, over_seeds=False):
    """Difference second - first of mean IoU, averaged over seeds, and its 95 % interval over images.

    first, second: lists of counts [images, 1 + bands, 3, K], one a seed, of the same images; first None: of second
      itself.
    over_seeds: the interval is over seeds as well, which are drawn as the images are.
    """
    every, picks, seeds = np.arange(len(second[0])), [], []
    for _ in range(BOOTSTRAP):
        seeds.append(rng.choice(len(second), len(second)) if over_seeds else np.arange(len(second)))
        picks.append(rng.choice(every, len(every)))
    of = lambda picks: drawn_scores(second, classes, picks) - (drawn_scores(first, classes, picks) if first else 0)
    drawn = np.take_along_axis(of(picks), np.stack(seeds, axis=1), axis=0).mean(0)
    return of([every]).mean(), *np.percentile(drawn, (2.5, 97.5))


class Figures:
    """The figures of a set, of which some may be compared.

    Attributes:
      found: {rung: {`Cell`: result}}.
      counts: {rung: {`Cell`: {row: counts}}}.
      classes: indices of those that are scored.
    """

    def __init__(self, found):
        self.found = found
        self.counts = {rung: {cell: unpack(r["counts"]) for cell, r in runs.items()} for rung, runs in found.items()}
        self.classes = next(iter(next(iter(found.values())).values()))["class_indices"]

    def seeds(self, *which):
        """(counts of every seed, of each (rung, row) of `which`; the seeds; the folds) that all of them have.

        Folds are images of one set: a seed's counts are those of all of them. Where not every seed has every fold, the
        choice that keeps most trainings is taken, of equals the one with more folds.
        """
        have = lambda rung, row: {cell for cell, rows in self.counts.get(rung, {}).items() if row in rows}
        cells = set.intersection(*(have(*one) for one in which))
        folds = sorted({cell.fold for cell in cells}, key=lambda fold: (fold is not None, fold))
        choices = []
        for n in range(len(folds), 0, -1):
            for chosen in itertools.combinations(folds, n):
                seeds = sorted(s for s in {c.seed for c in cells} if all(Cell(s, f) in cells for f in chosen))
                choices.append((seeds, chosen))
        seeds, chosen = max(choices, key=lambda x: len(x[0]) * len(x[1]), default=([], ()))
        of = lambda rung, row, s: np.concatenate([self.counts[rung][Cell(s, f)][row] for f in chosen])
        return [[of(*one, seed) for seed in seeds] for one in which], seeds, chosen

    def compare(self, first, second, over_seeds=False):
        """[gain of (rung, row) over (rung, row), its interval's ends, number of seeds]; None where no seed has both."""
        (a, b), seeds, _ = self.seeds(first, second)
        if not seeds:
            return None
        rng = np.random.default_rng(0)  # of its own, so that an interval does not depend on what else there is
        return [round(float(x), 2) for x in bootstrap(a, b, self.classes, rng, over_seeds)] + [len(seeds)]

    def values(self, rung, row):
        """({name of a score: [value of each seed]}, number of folds); both empty where no seed has it."""
        (counts,), seeds, folds = self.seeds((rung, row))
        found = [scores(x.sum(0), self.classes) for x in counts]
        return ({k: [float(f[k]) for f in found] for k in found[0]} if seeds else {}), len(folds)

    def interval(self, rung, row):
        """(mean over seeds, low, high): mean IoU and its 95 % interval over images and seeds."""
        (counts,), _, _ = self.seeds((rung, row))
        return bootstrap(None, counts, self.classes, np.random.default_rng(0), over_seeds=True)


def figures_in(folder, name):
    """{rung: {`Cell`: result}} of a set.

    Raises:
      SystemExit: they are of different sizes, or of different pilots.
    """
    found = {}
    for rung in (*RUNGS, *BESIDE):
        for path in sorted(folder.glob(f"ladder_{name}_{rung}_[0-9]*.json")):
            result = json.loads(path.read_text())
            found.setdefault(rung, {})[Cell(result["seed"], result.get("fold"))] = result
    sizes = [sizes_in(r) for runs in found.values() for r in runs.values()]
    if mixed := [k for k in SIZES if len({json.dumps(s[k]) for s in sizes if k in s}) > 1]:
        raise SystemExit(f"{folder}: figures of {name} with different {', '.join(mixed)}: not one ladder")
    said = lambda tuned, start: json.dumps({k: v for k, v in sorted((tuned or {}).items()) if k.startswith(start)})
    for rungs, start, what in (
        (("contextual", "convs"), "crf.", "weights or iterations"),  # the same messages
        (("unrolled_tuned",), "crf.", "weights or iterations"),
        *(((rung,), "refine.", f"dense CRFs of rung {rung}") for rung, row in ROW.items() if row == "refined"),
    ):
        of_pilot = {}  # folds have two pilots, see `ladder_models.tuned_on`
        for r in (r for rung in rungs for r in found.get(rung, {}).values()):
            of_pilot.setdefault(r.get("tuned_on"), set()).add(said(r.get("tuned"), start))
        if any(len(kinds) > 1 for kinds in of_pilot.values()):
            raise SystemExit(f"{folder}: figures of {name} with different {what}: not of one pilot")
    return found
