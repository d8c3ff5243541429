"""`pwcrf crf`: the dense CRF on folders of images and scores."""

import json
import os
import re
import sys
import time
import weakref

import commands
import numpy as np
import pytest
from absl import flags
from PIL import Image
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax import metrics
from pwcrf_jax.cli import command, crf
from pwcrf_jax.config import parameters
from pwcrf_jax.data import DataError
from pwcrf_jax.evaluation import intervals, kernel_search
from pwcrf_jax.evaluation import score_folder as scoring
from pwcrf_jax.model import decode
from pwcrf_jax.prediction import crf_folder, refinement, score_folder
from pwcrf_jax.runtime.files import FileError

CLASSES = 3


def scene(folder, name, size=(18, 24), noise=1.5, seed=0, stride=1):
    """An image of a disk on a ground, its mask, and logits [K, H, W] that are noisy."""
    rng = np.random.default_rng([seed, *name.encode()])
    y, x = np.mgrid[: size[0], : size[1]]
    truth = ((y - size[0] / 2) ** 2 + (x - size[1] / 2) ** 2 < size[0] ** 2 / 9).astype(np.uint8)
    truth[-3:] = 2
    colours = np.array([[40, 40, 40], [200, 60, 60], [60, 60, 220]])[truth] + rng.normal(0, 8, (*size, 3))
    logits = 2.0 * (truth[..., None] == np.arange(CLASSES)) + rng.normal(0, noise, (*size, CLASSES))
    for kind in ("images", "masks", "scores"):
        (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(folder / f"images/{name}.png")
    Image.fromarray(np.where(y < 1, 255, truth).astype(np.uint8)).save(folder / f"masks/{name}.png")
    np.save(folder / f"scores/{name}.npy", np.moveaxis(logits[::stride, ::stride], -1, 0).astype(np.float32))
    return logits.astype(np.float32), truth


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of six scenes, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "street/d", "street/e", "f"):
        scene(tmp_path, name)
    return tmp_path


@pytest.fixture
def run(here, monkeypatch, capsys):
    """run(*words): the JSON of the command in this process; run.code and run.out what else it left."""

    def run(*words):
        given = {word.partition("=")[0] for word in words}
        values = flags.FlagValues()
        argv = ["pwcrf crf", *(word for word in INPUTS if word.partition("=")[0] not in given), *words]
        crf.define_flags(values)
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
        chosen_on = command.parse(argv, values, lambda argv: crf.define_config(argv, values))
        run.code = 0
        try:
            crf.main(chosen_on)
        except SystemExit as end:
            run.code = end.code
        run.out = capsys.readouterr().out
        return json.loads(run.out.splitlines()[-1])

    return run


INPUTS = ("--images=images", "--scores=scores", "--output=out")
TRUTH = ("--masks=masks", "--evaluate")


@pytest.fixture
def refined(monkeypatch):
    """Stands for the dense CRF: labels stay, but for the strength of its kernels; the images are listed."""
    seen = []

    def refine(log_probs, image, settings):
        seen.append(image.tobytes())
        return log_probs * (1 + settings.params.appearance_compat), None

    counts = lambda *given: np.stack([scoring.confusion(*given)] * 3)
    monkeypatch.setattr(refinement, "refine_image", refine)
    monkeypatch.setattr(scoring, "_counted", counts)  # which compiles
    return seen


