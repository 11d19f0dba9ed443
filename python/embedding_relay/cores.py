"""The cores that this process may use, and how the threads of an instance on the CPU share them with its neighbours."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple


def usable_cores(affinity: int | None = None, root: Path = Path("/")) -> int:
    """The cores of the affinity, or fewer where a quota allows no more time than so many of them have.

    A quota of a core and a half counts as one: a thread for the half would be stopped in the middle of its work, and
    the others would wait for it.
    """
    if affinity is None:
        affinity = len(os.sched_getaffinity(0))
    return max(1, min([affinity, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """In cores, of every group that this process is in; a group without a quota, or that cannot be read, has none."""
    for directory in control_groups(root, "cpu"):
        if (quota := _quota(directory)) is not None:
            yield quota


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of every group that this process is in for this controller, those of the groups above as well,
    whose limits count too.

    In a container the path of a group may be one of the host, which does not exist here: then the mount is the group.
    """
    for mount, group in _groups(root, controller):
        for part in (group, *group.parents):
            yield mount / part.relative_to("/")


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, PurePosixPath]]:
    """Where the controller is mounted, and the path of this process's group below it."""
    mounts = root / "sys/fs/cgroup"
    for line in text_of(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/"):
            continue
        if number == "0" and not controllers:
            yield mounts, PurePosixPath(path)
        elif controller in controllers.split(","):
            yield mounts / controller, PurePosixPath(path)  # a link to it where it is mounted with other controllers


def _quota(directory: Path) -> float | None:
    quota, _, period = text_of(directory / "cpu.max").partition(" ")  # version 2
    if not quota:
        quota, period = text_of(directory / "cpu.cfs_quota_us"), text_of(directory / "cpu.cfs_period_us")
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or no such files
        return None
    return cores if cores > 0 else None  # version 1 writes -1 for none


def text_of(path: Path) -> str:
    """Empty for a file that is not there."""
    try:
        return path.read_text()
    except OSError:
        return ""


# ---- how they are shared

# What libgomp, the OpenMP that torch comes with, and SGLang read; what an operator has set stays as it is.
THREADS: Final = ("OMP_NUM_THREADS", "SGLANG_CPU_OMP_THREADS_BIND")
WAITING: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


class Sharing(NamedTuple):
    """How the processes of an instance on the CPU use its cores beside those of others."""

    environ: dict[str, str]  # for the processes that it starts: libgomp reads it when it is loaded
    own_threads: int | None  # for the process that decides, whose libgomp is loaded; None leaves them as they are
    why: str


def share(environ: Mapping[str, str], affinity: int, cores: int) -> Sharing:
    """Threads that sleep while they wait, and no more of them than there are cores to use.

    By default a thread of OpenMP that has nothing to do waits by spinning, for milliseconds, on a core that another
    instance of this host needs; and there is one for every core of the affinity, whatever quota a container has. With
    threads that sleep, dividing the cores gains nothing on top (`benchmark/threads.py`), and would cost an instance
    half of its cores whose neighbour is idle.
    """
    told = {}
    threads, waiting = _given(environ, THREADS), _given(environ, WAITING)
    # The main process cannot be told any more not to spin. It prepares pictures, as SGLang's tokenizer workers do, and
    # has one thread for it, as they have.
    own_threads = None if threads or waiting else 1
    if not threads:
        threads = f"one thread for each of {cores} cores"
        if cores < affinity:
            told["OMP_NUM_THREADS"] = str(cores)
            threads += f", because a quota allows no more of {affinity}"
    if not waiting:
        told["OMP_WAIT_POLICY"] = "PASSIVE"
        waiting = "threads sleep while they wait, because another instance of this host may need the cores"
    return Sharing(told, own_threads, f"{threads}; {waiting}")


def _given(environ: Mapping[str, str], names: Sequence[str]) -> str:
    return " and ".join(f"{name}={environ[name]} as it was set" for name in names if environ.get(name))
