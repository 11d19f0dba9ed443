"""What an instance tells the processes that it is about to start about the cores of its machine."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from sglang.srt import platforms
from sglang.srt.disaggregation.multimodal import server_settings
from sglang.srt.disaggregation.multimodal.cpu_platform import RelayCpuPlatform

ON_CORES = RelayCpuPlatform()
ON_A_CARD = SimpleNamespace(device_type="cuda")


@pytest.fixture
def own_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What this process, whose libgomp is loaded, was set to; its environment is an empty one."""
    monkeypatch.setattr(os, "environ", {})
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    return given


def test_processes_on_cores_are_told(
    own_threads: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platforms, "_current_platform", ON_CORES)
    with caplog.at_level("INFO"):
        server_settings.share_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert own_threads == [1]
    assert [record.message for record in caplog.records if record.message.startswith("relay cores: ")]


def test_what_the_operator_said_stays(own_threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_current_platform", ON_CORES)
    os.environ |= {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}
    server_settings.share_cores()
    assert told() == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}
    assert own_threads == []


def test_nothing_is_said_where_a_card_computes(own_threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_current_platform", ON_A_CARD)
    server_settings.share_cores()
    assert (told(), own_threads) == ({}, [])


def told() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
