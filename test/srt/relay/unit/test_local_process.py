"""Child servers: watched while they start, and gone when they are stopped, whatever they are like."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from embedding_relay.tools.local_cluster import LocalCluster
from embedding_relay.tools.local_process import (
    LocalProcess,
    ProcessFailed,
    _group_members,
    free_ports,
    stop_all,
    wait_all_ready,
)

SERVER = """
import http.server, os, signal, subprocess, sys
port, *wishes = sys.argv[1:]
if "stubborn" in wishes:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "parent" in wishes:
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", ignore])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" and "unhealthy" not in wishes else 503)
        self.end_headers()
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""
DIES = "print('what went wrong', flush=True); raise SystemExit(3)"

Start = Callable[..., LocalProcess]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., LocalProcess]]:
    made: list[LocalProcess] = []

    def make(*wishes: str, code: str = SERVER, name: str = "server") -> LocalProcess:
        (port,) = free_ports(1)
        command = [sys.executable, "-c", code, str(port), *wishes]
        made.append(LocalProcess(name, command, f"http://127.0.0.1:{port}", tmp_path / f"{name}.log"))
        return made[-1]

    yield make
    for process in made:
        process.kill_group()
        process.reap()


def test_ports_are_never_given_twice() -> None:
    ports = [*free_ports(20), *free_ports(20)]
    assert len(set(ports)) == 40


def test_two_processes_are_not_given_the_same_ports() -> None:
    """Which servers bind only seconds later. Of so few, two would get some of the same."""
    few = "from embedding_relay.tools import local_process as it; it.PORTS = range(17200, 17250)"
    command = [sys.executable, "-c", f"{few}; print(*it.free_ports(18), flush=True); input()"]
    with ExitStack() as stack:
        made = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(2)]
        for process in made:
            stack.enter_context(process)
        one, other = (set((process.stdout or sys.stdin).readline().split()) for process in made)
        for process in made:
            process.communicate("\n")
    assert len(one) == len(other) == 18
    assert one.isdisjoint(other)


def test_a_constructor_starts_nothing(server: Start) -> None:
    process = server()
    assert process.returncode() is None
    assert process.group_members() == []
    assert not process.log.exists()
    with pytest.raises(RuntimeError, match="has not been started"):
        process.pid  # noqa: B018


def test_ready_then_stopped(server: Start) -> None:
    process, seen = server(), []
    process.start()
    wait_all_ready([process], 30, lambda name, stage, seconds: seen.append((name, stage)))
    assert seen[-1] == ("server", "ready")
    assert process.group_members() == [process.pid]
    stop_all([process], progress=lambda name, stage, seconds: seen.append((name, stage)))
    assert seen[-1] == ("server", "stopped")
    assert process.returncode() == -signal.SIGTERM
    assert process.group_members() == []


def test_a_process_that_dies_early_is_reported_at_once_with_its_log(server: Start) -> None:
    healthy, dead = server(name="healthy"), server(code=DIES, name="dead")
    healthy.start()
    dead.start()
    started = time.monotonic()
    with pytest.raises(ProcessFailed, match=r"dead ended with status 3\n.*\nwhat went wrong"):
        wait_all_ready([server(name="never"), dead], 60)
    assert time.monotonic() - started < 30


def test_a_process_that_is_not_ready_in_time(server: Start) -> None:
    process = server("unhealthy")
    process.start()
    with pytest.raises(ProcessFailed, match="was not ready after"):
        wait_all_ready([process], 1)


def test_one_that_ignores_sigterm_is_killed_after_the_grace(server: Start) -> None:
    process = server("stubborn")
    process.start()
    wait_all_ready([process], 30)
    stop_all([process], grace=0.5)
    assert process.returncode() == -signal.SIGKILL
    assert process.group_members() == []


def test_children_left_behind_by_their_leader_are_killed(server: Start) -> None:
    process = server("parent")
    process.start()
    wait_all_ready([process], 30)
    assert len(process.group_members()) == 2
    os.kill(process.pid, signal.SIGKILL)
    stop_all([process], grace=5)
    assert process.group_members() == []


def test_a_cluster_that_fails_to_start_leaves_nothing(server: Start) -> None:
    good, bad = server(name="good"), server(code=DIES, name="bad")
    cluster = LocalCluster(good.url, [[good], [bad]])
    with pytest.raises(ProcessFailed, match="bad ended"), cluster:
        pytest.fail("the body must not run")
    assert good.group_members() == []
    assert cluster["good"].returncode() is not None


def test_an_error_in_the_body_stops_the_cluster(server: Start) -> None:
    process = server()
    with pytest.raises(KeyboardInterrupt), LocalCluster(process.url, [[process]]):
        raise KeyboardInterrupt
    assert process.group_members() == []


def test_an_interrupt_while_a_cluster_stops_kills_what_is_left(server: Start) -> None:
    """A second Ctrl-C: somebody does not want to wait."""
    asked: list[str] = []

    def interrupt_once(name: str, stage: str, _seconds: float) -> None:
        if stage == "stopping" and not asked:
            asked.append(name)
            raise KeyboardInterrupt

    process = server("stubborn")
    cluster = LocalCluster(process.url, [[process]], interrupt_once)
    cluster.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cluster.stop(grace=60)
    assert asked == ["server"]
    assert process.group_members() == []
    assert time.monotonic() - started < 30


def test_what_is_started_again_leaves_nothing_of_its_first_life(server: Start) -> None:
    process = server("parent")
    process.start()
    wait_all_ready([process], 30)
    first = process.pid
    os.kill(first, signal.SIGKILL)
    process.restart()
    assert list(_group_members(first)) == []
    wait_all_ready([process], 30)
    assert process.log_text().count("listening") == 2


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_a_server_is_spawned_waits_until_its_pid_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spawn = subprocess.Popen

    def interrupted(*arguments: Any, **options: Any) -> Any:
        child = spawn(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)
        return child

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    process = LocalProcess("server", [sys.executable, "-c", "import time; time.sleep(60)"], "", tmp_path / "log")
    with pytest.raises(KeyboardInterrupt):
        process.start()
    assert process.group_members() == [process.pid]
    process.kill_group()
    process.reap()
