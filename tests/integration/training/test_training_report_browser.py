"""The page of eval.py --report in a real headless Chromium, opened from disk."""

import base64
import copy
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pwcrf_jax as pw
from pwcrf_jax import config as configs
from pwcrf_jax.data import eval_batches
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.model import decode
from pwcrf_jax.prediction import restore
from pwcrf_jax.report import collect

pytestmark = pytest.mark.slow
LONG_NAME = "a_class_whose_name_has_no_space_and_sixty_characters_in_total"
LONG_ID = "frankfurt/frankfurt_000000_000294_leftImg8bit_of_the_second_drive"
FADE = 40  # pixels at the right of a table that goes on
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `browser`)")
    if not path:
        pytest.skip("no Chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(trained):
    config = configs.load(trained / "config.json")
    model, params, _, dataset = restore.load(config, str(trained), "best", "val")
    rng = np.random.default_rng(0)
    for name in config.model.relations:
        layer = params[f"pairwise_{name}"]
        layer |= {k: jnp.asarray(rng.normal(0, 0.7, layer[k].shape), jnp.float32) for k in ("last_kernel", "last_bias")}
    return config, model, params, dataset


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """(file, result, data) of a page with refinement, a long name of a class and a long name of an image."""
    config, model, params, dataset = run
    dataset = copy.copy(dataset)
    dataset.class_names = (*dataset.class_names[:2], LONG_NAME, *dataset.class_names[3:])
    config = config.copy_and_resolve_references()
    config.refine.num_iterations = 2
    page = collect.Report(str(tmp_path_factory.mktemp("page") / "a collect.html"), images=10, inspected=4)
    result = evaluate.evaluate_model(config, model, params, dataset, "val", refine="spatial", report=page)
    result |= dict(step=1, checkpoint="best", refine="spatial")
    inspected = {image["index"] for image in page._inspected.entries()}
    for image in page._gallery.entries():
        image["id"] = LONG_ID if image["index"] == min(inspected) else image["id"]
    page.write(result)
    return pathlib.Path(page.file), result, page.data(result)


@pytest.fixture(params=[(1200, 900, "light"), (390, 844, "dark")], ids=["desktop", "phone"])
def page(chromium, written, request):
    """The page, opened; when the test is done nothing may have been fetched and nothing complained of."""
    width, height, scheme = request.param
    context = chromium.new_context(viewport=dict(width=width, height=height), color_scheme=scheme)
    tab, requests, complaints = context.new_page(), [], []
    tab.on("request", lambda r: requests.append(r.url))
    tab.on("console", lambda m: complaints.append(m.text))
    tab.on("pageerror", lambda e: complaints.append(str(e)))
    tab.goto(written[0].as_uri())
    yield tab
    assert [url for url in requests if not url.startswith("data:")] == [written[0].as_uri()]
    assert not complaints
    for narrow in (width, 360):
        tab.set_viewport_size(dict(width=narrow, height=height))
        assert tab.evaluate("document.documentElement.scrollWidth") <= narrow
    context.close()


def number(text):
    return float(text.replace("\u2212", "-").replace("%", "").strip())


def test_figures(page, written):
    _, result, data = written
    for row, figures in result["rows"].items():
        shown = page.locator(f"#summary-table tr[data-row={row}] .number").all_inner_texts()
        wanted = [figures["miou"], *figures["boundary_iou"].values(), figures["pixel_accuracy"]]
        assert [number(x) for x in shown[:4]] == [float(f"{100 * x:.1f}") for x in wanted]
    changes = page.locator("#changes-table tbody tr")
    assert changes.count() == 3
    for at, change in enumerate(data["changes"]):
        cells = changes.nth(at).locator("td").all_inner_texts()
        assert [number(x) for x in cells[3:6]] == pytest.approx(
            [100 * change[k] / change["pixels"] for k in ("right", "wrong", "other")], abs=0.00501
        )
        net = 100 * (change["right"] - change["wrong"]) / change["pixels"]
        assert number(cells[0]) == pytest.approx(net, abs=0.00501)
    for row in data["stages"]:
        shown = page.locator(f"#calibration-table tr[data-row={row}] .ece").text_content()
        assert number(shown) == pytest.approx(100 * data["calibration"][row]["ece"], abs=0.00501)
    assert page.locator("#iterations circle").count() == 3 * 3 + 2
    for at, row in enumerate(data["stages"]):  # the larger a dot, the more pixels
        drawn = [n for n in data["calibration"][row]["number"] if n]
        first = sum(1 for other in data["stages"][:at] for n in data["calibration"][other]["number"] if n)
        sizes = [float(x.get_attribute("r")) for x in page.locator("#calibration circle").all()]
        sizes = sizes[first : first + len(drawn)]
        assert np.all(np.diff(np.array(sizes)[np.argsort(drawn)]) >= 0) and max(sizes) > min(sizes) + 2


def test_classes_confusion_and_compatibilities(page, written):
    _, result, data = written
    order = lambda: [x.get_attribute("data-class") for x in page.locator("#classes-bars .class-row").all()]
    names = [c["name"] for c in data["classes"]]
    assert order() == names
    iou = {row: result["rows"][row]["iou"] for row in ("unary", "refined")}
    page.select_option("#classes-sort", "gain")
    gains = [iou["refined"][name] - iou["unary"][name] for name in order()]
    assert gains == sorted(gains, reverse=True) and len(set(gains)) > 1
    page.select_option("#confusion-stage", "unary")
    page.locator("#confusion-map canvas").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):  # the first one chooses the first cell
        page.keyboard.press(key)
    counts = np.array(data["confusion"]["unary"])
    text = page.locator("#confusion-map .readout").inner_text()
    assert text.startswith(
        f"{names[1]} in truth, predicted as {names[1]}: {100 * counts[1, 1] / counts[1].sum():.2f} %"
    )
    assert f"({counts[1, 1]:,} of {counts[1].sum():,} pixels)" in text
    canvas = page.locator("#compatibility .heat canvas").nth(1)
    canvas.focus()
    page.keyboard.press("ArrowDown")
    relation = data["relations"][1]
    readout = page.locator("#compatibility .heat .readout").nth(1)
    mean = number(re.search(r"mean score (\S+)\)", readout.inner_text())[1])
    assert relation["name"] == "above_below" and f"{names[0]} above {names[0]}" in readout.inner_text()
    assert mean == pytest.approx(relation["scores"][0][0], abs=0.00501)
    before = readout.inner_text()
    page.select_option("#compatibility-above_below", "raw")
    assert readout.inner_text() != before


