"""Relations of a config: boxes become offsets here and nowhere else, and a run keeps them."""

import itertools
import math

import numpy as np
from ml_collections import ConfigDict

from pwcrf_jax.config import featmap, keys
from pwcrf_jax.relations import Relation, offsets
from pwcrf_jax.runtime.errors import ConfigError

_MAX_OFFSETS = 10**6  # of a relation; the least chunk of a step is one of them on the whole map
_OFFSETS = ("row_offsets", "col_offsets")
_RESERVED = ("unary", "all", "tta", "refined", "label_smoothing", "dice")  # rows of the table, terms of the loss


def _num_offsets(relation: Relation, grid: tuple[int, int]) -> float:
    """The number of offsets of a box before it is cut to the map, at most."""
    if relation.grid:
        return relation.grid**2
    cell = min(grid) if relation.unit == "short_side" else 1
    return math.prod((high - low) * cell + 3 for low, high in (relation.rows, relation.cols))


def relations(config: ConfigDict) -> dict[str, np.ndarray]:
    """Offsets of the relations that the model has a Pairwise-Net for, {name: int32 [num_offsets, 2]}, in cells.

    A box becomes offsets here and nowhere else: on the grid of config.data.crop_size, whatever map comes in later, as a
    Pairwise-Net knows the distances that it was trained at and no others. A run keeps them, see `keep_offsets`.

    Raises:
      ConfigError: a name or box that cannot be, too many offsets, or none.
    """
    grid = featmap.grid(config, config.data.crop_size)
    where = f"on the {grid[0]} x {grid[1]} grid of config.data.crop_size = {tuple(config.data.crop_size)}"
    out = {}
    for name in config.model.relations:
        box, c = _box(config, name), config.relations[name]
        kept = [key for key in _OFFSETS if c[key]]
        if len(kept) == 1:
            (other,) = set(_OFFSETS) - set(kept)
            raise ConfigError(f"config.relations.{name}.{kept[0]} = {c[kept[0]]} must be (), or {other} be set too")
        if (len(c.row_offsets) * len(c.col_offsets) if kept else _num_offsets(box, grid)) > _MAX_OFFSETS:
            raise ConfigError(
                f"config.relations.{name}: its box holds more than {_MAX_OFFSETS} offsets {where}; make it smaller, or "
                "set its grid, such as 5"
            )
        if kept:
            pairs = itertools.product(*(sorted(set(axis)) for axis in (c.row_offsets, c.col_offsets)))
            out[name] = np.array([pair for pair in pairs if pair != (0, 0)], np.int32).reshape(-1, 2)
        else:
            out[name] = offsets(box, *grid)
        if not len(out[name]):
            raise ConfigError(
                f"config.relations.{name}: its box holds no edge {where}; change the box, or take the relation out of "
                "config.model.relations"
            )
    return out


def _box(config: ConfigDict, name: str) -> Relation:
    c = config.relations[name]
    if name in _RESERVED or not name.isidentifier():
        raise ConfigError(
            f"config.relations.{name}: use another name, of letters, digits and _, and not one of {_RESERVED}"
        )
    try:
        return Relation(name, tuple(c.rows), tuple(c.cols), c.unit, c.grid or None)
    except ValueError as error:  # "relation 'NAME': FIELD must ..."
        field, _, rest = str(error).partition(": ")[2].partition(" ")
        key = f"{name}.{field}" if field in keys.RELATION else f"{name}: {field}"
        raise ConfigError(f"config.relations.{key} {rest}") from None


def check_edges(config: ConfigDict, key: str) -> None:
    """Refuses relations without an edge on the grid of config's `key`, a size of images."""
    size = tuple(dict(keys.flat(config))[key])
    grid = featmap.grid(config, size)
    for name, box in relations(config).items():
        if not np.any(np.all(np.abs(box) < grid, axis=1)):
            raise ConfigError(
                f"config.relations.{name}: its box holds no edge on the {grid[0]} x {grid[1]} grid of config.{key} = "
                f"{size}; take a larger size, or take the relation out of config.model.relations"
            )


def keep_offsets(config: ConfigDict, run: ConfigDict | None = None) -> None:
    """Writes the offsets of `relations` into the config, row_offsets and col_offsets of each relation.

    run: the config of a run that goes on, whose offsets are taken where the config names none. Of a new run those are
      left out that leave its crops from every node, as they would never be trained.

    Raises:
      ConfigError: a relation has no edge on a crop.
    """
    for name, kept in run.relations.items() if run else ():
        if name in config.relations and not any(config.relations[name][key] for key in _OFFSETS):
            config.relations[name].update({key: kept.get(key, ()) for key in _OFFSETS})
    check_edges(config, "data.crop_size")
    grid = featmap.grid(config, config.data.crop_size)
    for name, box in relations(config).items():
        config.relations[name].update(axes(box if run else box[np.all(np.abs(box) < grid, axis=1)]))


def axes(box: np.ndarray) -> dict[str, tuple[int, ...]]:
    """Offsets are all pairs of a row and a column offset but (0, 0): {"row_offsets", "col_offsets"}."""
    return {key: tuple(map(int, np.unique(axis))) for key, axis in zip(_OFFSETS, box.T, strict=True)}
