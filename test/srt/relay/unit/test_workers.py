"""A transfer worker: one retry when it is safe, none when it is not, and an answer to every job."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from embedding_relay.memory.layout import AUX, EMBEDDINGS, FILL_IDS, ITEMS, MROPE, RECORDS, BufferLayout
from embedding_relay.memory.plane import Entry, Link, Region, TransferError, Unreachable, private_memory
from embedding_relay.protocol.effects import ChunkDestination, TransferEmbeddingChunk, Window
from embedding_relay.protocol.messages import RECORD_BYTES, Address, Register
from embedding_relay.protocol.plan import Column, Segment
from embedding_relay.transport import workers
from embedding_relay.transport.workers import IDLE_SECONDS, ChunkJob, TransferWorker, TransferWorkers

ENTRIES = [Entry(0, 0, 1)]


class ScriptedPlane:
    """Links that do what the test says, in the place of an engine."""

    session_id = "me"

    def __init__(self) -> None:
        self.failures = 0
        self.failure: type[TransferError] = TransferError
        self.broken: BaseException | None = None
        self.quiet = True
        self.calls: list[str] = []
        self.linked: list[str] = []
        self.gate: threading.Event | None = None

    def start(self, regions: Sequence[Region]) -> None: ...

    def close(self) -> None: ...

    memory_name, mapped, renewals, allocate = "", 0, 0, staticmethod(private_memory)

    def has_read_everything(self, writer: str) -> bool:
        return True

    def link(self, session_id: str, memory_name: str = "") -> Link:
        self.linked.append(memory_name)
        return ScriptedLink(self, session_id)


class ScriptedLink(Link):
    def __init__(self, plane: ScriptedPlane, session_id: str) -> None:
        self._plane = plane
        self._session_id = session_id

    def write(self, entries: Sequence[Entry]) -> None:
        if self._plane.gate is not None and self._session_id == "stuck":
            assert self._plane.gate.wait(10)
        self._plane.calls.append("write")
        if self._plane.failures:
            self._plane.failures -= 1
            raise self._plane.failure("no luck")

    def renew(self) -> None:
        if self._plane.broken:
            raise self._plane.broken
        self._plane.calls.append("renew")

    def is_quiet(self) -> bool:
        return self._plane.quiet

    def close(self) -> None:
        self._plane.calls.append("close")


class Desk:
    """The control thread's side of the workers."""

    def __init__(self) -> None:
        self.plane = ScriptedPlane()
        self.answers: queue.Queue[str] = queue.Queue()
        self.quiet: queue.Queue[str] = queue.Queue()
        self.deaths: queue.Queue[str] = queue.Queue()
        self.memory = ""
        self.workers = TransferWorkers(
            lambda session_id: TransferWorker(session_id, self.plane, self.quiet.put, self.deaths.put, self.memory)
        )

    def write(self, session_id: str = "peer", write: Callable[[Link], None] | None = None, now: float = 0.0) -> None:
        self.workers.submit(session_id, now, write or (lambda link: link.write(ENTRIES)), self.answers.put)

    def answer(self) -> str:
        return self.answers.get(timeout=10)


def thread_named(name: str) -> Any:
    [thread] = [thread for thread in threading.enumerate() if thread.name == name]
    return thread


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(workers, "_LOOK_EVERY", 0.01)
    monkeypatch.setattr(workers, "_RETRY_PATIENCE", 0.1)
    before = set(threading.enumerate())
    desk = Desk()
    yield desk
    desk.workers.close()
    assert set(threading.enumerate()) == before


# ---- one chunk


HERE = dict(zip((EMBEDDINGS, FILL_IDS, MROPE, AUX, ITEMS, RECORDS), range(1000, 7000, 1000), strict=True))
THERE = (10_000, 20_000, 30_000, 40_000, 50_000)
RECORDS_THERE = 60_000


def registered(pointers: tuple[int, ...], records: tuple[int, int] | None = None) -> Register:
    handshake = msgspec.structs.replace(Buffers.layout.handshake(), records=records)
    return Register(Address("127.0.0.1", 1), "one", pointers, handshake)


