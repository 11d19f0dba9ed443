"""Which SGLang is served on, and what differs between those that are."""

from __future__ import annotations

import importlib.metadata
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from embedding_relay.config import UNTESTED_SGLANG
from embedding_relay.protocol.errors import SettingError
from sglang.srt.disaggregation.multimodal import compatibility, hooks
from sglang.srt.plugins.hook_registry import HookRegistry

MODE = "encode"

pytestmark = pytest.mark.usefixtures("mode")


def as_if_installed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)


def targets_of_activation(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    targets: list[str] = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, *_: targets.append(target))
    hooks.activate()
    return targets


def test_this_lane_runs_on_a_version_that_counts_as_tested() -> None:
    assert importlib.metadata.version("sglang") in compatibility.TESTED_SGLANG


@pytest.mark.parametrize("version", compatibility.TESTED_SGLANG)
def test_a_tested_version_is_served_without_a_word(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    as_if_installed(version, monkeypatch)
    hooks.verify()
    assert caplog.messages == []
    assert targets_of_activation(monkeypatch) == [hook.target for hook in hooks.hooks_here()]


@pytest.mark.parametrize("version", ["0.4.0", "0.5.24", "0.5.23.post1", "0.5.24.dev3+gabcdef0"])
def test_another_is_refused_by_its_number_and_left_as_it_is(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_installed(version, monkeypatch)
    with pytest.raises(SettingError) as refusal:
        hooks.verify()
    for said in (version, *compatibility.TESTED_SGLANG, f"{UNTESTED_SGLANG}=1"):
        assert said in str(refusal.value)
    # Only what lets it understand our modes, so that this sentence can be said.
    assert targets_of_activation(monkeypatch) == ["sglang.srt.server_args.ServerArgs.add_cli_args"]


def test_an_operator_may_try_another_and_is_told_once_that_nobody_did(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    as_if_installed("0.5.24", monkeypatch)
    monkeypatch.setenv(UNTESTED_SGLANG, "1")
    assert targets_of_activation(monkeypatch) == [hook.target for hook in hooks.hooks_here()]
    with caplog.at_level(logging.WARNING):
        hooks.verify()
    (line,) = caplog.messages
    assert "0.5.24" in line


def test_even_then_every_hook_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_installed("0.5.24", monkeypatch)
    monkeypatch.setenv(UNTESTED_SGLANG, "1")
    monkeypatch.setattr(hooks, "HOOKS", (*hooks.HOOKS, hooks.HOOKS[0]._replace(function=print)))
    with pytest.raises(SettingError, match="did not apply"):
        hooks.verify()


def test_an_answer_that_is_an_abort_finds_the_way_of_either_version() -> None:
    sent: list[tuple[Any, Any]] = []

    def send(*what: Any) -> None:
        sent.append(what)

    newer = SimpleNamespace(send_abort_output=send)
    older = SimpleNamespace(ipc_channels=SimpleNamespace(send_to_tokenizer=SimpleNamespace(send_output=send)))
    for scheduler in (newer, older):
        compatibility.send_abort(scheduler, "abort", "request")
    assert sent == [("abort", "request")] * 2
