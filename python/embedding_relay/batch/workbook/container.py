"""Untrusted zip files: checked before anything is expanded; every kind of damage is the same error, Unreadable."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from embedding_relay.batch.errors import TooLarge, Unreadable
from embedding_relay.batch.workbook.limits import MIB, Limits

ENCRYPTED: Final = 0x1
METHODS: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What zipfile raises for a file that was cut, changed or made by hand.
DAMAGES: Final = (
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError),
    *(OSError, IndexError, KeyError),
)


@contextlib.contextmanager
def damage_is_unreadable(what: str) -> Iterator[None]:
    try:
        yield
    except DAMAGES as error:
        raise Unreadable(f"{what} is damaged, or it was cut short") from error


class Container:
    """An open zip file. Member names are found as they are written, and else without regard to case."""

    def __init__(self, file: zipfile.ZipFile, limits: Limits) -> None:
        self.file = file
        self.limits = limits
        self.members = check_members(file, limits)
        self._folded = {name.casefold(): name for name in reversed(self.members)}

    def find(self, name: str) -> str | None:
        name = name.lstrip("/")
        return name if name in self.members else self._folded.get(name.casefold())

    def read(self, name: str, most: int) -> bytes:
        if self.members[name].file_size > most:
            raise TooLarge(f"{name} in the file is larger than {most // MIB} MiB")
        with damage_is_unreadable(f"{name} in the file"):
            return self.file.read(name)

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[CheckedStream]:
        with damage_is_unreadable(f"{name} in the file"):
            stream = self.file.open(name)
        with stream:
            yield CheckedStream(stream, name)


class CheckedStream:
    """A member that is being read. Errors of this reading, and of nothing else, mean that the file is damaged."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream = stream
        self._name = name

    def read(self, size: int = -1, /) -> bytes:
        with damage_is_unreadable(f"{self._name} in the file"):
            return self._stream.read(size)


@contextlib.contextmanager
def open_container(path: Path, limits: Limits) -> Iterator[Container]:
    with damage_is_unreadable("the file"):
        file = zipfile.ZipFile(path)
    with file:
        yield Container(file, limits)


def check_members(file: zipfile.ZipFile, limits: Limits) -> dict[str, zipfile.ZipInfo]:
    """Check what a zip file states about itself. zipfile reads no more of a member than its stated size."""
    infos = file.infolist()
    if len(infos) > limits.members:
        raise TooLarge(f"the file holds {len(infos)} members; at most {limits.members} are accepted")
    expanded = sum(info.file_size for info in infos)
    if expanded > limits.expanded_bytes:
        raise TooLarge(
            f"the file expands to {expanded // MIB} MiB; at most {limits.expanded_bytes // MIB} MiB are accepted"
        )
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        if info.filename in members:
            raise Unreadable(f"the file holds {info.filename!r} twice")
        if info.flag_bits & ENCRYPTED:
            raise Unreadable("the file is protected by a password: save it without one")
        if info.compress_type not in METHODS:
            raise Unreadable(f"{info.filename!r} in the file is compressed in an unusual way: zip it again")
        members[info.filename] = info
    return members


def verify(container: Container) -> None:
    """Read everything once: a checksum that does not fit is found here and not in the middle of the work."""
    total = 0
    for name in container.members:
        with container.stream(name) as stream:
            while chunk := stream.read(MIB):
                total += len(chunk)
                if total > container.limits.expanded_bytes:
                    raise TooLarge(f"the file expands to more than {container.limits.expanded_bytes // MIB} MiB")
