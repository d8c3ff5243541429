"""What every key of a config may hold. One table, so that a wrong value is refused by name before any compute."""

import difflib

from pwcrf_jax.runtime import files

_LARGEST = {int: 2**31 - 1, float: 3.4e38}  # what int32 and float32 hold


class Number:
    """An int, or a float (ints pass for floats), low <= x <= high; `above` and `below` are exclusive; odd: of ints.

    besides: of floats, a number outside of it that has a meaning of its own.
    """

    def __init__(self, kind, low=None, high=None, above=None, below=None, odd=False, besides=None):
        largest = _LARGEST[kind]
        self.kind, self.above, self.below, self.odd, self.besides = kind, above, below, odd, besides
        self.low, self.high = -largest if low is None else low, largest if high is None else high
        if kind is int:
            self.wanted = f"an {'odd ' if odd else ''}integer from {self.low} to {self.high}"
            return
        bounds = {"above": above, "at least": low, "below": below, "at most": high}
        bounds = [f"{name} {bound}" for name, bound in bounds.items() if bound is not None]
        self.wanted = " ".join(["a finite number", " and ".join(bounds)]).strip()
        self.wanted += f", or {besides}" if besides is not None else ""

    def accepts(self, x):
        if isinstance(x, bool) or not isinstance(x, (int, self.kind)):
            return False
        if not self.low <= x <= self.high:  # nor NaN
            return self.besides is not None and x == self.besides
        inside = (self.above is None or x > self.above) and (self.below is None or x < self.below)
        return inside and not (self.odd and x % 2 == 0)


class Text:
    def __init__(self, empty=True):
        self.empty, self.wanted = empty, "text" if empty else "text, not empty"

    def accepts(self, x):
        return isinstance(x, str) and "\0" not in x and (self.empty or bool(x))


class Path(Text):
    wanted = "the path of a local file or folder, in a home that is known"

    def __init__(self):
        self.empty = True

    def accepts(self, x):
        try:
            return super().accepts(x) and files.expand_path(x, "") is not None
        except files.FileError:
            return False


class Flag:
    wanted = "True or False"

    def accepts(self, x):
        return isinstance(x, bool)


class Tuple:
    """A tuple whose elements are all of one kind; of `length` elements where it is given; `rising` or equal."""

    def __init__(self, element, length=None, empty=True, rising=False):
        self.element, self.length, self.empty, self.rising = element, length, empty, rising
        size = f" of {length} values" if length else "" if empty else " of one value or more"
        self.wanted = f"a tuple{size}, each {element.wanted}{', the lower one first' if rising else ''}"

    def accepts(self, x):
        return (
            isinstance(x, (tuple, list))
            and self.length in (None, len(x))
            and (self.empty or len(x) > 0)
            and all(map(self.element.accepts, x))
            and not (self.rising and x[0] > x[1])
        )


class Pair:
    def __init__(self, first, second):
        self.kinds, self.wanted = (first, second), f"a pair of {first.wanted} and {second.wanted}"

    def accepts(self, x):
        two = isinstance(x, (tuple, list)) and len(x) == 2
        return two and self.kinds[0].accepts(x[0]) and self.kinds[1].accepts(x[1])


_POSITIVE_INT, _COUNT = Number(int, low=1), Number(int, low=0)
_POSITIVE, _NOT_NEGATIVE = Number(float, above=0), Number(float, low=0)
# Beyond these nothing is meant, and arrays and loops of such sizes would end otherwise than by a sentence.
_WIDTH, _BATCH, _SCALE = Number(int, 1, 65536), Number(int, 1, 65536), Number(float, 0.01, 100)
_SIZE = Tuple(Number(int, 1, 16384), 2)
_BOUNDS = Tuple(Number(float, -16384, 16384), 2, rising=True)
_NAMES = Tuple(Text())

RELATION = {
    "rows": _BOUNDS,
    "cols": _BOUNDS,
    "unit": Text(),
    "grid": Number(int, 0, 1024),
    "row_offsets": Tuple(Number(int, -16384, 16384)),
    "col_offsets": Tuple(Number(int, -16384, 16384)),
    "parameterisation": Text(),
}

