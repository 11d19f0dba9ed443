"""What an operator sees before a server serves: the modes in the help, and one line for everything that cannot work."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from embedding_relay.tools import tiny_model
from embedding_relay.tools.local_cluster import COMMON_ENVIRON, CPU_ARGUMENTS, CPU_ENVIRON, HOST
from embedding_relay.tools.local_process import free_ports
from support.patience import wait_until
from support.sglang_ci import register_cpu_ci, run_tests
from support.warm_start import WarmProcess

register_cpu_ci(est_time=120, suite="base-c-test-cpu")

PREFIX = "sglang-embedding-relay: "
ENCODE = ("--disaggregation-mode", "encode")
LANGUAGE = ("--disaggregation-mode", "language")
TAKEN = "{a port that is taken}"
NO_DEVICE = "no_such_device"

AS_IT_IS = """
import runpy
runpy.run_module("sglang.launch_server", run_name="__main__")
"""

OTHER_VERSION = """
import runpy
from sglang.srt.disaggregation.multimodal import compatibility
compatibility.TESTED_SGLANG = ("0.4.9",)
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


@dataclass(frozen=True)
class Launch:
    """A server that is expected to refuse; one that starts instead is ended by the time-out, which fails the tests."""

    arguments: tuple[str, ...]
    code: str = AS_IT_IS
    environ: Mapping[str, str] = field(default_factory=dict)

    def process(self, name: str, model: Path, taken: int, logs: Path) -> WarmProcess:
        port, bootstrap = map(str, free_ports(2))
        arguments = ["--model-path", str(model), "--host", HOST, *CPU_ARGUMENTS]
        arguments += ["--port", port, "--disaggregation-bootstrap-port", bootstrap]
        arguments += [str(taken) if argument == TAKEN else argument for argument in self.arguments]
        command = [sys.executable, "-c", self.code, *arguments]
        return WarmProcess(name, command, "", logs / name, COMMON_ENVIRON | CPU_ENVIRON | dict(self.environ))


@dataclass(frozen=True)
class Ended:
    returncode: int
    said: str


UNTESTED_SGLANG = "SGLANG_EMBEDDING_ALLOW_UNTESTED_SGLANG"
BLOCK_SIZE, DEFAULT = "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE", "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE"
LAUNCHES = {
    "help": Launch(("--help",)),
    "wrong block size": Launch(ENCODE, environ={BLOCK_SIZE: "many"}),
    "wrong default": Launch(LANGUAGE, environ={DEFAULT: "-5"}),
    "flag": Launch((*ENCODE, "--pp-size", "2")),
    "port": Launch((*ENCODE, "--port", TAKEN)),
    "bootstrap port": Launch((*ENCODE, "--disaggregation-bootstrap-port", TAKEN)),
    "rdma": Launch((*ENCODE, "--disaggregation-ib-device", NO_DEVICE), environ={"MOONCAKE_PROTOCOL": "rdma"}),
    "other version": Launch(LANGUAGE, code=OTHER_VERSION),
    "other version, allowed": Launch(ENCODE, OTHER_VERSION, {UNTESTED_SGLANG: "1", BLOCK_SIZE: "many"}),
    "lost hook": Launch(ENCODE, code=ONE_HOOK_LOST),
    "class": Launch((*LANGUAGE, "--json-model-override-args", '{"architectures": ["LlavaQwenForCausalLM"]}')),
}


@pytest.fixture(scope="module")
def taken_port() -> Iterator[int]:
    with closing(socket.create_server((HOST, 0))) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def ended(taken_port: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """How each launch ended."""
    model, logs = tiny_model.cached("qwen2_5_vl"), tmp_path_factory.mktemp("launches")
    processes = [launch.process(name, model, taken_port, logs) for name, launch in LAUNCHES.items()]
    try:
        for process in processes:
            process.start()
        wait_until(lambda: all(process.returncode() is not None for process in processes), 200)
    finally:
        for process in processes:
            process.kill_group()
    return {process.name: Ended(process.returncode() or 0, process.log_text()) for process in processes}


def refusal(ended: Ended) -> str:
    """The one line with our name; nothing may follow it."""
    assert ended.returncode == 1, ended.said
    lines = ended.said.strip().splitlines()
    assert lines[-1].startswith(PREFIX), ended.said
    return lines[-1].removeprefix(PREFIX)


def test_help_names_the_modes(ended: dict[str, Ended]) -> None:
    assert "{null,prefill,decode,encode,language}" in ended["help"].said


@pytest.mark.parametrize(
    ("launch", "name", "value"), [("wrong block size", BLOCK_SIZE, "many"), ("wrong default", DEFAULT, "-5")]
)
def test_a_wrong_setting_is_named(ended: dict[str, Ended], launch: str, name: str, value: str) -> None:
    said = refusal(ended[launch])
    assert name in said
    assert value in said
    assert "Traceback" not in ended[launch].said


def test_a_flag_that_does_not_work_here_is_named(ended: dict[str, Ended]) -> None:
    assert "--pp-size" in refusal(ended["flag"])


@pytest.mark.parametrize(
    ("launch", "flag"), [("port", "--port"), ("bootstrap port", "--disaggregation-bootstrap-port")]
)
def test_an_occupied_port_is_named(ended: dict[str, Ended], taken_port: int, launch: str, flag: str) -> None:
    assert refusal(ended[launch]).startswith(f"{flag} {taken_port} ")


def test_rdma_that_is_not_there_is_not_replaced_by_tcp(ended: dict[str, Ended]) -> None:
    assert f"runs over tcp, and was asked for rdma (device: {NO_DEVICE};" in refusal(ended["rdma"])


def test_another_sglang_is_refused(ended: dict[str, Ended]) -> None:
    assert "tested with SGLang 0.4.9" in refusal(ended["other version"])


def test_an_operator_who_tries_another_sglang_is_warned_in_one_line(ended: dict[str, Ended]) -> None:
    tried = ended["other version, allowed"]
    assert BLOCK_SIZE in refusal(tried), "it came further"
    assert tried.said.count("nobody has tested this with SGLang") == 1


def test_a_model_class_that_cannot_be_divided_is_named(ended: dict[str, Ended]) -> None:
    assert refusal(ended["class"]).startswith("LlavaQwenForCausalLM cannot be divided: ")


def test_a_hook_that_did_not_apply_is_named(ended: dict[str, Ended]) -> None:
    assert "Scheduler.on_idle did not apply" in refusal(ended["lost hook"])


if __name__ == "__main__":
    run_tests(__file__)
