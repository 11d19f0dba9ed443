"""The heavy data of one session, as files: its upload, its tasks, its results, its answered workbook.

Everything is written beside its place and moved there when it is whole, so a file that is there is a whole one. Names
carry the number of the attempt that wrote them: a worker that was thought dead and is not writes into its own files.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from embedding_relay.batch.tasks import Task

_encode = msgspec.json.Encoder().encode
_decode_task = msgspec.json.Decoder(Task).decode

MANIFEST: Final = "manifest.json"


class NotWhatWasSaved(Exception):
    """What was read back is not what was written: the disk is full or failing, or somebody else changed it."""


class Batch(msgspec.Struct, frozen=True):
    name: str
    tasks: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    batches: tuple[Batch, ...]

    @property
    def tasks(self) -> int:
        return sum(batch.tasks for batch in self.batches)


class Folder:
    """`slow_saving` is for tests: the seconds by which saving takes longer."""

    def __init__(self, path: Path, slow_saving: float = 0.0) -> None:
        self.path = path
        self._slow_saving = slow_saving

    def make(self) -> None:
        self.path.mkdir(parents=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def upload(self) -> Path:
        return self.path / "upload.part"

    def source(self, kind: str) -> Path:
        return self.path / f"source.{kind}"

    def answers(self, kind: str, attempt: int) -> Path:
        return self.path / f"answers.{attempt}.{kind}"

    # ---- tasks

    def _tasks(self, attempt: int) -> Path:
        return self.path / f"tasks.{attempt}"

    def build_tasks(self, attempt: int, tasks: Iterable[Task], batch_rows: int) -> Manifest:
        """Write them, batch by batch, to where they are not yet looked for."""
        partial = self._partial(attempt)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        batches = list[Batch]()
        rest = iter(tasks)
        while group := list(itertools.islice(rest, batch_rows)):
            content = b"".join(_encode(task) + b"\n" for task in group)
            name = f"{len(batches):06}.jsonl"
            (partial / name).write_bytes(content)
            batches.append(Batch(name, len(group), hashlib.sha256(content).hexdigest()))
        return Manifest(tuple(batches))

    def save_tasks(self, attempt: int, manifest: Manifest) -> None:
        partial = self._partial(attempt)
        (partial / MANIFEST).write_bytes(_encode(manifest))
        for path in partial.iterdir():
            _to_disk(path)
        time.sleep(self._slow_saving)
        partial.rename(self._tasks(attempt))
        _to_disk(self.path)

    def verify_tasks(self, attempt: int, manifest: Manifest) -> None:
        """Read back what was saved, every byte of it."""
        if self.manifest(attempt) != manifest:
            raise NotWhatWasSaved(f"{self._tasks(attempt) / MANIFEST} is not what was saved")
        for batch in manifest.batches:
            path = self._tasks(attempt) / batch.name
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != batch.sha256 or content.count(b"\n") != batch.tasks:
                raise NotWhatWasSaved(f"{path} is not what was saved")

    def manifest(self, attempt: int) -> Manifest | None:
        try:
            return msgspec.json.decode((self._tasks(attempt) / MANIFEST).read_bytes(), type=Manifest)
        except FileNotFoundError:
            return None

    def tasks(self, attempt: int) -> Iterator[Task]:
        """In the order of the rows; one batch is in memory at a time."""
        manifest = self.manifest(attempt)
        if manifest is None:
            raise NotWhatWasSaved(f"{self._tasks(attempt)} is gone")
        for batch in manifest.batches:
            for line in (self._tasks(attempt) / batch.name).read_bytes().splitlines():
                yield _decode_task(line)

    def _partial(self, attempt: int) -> Path:
        return self.path / f"tasks.{attempt}.part"

    # ---- the answered workbook

    @contextlib.contextmanager
    def saving(self, path: Path) -> Iterator[Path]:
        """Where to write what will be `path` once the block has ended well."""
        partial = path.with_name(f"{path.stem}.part{path.suffix}")
        yield partial
        _to_disk(partial)
        time.sleep(self._slow_saving)
        partial.rename(path)
        _to_disk(self.path)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