def test_gallery_is_sorted_and_filtered(page, written):
    _, _, data = written
    cards = lambda: [int(x.get_attribute("data-index")) for x in page.locator("#gallery-cards .card").all()]
    images = {image["index"]: image for image in data["gallery"]}
    gain = lambda i: (images[i]["right"]["refined"] - images[i]["right"]["unary"]) / images[i]["valid"]
    assert sorted(cards()) == list(range(10))
    assert [gain(i) for i in cards()] == sorted(map(gain, images), reverse=True)
    page.select_option("#gallery-sort", "loss")
    assert [gain(i) for i in cards()] == sorted(map(gain, images))
    page.select_option("#gallery-sort", "index")
    assert cards() == list(range(10))
    chosen = min(range(6), key=lambda k: sum(k in image["classes"] for image in images.values()) or 99)
    page.select_option("#gallery-class", str(chosen))
    wanted = [i for i, image in sorted(images.items()) if chosen in image["classes"]]
    assert cards() == wanted
    pictures = page.locator("#gallery-cards .card").first.locator("img")
    assert pictures.count() == 8  # image, truth, three stages, what changed, entropy without and with refinement
    for at in range(8):
        pictures.nth(at).scroll_into_view_if_needed()
        page.wait_for_function("x => x.complete && x.naturalWidth > 0", arg=pictures.nth(at).element_handle())
        assert pictures.nth(at).get_attribute("alt")


def test_the_inspector_shows_the_numbers_of_the_api(page, run, written):
    config, model, params, dataset = run
    _, _, data = written
    (batch,) = eval_batches(dataset, "val", batch_size=10, size=config.data.eval_size)
    potentials = jax.jit(model.apply)({"params": params}, batch["image"])
    mask = decode.grid_mask(batch["valid_box"], potentials.unary.shape[1:3], batch["label"].shape[1:])
    chosen = [potentials.pairwise[name] for name in config.model.relations]
    before, after = (
        pw.mean_field.run(
            potentials.unary,
            chosen,
            pw.mean_field.Settings(num_iterations=n, average_messages=True),
            node_mask=mask,
        )[0]
        for n in (2, 3)
    )
    columns = {"unary": 100 * np.exp(jax.nn.log_softmax(potentials.unary)), "after": 100 * np.exp(after)}
    counts = {}
    for name, potential in zip(config.model.relations, chosen, strict=True):
        message, counts[name] = pw.compute_messages(potential, jnp.exp(before), node_mask=mask)
        columns[name] = np.asarray(message / counts[name][..., None])
    height, width = potentials.unary.shape[1:3]
    canvas = page.locator("#inspect-canvas")
    for image in data["inspector"]["images"][:2]:
        index = image["index"]
        page.select_option("#inspect-image", str(index))
        canvas.scroll_into_view_if_needed()
        for row, col in ((1, 2), (height - 1, width - 1), (5, 0)):
            size = canvas.bounding_box()
            at = dict(x=(col + 0.5) * size["width"] / width, y=(row + 0.5) * size["height"] / height)
            canvas.click(position=at)
            assert f"Row {row}, column {col} of {height} x {width}" in page.locator("#inspect-cell").inner_text()
            seen = 0
            for line in page.locator("#inspect-table tbody tr").all():
                k = int(line.get_attribute("data-class"))
                for name, values in columns.items():
                    shown = number(line.locator(f"td[data-column={name}]").inner_text())
                    half = 0.0501 if name in ("unary", "after") else 0.00501  # of the last digit that is shown
                    assert shown == pytest.approx(values[index, row, col, k], abs=half)
                    seen += 1
            assert seen == 6 * 4
            for name, count in counts.items():
                text = page.locator(f"#inspect-pushes [data-relation={name}]").inner_text()
                assert f"({int(count[index, row, col])} messages" in text
                values = columns[name][index, row, col]
                best, push = values.argmax(), values.max() - values.mean()
                said = re.search(r"pushes towards (\w+) \(\+([\d.]+)\)", text)
                assert said[1] == data["classes"][best]["name"] and float(said[2]) == pytest.approx(push, abs=0.011)
        page.keyboard.press("ArrowUp")
        assert "Row 4, column 0 " in page.locator("#inspect-cell").inner_text()


