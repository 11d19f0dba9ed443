"""One room of the encode side: who gets its rows, how far each of them is, and what must be done next."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.counts import Counts, Event
from embedding_relay.protocol.effects import (
    ChunkDestination,
    DropRows,
    EncodeEffect,
    HeldByAll,
    Send,
    StatusChanged,
    TransferEmbeddingChunk,
    Window,
)
from embedding_relay.protocol.encode.items import Decisions, PromptItems
from embedding_relay.protocol.encode.sessions import Session, Sessions
from embedding_relay.protocol.encode.unexpected import UnexpectedRooms
from embedding_relay.protocol.ended import EndedRooms
from embedding_relay.protocol.errors import BAD_GATEWAY, INTERNAL, UNAVAILABLE, Failure, LocalError
from embedding_relay.protocol.messages import (
    AbortAck,
    Address,
    Have,
    Item,
    Manifest,
    Progress,
    Queued,
    StatusReport,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status, is_final, move
from embedding_relay.protocol.timing import Alarms, Timing


@dataclasses.dataclass
class Shared:
    """What all rooms of one encode rank have in common."""

    pool: BlockPool
    block_size: int
    timing: Timing
    sessions: Sessions
    alarms: Alarms[int | str]
    """By room number, or by session id."""
    unexpected: UnexpectedRooms
    ended: EndedRooms
    counts: Counts = dataclasses.field(default_factory=Counts)
    rooms: dict[int, EncodeRoom] = dataclasses.field(default_factory=dict)
    queue: dict[int, EncodeRoom] = dataclasses.field(default_factory=dict)
    """Rooms that wait for a source block, in order; they hold none."""

    def fail_rooms_of(self, session: Session, text: str, now: float) -> list[EncodeEffect]:
        """Nothing more can be done for this language rank. No room of the queue may begin meanwhile: it may be one."""
        effects: list[EncodeEffect] = []
        for number in sorted(session.rooms):
            room = self.rooms[number]
            if not room.is_over:
                effects += room.fail(Failure(BAD_GATEWAY, text), now)
        return effects


@dataclasses.dataclass
class Destination:
    """One language rank. Its offer takes rows from `sent` on; without an offer nothing may be written to it."""

    session_id: str
    address: Address
    sent: int = 0
    """Rows that it has been told of."""
    written: int = 0
    """Rows that are in its memory; ahead of `sent` only while a chunk takes several steps."""
    blocks: tuple[int, ...] = ()
    allocated: int = 0
    finished: bool = False
    ahead: TransferEmbeddingInfo | None = None
    """What comes when the offer is used up: an offer of rows that begin where those of the first end."""
    last_offer: Hashable = None
    """The identity of the offer that it has, or that was used up last."""
    decided: Decisions = dataclasses.field(default_factory=dict)

    @property
    def has_offer(self) -> bool:
        return self.allocated > 0

    def has_answered(self, info: TransferEmbeddingInfo) -> bool:
        """It comes again because its report was lost: every row that it asked for is over there.

        An offer before the last needs no answer: the report of the last says that those rows are over there too.
        """
        return not self.has_offer and info.identity == self.last_offer

    def waits_for(self, info: TransferEmbeddingInfo) -> bool:
        """No transfer twice: only a resume that goes on exactly where what is known ends, and only one ahead."""
        if self.finished or self.ahead or not info.is_resume:
            return False
        return info.sent_tokens == self.sent + self.allocated

    def offer(self, info: TransferEmbeddingInfo) -> None:
        if self.has_offer:
            self.ahead = info
            return
        self.blocks, self.allocated = info.dst_embedding_indices, info.allocated_tokens
        self.last_offer = info.identity

    def tokens_to_send(self, total: int) -> int:
        return min(total - self.sent, self.allocated)

    def is_last(self, total: int) -> bool:
        return total - self.sent <= self.allocated

    def goal(self, total: int) -> int:
        """The row at which this chunk ends for it."""
        return self.sent + self.tokens_to_send(total)

    def part_of_step(self, staged_stop: int, total: int, items: PromptItems) -> ChunkDestination:
        """What it gets of a step whose staged rows end at `staged_stop`."""
        stop = min(staged_stop, self.goal(total))
        return ChunkDestination(
            session_id=self.session_id,
            blocks=self.blocks,
            first_row=self.sent,
            start_row=self.written,
            stop_row=stop,
            with_aux=self.written == 0,
            left_out=items.leave_out(self.session_id, self.decided, self.written, stop),
        )

    def use_up_offer(self, total: int) -> None:
        """Every row of the chunk is written."""
        self.finished = self.is_last(total)
        self.sent = self.goal(total)
        self.blocks, self.allocated = (), 0
        ahead, self.ahead = self.ahead, None
        if ahead is not None and not self.finished:
            self.offer(ahead)

    def part_of_next_step(self, staged_stop: int, total: int, items: PromptItems) -> ChunkDestination:
        """As `part_of_step`, when the offer is used up and the one ahead is taken."""
        then = dataclasses.replace(self)
        then.use_up_offer(total)
        then.written = then.sent
        return then.part_of_step(staged_stop, total, items)

    @property
    def offered_blocks(self) -> tuple[int, ...]:
        return self.blocks + (self.ahead.dst_embedding_indices if self.ahead else ())


class EncodeRoom:
    """The first chunk and every later one go through the same code: only `sent` differs."""

    def __init__(self, room: int, shared: Shared, now: float) -> None:
        self.room = room
        self.status = Status.BOOTSTRAPPING
        self.expected = False
        """Its request has arrived here."""
        self.asked = False
        """A language rank has said something about it, be it only that it is queued there."""
        self.begin_by = now + shared.timing.bootstrap
        """When both halves of the request must be here."""
        self.queued: dict[str, Address] = {}
        """Sessions that have announced it and offered nothing yet."""
        self.required: int | None = None
        self.total: int | None = None
        self.ready = 0
        """Rows before which everything is made, or needed by nobody."""
        self.items = PromptItems()
        self.destinations: dict[str, Destination] = {}
        self.blocks: tuple[int, ...] = ()
        """Of our own pool, from the first write until the end of the room."""
        self.under_way: TransferEmbeddingChunk | None = None
        self.next_step: TransferEmbeddingChunk | None = None
        """It is with the workers already, behind the one that is under way."""
        self.unacknowledged: dict[str, Address] = {}
        """Sessions whose abort waits for the write under way."""
        self._staged = (0, 0)
        self._last_transfer_id = 0
        self._shared = shared
        shared.rooms[room] = self
        shared.alarms.set(room, self.begin_by)

    @property
    def is_over(self) -> bool:
        return is_final(self.status)

    def move(self, wanted: Status) -> None:
        self.status = move(self.status, wanted)

    @property
    def is_complete(self) -> bool:
        """Every rank that was announced has asked."""
        return self.required is not None and len(self.destinations) == self.required

    def has_destination_at(self, address: Address) -> bool:
        return any(destination.address == address for destination in self.destinations.values())

    @property
    def unfinished(self) -> list[Destination]:
        return [destination for destination in self.destinations.values() if not destination.finished]

    # ---- from this instance

    def expect(self, now: float, items: Sequence[Item] = ()) -> list[EncodeEffect]:
        """The request of this room is here; a language instance that is alive has the other half, and says so soon."""
        if self.expected:
            return []
        if not self.asked:
            self._shared.alarms.set(self.room, now + self._shared.timing.unasked)
        self.expected = True
        self._shared.unexpected.discard(self.room)
        self.items.expect(items)
        told = [effect for destination in self.destinations.values() for effect in self._tell_items(destination)]
        return [*told, *self._say_held_by_all()]

    def submit(self, total: int, absent: Iterable[int], ready: int | None, now: float) -> list[EncodeEffect]:
        """How many rows it has is known, and those before `ready` exist; all of them if it is None."""
        if self.total is not None:
            self._shared.counts.events[Event.SUBMIT_REPEATED] += 1
            return []
        effects = self.expect(now)
        if self.items.end > total:
            raise LocalError(f"room {self.room} has {total} rows, and items up to row {self.items.end}")
        self.total = total
        return [*effects, *self._take_rows(absent, total if ready is None else ready, now)]

    def more_rows(self, ready: int, absent: Iterable[int], now: float) -> list[EncodeEffect]:
        """Everything before `ready` is made by now."""
        self._known_total()
        return [] if self.is_over else self._take_rows(absent, ready, now)

    def _take_rows(self, absent: Iterable[int], ready: int, now: float) -> list[EncodeEffect]:
        if not self.ready <= ready <= self._known_total():
            raise LocalError(f"room {self.room}: rows before {ready} of {self.total} are made, after {self.ready}")
        self.items.check_absent(absent)
        if self._waits_for_rows:
            self._shared.alarms.set(self.room, now + self._shared.timing.waiting)
        self.ready = ready
        return self.advance(now)

    # ---- from the language side

    def note_queued(self, message: Queued, session: Session, now: float) -> None:
        """Its blocks may take long, as long as the session lives."""
        self._note_asked()
        self.queued[message.session_id] = message.address
        if not self.expected:
            self._shared.unexpected.add(self.room, 1)
        self._bind(session, now)

    def _note_asked(self) -> None:
        if not self.asked:
            self.asked = True
            self._shared.alarms.set(self.room, self.begin_by)

    def _bind(self, session: Session, now: float) -> None:
        """From here on the session's silence counts."""
        session.rooms.add(self.room)
        self._shared.alarms.set(session.register.session_id, now + self._shared.timing.silence)

    def disagreement(self, info: TransferEmbeddingInfo) -> Failure | None:
        if self.required in (None, info.required_dst_info_num):
            return None
        counts = f"{self.required} and {info.required_dst_info_num}"
        return Failure(BAD_GATEWAY, f"the ranks of room {self.room} disagree about their number: {counts}")

    def waits_for(self, info: TransferEmbeddingInfo) -> bool:
        """An offer ahead claims its blocks at once, and for that the request must be here and every rank known."""
        destination = self.destinations.get(info.session_id)
        if destination is None:
            return not info.is_resume
        return destination.waits_for(info) and not (destination.has_offer and self.status is Status.BOOTSTRAPPING)

    def accept(self, info: TransferEmbeddingInfo, session: Session, now: float) -> list[EncodeEffect]:
        """Take an offer down, and do what has become possible."""
        shared = self._shared
        self._note_asked()
        self.required = info.required_dst_info_num
        effects: list[EncodeEffect] = []
        if (destination := self.destinations.get(info.session_id)) is None:
            destination = self.destinations[info.session_id] = Destination(info.session_id, info.address)
            effects += [*self._tell_items(destination), *self._say_held_by_all()]
        is_ahead = destination.has_offer
        destination.offer(info)
        if not self.expected:
            shared.unexpected.add(self.room, len(info.dst_embedding_indices))
        self._bind(session, now)
        self.queued.pop(info.session_id, None)
        if self.is_complete:
            self._unbind_others()  # it is for nobody else, and need not care who else falls silent
        if info.is_resume and not is_ahead:
            shared.alarms.set(self.room, now + shared.timing.waiting)
        return [*effects, *self.advance(now)]

    def _unbind_others(self) -> None:
        """Sessions that are queued, or have promised something, and have no part in the room."""
        for session_id in self.items.sessions.union(self.queued).difference(self.destinations):
            if session := self._shared.sessions.get(session_id):
                session.leave(self.room)
        self.queued.clear()
        self.items.keep_only(self.destinations)

    def take_have(self, message: Have, session: Session, now: float) -> list[EncodeEffect]:
        """It counts for all items of which no row has been planned for this session."""
        blocks = self.items.promise(message.session_id, message.keys)
        if not self.expected:
            self._shared.unexpected.add(self.room, blocks)
        if not self.is_complete:
            self._bind(session, now)  # it does not hold for another process that has the session
        return self._say_held_by_all()

    def _tell_items(self, destination: Destination) -> list[EncodeEffect]:
        session = self._shared.sessions.get(destination.session_id)
        if not self.items.all or session is None or not session.register.handshake.takes_manifest:
            return []
        return [Send(destination.address, Manifest(self.room, self.items.all))]

    def _say_held_by_all(self) -> list[EncodeEffect]:
        """In time for the vision tower, or not: nothing waits for it."""
        if not self.is_complete or self.is_over or self.ready == self.total:
            return []
        held = self.items.newly_held_by_all({name: known.decided for name, known in self.destinations.items()})
        return [HeldByAll(self.room, held)] if held else []

    def take_abort(self, session_id: str, address: Address, failure: Failure, now: float) -> list[EncodeEffect]:
        if self.is_complete and session_id not in self.destinations:
            self._shared.counts.events[Event.ABORT_IGNORED] += 1
            return []
        self.unacknowledged[session_id] = address
        return [] if self.is_over else self.fail(failure, now)

    # ---- chunks, and the steps that they are written in

    def advance(self, now: float) -> list[EncodeEffect]:
        """Do what has become possible."""
        effects: list[EncodeEffect] = []
        if self.status is Status.BOOTSTRAPPING and self.expected and self.is_complete:
            if failure := self._claim():
                return self.fail(failure, now)
            self.move(Status.WAITING_FOR_INPUT)
            self._shared.alarms.set(self.room, now + self._shared.timing.waiting)
            effects.append(StatusChanged(self.room, self.status))
        if self.can_start_chunk:
            if self.blocks:
                effects += self.begin_step()
            else:
                self._shared.queue[self.room] = self
        return [*effects, *self._begin_next_step()]

    def _claim(self) -> Failure | None:
        """With its request here and all ranks known, nobody else may have the blocks that it was offered."""
        for destination in self.destinations.values():
            session = self._shared.sessions.get(destination.session_id)
            if session and (failure := session.claim(self.room, destination.blocks)):
                return failure
        return None

    @property
    def _has_offers(self) -> bool:
        """All of them wait for each other, so that the window of source rows passes over the prompt once."""
        return (
            self.status in (Status.WAITING_FOR_INPUT, Status.TRANSFERRING)
            and self.total is not None
            and self.under_way is None
            and all(destination.has_offer for destination in self.unfinished)
        )

    @property
    def can_start_chunk(self) -> bool:
        """Or can go on with one."""
        return self._has_offers and any(known.written < self._reach(known) for known in self.unfinished)

    @property
    def _waits_for_rows(self) -> bool:
        """There are offers for more rows than are made."""
        if not self._has_offers or self.can_start_chunk:
            return False
        return any(known.written < known.goal(self._known_total()) for known in self.unfinished)

    def _reach(self, destination: Destination) -> int:
        """The row up to which it can get rows now."""
        return min(destination.goal(self._known_total()), self.ready)

    def begin(self) -> list[EncodeEffect]:
        """Leave the queue: with blocks for all rows if they are free, else for a window that will move along."""
        pool = self._shared.pool
        del self._shared.queue[self.room]
        needed = -(-self._known_total() // self._shared.block_size)
        self.blocks = pool.lease(min(needed, pool.free), self.room)
        return [*self.begin_step(), *self._begin_next_step()]

    def begin_step(self) -> list[EncodeEffect]:
        """The next write of the chunk; nothing when every destination has what is made of the rows that it offered
        space for, or when the workers have it already.
        """
        if self.next_step is not None:
            self.under_way, self.next_step = self.next_step, None
            return []
        total = self._known_total()
        behind = [d for d in self.unfinished if d.written < self._reach(d)]
        if not behind:
            return []
        stage = not any(self._is_staged(d.written) for d in behind)
        if stage:
            first = min(d.written for d in behind)
            self._staged = (first, min(self.ready, first + len(self.blocks) * self._shared.block_size))
        stop = self._staged[1]
        parts = [d.part_of_step(stop, total, self.items) for d in behind if self._is_staged(d.written)]
        self.under_way = self._step(parts, stage)
        return [self.under_way]

    def _begin_next_step(self) -> list[EncodeEffect]:
        """If this step ends a chunk for everybody, and everybody has an offer ahead: nobody's worker has to wait for us
        between the two.

        Only for rows that are staged with this step. And for the same destinations: so it comes back after this one.
        """
        if self.is_over or self.under_way is None or self.next_step is not None:
            return []
        total, stop = self._known_total(), self._staged[1]
        are_written_to = {part.session_id for part in self.under_way.destinations}
        for destination in self.unfinished:
            if destination.session_id not in are_written_to or destination.ahead is None:
                return []
            if not self._is_staged(destination.goal(total)):
                return []  # this step may not even end the chunk
            if not set(destination.blocks).isdisjoint(destination.ahead.dst_embedding_indices):
                return []  # nobody may rely on the order of two writes to one block
        self.next_step = self._step(
            [d.part_of_next_step(stop, total, self.items) for d in self.unfinished], stage=False
        )
        return [self.next_step]

    def _step(self, parts: Iterable[ChunkDestination], stage: bool) -> TransferEmbeddingChunk:
        first, stop = self._staged
        self._last_transfer_id += 1
        return TransferEmbeddingChunk(
            room=self.room,
            transfer_id=self._last_transfer_id,
            window=Window(first_row=first, rows=stop - first, blocks=self.blocks, stage=stage, apart=self._is_apart),
            destinations=tuple(parts),
        )

    @property
    def _is_apart(self) -> bool:
        """Some language rank takes the small columns only one by one."""
        sessions = (self._shared.sessions.get(session_id) for session_id in self.destinations)
        return not all(session is not None and session.register.handshake.takes_records for session in sessions)

    def _is_staged(self, row: int) -> bool:
        return self._staged[0] <= row < self._staged[1]

    def _known_total(self) -> int:
        if self.total is None:
            raise LocalError(f"room {self.room} has no rows yet")
        return self.total

    def transferred(self, transfer_id: int, errors: Mapping[str, str], now: float) -> list[EncodeEffect]:
        """The step came back: the next one, or the report that ends the chunk."""
        step = self._end_step(transfer_id)
        for session_id in errors:
            address = self.destinations[session_id].address
            self._shared.sessions.note_failed_write(session_id, self.room, address)
        if errors or self.is_over:
            # Nobody needs it any more, and it is written all the same.
            self.under_way, self.next_step = self.next_step, None
        if self.is_over:
            return [] if self.under_way else self._close()
        if errors:
            problems = "; ".join(f"the write to {session_id} failed: {text}" for session_id, text in errors.items())
            return self.fail(Failure(BAD_GATEWAY, problems), now)
        effects: list[EncodeEffect] = []
        for part in step.destinations:
            destination = self.destinations[part.session_id]
            destination.written = part.stop_row
            if destination.written < destination.goal(self._known_total()):
                effects += self._tell_progress(part.session_id, part.stop_row)
        self._shared.alarms.set(self.room, now + self._shared.timing.waiting)
        if self.next_step is None:
            effects += [*self.begin_step(), *self._begin_next_step()]
        if self.under_way is None and not self._waits_for_rows:
            effects += self._report_chunk(now)
        return effects

    def progressed(self, transfer_id: int, session_id: str, rows: int) -> list[EncodeEffect]:
        """Part of the step is over there: the language rank may begin to copy."""
        if self.is_over or self.under_way is None or self.under_way.transfer_id != transfer_id:
            return []
        return self._tell_progress(session_id, rows)

    def _tell_progress(self, session_id: str, rows: int) -> list[EncodeEffect]:
        session = self._shared.sessions.get(session_id)
        if session is None or not session.register.handshake.takes_progress:
            return []
        return [Send(self.destinations[session_id].address, Progress(self.room, rows))]

    def _end_step(self, transfer_id: int) -> TransferEmbeddingChunk:
        step = self.under_way
        if step is None or step.transfer_id != transfer_id:
            raise LocalError(f"room {self.room} has no transfer {transfer_id} under way")
        self.under_way = None
        return step

    def _report_chunk(self, now: float) -> list[EncodeEffect]:
        effects: list[EncodeEffect] = []
        for destination in self.unfinished:
            blocks = destination.offered_blocks
            destination.use_up_offer(self._known_total())
            effects.append(Send(destination.address, self.report(destination)))
            if session := self._shared.sessions.get(destination.session_id):
                session.end_offer(self.room, set(blocks).difference(destination.blocks))
                if destination.finished:
                    # It may fall silent now, while another rank still gets rows.
                    session.leave(self.room)
        before = self.status
        self.move(Status.TRANSFERRING if self.unfinished else Status.SUCCESS)
        if self.status is not before:
            effects.append(StatusChanged(self.room, self.status))
        if self.is_over:
            answered = {known.last_offer: self.items.held(known.decided) for known in self.destinations.values()}
            self._shared.ended.succeed(self.room, now, self._known_total(), answered)
            return effects + self._close()
        return effects + self.advance(now)

    def report(self, destination: Destination) -> StatusReport:
        """What the offer that it has used up last is answered with, each time that it comes."""
        status = Status.SUCCESS if destination.finished else Status.TRANSFERRING
        return StatusReport(self.room, status, rows=destination.sent, held=self.items.held(destination.decided))

    # ---- the end

    def fail(self, failure: Failure, now: float) -> list[EncodeEffect]:
        """The status is final at once; what a write under way still needs stays until it comes back."""
        shared = self._shared
        self.move(Status.FAILED)
        shared.ended.fail(self.room, failure, now)
        shared.counts.failures[failure.code] += 1
        shared.alarms.cancel(self.room)
        shared.queue.pop(self.room, None)
        effects: list[EncodeEffect] = [StatusChanged(self.room, self.status, failure)] if self.expected else []
        waiting = {destination.session_id: destination.address for destination in self.unfinished} | self.queued
        report = StatusReport(self.room, self.status, failure=failure)
        for session_id, address in waiting.items():
            if session_id not in self.unacknowledged:
                effects.append(Send(address, report, to_stranger=not self.expected))
        return effects if self.under_way else effects + self._close()

    def _close(self) -> list[EncodeEffect]:
        """The room is over and nothing of it is under way: every trace of it goes."""
        shared = self._shared
        del shared.rooms[self.room]
        shared.unexpected.discard(self.room)
        shared.alarms.cancel(self.room)
        for destination in self.destinations.values():
            if session := shared.sessions.get(destination.session_id):
                session.end_offer(self.room, destination.offered_blocks)
                session.leave(self.room)
        self._unbind_others()
        shared.pool.give_back(self.blocks, self.room)
        effects: list[EncodeEffect] = [DropRows(self.room)] if self.total is not None else []
        for session_id, address in self.unacknowledged.items():
            if not shared.sessions.must_wait(session_id, self.room, address):
                effects.append(Send(address, AbortAck(self.room), to_stranger=not self.expected))
        return effects

    def take_alarm(self, now: float) -> list[EncodeEffect]:
        return self.fail(self._lateness(), now)

    def _lateness(self) -> Failure:
        """What the room waited for when its time was up."""
        room, timing = self.room, self._shared.timing
        bootstrap, waiting = f"{timing.bootstrap:g} s", f"{timing.waiting:g} s"
        if not self.expected:
            text = f"the request of room {room} did not reach the encode instance within {bootstrap}"
            return Failure(UNAVAILABLE, text)
        if not self.asked:
            text = f"no language instance has asked for room {room} within {timing.unasked:g} s"
            return Failure(UNAVAILABLE, text)
        if self.required is None:
            text = f"the language side had no receive blocks for room {room} within {bootstrap}"
            return Failure(UNAVAILABLE, text)
        if self.status is Status.BOOTSTRAPPING:
            asked = f"{len(self.destinations)} of {self.required} language ranks"
            return Failure(BAD_GATEWAY, f"only {asked} asked for room {room} within {bootstrap}")
        if self.total is None:
            return Failure(INTERNAL, f"the encoder had no rows for room {room} within {waiting}")
        if self.under_way is not None:
            return Failure(BAD_GATEWAY, f"a write of room {room} did not end within {waiting}")
        if self._waits_for_rows:
            text = (
                f"the encoder made no more rows of room {room} within {waiting}: {self.ready} of {self.total} are there"
            )
            return Failure(INTERNAL, text)
        if self.can_start_chunk:
            return Failure(UNAVAILABLE, f"no source blocks for room {room} within {waiting}")
        text = f"the language side offered no blocks for more rows of room {room} within {waiting}"
        return Failure(BAD_GATEWAY, text)
