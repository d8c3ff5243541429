"""What MkDocs does beside rendering docs/: pages that live elsewhere in the repository, and links that work here too.

The Markdown files are written for readers of the repository. On the site, files from outside docs/ are pages of their
own, links to files that are no page become plain text, and names of our functions become links to the API.
"""

import ast
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Page or file of the site: where it lies in the repository.
ELSEWHERE = {
    "results.md": "benchmarks/RESULTS.md",
    "benchmarks.md": "benchmarks/README.md",
    "examples.md": "examples/README.md",
    "changes.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    **{
        f"results/{p.name}": f"benchmarks/results/{p.name}"
        for p in (ROOT / "benchmarks/results").iterdir()
        if p.is_file()
    },
}
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LIST = re.compile(r"^((?![-*|>#]|\d+\. |\s)[^\n]+\n)(?=[-*] )", re.MULTILINE)  # without a blank line before it
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
NAME = re.compile(r"(?<!\[)`(pwcrf_jax(?:\.\w+)+)`(?!\])")
# Of these modules every public name is in the API, and so is what the package takes from them; other names stay text.
MODULES = {p.stem for p in (ROOT / "docs/api").glob("*.md")}
INIT = ast.parse((ROOT / "pwcrf_jax/__init__.py").read_text())
TAKEN = {
    f"pwcrf_jax.{alias.name}": f"{node.module}.{alias.name}"
    for node in INIT.body
    if isinstance(node, ast.ImportFrom) and node.module != "pwcrf_jax"
    for alias in node.names
}


def name(match):
    """`pwcrf_jax.x.y` as a link to the API."""
    full = TAKEN.get(match[1], match[1])
    return f"[`{match[1]}`][{full}]" if full.split(".")[1] in MODULES else match[0]


class Docstrings(griffe.Extension):
    """Links in docstrings, and "height, width: ..." kept as one entry, which griffe would split at the blank."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            text = re.sub(
                r"^( +\w+(?:, \w+)+:)", lambda m: m[1].replace(", ", ",\u00a0"), obj.docstring.value, flags=re.M
            )
            obj.docstring.value = NAME.sub(name, text)


def on_files(files, config):
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    source = ELSEWHERE.get(here, f"docs/{here}")
    pages = {f"docs/{f.src_uri}": f.src_uri for f in files} | {path: uri for uri, path in ELSEWHERE.items()}

    def link(match):
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if re.match(r"\w+:", target):
            return match[0]
        if path in pages:
            return f"[{text}]({posixpath.relpath(pages[path], posixpath.dirname(here) or '.')}{anchor})"
        # What is neither a page nor a file is left as it is, for MkDocs to complain.
        return text if (ROOT / path).exists() else match[0]

    parts, end = [], 0
    for fence in [*FENCED.finditer(markdown), None]:
        text = markdown[end : fence.start() if fence else None]
        parts.append(NAME.sub(name, LINK.sub(link, LIST.sub(r"\1\n", text))))
        if fence:
            parts.append(fence[0])
            end = fence.end()
    return "".join(parts)
