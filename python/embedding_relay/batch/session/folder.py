"""The large data of one session, as files: its upload, its tasks, its results, its answered workbook.

Everything is written beside its place and moved there when it is whole, so a file that is there is a whole one. Names
carry the number of the attempt that wrote them: a worker that was thought dead and is not writes into its own files.
Results are a file per attempt and a line per row, and the first line of a row counts. After a retry the failures of the
attempts before it do not: `set_aside` is the last of these attempts.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

import msgspec

from embedding_relay.batch.errors import NotWhatWasSaved
from embedding_relay.batch.session.records import Counts
from embedding_relay.batch.tasks import Outcome, Result, Task

_encode = msgspec.json.Encoder().encode
_decode_task = msgspec.json.Decoder(Task).decode
_decode_result = msgspec.json.Decoder(Result).decode

MANIFEST: Final = "manifest.json"
# Ends the name of a folder that is being removed. What is left under such a name, a process was killed over.
REMOVED: Final = ".removed"
FAILED_MARK: Final = _encode(Outcome.FAILED)
# What differs between failures for the same reason: names, addresses and numbers.
VARYING: Final = re.compile(r"""'[^']*'|"[^"]*"|https?://\S+|\d+""")
MOST_REASONS: Final = 50
ROWS_OF_A_REASON: Final = 5
# So much must be free on the disk before anything is asked: an answer that cannot be kept was paid for in vain.
PROBE_BYTES: Final = 2**20


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
    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        self.path.mkdir(parents=True)

    def remove(self) -> None:
        """Renamed first: whoever is still writing into it finds no place to leave another file behind."""
        removed = self.path.with_suffix(REMOVED)
        with contextlib.suppress(OSError):
            self.path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

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
        """Write them, batch by batch, beside the place where they are looked for."""
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
        move_into_place(partial, self._tasks(attempt))

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

    def tasks(self, attempt: int, skip: int = 0) -> Iterator[Task]:
        """In the order of the rows, without the first `skip` of them; one batch is in memory at a time."""
        manifest = self.manifest(attempt)
        if manifest is None:
            raise NotWhatWasSaved(f"{self._tasks(attempt)} is gone")
        for batch in manifest.batches:
            if skip < batch.tasks:
                for line in (self._tasks(attempt) / batch.name).read_bytes().splitlines()[skip:]:
                    yield _decode_task(line)
            skip = max(0, skip - batch.tasks)

    def _partial(self, attempt: int) -> Path:
        return self.path / f"tasks.{attempt}.part"

    def results(self, attempt: int) -> Path:
        return self.path / f"results.{attempt}.jsonl"

    # ---- the answered workbook

    @contextlib.contextmanager
    def saving(self, path: Path) -> Iterator[Path]:
        """Where to write what will be `path` once the block has ended well."""
        partial = path.with_name(f"{path.stem}.part{path.suffix}")
        yield partial
        _to_disk(partial)
        move_into_place(partial, path)


def move_into_place(partial: Path, place: Path) -> None:
    """The last step of all saving: what was written to the disk as `partial` is there, whole, or is not there."""
    partial.rename(place)
    _to_disk(place.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- results


def result_files(folder: Path) -> list[Path]:
    """In the order of the attempts."""
    return sorted(folder.glob("results.*.jsonl"), key=attempt_of)


def attempt_of(path: Path) -> int:
    return int(path.suffixes[0][1:])


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each whole line and where it begins. The last one may be cut off: its writer was killed over it."""
    with path.open("rb") as file:
        at = 0
        for line in file:
            if line.endswith(b"\n"):
                yield at, line
            at += len(line)


class ResultWriter:
    """Appends for one attempt. A line is handed to the system in one piece, so a killed process loses none of them."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self._path = Folder(folder).results(attempt)
        self._file: int | None = None

    def __enter__(self) -> ResultWriter:
        probe = self._path.with_suffix(".probe")
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        os.close(self._file)

    def write(self, result: Result) -> None:
        assert self._file is not None
        line = _encode(result) + b"\n"
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"only {written} of the {len(line)} bytes of a result could be written: is the disk full?")


