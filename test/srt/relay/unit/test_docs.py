"""Generated pages say what the code says now; the files, lanes, links and messages that a page names are there."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_relay.batch.session.records import STAGE_MOVES, Stage
from support.pages import code_in
from support.repo import REPO, our_modules

# The changelog also names what was.
LINKING = [page for folder in ("", "docs/", "deploy/") for page in sorted(REPO.glob(f"{folder}*.md"))]
PAGES = [page for page in LINKING if page.name != "CHANGELOG.md"]
FOLDERS = ("python", "scripts", "test", "benchmark", "docs", "deploy", ".ci")
# A path from the root of the repository, wherever it is written, commands included.
FROM_THE_ROOT = re.compile(rf"(?<![\w./:-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*[\w/]")
# One word in back-ticks that is a file of ours, or a folder: the end of its path is enough.
CODE = re.compile(r"`([^`\n]+)`")
SHORT = re.compile(r"[\w][\w./-]*(?:\.(?:py|md|json|toml|txt|html)|/)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
ELSEWHERE = re.compile(r"[a-z]+:")


@pytest.mark.parametrize("script", ["structure", "protocol-diagrams"])
def test_page_is_up_to_date(script: str) -> None:
    ended = subprocess.run([sys.executable, REPO / "scripts" / script, "--check"], capture_output=True, text=True)
    assert ended.returncode == 0, f"run scripts/{script}\n{ended.stdout}{ended.stderr}"


# ---- what pages point at


def everything() -> set[str]:
    """The paths of all files and folders, with a `/` in front, and for a folder one at the end."""
    found = [*REPO.iterdir(), *(path for folder in FOLDERS for path in (REPO / folder).rglob("*"))]
    return {f"/{path.relative_to(REPO)}{'/' if path.is_dir() else ''}" for path in found}


def absent_files(text: str, there: set[str]) -> list[str]:
    paths = set(FROM_THE_ROOT.findall(text))
    names = {name for name in CODE.findall(BLOCK.sub("", text)) if SHORT.fullmatch(name)} - paths
    absent = [path for path in paths if not (REPO / path).exists()]
    return sorted(absent + [name for name in names if not any(path.endswith(f"/{name}") for path in there)])


def broken_links(page: Path, text: str) -> Iterator[str]:
    for target in LINK.findall(BLOCK.sub("", text)):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        if ELSEWHERE.match(target):
            continue
        if not linked.exists() or (anchor and anchor not in anchors(linked.read_text())):
            yield target


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def lanes_named(text: str) -> set[str]:
    """The words after `scripts/test`, up to the first that is an option, a comment or no word."""
    commands = [*CODE.findall(text), *(line for block in BLOCK.findall(text) for line in block.splitlines())]
    named: set[str] = set()
    for command in commands:
        if found := re.search(r"scripts/test((?: +[a-z][a-z0-9-]*)+)(?= |$)", command):
            named.update(found[1].split())
    return named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    assert absent_files(page.read_text(), everything()) == []


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page, page.read_text())) == []


def test_the_lanes_that_pages_name_exist() -> None:
    usage = subprocess.run([sys.executable, REPO / "scripts/test", "--help"], capture_output=True, text=True).stdout
    lanes = set(re.findall(r"^  ([a-z0-9-]+)  ", usage, re.MULTILINE))
    named = {lane for page in LINKING for lane in lanes_named(page.read_text())}
    assert {"check", "unit", "e2e"} <= lanes
    assert "stress" in named
    assert named <= lanes


def test_what_is_not_there_is_noticed() -> None:
    there = everything()
    page = "`codec.py`, `protocol/`, `python/absent.py`, `absent.py`, `relay/absent/`\n```\nscripts/absent --now\n```\n"
    assert absent_files(page, there) == ["absent.py", "python/absent.py", "relay/absent/", "scripts/absent"]
    links = "[a](docs/protocol.md#statuses) [b](docs/absent.md) [c](docs/protocol.md#absent) [d](https://example.org/x)"
    assert list(broken_links(REPO / "README.md", links)) == ["docs/absent.md", "docs/protocol.md#absent"]
    assert lanes_named("`scripts/test absent`\n```\nA=1 scripts/test unit fuzz   # not this\n```\n") == {
        "absent",
        "unit",
        "fuzz",
    }


# ---- messages that pages quote


@functools.cache
def texts_of_our_code() -> str:
    trees = [ast.parse(path.read_text()) for path in our_modules().values() if path.suffix == ".py"]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def strange_words(message: str) -> list[str]:
    """Those that follow each other nowhere in our code; a few may be values, and no message."""
    words, at, strange = message.split(), 0, []
    while at < len(words):
        together = (end for end in range(len(words), at + 1, -1) if " ".join(words[at:end]) in texts_of_our_code())
        end = next(together, at)
        strange += words[at : at + 1] if end == at else []
        at = max(end, at + 1)
    return strange if len(strange) > len(words) // 3 else []


@pytest.mark.parametrize("name", ["operations.md", "two-hosts.md", "security.md", "three-stages.md"])
def test_messages_that_a_page_quotes_are_ours(name: str) -> None:
    quoted = [code for code in code_in((REPO / "docs" / name).read_text()) if "…" in code and code[:4] != "smg "]
    pieces = {piece.strip() for code in quoted for piece in code.split("…") if len(piece.split()) > 2}
    assert {piece: strange for piece in pieces if (strange := strange_words(piece))} == {}


def test_a_message_that_nobody_writes_is_noticed() -> None:
    assert strange_words("no language instance has asked for room") == []
    assert strange_words("no language server has ever wanted room")


def test_the_stages_of_a_batch_session_are_those_of_the_code() -> None:
    page = (REPO / "docs/batch-sessions.md").read_text()
    told = set(re.findall(r"^\| `(\w+)` \|", page.split("## Ready means ready")[1].split("\n## ")[0], re.MULTILINE))
    assert told == {stage.value for stage in Stage} - {Stage.CREATED.value}
    drawn = re.findall(r"(?<=─► )(\w+) ─►(?= (\w+))", page)
    assert len(drawn) == 3
    for here, there in drawn:
        assert Stage(there) in STAGE_MOVES[Stage(here)]
