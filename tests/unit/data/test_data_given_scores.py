"""Scores that go with their images: on which cells they come to lie, and which files are refused."""

import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pwcrf_jax.data import DataError, given_scores
from pwcrf_jax.data.given_scores import GivenScores, ScoreFiles, on_grid
from pwcrf_jax.data.pipeline import _Augment
from pwcrf_jax.model import decode
from pwcrf_jax.model.segmenter import Potentials, Segmenter

WHOLE = (0.0, 1.0)


def log_probs(rng, *shape):
    scores = rng.normal(0, 2, shape).astype(np.float32)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def test_cells_have_the_mean_probability_of_their_pixels():
    """On the scores' own grid they are the scores; on a finer one they are interpolated."""
    scores = log_probs(np.random.default_rng(0), 6, 8, 3)
    np.testing.assert_allclose(on_grid(scores, (6, 8), WHOLE, WHOLE), scores, atol=1e-6)
    blocks = np.exp(scores).reshape(3, 2, 2, 4, 3).mean((1, 3))
    np.testing.assert_allclose(np.exp(on_grid(scores, (3, 2), WHOLE, WHOLE)), blocks, atol=1e-6)
    # Linearly between centres, which lie at 0.5, 1.5, ...: a cell of half a row has a quarter of the next one.
    line = np.log(np.array([[0.2, 0.8], [0.6, 0.4]], np.float32))[None]
    finer = on_grid(line, (1, 4), WHOLE, WHOLE)[0]
    (low, high), shares = line[0] @ [1, -1], np.array([0, 0.25, 0.75, 1])
    np.testing.assert_allclose(finer @ [1, -1], low + shares * (high - low), atol=1e-6)
    np.testing.assert_allclose(np.exp(finer).sum(-1), 1, atol=1e-6)
    mirrored = on_grid(scores, (3, 2), WHOLE, (1.0, 0.0))
    np.testing.assert_allclose(mirrored, on_grid(scores, (3, 2), WHOLE, WHOLE)[:, ::-1], atol=1e-6)


def test_beside_an_image_scores_are_uniform_and_lend_nothing():
    scores = log_probs(np.random.default_rng(1), 4, 4, 3)
    framed = on_grid(scores, (6, 5), (0.0, 1.5), (0.0, 1.25))
    np.testing.assert_allclose(framed[:4, :4], scores, atol=1e-6)
    np.testing.assert_allclose(np.exp(framed[4:]), 1 / 3, atol=1e-6)
    np.testing.assert_allclose(np.exp(framed[:, 4:]), 1 / 3, atol=1e-6)
    half = on_grid(scores, (1, 1), (0.5, 1.5), WHOLE)
    np.testing.assert_allclose(np.exp(half)[0, 0], np.exp(scores[2:]).mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(np.exp(on_grid(scores, (2, 2), (2.0, 3.0), WHOLE)), 1 / 3, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 4])
