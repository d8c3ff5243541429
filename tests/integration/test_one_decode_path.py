"""One way from potentials to labels: those that eval scores, predict writes, export returns and the report shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax.data.readers.image_io import MEAN_COLOUR
from pwcrf_jax.evaluation import evaluate, evaluators
from pwcrf_jax.model import decode
from pwcrf_jax.nets import grid_size
from pwcrf_jax.prediction import export, predictor, restore
from pwcrf_jax.report import parts

UINT8, INT32 = np.uint8, np.int32

MODELS = {
    "relations": ({"crf.weights": (0.3,)}, (96, 128)),
    "several scales, an odd frame": ({"model.scales": (1.2, 0.7), "crf.weights": (0.3,)}, (101, 131)),
    "a temperature and weights of labels": (
        {
            "crf.weights": (0.3,),
            "crf.unary_temperature": 2.5,
            "crf.label_weights": (((0.5, 1.0, 2.0, 1.0, 0.1, 1.0), (1.0, 3.0, 1.0, 0.2, 1.0, 0.0)),) * 2,
        },
        (96, 128),
    ),
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


KEPT = [row for name, row in MODELS.items() if name in ("relations", "no relation")]


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory):
    with small.programs(tmp_path_factory):
        yield


def framed(images, frame):
    """The batch that `eval_batches` makes of images."""
    batch = {
        "image": np.full((len(images), *frame, 3), MEAN_COLOUR, UINT8),
        "label": np.zeros((len(images), *frame), UINT8),
        "valid_box": np.array([(0, 0, *image.shape[:2]) for image in images], INT32),
    }
    for out, image in zip(batch["image"], images, strict=True):
        out[: image.shape[0], : image.shape[1]] = image
    return batch


def labels_of_all_paths(config, images, frame):
    """{path: labels of each image, in a frame or not}."""
    model, row = configs.build_model(config), configs.final_row(config)
    params, batch = random_params(model), framed(images, frame)
    names = tuple(configs.crf_relations(config))
    shown = tuple(configs.table_rows(config)) + (row,)
    figures = parts.make_figures(shown, names)
    of_eval = evaluate.make_eval_fn(config, model, devices=jax.devices()[:1])
    of_report = evaluate.make_eval_fn(config, model, devices=jax.devices()[:4], keep=shown, figures=figures)
    one, four = (
        evaluators.Seen(0, batch, fn(params, evaluate.inputs_of(batch, n))[1], {}, {}, {})
        for fn, n in ((of_eval, 1), (of_report, 4))
    )
    kept = zip(one.log_marginals(row), batch["valid_box"], strict=True)
    pixels = four.per_image.figures["pixels"][row]
    of_file = export.lower(export.make_predictor(config, model, params, frame), frame)
    predicted = predictor.Predictor(config, model, params)(enumerate(images))  # an image on each of eight devices
    return {
        "eval": one.labels(row),
        "eval on four devices": four.labels(row),
        "the report": evaluators.without_devices(pixels.labels),
        "what is refined image by image": [predictor.Marginals.of_frame(*x, frame).labels() for x in kept],
        "predict": [marginals.labels() for _, _, marginals in predicted],
        "the exported program": np.asarray(of_file.call(batch["image"], batch["valid_box"][:, 2:])),
    }


@pytest.mark.parametrize(("changes", "frame"), full_but(MODELS.values(), *KEPT), ids=MODELS)
def test_all_paths_give_the_same_labels(changes, frame, tmp_path):
    """At every pixel of images of odd sizes."""
    config = small.config(tmp_path, **changes, **{"data.eval_size": frame})
    rng = np.random.default_rng(1)
    height, width = frame
    sizes = [frame, (height - 1, width - 1), (height - 20, 61), (33, width), (height, 17), (1, 1), (5, 64), (17, 3)]
    found = labels_of_all_paths(config, [noise(rng, *size) for size in sizes], frame)
    scored = found.pop("eval")
    assert len(np.unique(scored)) >= 2, "one class would hide everything"
    for path, labels in found.items():
        for (rows, cols), want, got in zip(sizes, scored, labels, strict=True):
            np.testing.assert_array_equal(got[:rows, :cols], want[:rows, :cols], err_msg=f"{path}, {rows} x {cols}")


@pytest.mark.parametrize("spread", [1e-6, 1e-7])
@pytest.mark.parametrize(
    ("frame", "size", "classes"),
    [((96, 128), (75, 91), 5), ((101, 131), (101, 131), 21), ((240, 320), (233, 311), 11), ((67, 45), (31, 45), 2)],
)
def test_labels_are_read_alike_where_scores_almost_tie(frame, size, classes, spread, monkeypatch):
    """To the last bit: as evaluation reads them, prediction, in blocks of few rows, and the exported predictor."""
    monkeypatch.setattr(predictor, "BLOCK", 2**13)
    grid = grid_size(frame, (1.0,))
    cells = (-1.6 + spread * np.random.default_rng(0).normal(size=(3, *grid, classes))).astype(np.float32)
    box = np.array([(0, 0, *size)] * 3, INT32)

    def labels(cells, box):
        decoded = decode.Decoded(cells, decode.grid_mask(box, grid, frame))
        return decode.frame_labels(decoded, frame)

    scored = np.asarray(jax.jit(labels)(cells, box))[:, : size[0], : size[1]]
    one = lambda cells, box: labels(cells[None], box[None])[0]
    exported = np.asarray(jax.jit(jax.vmap(one))(cells, box))[:, : size[0], : size[1]]
    predicted = np.stack([predictor.Marginals.of_frame(x, box[0], frame).labels() for x in cells])
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
    got = decode.upsample(jnp.asarray(x)[None], pixels, jnp.asarray(mask)[None])[0]
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
        reached = np.asarray(decode.upsample(of_cell, pixels)) > 0
        got = decode.upsample(np.where(of_cell > 0, np.float32(-np.inf), x), pixels)
        one = decode.upsample(x[0], pixels, np.ones(cells, bool))
    plain = decode.upsample(x, pixels)
    assert reached.any() and not reached.all()
    np.testing.assert_array_equal(got, np.where(reached, -np.inf, plain))
    np.testing.assert_array_equal(one, plain[0])


@pytest.mark.parametrize(("grid", "frame"), [((3, 4), (48, 64)), ((7, 5), (101, 67)), ((9, 6), (5, 64))])
def test_cells_of_a_box_have_their_centres_in_it(grid, frame):
    """Or hold its first pixel, where it is too thin to have a centre along an axis; a box of nothing has no cell."""
    rng = np.random.default_rng(4)
    low, high = np.sort(rng.integers(0, np.array([[frame]]) + 1, (2, 300, 2)), axis=0)
    boxes = np.concatenate([low, high], 1).astype(INT32)
    boxes[:6] = [
        (0, 0, 0, 0),
        (0, 0, 1, 1),
        (0, 0, *frame),
        (*np.subtract(frame, 1), *frame),
        (1, 0, 1, 3),
        (2, 2, 3, 3),
    ]
    expected = np.zeros((300, *grid), bool)
    for box, out in zip(boxes, expected, strict=True):
        axes = []
        for n, pixels, first, end in zip(grid, frame, box[:2], box[2:], strict=True):
            cells = [i for i in range(n) if first <= (i + 0.5) * pixels / n < end]
            axes.append(cells or ([int(first) * n // pixels] if end > first else []))
        out[np.ix_(*axes)] = True
    np.testing.assert_array_equal(decode.grid_mask(boxes, grid, frame), expected)
