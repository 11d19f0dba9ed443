"""A file descriptor that one thread sets and another one polls."""

from __future__ import annotations

import os
import threading


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