def tree(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def table_of(folder):
    return {path: (folder / path).read_bytes() for path in tree(folder)}


# --- what is written --------------------------------------------------------------------------------------


def test_labels_overlays_and_probabilities(here, run, refined):
    logits, _ = scene(here, "a", (18, 26), stride=2)
    result = run("--overlays", "--probabilities", "--precision=float32")
    names = ("a", "b", "c", "f", "street/d", "street/e")
    files = {f"{kind}/{n}.{end}" for n in names for kind, end in
             (("labels", "png"), ("overlays", "jpg"), ("probabilities", "npy"))}  # fmt: skip
    assert tree(here / "out") == files | {"classes.json", "crf.json", "crf.lock", "done.jsonl"}
    assert (result["num_images"], result["failed"], result["kind"], result["layout"]) == (6, [], "logits", "chw")
    probs = np.load(here / "out/probabilities/a.npy")
    assert probs.shape == (18, 26, 3) and probs.dtype == np.float32
    image = Image.open(here / "out/labels/a.png")
    assert image.mode == "P" and np.array_equal(image, probs.argmax(-1))
    assert np.array_equal(image, score_folder.at_pixels(logits[::2, ::2], (18, 26)).argmax(-1))
    assert Image.open(here / "out/overlays/a.jpg").size == (26, 18)


@pytest.mark.parametrize(("height", "width"), full_but([(18, 25), (5, 25), (5, 7), (6, 8)], (18, 25)))
def test_maps_are_read_at_pixels_as_the_decoder_reads_them(height, width):
    log_probs = np.random.default_rng(0).normal(0, 1, (5, 7, 4)).astype(np.float32)
    log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
    expected = np.asarray(decode.upsample(log_probs, (height, width)))
    expected = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    np.testing.assert_allclose(score_folder.at_pixels(log_probs, (height, width)), expected, atol=2e-6)


def test_label_images_with_a_confidence(here, run, refined):
    for path in (here / "scores").rglob("*.npy"):
        path.unlink()
    for path in (here / "masks").rglob("*.png"):
        path.rename(here / "scores" / path.relative_to(here / "masks"))
    result = run("--num_classes=3", "--confidence=0.7")
    assert (result["kind"], result["num_classes"]) == ("labels", 3)
    found, given = (np.asarray(Image.open(here / f"{kind}/a.png")) for kind in ("out/labels", "scores"))
    assert np.array_equal(found[1:], given[1:])


def test_classes_have_their_names_and_colours_and_masks_their_coding(here, run, refined):
    lines = "ground 10 20 30\ndisk 200 0 0\nfloor 0 0 200\nvoid 0 0 0\n"
    (here / "classes.txt").write_text(lines)
    colours = np.zeros((256, 3), np.uint8)
    colours[:3] = [(10, 20, 30), (200, 0, 0), (0, 0, 200)]
    for path in (here / "masks").rglob("*.png"):
        Image.fromarray(colours[np.asarray(Image.open(path))]).save(path)
    run("--classes=classes.txt", *TRUTH)
    assert "\nfloor " in run.out
    assert json.loads((here / "out/classes.json").read_text())[1] == {"name": "disk", "colour": [200, 0, 0]}
    assert Image.open(here / "out/labels/a.png").getpalette()[3:6] == [200, 0, 0]


# --- going on ---------------------------------------------------------------------------------------------


def test_what_was_stopped_goes_on_and_ends_the_same(here, run, refined, monkeypatch):
    run("--overwrite")
    whole, refine, left = table_of(here / "out"), refinement.refine_image, [2]
    (here / "out").rename(here / "whole")

    def stops(*given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return refine(*given)

    monkeypatch.setattr(refinement, "refine_image", stops)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(refinement, "refine_image", refine)
    (here / "out/labels/.0123456789abcdef.partial").touch()
    del refined[:]
    run()
    assert len(refined) == 4 and table_of(here / "out") == whole


def test_what_has_changed_since_is_done_again(here, run, refined):
    run()
    scene(here, "a", seed=1)
    (here / "out/labels/b.png").unlink()
    with open(here / "out/done.jsonl", "a") as file:
        file.write('{"name": "c", "sta')  # a line that was cut off
    del refined[:]
    run()
    assert len(refined) == 2
    run("--overlays")
    assert len(refined) == 8
    run("--overlays", *TRUTH)
    assert len(refined) == 8


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config.refine.appearance_srgb=5"], "was made with appearance_srgb = 13.0, now 5.0; name another folder"),
        (["--kind=log_probabilities"], "was made with kind = .logits., now .log_probabilities.; name another folder"),
        (["--probabilities", "--precision=float16"], "was made with probabilities = .float32., now .float16."),
        (["--tune", "--masks=masks"], "was made with tuning = null, now {"),
    ],
)
def test_an_output_of_other_settings_is_refused_and_overwritten(here, run, refined, monkeypatch, words, says):
    monkeypatch.setattr(kernel_search, "search", lambda score, base, *_: (base, 0.5))
    for path in (here / "scores").rglob("*.npy"):
        np.save(path, -np.abs(np.load(path)))  # which any kind but probabilities may be
    run("--probabilities", "--precision=float32")
    before = table_of(here / "out")
    with pytest.raises(configs.ConfigError, match=says):
        run(*words)
    assert table_of(here / "out") == before
    del refined[:]
    run(*words, "--overwrite")
    assert len(refined) >= 6 and table_of(here / "out")["crf.json"] != before["crf.json"]


