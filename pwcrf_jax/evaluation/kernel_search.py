"""The search of the dense CRF's parameters: a coarse grid, then number by number, every trial written down at once."""

import contextlib
import json
from collections.abc import Callable, Sequence

from pwcrf_jax.config import RefineSettings
from pwcrf_jax.runtime import files
from pwcrf_jax.runtime.logs import OTHER_SHAPE, log

WORTH = 2e-4  # of mean IoU, that a step must gain: below it is noise
# Factors of the compatibilities, of the colours' width.
COARSE = ((0.25, 1.0), (0.25, 0.25), (1.0, 0.25), (1 / 16, 1.0), (0.25, 0.5), (1 / 16, 0.25), (1.0, 0.5), (1 / 16, 0.5))
KERNELS = ("smoothness_compat", "appearance_compat", "appearance_srgb", "appearance_sxy", "smoothness_sxy")


def searched(mode: str) -> list[str]:
    """Fields of `pwcrf_jax.dense_crf.Params` that a mode of refinement searches, "full" or "spatial"."""
    return [name for name in KERNELS if mode == "full" or name.startswith("smoothness")]


def named(names: Sequence[str], values: Sequence[float]) -> str:
    """Names with their values, for a line of text."""
    return ", ".join(f"{name} {value:g}" for name, value in zip(names, values, strict=True))


class Trials:
    """{values tried: mean IoU}, kept in a file of one JSON object a line."""

    def __init__(self, path: str, names: Sequence[str]):
        self.path, self.names = path, names
        self.scores: dict[tuple[float, ...], float] = {}
        kept, lines = [], files.read_lines(path)
        for line in lines:
            with contextlib.suppress(*OTHER_SHAPE):  # it is tried again
                trial = json.loads(line)
                values = tuple(float(trial[name]) for name in names)
                self.scores[values] = float(trial["miou"])
                kept += [line] if line.endswith("\n") else []
        if kept != lines:
            files.write(path, "".join(kept))

    def add(self, values: Sequence[float], miou: float) -> None:
        """Writes a trial down."""
        self.scores[tuple(values)] = miou
        line = json.dumps(dict(zip(self.names, values, strict=True)) | {"miou": miou})
        with files.naming(self.path, "cannot be written"), files.append(self.path) as file:
            file.write(f"{line}\n".encode())


def search(
    score_of: Callable[[RefineSettings, str], float],
    base: RefineSettings,
    trials: Trials,
    mode: str,
    max_trials: int,
) -> tuple[RefineSettings, float]:
    """The best settings of the dense CRF, and their mean IoU.

    score_of(settings, what): mean IoU of settings; what: a title for a bar.
    base: where the search starts.
    trials: of `searched(mode)`; those of an earlier search are not tried again.
    max_trials: settings tried at most, each counted once.
    """
    names = searched(mode)
    of = lambda values: base._replace(params=base.params._replace(**dict(zip(names, values, strict=True))))
    tried: set[tuple[float, ...]] = (
        set()
    )  # in this search: those of an earlier one count as well, so that a stopped search ends where it would

    def score(values: tuple[float, ...]) -> float:
        if values not in tried and len(tried) == max_trials:
            return -1.0
        tried.add(values)
        if values not in trials.scores:
            trials.add(values, score_of(of(values), f"trial {len(tried)}"))
        return trials.scores[values]

    best = tuple(float(base.params._asdict()[n]) for n in names)
    best_score = score(best)
    log.info("refined with %s: mean IoU %.2f", named(names, best), 100 * best_score)

    def better(candidate: tuple[float, ...]) -> bool:
        nonlocal best, best_score
        got = score(candidate)
        if got < best_score + WORTH:
            return False
        best, best_score = candidate, got
        log.info("trial %d of at most %d: %s, mean IoU %.2f", len(tried), max_trials, named(names, best),
                 100 * best_score)  # fmt: skip
        return True

    # How strong the kernels are and how near colours have to be decide most, and together: a kernel that smooths over
    # weak edges helps only when it is weak. So these come first, in large steps; then each number by itself.
    first = best
    for strength, colours in COARSE if mode == "full" else [(strength, 1.0) for strength, c in COARSE if c == 1.0]:
        factors = {"smoothness_compat": strength, "appearance_compat": strength, "appearance_srgb": colours}
        better(tuple(round(v * factors.get(name, 1.0), 6) for name, v in zip(names, first, strict=True)))
    for factor in (2.0, 2.0, 2**0.5):
        for i in range(len(names)):
            for direction in (1 / factor, factor):
                going = True
                while going and best[i]:  # a compatibility of zero stays zero
                    going = better((*best[:i], round(best[i] * direction, 6), *best[i + 1 :]))
    return of(best), best_score
