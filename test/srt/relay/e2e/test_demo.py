"""`sglang-relay demo` as a user runs it: it ends on its own, and Ctrl-C ends it too, with nothing left running."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.servers import QUICK_START
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=120, suite="base-c-test-cpu")

ITS_OWN = 4  # processes: itself, two servers, and the router
DEMO = [sys.executable, "-m", "embedding_relay.tools.cli", "demo", "--device", "cpu"]


def processes_of(mark: str) -> list[int]:
    """The processes that carry our mark in their environment: the demo and everything it started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


class Demo:
    """The running command, and every process that it started."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        name, _, value = self.mark.partition("=")
        environ = os.environ | QUICK_START | {name: value}
        self.process = subprocess.Popen(
            [*DEMO, *arguments], stdout=subprocess.PIPE, text=True, env=environ, start_new_session=True
        )
        return self.process


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(f"RELAY_DEMO_TEST={tmp_path}")
    yield demo
    left = processes_of(demo.mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if demo.process is not None:
        assert demo.process.stdout is not None
        demo.process.stdout.close()
        demo.process.wait()
    assert left == [], "the demo left processes behind"


def test_many_rounds_then_everything_stops(demo: Demo) -> None:
    process = demo.start("--family", "qwen3_vl")
    assert process.stdout is not None
    said = process.stdout.read()
    process.wait()
    assert process.returncode == 0, said
    rounds = re.search(r"came over in (\d+) rounds", said)
    assert rounds is not None, said
    assert int(rounds[1]) >= 5
    for member in ("encode", "language", "router"):
        assert f"{member} ready after" in said
        assert f"{member} stopped after" in said


def test_ctrl_c_stops_everything(demo: Demo) -> None:
    """In the worst moment: the servers have begun to start processes of their own."""
    process = demo.start()
    assert process.stdout is not None
    deadline = time.monotonic() + 60
    while len(processes_of(demo.mark)) <= ITS_OWN:
        assert process.poll() is None
        assert time.monotonic() < deadline, "the servers did not start"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    process.wait()
    assert process.returncode == 130


if __name__ == "__main__":
    run_tests(__file__)