def test_a_folder_that_holds_something_else_is_refused(here, run, refined):
    (here / "out").mkdir()
    (here / "out/mine.txt").touch()
    with pytest.raises(DataError, match="--output=out: the folder is not empty; name another one, or add --overwrite"):
        run()
    run("--overwrite")
    assert (here / "out/mine.txt").exists()


def test_two_do_not_write_into_one_folder(here, run, refined):
    folder = score_folder.scan("images", "scores", "out", score_folder.Given(), "", 1e6)
    asked = crf_folder.question(folder, configs.refine_settings(configs.defaults(), "full"), crf_folder.Wanted(), None)
    with crf_folder.claimed("out", asked, False):
        with pytest.raises(configs.ConfigError, match="another pwcrf crf .* is writing into --output out; let it end"):
            run()
    run()


# --- choosing and reporting -------------------------------------------------------------------------------


def test_images_that_parameters_are_chosen_on_are_not_reported(here, run, refined, monkeypatch):
    seen = {}

    def search(score, base, trials, mode, most):
        del refined[:]
        seen["miou"] = score(base._replace(params=base.params._replace(appearance_compat=1.0)), "trial 1")
        seen["tuned"] = list(refined)
        return base._replace(params=base.params._replace(appearance_compat=5.0)), seen["miou"]

    monkeypatch.setattr(kernel_search, "search", search)
    counted, truth = scoring._counted, []
    monkeypatch.setattr(scoring, "_counted", lambda *given: truth.append(given[1].shape) or counted(*given))
    for i, name in enumerate(("a", "b", "c", "street/d", "street/e", "f")):
        scene(here, name, (18, 24 + i))  # known by its width
    result = run("--tune", *TRUTH, "--tune_share=0.34")
    about = json.loads((here / "out/parameters.json").read_text())
    assert len(about["images"]) == len(seen["tuned"]) == 3 and result["reported"] == 3
    widths = {name: Image.open(here / f"images/{name}.png").size[0] for name in about["images"]}
    assert not {shape[1] for shape in truth} & set(widths.values()) and len(truth) == 6
    assert about["config"]["refine.appearance_compat"] == 5.0
    assert 0 < result["tuned_miou_crf"] < 100 and len(tree(here / "out/labels")) == 6
    # The file is used by a later run, which does not report them either, under whatever name they come.
    (here / "images/a.png").rename(here / "images/z.png")
    for kind, end in (("masks", "png"), ("scores", "npy")):
        (here / f"{kind}/a.{end}").rename(here / f"{kind}/z.{end}")
    del truth[:]
    result = run(*TRUTH, "--parameters=out/parameters.json", "--output=again")
    assert not {shape[1] for shape in truth} & set(widths.values()) and result["reported"] == 3
    assert json.loads((here / "again/crf.json").read_text())["appearance_compat"] == 5.0


