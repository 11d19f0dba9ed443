"""What a process holds: threads, sockets, event descriptors. Equal before and after, or something leaks."""

import os
import threading
import time
from dataclasses import dataclass

_KINDS = ("socket:", "anon_inode:[eventfd]", "anon_inode:[eventpoll]")


@dataclass(frozen=True)
class Leftovers:
    """Mooncake keeps a thread and some descriptors for itself from its first engine on: see `warm_up`."""

    threads: frozenset[str]
    tasks: int
    descriptors: int

    @classmethod
    def now(cls) -> "Leftovers":
        return cls(
            threads=frozenset(thread.name for thread in threading.enumerate()),
            tasks=len(os.listdir("/proc/self/task")),
            descriptors=sum(_target(name).startswith(_KINDS) for name in os.listdir("/proc/self/fd")),
        )

    def assert_same(self, patience: float = 2.0) -> None:
        """Native threads may take a moment to leave the process table."""
        deadline = time.monotonic() + patience
        while (now := Leftovers.now()) != self and time.monotonic() < deadline:
            time.sleep(0.02)
        assert now.threads <= self.threads, f"threads left: {sorted(now.threads - self.threads)}"
        assert now.descriptors <= self.descriptors, f"{now.descriptors} descriptors, {self.descriptors} before"
        assert now.tasks <= self.tasks, f"{now.tasks} native threads, {self.tasks} before"


def _target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""
