"""`pwcrf eval --report`: one HTML file, without need of a network, that shows what the CRF does.

Its figures are collected in the pass over the split that makes the table of `evaluate`, from the same labels. What is
shown of the images is reduced in size; all figures are of all pixels.
"""

import base64
import bisect
import collections
import functools
import importlib.resources
import io
import json
import os
from typing import Any

import jax
import numpy as np
from PIL import Image

from pwcrf_jax import config as configs
from pwcrf_jax import mean_field, piecewise
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.evaluation.evaluators import Seen, inside, without_devices
from pwcrf_jax.report.parts import Pixels, last_update, make_figures, pixels_of
from pwcrf_jax.report.pictures import VOID_COLOUR
from pwcrf_jax.runtime import files

BINS = 15  # of confidence, in the calibration curve and its error
SIDE = 360  # pixels of a picture, at most
INSPECTED = 12  # images, unless another number is given or the gallery has fewer
INSPECTOR_BYTES = 5_000_000  # of the page, for what the inspector shows; with many classes it has fewer images
CHANGES = ("same", "right", "wrong", "other")  # what a stage did to a pixel; other: from one wrong class to another
_CHANGE_COLOURS = ((0, 0, 0), (43, 108, 176), (217, 72, 15), (150, 110, 190))
_ENTROPY_ANCHORS = ((10, 10, 40), (85, 25, 115), (190, 55, 85), (245, 140, 45), (252, 245, 185))


# ---------------------------------------------------------------------------------------------- collecting


class Extremes:
    """Of what is offered, the half of `limit` with the largest gains and the half with the least; all if not more."""

    def __init__(self, limit: int):
        self._limit = limit
        self._keys: list[tuple[float, int]] = []
        self._entries: dict[int, Any] = {}

    def offer(self, gain: float, index: int, make) -> None:
        """make() is called, for the entry, only where it is kept for now."""
        at = bisect.bisect(self._keys, (gain, index))
        full = len(self._keys) == self._limit
        middle = (self._limit + 1) // 2
        if full and at == middle:
            return
        self._keys.insert(at, (gain, index))
        self._entries[index] = make()
        if full:
            del self._entries[self._keys.pop(middle)[1]]

    def entries(self) -> list:
        """By falling gain."""
        return [self._entries[index] for _, index in reversed(self._keys)]


