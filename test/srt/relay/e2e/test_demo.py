"""`sglang-relay demo` as a user runs it: what it prints can be pasted, and Ctrl-C ends all of it, in whatever state.

That it ends on its own without --keep, and that Enter starts a part again, is in unit/test_demo.py.
"""

import json
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
# An instance that says nothing counts as gone after three of these seconds.
HEARTBEAT = {"SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "1"}
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
        """Its standard input stays open: somebody could press Enter."""
        name, _, value = self.mark.partition("=")
        environ = os.environ | QUICK_START | HEARTBEAT | {name: value}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [*DEMO, *arguments], stdin=pipe, stdout=pipe, text=True, env=environ, start_new_session=True
        )
        return self.process

    def says(self, words: str) -> list[str]:
        """Its lines up to the one with these words."""
        assert self.process is not None
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line.rstrip("\n"))
            if words in line:
                return lines
        raise AssertionError(f"it ended without saying {words!r}:\n" + "\n".join(lines))


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(f"RELAY_DEMO_TEST={tmp_path}")
    yield demo
    left = processes_of(demo.mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if demo.process is not None:
        for stream in (demo.process.stdin, demo.process.stdout):
            assert stream is not None
            stream.close()
        demo.process.wait()
    assert left == [], "the demo left processes behind"


def paste(line: str) -> str:
    """What a shell prints for it."""
    ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=90)
    return ran.stdout + ran.stderr


def test_many_rounds_then_what_it_prints_works_and_a_part_that_ends_is_named(demo: Demo, tmp_path: Path) -> None:
    process = demo.start("--family", "qwen3_vl", "--keep", "--svg", str(tmp_path / "timeline.svg"))
    said = demo.says("press Enter")
    assert "first token" in (tmp_path / "timeline.svg").read_text()
    rounds = re.search(r"in (\d+) rounds", "\n".join(said))
    assert rounds is not None, said
    assert int(rounds[1]) >= 5
    assert all(any(f"{member} ready after" in line for line in said) for member in ("encode", "language", "router"))

    chat, *others = [line for line in said if line.startswith("  curl ")]
    metrics, health = others[:3], others[3:]
    assert json.loads(paste(chat))["choices"][0]["message"]["content"]
    assert [len(paste(line).splitlines()) > 10 for line in metrics] == [True] * 3, metrics
    assert [paste(line) for line in health] == ["encode 200\n", "language 200\n", "router 200\n"]

    (trace, top) = [line for line in said if "sglang-relay t" in line and line.startswith("  ")]
    assert "tower" in paste(trace), "of the request that was pasted before"
    assert "language" in paste(f"{top} --once")

    (kill,) = [line.partition(": ")[2] for line in said if line.startswith("To see one fail: kill -9 ")]
    assert paste(kill) == ""
    assert "killed by SIGKILL" in demo.says("encode has ended")[-1]
    demo.says("press Enter to start encode again")
    started = time.monotonic()
    status = paste(f"{chat} -o /dev/null -w '%{{http_code}}'")
    assert status in ("500", "502", "503"), status
    assert time.monotonic() - started < 45, "the deadlines of docs/operations.md"

    process.send_signal(signal.SIGINT)
    said = demo.says("everything is stopped")
    assert all(any(f"{member} stopped after" in line for line in said) for member in ("language", "router"))
    process.wait()
    assert process.returncode == 130


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
