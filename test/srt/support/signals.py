"""Signals whose effect is there when the call returns."""

import os
import signal
from pathlib import Path

from support.patience import wait_until


def send_signal(pid: int, number: int) -> None:
    """A process that is stopped goes on for a moment, in threads on other cores: the last of them must have stopped."""
    os.kill(pid, number)
    if number == signal.SIGSTOP:
        wait_until(lambda: all(_state(task) == "T" for task in Path(f"/proc/{pid}/task").iterdir()))


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]