@pytest.mark.parametrize("page", [(390, 844, "light")], ids=["phone"], indirect=True)
def test_a_phone_shows_what_decides(page, written):
    """Without scrolling sideways: net change and bar, and in the inspector what comes out; charts can be read."""
    for image in written[2]["inspector"]["images"]:
        page.select_option("#inspect-image", str(image["index"]))
        for table, cell in (("inspect", "td[data-column=after]"), ("changes", ".delta"), ("changes", ".bar")):
            shown = page.locator(f"#{table}-table tbody tr {cell}").first.bounding_box()
            place = page.locator(f".scroll:has(#{table}-table)").bounding_box()
            assert place["x"] < shown["x"] and shown["x"] + shown["width"] <= place["x"] + place["width"] - FADE
    for chart in ("#iterations svg", "#calibration svg"):
        scale = page.locator(chart).evaluate("x => x.clientWidth / x.viewBox.baseVal.width")
        text = page.locator(chart + " text").first.evaluate("x => parseFloat(getComputedStyle(x).fontSize)")
        assert text * scale >= 11
    # What goes on to the right says so until its end is seen; names of rows stay.
    place, head = page.locator(".scroll:has(#changes-table)"), page.locator("#changes-table tbody th").first
    assert "more" in place.get_attribute("class") and place.evaluate("x => getComputedStyle(x).maskImage") != "none"
    left = head.bounding_box()["x"]
    place.evaluate("x => (x.scrollLeft = x.scrollWidth)")
    page.wait_for_function("x => !x.classList.contains('more')", arg=place.element_handle())
    assert head.bounding_box()["x"] == left


def test_a_card_leads_to_the_inspector(page, written):
    _, _, data = written
    wanted = data["inspector"]["images"][-1]["index"]
    page.locator(f".card[data-index='{wanted}'] button").click()
    assert page.input_value("#inspect-image") == str(wanted)
    before = page.evaluate("document.getElementById('inspect-canvas').toDataURL()")
    page.select_option("#inspect-relation", "above_below")
    after = page.evaluate("document.getElementById('inspect-canvas').toDataURL()")
    assert base64.b64decode(before.partition(",")[2]) != base64.b64decode(after.partition(",")[2])


def test_a_page_of_a_unary_alone(chromium, run, tmp_path):
    """Every section says that there is nothing to show, instead of failing."""
    config, _, params, dataset = run
    config = config.copy_and_resolve_references()
    config.model.relations, config.crf.weights = (), (1.0,)
    params = {name: tree for name, tree in params.items() if not name.startswith("pairwise")}
    page = collect.Report(str(tmp_path / "unary.html"), images=2, inspected=1)
    result = evaluate.evaluate_model(config, configs.build_model(config), params, dataset, "val", report=page)
    page.write(result | dict(step=1, checkpoint="best", refine="off"))
    tab, complaints = chromium.new_page(viewport=dict(width=360, height=740)), []
    tab.on("console", lambda m: complaints.append(m.text))
    tab.on("pageerror", lambda e: complaints.append(str(e)))
    tab.goto(pathlib.Path(page.file).as_uri())
    for section, says in {
        "#verdict": "Nothing comes after the unary network",
        "#iterations": "There are no iterations",
        "#compatibility": "uses no relations",
        "#inspector": "a cell receives no messages",
        "#summary-caption": "Boundary refinement was off",
    }.items():
        assert says in tab.locator(section).inner_text()
    assert tab.locator("#gallery-cards .card").count() == 2
    assert json.loads(tab.locator("#data").text_content())["relations"] == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360 and not complaints
    tab.close()


def test_a_page_without_iterations(chromium, run, tmp_path):
    """It names the relations, so it must not say that there are none."""
    config, model, params, dataset = run
    config = config.copy_and_resolve_references()
    config.crf.num_iterations = 0
    page = collect.Report(str(tmp_path / "none.html"), images=2)
    result = evaluate.evaluate_model(config, model, params, dataset, "val", report=page)
    page.write(result | dict(step=1, checkpoint="best", refine="off"))
    tab = chromium.new_page()
    tab.goto(pathlib.Path(page.file).as_uri())
    says = lambda section: tab.locator(section).inner_text()
    assert "no iterations of mean field (config.crf.num_iterations = 0)" in says("#about")
    assert "config.crf.num_iterations is 0 and refinement is off" in says("#iterations")
    assert "No stage changes a label." in says("#changes-caption") and "full bar" not in says("#changes-caption")
    tab.close()