class Buffers:
    """What a chunk needs of the registered buffers and of the rows: their layout, and that somebody stages."""

    layout = BufferLayout(hidden_size=4, dtype="float32", deepstack_rows=0, block_size=2, blocks=8)
    media_runs = ((0, 3),)

    def __init__(self) -> None:
        self.staged: list[tuple[object, ...]] = []

    def pointers_of(self, columns: Iterable[Column]) -> tuple[int, ...]:
        return tuple(HERE[column.name] for column in columns)

    def stage(self, *what: object, with_media: bool, apart: bool) -> None:
        self.staged.append((*what, with_media, apart))

    def segments(self, source: object) -> list[Segment]:
        """All three media rows, in two pieces of memory."""
        return [Segment(70_000, 0, 1), Segment(80_000, 1, 2)]


class LargeBuffers:
    layout = BufferLayout(hidden_size=4096, dtype="bfloat16", deepstack_rows=0, block_size=100, blocks=20)
    media_runs = ((0, 1600),)

    def pointers_of(self, columns: Iterable[Column]) -> tuple[int, ...]:
        return tuple(0 for _ in columns)

    def segments(self, source: object) -> list[Segment]:
        return [Segment(1 << 45, 0, 1600)]


class Records:
    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def write_in_turn(self, pieces: Iterable[Sequence[Entry]]) -> Iterator[None]:
        for entries in pieces:
            self.entries += entries
            yield


def job_of(
    buffers: Any,
    finished: Callable[[ChunkJob], None] = lambda _: None,
    *,
    stage: bool = True,
    apart: bool = True,
    from_where_they_are: bool = False,
    is_needed: Callable[[], bool] = lambda: True,
) -> ChunkJob:
    """Three rows in blocks 2 and 3: all for one destination, the last for another, which has the rest."""
    destinations = (
        ChunkDestination("one", (5, 6), first_row=0, start_row=0, stop_row=3, with_aux=True),
        ChunkDestination("other", (7,), first_row=2, start_row=2, stop_row=3, with_aux=False),
    )
    window = Window(first_row=0, rows=3, blocks=(2, 3), stage=stage, apart=apart)
    chunk = TransferEmbeddingChunk(9, 1, window, destinations)
    options: Any = {"from_where_they_are": from_where_they_are, "is_needed": is_needed}
    return ChunkJob(chunk, buffers, buffers, finished, lambda *_: None, **options)


def test_a_chunk_is_staged_once_and_each_destination_gets_its_rows() -> None:
    buffers, links = Buffers(), (Records(), Records())
    job = job_of(buffers)
    for destination, link in zip(job.chunk.destinations, links, strict=True):
        job.write(destination, registered(THERE), link)  # type: ignore[arg-type]
    assert buffers.staged == [(buffers, 0, 3, (2, 3), True, True)]
    one, other = (sorted(link.entries) for link in links)
    assert one == [
        Entry(1000 + 4 * 16, 10_000 + 10 * 16, 3 * 16),
        Entry(2000 + 4 * 4, 20_000 + 10 * 4, 3 * 4),
        Entry(3000 + 4 * 12, 30_000 + 10 * 12, 3 * 12),
        Entry(4000 + 2 * 64, 40_000 + 5 * 64, 64),
        Entry(5000 + 4 * 16, 50_000 + 10 * 16, 3 * 16),
    ]
    assert other == [
        Entry(1000 + 6 * 16, 10_000 + 14 * 16, 16),
        Entry(2000 + 6 * 4, 20_000 + 14 * 4, 4),
        Entry(3000 + 6 * 12, 30_000 + 14 * 12, 12),
        Entry(5000 + 6 * 16, 50_000 + 14 * 16, 16),
    ]
    assert job.bytes == sum(entry.length for entry in one + other)


