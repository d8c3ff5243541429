"""RESULTS.md, made from small JSON files: one a topic, benchmarks/record/TOPIC.json.

    python benchmarks/record.py             writes benchmarks/RESULTS.md
    python benchmarks/record.py --check     fails where that file is not what the JSON gives
    python benchmarks/record.py add TOPIC --claim "ours over the rival" --value "1.10 times" --interval "[1.05, 1.16]"
        --seeds "0, 1, 2" --command "python benchmarks/training.py"
    python benchmarks/record.py remove TOPIC --claim "ours over the rival"

`add` takes machine, commit and date from here and now unless they are given, replaces the row of the same claim where
there is one, and writes RESULTS.md too. A new TOPIC needs --title; --note is one line above the table. A file holds
title, note, order (of the topics in RESULTS.md) and rows; a row holds `FIELDS`, all text. Nothing is computed here:
a value is what its command printed. Current results only: what was tried or superseded goes to docs/experiments.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD, RESULTS = ROOT / "benchmarks/record", ROOT / "benchmarks/RESULTS.md"
MAX_LINES, MAX_WIDTH = 150, 200
LONG_COMMAND = 80  # characters, beyond which it stands below the table
TOPIC = {"title": str, "note": str, "order": int, "rows": list}
FIELDS = ("claim", "value", "interval", "seeds", "hardware", "commit", "date", "command")
UNKNOWN = "not yet measured"  # the value of a row that needs neither machine nor commit nor date
COMMIT = re.compile(r"[0-9a-f]{7,40}\+?(\.\.[0-9a-f]{7,40})?")
HEAD = """\
# Results

What holds today, as it came out: each figure with its seeds, machine, date, commit and command. What was tried,
withdrawn or superseded is in the [experiments](../docs/experiments/index.md). `python benchmarks/record.py` writes this
page from `benchmarks/record/`: change it there, or by its `add`. Brackets hold 95 % intervals by a paired bootstrap
over images. PATH and FILE stand for data and weights; a commit with a + had changes.
"""


def checked(path):
    """The topic of a file.

    Raises:
      SystemExit: one line naming the file, the row and what is wrong with it.
    """
    try:
        topic = json.loads(path.read_text())
    except ValueError as error:
        raise SystemExit(f"{path}: not JSON: {error}") from None
    if not isinstance(topic, dict) or {k: type(v) for k, v in topic.items()} != TOPIC:
        keys = ", ".join(f"{key} ({kind.__name__})" for key, kind in TOPIC.items())
        raise SystemExit(f"{path}: expected {keys} and no other keys")
    for i, row in enumerate(topic["rows"]):
        if wrong := fault(row):
            raise SystemExit(f"{path}: rows[{i}]: {wrong}")
    claims = [row["claim"] for row in topic["rows"]]
    if twice := {claim for claim in claims if claims.count(claim) > 1}:
        raise SystemExit(f"{path}: two rows claim {twice.pop()!r}: a claim has one value, remove one")
    return topic


def fault(row):
    """What is wrong with a row, or "" where nothing is."""
    if not isinstance(row, dict) or set(row) != set(FIELDS) or not all(isinstance(x, str) for x in row.values()):
        return f"expected texts {', '.join(FIELDS)} ('' where there is none), got {row!r}"
    needed = ["claim", "value", "command"] + ["hardware", "commit", "date"] * (row["value"] != UNKNOWN)
    if missing := [name for name in needed if not row[name].strip()]:
        return f"{', '.join(missing)} missing"
    if any("\n" in text for text in row.values()) or "`" in row["command"]:
        return "a line break, or a backtick in the command: give one line without"
    if row["commit"] and not COMMIT.fullmatch(row["commit"]):
        return f"commit {row['commit']!r}: expected 7 to 40 hexadecimal digits, perhaps with a +, or FIRST..LAST"
    try:
        row["date"] and datetime.date.fromisoformat(row["date"])
    except ValueError:
        return f"date {row['date']!r}: expected YYYY-MM-DD"
    return ""


def topics(folder):
    """[(name, topic)] in the order of RESULTS.md."""
    found = [(path.stem, checked(path)) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda item: item[1]["order"])


def rendered(found):
    """The text of RESULTS.md.

    Raises:
      SystemExit: it, or a line of it, would be longer than a reader reads.
    """
    machines = list(dict.fromkeys(row["hardware"] for _, topic in found for row in topic["rows"] if row["hardware"]))
    letter = {machine: letters(i) for i, machine in enumerate(machines)}
    lines = [HEAD, *(f"- **{letter[machine]}**: {machine}" for machine in machines)]
    for _, topic in found:
        lines += ["", f"## {topic['title']}", ""]
        note = textwrap.wrap(topic["note"], 120, break_long_words=False, break_on_hyphens=False)
        lines += [*note, ""] * bool(note)
        lines += ["| claim | value | seeds | machine, date, commit | command |", "|---|---|---|---|---|"]
        before, below = "", []
        for row in topic["rows"]:
            value = f"{row['value']} {row['interval']}".strip()
            commit = f"`{row['commit']}`" if row["commit"] else ""
            where = ", ".join(filter(None, (letter.get(row["hardware"], ""), row["date"], commit)))
            command = "as above" if row["command"] == before else f"`{row['command']}`"
            if row["command"] != before and len(row["command"]) > LONG_COMMAND:
                below.append(f"{len(below) + 1}. {command}")
                command = f"{len(below)}, below"
            before = row["command"]
            cells = (cell.replace("|", r"\|") for cell in (row["claim"], value, row["seeds"], where, command))
            lines.append(f"| {' | '.join(cells)} |")
            if len(lines[-1]) > MAX_WIDTH:
                raise SystemExit(f"{row['claim']!r} would take {len(lines[-1])} characters of RESULTS.md, at most "
                                 f"{MAX_WIDTH}: say it shorter")  # fmt: skip
        lines += ["", *below] * bool(below)
    text = "\n".join(lines) + "\n"
    if (count := text.count("\n")) > MAX_LINES:
        raise SystemExit(f"RESULTS.md would have {count} lines, at most {MAX_LINES}: move what is superseded from "
                         "benchmarks/record to docs/experiments")  # fmt: skip
    return text


def letters(i):
    """A, B, ..., Z, AA, AB, ..."""
    return (letters(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def machine():
    """Processor, cores that this process may use, memory, accelerators and versions, in words."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    said = [f"{model[1] if model else platform.processor() or platform.machine()}, {cores} cores, {memory:.0f} GiB"]
    if shutil.which("nvidia-smi"):
        names = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        said += subprocess.run(names, capture_output=True, text=True).stdout.splitlines()
    try:
        jax = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("JAX is not installed: give --hardware, with its version") from None
    return f"{', '.join(said)}; Python {platform.python_version()}, JAX {jax}"


