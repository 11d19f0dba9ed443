"""The benchmark of overlapping stages: its servers wait as they are told, and what it makes of their notes is right."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang.srt.plugins.hook_registry import HookRegistry
from support.namespaces import hosts
from support.repo import REPO


@pytest.fixture
def overlap(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPO / "benchmark")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as it does itself, for good
    import overlap

    return overlap


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPO / "benchmark")
    import waits

    return waits


@pytest.fixture
def stages(waits: Any, tmp_path: Path) -> Any:
    (tmp_path / waits.WAITS).write_text(json.dumps({waits.TOWER_MS: 20, waits.PREFILL_MS: 200}))
    return waits.Stages(tmp_path)


def notes(waits: Any, folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / waits.NOTES).read_text().splitlines()]


# ---- the plugin


def test_what_waits_exists(waits: Any, stages: Any) -> None:
    assert len(stages.targets()) == 3
    assert all(callable(pkgutil.resolve_name(target)) for target in stages.targets())


def test_each_server_that_is_measured_waits(waits: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registered: list[str] = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, *_: registered.append(target))
    monkeypatch.delenv(waits.VARIABLE, raising=False)
    waits.install()
    assert registered == []
    monkeypatch.setenv(waits.VARIABLE, str(tmp_path))
    waits.install()
    assert len(registered) == 3


def test_the_tower_takes_its_time_for_what_is_in_no_cache(waits: Any, stages: Any, tmp_path: Path) -> None:
    def encode(tower: Any, groups: list[list[str]]) -> str:
        tower.totals["encoded_items"] += sum(len(group) for group in groups) - 1  # one was in the cache
        return "rows"

    tower = SimpleNamespace(totals={"encoded_items": 7})
    began = time.monotonic()
    assert stages.encode(encode, tower, [["a", "b"], ["c"]]) == "rows"
    assert time.monotonic() - began >= 0.04
    (note,) = notes(waits, tmp_path)
    assert (note["stage"], note["amount"]) == (waits.TOWER, 2)
    assert note["ended"] - note["began"] >= 40e6


def test_what_takes_longer_by_itself_is_not_waited_for(
    waits: Any, stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(waits.time, "sleep", slept.append)
    monkeypatch.setattr(waits.time, "monotonic_ns", iter((0, 50_000_000, 50_000_000)).__next__)
    stages.encode(lambda tower: tower.totals.update(encoded_items=1), SimpleNamespace(totals={"encoded_items": 0}))
    assert slept == [0.0]


@pytest.mark.parametrize(("is_extend", "least"), [(True, 0.02), (False, 0.0)])
def test_a_prefill_takes_its_time_and_a_decode_does_not(
    waits: Any, stages: Any, tmp_path: Path, is_extend: bool, least: float
) -> None:
    batch = SimpleNamespace(extend_num_tokens=100, forward_mode=SimpleNamespace(is_extend=lambda: is_extend))
    began = time.monotonic()
    assert stages.run_batch(lambda scheduler, batch: "result", None, batch) == "result"
    assert time.monotonic() - began >= least
    assert [(note["stage"], note["amount"]) for note in notes(waits, tmp_path)] == [(waits.PREFILL, 100)] * is_extend


def test_of_a_write_its_bytes_are_noted(waits: Any, stages: Any, tmp_path: Path) -> None:
    job = SimpleNamespace(bytes=5)
    stages.write(lambda job, *_: setattr(job, "bytes", 12), job, "destination", (), "link")
    (note,) = notes(waits, tmp_path)
    assert (note["stage"], note["amount"]) == (waits.WIRE, 7)


# ---- what is made of it


def test_a_stage_is_as_long_as_its_calls_within_the_request(overlap: Any) -> None:
    def note(stage: str, began: int, ms: int) -> dict[str, Any]:
        return {"stage": stage, "began": began * 10**6, "ended": (began + ms) * 10**6, "amount": 1}

    every = [
        note("tower", 5, 99),
        note("tower", 10, 20),
        note("tower", 40, 20),
        note("wire", 60, 7),
        note("wire", 90, 1),
    ]
    assert overlap.stages_of(iter(every), 10 * 10**6, 80 * 10**6) == {
        "tower": 40.0,
        "wire": 7.0,
        "prefill": 0.0,
        "first token": 70.0,
    }


def test_stages_are_those_of_the_candidate_that_does_one_after_the_other(
    overlap: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = {"tower": 100.0, "wire": 400.0, "prefill": 60.0, "first token": 600.0}
    together = {"tower": 100.0, "wire": 400.0, "prefill": 90.0, "first token": 440.0}
    measured = {("progressive", "wire", 8): [together], ("neither", "wire", 8): [alone, alone]}
    (point,) = overlap.points(measured)
    assert (point.sum, point.longest, point.least) == (560.0, 400.0, 420.0)
    overlap.show([point])
    printed = capsys.readouterr().out
    assert "| wire, 8 | 1.50 | 1.10 | 1.05 |" in printed  # of the longest stage
    assert "| wire, 8 | 1.07 | 0.79 | 0.75 |" in printed  # of their sum
    assert overlap.plot([point]).count("<rect") == 1 + 4
    assert "simulated by waiting" in overlap.plot([point])


def test_a_later_run_adds_to_an_earlier_one(overlap: Any, tmp_path: Path) -> None:
    measured = {("neither", "wire", 8): [{"tower": 1.0, "wire": 2.0, "prefill": 3.0, "first token": 7.0}]}
    overlap.report.save(tmp_path, "overlap", {}, overlap.summary(measured, overlap.points(measured)))
    assert overlap.earlier(SimpleNamespace(add=True, out=tmp_path)) == measured
    assert overlap.earlier(SimpleNamespace(add=False, out=tmp_path)) == {}


# ---- two hosts


def test_a_machine_that_has_no_such_hosts_is_told(overlap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap.shutil, "which", lambda name: None if name == "tc" else name)
    with pytest.raises(SystemExit, match="not measured: tc of iproute2"):
        overlap.check_hosts()
    monkeypatch.setattr(overlap.shutil, "which", lambda name: name)
    monkeypatch.setattr(overlap.os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="need root"):
        overlap.check_hosts()


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces, which need root, are the hosts")
def test_the_link_has_the_rate_of_the_case(overlap: Any) -> None:
    with hosts(1) as (host,):
        for rate in (500, 50):
            overlap.limit(host, rate)
        shown = subprocess.run(host.command(["tc", "qdisc", "show"]), capture_output=True, text=True, check=True).stdout
    assert "rate 400Mbit" in shown


# ---- a run that is interrupted


def test_what_was_measured_before_an_interrupt_is_shown(overlap: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with overlap.report.interruptible(["measured"]):
        raise KeyboardInterrupt
    assert "until then" in capsys.readouterr().out
    with pytest.raises(SystemExit), overlap.report.interruptible([]):
        raise SystemExit(1)