SCHEMA = {
    "seed": Number(int, low=0, high=2**32 - 1),
    "init_from": Path(),
    "compilation_cache": Flag(),
    "data.name": Text(),
    "data.source_dir": Path(),
    "data.data_dir": Path(),
    "data.partial": Flag(),
    "data.train_split": Text(empty=False),
    "data.eval_split": Text(empty=False),
    "data.num_classes": Number(int, low=2, high=255),
    "data.crop_size": _SIZE,
    "data.eval_size": _SIZE,
    "data.scale_range": Tuple(_SCALE, 2, rising=True),
    "data.flip": Flag(),
    "data.max_pixels": _POSITIVE_INT,
    "data.num_threads": Number(int, 0, 1024),
    "data.num_workers": Number(int, 0, 1024),
    "data.synthetic.num_train": _POSITIVE_INT,
    "data.synthetic.num_val": _POSITIVE_INT,
    "data.synthetic.image_size": _SIZE,
    "data.synthetic.seed": _COUNT,
    "data.image_folder.val_fraction": Number(float, above=0, below=1),
    "data.image_folder.seed": Number(int),
    "data.tfds.dataset": Text(),
    "data.tfds.image_key": Text(),
    "data.tfds.label_key": Text(),
    "data.tfds.label_offset": Number(int),
    "data.tfds.void": Number(int),
    "data.tfds.class_names": _NAMES,
    "data.tfds.num_classes": Number(int, low=0, high=255),
    "data.tfds.max_side": _COUNT,
    "model.backbone": Text(),
    "model.mobilenet_v2.output": Text(),
    "model.mobilenet_v2.depthwise": Text(),
    "model.mobilenet_v2.freeze_until": Text(),
    "model.tiny.features": Tuple(_WIDTH, 4),
    "model.refinement_convs.layers": Tuple(Text(empty=False)),
    "model.refinement_convs.width": _WIDTH,
    "model.scales": Tuple(_SCALE, empty=False),
    "model.block6": Tuple(Pair(Number(int, 1, 255, odd=True), _WIDTH)),
    "model.pyramid_windows": Tuple(Number(int, 1, 255, odd=True)),
    "model.hidden": _WIDTH,
    "model.relations": _NAMES,
    "model.parameterisation": Text(),
    "model.pairwise_features": Text(),
    "model.pairwise_trains_features": Flag(),
    "model.input_scaling": Text(),
    "model.dtype": Text(),
    "loss.objective": Text(),
    "loss.unary_share": Number(float, low=0, below=1),
    "loss.reduction": Text(),
    "loss.pairwise_weight": _NOT_NEGATIVE,
    "loss.balance_power": _NOT_NEGATIVE,
    "loss.pairwise_balance_power": Number(float, low=0, besides=-1),
    "loss.sampled_offsets": _COUNT,
    "loss.chunk_edges": _COUNT,
    "optimizer.name": Text(),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.backbone_factor": _NOT_NEGATIVE,
    "optimizer.schedule": Text(),
    "optimizer.warmup_steps": _COUNT,
    "optimizer.momentum": Number(float, low=0, below=1),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "train.batch_size": _BATCH,
    "train.steps": _POSITIVE_INT,
    "train.log_every": _POSITIVE_INT,
    "train.eval_every": _COUNT,
    "train.checkpoint_every": _POSITIVE_INT,
    "train.keep_checkpoints": _POSITIVE_INT,
    "train.max_skipped_steps": _COUNT,
    "crf.relations": _NAMES,
    "crf.num_iterations": Number(int, 0, 10000),
    "crf.weights": Tuple(Number(float), empty=False),
    "crf.damping": Number(float, low=0, below=1),
    "crf.average_messages": Flag(),
    "crf.algorithm": Text(),
    "crf.chunk_edges": _COUNT,
    "refine.num_iterations": Number(int, 0, 10000),
    "refine.smoothness_compat": Number(float),
    "refine.smoothness_sxy": _POSITIVE,
    "refine.appearance_compat": Number(float),
    "refine.appearance_sxy": _POSITIVE,
    "refine.appearance_srgb": _POSITIVE,
    "refine.method": Text(),
    "tiles.size": Tuple(_POSITIVE_INT),
    "tiles.overlap": Number(float, low=0, below=1),
    "tta.scales": Tuple(_SCALE, empty=False),
    "tta.flip": Flag(),
    "eval.batch_size": _BATCH,
    "eval.classes": _NAMES,
    "eval.panel": Number(int, 0, 64),
}


def kind(key: str):
    """What a key takes; None if there is no such key."""
    section, _, name = key.partition(".")
    if section == "relations" and key.count(".") == 2:
        return RELATION.get(name.partition(".")[2])
    return SCHEMA.get(key)


def unknown(key: str) -> str | None:
    """A sentence on a key that nothing reads, with the nearest that something does; None for keys and sections."""
    names = list(SCHEMA)
    if key.startswith("relations."):
        names = [f"{'.'.join(key.split('.')[:2])}.{field}" for field in RELATION]
    if kind(key) or any(f"{name}.".startswith(f"{key}.") for name in (*names, "relations")):
        return None
    section, _, last = key.rpartition(".")
    if kind(section):
        return f"config.{section} must be {kind(section).wanted}, not a section"
    siblings = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == section]
    near = [f"{section}.{name}".lstrip(".") for name in difflib.get_close_matches(last, siblings, 1)]
    near += difflib.get_close_matches(key, [name for name in names if name.rpartition(".")[2] == last], 1, 0)
    if not siblings:
        near += difflib.get_close_matches(key, names, 1, 0.75)
    if near:
        advice = f"did you mean config.{near[0]}?"
    elif section and siblings:
        advice = f"config.{section} has {', '.join(siblings)}"
    else:
        advice = "see configs/default.py for the names"
    return f"config.{key} is not a key; {advice}"


def problems(flat: dict, relation_names):
    """Yields a sentence for every key that is unknown, missing or holds a wrong value; flat: {dotted key: value}."""
    names = [*SCHEMA, *(f"relations.{name}.{field}" for name in relation_names for field in RELATION)]
    for key in (key for key in flat if key not in names):  # before the key that it stands for is missed
        inner = next((name for name in names if name.startswith(f"{key}.")), f"{key}.NAME.rows")
        yield unknown(key) or f"config.{key} = {flat[key]!r} must be a section, config.{inner} is missing"
    for key in names:
        if key not in flat:
            yield f"config.{key} is missing; start from configs/default.py"
        elif not kind(key).accepts(flat[key]):
            yield f"config.{key} = {flat[key]!r} must be {kind(key).wanted}"
