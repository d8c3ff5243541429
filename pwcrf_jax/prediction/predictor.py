"""Marginals of images of any size, at full resolution, with test-time augmentation.

Test-time augmentation (config.tta) shows the model several views of an image: scaled, and each of them mirrored too.
Every view has its own tiles and its own mean field; at each pixel the probabilities of all views are then averaged.
"""

import collections
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pwcrf_jax import config as configs
from pwcrf_jax.data import given_scores
from pwcrf_jax.data.readers.image_io import MEAN_COLOUR
from pwcrf_jax.model import decode
from pwcrf_jax.model.segmenter import Potentials, potentials_of
from pwcrf_jax.potentials import factored_pairwise
from pwcrf_jax.prediction import tiling
from pwcrf_jax.runtime import parallel

COLUMNS = 64  # pixels are read in blocks whose width is a multiple of it, so that few programs are compiled
BLOCK = 2**24  # numbers in such a block, about


class Predictor:
    """Predicts images with a trained model; one tile on each of this host's devices at a time.

    config, model, params: of `restore.load`, or `restore.restore_params`.

    The offsets of a relation are the model's, whatever the size of the image: they do not grow with it.

    Raises:
      ConfigError: config.tiles cannot work with config.model.scales.
    """

    def __init__(self, config, model, params):
        self._params = params
        self.num_classes = model.num_classes
        self._scales, self._frame = config.model.scales, config.data.eval_size
        self._tile = config.tiles.size or tuple(3 * n for n in config.data.eval_size)
        self._overlap, self._stride = config.tiles.overlap, configs.featmap_net(config).stride
        self._per_cell = config.data.scores.per_cell
        flips = (False, True) if config.tta.flip else (False,)
        self._kinds = tuple(itertools.product(config.tta.scales, flips))
        # Refused here rather than at the first large image.
        self._layout(tuple(n + 2 * side for n, side in zip(self._frame, self._tile, strict=True)))
        crf = configs.crf_settings(config)
        names = tuple(crf.weights)
        self._devices = jax.local_devices()
        step = make_potentials_step(model, names)
        self._networks = parallel.pmap_eval(step, devices=self._devices, per_image=True)
        boxes = {name: box for name, box in model.relations if name in names}
        self._last_layers = {
            name: (params[f"pairwise_{name}"]["last_kernel"], params[f"pairwise_{name}"]["last_bias"]) for name in names
        }
        decode_one = functools.partial(_decode, boxes=boxes, settings=crf)
        self._decode = jax.jit(decode_one, static_argnames="canvas")

    def __call__(self, images):
        """Predicts (key, image uint8 [H, W, 3]) pairs in turn: yields (key, image, `Marginals`) of each, in order.

        With a model that is given scores, (key, image, log-probabilities float32 [h, w, K] of the image).
        """
        waiting, tiles = collections.deque(), []
        for key, image, *scores in images:
            views = [self._view(image, *kind, *scores) for kind in self._kinds]
            waiting.append((key, image, views))
            for view in views:
                for corner in view.layout.corners:
                    tiles.append((view, corner))
                    if tiles[0][0].layout.tile != view.layout.tile:  # another program
                        self._run(tiles[:-1])
                        tiles = tiles[-1:]
                    if len(tiles) == len(self._devices):
                        self._run(tiles)
                        tiles = []
            while waiting and not any(view.waiting for view in waiting[0][2]):
                yield self._finish(*waiting.popleft())
        if tiles:
            self._run(tiles)
        while waiting:
            yield self._finish(*waiting.popleft())

    def _layout(self, size):
        try:
            return tiling.layout(size, self._frame, self._tile, self._overlap, self._scales, stride=self._stride)
        except ValueError as error:
            raise configs.ConfigError(f"config.tiles with config.model.scales = {self._scales}: {error}") from None

    def _view(self, image, scale, mirrored, scores=None):
        size = tuple(max(1, round(n * scale)) for n in image.shape[:2])
        if size != image.shape[:2]:
            image = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        layout = self._layout(size)
        if scores is not None:
            rows, cols = ((0.0, whole / n) for n, whole in zip(size, layout.canvas, strict=True))
            cols = (1.0, 1.0 - cols[1]) if mirrored else cols
            scores = given_scores.on_grid(scores, tuple(self._per_cell * n for n in layout.grid), rows, cols)
        return _View(image[:, ::-1] if mirrored else image, layout, mirrored, scores)

    def _run(self, tiles):
        """The networks on at most as many tiles as there are devices, all of one size."""
        inputs = [view.inputs(corner) for view, corner in tiles]
        # Devices without a tile of their own work on the last one again.
        inputs += inputs[-1:] * (len(self._devices) - len(tiles))
        batch = {key: np.stack([one[key] for one in inputs]) for key in inputs[0]}
        _, maps = self._networks(self._params, parallel.split(batch, len(self._devices)))
        for i, (view, corner) in enumerate(tiles):
            view.add(corner, jax.tree.map(lambda x, i=i: x[i, 0], maps))

    def _finish(self, key, image, views):
        read = []
        for view in views:
            layout = view.layout
            box = np.array([[0, 0, *layout.size]], np.int32)
            decoded = self._decode(*view.blended(), self._last_layers, box, canvas=layout.canvas)
            decoded = jax.tree.map(np.asarray, decoded)
            read.append(View(decoded, layout._replace(grid=decoded.mask.shape), view.mirrored))
        return key, image, Marginals(image.shape[:2], read)


