"""Threads that do not end unnoticed, and a file descriptor by which one thread wakes another."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import struct
import threading
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
"""The number of this system call, which has no function in the C library."""
_SLICE_NS: Final = 300_000


def ask_for_short_slices() -> None:
    """Have this thread run as soon as it wakes, which is what Linux gives for a slice shorter than those of others.

    For a thread that works for microseconds at a time. Those that it starts from now on have it too. A system that does
    not know it or does not allow it leaves the thread as it was.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None:
        return
    with contextlib.suppress(OSError):
        if (policy := os.sched_getscheduler(0)) == os.SCHED_OTHER:
            nice = os.getpriority(os.PRIO_PROCESS, 0)
            attributes = struct.pack("=IIQiIQQQ", 48, policy, 0, nice, 0, _SLICE_NS, 0, 0)
            ctypes.CDLL(None).syscall(number, 0, attributes, 0)


class WatchedThread(threading.Thread):
    """A daemon thread. `report` is called in it with one line that says what ended it, unless `work` has returned."""

    def __init__(self, name: str, work: Callable[[], None], report: Callable[[str], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._report = report

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # SystemExit too, which threading ignores in silence
            logger.exception("%s died", self.name)
            self._report(f"{self.name} died: {error!r}")


class WakeUp:
    """An eventfd that survives being set after it was closed: its number may belong to somebody else by then."""

    def __init__(self) -> None:
        self._fd = -1
        self._lock = threading.Lock()

    def open(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with self._lock:
            if self._fd >= 0:
                try:
                    os.eventfd_read(self._fd)
                except BlockingIOError:
                    return

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1