def test_a_search_that_was_stopped_goes_on(here, run, refined, monkeypatch):
    monkeypatch.setattr(scoring, "_mean_iou", lambda counts, *_: 0.5)
    run("--tune", "--masks=masks", "--trials=3")
    (notes,) = (here / "out/tuning").glob("*/refine-full.jsonl")
    assert len(notes.read_text().splitlines()) == 3
    chosen = (here / "out/parameters.json").read_bytes()
    del refined[:]
    run("--tune", "--masks=masks", "--trials=3", "--probabilities")
    assert len(refined) == 6 and (here / "out/parameters.json").read_bytes() == chosen


def test_the_division_is_by_name_alone():
    item = lambda name: score_folder.Item(name, None, None, None, (1, 1))
    items = [item(str(i)) for i in range(40)]
    first, others = scoring.divide(items, 0.5)
    assert len(first) == 20 and {x.name for x in first} | {x.name for x in others} == {x.name for x in items}
    more = scoring.divide([item("new"), *items[::-1]], 0.5)[0]
    assert len({x.name for x in first} - {x.name for x in more}) <= 1
    assert scoring.divide(items, 1.0) == (items, [])
    for share in (0.0, 0.99):
        with pytest.raises(configs.ConfigError, match="add masks, or name another share"):
            scoring.divide(items, share)


def test_intervals_are_those_of_a_bootstrap_over_images():
    rng = np.random.default_rng(0)
    confusion = rng.integers(0, 50, (2, 12, 4, 4))
    confusion[:, :, 2] = confusion[:, :, :, 2] = 0  # a class that is nowhere
    confusion[:, 1:, 3] = confusion[:, 1:, :, 3] = 0  # and one on the first image alone
    before, after = (np.stack([intervals.reduced(x) for x in row]) for row in confusion)
    for scored in (None, [0, 3]):
        for row, counts in zip(confusion, (before, after), strict=True):
            figures = metrics.scores(row.sum(0), scored)
            assert np.isclose(intervals.mean_iou(counts.sum(0), scored), figures.mean_iou)
            assert np.isclose(intervals.pixel_accuracy(counts.sum(0)), figures.pixel_accuracy)
    found = intervals.paired(before, after, draws=300)
    picks = np.random.default_rng(1).integers(12, size=(300, 12))
    gains = [np.subtract(*(metrics.scores(row[pick].sum(0)).mean_iou for row in confusion[::-1])) for pick in picks]
    gain = found["miou"]["gain"]
    assert np.isclose(gain.value, found["miou"]["after"].value - found["miou"]["before"].value)
    np.testing.assert_allclose(gain[1:], np.percentile(gains, (2.5, 97.5)), atol=0.02)
    same = intervals.paired(before, before)["miou"]["gain"]
    assert same == (0, 0, 0)
    with pytest.raises(ValueError, match="expected counts of the same images"):
        intervals.paired(before, after[:3])


@pytest.mark.parametrize(
    ("gain", "number", "tuned", "says"),
    [
        ((0.02, 0.01, 0.03), 9, True, "The CRF gains +2.00 points of mean IoU [+1.00, +3.00], 95 % over 9 images."),
        ((0.02, -0.01, 0.03), 9, True, "The CRF gains nothing that these images show: .* covers 0; keep the scores as"),
        ((0.02, 0.0, 0.03), 9, False, "an interval that covers 0; keep the scores as they are, or choose parameters"),
        ((-0.02, -0.03, -0.01), 9, False, "The CRF makes these labels worse: -2.00 points .* with --tune."),
        ((0.02, 0.02, 0.02), 1, False, "One image has no interval"),
    ],
)
def test_what_the_crf_gains_is_said_in_plain_words(gain, number, tuned, says):
    said = scoring.verdict({"num_images": number, "intervals": {"miou": {"gain": gain}}}, tuned)
    assert re.search(re.escape(says).replace(r"\.\*", ".*"), said), said


# --- what is refused --------------------------------------------------------------------------------------


def _other_size(here):
    Image.fromarray(np.zeros((18, 25), np.uint8)).save(here / "masks/b.png")


def _ninth_class(here):
    path = here / "masks/street/d.png"
    labels = np.array(Image.open(path))
    labels[5, 5] = 9
    Image.fromarray(labels).save(path)


