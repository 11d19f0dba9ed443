"""The files of OpenAI's API on a real store and a real disk, and how a batch's status follows from its session."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_relay.batch.errors import OpenAIRefusal
from embedding_relay.batch.openai.files import Files, output_id, output_path, save_batch_files
from embedding_relay.batch.session.folder import Folder
from embedding_relay.batch.session.records import (
    Counts,
    Session,
)
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.disk_store import DiskStore
from embedding_relay.batch.tasks import Outcome, Result
from support.batch_sessions import run_batch, split_batch


class Place:
    def __init__(self, path: Path) -> None:
        self.settings = Settings(endpoint="http://unused", cache_dir=path, keep_seconds=1000)
        self.store = DiskStore.open(str(path / "store"))
        self.sessions = Sessions(self.store, self.settings.sessions_dir, 1000)
        self.files = Files(self.store, self.sessions, self.settings)

    def folder(self, session: Session) -> Folder:
        folder = self.sessions.folder(session.session_id)
        folder.make()
        return folder


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.store.close()


# ---- uploads


def test_an_upload_is_kept_listed_and_deleted(place: Place) -> None:
    stored = place.files.add(io.BytesIO(b'{"a":1}'), "../../etc/requests.jsonl", None)
    found, path = place.files.get(stored.file_id)
    assert (found.size, found.purpose, path.read_bytes()) == (7, "batch", b'{"a":1}')
    assert path.parent == place.settings.cache_dir / "files"
    assert found.expires_at == int(found.created_at) + 1000
    assert [one.file_id for one in place.files.all()] == [stored.file_id]
    place.files.delete(stored.file_id)
    assert place.files.all() == []
    assert not path.exists()
    with pytest.raises(OpenAIRefusal, match="there is no file"):
        place.files.get(stored.file_id)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file has no requests"),
        (b"\n \n", "the file has no requests"),
        (b"prompt,photo\na,b\n", "line 1: this line is not JSON"),
        (b"\x89PNG\r\n\x1a\n", "line 1: this line is not JSON: there is a mistake at byte 1 of it"),
        (b'[{"custom_id": "a"}]', "line 1: this line is no JSON object"),
        (b'{"custom_id": "a"}\n\n{"custom_id": "b"', "line 3: this line is not JSON: it ends too early"),
    ],
)
def test_what_is_not_json_lines_is_refused_and_not_kept(place: Place, content: bytes, says: str) -> None:
    with pytest.raises(OpenAIRefusal, match="the file must be JSON lines") as refused:
        place.files.add(io.BytesIO(content), "a.jsonl", None)
    assert says in refused.value.detail
    assert (refused.value.status, refused.value.param) == (400, "file")
    assert place.files.all() == []
    assert list((place.settings.cache_dir / "files").iterdir()) == []


@pytest.mark.parametrize("file_id", ["", "file-", "file-../../x", "file-" + "0" * 24, "file-out-" + "0" * 16])
def test_unknown_ids(place: Place, file_id: str) -> None:
    with pytest.raises(OpenAIRefusal, match="there is no file"):
        place.files.get(file_id)
    with pytest.raises(OpenAIRefusal, match="there is no file"):
        place.files.delete(file_id)


def test_what_a_client_asked_to_keep_shorter_expires_sooner(place: Place) -> None:
    stored = place.files.add(io.BytesIO(b"{}"), "a.jsonl", 3600)
    assert stored.expires_at == int(stored.created_at) + 3600


def test_the_sweep_takes_what_has_expired_and_nothing_else(place: Place) -> None:
    kept = place.files.add(io.BytesIO(b"{}"), "a.jsonl", None)
    expired = place.files.add(io.BytesIO(b"{}"), "b.jsonl", None)
    coming = place.settings.cache_dir / "files" / ("file-" + "0" * 24)
    coming.write_bytes(b"half of it")
    paths = [place.files.get(one.file_id)[1] for one in (kept, expired)]
    long_ago = time.time() - 2 * place.settings.keep_seconds
    for path in paths:
        os.utime(path, (long_ago, long_ago))
    place.store.delete(f"file:{expired.file_id}")
    place.files.sweep()
    assert [path.exists() for path in (*paths, coming)] == [True, False, True]


# ---- output


def test_output_and_errors_are_whole_files_of_the_session(place: Place) -> None:
    session = run_batch(Counts(done=1, failed=1))
    folder = place.folder(session)
    results = [
        Result(1, Outcome.DONE, answer="yes", http_status=200, custom_id="a", response={"id": "r"}),
        Result(2, Outcome.FAILED, error="no", http_status=400, custom_id="b"),
        Result(3, Outcome.CANCELLED, error="not asked", custom_id="c"),
    ]
    save_batch_files(folder, session.execution.attempt, results)
    place.sessions.add(session)
    ids = [output_id(session, "out"), output_id(session, "err")]
    assert all(ids)
    lines = [
        [json.loads(line)["custom_id"] for line in place.files.get(str(file_id))[1].read_text().splitlines()]
        for file_id in ids
    ]
    assert lines == [["a"], ["b", "c"]]
    assert {one.file_id for one in place.files.all()} == set(ids)
    assert {one.purpose for one in place.files.all()} == {"batch_output"}
    assert list(folder.path.glob("*.part*")) == []


def test_a_worker_that_was_thought_dead_saves_elsewhere(place: Place) -> None:
    session = run_batch(Counts(done=1))
    folder = place.folder(session)
    save_batch_files(folder, 1, [Result(1, Outcome.DONE, custom_id="a")])
    before = output_path(folder.path, 1, "out").read_bytes()
    save_batch_files(folder, 2, [Result(1, Outcome.CANCELLED, custom_id="a")])
    assert output_path(folder.path, 1, "out").read_bytes() == before


def test_there_is_no_output_before_it_is_saved(place: Place) -> None:
    session = split_batch()
    folder = place.folder(session)
    save_batch_files(folder, 1, [Result(1, Outcome.DONE, custom_id="a")])
    place.sessions.add(session)
    assert output_id(session, "out") is None
    with pytest.raises(OpenAIRefusal, match="there is no file"):
        place.files.get(f"file-out-{session.session_id}")


def test_no_id_for_a_file_without_lines() -> None:
    all_done = run_batch(Counts(done=3))
    assert output_id(all_done, "out") == f"file-out-{all_done.session_id}"
    assert output_id(all_done, "err") is None
    none_done = run_batch(Counts(failed=3))
    assert output_id(none_done, "out") is None
    assert output_id(none_done, "err")
