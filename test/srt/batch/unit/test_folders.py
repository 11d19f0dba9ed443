"""The folders of batch sessions: in each of them, arrows between its files and folders point one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from support.repo import SOURCE

BATCH = SOURCE / "embedding_relay/batch"
FOLDERS = sorted({path.parent for path in BATCH.rglob("*.py")})


def imports(path: Path) -> Iterator[Path]:
    """The modules of batch sessions that a file imports, wherever in it, as paths without a suffix."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield SOURCE / node.module.replace(".", "/")
            yield from (SOURCE / node.module.replace(".", "/") / alias.name for alias in node.names)


def child_of(folder: Path, path: Path) -> str | None:
    """The file or folder directly in `folder` that `path` is, or lies in."""
    return path.relative_to(folder).parts[0] if path != folder and path.is_relative_to(folder) else None


def arrows(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        here = child_of(folder, path.with_suffix(""))
        there = {child_of(folder, used) for used in imports(path) if used.is_dir() or used.with_suffix(".py").is_file()}
        found.setdefault(str(here), set()).update(name for name in there if name not in (None, here))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(SOURCE)))
def test_no_circles(folder: Path) -> None:
    try:
        order = list(TopologicalSorter(arrows(folder)).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(error.args[1])}") from None
    assert order


def test_there_are_arrows_to_look_at() -> None:
    found = arrows(BATCH)
    assert {"service", "work", "openai"} <= found["http"]
    assert found["errors"] == set()
    assert arrows(BATCH / "workbook")["formats"] >= {"xlsx", "csv_file", "jsonl_file"}
