"""What an operator sees before a server serves: the modes in the help, and one line for everything that cannot work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from sglang.srt.disaggregation.multimodal import tiny_model
from sglang.srt.disaggregation.multimodal.local_cluster import COMMON_ENVIRON, CPU_ARGUMENTS, CPU_ENVIRON, HOST
from sglang.srt.disaggregation.multimodal.local_process import free_ports

PREFIX = "sglang-embedding-relay: "
MODULE = ("-m", "sglang.launch_server")


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model.cached("qwen2_5_vl")


def launch(
    model: Path, *arguments: str, start: tuple[str, ...] = MODULE, **environ: str
) -> subprocess.CompletedProcess[str]:
    """A server that is expected to refuse; one that starts instead is ended by the time-out and fails the test."""
    port, bootstrap = map(str, free_ports(2))
    command = [sys.executable, *start, "--model-path", str(model), "--host", HOST, *CPU_ARGUMENTS]
    command += ["--port", port, "--disaggregation-bootstrap-port", bootstrap, *arguments]
    environment = os.environ | COMMON_ENVIRON | CPU_ENVIRON | environ
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def refusal(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line with our name; nothing may follow it."""
    assert ended.returncode == 1, ended.stderr
    lines = ended.stderr.strip().splitlines()
    assert lines[-1].startswith(PREFIX), ended.stderr
    return lines[-1].removeprefix(PREFIX)


def test_help_names_the_modes(model: Path) -> None:
    shown = launch(model, "--help").stdout
    assert "{null,prefill,decode,encode,language}" in shown


@pytest.mark.parametrize(
    ("mode", "name", "value"),
    [
        ("encode", "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE", "many"),
        ("language", "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE", "-5"),
    ],
)
def test_a_wrong_setting_is_named(model: Path, mode: str, name: str, value: str) -> None:
    ended = launch(model, "--disaggregation-mode", mode, **{name: value})
    said = refusal(ended)
    assert name in said
    assert value in said
    assert "Traceback" not in ended.stderr


def test_a_flag_that_does_not_work_here_is_named(model: Path) -> None:
    assert "--pp-size" in refusal(launch(model, "--disaggregation-mode", "encode", "--pp-size", "2"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with closing(socket.create_server((HOST, 0))) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("flag", ["--port", "--disaggregation-bootstrap-port"])
def test_an_occupied_port_is_named(model: Path, taken_port: int, flag: str) -> None:
    said = refusal(launch(model, "--disaggregation-mode", "encode", flag, str(taken_port)))
    assert said.startswith(f"{flag} {taken_port} ")


OTHER_VERSION = """
import runpy
from packaging.specifiers import SpecifierSet
from sglang.srt.disaggregation.multimodal import hooks
hooks.SUPPORTED_SGLANG = SpecifierSet("==0.4.9")
runpy.run_module("sglang.launch_server", run_name="__main__")
"""

ONE_HOOK_LOST = """
import runpy
from sglang.srt.plugins.hook_registry import HookRegistry
apply = HookRegistry._apply_target
def forget_one(target, hooks):
    if target.endswith("on_idle"):
        raise RuntimeError("planted")
    apply(target, hooks)
HookRegistry._apply_target = staticmethod(forget_one)
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


def test_another_sglang_is_refused(model: Path) -> None:
    said = refusal(launch(model, "--disaggregation-mode", "language", start=("-c", OTHER_VERSION)))
    assert "works with SGLang ==0.4.9" in said


def test_a_hook_that_did_not_apply_is_named(model: Path) -> None:
    said = refusal(launch(model, "--disaggregation-mode", "encode", start=("-c", ONE_HOOK_LOST)))
    assert "Scheduler.on_idle did not apply" in said