def test_small_columns_go_side_by_side_to_whoever_takes_them_so() -> None:
    """One of the two destinations does not; both get the aux row that says what there is."""
    buffers, links = Buffers(), (Records(), Records())
    job = job_of(buffers)
    one, other = (registered(THERE, (RECORDS_THERE, size)) for size in (RECORD_BYTES, RECORD_BYTES + 4))
    for destination, register, link in zip(job.chunk.destinations, (one, other), links, strict=True):
        job.write(destination, register, link)  # type: ignore[arg-type]
    assert sorted(links[0].entries) == [
        Entry(1000 + 4 * 16, 10_000 + 10 * 16, 3 * 16),
        Entry(4000 + 2 * 64, 40_000 + 5 * 64, 64),
        Entry(6000 + 4 * 32, 60_000 + 10 * 32, 3 * 32),
    ]
    assert [(entry.destination // 10_000, entry.length) for entry in sorted(links[1].entries)] == [
        (1, 16),
        (2, 4),
        (3, 12),
        (5, 16),
    ]
    assert job.bytes == 3 * (16 + 32) + 64 + 16 + 32


def test_small_columns_are_staged_apart_only_if_the_chunk_says_so() -> None:
    buffers = Buffers()
    job = job_of(buffers, apart=False)
    job.write(job.chunk.destinations[0], registered(THERE, (RECORDS_THERE, RECORD_BYTES)), Records())  # type: ignore[arg-type]
    assert buffers.staged == [(buffers, 0, 3, (2, 3), True, False)]


def test_embeddings_are_sent_from_where_they_are_if_the_data_plane_can() -> None:
    buffers, link = Buffers(), Records()
    job = job_of(buffers, from_where_they_are=True)
    job.write(job.chunk.destinations[0], registered(THERE), link)  # type: ignore[arg-type]
    assert buffers.staged == [(buffers, 0, 3, (2, 3), False, True)]
    assert [entry for entry in link.entries if entry.destination < 20_000] == [
        Entry(70_000, 10_000 + 10 * 16, 16),
        Entry(80_000, 10_000 + 11 * 16, 2 * 16),
    ]
    assert job.bytes == 3 * (4 + 12 + 16 + 16) + 64


@pytest.mark.parametrize("from_where_they_are", [False, True])
def test_rows_that_a_destination_has_are_not_written_to_it(from_where_they_are: bool) -> None:
    """Their small columns are; and the other destination gets them."""
    buffers, links = Buffers(), (Records(), Records())
    job = job_of(buffers, from_where_they_are=from_where_they_are)
    one, other = job.chunk.destinations
    one = msgspec.structs.replace(one, left_out=((1, 3),))
    for destination, link in zip((one, other), links, strict=True):
        job.write(destination, registered(THERE), link)  # type: ignore[arg-type]
    embeddings = [[entry for entry in link.entries if entry.destination < 20_000] for link in links]
    sources = (70_000, 80_016) if from_where_they_are else (1000 + 4 * 16, 1000 + 6 * 16)
    assert embeddings[0] == [Entry(sources[0], 10_000 + 10 * 16, 16)]
    assert embeddings[1] == [Entry(sources[1], 10_000 + 14 * 16, 16)]
    assert job.bytes == 3 * (4 + 12 + 16) + 64 + 16 + (4 + 12 + 16) + 16


@pytest.mark.parametrize("from_where_they_are", [False, True])
def test_a_large_chunk_goes_in_pieces_that_are_told_of(from_where_they_are: bool) -> None:
    """Every byte once, all of the small columns with the first piece, and no word about the last."""
    buffers, link = LargeBuffers(), Records()
    blocks = tuple(range(16))
    destination = ChunkDestination(
        "one", (3, *range(5, 20)), first_row=100, start_row=130, stop_row=1600, with_aux=False
    )
    chunk = TransferEmbeddingChunk(9, 1, Window(0, 1600, blocks, stage=False), (destination,))
    told: list[tuple[str, int, int]] = []
    job = ChunkJob(
        chunk,
        buffers,  # type: ignore[arg-type]
        buffers,  # type: ignore[arg-type]
        lambda _: None,
        lambda session, row: told.append((session, row, sum(entry.length for entry in link.entries))),
        from_where_they_are=from_where_they_are,
    )
    job.write(destination, registered((1 << 40,) * 5), link)  # type: ignore[arg-type]
    small, large = 4 + 12 + 16, 8192
    assert len(told) >= 4
    assert [bytes_then for _, _, bytes_then in told] == [(row - 130) * large + 1470 * small for _, row, _ in told]
    assert all((row - 100) % 100 == 0 and 130 < row < 1600 for _, row, _ in told)
    assert job.bytes == 1470 * (small + large)
    landed = sorted((e.destination, e.destination + e.length) for e in link.entries if e.length > 10 * large)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(landed)), "nothing twice"


def test_nothing_is_written_of_a_chunk_that_is_not_needed_any_more() -> None:
    buffers, link, finished = Buffers(), Records(), list[ChunkJob]()
    job = job_of(buffers, finished.append, is_needed=lambda: False)
    for destination in job.chunk.destinations:
        job.write(destination, registered(THERE), link)  # type: ignore[arg-type]
        job.done(destination.session_id, "")
    assert (buffers.staged, link.entries) == ([], [])
    assert [(one.errors, one.rows, one.bytes) for one in finished] == [({}, 0, 0)]


