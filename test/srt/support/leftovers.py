"""Counts threads, sockets and event descriptors of this process: more after a test than before it is a leak."""

import importlib
import os
import threading
import time
from dataclasses import dataclass

_KINDS = ("socket:", "anon_inode:[eventfd]", "anon_inode:[eventpoll]")
_LOOKS = 5


def import_mooncake() -> None:
    """What Mooncake opens when it is imported, and keeps for the life of a process, is nobody's leak.

    It starts five threads or six, whatever they raced for, and these open descriptors in their own time. So: import it
    before counting, and count when all of them are asleep.
    """
    importlib.import_module("mooncake.engine")
    looks: list[Leftovers] = []
    deadline = time.monotonic() + 30
    while len(looks) < _LOOKS:
        assert time.monotonic() < deadline, f"the threads of Mooncake do not come to rest: {looks}"
        now = Leftovers.now()
        looks = [*looks, now] if _others_sleep() and now in (looks or [now]) else []
        time.sleep(0.01)


@dataclass(frozen=True)
class Leftovers:
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

    def assert_same(self, patience: float = 10.0) -> None:
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


def _others_sleep() -> bool:
    """Whether every thread of this process but ours waits for something."""
    try:
        for task in set(os.listdir("/proc/self/task")) - {str(threading.get_native_id())}:
            with open(f"/proc/self/task/{task}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] != "S":
                    return False
    except OSError:
        return False  # one of them ended just now
    return True
