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
    ("name", "at_least", "has_plot"),
    [("transfer", 12, True), ("resume", 12, False), ("scale", 16, True), ("sharing", 32, False), ("steps", 16, False)],
)
def test_quick_form(name: str, at_least: int, has_plot: bool, tmp_path: Path) -> None:
    printed, results = run_quickly(name, tmp_path)
    measured = list(figures(results))
    assert len(measured) >= at_least
    assert all(0 < low <= median <= high for low, median, high in measured)
    assert "µs" in printed or "ms" in printed
    if has_plot:
        assert (tmp_path / f"{name}.svg").read_text().count("<polyline") >= 2


def run_quickly(name: str, out: Path, *arguments: str) -> tuple[str, Any]:
    """What it printed, and its results."""
    command = [sys.executable, REPO / "benchmark" / f"{name}.py", "--quick", "--out", out, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, json.loads((out / f"{name}.json").read_text())["results"]


def test_quick_form_of_pool(tmp_path: Path) -> None:
    """On a busy machine none may be in time; but all are answered, and in the blocks that there are."""
    run_quickly("pool", tmp_path)
    printed, results = run_quickly("pool", tmp_path, "--add")
    assert len(results["turns"]) == 2
    assert "| reserved | 1 | 1/8 |" in printed
    for one in results["summary"]:
        assert one["failed"] == 0
        assert one["rounds"][0] >= 1
    limited = [point for turn in results["turns"] for point in turn["points"] if point["reserve"] != "unlimited"]
    assert len(limited) == 2 * 4
    assert all(0 < point["most_blocks"] <= point["blocks"] for point in limited)
    # An eighth of the memory is less than the longest request needs.
    assert all(point["rounds"] > 1 for point in limited if point["fraction"] == 8)
    assert (tmp_path / "pool.svg").read_text().count("<polyline") == 2


def test_quick_form_of_burst(tmp_path: Path) -> None:
    """With a limit everybody is answered or refused with a word about when to come back, and the memory is enough."""
    printed, results = run_quickly("burst", tmp_path)
    limited, unlimited = results["summary"]
    assert "| limited |" in printed
    assert limited["answered"] + limited["refused"] == limited["requests"]
    assert limited["with_retry_after"] == limited["refused"]
    assert limited["ended"] == ""
    assert unlimited["ended"] == "its memory was used up"
    assert limited["peak_mib"] < unlimited["peak_mib"]