class ResultIndex:
    """Where each row's result is. Holds two numbers per row; the results themselves stay on disk."""

    def __init__(self, folder: Path, set_aside: int = 0) -> None:
        self._files = result_files(folder)
        self._places: dict[int, tuple[int, int]] = {}
        done = failed = prompt_tokens = completion_tokens = 0
        for number, path in enumerate(self._files):
            is_before = attempt_of(path) <= set_aside
            for at, line in _lines(path):
                result = _decode_result(line)
                if result.row in self._places or (is_before and result.outcome is Outcome.FAILED):
                    continue  # a worker that was thought dead wrote it as well, or the row is asked again
                self._places[result.row] = number, at
                done += result.outcome is Outcome.DONE
                failed += result.outcome is Outcome.FAILED
                prompt_tokens += result.prompt_tokens
                completion_tokens += result.completion_tokens
        self.counts = Counts(done=done, failed=failed, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def in_order(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """One result per task, in the order of the tasks; those that were never asked say so."""
        files: list[BinaryIO] = [path.open("rb") for path in self._files]
        try:
            for task in tasks:
                place = self._places.get(task.row)
                if place is None:
                    yield Result(
                        task.row, Outcome.CANCELLED, error="not asked: the run was cancelled", custom_id=task.custom_id
                    )
                    continue
                file = files[place[0]]
                file.seek(place[1])
                yield _decode_result(file.readline())
        finally:
            for file in files:
                file.close()


def keep_set_aside(folder: Path, set_aside: int, attempt: int) -> None:
    """At the end of a retry that was cancelled: rows that it did not come to fail as they had failed before."""
    if not set_aside:
        return
    index, kept = ResultIndex(folder, set_aside), set[int]()
    with ResultWriter(folder, attempt) as writer:
        for result in _failed(path for path in result_files(folder) if attempt_of(path) <= set_aside):
            if result.row not in index and result.row not in kept:
                kept.add(result.row)
                writer.write(result)


# ---- what people look at


class _RowOf(msgspec.Struct):
    """Of a result its row alone: what is not asked for is not built."""

    row: int


_decode_row = msgspec.json.Decoder(_RowOf).decode


def results_of(folder: Path, rows: Set[int], set_aside: int) -> dict[int, Result]:
    """Of these rows those that have a result, without an index over all of them."""
    found: dict[int, Result] = {}
    for path in result_files(folder):
        for _, line in _lines(path):
            if len(found) == len(rows):
                return found
            row = _decode_row(line).row
            if row not in rows or row in found:
                continue
            result = _decode_result(line)
            if result.outcome is not Outcome.FAILED or attempt_of(path) > set_aside:
                found[row] = result
    return found


class Reason(msgspec.Struct):
    """Rows that failed for the same reason, or for reasons that differ in names and numbers only."""

    error: str  # of the first of these rows
    http_status: int
    count: int = 0
    rows: list[int] = msgspec.field(default_factory=list)  # the first few
    differs: bool = False  # whether other rows have other names or numbers in it


class Failures(msgspec.Struct, frozen=True):
    count: int
    reasons: tuple[Reason, ...]  # the most frequent first
    page: tuple[Result, ...]  # in the order in which they failed


def failures(folder: Path, set_aside: int, skip: int, most: int) -> Failures:
    """The rows that failed: all of them by their reasons, and `most` of them after the first `skip` one by one."""
    seen, page = set[int](), list[Result]()
    reasons: dict[tuple[int, str], Reason] = {}
    for result in _failed(path for path in result_files(folder) if attempt_of(path) > set_aside):
        if result.row in seen:
            continue
        seen.add(result.row)
        if skip < len(seen) <= skip + most:
            page.append(result)
        _count(reasons, result)
    ordered = sorted(reasons.values(), key=lambda reason: -reason.count)
    return Failures(len(seen), tuple(ordered), tuple(page))


def _failed(files: Iterable[Path]) -> Iterator[Result]:
    for path in files:
        for _, line in _lines(path):
            if FAILED_MARK in line and (result := _decode_result(line)).outcome is Outcome.FAILED:
                yield result


def _count(reasons: dict[tuple[int, str], Reason], result: Result) -> None:
    key = result.http_status, VARYING.sub("…", result.error)
    if key not in reasons and len(reasons) >= MOST_REASONS:
        key = 0, ""
        reasons.setdefault(key, Reason("other reasons", 0))
    reason = reasons.setdefault(key, Reason(result.error, result.http_status))
    reason.count += 1
    reason.differs |= reason.error != result.error
    if len(reason.rows) < ROWS_OF_A_REASON:
        reason.rows.append(result.row)
