"""For mkdocs: the pages of the site that lie outside of docs/, and what becomes of links that lead out of it."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

REPO = Path(__file__).resolve().parent.parent
# Of the repository, and their names on the site.
ELSEWHERE = {
    "benchmark/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
ITEM = re.compile(r"(?:[-*]|\d+\.) +")
BLOCK = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    for source, name in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(REPO / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = {name: source for source, name in ELSEWHERE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = BLOCK.split(indented(markdown))
    return "".join(
        part if at % 2 else LINK.sub(lambda link: link_on_site(link, here), part) for at, part in enumerate(parts)
    )


def indented(markdown: str) -> str:
    """What belongs to an item of a list, by four spaces: Markdown for Python wants no fewer."""
    lines, width = [], 0
    for line in markdown.splitlines(keepends=True):
        if found := ITEM.match(line):
            width = len(found[0])
        elif line.strip() and not line.startswith(" " * width):
            width = 0
        elif width and line.strip():
            line = " " * max(0, 4 - width) + line
        lines.append(line)
    return "".join(lines)


def link_on_site(link: re.Match[str], here: str) -> str:
    """The same link from page to page; without the link, where the site has no such page."""
    text, target = link[1], link[2]
    path, _, anchor = target.partition("#")
    if re.match(r"[a-z]+:", target) or not path:
        return link[0]
    there = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    if there == "README.md":
        return f"[{text}](index.md)"
    if there in ELSEWHERE:
        there = f"docs/{ELSEWHERE[there]}"
    if not there.startswith("docs/"):
        return text
    return f"[{text}]({there.removeprefix('docs/')}{'#' * bool(anchor)}{anchor})"
