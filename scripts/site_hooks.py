"""For mkdocs: the pages of the site that lie outside of docs/, and what becomes of links that lead out of it."""

import posixpath
import re
from collections.abc import Iterator, Mapping
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
    sources = {name: source for source, name in ELSEWHERE.items()}
    here, titles = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"), dict(titles_of(config.nav))
    parts = BLOCK.split(indented(markdown))
    parts[::2] = [LINK.sub(lambda link: link_on_site(link, here, titles), part) for part in parts[::2]]
    return "".join(parts)


def titles_of(nav: list[Any]) -> Iterator[tuple[str, str]]:
    """Each page of mkdocs.yml that has one."""
    for entry in nav:
        for title, below in entry.items() if isinstance(entry, dict) else ():
            yield from titles_of(below) if isinstance(below, list) else [(below, title)]


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


def link_on_site(link: re.Match[str], here: str, titles: Mapping[str, str]) -> str:
    """The same link from page to page, by the page's title where the text is its file's name.

    Without the link, where the site has no such page.
    """
    text, target = link[1], link[2]
    path, _, anchor = target.partition("#")
    if re.match(r"[a-z]+:", target) or not path:
        return link[0]
    there = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    there = f"docs/{ELSEWHERE[there]}" if there in ELSEWHERE else there
    if there == "README.md":
        return f"[{text}](index.md)"
    if not there.startswith("docs/"):
        return text
    name = there.removeprefix("docs/")
    if text in (path, posixpath.basename(path)):
        text = titles.get(name, text)
    return f"[{text}]({name}{'#' * bool(anchor)}{anchor})"
