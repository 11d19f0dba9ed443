"""Real servers for tests: the product's recipes, with log files kept and nothing left running."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedding_relay.tools.local_cluster import LocalCluster, Options

__all__ = ["CPU", "active_log_tails", "options", "running"]

CPU = "cpu"  # also on a machine with an accelerator: the lane tests the same thing everywhere
_active: list[LocalCluster] = []


def options(model: Path, logs: Path, *arguments: str, **environ: str) -> Options:
    """What the members of a cluster have in common."""
    return Options(model=model, logs=logs, device=CPU, arguments=arguments, environ=environ)


@contextmanager
def running(cluster: LocalCluster, seconds: float = 300) -> Iterator[LocalCluster]:
    """The cluster, ready; stopped afterwards, and then no process of its groups may be left."""
    _active.append(cluster)
    try:
        cluster.start(seconds)
        try:
            yield cluster
        finally:
            cluster.stop()
        left = {member.name: pids for member in cluster.members if (pids := member.group_members())}
        assert not left, f"still running: {left}"
    finally:
        _active.remove(cluster)


def active_log_tails() -> Iterator[tuple[str, str]]:
    """What a failed test should show."""
    for cluster in _active:
        for member in cluster.members:
            yield f"log of {member.name}", member.log_tail()