def test_rows_that_are_staged_already_are_not_staged_again() -> None:
    buffers = Buffers()
    job = job_of(buffers, stage=False)
    job.write(job.chunk.destinations[0], registered(THERE), Records())  # type: ignore[arg-type]
    assert buffers.staged == []


def test_the_last_destination_of_a_chunk_to_end_reports_it() -> None:
    finished: list[ChunkJob] = []
    job = job_of(Buffers(), finished.append)
    job.done("one", "no luck")
    assert finished == []
    job.done("other", "")
    assert finished == [job]
    assert job.errors == {"one": "no luck"}
    assert job.rows == 1, "those that were written"


# ---- a worker, and several


def test_a_write_that_works_is_written_once(desk: Desk) -> None:
    desk.write()
    assert desk.answer() == ""
    assert desk.plane.calls == ["write"]


def test_a_failed_write_is_repeated_once_over_a_renewed_link(desk: Desk) -> None:
    desk.plane.failures = 1
    desk.write()
    assert desk.answer() == ""
    assert desk.plane.calls == ["write", "renew", "write"]
    assert not thread_named("relay-transfer-peer").owes_proof


def test_a_peer_that_does_not_answer_is_not_asked_again_and_owes_no_proof(desk: Desk) -> None:
    desk.plane.failures, desk.plane.failure = 1, Unreachable
    desk.write()
    assert desk.answer() == "no luck"
    assert desk.plane.calls == ["write"]
    desk.workers.report_when_quiet("peer")
    assert desk.quiet.get(timeout=10) == "peer"


def test_a_peer_that_is_gone_when_a_write_is_repeated(desk: Desk) -> None:
    desk.plane.failures, answers = 2, iter([TransferError, Unreachable])

    def write(link: Link) -> None:
        desk.plane.failure = next(answers)
        link.write(ENTRIES)

    desk.write(write=write)
    assert desk.answer() == "no luck"
    assert desk.plane.calls[:3] == ["write", "renew", "write"]


def test_a_second_failure_is_reported_and_the_link_renewed_again(desk: Desk) -> None:
    desk.plane.failures = 2
    desk.write()
    assert desk.answer() == "no luck"
    assert desk.plane.calls == ["write", "renew", "write", "renew"]


def test_without_proof_of_quiet_nothing_is_repeated(desk: Desk) -> None:
    """S3: the older copy could land over newer rows."""
    desk.plane.failures, desk.plane.quiet = 1, False
    desk.write()
    assert desk.answer() == "the write to peer failed, and may still land"
    assert desk.plane.calls == ["write", "renew"]


def test_quiet_is_reported_when_asked_for_and_proven(desk: Desk) -> None:
    desk.plane.failures, desk.plane.quiet = 1, False
    desk.write()
    desk.answer()
    desk.workers.report_when_quiet("peer")
    desk.workers.report_when_quiet("unknown")
    with pytest.raises(queue.Empty):
        desk.quiet.get(timeout=0.05)
    desk.plane.quiet = True
    assert desk.quiet.get(timeout=10) == "peer"
    assert not thread_named("relay-transfer-peer").owes_proof
    with pytest.raises(queue.Empty):
        desk.quiet.get(timeout=0.05)


