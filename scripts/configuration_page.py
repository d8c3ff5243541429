"""Writes docs/configuration.md, the table of all keys, from pwcrf_jax/config/keys.py.

python scripts/configuration_page.py
"""

from pathlib import Path

from pwcrf_jax.config import keys

PAGE = Path(__file__).resolve().parents[1] / "docs/configuration.md"
INTRO = """# Configuration

<!-- Written by scripts/configuration_page.py. -->

A file of `configs/` has a `get_config()` that starts from all defaults and changes some. Each key is a flag too:
`--config.train.steps=200`. Tuples are quoted: `--config.data.crop_size="(96, 128)"`. A key that is misspelled, or a
value that a key does not take, is refused before anything else is done. Defaults are the paper's values where it gives
them; [choice] marks what it does not give.
"""
RELATIONS = """
## Relations

Each has a section `relations.NAME`; `surrounding` and `above_below` are there. A relation of your own is made in a
config file, by `config.relations.NAME = pwcrf_jax.config.relation(rows=..., cols=...)`, and named in `model.relations`.
"""


def table(entries):
    rows = [f"| `{name}` | `{key.default!r}` | {key.kind.wanted} | {key.meaning} |" for name, key in entries.items()]
    return "\n".join(["", "| key | default | values | meaning |", "|---|---|---|---|", *rows, ""])


def page() -> str:
    sections: dict[str, dict] = {section: {} for section in keys.SECTIONS}
    for name, key in keys.KEYS.items():
        sections[name.rpartition(".")[0]][name] = key
    parts = [f"\n## {keys.SECTIONS[section]}\n{table(entries)}" for section, entries in sections.items()]
    return "".join([INTRO, *parts, RELATIONS, table(keys.RELATION)])


if __name__ == "__main__":
    PAGE.write_text(page())
