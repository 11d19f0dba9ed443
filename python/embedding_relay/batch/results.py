"""The results of one session: a file per attempt, a line per row, and for each row the first line counts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec

from embedding_relay.batch.records import Counts
from embedding_relay.batch.tasks import Outcome, Result, Task

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Result).decode

FAILED_MARK = _encode(Outcome.FAILED)
# So much must be free on the disk before anything is asked: an answer that cannot be kept was paid for in vain.
ROOM = 2**20


def result_files(folder: Path) -> list[Path]:
    """In the order of the attempts."""
    return sorted(folder.glob("results.*.jsonl"), key=lambda path: int(path.suffixes[0][1:]))


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
        self._path = folder / f"results.{attempt}.jsonl"
        self._file: int | None = None

    def __enter__(self) -> ResultWriter:
        probe = self._path.with_suffix(".probe")
        try:
            probe.write_bytes(bytes(ROOM))
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

    def __init__(self, folder: Path) -> None:
        self._files = result_files(folder)
        self._places: dict[int, tuple[int, int]] = {}
        done = failed = prompt_tokens = completion_tokens = 0
        for number, path in enumerate(self._files):
            for at, line in _lines(path):
                result = _decode(line)
                if result.row in self._places:
                    continue  # a worker that was thought dead wrote it as well; the first one counts
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
                yield _decode(file.readline())
        finally:
            for file in files:
                file.close()


def failures(folder: Path, skip: int, most: int) -> tuple[int, list[Result]]:
    """How many rows failed, and `most` of them after the first `skip`, in the order in which they failed."""
    count, page = 0, list[Result]()
    seen: set[int] = set()
    for path in result_files(folder):
        for _, line in _lines(path):
            if FAILED_MARK not in line:
                continue
            result = _decode(line)
            if result.outcome is not Outcome.FAILED or result.row in seen:
                continue
            seen.add(result.row)
            count += 1
            if count > skip and len(page) < most:
                page.append(result)
    return count, page
