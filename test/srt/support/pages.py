"""The pages of this repository, taken apart: their fenced blocks, and the commands in those of a shell.

A block that a test runs as it stands says so in the line above it, which no reader sees:
`<!-- run by test/srt/relay/e2e/test_pages.py::test_what_the_tutorial_types -->`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.repo import REPO

PAGES: Final = tuple(
    sorted(
        [
            *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "benchmark/README.md")),
            *REPO.glob("docs/*.md"),
            *REPO.glob("deploy/**/*.md"),
        ]
    )
)
_BLOCK: Final = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)
_RUN_BY: Final = re.compile(r"<!-- run by (\S+) -->\s*\Z")
_CODE: Final = re.compile(r"`([^`\n]+)`")
_HEREDOC: Final = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?")
_SEPARATORS: Final = frozenset({"&&", "||", "|", ";", "&"})
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
_SUBSHELL: Final = re.compile(r"\s*\(.*\)\s*")
_SUBSTITUTION: Final = re.compile(r"\$\(([^()]*)\)")
_REDIRECTION: Final = re.compile(r"\d?(>>?|<)(&\d)?")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    run_by: str
    """The test that runs it as it stands, as `file::name`; empty if none does."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPO)}:{self.line}"


@dataclass(frozen=True)
class Command:
    words: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    """What is set for it, or with `export` for all that follow."""

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        before = text[: match.start()]
        run_by = _RUN_BY.search(before)
        inside = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        found.append(Block(page, before.count("\n") + 1, match["language"], inside, run_by[1] if run_by else ""))
    return found


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page)]


def without_blocks(text: str) -> str:
    return _BLOCK.sub("", text)


def code_in(text: str) -> list[str]:
    """What stands in back-ticks, outside of blocks."""
    return _CODE.findall(without_blocks(text))


def commands(text: str) -> Iterator[Command]:
    """Of a shell's block, each command of each line. A here-document is left out, and so are redirections."""
    for line in _whole_lines(text):
        for inner in _SUBSTITUTION.findall(line):
            yield from commands(inner)
        line = _SUBSTITUTION.sub("SUBSTITUTED", line)
        words: list[str] = []
        if _SUBSHELL.fullmatch(line):
            line = line.strip()[1:-1]
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in _SEPARATORS and not word.endswith(";"):
                words.append(word)
                continue
            words += [word[:-1]] if word not in _SEPARATORS and word[:-1] else []
            if words:
                yield _command(words)
            words = []


def _whole_lines(text: str) -> Iterator[str]:
    """Lines that go on after a backslash, or within quotes, as one."""
    lines = iter(text.splitlines())
    for line in lines:
        whole = line
        while whole.endswith("\\") or _is_open(whole):
            whole = (whole[:-1] if whole.endswith("\\") else whole + "\n") + next(lines)
        yield whole
        if found := _HEREDOC.search(whole):
            while next(lines).strip() != found[1]:
                pass


def _is_open(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False


def _command(words: list[str]) -> Command:
    environ: dict[str, str] = {}
    if words[0] == "sudo":
        words = words[1:]
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif kept in ([], ["export"]) and (found := _ASSIGNMENT.fullmatch(word)):
            environ[found[1]] = found[2]
        elif _REDIRECTION.fullmatch(word) or _HEREDOC.fullmatch(word):
            skip = word[-1] in "<>"
        else:
            kept.append(word)
    return Command(tuple(kept), environ)