class Report:
    """Collects a report while `evaluate.evaluate` runs, as an evaluator, and writes it.

    file: of HTML. images: in the gallery at most. inspected: images whose cells can be looked into, at most; None:
    INSPECTED, or all of a smaller gallery. Of both the first half are those that gained most, the others those that
    lost most.

    Raises:
      FileError: the file cannot be written.
      ConfigError: numbers that do not fit, or more than one process.
    """

    def __init__(self, file: str, images: int = 100, inspected: int | None = None):
        inspected = min(INSPECTED, images) if inspected is None else inspected
        if inspected > images:
            raise configs.ConfigError(
                f"--report_inspect={inspected} is more than --report_images={images}; images are inspected from the "
                "gallery"
            )
        if jax.process_count() > 1:
            raise configs.ConfigError("--report is written by one process; start it on one host alone")
        self.file = file
        files.make_folder(os.path.dirname(file) or ".")
        files.check_replaceable(self.file)
        self._gallery, self._wanted = Extremes(images), inspected
        self._confusion: Any = collections.defaultdict(int)  # {row: int64 [K, K]}
        self._watched: dict[int, dict[str, Pixels]] = collections.defaultdict(dict)
        self._changes: dict[tuple[str, str], np.ndarray]
        self._changes = collections.defaultdict(lambda: np.zeros(len(CHANGES), np.int64))
        self._bins: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros((3, BINS)))
        self._hidden: Any = collections.defaultdict(float)  # {relation: [sums of hidden units and their number]}
        self._seen = self._void = 0

    def start(self, config, model, params, dataset):
        """Names the run; returns the options of `evaluate.make_eval_fn` that it needs."""
        self._config, self._dataset, self._params = config, dataset, params
        self._crf = configs.crf_settings(config)
        self._grid = configs.grid(config, config.data.eval_size)
        chosen = [(name, box) for name, box in model.relations if name in self._crf.weights]
        order = ["unary", *["all"] * bool(chosen), *["convs"] * bool(config.model.refinement_convs.layers)]
        self._order = tuple(order)  # a tree that was on a device is sorted by name
        self._boxes = dict(chosen)
        numbers = (2 + len(chosen)) * self._grid[0] * self._grid[1] * dataset.num_classes
        self._room = int(INSPECTOR_BYTES // (numbers * 2 * 4 / 3))  # two bytes each, in base64
        self._inspected = Extremes(min(self._wanted, max(1, self._room)))
        self._last_update = jax.jit(functools.partial(last_update, boxes=self._boxes, crf=self._crf))
        return dict(keep=self._order, figures=make_figures(self._order, tuple(self._boxes)))

    def watch(self, i: int, row: str, log_probs: np.ndarray) -> None:
        """Takes a row that is made image by image, of image i of the batch that `add` sees next: float32 [H, W, K]."""
        self._watched[i][row] = pixels_of(log_probs)

    def add(self, seen: Seen) -> None:
        """One batch, with the figures of `make_figures`; the potentials stay on the devices."""
        for row, counts in seen.confusion.items():
            self._confusion[row] = self._confusion[row] + np.asarray(counts[0], np.int64)
        figures = dict(seen.per_image.figures)
        nodes = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), figures.pop("nodes"))
        figures = jax.tree.map(without_devices, figures) | {"nodes": nodes}
        for name, (total, count) in figures["hidden"].items():
            self._hidden[name] += np.array([*total.astype(np.float64).sum(0), count.sum()])
        for i, image in seen.images():
            box = seen.batch["valid_box"][i]
            stages = {row: Pixels(*(inside(x[i], box) for x in figures["pixels"][row])) for row in self._order}
            truth, name = inside(seen.batch["label"][i], box), seen.batch["id"][i]
            cells = lambda i=i: self._cells(figures, i)
            self._add_image(image, truth, name, stages | self._watched.pop(i, {}), cells)

    def results(self) -> tuple:
        """Nothing: `write` writes them."""
        return ()

    def _add_image(self, image, truth, name, stages, cells):
        valid = truth != piecewise.VOID
        right = {row: (pixels.labels == truth) & valid for row, pixels in stages.items()}
        for row, pixels in stages.items():
            confidence = pixels.confidence[valid]
            index = np.minimum((confidence * BINS).astype(int), BINS - 1)
            of = lambda weights, index=index: np.bincount(index, weights, BINS)
            self._bins[row] += [of(None), of(confidence), of(right[row][valid])]
        rows = list(stages)
        for pair in dict.fromkeys([*zip(rows, rows[1:], strict=False), (rows[0], rows[-1])]):
            change = self._change(*(stages[row].labels for row in pair), *(right[row] for row in pair))
            self._changes[pair] += np.bincount(change[valid], minlength=len(CHANGES))
        index, number = self._seen, int(valid.sum())
        self._seen += 1
        self._void += valid.size - number
        counts = {row: int(x.sum()) for row, x in right.items()}
        gain = (counts[rows[-1]] - counts[rows[0]]) / max(number, 1)
        last = stages[rows[-1]]
        # Refinement leaves few pixels unsure, so what mean field says is shown beside it.
        doubts = {row: stages[row].entropy for row in (self._order[-1], rows[-1])}

        def entry():
            changed = np.where(
                valid, self._change(stages[rows[0]].labels, last.labels, right[rows[0]], right[rows[-1]]), 0
            )
            return dict(
                index=index,
                id=name,
                size=list(truth.shape),
                valid=number,
                right=counts,
                entropy={row: float(x.mean()) for row, x in doubts.items()},
                classes=np.union1d(truth[valid], last.labels).tolist(),
                image=_jpeg(image),
                labels={row: self._label_picture(x) for row, x in self._shown(truth, stages).items()},
                change=_indexed(changed, _CHANGE_COLOURS, transparent=0),
                uncertainty={row: _entropy_picture(x) for row, x in doubts.items()},
            )

        self._gallery.offer(gain, index, entry)
        self._inspected.offer(gain, index, lambda: cells() | {"index": index})

    @staticmethod
    def _change(before, after, right_before, right_after):
        """uint8 [H, W], indices of CHANGES."""
        return np.select([before == after, right_after, right_before], [0, 1, 2], 3).astype(np.uint8)

    @staticmethod
    def _shown(truth, stages):
        return {"truth": truth} | {row: pixels.labels for row, pixels in stages.items()}

    def _label_picture(self, labels):
        n = self._dataset.num_classes
        return _indexed(np.where(labels == piecewise.VOID, n, labels), (*self._dataset.palette[:n], VOID_COLOUR))

    def _cells(self, figures, i):
        """What the inspector shows of an image: cells of the image alone, without the padding of its frame."""
        # By way of the host: images lie on all devices, parameters on one.
        unary, parts, mask = jax.device_get(jax.tree.map(lambda x: x[i], figures["nodes"]))
        last = lambda name: (self._params[f"pairwise_{name}"][key] for key in ("last_kernel", "last_bias"))
        layers = {name: tuple(last(name)) for name in self._boxes}
        before, after, added, counts = jax.device_get(self._last_update(unary, parts, mask, layers))
        rows, cols = (int(np.asarray(mask).any(axis).sum()) for axis in (1, 0))
        cut = lambda x: np.asarray(x)[:rows, :cols]
        percent = lambda x: _packed(cut(np.exp(x)), 1000)
        return dict(
            grid=[rows, cols],
            truth=_packed(cut(figures["truth"][i]), 1),
            unary=percent(jax.nn.log_softmax(mean_field.tempered(unary, self._crf)[0])),
            sent=_packed(cut(before).argmax(-1), 1),
            after=percent(after),
            messages={name: _packed(cut(x), 100) for name, x in added.items()},
            counts={name: _packed(cut(x), 1) for name, x in counts.items()},
        )

    # ---------------------------------------------------------------------------------------------- writing

    def data(self, result: dict) -> dict:
        """What the page embeds, as plain JSON values, from the result of `evaluate.evaluate`."""
        rows = list(self._bins)
        c, crf = self._config, self._crf
        every = [self._change_figures(pair, counts) for pair, counts in self._changes.items()]
        return dict(
            about=dict(
                dataset=self._dataset.name,
                split=result["split"],
                images=result["num_images"],
                step=result["step"],
                checkpoint=result["checkpoint"],
                refine=result["refine"],
                tuned_on=result.get("tuned_on"),
                iterations=crf.num_iterations,
                damping=crf.damping,
                unary_temperature=c.crf.unary_temperature,
                label_weights=bool(c.crf.label_weights),
                average_messages=crf.average_messages,
                frame=list(c.data.eval_size),
                grid=list(self._grid),
                void=self._void,
                bins=BINS,
                model_relations=len(c.model.relations),
            ),
            classes=[
                dict(name=name, colour=list(colour), scored=not result["classes"] or name in result["classes"])
                for name, colour in zip(self._dataset.class_names, self._dataset.palette, strict=False)
            ],
            titles={row: evaluate.row_title(row) for row in result["rows"]},
            stages=rows,
            rows=result["rows"],
            confusion={row: self._confusion[row].tolist() for row in result["rows"]},
            changes=every,
            iterations={row: result["change"][row] for row in result["rows"] if row in result["change"]},
            calibration={row: _calibration(self._bins[row]) for row in rows},
            relations=[self._relation(name) for name in self._boxes],
            gallery=self._gallery.entries(),
            inspector=dict(wanted=self._wanted, room=self._room, images=self._inspected.entries()),
            colours=dict(
                entropy=[list(x) for x in entropy_colours()],
                change={name: list(x) for name, x in zip(CHANGES, _CHANGE_COLOURS, strict=True)},
                void=list(VOID_COLOUR),
            ),
        )

    def _change_figures(self, pair, counts):
        named = dict(zip(CHANGES, counts.tolist(), strict=True))
        return {"from": pair[0], "to": pair[1], "pixels": int(counts.sum())} | named

    def _relation(self, name):
        layer = self._params[f"pairwise_{name}"]
        kernel, bias = (np.asarray(layer[k], np.float64) for k in ("last_kernel", "last_bias"))
        *total, edges = self._hidden[name]
        scores = np.einsum("m,mkl->kl", np.array(total) / max(edges, 1), kernel) + bias
        scores = scores * configs.label_weights(self._config).get(name, 1.0)
        kind = self._config.relations[name].parameterisation or self._config.model.parameterisation
        return dict(
            name=name,
            weight=configs.relation_weights(self._config)[name],
            parameterisation=kind,
            offsets=self._boxes[name],
            edges=int(edges),
            scores=np.round(scores, 4).tolist(),
        )

    def write(self, result: dict) -> int:
        """Writes the page, whole or not at all; returns its size in bytes."""
        page = importlib.resources.files("pwcrf_jax.report") / "page"
        html = page.joinpath("page.html").read_text("utf-8")
        html = html.replace("/* style */", page.joinpath("page.css").read_text("utf-8"))
        scripts = [page.joinpath(name).read_text("utf-8") for name in ("basics.js", "figures.js", "pictures.js")]
        html = html.replace("/* script */", "\n".join(scripts))
        # No name of a class or an image can end the element that it stands in.
        data = json.dumps(self.data(result), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        content = html.replace("/* data */", data).encode()
        files.write(self.file, content)
        return len(content)


def default_file(workdir: str, split: str) -> str:
    """WORKDIR/report_SPLIT.html."""
    return os.path.join(workdir, f"report_{evaluate.file_name(split)}.html")


def _calibration(bins):
    """Of (number, sum of confidence, number right) in each bin: the curve, and the expected calibration error."""
    number, confidence, right = bins
    total, share = number.sum(), lambda a, n: float(a / n) if n else None
    mean = lambda x: [share(a, n) for a, n in zip(x, number, strict=True)]
    return dict(
        number=number.astype(int).tolist(),
        confidence=mean(confidence),
        accuracy=mean(right),
        ece=share(np.abs(right - confidence).sum(), total),
        mean_confidence=share(confidence.sum(), total),
    )


def _packed(x, scale):
    """Numbers times scale, rounded to integers of the fewest bytes: {"type", "scale", "data": base64}."""
    numbers = np.rint(np.asarray(x, np.float64) * scale)
    fits = lambda t: numbers.min(initial=0) >= np.iinfo(t).min and numbers.max(initial=0) <= np.iinfo(t).max
    kind = next(t for t in (np.uint8, np.int16, np.int32) if fits(t))
    data = numbers.astype(np.dtype(kind).newbyteorder("<")).tobytes()
    return dict(type=np.dtype(kind).name, scale=scale, data=base64.b64encode(data).decode())


def _reduced(image, method, side=SIDE):
    factor = min(1, side / max(image.size))
    return image.resize([max(1, round(n * factor)) for n in image.size], method) if factor < 1 else image


def _uri(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def _jpeg(image):
    return _uri(_reduced(Image.fromarray(image), Image.Resampling.LANCZOS), "JPEG", quality=75)


def _indexed(values, colours, **options):
    """A palette PNG of uint8 [H, W]; transparent: an index."""
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette([int(x) for colour in colours for x in colour])
    if "transparent" in options:
        options["transparency"] = options.pop("transparent")
    return _uri(_reduced(image, Image.Resampling.NEAREST), "PNG", optimize=True, **options)


def _entropy_picture(entropy):
    """PNG of float32 [H, W] from 0 to 1, of half the side: noise makes it the largest of the PNGs."""
    small = np.asarray(_reduced(Image.fromarray(entropy), Image.Resampling.BOX, SIDE // 2))
    return _indexed(np.minimum(small * 16, 15), entropy_colours())


def entropy_colours() -> list[tuple[int, int, int]]:
    """16 colours from sure to unsure."""
    at = np.linspace(0, len(_ENTROPY_ANCHORS) - 1, 16)
    channels = [np.interp(at, range(len(_ENTROPY_ANCHORS)), channel) for channel in zip(*_ENTROPY_ANCHORS, strict=True)]
    return [(int(round(r)), int(round(g)), int(round(b))) for r, g, b in zip(*channels, strict=True)]
