"""Labels are read at pixels in one way: what evaluation scores is what prediction writes and the export returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax.data.readers.image_io import MEAN_COLOUR
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.model import segmenter
from pwcrf_jax.nets import grid_size
from pwcrf_jax.prediction import export, restore, tiling
from pwcrf_jax.prediction import predictor as inference
from pwcrf_jax.runtime import parallel

UINT8, INT32 = np.uint8, np.int32

MODELS = {
    "relations": ({"crf.weights": (0.3,)}, (96, 128)),
    "several scales, an odd frame": ({"model.scales": (1.2, 0.7), "crf.weights": (0.3,)}, (101, 131)),
    "no relation": ({"model.relations": (), "crf.num_iterations": 0}, (101, 131)),
    "refinement convolutions, a map finer than the image": (
        {"model.scales": (2.6,), "model.refinement_convs.layers": ("conv1",), "model.refinement_convs.width": 4},
        (53, 67),
    ),
}


def random_params(model):
    """Of which every layer has a say: last layers start at zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.asarray(x) + rng.normal(0, 0.4, x.shape).astype(np.float32), restore.init_params(model, 0)
    )


def noise(rng, height, width):
    coarse = rng.integers(0, 256, (-(-height // 9), -(-width // 9), 3)).astype(np.uint8)
    return coarse.repeat(9, 0).repeat(9, 1)[:height, :width]


KEPT = [row for name, row in MODELS.items() if name in (next(iter(MODELS)), "no relation") or "refinement" in name]


@pytest.mark.parametrize(("changes", "frame"), full_but(MODELS.values(), *KEPT), ids=MODELS)
def test_scored_labels_are_predicted_labels(changes, frame, tmp_path):
    """At every pixel of images of odd sizes: by the evaluation step, into files, and by the exported predictor."""
    config = small.config(tmp_path, **changes, **{"data.eval_size": frame})
    model = configs.build_model(config)
    params = random_params(model)
    rng = np.random.default_rng(1)
    height, width = frame
    sizes = [frame, (height - 1, width - 1), (height - 20, 61), (33, width), (height, 17), (1, 1), (5, 64), (17, 3)]
    images = [noise(rng, *size) for size in sizes]
    batch = {"image": np.full((8, *frame, 3), MEAN_COLOUR, UINT8), "label": np.zeros((8, *frame), UINT8)}
    batch["valid_size"] = np.array(sizes, INT32)
    for framed, image in zip(batch["image"], images, strict=True):
        framed[: image.shape[0], : image.shape[1]] = image
    row = configs.final_row(config)
    fn = parallel.pmap_eval(evaluate.eval_step(config, model, labels_of=(row,)), jax.devices()[:1], per_image=True)
    scored = np.asarray(fn(params, parallel.split(batch, 1))[1][row])[0]
    predicted = [
        marginals.labels() for _, _, marginals in inference.Predictor(config, model, params)(enumerate(images))
    ]
    exported = np.asarray(
        jax.jit(export.make_predictor(config, model, params, frame))(batch["image"], batch["valid_size"])
    )
    assert len(np.unique(scored)) >= 2, "one class would hide everything"
    for size, *three in zip(sizes, scored, predicted, exported, strict=True):
        first, second, third = (x[: size[0], : size[1]] for x in three)
        np.testing.assert_array_equal(first, second, err_msg=f"{size}")
        np.testing.assert_array_equal(second, third, err_msg=f"{size}")


@pytest.mark.parametrize("spread", [1e-6, 1e-7])
@pytest.mark.parametrize(
    ("frame", "size", "classes"),
    [((96, 128), (75, 91), 5), ((101, 131), (101, 131), 21), ((240, 320), (233, 311), 11), ((67, 45), (31, 45), 2)],
)
def test_labels_are_read_alike_where_scores_almost_tie(frame, size, classes, spread, monkeypatch):
    """To the last bit: as evaluation reads them, prediction, in blocks of few rows, and the exported predictor."""
    monkeypatch.setattr(inference, "BLOCK", 2**13)
    grid = grid_size(frame, (1.0,))
    cells = (-1.6 + spread * np.random.default_rng(0).normal(size=(3, *grid, classes))).astype(np.float32)
    valid = np.array([size] * 3, INT32)

    def labels(cells, valid):
        mask = segmenter.grid_mask(valid, grid, frame)
        return jnp.argmax(segmenter.upsample(cells, *frame, mask), axis=-1)

    scored = np.asarray(jax.jit(labels)(cells, valid))[:, : size[0], : size[1]]
    one = lambda cells, valid: labels(cells[None], valid[None])[0]
    exported = np.asarray(jax.jit(jax.vmap(one))(cells, valid))[:, : size[0], : size[1]]
    layout = tiling.layout(size, frame, frame, 0.5, (1.0,))
    mask = np.asarray(segmenter.grid_mask(valid[:1], grid, frame)[0])
    predicted = np.stack([inference.Marginals(size, [(x, mask, layout, False)]).labels() for x in cells])
    np.testing.assert_array_equal(predicted, scored)
    np.testing.assert_array_equal(exported, scored)
    assert len(np.unique(scored)) == classes


@pytest.mark.parametrize(
    ("cells", "pixels"), [((3, 4), (48, 64)), ((5, 7), (71, 99)), ((6, 2), (6, 2)), ((1, 9), (13, 5))]
)
def test_reading_is_bilinear_interpolation_of_the_valid_cells(cells, pixels):
    """By loops over pixels and the cells around them; what lies in masked cells is never read."""
    rng = np.random.default_rng(2)
    x, mask = rng.normal(size=(*cells, 3)).astype(np.float32), rng.random(cells) > 0.3
    expected = np.zeros((*pixels, 3))
    for i, j in np.ndindex(*pixels):
        at = [(k + 0.5) * n / m - 0.5 for k, n, m in zip((i, j), cells, pixels, strict=True)]
        total = 0.0
        for cell in np.ndindex(*cells):
            weight = np.prod([max(0.0, 1 - abs(a - c)) for a, c in zip(at, cell, strict=True)]) * mask[cell]
            expected[i, j] += weight * x[cell]
            total += weight
        expected[i, j] /= max(total, 1e-6)
    x[~mask] = np.nan
    got = segmenter.upsample(jnp.asarray(x)[None], *pixels, jnp.asarray(mask)[None])[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("cells", "pixels"), [((3, 4), (9, 12)), ((3, 4), (3, 4)), ((5, 7), (71, 99)), ((4, 2), (20, 6)), ((1, 3), (13, 5))]
)
def test_a_label_ruled_out_at_a_cell_is_ruled_out_where_the_cell_is_read(cells, pixels):
    """At a cell's own centre its neighbours count for nothing: minus infinity times 0 was NaN there."""
    x = np.random.default_rng(3).normal(size=(2, *cells, 3)).astype(np.float32)
    of_cell = np.zeros((2, *cells, 3), np.float32)
    of_cell[0, 0, 1, 2] = 1
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        reached = np.asarray(segmenter.upsample(of_cell, *pixels)) > 0
        got = segmenter.upsample(np.where(of_cell > 0, np.float32(-np.inf), x), *pixels)
        one = segmenter.upsample(x[0], *pixels, np.ones(cells, bool))
    plain = segmenter.upsample(x, *pixels)
    assert reached.any() and not reached.all()
    np.testing.assert_array_equal(got, np.where(reached, -np.inf, plain))
    np.testing.assert_array_equal(one, plain[0])
