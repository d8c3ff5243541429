"""Images of many sizes in frames of few: programs are shared, results are those of each image alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pwcrf_jax import dense_crf, gaussian

K = 2
SMOOTHNESS = dense_crf.Params(1.5, (1.0, 2.0), None)
BOTH = SMOOTHNESS._replace(appearance_compat=2.5, appearance_sxy=9.0, appearance_srgb=40.0)


def problem(seed, height, width):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    image = np.kron(coarse, np.ones((8, 8, 1)))[:height, :width] + rng.integers(-9, 9, (height, width, 3))
    log_p = np.log(rng.dirichlet(np.ones(K), (height, width))).astype(np.float32)
    return log_p, image.clip(0, 255).astype(np.uint8)


def compiled(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]


@pytest.mark.full
def test_frames_change_nothing():
    log_p, image = problem(0, 67, 70)
    framed, info = dense_crf.refine(log_p, image, BOTH, 3)
    alone, without = jax.jit(lambda p, x: dense_crf.refine(p, x, BOTH, 3, radius=8))(log_p, image)
    assert framed.shape == log_p.shape and np.abs(framed - log_p).max() > 0.3
    np.testing.assert_allclose(framed, alone, atol=2e-5)
    np.testing.assert_allclose(info.change, without.change, atol=2e-5)
    assert info.num_vertices == without.num_vertices and not info.exceeded


def test_sizes_of_a_frame_share_their_program(caplog):
    run = lambda *size, **mask: dense_crf.refine(*problem(1, *size), SMOOTHNESS, 2, **mask)[0]
    run(66, 70)
    with jax.log_compiles(True):
        assert run(80, 65).shape == (80, 65, K)
        run(71, 79, mask=np.ones((71, 79), bool))
        assert not compiled(caplog)
        run(66, 81)
        assert compiled(caplog)  # that it is counted at all


def test_a_mask_of_the_caller_holds_inside_the_frame():
    log_p, image = problem(2, 70, 75)
    mask = np.random.default_rng(2).random((70, 75)) > 0.3
    framed = dense_crf.refine(log_p, image, SMOOTHNESS, 2, mask=mask)[0]
    alone = jax.jit(lambda p, x, m: dense_crf.refine(p, x, SMOOTHNESS, 2, mask=m, radius=8)[0])(log_p, image, mask)
    np.testing.assert_allclose(framed, alone, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(framed)[~mask], log_p[~mask])


def test_values_outside_of_the_image_are_not_looked_at_and_those_inside_are():
    log_p, image = problem(3, 66, 70)
    log_p[3, 4] = np.nan
    with pytest.raises(ValueError, match="got NaN"):
        dense_crf.refine(log_p, image, SMOOTHNESS, 1)


def test_constants_of_a_traced_function_may_be_framed():
    log_p, image = problem(1, 66, 70)
    got = jax.jit(lambda w: w * dense_crf.refine(log_p, image, SMOOTHNESS, 2)[0])(2.0)
    np.testing.assert_allclose(got, 2 * dense_crf.refine(log_p, image, SMOOTHNESS, 2)[0], rtol=1e-5)


def test_the_result_lies_where_the_scores_do():
    log_p, image = problem(1, 66, 70)
    device = jax.devices()[-1]
    framed = dense_crf.refine(jax.device_put(log_p, device), jax.device_put(image, device), SMOOTHNESS, 2)[0]
    assert isinstance(framed, jax.Array) and framed.devices() == {device}


@pytest.mark.full
def test_images_of_a_batch_are_refined_each_by_itself():
    images = [problem(seed, 33, 20) for seed in range(4)]
    log_p, image = (np.stack(x).reshape(2, 2, *x[0].shape) for x in zip(*images, strict=True))
    together, info = dense_crf.refine(log_p, image, BOTH, 2)
    assert together.shape == log_p.shape and info.change.shape == (2, 2, 2)
    vertices = 0
    for i, one in zip(np.ndindex(2, 2), images, strict=True):
        alone, without = dense_crf.refine(*one, BOTH, 2)
        np.testing.assert_array_equal(together[i], alone)
        np.testing.assert_array_equal(info.change[:, *i], without.change)
        vertices += int(without.num_vertices)
    assert info.num_vertices == vertices and not info.exceeded


def test_the_filter_is_chosen_by_the_image_not_by_its_frame(monkeypatch):
    monkeypatch.setattr(gaussian, "EXACT_POINTS", {jax.default_backend(): 66 * 70})
    assert [gaussian.resolve_method("auto", n) for n in (66 * 70, 66 * 70 + 1)] == ["exact", "lattice"]
    seen = []
    monkeypatch.setattr(
        dense_crf, "_refine", lambda *args, method, **_: (seen.append(method), (jnp.zeros((1, 1, 1)),) * 2)[1]
    )
    dense_crf.refine(*problem(4, 66, 70), BOTH, 1)
    assert seen == ["exact"]


def test_sides_of_frames():
    assert [dense_crf.frame_side(n) for n in (1, 11, 64, 65, 80, 81, 128, 129, 375, 500, 512, 513, 2048)] == [
        1, 11, 64, 80, 80, 96, 128, 160, 375, 500, 512, 640, 2048,
    ]  # fmt: skip
    sides = np.arange(1, 5000)
    frames = np.array([dense_crf.frame_side(int(n)) for n in sides])
    assert (frames >= sides).all() and (frames < 1.25 * sides + 1).all()
    assert sorted(set(frames[(sides > 256) & (sides <= 512)])) == [320, 375, 384, 448, 500, 512]
