"""RESULTS.md is what benchmarks/record gives, and benchmarks/record.py keeps it so."""

import datetime
import importlib.util
import json
import re
import shutil
import subprocess

import pytest
from test_docs_readme import ROOT

ROW = dict(claim="a", value="1.5", interval="", seeds="0", hardware="one core", commit="0123abc", date="2026-11-30",
           command="python x.py")  # fmt: skip


@pytest.fixture(scope="module")
def record():
    spec = importlib.util.spec_from_file_location("record", ROOT / "benchmarks/record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page(record, tmp_path):
    """Runs the command on a record of its own: two topics, the second one written first."""

    def run(*words):
        record.main([f"--record={tmp_path / 'record'}", f"--results={tmp_path / 'RESULTS.md'}", *words])
        return (tmp_path / "RESULTS.md").read_text()

    run.folder = tmp_path / "record"
    run.folder.mkdir()
    for name, order in (("first", 2), ("second", 1)):
        write(run.folder / f"{name}.json", title=name.title(), note="", order=order, rows=[ROW | dict(claim=name)])
    return run


def write(path, **topic):
    path.write_text(json.dumps(topic))


def test_results_are_those_of_the_record(record):
    record.main(["--check"])
    text = (ROOT / "benchmarks/RESULTS.md").read_text()
    assert len(text.splitlines()) <= 150
    assert text.count("\n| ") > 30


def test_commands_of_the_record_have_scripts(record):
    rows = [row for _, topic in record.topics(record.RECORD) for row in topic["rows"]]
    scripts = {word for row in rows for word in re.findall(r"\S+\.py\b", row["command"])}
    assert len(scripts) > 5
    assert not {script for script in scripts if not (ROOT / script).is_file()}
    assert not {row["command"] for row in rows if row["command"].split()[0] not in ("python", "make", "pwcrf")}


def test_page_of_a_small_record(page, record):
    text = page()
    assert text.startswith(record.HEAD) and text.index("## Second") < text.index("## First")
    assert "- **A**: one core\n" in text
    assert "| first | 1.5 | 0 | A, 2026-11-30, `0123abc` | `python x.py` |\n" in text
    page("--check")
    (page.folder.parent / "RESULTS.md").write_text(text.replace("1.5", "1.6", 1))
    with pytest.raises(SystemExit, match="RESULTS.md is not what .*record gives: run python benchmarks/record.py"):
        page("--check")


def test_add_takes_machine_commit_and_date(page, record, monkeypatch):
    monkeypatch.setattr(record, "machine", lambda: "a machine")
    monkeypatch.setattr(record, "commit", lambda: "fedcba9+")
    new = ("--value=2|3", "--command=python y.py", "--interval=[1, 4]", "--seeds=0, 1")
    text = page("add", "first", "--claim=b", *new)
    today = datetime.date.today().isoformat()
    assert rf"| b | 2\|3 [1, 4] | 0, 1 | B, {today}, `fedcba9+` | `python y.py` |" in text and "| first |" in text
    text = page("add", "first", "--claim=b", "--value=5", "--command=python x.py", "--date=2026-01-02")
    assert text.count("| b |") == 1 and "| b | 5 |  | B, 2026-01-02, `fedcba9+` | as above |" in text
    third = "--title=Third", "--note=A note."
    text = page("add", "third", *third, "--claim=c", "--value=not yet measured", "--command=x")
    assert "## Third\n\nA note.\n\n| claim" in text and text.index("## Third") > text.index("## First")
    assert "| c | not yet measured |  |  | `x` |" in text
    assert "| b |" not in page("remove", "first", "--claim=b")
    assert "## Third" not in page("remove", "third", "--claim=c") and not (page.folder / "third.json").exists()


def test_here_and_now(record, tmp_path, monkeypatch):
    assert re.fullmatch(r".+, \d+ cores, \d+ GiB.*; Python 3[\d.]+, JAX [\d.]+\S*", record.machine())
    monkeypatch.setattr(record, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="no checkout of git: give --commit"):
        record.commit()
    if not shutil.which("git"):
        return
    git = lambda *words: subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "file").write_text("one")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/RESULTS.md").write_text("one")
    git("init")
    git("add", ".")
    git("-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false", "commit", "-m", "x")
    (tmp_path / "benchmarks/RESULTS.md").write_text("two")
    clean = record.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "file").write_text("two")
    assert record.commit() == f"{clean}+"


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(value=""), "value missing"),
        (dict(hardware="", date=""), "hardware, date missing"),
        (dict(commit="main"), "commit 'main': expected 7 to 40 hexadecimal digits"),
        (dict(date="30.11.2026"), "date '30.11.2026': expected YYYY-MM-DD"),
        (dict(command="python `x`"), "a backtick in the command"),
        (dict(seeds=3), "expected texts claim, value"),
        (dict(speed="1"), "expected texts claim, value"),
    ],
)
def test_wrong_rows_are_named(page, change, told):
    write(page.folder / "first.json", title="First", note="", order=1, rows=[ROW, ROW | dict(claim="b") | change])
    with pytest.raises(SystemExit, match=rf"first\.json: rows\[1\]: .*{re.escape(told)}"):
        page()


def test_wrong_topics_are_named(page):
    path = page.folder / "first.json"
    write(path, title="First", note="", order=1, rows=[ROW, ROW])
    with pytest.raises(SystemExit, match=r"first\.json: two rows claim 'a'"):
        page()
    write(path, title="First", order=1, rows=[ROW])
    with pytest.raises(SystemExit, match=r"first\.json: expected title \(str\), note \(str\), order \(int\), rows"):
        page()
    path.write_text("{")
    with pytest.raises(SystemExit, match=r"first\.json: not JSON"):
        page()
    path.unlink()
    for words, told in (
        (("add", "third", "--claim=a", "--value=1", "--command=x"), "no topic 'third': there are second; --title"),
        (("add", "second", "--claim=a", "--value=1", "--command=x", "--commit=main"), "not added: commit 'main'"),
        (("remove", "second", "--claim=a"), "no row that claims 'a'"),
    ):
        with pytest.raises(SystemExit, match=told):
            page(*words)


def test_lines_can_be_read(page, record):
    long = ROW | dict(claim="b", command="python x.py " + "-" * record.LONG_COMMAND)
    rows = [ROW, long, long | dict(claim="c"), ROW | dict(claim="d")]
    write(page.folder / "first.json", title="First", note="", order=1, rows=rows)
    text = page()
    cells = [line.split(" | ")[-1] for line in text.splitlines() if line.startswith(("| b |", "| c |", "| d |"))]
    assert cells == ["1, below |", "as above |", "`python x.py` |"] and f"\n\n1. `{long['command']}`\n" in text
    write(page.folder / "first.json", title="First", note="", order=1, rows=[ROW | dict(value="1" * 200)])
    with pytest.raises(SystemExit, match="'a' would take 2.. characters of RESULTS.md, at most 200: say it shorter"):
        page()


def test_a_page_that_nobody_reads_is_refused(page):
    before = page()
    rows = [ROW | dict(claim=str(i)) for i in range(150)]
    write(page.folder / "first.json", title="First", note="", order=1, rows=rows)
    with pytest.raises(SystemExit, match="at most 150: move what is superseded"):
        page()
    assert (page.folder.parent / "RESULTS.md").read_text() == before
