"""Real servers for tests: the product's recipes, with log files kept and nothing left running."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from embedding_relay.tools.local_cluster import LocalCluster, Options
from support.warm_start import WarmProcess

__all__ = ["CPU", "QUICK_START", "active_log_tails", "finish_stopping", "options", "running"]

CPU = "cpu"  # also on a machine with an accelerator: the lane tests the same thing everywhere
_PATHS = (str(Path(__file__).with_name("quick_start")), os.environ.get("PYTHONPATH"))
QUICK_START = {"PYTHONPATH": os.pathsep.join(filter(None, _PATHS))}
_active: list[LocalCluster] = []
_stopper = ThreadPoolExecutor(thread_name_prefix="stops servers")
_stopping: list[Future[None]] = []


def options(model: Path, logs: Path, *arguments: str, **environ: str) -> Options:
    """What the members of a cluster have in common."""
    return Options(model, logs, CPU, arguments, QUICK_START | environ, WarmProcess)


@contextmanager
def running(cluster: LocalCluster, seconds: float = 300) -> Iterator[LocalCluster]:
    """The cluster, ready. Afterwards it is told to end; `finish_stopping` says whether it has.

    All members start at the same time, whatever the stages of the recipe: the router waits for its servers by itself.
    """
    cluster = LocalCluster(cluster.url, [cluster.members])
    _active.append(cluster)
    try:
        cluster.start(seconds)
        yield cluster
    finally:
        # SGLang looks every five seconds whether it shall end: the next servers start meanwhile.
        _stopping.append(_stopper.submit(_stop, cluster))


def finish_stopping() -> None:
    """Wait for all servers that were told to end. Of their groups no process may be left."""
    while _stopping:
        _stopping.pop(0).result()


def _stop(cluster: LocalCluster) -> None:
    try:
        cluster.stop()
        left = {member.name: pids for member in cluster.members if (pids := member.group_members())}
        assert not left, f"still running: {left}"
    finally:
        _active.remove(cluster)


def active_log_tails() -> Iterator[tuple[str, str]]:
    """What a failed test should show."""
    for cluster in list(_active):
        for member in cluster.members:
            yield f"log of {member.name}", member.log_tail()
