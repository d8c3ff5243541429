"""Early stopping: a run ends where evaluations bring no better score."""

from typing import Any

_KEY = "patience"  # in the meta of a checkpoint


class Patience:
    """Counts evaluations since the best score of a stage; its state goes with the checkpoints."""

    def __init__(self, limit: int, begins: int = 0):
        """limit: evaluations without a better score that end a run; 0: none do.

        begins: the step that the last stage begins with. Evaluations of stages before it do not count, and their scores
        need not be beaten.
        """
        self._limit, self._begins = limit, begins
        self._best: float | None = None
        self._waited = 0

    def add(self, step: int, score: float | None) -> None:
        """The score of an evaluation, None where nothing was scored."""
        if step <= self._begins:
            return
        if score is not None and (self._best is None or score > self._best):
            self._best, self._waited = score, 0
        else:
            self._waited += 1

    @property
    def is_over(self) -> bool:
        """Whether the run ends here."""
        return 0 < self._limit <= self._waited

    def why(self) -> str:
        """What the log says where a run ends."""
        best = "no score" if self._best is None else f"no mean IoU above {100 * self._best:.1f}"
        return f"{best} in the last {self._waited} evaluations (config.train.patience = {self._limit})"

    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {_KEY: {"best": self._best, "waited": self._waited}}

    def restore(self, meta: dict[str, Any]) -> None:
        """Goes on from the meta of a checkpoint, which has it or is of a run's beginning."""
        kept = meta.get(_KEY, {"best": None, "waited": 0})
        self._best, self._waited = kept["best"], kept["waited"]
