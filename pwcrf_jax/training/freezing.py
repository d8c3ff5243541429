"""Parameters that training leaves as they start must not start at random."""

import functools
import operator

import jax

from pwcrf_jax import config as configs
from pwcrf_jax.nets.pretrained import KNOWN_FILES
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime.files import is_folder
from pwcrf_jax.training.optimizer import standing_still

_RUN = "name the workdir of a run there that has trained them"
_REMEDIES = {
    "freeze_until": "name ImageNet weights there, or set freeze_until to ''",
    "optimizer.backbone_factor": "name ImageNet weights there, or set the factor above 0",
    "loss.unary_share": f"{_RUN}, or raise the share",
    "loss.pairwise_weight": f"{_RUN}, or set the weight above 0",
}


def _remedy(key: str) -> str:
    return _REMEDIES[key.rpartition(".")[2] if key.endswith("freeze_until") else key]


def check(config, params, random) -> None:
    """Refuses a start at which something is random that training does not change.

    Args:
      config: a valid one.
      params: of its model; shapes are enough.
      random: like params, a bool for each leaf: that neither a file of weights nor another run gives it.

    Raises:
      ConfigError: naming the key that keeps it so, and where weights come from.
    """
    keys = standing_still(config, params, configs.unary_steps(config))
    keys = jax.tree.map(lambda key, at_random: key if at_random else "", keys, random)
    found: dict[str, dict] = {}
    for path, key in jax.tree_util.tree_leaves_with_path(keys):
        found.setdefault(key, {})[jax.tree_util.keystr(path[:-1], simple=True, separator="/")] = None
    key = next(filter(None, found), None)
    if key is None:
        return
    first, *others = found[key]
    layers = f"{first} and {len(others)} more layers" if others else first
    given = (
        f"config.init_from = {config.init_from!r} does not give them" if config.init_from else "config.init_from is ''"
    )
    files = KNOWN_FILES.get(config.model.backbone, ()) if "ImageNet" in _remedy(key) else ()
    raise configs.ConfigError(
        f"config.{key} = {functools.reduce(operator.getitem, key.split('.'), config)!r} keeps {layers} as they start, "
        f"which is at random, as {given}; {_remedy(key)}{'. Known files: ' * bool(files)}{', '.join(files)}"
    )


def check_before_data(config) -> None:
    """The same for a run that begins, from the config alone: before data are prepared, which may take hours.

    What another run gives is known when it is read.
    """
    if is_folder(config.init_from):
        return
    params = restore.abstract_params(configs.build_model(config))
    from_file = lambda path, _: bool(config.init_from) and path[1].key == "backbone"
    check(config, params, jax.tree_util.tree_map_with_path(lambda *leaf: not from_file(*leaf), params))
