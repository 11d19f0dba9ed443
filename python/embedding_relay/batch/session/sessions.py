"""All sessions: their records in the store, their folders on disk, and the copies of these in an object store."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from embedding_relay.batch.errors import UnknownSession
from embedding_relay.batch.session.folder import Folder
from embedding_relay.batch.session.records import Session
from embedding_relay.batch.store.contract import Store
from embedding_relay.batch.store.mirror import Mirror

logger = logging.getLogger(__name__)

PREFIX: Final = "session:"
# Ids become names of directories, so nothing of another form is even looked for.
ID: Final = re.compile(r"[0-9a-f]{16}")

# Files of a session, as they come into being; in patterns, for an object store.
UPLOADED: Final = ("source.*", "uploaded/*")
SPLIT: Final = ("tasks.*", "pictures/*")
RESULTS: Final = ("results.*.jsonl*",)
ANSWERED: Final = ("answers", "output", "errors")  # a file of each for every attempt

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Session).decode


class Sessions:
    """Nothing of a session is kept in the process, so any thread of any worker may use any method."""

    def __init__(self, store: Store, directory: Path, keep_seconds: float, mirror: Mirror | None = None) -> None:
        self._store = store
        self._directory = directory
        self._keep = keep_seconds
        self.mirror = mirror

    def folder(self, session_id: str) -> Folder:
        return Folder(self._directory / session_id)

    # ---- its files, where machines share no file system; else nothing is to be done

    def bring(self, session_id: str, *patterns: str) -> None:
        """Before files of a session are read: another machine may have written them."""
        if self.mirror and ID.fullmatch(session_id):
            self.mirror.bring(f"sessions/{session_id}", self.folder(session_id).path, patterns)

    def save(self, session_id: str, *patterns: str, verified: bool = False) -> None:
        """After they were written, and before it is said that they are saved."""
        if self.mirror:
            self.mirror.keep(f"sessions/{session_id}", self.folder(session_id).path, patterns, verified)

    def save_results(self, session_id: str, attempt: int, begin: int) -> int:
        """What this attempt has recorded after its first `begin` bytes. Returns up to where it is saved."""
        if not self.mirror:
            return begin
        path = self.folder(session_id).results(attempt)
        return self.mirror.keep_results(f"sessions/{session_id}", path, begin)

    def remove_files(self, session_id: str) -> None:
        self.folder(session_id).remove()
        if self.mirror:
            self.mirror.remove(f"sessions/{session_id}")

    # ---- their records

    def add(self, session: Session) -> None:
        if not self._store.create(PREFIX + session.session_id, _encode(session), self._keep):
            raise RuntimeError(f"session {session.session_id} exists already")

    def find(self, session_id: str) -> Session | None:
        value = self._store.get(PREFIX + session_id) if ID.fullmatch(session_id) else None
        try:
            return None if value is None else _decode(value)
        except msgspec.DecodeError as error:
            # A record that another version wrote must not make every other session unusable.
            logger.error("batch: session %s cannot be read: %s", session_id, error)
            return None

    def get(self, session_id: str) -> Session:
        found = self.find(session_id)
        if found is None:
            raise UnknownSession(session_id)
        return found

    def change(self, session_id: str, by: Callable[[Session], object]) -> Session:
        """The session after `by` changed it, as one step. What `by` raises is raised, and nothing has changed."""

        def changed(value: bytes) -> bytes:
            session = _decode(value)
            by(session)
            return _encode(session)

        value = self._store.change(PREFIX + session_id, self._keep, changed) if ID.fullmatch(session_id) else None
        if value is None:
            raise UnknownSession(session_id)
        return _decode(value)

    def delete(self, session_id: str) -> None:
        if not ID.fullmatch(session_id) or not self._store.delete(PREFIX + session_id):
            raise UnknownSession(session_id)

    def ids(self) -> list[str]:
        return [key.removeprefix(PREFIX) for key in self._store.keys(PREFIX)]

    def all(self) -> list[Session]:
        """The latest first."""
        found = [session for session in map(self.find, self.ids()) if session is not None]
        return sorted(found, key=lambda session: session.created_at, reverse=True)