def test_scores_move_with_their_image(stride):
    """Scaled, mirrored and cropped: red and green of the image, and what the scores say of a cell, stay the same."""
    height, width, crop, grid = 120, 160, (96, 80), (6, 5)
    down, across = (np.arange(n, dtype=np.float32) / n for n in (height, width))
    ramp = np.stack(np.broadcast_arrays(down[:, None], across, 0 * across), -1)
    probs = ramp.reshape(height // stride, stride, width // stride, stride, 3).mean((1, 3)) / 2
    probs[..., 2] = 1 - probs[..., 0] - probs[..., 1]
    given = GivenScores(lambda name, size: np.log(np.maximum(probs, 1e-6)), grid)
    augment = _Augment(crop, (0.6, 1.4), True, 0, (0, 0, 0), scores=given)
    sample = {"image": Image.fromarray((255 * ramp).astype(np.uint8)), "label": np.zeros((height, width), np.uint8)}
    seen, mirrored = 0, set()
    for g in range(12):
        out = augment(sample | {"id": "a"}, g)
        top, left, bottom, right = out["valid_box"]
        cells = out["image"].astype(np.float32).reshape(6, 16, 5, 16, 3).mean((1, 3)) / 255
        whole = np.s_[-(-top // 16) : bottom // 16, -(-left // 16) : right // 16]
        shown = cells[whole][..., :2] / 2
        np.testing.assert_allclose(np.exp(out["scores"][whole][..., :2]), shown, atol=0.012)
        seen += shown.shape[0] * shown.shape[1]
        mirrored.add(bool(shown[0, 0, 1] > shown[0, -1, 1]))
    assert seen > 100 and mirrored == {True, False}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(2)
    (tmp_path / "street").mkdir()
    np.save(tmp_path / "a.npy", log_probs(rng, 20, 30, 3))
    np.save(tmp_path / "street/b.npy", log_probs(rng, 5, 8, 3))
    return str(tmp_path)


def test_files_are_read_by_the_names_of_images(folder):
    files = pickle.loads(pickle.dumps(ScoreFiles(folder, 3)))  # as processes that read have them
    assert files("a", (20, 30)).shape == (20, 30, 3) and files("street/b", (20, 30)).shape == (5, 8, 3)
    shown = GivenScores(files, (2, 3)).shown("a", (20, 30), WHOLE, WHOLE)
    assert shown.shape == (2, 3, 3) and shown.dtype == np.float32


@pytest.mark.parametrize(
    ("num_classes", "sizes", "told"),
    [
        (3, {"a": (20, 30), "c": (20, 30), "d": (9, 9)}, "no scores of image 'c', and 1 more images have none; write "),
        (4, {"a": (20, 30)}, "a.npy: has 3 classes"),
        (3, {"a": (30, 20)}, "height and width are swapped"),
        (3, {"a": (10, 15)}, "larger than the image"),
    ],
)
def test_files_that_do_not_fit_are_refused(folder, num_classes, sizes, told):
    with pytest.raises(DataError, match=told):
        ScoreFiles(folder, num_classes).check(sizes)


def test_no_folder_is_refused(folder):
    with pytest.raises(DataError, match=r"data\.scores\.dir: is empty"):
        ScoreFiles("", 3)
    with pytest.raises(DataError, match="is no folder"):
        ScoreFiles(f"{folder}/x", 3)


class Splits:
    """A data set of some images a split, of one label each, half of it void."""

    def source(self, split):
        label = np.zeros((8, 8), np.uint8)
        label[:, 4:] = 255
        open = lambda i: {"id": f"{split}{i}", "label": label}
        source = types.SimpleNamespace(open=open, id=lambda i: f"{split}{i}", image_size=lambda i: (8, 8))
        return type("Source", (), {"__len__": lambda _: 50, **{k: staticmethod(v) for k, v in vars(source).items()}})()


@pytest.mark.parametrize(("of_train", "warned"), [(0.98, True), (0.82, False), (0.5, False)])
def test_scores_of_images_that_were_trained_on_are_warned_of(of_train, warned, tmp_path):
    """By accuracy where there is a label: half of the images is void."""
    rng = np.random.default_rng(3)
    for split, right in {"train": of_train, "val": 0.8}.items():
        for i in range(50):
            wrong = rng.random((8, 8)) > right
            np.save(tmp_path / f"{split}{i}.npy", np.log(np.where(np.stack([wrong, ~wrong], -1), 0.1, 0.9)))
    files = ScoreFiles(str(tmp_path), 2)
    told, warnings = given_scores.compared(Splits(), "train", "val", files)
    assert "25 images of 'train'" in told and bool(warnings) == warned
    found, count = given_scores.accuracy(Splits(), "train", files)
    assert count == 25 and found == pytest.approx(of_train, abs=0.04)


# --- what the model makes of them ----------------------------------------------------------------------

FEATMAP = dict(backbone="tiny", scales=(1.0,), block6=(), pyramid_windows=())


def test_the_unary_of_a_cell_is_the_mean_of_its_scores():
    model = Segmenter(num_classes=3, featmap=FEATMAP, relations={}, unary="scores", hidden=4)
    scores, images = log_probs(np.random.default_rng(4), 2, 4, 6, 3), np.zeros((2, 32, 48, 3), np.uint8)
    coarse, fine = model._given(jnp.asarray(scores), images)
    np.testing.assert_allclose(np.exp(coarse), np.exp(scores).reshape(2, 2, 2, 3, 2, 3).mean((2, 4)), atol=1e-6)
    np.testing.assert_allclose(fine, scores, atol=1e-6)
    assert model._given(coarse, images)[1] is None
    with pytest.raises(ValueError, match=r"expected scores \[B, n \* 2, n \* 3, 3\]"):
        model._given(jnp.zeros((2, 4, 7, 3)), images)


def test_without_messages_labels_are_those_of_the_finer_scores():
    """At every pixel, whatever the temperature; and a message is added to them."""
    scores = log_probs(np.random.default_rng(5), 1, 4, 6, 3)
    unary, box = np.log(np.exp(scores).reshape(1, 2, 2, 3, 2, 3).mean((2, 4))), np.array([[0, 0, 32, 48]])
    potentials = Potentials(jnp.asarray(unary), {}, fine_unary=jnp.asarray(scores))
    settings = decode.mean_field.Settings(num_iterations=0, weights={}, unary_temperature=2.5)
    decoded = decode.decode(potentials, box, (32, 48), settings)
    assert decoded.mask.shape == (1, 4, 6)
    np.testing.assert_array_equal(
        decode.frame_labels(decoded, (32, 48)), np.argmax(decode.upsample(scores, (32, 48)), -1)
    )
    np.testing.assert_allclose(decoded.log_marginals, jax.nn.log_softmax(scores / 2.5), atol=1e-5)
    said = np.zeros((1, 2, 3, 3), np.float32)
    said[..., 1] = 50.0
    after = decode.Decoded(jax.nn.log_softmax(unary / 2.5 + said), decoded.mask[:, ::2, ::2])
    more = decode.with_fine_unary(after, potentials, box, (32, 48), settings)
    assert (np.argmax(more.log_marginals, -1) == 1).all()
