"""scripts/test: every lane is run once, one that fails says so at its end, and the last line is always the total."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType
from typing import Any

import pytest

from support.repo import REPO


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its lanes do nothing, and succeed."""
    loader = SourceFileLoader("test_command", str(REPO / "scripts/test"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # there is no place for it beside a program
    spec = spec_from_loader(loader.name, loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    monkeypatch.setattr(module, "run_setup", module.Counts)
    monkeypatch.setattr(module, "run_check", lambda output: module.Counts())
    monkeypatch.setattr(module, "run_lane", lambda lane, options, output: module.Counts(passed=1))
    return module


def test_the_whole_is_every_lane_without_a_card_once(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    said = capsys.readouterr().out.splitlines()
    lanes = {"check", *command.LANES} - {"gpu", "gpu-servers"}
    assert sorted(line.partition(":")[0] for line in said if line.endswith(" s") and ": " in line) == sorted(lanes)
    assert said[-1] == f"{len(lanes) - 1} passed, 0 failed, 0 min 0 s"


def test_lanes_that_were_named_are_run_and_no_others(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["e2e", "unit", "gpu", "--", "-x"]) == 0
    said = capsys.readouterr().out
    assert {word for word in command.LANES if f"{word}: 1 passed" in said} == {"e2e", "unit", "gpu"}


def test_one_lane_alone_is_not_captured(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[Any] = []
    monkeypatch.setattr(command, "run_lane", lambda lane, options, output: outputs.append(output) or command.Counts())
    assert command.main(["unit"]) == 0
    assert command.main(["stress", "batch"]) == 0
    assert [output is None for output in outputs] == [True, False, False]


def test_a_lane_that_fails_says_so_and_others_go_on(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_lane(lane: str, options: list[str], output: Any) -> Any:
        if lane == "fuzz":
            raise ValueError("a report that is cut off")
        return command.Counts(passed=3, failed=2 if lane == "loopback" else 0)

    monkeypatch.setattr(command, "run_lane", run_lane)
    assert command.main(["fuzz", "loopback", "e2e", "unit"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert "fuzz: ValueError('a report that is cut off')" in said
    assert sorted(line.rpartition(",")[0] for line in said if "FAILED, " in line) == [
        "fuzz: FAILED, 0 passed, 1 failed",
        "loopback: FAILED, 3 passed, 2 failed",
    ]
    assert set(said[-2].removeprefix("FAILED: ").split(", ")) == {"fuzz", "loopback"}
    assert said[-1] == "9 passed, 3 failed, 0 min 0 s"


def test_without_a_set_up_no_lane_is_run(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_setup", lambda: command.Counts(failed=1))
    assert command.main([]) == 1
    assert capsys.readouterr().out.splitlines() == ["FAILED: setup", "0 passed, 1 failed, 0 min 0 s"]
