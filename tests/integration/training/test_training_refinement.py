"""--refine and pwcrf tune: frames, devices, the row of the table, and a search that can be stopped."""

import itertools
import json
import pathlib
import shutil

import commands
import jax
import numpy as np
import pytest
from rows import full_row

from pwcrf_jax import config as configs
from pwcrf_jax import dense_crf
from pwcrf_jax.evaluation import evaluate, kernel_search, tuning
from pwcrf_jax.evaluation import steps as eval_steps
from pwcrf_jax.prediction import refinement, restore
from pwcrf_jax.runtime import checkpoint

ROOT = pathlib.Path(__file__).parents[3]
K = 4
PARAMS = dense_crf.Params(
    smoothness_compat=1.0, smoothness_sxy=1.5, appearance_compat=2.0, appearance_sxy=10.0, appearance_srgb=60.0
)
SETTINGS = configs.RefineSettings(PARAMS, num_iterations=3, method="lattice")
SPATIAL = SETTINGS._replace(params=PARAMS._replace(appearance_compat=None))


def sample(sizes, frame, grid=(8, 12), seed=0):
    """Marginals and a batch whose images have `sizes` inside `frame`; what lies outside differs from seed to seed."""
    rng, noise = np.random.default_rng(0), np.random.default_rng(seed)
    marginals = np.asarray(jax.nn.log_softmax(2 * rng.normal(size=(len(sizes), *grid, K)).astype(np.float32)))
    image = noise.integers(0, 256, (len(sizes), *frame, 3)).astype(np.uint8)
    label = np.full((len(sizes), *frame), 255, np.uint8)
    for i, (height, width) in enumerate(sizes):
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
        smooth = coarse.repeat(8, 0).repeat(8, 1)[:height, :width] + rng.integers(-9, 9, (height, width, 3))
        image[i, :height, :width] = smooth.clip(0, 255)
        label[i, :height, :width] = (
            rng.integers(0, K, (height // 8 + 1, width // 8 + 1)).repeat(8, 0).repeat(8, 1)[:height, :width]
        )
    return marginals, dict(image=image, label=label, valid_box=np.array([(0, 0, *size) for size in sizes], np.int32))


def by_hand(marginals, batch, params, num_iterations):
    """One image after the other at its own size, without frames."""
    from pwcrf_jax.model import decode

    total = 0
    for log_marginals, image, label, box in zip(marginals, *batch.values(), strict=True):
        _, _, height, width = box
        if not height:
            continue
        frame = label.shape
        mask = decode.grid_mask(box[None], log_marginals.shape[:2], frame)
        log_probs = jax.nn.log_softmax(decode.upsample(log_marginals[None], frame, mask)[0, :height, :width])
        out, _ = dense_crf.refine(log_probs, image[:height, :width], params, num_iterations, method="lattice")
        counts = np.zeros((K, K), int)
        for p, t in zip(np.asarray(out).argmax(-1).ravel(), label[:height, :width].ravel(), strict=True):
            if t != 255:
                counts[t, p] += 1
        total = total + counts
    return total


@pytest.mark.parametrize("settings", [full_row(SPATIAL), SETTINGS], ids=["spatial", "full"])
@pytest.mark.full
def test_images_of_all_sizes_in_one_batch(settings):
    """Empty entries count for nothing, and neither the frame nor what is in it outside the image is seen."""
    sizes = [(60, 90), (96, 70), (0, 0), (17, 33)]
    marginals, batch = sample(sizes, (96, 96))
    confusion, change = refinement.refine_batch(marginals, batch, settings)
    np.testing.assert_array_equal(confusion[0], by_hand(marginals, batch, settings.params, 3))
    assert change.shape == (3,) and change[0] > 0
    again, _ = refinement.refine_batch(*sample(sizes, (96, 96), seed=1), settings)
    np.testing.assert_array_equal(again, confusion)
    assert np.all(confusion[1:].sum((1, 2)) < confusion[0].sum())
    assert np.all(np.diff(confusion[1:].sum((1, 2))) >= 0), "the wider band holds the narrower"


def test_few_sizes_of_frames():
    sizes = itertools.product(range(200, 500, 7), range(200, 500, 7))
    frames = {refinement.frame_of(*size, (500, 500)) for size in sizes}
    assert len(frames) <= 25
    for size in ((1, 1), (64, 64), (65, 500), (500, 449)):
        frame = refinement.frame_of(*size, (500, 500))
        assert all(n <= f <= min(500, n + refinement.BUCKET - 1) for n, f in zip(size, frame, strict=True))
    before = refinement._compiled.cache_info().misses
    for size in ((130, 130), (140, 190), (192, 192)):
        refinement.refine_batch(*sample([size], (200, 200)), SPATIAL)
    assert refinement._compiled.cache_info().misses == before + 1


@pytest.mark.full
def test_a_lattice_that_is_too_small_is_built_again():
    marginals, batch = sample([(78, 80)], (80, 80))
    batch["image"] = np.random.default_rng(3).integers(0, 256, batch["image"].shape).astype(np.uint8)
    params = PARAMS._replace(appearance_sxy=2.0, appearance_srgb=3.0)  # each pixel has vertices of its own
    tight = SETTINGS._replace(params=params, num_iterations=1)
    one = dense_crf.refine(
        np.full((78, 80, K), -np.log(K), np.float32), batch["image"][0, :78], params, 1, method="lattice"
    )[1]
    assert one.exceeded
    got, _ = refinement.refine_batch(marginals, batch, tight)
    exact, _ = refinement.refine_batch(marginals, batch, tight._replace(method="exact"))
    # Kernels this narrow see little but the pixel itself, in either filter.
    assert np.abs(got[0] - exact[0]).sum() < 0.02 * got[0].sum()


@pytest.mark.full
def test_the_row_of_the_table(trained, tmp_path):
    config = configs.load(trained / "config.json")
    workdir = shutil.copytree(trained, tmp_path / "work")
    plain = evaluate.evaluate(config, str(workdir))
    config.refine.num_iterations = 0
    idle = evaluate.evaluate(config, str(workdir), refine="full")
    assert list(idle["rows"]) == [*plain["rows"], "refined"]
    # Without iterations refinement is the upsampling itself, so all of the path is checked.
    assert idle["rows"]["refined"] == idle["rows"]["all"] == plain["rows"]["all"]
    config.refine.num_iterations = 2
    config.refine.appearance_compat = config.refine.smoothness_compat = 20.0
    full = evaluate.evaluate(config, str(workdir), refine="full")
    assert full["rows"]["refined"] != full["rows"]["all"] == plain["rows"]["all"]
    assert len(full["change"]["refined"]) == 2 and full["change"]["refined"][0] > 0
    assert "+ refinement" in evaluate.table(full) and "IoU 3 px" in evaluate.table(full)
    figures = evaluate.summary(full)
    assert figures["miou_refined"] == pytest.approx(100 * full["rows"]["refined"]["miou"], abs=1e-3)
    assert figures["boundary_iou_5px_refined"] is not None


def test_means_over_chosen_classes(trained):
    config = configs.load(trained / "config.json")
    whole = evaluate.evaluate(config, str(trained))
    names = list(whole["rows"]["all"]["iou"])[:2]
    config.eval.classes = tuple(names)
    some = evaluate.evaluate(config, str(trained))
    assert some["rows"]["all"]["iou"] == whole["rows"]["all"]["iou"]
    assert some["rows"]["all"]["miou"] == pytest.approx(np.mean([some["rows"]["all"]["iou"][n] for n in names]))
    text = evaluate.table(some)
    assert "mean IoU of 2" in text and f"\n{names[0]} " in text and "\n(" in text


@pytest.fixture
def searched(trained, tmp_path):
    """(config, workdir) for a search of a few trials over four images."""
    config = configs.load(trained / "config.json")
    config.refine.num_iterations = 1
    return config, shutil.copytree(trained, tmp_path / "work")


@pytest.mark.full
def test_a_search_that_is_stopped_goes_on(searched, monkeypatch):
    config, workdir = searched
    whole = tuning.tune(config, str(workdir), "best", "val[:8]", "full", 4)
    notes = next((workdir / "tuning").iterdir())
    kernels = next(notes.glob("marginals-*/refine-full.jsonl"))  # beside the marginals that they are trials of
    assert len(kernels.read_text().splitlines()) == 4
    assert json.loads((workdir / "tuned.json").read_text()) == json.loads(json.dumps(whole))
    best = max(json.loads(line)["miou"] for line in kernels.read_text().splitlines())
    assert whole["miou_after"] == best
    trials = [json.loads(line) for line in (notes / "messages.jsonl").read_text().splitlines()]
    best = max(trials, key=lambda trial: trial["miou"])
    assert whole["miou_messages"] == best["miou"] >= whole["miou_before"]
    assert {trial["num_iterations"] for trial in trials} == {1, 2, 3, 5, 10, 20}
    assert whole["config"]["crf.weights"] == [best["surrounding"], best["above_below"]]
    assert whole["config"]["crf.num_iterations"] == best["num_iterations"] == whole["conditions"]["crf.num_iterations"]

    # Stopped in the third trial, while its line was being written.
    shutil.rmtree(workdir / "tuning")
    (workdir / "tuned.json").unlink()
    score, calls = tuning._score_kernels, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*args)

    with monkeypatch.context() as m:
        m.setattr(tuning, "_score_kernels", stops)
        with pytest.raises(KeyboardInterrupt):
            tuning.tune(config, str(workdir), "best", "val[:8]", "full", 4)
    assert not (workdir / "tuned.json").exists()
    with open(kernels, "a") as f:
        f.write('{"smoothness_compat": 1.')
    calls.clear()
    monkeypatch.setattr(tuning, "_score_kernels", lambda *args: (calls.append(args), score(*args))[1])
    monkeypatch.setattr(tuning, "_score_messages", lambda *_: pytest.fail("messages were scored again"))
    monkeypatch.setattr(eval_steps, "make_eval_step", lambda *_, **__: pytest.fail("marginals were computed again"))
    assert tuning.tune(config, str(workdir), "best", "val[:8]", "full", 4) == whole
    assert len(calls) == 2


@pytest.mark.parametrize("max_trials", [0, 1, 7, 12, 100])
def test_kernels_tried_again_are_no_trials(config, tmp_path, monkeypatch, max_trials):
    """The best of a smooth function within factors of two, each kernel scored once and no more of them than allowed."""
    target = dict(smoothness_compat=1.5, appearance_compat=2.5, appearance_srgb=3.25, appearance_sxy=160.0)
    target |= dict(smoothness_sxy=3.0)
    calls = []

    def score(config, dataset, split, marginals, settings, what):
        calls.append(tuple(getattr(settings.params, name) for name in kernel_search.KERNELS))
        assert what == f"trial {len(calls)}"
        off = (abs(np.log(getattr(settings.params, name) / target[name])) for name in kernel_search.KERNELS)
        return 0.9 - 0.05 * sum(off)

    monkeypatch.setattr(tuning, "_score_kernels", score)
    found, miou = tuning.tune_kernels(config, None, "val", str(tmp_path), [], "full", max_trials)
    assert len(calls) == len(set(calls)) <= max_trials and (max_trials == 100 or len(calls) == max_trials)
    if max_trials == 100:
        assert found.params == dense_crf.Params(**target) and miou == pytest.approx(0.9)
        assert len(calls) < 40
    again = len(calls)
    assert tuning.tune_kernels(config, None, "val", str(tmp_path), [], "full", max_trials) == (found, miou)
    assert len(calls) == again


@pytest.mark.full
def test_each_candidate_is_scored_with_its_own_weights_and_iterations(searched):
    config, workdir = searched
    model, params, _, dataset = restore.load(config, str(workdir), "best", "val[:8]")
    candidates = [(0.0, 3.0, 2), (50.0, 50.0, 1), (50.0, 50.0, 5), (0.0, 0.0, 2), (7.0, 90.0, 2)]
    found = tuning._score_messages(config, model, params, dataset, "val[:8]", candidates, "")
    for candidate, miou in zip(candidates, found, strict=True):
        config.crf.weights, config.crf.num_iterations = candidate[:-1], candidate[-1]
        rows = evaluate.evaluate(config, str(workdir), split="val[:8]")["rows"]
        assert miou == pytest.approx(rows["all"]["miou"])
    assert len(set(found)) > 2


def test_the_number_of_iterations_is_taken_and_a_condition(config, tmp_path):
    write = lambda **values: (tmp_path / "tuned.json").write_text(json.dumps(values))
    conditions = configs.tuning_conditions(config)
    assert config.crf.num_iterations == conditions["crf.num_iterations"] == 3
    chosen = {"crf.weights": [0.5, 2.0], "crf.num_iterations": 20}
    write(config=chosen, conditions=conditions | {"crf.num_iterations": 20}, split="val")
    tuned = configs.apply_tuned(config, str(tmp_path))
    assert config.crf.num_iterations == 20 and config.crf.weights == (0.5, 2.0)
    configs.check_tuned(config, tuned, str(tmp_path))
    config.crf.num_iterations = 5  # by a flag: the weights were not chosen with it
    with pytest.raises(
        configs.ConfigError, match=r"config\.crf\.num_iterations = 5, .* was chosen with 20; tune again"
    ):
        configs.check_tuned(config, tuned, str(tmp_path))
    # A file of before, when weights alone were chosen.
    config.crf.num_iterations = 3
    write(config={"crf.weights": [0.5, 2.0]}, conditions=conditions, split="val")
    configs.check_tuned(config, configs.apply_tuned(config, str(tmp_path)), str(tmp_path))
    assert config.crf.num_iterations == 3


def test_without_iterations_there_is_nothing_to_search(searched):
    config, workdir = searched
    config.crf.num_iterations = 0
    found = tuning.tune(config, str(workdir), "best", "val[:8]", "spatial", 1)
    assert set(found["config"]) == {"refine.smoothness_compat", "refine.smoothness_sxy"}
    assert found["miou_before"] == found["miou_messages"]
    notes = next((workdir / "tuning").iterdir())
    assert len((notes / "messages.jsonl").read_text().splitlines()) == 1


@pytest.mark.full
def test_other_settings_start_another_search(searched):
    config, workdir = searched
    tuning.tune(config, str(workdir), "best", "val[:8]", "spatial", 1)
    tuning.tune(config, str(workdir), "best", "val[8:]", "spatial", 1)
    config.crf.num_iterations = 1
    tuning.tune(config, str(workdir), "best", "val[8:]", "spatial", 1)
    assert len(list((workdir / "tuning").iterdir())) == 3
    _, params, step, dataset = restore.load(config, str(workdir), "best", "val")
    folder = lambda p: tuning._folder(config, str(workdir), p, dataset, "val", step)
    assert folder(params) == folder(jax.tree.map(np.copy, params))
    assert folder(params) != folder(jax.tree.map(lambda x: x + 1, params)), "trained again, with as many steps"


@pytest.mark.parametrize("split", ["test", "val+test[:10%]", "test_public", "voc_test", "Testset[:3]"])
def test_nothing_is_chosen_on_a_test_split(searched, split):
    config, workdir = searched
    with pytest.raises(configs.ConfigError, match="never chosen on a test split"):
        tuning.tune(config, str(workdir), "best", split, "full", 1)
    assert not (workdir / "tuning").exists()


@pytest.mark.full
def test_the_kept_marginals_are_those_of_the_chosen_weights(searched):
    config, workdir = searched
    weights = (0.0, 3.0)
    model, params, _, dataset = restore.load(config, str(workdir), "best", "val[:8]")
    (workdir / "kept").mkdir()
    config.crf.weights, config.crf.num_iterations = weights, 2
    files = tuning._marginals(config, model, params, dataset, "val[:8]", folder=str(workdir / "kept"), row="all")
    config.refine.num_iterations = 0
    plain = evaluate.evaluate(config, str(workdir), split="val[:8]")
    score = tuning._score_kernels(config, dataset, "val[:8]", files, configs.refine_settings(config, "full"), "")
    assert score == pytest.approx(plain["rows"]["all"]["miou"])


def _run(command, *args):
    done = commands.run(["-m", "pwcrf_jax", command, *args])
    return done, json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


@pytest.mark.full
def test_eval_takes_what_tuning_wrote_and_flags_come_before_it(searched):
    _, workdir = searched
    small = ["--config.refine.num_iterations=1", "--split", "val[:8]"]
    done, tuned = _run("tune", "--workdir", str(workdir), "--trials", "2", *small)
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stderr and tuned["split"] == "val[:8]"
    done, out = _run("eval", "--workdir", str(workdir), "--refine", "full", *small)
    assert "chosen on split val[:8]" in done.stderr
    assert out["miou_all"] == pytest.approx(100 * tuned["miou_messages"], abs=1e-3)
    assert out["miou_refined"] == pytest.approx(100 * tuned["miou_after"], abs=1e-3)
    stored = json.loads((workdir / "eval_val__8_.json").read_text())
    assert stored["tuned_on"] == "val[:8]"
    assert stored["config"]["refine"]["appearance_compat"] == tuned["config"]["refine.appearance_compat"]

    _, out = _run("eval", "--workdir", str(workdir), "--config.crf.weights=(0.,)", *small)
    assert out["miou_all"] == out["miou_unary"]
    done, _ = _run("eval", "--workdir", str(workdir), "--notuned", *small)
    assert "tuned.json" not in done.stderr and done.returncode == 0
    done, _ = _run("tune", "--workdir", str(workdir), "--split", "test")
    assert done.returncode == 2 and "test split" in done.stderr


@pytest.mark.parametrize(
    "text",
    ['{"config": {"model.hidden": 3}, "split": "val"}', "[]", "{", '{"config": {"refine.x": 1}}', '{"config": 1}'],
)
def test_a_damaged_file_of_tuned_values_is_refused(config, tmp_path, text):
    assert configs.apply_tuned(config, str(tmp_path)) is None
    (tmp_path / "tuned.json").write_text(text)
    with pytest.raises(configs.ConfigError, match="tuned.json cannot be used .*delete it"):
        configs.apply_tuned(config, str(tmp_path))


def test_a_search_needs_a_trained_workdir(config, tmp_path):
    configs.save(config, tmp_path / "config.json")
    with pytest.raises(checkpoint.CheckpointError, match="train first"):
        tuning.tune(config, str(tmp_path), "best", "", "full", 1)


def test_wrong_settings_are_refused_by_name(config):
    for key, value in (("smoothness_sxy", 0.0), ("num_iterations", -1), ("appearance_srgb", "x")):
        broken = config.copy_and_resolve_references()
        with broken.ignore_type():
            broken.refine[key] = value
        with pytest.raises(configs.ConfigError, match=f"config.refine.{key}"):
            configs.validate(broken)
