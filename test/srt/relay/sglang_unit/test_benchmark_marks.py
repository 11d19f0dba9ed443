"""What the waterfall of the benchmarks notes is called so: in SGLang, and here."""

from __future__ import annotations

import pkgutil
import runpy
from typing import Any, Final

import pytest

from sglang.srt.plugins.hook_registry import HookRegistry
from support.repo import REPO

MARKS: Final[dict[str, Any]] = runpy.run_path(str(REPO / "benchmark" / "marks.py"))


@pytest.mark.parametrize("target", sorted({target for target, _, _ in MARKS["POINTS"]}))
def test_what_is_noted_exists(target: str) -> None:
    assert callable(pkgutil.resolve_name(target))


def test_a_server_that_is_not_measured_notes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MARKS["VARIABLE"], raising=False)
    monkeypatch.setattr(HookRegistry, "register", lambda *_: pytest.fail("a hook was registered"))
    MARKS["install"]()