def test_a_worker_that_is_to_end_waits_for_no_proof(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_RETRY_PATIENCE", 60.0)
    desk.plane.quiet, has_failed = False, threading.Event()

    def write(link: Link) -> None:
        has_failed.set()
        raise TransferError("no luck")

    desk.write(write=write)
    assert has_failed.wait(10)
    desk.workers.keep_only(())
    assert desk.answer() == "the write to peer failed, and may still land"


def test_proof_that_does_not_come_is_looked_for_ever_less_often(desk: Desk) -> None:
    worker = TransferWorker("peer", desk.plane, desk.quiet.put, desk.deaths.put)
    assert worker._until_next_look() is None

    def after(seconds: float) -> float:
        worker._look_until = time.monotonic() + workers._PROOF_EXPIRES - seconds
        waits = worker._until_next_look()
        assert waits is not None
        return waits

    assert workers._LOOK_EVERY < after(1) < after(10) < after(1000) == workers._LOOK_SELDOM


def test_looking_for_proof_ends_without_any(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_PROOF_EXPIRES", 0.05)
    desk.plane.failures, desk.plane.quiet = 1, False
    desk.write()
    desk.answer()
    desk.workers.report_when_quiet("peer")
    with pytest.raises(queue.Empty):
        desk.quiet.get(timeout=0.2)
    desk.plane.quiet = True
    with pytest.raises(queue.Empty):
        desk.quiet.get(timeout=0.1)


def test_a_worker_is_busy_as_long_as_it_has_jobs(desk: Desk) -> None:
    worker = TransferWorker("peer", desk.plane, desk.quiet.put, desk.deaths.put)
    assert not worker.is_busy
    worker.submit(lambda link: link.write(ENTRIES), desk.answers.put)
    assert worker.is_busy
    worker.start()
    assert desk.answer() == ""
    worker.stop()
    worker.join(10)
    assert not worker.is_busy


def test_who_ends_a_worker_twice_hears_of_no_proof(desk: Desk) -> None:
    worker = TransferWorker("peer", desk.plane, desk.quiet.put, desk.deaths.put)
    worker.start()
    worker.stop()
    worker.join(10)
    worker.stop()
    worker.submit(lambda link: link.write(ENTRIES), desk.answers.put)
    assert desk.answer() == "the transfer worker for peer has ended"
    assert desk.quiet.empty()


def test_a_stuck_peer_holds_up_nobody_else(desk: Desk) -> None:
    desk.plane.gate = threading.Event()
    desk.write("stuck")
    desk.write("other")
    assert desk.answer() == ""
    desk.plane.gate.set()
    assert desk.answer() == ""
    assert len(desk.workers) == 2


@pytest.mark.parametrize("bug", [ZeroDivisionError("a bug"), SystemExit("leave"), KeyboardInterrupt("stop")])
def test_a_job_that_breaks_its_worker_is_answered_and_reported_and_the_next_one_works(
    desk: Desk, bug: BaseException
) -> None:
    def explode(link: Link) -> None:
        raise bug

    desk.write(write=explode)
    assert desk.answer() == f"the transfer worker for peer failed: {bug!r}"
    assert desk.deaths.get(timeout=10) == f"relay-transfer-peer failed: {bug!r}"
    desk.write()
    assert desk.answer() == ""
    # How far the broken write got, nobody knows: its engine was thrown away, and the proof is about that one.
    assert desk.plane.calls == ["renew", "write"]
    desk.plane.quiet = False
    desk.workers.report_when_quiet("peer")
    with pytest.raises(queue.Empty):
        desk.quiet.get(timeout=0.05)
    desk.plane.quiet = True
    assert desk.quiet.get(timeout=10) == "peer"


@pytest.mark.parametrize("bug", [ZeroDivisionError("a bug"), SystemExit("leave")])
def test_a_worker_that_dies_answers_all_its_jobs_and_is_reported_and_replaced(desk: Desk, bug: BaseException) -> None:
    desk.plane.gate = threading.Event()
    desk.plane.failures, desk.plane.broken = 1, bug
    for _ in range(3):
        desk.write("stuck")
    worker = thread_named("relay-transfer-stuck")
    desk.plane.gate.set()
    assert desk.deaths.get(timeout=10) == f"relay-transfer-stuck failed: {bug!r}"
    assert desk.deaths.get(timeout=10) == f"relay-transfer-stuck died: {bug!r}"
    assert desk.answer() == "the transfer worker for stuck has died"
    assert [desk.answer(), desk.answer()] == ["the transfer worker for stuck has ended"] * 2
    worker.join(10)
    worker.submit(lambda link: link.write(ENTRIES), desk.answers.put)  # it saw it alive a moment ago
    assert desk.answer() == "the transfer worker for stuck has ended"
    worker.report_when_quiet()
    assert desk.quiet.empty(), "its write may still land"
    desk.plane.broken = None
    desk.write("stuck")
    assert desk.answer() == ""


def test_no_other_worker_vouches_for_the_writes_of_one_that_died(desk: Desk) -> None:
    """S3: with the worker went its connections, and so the only proof of their end."""
    desk.plane.failures, desk.plane.broken = 1, ZeroDivisionError("a bug")
    desk.plane.gate = threading.Event()
    desk.write("stuck")
    worker = thread_named("relay-transfer-stuck")
    desk.plane.gate.set()
    desk.answer()
    worker.join(10)
    desk.plane.broken = None
    desk.write("stuck")
    assert desk.answer() == ""
    desk.workers.report_when_quiet("stuck")
    with pytest.raises(queue.Empty):
        desk.quiet.get(timeout=0.2)


def test_a_worker_without_an_engine_answers_and_is_reported_and_owes_no_proof(desk: Desk) -> None:
    desk.plane.link = None  # type: ignore[method-assign, assignment]
    desk.write()
    assert desk.answer() == "the transfer worker for peer has ended"
    assert desk.deaths.get(timeout=10).startswith("relay-transfer-peer died: TypeError")
    desk.workers.report_when_quiet("peer")
    assert desk.quiet.get(timeout=10) == "peer", "it has written nothing"


def test_the_worker_of_a_session_that_is_gone_ends(desk: Desk) -> None:
    desk.write("gone")
    desk.write("kept")
    desk.answer()
    desk.answer()
    desk.workers.keep_only({"kept"})
    assert len(desk.workers) == 1
    for thread in threading.enumerate():
        if thread.name == "relay-transfer-gone":
            thread.join(10)
    assert desk.plane.calls.count("close") == 1


def test_another_process_of_a_session_gets_a_worker_of_its_own_and_no_job_of_the_first(desk: Desk) -> None:
    """What the first process had offered is an address in memory of the second by now."""
    desk.plane.gate, desk.memory, wrote, has_begun = threading.Event(), "first", list[str](), threading.Event()
    for name in ("under way", "queued"):

        def write(link: Link, name: str = name) -> None:
            has_begun.set()
            link.write(ENTRIES)
            wrote.append(name)

        desk.workers.submit("stuck", 0.0, write, desk.answers.put, "first")
    assert has_begun.wait(10)
    desk.memory = "second"
    desk.workers.submit("stuck", 0.0, lambda link: wrote.append("of the second"), desk.answers.put, "second")
    assert desk.answer() == "", "the second does not wait for the first"
    desk.plane.gate.set()
    assert {desk.answer(), desk.answer()} == {"", "session stuck is gone"}
    assert wrote == ["of the second", "under way"]
    assert desk.plane.linked == ["first", "second"]


def test_a_worker_that_owes_proof_is_kept_whatever_memory_its_session_has(desk: Desk) -> None:
    desk.plane.failures, desk.plane.quiet = 1, False
    desk.write()
    desk.answer()
    desk.workers.submit("peer", 0.0, lambda link: link.write(ENTRIES), desk.answers.put, "another")
    assert desk.answer() == ""
    desk.workers.report_when_quiet("peer")
    desk.plane.quiet = True
    assert desk.quiet.get(timeout=10) == "peer"


def test_two_chunks_of_a_room_are_written_in_their_order_although_a_proof_is_found_between_them(desk: Desk) -> None:
    desk.plane.failures, desk.plane.quiet = 1, False
    desk.write()
    desk.answer()
    go_on, wrote = threading.Event(), list[int]()

    def first(link: Link) -> None:
        assert go_on.wait(10)
        wrote.append(1)

    desk.workers.submit("peer", 0.0, first, desk.answers.put, "another")
    thread_named("relay-transfer-peer").owes_proof = False  # as `_wait_until_quiet` may find
    desk.workers.submit("peer", 0.0, lambda link: wrote.append(2), desk.answers.put, "another")
    go_on.set()
    assert [desk.answer(), desk.answer()] == ["", ""]
    assert wrote == [1, 2]


def test_jobs_behind_the_end_are_answered_too(desk: Desk) -> None:
    desk.plane.gate = threading.Event()
    desk.write("stuck")
    desk.write("stuck")
    desk.workers.keep_only(())
    desk.plane.gate.set()
    assert {desk.answer(), desk.answer()} <= {"", "session stuck is gone"}


def test_an_unused_worker_ends_and_a_busy_one_does_not(desk: Desk) -> None:
    desk.plane.gate = threading.Event()
    desk.write("stuck", now=0.0)
    desk.write("idle", now=1.0)
    desk.answer()
    desk.workers.end_idle(2.0)
    assert len(desk.workers) == 2
    assert desk.workers.next_wakeup() == IDLE_SECONDS
    desk.workers.end_idle(IDLE_SECONDS + 1.0)
    assert len(desk.workers) == 1
    assert desk.workers.next_wakeup() == 2 * IDLE_SECONDS + 1.0
    desk.plane.gate.set()
    desk.answer()
