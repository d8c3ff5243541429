"""Names of tensors in PyTorch's files of one network, which differ between libraries by names and prefixes."""

from collections.abc import Collection

from pwcrf_jax.nets.state_dicts import StateDict
from pwcrf_jax.nets.stored import WeightsError, some

# Layers after the features.
_HEADS = ("fc", "head", "head_dist", "fc_norm", "classifier", "pooler", "pre_logits")


def has(names: Collection[str], *endings: str) -> bool:
    """Whether there is a name with each of these endings, all after the same prefix."""
    return prefix_of(names, *endings) is not None


def prefix_of(names: Collection[str], *endings: str) -> str | None:
    """What stands before each of these endings, such as "model.", often ""; None where some are missing."""
    first, *others = endings
    for name in names:
        prefix = name.removesuffix(first)
        if name.endswith(first) and prefix[-1:] in ("", ".") and all(f"{prefix}{other}" in names for other in others):
            return prefix
    return None


def count(names: Collection[str], prefix: str) -> int:
    """Of names "PREFIX0...", "PREFIX1...", ... how many follow each other."""
    parts = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    return next(i for i in range(len(parts) + 1) if str(i) not in parts)


def check_unread(state: StateDict, prefix: str, allowed: Collection[str] = ()) -> None:
    """Raises WeightsError where the network in the file has tensors that were not read: it is another kind of it.

    Left out may be classifiers, counters of BatchNorm, and layers that begin with one of `allowed`.
    """
    begins = tuple(f"{prefix}{layer}." for layer in allowed)
    for name in state.unread():
        heads = {name.split(".")[0], name.removeprefix(prefix).split(".")[0]}
        counter = name.endswith(".num_batches_tracked")
        if name.startswith(prefix) and heads.isdisjoint(_HEADS) and not counter and not f"{name}.".startswith(begins):
            raise WeightsError(
                f"{state.path}: has a tensor {some([name])}, for which the backbone has no place: another kind of this "
                "network"
            )
