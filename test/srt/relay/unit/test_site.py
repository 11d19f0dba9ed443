"""The site: mkdocs builds it without a warning; every page, table, plot and diagram shows; links lead to pages."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.repo import REPO

# What Markdown leaves as it is where a table, a block or a link was not understood.
LEFT_AS_IT_IS = re.compile(r"<p>\s*\||<p>[^<]*\n[-*] |```|\]\(")
CODE = re.compile(r"<(pre|code)\b.*?</\1>", re.DOTALL)
IMAGE = re.compile(r'<img [^>]*src="([^"]+)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    environ = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    ended = subprocess.run(command, cwd=REPO, env=environ, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, str]:
    """What each page says, without what the theme puts around it."""
    found = {}
    for path in site.rglob("index.html"):
        article = re.search(r"<article.*?</article>", path.read_text(), re.DOTALL)
        assert article, path
        found[str(path.parent.relative_to(site))] = article[0]
    return found


def test_every_page_is_there(pages: dict[str, str]) -> None:
    """Those of docs/, and three from elsewhere."""
    written = {path.stem for path in REPO.glob("docs/*.md")} - {"index"} | {
        ".",
        "benchmarks",
        "contributing",
        "changelog",
    }
    assert set(pages) == written


def test_nothing_is_left_as_it_was_written(pages: dict[str, str]) -> None:
    left = {name: found[0] for name, page in pages.items() if (found := LEFT_AS_IT_IS.search(CODE.sub("", page)))}
    assert left == {}


def test_lists_go_on_after_a_block(pages: dict[str, str]) -> None:
    """GitHub takes three spaces for what belongs to an item, Markdown for Python four."""
    numbers = {name: page.count("<ol>") for name, page in pages.items()}
    assert numbers["kubernetes"] == len(re.findall(r"^1\. ", (REPO / "docs/kubernetes.md").read_text(), re.MULTILINE))


def test_plots_show_on_the_site_and_in_the_repository(site: Path, pages: dict[str, str]) -> None:
    shown = {(site / name / image).resolve() for name, page in pages.items() for image in IMAGE.findall(page)}
    assert [image for image in shown if not image.is_file()] == []
    assert {path.name for path in shown} >= {path.name for path in REPO.glob("docs/plots/*.svg")}
    for plot in REPO.glob("docs/plots/*.svg"):
        assert not re.search(r"<(script|image|use)\b|@import|url\(", plot.read_text()), "GitHub would not draw it"


def test_diagrams_are_drawn(pages: dict[str, str]) -> None:
    written = sum(path.read_text().count("```mermaid") for path in REPO.glob("docs/*.md"))
    assert sum(page.count('class="mermaid"') for page in pages.values()) == written > 3


# ---- what mkdocs does not do by itself


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", REPO / "scripts/site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("here", "link", "there"),
    [
        ("docs/a.md", "[x](protocol.md#y)", "[x](protocol.md#y)"),
        ("docs/a.md", "[protocol.md](protocol.md#y)", "[The protocol](protocol.md#y)"),
        ("CONTRIBUTING.md", "[docs/protocol.md](docs/protocol.md)", "[The protocol](protocol.md)"),
        ("docs/a.md", "[x](../benchmark/README.md)", "[x](benchmarks.md)"),
        ("docs/a.md", "[x](../README.md#install)", "[x](index.md)"),
        ("docs/a.md", "[x](../deploy/compose.yaml)", "x"),
        ("docs/a.md", "[x](#y)", "[x](#y)"),
        ("docs/a.md", "[x](https://example.org/y.md)", "[x](https://example.org/y.md)"),
        ("CONTRIBUTING.md", "[x](docs/gpu.md)", "[x](gpu.md)"),
        ("benchmark/README.md", "[x](../docs/gpu.md#y)", "[x](gpu.md#y)"),
    ],
)
def test_links_are_those_of_the_site(hooks: ModuleType, here: str, link: str, there: str) -> None:
    assert hooks.link_on_site(hooks.LINK.fullmatch(link), here, {"protocol.md": "The protocol"}) == there


def test_what_belongs_to_an_item_of_a_list_is_indented_for_python(hooks: ModuleType) -> None:
    written = "1. a\n   b\n\n   ```bash\n   c\n   ```\n\n2. d\n\ne\n   f\n- g\n  h\n"
    wanted = "1. a\n    b\n\n    ```bash\n    c\n    ```\n\n2. d\n\ne\n   f\n- g\n    h\n"
    assert hooks.indented(written) == wanted