def _decode(unary, parts, refinement_logits, fine_unary, last_layers, valid_box, *, boxes, settings, canvas):
    """`decode.Decoded` of one image, without its axis, from what the networks say of its canvas."""
    pairs = {
        name: factored_pairwise(p[None], q[None], *last_layers[name], boxes[name]) for name, (p, q) in parts.items()
    }
    one = lambda x: None if x is None else x[None]
    potentials = Potentials(unary[None], pairs, one(refinement_logits), one(fine_unary))
    decoded = decode.decode(potentials, valid_box, canvas, settings)
    return decode.Decoded(decoded.log_marginals[0], decoded.mask[0])


class _View:
    """One view of an image on its way through the networks; holds sums over the tiles that were seen so far.

    scores: of the canvas, float32 [n h, n w, K] on n times the cells of the grid a side, or None.
    """

    def __init__(self, image, layout, mirrored, scores=None):
        self._scores = scores
        self.layout, self.mirrored = layout, mirrored
        self.waiting = len(layout.corners)
        self._image = image
        self._sums, self._dtypes = None, None
        self._weight = np.zeros(layout.grid, np.float32)

    def inputs(self, corner):
        """What the networks see of a tile: its pixels, and its scores where there are some."""
        if self._scores is None:
            return {"image": self._pixels(corner)}
        n = self._scores.shape[0] // self.layout.grid[0]
        rows, cols = (slice(n * cells.start, n * cells.stop) for cells in self.layout.cells(corner))
        return {"image": self._pixels(corner), "scores": self._scores[rows, cols]}

    def _pixels(self, corner):
        """A tile, uint8 [height, width, 3]; what lies outside of the image has the mean colour."""
        out = np.empty((*self.layout.tile, 3), np.uint8)
        out[:] = MEAN_COLOUR
        inside = self._image[tuple(slice(at, at + n) for at, n in zip(corner, self.layout.tile, strict=True))]
        out[: inside.shape[0], : inside.shape[1]] = inside
        return out

    def add(self, corner, maps):
        """maps: a tree of [h, w, ...], what the networks say of the tile, some of it on a finer grid."""
        maps = jax.tree.map(np.asarray, maps)
        self.waiting -= 1
        if len(self.layout.corners) == 1:
            self._sums = maps
            return
        weights, where = self.layout.weights(corner), self.layout.cells(corner)
        times = lambda x: x.shape[0] // self.layout.tile_grid[0]
        if self._sums is None:
            self._dtypes = jax.tree.map(lambda x: x.dtype, maps)
            whole = lambda x: (*(n * times(x) for n in self.layout.grid), x.shape[-1])
            self._sums = jax.tree.map(lambda x: np.zeros(whole(x), np.float32), maps)
        for total, x in zip(jax.tree.leaves(self._sums), jax.tree.leaves(maps), strict=True):
            n = times(x)
            place = tuple(slice(n * cells.start, n * cells.stop) for cells in where)
            total[place] += x.astype(np.float32) * _finer(weights, n)
        self._weight[where] += weights

    def blended(self):
        """The means over tiles, in the types of the networks' output."""
        maps, self._sums = self._sums, None
        if len(self.layout.corners) == 1:
            return maps
        mean = lambda x, dtype: (x / _finer(self._weight, x.shape[0] // self.layout.grid[0])).astype(dtype)
        return jax.tree.map(mean, maps, self._dtypes)


def _finer(weights, times):
    """[h, w] -> [h * times, w * times, 1]."""
    return weights.repeat(times, 0).repeat(times, 1)[..., None]


class View(NamedTuple):
    """One view of an image, decoded: of `layout`, the grid that of `decoded`; mirrored: left to right."""

    decoded: decode.Decoded
    layout: tiling.Layout
    mirrored: bool = False


class Marginals:
    """Marginals of all pixels of an image, computed block by block where they are asked for.

    size: (height, width). num_classes: K.
    """

    def __init__(self, size: tuple[int, int], views: Sequence[View]):
        self.size = size
        self._maps = tuple(view.decoded for view in views)
        self._seen = [(view.layout, view.mirrored) for view in views]
        self.num_classes = views[0].decoded.log_marginals.shape[-1]

    @classmethod
    def of_frame(cls, log_marginals: np.ndarray, valid_box: np.ndarray, frame: tuple[int, int]) -> "Marginals":
        """Those of an image in the upper left corner of a frame: log marginals [h, w, K] of a map of all of it."""
        grid = log_marginals.shape[:2]
        mask = np.asarray(decode.grid_mask(valid_box[None], grid, frame)[0])
        layout = tiling.whole_frame(valid_box[2:].tolist(), frame, grid)
        return cls(layout.size, [View(decode.Decoded(log_marginals, mask), layout)])

    def labels(self) -> np.ndarray:
        """The best class of each pixel, uint8 [H, W]."""
        return self._all(_labels, np.empty(self.size, np.uint8))

    def log_probs(self) -> np.ndarray:
        """Log-probabilities, float32 [H, W, K]."""
        return self._all(_log_probs, np.empty((*self.size, self.num_classes), np.float32))

    def _all(self, fn, out):
        height, width = self.size
        columns = -(-width // COLUMNS) * COLUMNS
        rows = BLOCK // (columns * self.num_classes)
        rows = 2 ** int(np.log2(max(1, min(rows, 2 * height - 1))))
        # A block may reach over the image; its last row and column are then computed again.
        pixels = np.minimum(np.arange(columns), width - 1)
        cols = tuple(tiling.taps(pixels, width, layout, 1, mirrored) for layout, mirrored in self._seen)
        for first in range(0, height, rows):
            pixels = np.minimum(np.arange(first, first + rows), height - 1)
            block = tuple(tiling.taps(pixels, height, layout, 0) for layout, _ in self._seen)
            out[first : first + rows] = np.asarray(fn(self._maps, block, cols))[: height - first, :width]
        return out


@jax.jit
def _log_probs(maps, rows, cols):
    """Log of the mean over views of their marginals at pixels, float32 [n, m, K]."""
    return functools.reduce(jnp.logaddexp, map(decode.log_probs, maps, rows, cols)) - np.log(len(maps))


@jax.jit
def _labels(maps, rows, cols):
    if len(maps) == 1:  # as evaluation has it
        return decode.labels(maps[0], rows[0], cols[0])
    return jnp.argmax(_log_probs(maps, rows, cols), axis=-1).astype(jnp.uint8)


def make_potentials_step(model, names):
    """Builds step(params, {"image": uint8 [B, H, W, 3]}) -> ((), (unary [B, h, w, K], {relation: (p, q)}, logits,
    fine)).

    p, q: hidden_p and hidden_q [B, h, w, M] of the potentials of the named relations. logits, fine: refinement_logits
    and fine_unary of `pwcrf_jax.model.segmenter.Potentials`. "scores" beside the image: of a model that takes them.
    """

    def step(params, batch):
        unary, pairs, logits, fine = potentials_of(model, params, batch)
        return (), (unary, {name: (pairs[name].hidden_p, pairs[name].hidden_q) for name in names}, logits, fine)

    return step
