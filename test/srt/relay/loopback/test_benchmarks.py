"""The benchmarks of the transfer run, and write down figures. How large these are is not looked at here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.repo import REPO


def figures(results: Any) -> Iterator[list[float]]:
    """Each median with its quarters, however deep they lie."""
    if isinstance(results, list) and len(results) == 3 and all(isinstance(one, float) for one in results):
        yield results
    elif isinstance(results, dict | list):
        for one in results.values() if isinstance(results, dict) else results:
            yield from figures(one)


@pytest.mark.parametrize(
    ("name", "at_least", "has_plot"), [("transfer", 12, True), ("resume", 12, False), ("scale", 16, True)]
)
def test_quick_form(name: str, at_least: int, has_plot: bool, tmp_path: Path) -> None:
    command = [sys.executable, REPO / "benchmark" / f"{name}.py", "--quick", "--out", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    written = json.loads((tmp_path / f"{name}.json").read_text())
    measured = list(figures(written["results"]))
    assert len(measured) >= at_least
    assert all(0 < low <= median <= high for low, median, high in measured)
    assert "µs" in ended.stdout or "ms" in ended.stdout
    if has_plot:
        assert (tmp_path / f"{name}.svg").read_text().count("<polyline") >= 2