def _nan(name):
    def spoil(here):
        values = np.load(here / f"scores/{name}.npy")
        values[0, 1, 2] = np.nan
        np.save(here / f"scores/{name}.npy", values)

    return spoil


def _fewer(here):
    np.save(here / "scores/c.npy", np.load(here / "scores/c.npy")[:2])


def _swapped(here):
    np.save(here / "scores/c.npy", np.load(here / "scores/c.npy").transpose(0, 2, 1))


def _alike(here):
    Image.new("RGB", (24, 18)).save(here / "images/b.jpg")


def _without(name):
    return lambda here: (here / name).unlink()


def _sound(here):
    pass


SPOILED = {
    "no scores": (_without("scores/b.npy"), (), "images/b.png: has no scores scores/b.npy .*, in all 1 of 6 images"),
    "no image": (_without("images/b.png"), (), "scores/b.npy: has no image b in images, in all 1 of 6 scores"),
    "two scores": (lambda here: np.savez(here / "scores/b.npz", np.zeros(3)), (), "two scores for one image"),
    "two images": (_alike, (), "would both be predicted as 'b'"),
    "no masks": (_sound, ("--masks=scores", "--evaluate"), "scores: holds no mask of any image"),
    "no such folder": (_sound, ("--masks=gone", "--tune"), "gone: is no folder; name the folder of the masks"),
    "a mask of another size": (_other_size, TRUTH, "masks/b.png: has 18 x 25 pixels, its image 18 x 24"),
    "a mask's value": (_ninth_class, TRUTH, "masks/street/d.png: label value 9 is neither a class"),
    "other classes": (_fewer, (), "scores/c.npy: has 2 classes .*, and 3 are in scores/a.npy"),
    "swapped": (_swapped, (), "scores/c.npy: has maps of 24 x 18 for an image of 18 x 24 .* swapped"),
    "NaN in the first": (_nan("a"), (), "scores/a.npy: holds nan at row 1, column 2, class 0"),
    "confidence": (_sound, ("--confidence=0.5",), "--confidence is of label images"),
    "number of classes": (_sound, ("--num_classes=4",), "has 3 classes .*, and 4 were asked for"),
    "a value of a key": (_sound, ("--config.refine.appearance_srgb=-1",), "config.refine.appearance_srgb = -1.0 must"),
    "a class": (_sound, ("--config.eval.classes=('cat',)",), "config.eval.classes .*'cat'"),
    "a key of training": (_sound, ("--config.train.steps=1",), "train"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_does_not_fit_is_refused_before_anything_is_computed(here, run, refined, name):
    spoil, words, says = SPOILED[name]
    spoil(here)
    with pytest.raises((DataError, configs.ConfigError)) as error:
        run(*words)
    text = str(error.value)
    assert re.search(says, text) and "\n" not in text, text
    assert not refined and not (here / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tune"], "--tune needs the truth: add --masks DIR"),
        (["--evaluate"], "--evaluate needs the truth: add --masks DIR"),
        (["--masks=masks"], "--masks is of --tune and --evaluate: add one of them, or leave it out"),
        (["--trials=3"], "--trials is of --tune: add that, or leave it out"),
        (["--precision=float32"], "--precision is of --probabilities: add that, or leave it out"),
        (["--tune", "--masks=masks", "--parameters=p.json"], "give one of them"),
        (["--tune", *TRUTH, "--tune_share=1"], "--tune_share=1: leaves --evaluate no image to report"),
        (["--tune", *TRUTH, "--tune_share=0.99"], "of 6 images with a mask it leaves 0 to report and 6 to choose"),
        (["--scores="], "--scores must be given"),
        (["--scores=gone"], "gone: is no folder; name the folder of the scores"),
    ],
)
def test_flags_that_do_not_go_together(here, run, refined, words, says):
    (here / "p.json").write_text('{"config": {}}')
    with pytest.raises((DataError, configs.ConfigError)) as error:
        run(*words)
    assert says in str(error.value) and not refined and not (here / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file; pwcrf crf --tune writes one"),
        ("{", "cannot be used .*; name a file that pwcrf crf --tune wrote"),
        ("[]", "cannot be used"),
        ('{"config": {"crf.weights": [1]}}', "'crf.weights' is no parameter of the dense CRF"),
        ('{"config": {"refine.appearance_sxy": 0}}', "refine.appearance_sxy = 0 must be"),
        ('{"config": {}, "images": [1]}', "are JSON objects"),
    ],
)
def test_parameters_that_cannot_be_used(tmp_path, content, says):
    if content is not None:
        (tmp_path / "p.json").write_text(content)
    config = parameters.crf_defaults()
    before = config.to_dict()
    with pytest.raises(configs.ConfigError, match=says) as error:
        parameters.apply_parameters(config, tmp_path / "p.json")
    assert "p.json" in str(error.value) and config.to_dict() == before