def commit():
    """The commit of this checkout, with a + where files that git knows, but for the record, are not as in it."""
    git = lambda *words: subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    try:
        head = git("rev-parse", "--short=7", "HEAD")
    except FileNotFoundError:
        raise SystemExit("git is not there: give --commit") from None
    if head.returncode:
        raise SystemExit(f"{ROOT} is no checkout of git: give --commit")
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/record", ":!benchmarks/RESULTS.md").returncode
    return head.stdout.strip() + "+" * bool(changed)


def add(args):
    """Adds or replaces a row; a new topic comes last."""
    path = args.record / f"{args.topic}.json"
    if path.exists():
        topic = checked(path)
    elif args.title:
        last = max((topic["order"] for _, topic in topics(args.record)), default=0)
        topic = dict(title=args.title, note="", order=last + 1, rows=[])
    else:
        there = ", ".join(name for name, _ in topics(args.record))
        raise SystemExit(f"no topic {args.topic!r}: there are {there}; --title begins a new one")
    topic |= {key: value for key in ("title", "note", "order") if (value := getattr(args, key)) is not None}
    row = {name: getattr(args, name) or "" for name in FIELDS}
    if row["value"] != UNKNOWN:
        row["hardware"], row["commit"] = row["hardware"] or machine(), row["commit"] or commit()
        row["date"] = row["date"] or datetime.date.today().isoformat()
    if wrong := fault(row):
        raise SystemExit(f"not added: {wrong}")
    claims = [other["claim"] for other in topic["rows"]]
    if row["claim"] in claims:
        i = claims.index(row["claim"])
        print(f"replaces {topic['rows'][i]}")
        topic["rows"][i] = row
    else:
        topic["rows"].append(row)
    keep(args, path, topic)


def remove(args):
    """Removes a row; a topic without rows goes with its file."""
    path = args.record / f"{args.topic}.json"
    topic = checked(path) if path.exists() else dict(rows=[])
    rows = [row for row in topic["rows"] if row["claim"] != args.claim]
    if len(rows) == len(topic["rows"]):
        raise SystemExit(f"{path} has no row that claims {args.claim!r}")
    keep(args, path, topic | dict(rows=rows))


def keep(args, path, topic):
    """Writes a topic and RESULTS.md, or neither."""
    others = [item for item in topics(args.record) if item[0] != path.stem]
    found = others + [(path.stem, topic)] * bool(topic["rows"])
    text = rendered(sorted(found, key=lambda item: item[1]["order"]))
    if topic["rows"]:
        path.write_text(json.dumps(topic, indent=1, ensure_ascii=False) + "\n")
    else:
        path.unlink()
    args.results.write_text(text)
    print(f"{path} and {args.results} are written")


def check(args):
    text = rendered(topics(args.record))
    if not args.results.exists() or args.results.read_text() != text:
        raise SystemExit(f"{args.results} is not what {args.record} gives: run python benchmarks/record.py")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where RESULTS.md is not up to date")
    parser.add_argument("--record", type=Path, default=RECORD, help="folder of the topics")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the page")
    tasks = parser.add_subparsers(dest="task")
    for task, told in (("add", "adds or replaces a row"), ("remove", "removes a row")):
        its = tasks.add_parser(task, help=told)
        its.add_argument("topic", help="name of a file, without .json")
        its.add_argument("--claim", required=True)
        if task == "add":
            its.add_argument("--value", required=True, help=f"'{UNKNOWN}' for what is only planned")
            its.add_argument("--command", required=True)
            its.add_argument("--interval", help="of 95 %%, in brackets")
            its.add_argument("--seeds")
            its.add_argument("--hardware", help="by default this machine and its versions")
            its.add_argument("--commit", help="by default that of the checkout")
            its.add_argument("--date", help="by default today")
            its.add_argument("--title", help="of the topic: needed where it is new")
            its.add_argument("--note", help="a line above the topic's table")
            its.add_argument("--order", type=int, help="of the topic in RESULTS.md; by default a new one is the last")
    args = parser.parse_args(argv)
    if args.check and args.task:
        parser.error(f"--check writes nothing, {args.task} does: give one of them")
    if args.check:
        check(args)
    elif args.task:
        (add if args.task == "add" else remove)(args)
    else:
        args.results.write_text(rendered(topics(args.record)))


if __name__ == "__main__":
    main()
