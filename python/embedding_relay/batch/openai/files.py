"""The files of OpenAI's API: inputs that clients upload, and the output and error files of their batches."""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Final, Literal

import msgspec

from embedding_relay.batch.errors import NotWhatWasSaved, OpenAIRefusal
from embedding_relay.batch.openai.lines import first_bad_line, is_output, line_of
from embedding_relay.batch.session.folder import Folder
from embedding_relay.batch.session.records import Session
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.contract import Store
from embedding_relay.batch.tasks import Result

PREFIX: Final = "file:"
KEPT: Final = "files"  # in an object store, as the folder of sessions in `cache_dir`
INPUT_ID: Final = re.compile(r"file-[0-9a-f]{24}")
OUTPUT_ID: Final = re.compile(r"file-(out|err)-([0-9a-f]{16})")

Part = Literal["out", "err"]
PARTS: Final[tuple[Part, Part]] = ("out", "err")

_encode = msgspec.json.Encoder().encode


class StoredFile(msgspec.Struct, frozen=True):
    file_id: str
    name: str  # shown to people, never a path
    size: int
    created_at: float  # finer than the seconds of the API, to list in the right order
    expires_at: int | None
    purpose: Literal["batch", "batch_output"]


def _require_lines(file: IO[bytes]) -> None:
    wrong = first_bad_line(file)
    if wrong is not None:
        where = "" if wrong.line is None else f"line {wrong.line}: "
        raise OpenAIRefusal(400, f"the file must be JSON lines (.jsonl): {where}{wrong.message}", "file", wrong.code)


class Files:
    """Uploaded files have a record of their own; output and error files are found through their session."""

    def __init__(self, store: Store, sessions: Sessions, settings: Settings) -> None:
        self._store = store
        self._sessions = sessions
        self._settings = settings
        self._dir = settings.cache_dir / "files"
        self._mirror = sessions.mirror

    def add(self, upload: IO[bytes], name: str, keep_seconds: float | None) -> StoredFile:
        file_id = f"file-{secrets.token_hex(12)}"
        self._dir.mkdir(parents=True, exist_ok=True)
        path = self._dir / file_id
        try:
            with path.open("w+b") as out:
                shutil.copyfileobj(upload, out)
                out.seek(0)
                _require_lines(out)
            if self._mirror:
                self._mirror.keep(KEPT, self._dir, [file_id], verified=True)
            now, seconds = time.time(), keep_seconds or self._settings.keep_seconds
            stored = StoredFile(
                file_id, name[:200] or "upload.jsonl", path.stat().st_size, now, int(now) + int(seconds), "batch"
            )
            self._store.create(PREFIX + file_id, msgspec.msgpack.encode(stored), seconds)
        except BaseException:
            self._remove(path)
            raise
        return stored

    def get(self, file_id: str, param: str = "file_id") -> tuple[StoredFile, Path]:
        """`param` is what the caller calls the id."""
        found = self._find(file_id)
        if found is not None:
            self._bring(found[1])
        if found is None or not found[1].exists():
            why = "it was deleted, it expired, or it never existed"
            raise OpenAIRefusal(404, f"there is no file {file_id!r}: {why}", param)
        return found

    def delete(self, file_id: str) -> None:
        _, path = self.get(file_id)
        if INPUT_ID.fullmatch(file_id):
            self._store.delete(PREFIX + file_id)
        self._remove(path)

    # ---- where machines share no file system

    def _bring(self, path: Path) -> None:
        if self._mirror and not path.exists():
            self._mirror.bring(self._owner(path), path.parent, [path.name])

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        if self._mirror:
            self._mirror.remove(self._owner(path), [path.name])

    def _owner(self, path: Path) -> str:
        return KEPT if path.parent == self._dir else f"sessions/{path.parent.name}"

    def _size(self, path: Path) -> int | None:
        """None when there is no such file."""
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_size
        return self._mirror.sizes(self._owner(path), [path.name]).get(path.name) if self._mirror else None

    def all(self) -> list[StoredFile]:
        """The latest first, as OpenAI lists them."""
        uploads = (self._find(key.removeprefix(PREFIX)) for key in self._store.keys(PREFIX))
        outputs = (self._output(session, part) for session in self._sessions.all() for part in PARTS)
        found = [stored for one in (*uploads, *outputs) if one is not None for stored in one[:1]]
        return sorted(found, key=lambda stored: (stored.created_at, stored.file_id), reverse=True)

    def sweep(self) -> None:
        """Remove expired uploads: the store has forgotten them, so nothing but their age tells."""
        for path in self._dir.glob("file-*"):
            with contextlib.suppress(FileNotFoundError):  # another worker sweeps as well
                old = time.time() - path.stat().st_mtime > self._settings.keep_seconds
                if old and not self._is_known(path.name):
                    path.unlink()
        if self._mirror:
            self._mirror.sweep(KEPT, self._settings.keep_seconds, self._is_known)

    def _is_known(self, file_id: str) -> bool:
        return self._store.get(PREFIX + file_id) is not None

    def _find(self, file_id: str) -> tuple[StoredFile, Path] | None:
        if INPUT_ID.fullmatch(file_id) and (value := self._store.get(PREFIX + file_id)):
            return msgspec.msgpack.decode(value, type=StoredFile), self._dir / file_id
        if (output := OUTPUT_ID.fullmatch(file_id)) and (session := self._sessions.find(output[2])):
            return self._output(session, "out" if output[1] == "out" else "err")
        return None

    def _output(self, session: Session, part: Part) -> tuple[StoredFile, Path] | None:
        file_id = output_id(session, part)
        if file_id is None or session.order is None:
            return None
        path = output_path(self._settings.sessions_dir / session.session_id, session.execution.attempt, part)
        size = self._size(path)
        if size is None:
            return None
        name = f"batch_{session.session_id}_{'output' if part == 'out' else 'error'}.jsonl"
        saved_at = session.order.completed_at or session.order.cancelled_at or session.created_at
        return StoredFile(file_id, name, size, saved_at, None, "batch_output"), path


# ---- output and errors of a batch


def output_id(session: Session, part: Part) -> str | None:
    """None until the file is saved, and when it would be empty."""
    execution = session.execution
    if session.order is None or not execution.ready_for_download:
        return None
    lines = execution.counts.done if part == "out" else execution.total - execution.counts.done
    return f"file-{part}-{session.session_id}" if lines else None


def output_path(folder: Path, attempt: int, part: Part) -> Path:
    return folder / f"{'output' if part == 'out' else 'errors'}.{attempt}.jsonl"


def save_batch_files(folder: Folder, attempt: int, results: Iterable[Result]) -> None:
    """Write the output and the error file, each moved into place when whole, and read both back."""
    output, errors = (output_path(folder.path, attempt, part) for part in PARTS)
    output_hash, errors_hash = hashlib.sha256(), hashlib.sha256()
    with (
        folder.saving(output) as output_partial,
        folder.saving(errors) as errors_partial,
        output_partial.open("wb") as output_file,
        errors_partial.open("wb") as errors_file,
    ):
        for result in results:
            line = _encode(line_of(result, folder.path.name)) + b"\n"
            file, digest = (output_file, output_hash) if is_output(result) else (errors_file, errors_hash)
            file.write(line)
            digest.update(line)
    for path, digest in ((output, output_hash), (errors, errors_hash)):
        with path.open("rb") as saved:
            if hashlib.file_digest(saved, "sha256").digest() != digest.digest():
                raise NotWhatWasSaved(f"{path} is not what was saved")
