"""The memory that this process may still take: of the machine, and within the limits of its control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from embedding_relay.cores import control_groups, text_of

_KIB = 1024


def available_bytes(root: Path = Path("/")) -> int:
    """The least of what the machine has left and of what each limit leaves; 0 where nothing says so.

    What the kernel would give up for it (cached files that nobody changes) counts as left.
    """
    return max(0, min([*_of_machine(root), *_of_groups(root)], default=0))


def _of_machine(root: Path) -> Iterator[int]:
    for line in text_of(root / "proc/meminfo").splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable" and (kib := amount.split()[:1]) and kib[0].isdigit():
            yield int(kib[0]) * _KIB


def _of_groups(root: Path) -> Iterator[int]:
    for directory in control_groups(root, "memory"):
        for limit_in, used_in in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = text_of(directory / limit_in).strip(), text_of(directory / used_in).strip()
            if limit.isdigit() and used.isdigit():  # "max" is none
                yield int(limit) - int(used) + _of_unchanged_files(directory)


def _of_unchanged_files(directory: Path) -> int:
    for line in text_of(directory / "memory.stat").splitlines():
        name, _, amount = line.partition(" ")
        if name == "inactive_file" and amount.isdigit():
            return int(amount)
    return 0