def test_all_images_tuned_on_leave_none_to_report(here, run, refined, monkeypatch):
    monkeypatch.setattr(kernel_search, "search", lambda score, base, *_: (base, 0.5))
    run("--tune", "--masks=masks")
    with pytest.raises(configs.ConfigError, match="chosen on all images with a mask, so none is left to report"):
        run(*TRUTH, "--parameters=out/parameters.json", "--output=again")


def test_an_image_whose_values_cannot_be_used_is_named_and_the_rest_done(here, run, refined, monkeypatch):
    told = []
    monkeypatch.setattr(crf_folder.log, "info", lambda text, *values: told.append(text % values))
    _nan("street/d")(here)
    result = run(*TRUTH)
    assert run.code == 1 and result["failed"] == ["street/d"] and result["num_images"] == result["reported"] == 5
    assert [line for line in told if line.startswith("error: scores/street/d.npy: holds nan at row 1, column 2")]
    scene(here, "street/d")
    assert not run(*TRUTH)["failed"] and run.code == 0


def test_a_disk_that_is_full_is_told(here, run, refined, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(FileError, match=r"out/probabilities/a.npy cannot be written \(No space left"):
        run("--probabilities")


# --- as users run it --------------------------------------------------------------------------------------


def test_images_are_held_a_few_at_a_time(here, run, refined, monkeypatch):
    for i in range(20):
        scene(here, f"more/{i}", (9, 12))
    read, refine, held, most = score_folder.Folder.read, refinement.refine_image, [], []

    def noting(self, item):
        given = read(self, item)
        held.extend(map(weakref.ref, given))
        return given

    def counting(*given):
        most.append(sum(one() is not None for one in held))
        return refine(*given)

    monkeypatch.setattr(score_folder.Folder, "read", noting)
    monkeypatch.setattr(refinement, "refine_image", counting)
    run("--overlays", "--probabilities")
    assert len(held) == 52 and max(most) <= 2 * (crf_folder._AHEAD + 3)


@pytest.mark.full
def test_a_process_chooses_reports_is_killed_and_goes_on(here):
    words = ["-m", "pwcrf_jax", "crf", *INPUTS, "--tune", *TRUTH, "--trials=2", "--config.refine.num_iterations=2"]
    env = os.environ | {"PYTHONPATH": str(commands.ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = commands.start(words, here / "log", here / "log", here, env)
    first, until = here / "out/labels/a.png", time.monotonic() + 300
    while not first.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = commands.run(words, here, env)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["reported"] == 3 and result["num_images"] == 6 and "images are done already" in done.stderr
    assert result["gain"]["miou"][1] > 5 and "The CRF gains +" in done.stdout
    assert re.search(r"^\+ dense CRF +\d", done.stdout, re.MULTILINE)
    assert "on 3 of the 6 images with a mask (--tune_share 0.5, " in done.stderr
    spoiled = commands.run([*words, "--layout=hwc"], here, env)
    assert spoiled.returncode == 2 and spoiled.stderr.startswith("error: ") and spoiled.stderr.count("\n") == 1
