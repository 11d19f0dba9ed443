"""Threads that do not end unnoticed, and a file descriptor by which one thread wakes another."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


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
