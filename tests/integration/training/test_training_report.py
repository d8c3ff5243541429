"""eval.py --report: what the page embeds, against the evaluation and the functional API."""

import base64
import copy
import dataclasses
import json
import os
import pathlib
import re
import types

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import full_row

import pwcrf_jax as pw
from pwcrf_jax import config as configs
from pwcrf_jax.data import eval_batches
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.mean_field import Settings
from pwcrf_jax.model import decode
from pwcrf_jax.prediction import restore
from pwcrf_jax.report import collect
from pwcrf_jax.report.parts import pixels_of
from pwcrf_jax.runtime.files import FileError

ROOT = pathlib.Path(__file__).parents[3]
ABOUT = dict(step=1, checkpoint="best", refine="off")


def embedded(html):
    """The data of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def unpacked(packed, *shape):
    """Numbers of the inspector as the page shows them, float64."""
    return np.frombuffer(base64.b64decode(packed["data"]), packed["type"]).reshape(shape) / packed["scale"]


def collected(config, model, params, dataset, file, refine="off", **options):
    page = collect.Report(str(file), **options)
    result = evaluate.evaluate_model(config, model, params, dataset, "val", refine=refine, report=page) | ABOUT
    page.write(result | dict(refine=refine))
    return result, embedded(file.read_text()), page


@pytest.fixture(scope="module")
def run(trained):
    """(config, model, params, data set) of a run whose pair networks say something."""
    config = configs.load(trained / "config.json")
    config.crf.weights = (0.5, 2.0)
    model, params, _, dataset = restore.load(config, str(trained), "best", "val")
    rng = np.random.default_rng(0)
    for name in config.model.relations:
        layer = params[f"pairwise_{name}"]
        noise = lambda x: jnp.asarray(rng.normal(0, 0.7, x.shape), x.dtype)
        layer |= {key: noise(layer[key]) for key in ("last_kernel", "last_bias")}
    return config, model, params, dataset


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    """(result, embedded data, `collect.Report`) of the run."""
    file = tmp_path_factory.mktemp("page") / "new" / "report.html"
    return collected(*run, file, images=6, inspected=3)


@pytest.fixture(scope="module")
def by_api(run):
    """All of val in one batch by the functional API: labels [N, H, W], {row: log-probabilities of pixels}, log
    marginals of all relations, potentials, mask.
    """
    config, model, params, dataset = run
    (batch,) = eval_batches(dataset, "val", batch_size=10, size=config.data.eval_size)
    potentials = jax.jit(model.apply)({"params": params}, batch["image"])
    mask = decode.grid_mask(batch["valid_box"], potentials.unary.shape[1:3], batch["label"].shape[1:])
    chosen = [potentials.pairwise[name] for name in config.model.relations]
    rows = {}
    for row, some in (("unary", 0), ("all", 2)):
        log_marginals, _ = pw.mean_field.run(
            potentials.unary,
            chosen[:some],
            Settings(weights=config.crf.weights[:some], average_messages=True),
            node_mask=mask,
        )
        rows[row] = np.asarray(jax.nn.log_softmax(decode.upsample(log_marginals, batch["label"].shape[1:], mask)))
    return batch["label"], rows, log_marginals, potentials, mask


def test_the_table_is_that_of_the_evaluation(run, page):
    config, model, params, dataset = run
    plain = evaluate.evaluate_params(evaluate.make_eval_fn(config, model), params, dataset, "val", config)
    result, data, _ = page
    assert data["rows"] == result["rows"] == plain["rows"] and data["iterations"] == plain["change"]
    assert list(data["rows"]) == list(data["titles"]) == ["unary", "surrounding", "above_below", "all"]
    assert data["stages"] == ["unary", "all"]
    for row, counts in data["confusion"].items():
        assert pw.scores(np.array(counts)).mean_iou == plain["rows"][row]["miou"]


def test_changes_and_calibration(page, by_api):
    _, data, _ = page
    truth, rows, *_ = by_api
    valid = truth != 255
    before, after = (rows[row].argmax(-1)[valid] for row in ("unary", "all"))
    truth = truth[valid]
    (change,) = data["changes"]
    assert (change["from"], change["to"], change["pixels"]) == ("unary", "all", valid.sum())
    by_hand = dict(
        same=before == after,
        right=(before != truth) & (after == truth),
        wrong=(before == truth) & (after != truth),
        other=(before != after) & (before != truth) & (after != truth),
    )
    assert {k: change[k] for k in by_hand} == {k: x.sum() for k, x in by_hand.items()}
    assert min(change[k] for k in by_hand) > 0, "the run is too dull to tell them apart"
    assert data["about"]["void"] == (~valid).sum() > 0
    for row, log_probs in rows.items():
        confidence, right = np.exp(log_probs.max(-1))[valid], log_probs.argmax(-1)[valid] == truth
        error = 0.0
        for at in range(15):
            inside = (confidence >= at / 15) & (confidence < (at + 1) / 15 if at < 14 else True)
            error += abs(right[inside].sum() - confidence[inside].sum()) / len(right)
        assert data["calibration"][row]["ece"] == pytest.approx(error, abs=1e-5)
        assert sum(data["calibration"][row]["number"]) == len(right)


def test_compatibilities_are_mean_scores(run, page, by_api):
    """Over all edges of all images, as a table of all scores has it."""
    _, data, _ = page
    *_, potentials, mask = by_api
    assert np.all(mask)
    for relation in data["relations"]:
        table = pw.to_table(potentials.pairwise[relation["name"]])
        scores = np.asarray(table.scores, np.float64)
        assert relation["edges"] == scores.shape[0] * scores.shape[1]
        np.testing.assert_allclose(relation["scores"], scores.mean((0, 1)), atol=1e-4)
        assert relation["parameterisation"] == "residual" and np.ptp(relation["scores"]) > 0.5
    assert [r["weight"] for r in data["relations"]] == [0.5, 2.0]


def test_padding_has_no_edges(by_api):
    """Hidden units are summed where both ends are in the mask, whatever the other cells hold."""
    from pwcrf_jax.report import parts

    *_, potentials, mask = by_api
    potential = potentials.pairwise["above_below"]
    cut = np.asarray(mask).copy()
    cut[:, 7:] = cut[:, :, 5:] = False
    poisoned = jnp.where(cut[..., None], potential.hidden_p, jnp.nan)
    total, count = parts._sum_of_hidden(dataclasses.replace(potential, hidden_p=poisoned), jnp.asarray(cut))
    hidden_p, hidden_q = potential.hidden_p[:, :7, :5], potential.hidden_q[:, :7, :5]
    small = dataclasses.replace(potential, hidden_p=hidden_p, hidden_q=hidden_q)
    whole, fewer = parts._sum_of_hidden(small, jnp.ones((10, 7, 5), bool))
    np.testing.assert_allclose(total, whole, rtol=1e-5)
    np.testing.assert_array_equal(count, fewer)


def test_the_inspector_shows_what_the_api_computes(run, page, by_api):
    config = run[0]
    _, data, _ = page
    truth, _, after, potentials, mask = by_api
    chosen = [potentials.pairwise[name] for name in config.model.relations]
    settings = Settings(num_iterations=2, weights=config.crf.weights, average_messages=True)
    before, _ = pw.mean_field.run(potentials.unary, chosen, settings, node_mask=mask)
    assert len(data["inspector"]["images"]) == 3
    cells = np.asarray(pw.grid_labels(truth, *mask.shape[1:]))
    for image in data["inspector"]["images"]:
        at, (rows, cols), k = image["index"], image["grid"], len(data["classes"])
        for name, weight in zip(config.model.relations, config.crf.weights, strict=True):
            message, count = pw.compute_messages(potentials.pairwise[name], jnp.exp(before), node_mask=mask)
            shown = unpacked(image["messages"][name], rows, cols, k)
            added = np.asarray(weight * message / count[..., None])[at]
            np.testing.assert_allclose(shown, added, atol=0.00501)  # two decimals
            assert np.ptp(added) > 0.1
            np.testing.assert_array_equal(unpacked(image["counts"][name], rows, cols), count[at])
        for shown, log_probs in ((image["unary"], jax.nn.log_softmax(potentials.unary)), (image["after"], after)):
            np.testing.assert_allclose(unpacked(shown, rows, cols, k), np.exp(log_probs)[at], atol=0.000501)
        np.testing.assert_array_equal(unpacked(image["sent"], rows, cols), before[at].argmax(-1))
        np.testing.assert_array_equal(unpacked(image["truth"], rows, cols), cells[at])


def test_the_gallery_has_those_that_gained_and_lost_most(page, by_api):
    _, data, _ = page
    truth, rows, *_ = by_api
    right = {row: ((x.argmax(-1) == truth) & (truth != 255)).sum((1, 2)) for row, x in rows.items()}
    gain = (right["all"] - right["unary"]) / (truth != 255).sum((1, 2))
    order = sorted(range(10), key=lambda i: (-gain[i], -i))
    assert [image["index"] for image in data["gallery"]] == [*order[:3], *order[-3:]]
    for image in data["gallery"]:
        assert image["right"] == {row: counts[image["index"]] for row, counts in right.items()}
        assert set(image["labels"]) == {"truth", "unary", "all"}
    assert {image["index"] for image in data["inspector"]["images"]} <= {image["index"] for image in data["gallery"]}


def test_pictures_hold_the_labels(page, by_api):
    import io

    from PIL import Image

    _, data, _ = page
    truth, rows, *_ = by_api
    image = data["gallery"][0]
    read = lambda uri: np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    shown = read(image["labels"]["truth"])
    np.testing.assert_array_equal(np.where(shown == 6, 255, shown), truth[image["index"]])
    np.testing.assert_array_equal(read(image["labels"]["all"]), rows["all"][image["index"]].argmax(-1))
    assert read(image["image"]).shape == (192, 256, 3)


def test_nothing_is_loaded_from_anywhere(page):
    html = pathlib.Path(page[2].file).read_text()
    code = html.replace(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1], "")  # base64 may hold anything
    assert not re.search(r"//[a-z]|\bfetch\(|XMLHttpRequest|@import|url\(|import\(", code, re.IGNORECASE)
    assert not re.search("https?:", html)
    assert all(x.startswith(("data:", "#")) for x in re.findall(r'(?:src|href)="([^"]*)"', html))
    assert "default-src 'none'" in html
    assert len(html) < 15e6 * 6 / 100 + 1e6, "six images and the page itself"


def test_names_cannot_leave_their_element(page, tmp_path):
    result, data, collector = page
    odd, other = '</script><script>alert("1")</script>', copy.copy(collector)
    other._dataset, other.file = copy.copy(collector._dataset), tmp_path / "report.html"
    other._dataset.class_names = (odd, *collector._dataset.class_names[1:])
    other.write(result)
    text = other.file.read_text()
    assert embedded(text) == data | {"classes": [data["classes"][0] | {"name": odd}, *data["classes"][1:]]}
    assert "<script>alert" not in text


@pytest.mark.full
def test_with_refinement(run, tmp_path):
    """One row more, scored as evaluation scores it, though each image is refined by itself here."""
    config, model, params, dataset = run
    config = config.copy_and_resolve_references()
    config.refine.num_iterations = 2
    plain = evaluate.evaluate_model(config, model, params, dataset, "val", refine="spatial")
    result, data, page = collected(
        config, model, params, dataset, tmp_path / "a.html", "spatial", images=1, inspected=0
    )
    assert len(data["gallery"]) == 1 and not data["inspector"]["images"]
    for key in ("miou", "pixel_accuracy"):
        assert result["rows"]["refined"][key] == pytest.approx(plain["rows"]["refined"][key], abs=1e-5)
    assert result["rows"]["all"] == plain["rows"]["all"] != plain["rows"]["refined"]
    assert data["stages"] == ["unary", "all", "refined"] and "refined" in data["calibration"]
    (image,) = data["gallery"]
    assert list(image["entropy"]) == list(image["uncertainty"]) == ["all", "refined"], "of mean field too"
    assert image["entropy"]["all"] > image["entropy"]["refined"] > 0
    assert [(c["from"], c["to"]) for c in data["changes"]] == [
        ("unary", "all"),
        ("all", "refined"),
        ("unary", "refined"),
    ]
    right = np.trace(data["confusion"]["refined"]) - np.trace(data["confusion"]["all"])
    assert right == data["changes"][1]["right"] - data["changes"][1]["wrong"]
    assert np.sum(data["confusion"]["refined"]) == data["changes"][1]["pixels"]


@pytest.mark.slow
def test_one_relation_and_augmentation(run, tmp_path):
    config, model, params, dataset = run
    config = config.copy_and_resolve_references()
    config.crf.relations, config.crf.weights, config.tta.flip = ("above_below",), (1.0,), True
    page = collect.Report(str(tmp_path / "a.html"))
    result = evaluate.evaluate_model(config, model, params, dataset, "val", report=page)
    data = page.data(result | ABOUT)
    assert data["stages"] == ["unary", "all", "tta"] and [r["name"] for r in data["relations"]] == ["above_below"]
    assert len(data["gallery"]) == 10 and len(data["inspector"]["images"]) == 10
    assert sum(image["right"]["tta"] for image in data["gallery"]) == np.trace(data["confusion"]["tta"])


def test_without_relations(run, tmp_path):
    config, _, params, dataset = run
    config = config.copy_and_resolve_references()
    config.model.relations, config.crf.weights = (), (1.0,)
    model = configs.build_model(config)
    params = {name: tree for name, tree in params.items() if not name.startswith("pairwise")}
    _, data, _ = collected(config, model, params, dataset, tmp_path / "b.html", images=1, inspected=1)
    assert data["stages"] == ["unary"] and data["relations"] == []
    assert data["rows"]["unary"] == data["rows"]["all"]
    (image,) = data["inspector"]["images"]
    assert image["unary"] == image["after"] and image["messages"] == {}
    assert list(data["gallery"][0]["uncertainty"]) == ["unary"]


def test_without_iterations(run, by_api):
    from pwcrf_jax.report import parts

    crf = dataclasses.replace(configs.crf_settings(run[0]), num_iterations=0)
    *_, potentials, mask = by_api
    before, after, added, counts = parts.last_update(potentials.unary[0], {}, mask[0], {}, {}, crf)
    np.testing.assert_allclose(before, jax.nn.log_softmax(potentials.unary[0]), rtol=1e-6)
    assert np.all(before == after) and not added and not counts


def test_many_classes_leave_fewer_images_to_inspect(run, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "INSPECTOR_BYTES", 30_000)
    page = collect.Report(str(tmp_path / "a.html"), images=4, inspected=4)
    page.start(*run)
    # 12 x 16 cells, 6 classes, unary, after and two relations, two bytes each, in base64.
    assert page._room == 30_000 // (12 * 16 * 6 * 4 * 2 * 4 // 3) == 2
    for i in range(5):
        page._inspected.offer(i, i, lambda i=i: i)
    assert page._inspected.entries() == [4, 0]


def test_a_page_of_noisy_images_stays_small(run, tmp_path):
    """100 images with noise, all stages, of which the last two are ragged, and 12 images with cells."""
    config, model, params, _ = run
    config = config.copy_and_resolve_references()
    size, k, stages = (360, 480), 11, ("unary", "all", "convs", "tta", "refined")
    config.data.eval_size = size
    rng = np.random.default_rng(0)
    names, colours = [f"class {i}" for i in range(k)], rng.integers(0, 256, (k, 3))
    palette = colours.tolist()
    dataset = types.SimpleNamespace(name="made up", num_classes=k, class_names=names, palette=palette)
    page = collect.Report(str(tmp_path / "a.html"))
    page.start(config, model, params, dataset)
    page._order, grid = stages[:3], page._grid

    def cells():
        packed = lambda low, high, scale, *more: collect._packed(rng.integers(low, high, (*grid, *more)) / scale, scale)
        return dict(
            grid=list(grid),
            **{key: packed(0, 1001, 1000, k) for key in ("unary", "after")},
            **{key: packed(0, k, 1) for key in ("truth", "sent")},
            messages={name: packed(-900, 900, 100, k) for name in page._boxes},
            counts={name: packed(0, 99, 1) for name in page._boxes},
        )

    normal = lambda scale, *shape: rng.normal(0, scale, shape).astype(np.float32)
    for name in "abcd":
        coarse, views = normal(6, 9, 12, k), {}
        zoom = lambda x: np.asarray(jax.image.resize(x, (*size, k), "cubic"))
        clean = zoom(coarse)
        image = np.clip(colours[clean.argmax(-1)] + normal(20, *size, 3), 0, 255).astype(np.uint8)
        for row in stages:  # those of the network are enlarged from its cells
            scores = clean + normal(0.3, *size, k) if row in stages[3:] else zoom(coarse + normal(1, 9, 12, k))
            views[row] = pixels_of(np.asarray(jax.nn.log_softmax(scores)))
        page._add_image(image, clean.argmax(-1).astype(np.uint8), name, views, cells)
    four = page._gallery.entries()
    for i in range(4, 100):  # the same pictures again: to compress 100 images takes too long here
        page._gallery.offer(0.0, i, lambda i=i: four[i % 4] | {"index": i})
        page._inspected.offer(0.0, i, lambda i=i: cells() | {"index": i})
    page._hidden |= {name: np.ones(len(params[f"pairwise_{name}"]["last_kernel"]) + 1) for name in page._boxes}
    page._confusion = {row: np.full((k, k), 10**6) for row in stages}
    figures = dict.fromkeys(("miou", "pixel_accuracy", "mean_accuracy", "fw_iou"), 0.5)
    rows = dict.fromkeys(stages, figures | dict(boundary_iou={}, iou=dict.fromkeys(names, 0.5)))
    written = page.write(ABOUT | dict(split="val", num_images=100, classes=[], change={}, rows=rows))
    data = embedded(pathlib.Path(page.file).read_text())
    assert (len(data["gallery"]), len(data["inspector"]["images"])) == (100, 12)
    assert set(data["gallery"][0]["labels"]) == {"truth", *stages}
    assert os.path.getsize(page.file) == written < 15e6


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 8])
def test_extremes(limit):
    rng, made = np.random.default_rng(limit), []
    for number in (0, 1, 4, 30):
        kept, gains = collect.Extremes(limit), rng.integers(0, 9, number).astype(float)
        for i, gain in enumerate(gains):
            kept.offer(gain, i, lambda i=i: made.append(i) or i)
        order = sorted(range(number), key=lambda i: (gains[i], i))
        if number > limit:
            order = order[: (limit + 1) // 2] + order[len(order) - limit // 2 :]
        assert kept.entries() == order[::-1]
    assert limit or not made


def test_numbers_are_rounded_not_clipped():
    for x, kind in (([0, 2.554], "uint8"), ([-1.256, 300.0], "int16"), ([-400.0, 1], "int32")):
        packed = collect._packed(x, 100)
        assert packed["type"] == kind
        np.testing.assert_allclose(unpacked(packed, 2), x, atol=0.00501)


def test_what_cannot_work_is_refused_first(tmp_path):
    with pytest.raises(FileError, match="cannot be written"):
        collect.Report(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        collect.Report(str(tmp_path / "file" / "report.html"))
    with pytest.raises(configs.ConfigError, match="report_inspect=3"):
        collect.Report(str(tmp_path / "a.html"), images=2, inspected=3)
    page = lambda **options: collect.Report(str(tmp_path / "a.html"), **options)
    assert [page(images=n)._wanted for n in (0, 3, 12, 100)] == [0, 3, 12, 12], "the default fits the gallery"
    assert page(inspected=20)._wanted == 20
    assert collect.default_file("work", "val[:20]") == "work/report_val__20_.html"


def script(*words):
    return commands.run(["eval.py", *words])


@pytest.mark.full
def test_from_the_command_line(trained, tmp_path):
    file = tmp_path / "page.html"
    words = ("--workdir", trained, "--split", "val[:8]", "--config.compilation_cache=False")
    done = script(*words, "--report", file, "--report_images=3", "--report_inspect=2")
    assert done.returncode == 0, done.stderr
    data = embedded(file.read_text())
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["miou_all"] == round(100 * data["rows"]["all"]["miou"], 3)
    assert (len(data["gallery"]), len(data["inspector"]["images"]), data["about"]["images"]) == (3, 2, 8)
    assert str(file) in done.stderr
    (trained / "eval_val__8_.json").unlink()


@pytest.mark.full
def test_a_small_gallery_needs_no_other_flag(trained, tmp_path):
    file = tmp_path / "page.html"
    words = ("--workdir", trained, "--split", "val[:3]", "--config.compilation_cache=False")
    done = script(*words, "--report", file, "--report_images=2")
    assert done.returncode == 0, done.stderr
    data = embedded(file.read_text())
    assert len(data["gallery"]) == len(data["inspector"]["images"]) == data["inspector"]["wanted"] == 2
    (trained / "eval_val__3_.json").unlink()


@pytest.mark.parametrize(
    "words, says",
    [
        (("--report_images=3",), "--report_images is of --report"),
        full_row((("--report=auto", "--images=x"), "--images is of pwcrf predict, crf: see")),
        full_row(
            (("--report=auto", "--report_images=2", "--report_inspect=3"), "_inspect=3 is more than --report_images=2")
        ),
        full_row((("--report=a.html", "--tune-refinement"), "--tune-refinement is of pwcrf tune: see")),
        full_row((("--report_images=2", "--report"), "Missing value for flag --report")),
    ],
)
def test_flags_that_do_not_go_together(trained, words, says):
    done = script("--workdir", trained, *words)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1
