"""The rooms of the encode side from opening to closing: their status, their source blocks, their chunks."""

from __future__ import annotations

import collections

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import DropRows, EncodeEffect, Send, StatusChanged
from embedding_relay.protocol.encode.room import Destination, SenderRoom
from embedding_relay.protocol.encode.sessions import Session, Sessions
from embedding_relay.protocol.encode.unexpected import UnexpectedRooms
from embedding_relay.protocol.ended import EndedRooms
from embedding_relay.protocol.errors import BAD_GATEWAY, UNAVAILABLE, Failure
from embedding_relay.protocol.messages import AbortAck, Queued, StatusReport, TransferEmbeddingInfo
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Alarms, Timing


class EncodeRooms:
    def __init__(
        self, pool: BlockPool, block_size: int, timing: Timing, sessions: Sessions, alarms: Alarms[int | str]
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._timing = timing
        self._sessions = sessions
        self._alarms = alarms
        self._rooms: dict[int, SenderRoom] = {}
        self._queue: dict[int, None] = {}
        """Rooms that wait for a source block, in order; they hold none."""
        self._unexpected = UnexpectedRooms(timing)
        self.ended = EndedRooms(timing)
        self.failures: collections.Counter[int] = collections.Counter()

    def __len__(self) -> int:
        return len(self._rooms)

    def __getitem__(self, room: int) -> SenderRoom:
        return self._rooms[room]

    def get(self, room: int) -> SenderRoom | None:
        return self._rooms.get(room)

    def sizes(self) -> dict[str, int]:
        return {
            "rooms": len(self._rooms),
            "unexpected": len(self._unexpected),
            "waiting_for_blocks": len(self._queue),
            "transfers": sum(sender.under_way is not None for sender in self._rooms.values()),
            "remembered": len(self.ended),
        }

    def open(self, room: int, now: float) -> SenderRoom:
        if room not in self._rooms:
            sender = self._rooms[room] = SenderRoom(room)
            sender.begin_by = now + self._timing.bootstrap
            self._alarms.set(room, sender.begin_by)
        return self._rooms[room]

    def expect(self, sender: SenderRoom, now: float) -> None:
        """The request of this room is here; a language instance that is alive has the other half, and says so soon."""
        if not sender.expected and not sender.asked:
            self._alarms.set(sender.room, now + self._timing.unasked)
        sender.expected = True
        self._unexpected.discard(sender.room)

    def note_queued(self, message: Queued, sender: SenderRoom, session: Session, now: float) -> None:
        """Its blocks may take long, as long as the session lives."""
        self._note_word(sender)
        sender.queued[message.session_id] = message.address
        if not sender.expected:
            self._unexpected.add(sender.room, 1)
        self._bind(sender.room, session, now)

    def _note_word(self, sender: SenderRoom) -> None:
        if not sender.asked:
            sender.asked = True
            self._alarms.set(sender.room, sender.begin_by)

    def _bind(self, room: int, session: Session, now: float) -> None:
        """From here on the session's silence counts."""
        session.rooms.add(room)
        self._alarms.set(session.register.session_id, now + self._timing.silence)

    def accept(self, info: TransferEmbeddingInfo, sender: SenderRoom, session: Session, now: float) -> None:
        """Take an offer down; `advance` may use it."""
        self._note_word(sender)
        sender.required = info.required_dst_info_num
        new = Destination(info.mooncake_session_id, info.address)
        sender.destinations.setdefault(info.mooncake_session_id, new).offer(info)
        if not sender.expected:
            self._unexpected.add(info.room, len(info.dst_embedding_indices))
        self._bind(info.room, session, now)
        sender.queued.pop(info.mooncake_session_id, None)
        if sender.is_complete:
            self._unbind_queued(sender)  # it is for nobody else, and need not care who else falls silent
        if info.is_resume:
            self._alarms.set(info.room, now + self._timing.waiting)

    def advance(self, sender: SenderRoom, now: float) -> list[EncodeEffect]:
        """Do what has become possible."""
        effects: list[EncodeEffect] = []
        if sender.status is Status.BOOTSTRAPPING and sender.expected and sender.is_complete:
            if failure := self._claim(sender):
                return self.fail(sender, failure, now)
            sender.move(Status.WAITING_FOR_INPUT)
            self._alarms.set(sender.room, now + self._timing.waiting)
            effects.append(StatusChanged(sender.room, sender.status))
        if sender.can_start_chunk:
            if sender.blocks:
                effects += self._begin_step(sender)
            else:
                self._queue[sender.room] = None
                effects += self._serve_queue()
        return effects

    def _claim(self, sender: SenderRoom) -> Failure | None:
        for destination in sender.destinations.values():
            session = self._sessions.get(destination.session_id)
            if session and (failure := session.claim(sender.room, destination.blocks)):
                return failure
        return None

    def make_place(self, now: float) -> list[EncodeEffect]:
        """Too many rooms that nobody here expects: the oldest of them end."""
        effects: list[EncodeEffect] = []
        while (room := self._unexpected.one_too_many()) is not None:
            text = f"no request of room {room} has come, and too many rooms wait for theirs"
            effects += self.fail(self._rooms[room], Failure(UNAVAILABLE, text), now)
        return effects

    def written(self, sender: SenderRoom, now: float) -> list[EncodeEffect]:
        """A step of a chunk succeeded: the next step, or the report that ends the chunk."""
        self._alarms.set(sender.room, now + self._timing.waiting)
        return self._begin_step(sender) or self._report_chunk(sender, now)

    def fail(self, sender: SenderRoom, failure: Failure, now: float) -> list[EncodeEffect]:
        """The status is final at once; what a write under way still needs stays until it comes back."""
        sender.move(Status.FAILED)
        self.ended.add(sender.room, sender.status, failure, now)
        self.failures[failure.code] += 1
        self._alarms.cancel(sender.room)
        self._queue.pop(sender.room, None)
        effects: list[EncodeEffect] = [StatusChanged(sender.room, sender.status, failure)] if sender.expected else []
        waiting = {destination.session_id: destination.address for destination in sender.unfinished} | sender.queued
        for session_id, address in waiting.items():
            if session_id not in sender.unacknowledged:
                report = StatusReport(sender.room, sender.status, failure=failure)
                effects.append(Send(address, report, courtesy=not sender.expected))
        return effects if sender.under_way else effects + self.close(sender)

    def end_unopened(self, room: int, failure: Failure, now: float) -> None:
        """It is over before anybody has offered room for it: whoever comes for it later finds the reason."""
        if self.ended.get(room) is None:
            self.ended.add(room, Status.FAILED, failure, now)
            self.failures[failure.code] += 1

    def fail_all_of(self, session: Session, text: str, now: float) -> list[EncodeEffect]:
        """Nothing more can be done for this language rank."""
        for room in session.rooms:
            self._queue.pop(room, None)  # or the end of one would be the beginning of the next
        effects: list[EncodeEffect] = []
        for room in sorted(session.rooms):
            sender = self._rooms[room]
            if not sender.is_over:
                effects += self.fail(sender, Failure(BAD_GATEWAY, text), now)
        return effects

    def close(self, sender: SenderRoom) -> list[EncodeEffect]:
        """The room is over and nothing of it is under way: every trace of it goes."""
        del self._rooms[sender.room]
        self._unexpected.discard(sender.room)
        self._alarms.cancel(sender.room)
        for destination in sender.destinations.values():
            if session := self._sessions.get(destination.session_id):
                session.end_offer(sender.room, destination.blocks)
                session.leave(sender.room)
        self._unbind_queued(sender)
        self._pool.give_back(sender.blocks, sender.room)
        effects: list[EncodeEffect] = [DropRows(sender.room)] if sender.total is not None else []
        for session_id, address in sender.unacknowledged.items():
            if not self._sessions.must_wait(session_id, sender.room, address):
                effects.append(Send(address, AbortAck(sender.room), courtesy=not sender.expected))
        return effects + self._serve_queue()

    def _unbind_queued(self, sender: SenderRoom) -> None:
        for session_id in sender.queued:
            if session := self._sessions.get(session_id):
                session.leave(sender.room)
        sender.queued.clear()

    def _serve_queue(self) -> list[EncodeEffect]:
        """First come, first served: all rows if they fit, else a window that will move along."""
        effects: list[EncodeEffect] = []
        while self._queue and self._pool.free:
            sender = self._rooms[next(iter(self._queue))]
            del self._queue[sender.room]
            needed = sender.needed_blocks(self._block_size)
            sender.blocks = self._pool.lease(min(needed, self._pool.free), sender.room)
            effects += self._begin_step(sender)
        return effects

    def _begin_step(self, sender: SenderRoom) -> list[EncodeEffect]:
        step = sender.begin_step(self._block_size)
        return [step] if step else []

    def _report_chunk(self, sender: SenderRoom, now: float) -> list[EncodeEffect]:
        effects: list[EncodeEffect] = []
        for destination in sender.unfinished:
            blocks, report = destination.blocks, sender.report_chunk(destination)
            effects.append(Send(destination.address, report))
            if session := self._sessions.get(destination.session_id):
                session.end_offer(sender.room, blocks)
                if destination.finished:
                    # It may fall silent now, while another rank still gets rows.
                    session.leave(sender.room)
        before = sender.status
        sender.move(Status.TRANSFERRING if sender.unfinished else Status.SUCCESS)
        if sender.status is not before:
            effects.append(StatusChanged(sender.room, sender.status))
        if sender.is_over:
            self.ended.add(sender.room, sender.status, None, now)
            effects += self.close(sender)
        return effects
