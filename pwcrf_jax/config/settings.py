"""Configs: checked before any compute is spent, stored beside the checkpoints, read back."""

import difflib
import itertools
import json
import math
import os
import pathlib

import numpy as np
from ml_collections import ConfigDict

from pwcrf_jax import gaussian
from pwcrf_jax.config import schema
from pwcrf_jax.data import DATASETS
from pwcrf_jax.mean_field import Settings
from pwcrf_jax.messages import ALGORITHMS
from pwcrf_jax.model import losses
from pwcrf_jax.model.segmenter import PAIRWISE_FEATURES, PARAMETERISATIONS, Segmenter
from pwcrf_jax.nets import BACKBONES, INPUT_SCALINGS, FeatMapNet, grid_size
from pwcrf_jax.relations import Relation, offsets
from pwcrf_jax.runtime import files
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.runtime.logs import log
from pwcrf_jax.runtime.parallel import device_count


def _choose(key, value, known):
    if value not in known:
        nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"config.{key} = {value!r} is not one of {', '.join(map(repr, known))}{hint}")


def _flat(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


CONFIG = "config.json"  # in a workdir
CLASSES = "classes.json"  # in a workdir: names and colours of its classes, for prediction without the data set
TUNED = "tuned.json"  # in a workdir: what `pwcrf tune` chose
_BATCHES = ("train.batch_size", "eval.batch_size")
_MAX_OFFSETS = 10**6  # of a relation; the least chunk of a step is one of them on the whole map
_OFFSETS = ("row_offsets", "col_offsets")
_RESERVED = ("unary", "all", "tta", "refined")  # rows of the table, terms of the loss


def check_keys(config: ConfigDict) -> None:
    """Refuses a config whose keys are not those of configs/default.py, or whose values have another type or range.

    Raises:
      ConfigError: naming the key, its value and the remedy.
    """
    boxes = config.get("relations")
    for problem in schema.problems(dict(_flat(config)), boxes if isinstance(boxes, ConfigDict) else ()):
        raise ConfigError(problem)
    for name in config.model.relations:
        _choose("model.relations", name, list(boxes or ()))


def validate(config: ConfigDict, num_devices: int | None = None, batches: tuple[str, ...] = _BATCHES) -> None:
    """Refuses what cannot work, before data are read or anything is compiled.

    batches: the batch sizes that the devices must divide.

    Raises:
      ConfigError: naming the key, its value and the remedy.
    """
    check_keys(config)
    flat = dict(_flat(config))
    for key, known in {
        "data.name": DATASETS,
        "model.backbone": BACKBONES,
        "model.parameterisation": PARAMETERISATIONS,
        "model.pairwise_features": PAIRWISE_FEATURES,
        "model.input_scaling": ("auto", *INPUT_SCALINGS),
        "model.dtype": ("float32", "bfloat16"),
        "loss.reduction": ("mean", "sum"),
        "loss.objective": losses.OBJECTIVES,
        "crf.algorithm": ALGORITHMS,
        "refine.method": gaussian.METHODS,
        "optimizer.name": ("adamw", "sgd"),
        "optimizer.schedule": ("poly", "cosine", "constant"),
    }.items():
        _choose(key, flat[key], list(known))
    if len(config.tiles.size) not in (0, 2):
        raise ConfigError(f"config.tiles.size = {config.tiles.size} must be (height, width), or () for the default")
    for key in ("model.relations", "crf.relations"):
        if len(set(flat[key])) != len(flat[key]):
            raise ConfigError(f"config.{key} = {flat[key]} names a relation twice")
    for name in config.model.relations:
        kind = config.relations[name].parameterisation
        _choose(f"relations.{name}.parameterisation", kind, ["", *PARAMETERISATIONS])
    for name in config.crf.relations:
        _choose("crf.relations", name, list(config.model.relations))
    if len(config.crf.weights) not in (1, len(crf_relations(config))):
        raise ConfigError(
            f"config.crf.weights = {config.crf.weights} must hold one number for all relations or one for each of "
            f"{crf_relations(config)}"
        )
    build_model(config)
    _validate_objective(config)
    check_edges(config, "data.eval_size")
    # Last, as it starts the devices, which takes a while on some.
    devices = num_devices or device_count()
    for key in batches:
        if flat[key] % devices:
            raise ConfigError(
                f"config.{key} = {flat[key]} is not divisible by the {devices} devices; use a multiple, such as "
                f"{-(-flat[key] // devices) * devices}"
            )


def _num_offsets(relation, grid):
    """Of a box before it is cut to the map, at most."""
    if relation.grid:
        return relation.grid**2
    cell = min(grid) if relation.unit == "short_side" else 1
    return math.prod((high - low) * cell + 3 for low, high in (relation.rows, relation.cols))


def _validate_objective(config):
    name, loss = config.loss.objective, config.loss
    later = name == "piecewise_staged" and config.model.refinement_convs.layers  # its second stage trains these alone
    if name != "piecewise" and not crf_relations(config) and not later:
        raise ConfigError(f"config.loss.objective = {name!r} needs relations, there are none")
    if config.model.refinement_convs.layers and not name.startswith("piecewise"):
        raise ConfigError(
            f"config.model.refinement_convs.layers = {config.model.refinement_convs.layers} are not trained by "
            f"config.loss.objective = {name!r}; take piecewise or piecewise_staged, or set them to ()"
        )
    if name.endswith(losses.STAGED) and unary_steps(config) >= config.train.steps:
        raise ConfigError(
            f"config.loss.unary_share = {loss.unary_share} leaves none of the {config.train.steps} steps to the "
            "relations; lower it"
        )
    of_pairs = [("loss.sampled_offsets", 0), ("loss.pairwise_weight", 1), ("loss.pairwise_balance_power", -1)]
    for key, value in [] if name.startswith("piecewise") else of_pairs:
        section, field = key.split(".")
        if config[section][field] != value:
            raise ConfigError(
                f"config.{key} = {config[section][field]} does nothing with config.loss.objective = {name!r}; "
                f"set it to {value}"
            )


def check_classes(config: ConfigDict, class_names) -> None:
    """The config's number of classes and names of classes against the data set's."""
    if config.data.num_classes != len(class_names):
        raise ConfigError(
            f"config.data.num_classes = {config.data.num_classes}, but {config.data.name} has {len(class_names)} "
            f"classes ({', '.join(class_names)}); set --config.data.num_classes={len(class_names)}"
        )
    for name in config.eval.classes:
        _choose("eval.classes", name, list(class_names))
    if len(set(config.eval.classes)) != len(config.eval.classes):
        raise ConfigError(f"config.eval.classes = {config.eval.classes} names a class twice")


def scored_classes(config: ConfigDict, class_names) -> list[int] | None:
    """Indices of the classes that means are taken over; None: all."""
    return [list(class_names).index(name) for name in config.eval.classes] or None


def relations(config: ConfigDict) -> dict[str, np.ndarray]:
    """Offsets of the relations that the model has a Pairwise-Net for, {name: int32 [num_offsets, 2]}, in cells.

    A box becomes offsets here and nowhere else: on the grid of config.data.crop_size, whatever map comes in later, as a
    Pairwise-Net knows the distances that it was trained at and no others. A run keeps them, see `keep_offsets`.

    Raises:
      ConfigError: a name or box that cannot be, too many offsets, or none.
    """
    grid = grid_size(config.data.crop_size, config.model.scales)
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


def _box(config, name) -> Relation:
    c = config.relations[name]
    if name in _RESERVED or not name.isidentifier():
        raise ConfigError(
            f"config.relations.{name}: use another name, of letters, digits and _, and not one of {_RESERVED}"
        )
    try:
        return Relation(name, tuple(c.rows), tuple(c.cols), c.unit, c.grid or None)
    except ValueError as error:  # "relation 'NAME': FIELD must ..."
        field, _, rest = str(error).partition(": ")[2].partition(" ")
        key = f"{name}.{field}" if field in schema.RELATION else f"{name}: {field}"
        raise ConfigError(f"config.relations.{key} {rest}") from None


def check_edges(config: ConfigDict, key: str) -> None:
    """Refuses relations without an edge on the grid of config's `key`, a size of images."""
    size = tuple(dict(_flat(config))[key])
    grid = grid_size(size, config.model.scales)
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
    grid = grid_size(config.data.crop_size, config.model.scales)
    for name, box in relations(config).items():
        config.relations[name].update(_axes(box if run else box[np.all(np.abs(box) < grid, axis=1)]))


def _axes(box) -> dict[str, tuple[int, ...]]:
    """Offsets are all pairs of a row and a column offset but (0, 0): {"row_offsets", "col_offsets"}."""
    return {key: tuple(map(int, np.unique(axis))) for key, axis in zip(_OFFSETS, box.T, strict=True)}


def build_model(config: ConfigDict) -> Segmenter:
    """The model of a config. input_scaling "auto" stands for "tf" until weights say otherwise."""
    m = config.model
    options, boxes = m[m.backbone].to_dict() if m.backbone in m else {}, relations(config)
    featmap = dict(
        backbone=m.backbone,
        backbone_options=tuple(sorted(options.items())),
        scales=m.scales,
        block6=m.block6,
        pyramid_windows=m.pyramid_windows,
        middle=m.refinement_convs.layers,
    )
    try:
        FeatMapNet(**featmap)
        return Segmenter(
            num_classes=config.data.num_classes,
            featmap=featmap,
            relations=boxes,
            parameterisation=tuple(config.relations[n].parameterisation or m.parameterisation for n in m.relations),
            hidden=m.hidden,
            input_scaling="tf" if m.input_scaling == "auto" else m.input_scaling,
            pairwise_features=m.pairwise_features,
            pairwise_trains_features=m.pairwise_trains_features and not config.loss.objective.endswith(losses.STAGED),
            refinement_width=m.refinement_convs.width,
            dtype=m.dtype,
        )
    except (ValueError, TypeError) as error:
        own = f"{m.backbone}: "  # what the backbone says of its options begins so
        text, rest = str(error), str(error).removeprefix(own)
        place = f"model.{m.backbone}." if text != rest else "model: "
        if text.startswith(f"{own}no layer"):  # of its middle ones
            place = "model.refinement_convs.layers: "
        raise ConfigError(f"config.{place}{rest}") from None


def identity(config: ConfigDict) -> dict:
    """What makes a model the model it is, as flat JSON values: a checkpoint means nothing under another.

    Left out is what may change between runs: dtype, how depthwise convolutions are computed, what is trained.
    """
    free = ("model.dtype", "model.mobilenet_v2.depthwise", "model.mobilenet_v2.freeze_until", "model.parameterisation")
    free += ("model.pairwise_trains_features",)
    if not config.model.refinement_convs.layers:
        free += ("model.refinement_convs.layers", "model.refinement_convs.width")
    if config.model.pairwise_features == "shared" or not config.model.relations:
        free += ("model.pairwise_features",)
    other_backbones = tuple(f"model.{name}." for name in BACKBONES if name != config.model.backbone)
    used = tuple(f"relations.{name}." for name in config.model.relations)
    flat = {}
    for key, value in _flat(config):
        model = key.startswith("model.") and key not in free and not key.startswith(other_backbones)
        if model or key.startswith(used) or key in ("data.name", "data.num_classes"):
            flat[key] = value
    for name, box in relations(config).items():  # what "" and () stand for
        kind = config.relations[name].parameterisation
        flat[f"relations.{name}.parameterisation"] = kind or config.model.parameterisation
        flat |= {f"relations.{name}.{key}": axis for key, axis in _axes(box).items()}
    return json.loads(json.dumps(flat))


def crf_relations(config: ConfigDict) -> tuple[str, ...]:
    """The relations that inference uses."""
    return tuple(config.crf.relations or config.model.relations)


def crf_settings(config: ConfigDict) -> Settings:
    """Settings of inference, from config.crf; weights by name of all relations that it uses."""
    names = crf_relations(config)
    weights = config.crf.weights if len(config.crf.weights) == len(names) else config.crf.weights * len(names)
    return Settings(
        weights=dict(zip(names, weights, strict=True)),
        num_iterations=config.crf.num_iterations,
        damping=config.crf.damping,
        average_messages=config.crf.average_messages,
        algorithm=config.crf.algorithm,
        chunk_edges=config.crf.chunk_edges or None,
    )


def unary_steps(config: ConfigDict) -> int | None:
    """Steps that train the unary alone, None where there are no stages."""
    staged = config.loss.objective.endswith(losses.STAGED)
    return round(config.loss.unary_share * config.train.steps) if staged else None


def augments(config: ConfigDict) -> bool:
    """Whether test-time augmentation shows more than the image itself."""
    return config.tta.flip or tuple(config.tta.scales) != (1.0,)


def table_rows(config: ConfigDict) -> dict[str, tuple[str, ...]]:
    """Rows of the evaluation table that differ in relations: the unary alone, each of them added to it, all of them."""
    names = crf_relations(config)
    return {"unary": ()} | {name: (name,) for name in names} | {"all": names}


def final_row(config: ConfigDict) -> str:
    """The row of the evaluation table that is the model's answer: all relations, then refinement convolutions."""
    return "convs" if config.model.refinement_convs.layers else "all"


def shown_rows(config: ConfigDict) -> tuple[str, ...]:
    """Rows of the evaluation table whose labels pictures show: the unary's, and the model's answer where it differs."""
    final = final_row(config)
    return ("unary",) if final == "all" and not crf_relations(config) else ("unary", final)


def dataset_options(config: ConfigDict) -> dict:
    """Keyword arguments of `pwcrf_jax.data.load_dataset`."""
    d = config.data
    options = d[d.name].to_dict() if d.name in d else {}
    return dict(
        name=d.name, source_dir=d.source_dir, data_dir=d.data_dir, partial=d.partial, max_pixels=d.max_pixels, **options
    )


def save(config: ConfigDict, path) -> None:
    """Writes a config as JSON, whole or not at all."""
    files.write_json(path, config.to_dict())


def load(path) -> ConfigDict:
    """Reads a config written by `save`; lists become tuples again, so that flags can override them.

    Where the file is damaged or not there, as power loss may leave it, the log says so and the config that the
    checkpoints beside it carry is taken.

    Raises:
      ConfigError: neither can be used.
    """
    try:
        return files.read_json(path, "put a copy in its place, or name another --workdir", _restored)
    except (FileNotFoundError, files.FileError) as error:
        from pwcrf_jax.runtime import checkpoint  # Orbax, which a run that is refused need not load

        missing = f"{path} does not exist: is this the --workdir of a training run?"
        why = str(error) if isinstance(error, files.FileError) else missing
        carried = checkpoint.config_of(os.path.dirname(path))
        if carried is None:
            raise ConfigError(why) from None
        log.warning("%s is taken instead: %s", f"The configuration in {carried[1]}", why)
        return _restored(carried[0])


def load_checked(workdir: str) -> ConfigDict:
    """`load` of the config of a run, and `check_keys` of it.

    Raises:
      ConfigError: it cannot be used; the message names the file.
    """
    path = os.path.join(workdir, CONFIG)
    config = load(path)
    try:
        check_keys(config)
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be used: {error}") from None
    return config


def _restored(stored):
    """The config of what JSON keeps of it; ValueError where that is something else."""
    if not isinstance(stored, dict) or not stored:
        raise ValueError("expected a JSON object with the keys of configs/default.py")
    return ConfigDict(_tuples(stored))  # ValueError for names with a dot


def save_classes(class_names, palette, folder: str) -> None:
    """Writes FOLDER/classes.json, whole or not at all."""
    named = [{"name": name, "colour": list(colour)} for name, colour in zip(class_names, palette, strict=True)]
    files.write_json(pathlib.Path(folder, CLASSES), named)


def load_classes(workdir: str):
    """(class names, palette) of WORKDIR/classes.json; two empty tuples where it is not there.

    Raises:
      ConfigError: it cannot be read.
    """

    def check(content):
        if not isinstance(content, list) or not content:
            raise ValueError("expected a list of classes")
        for x in content:
            colour = x["colour"]
            if not isinstance(x["name"], str) or not isinstance(colour, list) or len(colour) != 3:
                raise ValueError("expected names and colours of three numbers")
            if not all(type(n) is int and 0 <= n <= 255 for n in colour):
                raise ValueError("a colour is not three integers 0..255")
        return tuple(x["name"] for x in content), tuple(tuple(x["colour"]) for x in content)

    try:
        return files.read_json(pathlib.Path(workdir, CLASSES), "delete it, training writes it again", check)
    except FileNotFoundError:
        return (), ()
    except files.FileError as error:
        raise ConfigError(str(error)) from None


def tuning_conditions(config: ConfigDict) -> dict:
    """What else than the tuned values themselves decides how good they are, as flat JSON values."""
    keys = ("crf.num_iterations", "crf.damping", "crf.average_messages", "refine.num_iterations")
    flat = dict(_flat(config))
    return {"crf.relations": list(crf_relations(config))} | {key: flat[key] for key in keys}


def check_tuned(config: ConfigDict, tuned: dict, workdir: str) -> None:
    """Refuses values of `apply_tuned` under other conditions than they were chosen under."""
    now = tuning_conditions(config)
    for key, value in tuned["conditions"].items():
        if now.get(key) != value:
            raise ConfigError(
                f"config.{key} = {now.get(key)}, but {pathlib.Path(workdir, TUNED)} was chosen with {value}; "
                "tune again, or add --notuned"
            )


def write_tuned(result: dict, workdir: str) -> None:
    """Writes the result of `tuning.tune`, whole or not at all."""
    files.write_json(pathlib.Path(workdir, TUNED), result)


def apply_tuned(config: ConfigDict, workdir: str) -> dict | None:
    """Sets the keys that tuning chose, where WORKDIR/tuned.json is there; returns its content."""

    def check(result):
        for name, kind in {"config": dict, "conditions": dict, "split": str, "step": int}.items():
            if not isinstance(result.get(name, 0) if name == "step" else result[name], kind):
                raise ValueError(f"{name!r} is no {kind.__name__}")
        for key, value in result["config"].items():
            if not key.startswith(("crf.weights", "crf.num_iterations", "refine.")) or key not in dict(_flat(config)):
                raise KeyError(key)
            if not schema.kind(key).accepts(value):
                raise ValueError(f"{key} = {value!r} must be {schema.kind(key).wanted}")
        return result

    remedy = "delete it, tune again, or add --tuned=false"
    try:
        result = files.read_json(pathlib.Path(workdir, TUNED), remedy, check)
    except FileNotFoundError:
        return None
    except files.FileError as error:
        raise ConfigError(str(error)) from None
    for key, value in result["config"].items():
        section, name = key.split(".")
        config[section][name] = _tuples(value)
    return result


def _tuples(x):
    if isinstance(x, dict):
        return {k: _tuples(v) for k, v in x.items()}
    return tuple(_tuples(v) for v in x) if isinstance(x, list) else x
