"""Child processes that serve HTTP: started in a process group each, watched until ready, stopped with all children."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

# Below the ephemeral range (an outgoing connection would take the port before the server binds it), and beside the
# ranges that Mooncake (15000-17000) and SGLang (22000-30000) draw from on their own.
PORTS = range(17100, 22000)
POLL_SECONDS = 0.2
KILL_SECONDS = 10.0
_given: set[int] = set()

# Called with the member's name, what it is doing now, and the seconds this took or has taken so far.
Progress = Callable[[str, str, float], None]


def silent(name: str, stage: str, seconds: float) -> None:
    """For a caller who wants no progress."""


class ProcessFailed(RuntimeError):
    """A child ended, or was not ready in time; the message carries the tail of its log."""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, drawn at random so that processes which look for some at once hardly ever meet.

    A server binds its port seconds later, so none is given twice while the process lives that got it.
    """
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if not _claim(port):
            continue
        found.append(port)
        _given.add(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} free ports in {PORTS.start}..{PORTS.stop - 1}")


def _claim(port: int) -> bool:
    """Whether no process of this machine has been given it. The claim is a name that goes with this process."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0sglang-embedding-relay/port/{port}")
    except OSError:
        claim.close()
        return False
    claim.detach()  # open until the end
    return True


class Child(Protocol):
    """What is needed of a child process: `subprocess.Popen` has it."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


class LocalProcess:
    """A server of this machine. `url` with `ready_path` answers 200 once it is ready."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        url: str,
        log: Path,
        environ: Mapping[str, str] | None = None,
        ready_path: str = "/health",
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.url = url
        self.log = log
        self.environ = dict(environ or {})
        self.ready_path = ready_path
        self._process: Child | None = None
        self._started = 0.0

    @property
    def pid(self) -> int:
        """The process and, because it leads it, its group."""
        if self._process is None:
            raise RuntimeError(f"{self.name} has not been started")
        return self._process.pid

    def command_line(self) -> str:
        """As one would type it."""
        return shlex.join([*(f"{name}={value}" for name, value in dict(self.environ).items()), *self.command])

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self._start()

    def restart(self) -> None:
        """Start it once more after it has ended. What it left running is killed; its log goes on where it stopped."""
        self.kill_group()
        deadline = time.monotonic() + KILL_SECONDS
        while self.group_alive():
            if time.monotonic() > deadline:
                raise ProcessFailed(f"processes of {self.name} that SIGKILL did not end: {self.group_members()}")
            time.sleep(POLL_SECONDS)
        self.reap()
        self._start()

    def _start(self) -> None:
        self._started = time.monotonic()
        with self.log.open("ab") as log, _signals_later():
            self._process = self._launch(log, os.environ | {"PYTHONUNBUFFERED": "1"} | self.environ)

    def _launch(self, log: BinaryIO, environ: Mapping[str, str]) -> Child:
        return subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )

    def returncode(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}{self.ready_path}", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def reap(self) -> None:
        """Take the status of an ended process; a Popen object that is dropped without it warns."""
        if self._process is not None:
            self._process.wait()

    def check_ready(self) -> bool:
        """Whether it answers; raises when it has ended, because then it never will."""
        if self.returncode() is not None:
            raise ProcessFailed(f"{self.name} ended with status {self.returncode()}\n{self.log_tail()}")
        return self.healthy()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = 40) -> str:
        tail = self.log_text().splitlines()[-lines:]
        return "\n".join([f"--- the end of {self.log}", *tail])

    def kill_group(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every process of the group; none left is fine."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def group_alive(self) -> bool:
        return bool(self.group_members())

    def group_members(self) -> list[int]:
        """The running processes of the group, zombies left out: those wait for their parent only."""
        return [] if self._process is None else list(_group_members(self._process.pid))


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM while a child is forked: one that came before its pid is known would orphan it.

    Handlers, because a blocked signal would stay blocked in the child; a handler of ours does not outlive its exec.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
        return
    came: list[int] = []
    kept = {
        number: signal.signal(number, lambda number, _frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])


def wait_all_ready(processes: Iterable[LocalProcess], seconds: float, progress: Progress = silent) -> None:
    """Wait until every process answers; the first process that ends, or the deadline, raises ProcessFailed."""
    deadline = time.monotonic() + seconds
    waiting = list(processes)
    while waiting:
        for process in list(waiting):
            if process.check_ready():
                waiting.remove(process)
                progress(process.name, "ready", process.elapsed())
            else:
                progress(process.name, "starting", process.elapsed())
        if waiting and time.monotonic() > deadline:
            late = waiting[0]
            raise ProcessFailed(f"{late.name} was not ready after {late.elapsed():.0f} s\n{late.log_tail()}")
        time.sleep(POLL_SECONDS if waiting else 0)


def stop_all(processes: Iterable[LocalProcess], grace: float = 30.0, progress: Progress = silent) -> None:
    """SIGTERM to all at once (each may take seconds to drain), SIGKILL to what is left after `grace`."""
    running = [process for process in processes if process.group_alive()]
    started = time.monotonic()
    for process in running:
        os.kill(process.pid, signal.SIGTERM) if process.returncode() is None else process.kill_group()
    while running and time.monotonic() - started < grace + KILL_SECONDS:
        elapsed = time.monotonic() - started
        for process in list(running):
            if process.returncode() is not None or elapsed > grace:
                # The leader has ended: what it left behind has no one to wait for.
                process.kill_group()
            if not process.group_alive():
                process.reap()
                progress(process.name, "stopped", elapsed)
                running.remove(process)
            else:
                progress(process.name, "stopping", elapsed)
        time.sleep(POLL_SECONDS if running else 0)
    if running:
        raise RuntimeError("processes that SIGKILL did not end: " + ", ".join(str(p.group_members()) for p in running))


def _group_members(group: int) -> Iterable[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The fields after the parenthesised command name: state, parent, process group.
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(pgrp) == group and state != "Z":
                yield int(entry.name)
