"""The encode side of one rank: it finds the room or the session that something is about, and who may speak for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.counts import Counts, Event
from embedding_relay.protocol.effects import DropRows, EncodeEffect, Send, StatusChanged
from embedding_relay.protocol.encode.admission import Admission
from embedding_relay.protocol.encode.room import EncodeRoom, Shared
from embedding_relay.protocol.encode.sessions import Session, Sessions
from embedding_relay.protocol.encode.unexpected import UnexpectedRooms
from embedding_relay.protocol.ended import EndedRooms, Ending
from embedding_relay.protocol.errors import (
    BAD_GATEWAY,
    CLIENT_GONE,
    CONFLICT,
    UNAVAILABLE,
    Failure,
    LocalError,
    not_registered,
)
from embedding_relay.protocol.messages import (
    Abort,
    AbortAck,
    Address,
    Handshake,
    Have,
    Item,
    Ping,
    Pong,
    Queued,
    Register,
    StatusReport,
    ToEncode,
    TransferEmbeddingInfo,
    flaw_of_room,
    rank_of_room,
)
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Alarms, Timing


class EncodeSide:
    """One encode rank. Every method returns what must be done, in this order; none of them waits."""

    def __init__(
        self, *, handshake: Handshake, instance: str, pool: BlockPool, timing: Timing, rank: int = 0, ranks: int = 1
    ) -> None:
        """`rank` of `ranks` among which the requests of the instance are divided by their rooms."""
        self._instance = instance
        self._rank, self._ranks = rank, ranks
        self._shared = Shared(
            pool=pool,
            block_size=handshake.block_size,
            timing=timing,
            sessions=Sessions(handshake),
            alarms=Alarms(),
            unexpected=UnexpectedRooms(timing),
            ended=EndedRooms(timing),
        )
        self._rooms = self._shared.rooms
        self._sessions = self._shared.sessions
        self._admission = Admission(self._shared)

    def _room(self, room: int, now: float) -> EncodeRoom:
        """The room of this number, known or new."""
        return self._rooms.get(room) or EncodeRoom(room, self._shared, now)

    def _count(self, event: Event) -> None:
        self._shared.counts.events[event] += 1

    def _serve_queue(self) -> list[EncodeEffect]:
        """First come, first served for source blocks. Part of every event that may free some, and its last part."""
        effects: list[EncodeEffect] = []
        while self._shared.queue and self._shared.pool.free:
            effects += next(iter(self._shared.queue.values())).begin()
        return effects

    # ---- from this instance

    def expect(self, room: int, now: float, items: Sequence[Item] = ()) -> list[EncodeEffect]:
        """Our half of the request arrived, and these are the items of its prompt. Repeated for a room that is over, it
        says how the room ended.
        """
        if flaw := flaw_of_room(room):
            self._shared.counts.failures[flaw.code] += 1
            return [StatusChanged(room, Status.FAILED, flaw)]
        if ending := self._shared.ended.get(room):
            return [StatusChanged(room, ending.status, ending.failure)]
        known = self._room(room, now)
        return [*known.expect(now, items), *known.advance(now), *self._serve_queue()]

    def submit(
        self, room: int, total_rows: int, now: float, absent: Iterable[int] = (), ready: int | None = None
    ) -> list[EncodeEffect]:
        """The tower has run: the rows exist, and the transport can stage them until it is told to drop them.

        `ready`: only those before this row do, so far. `absent`: items of which no row is ever made. `HeldByAll` has
        said that they need not be.
        """
        if total_rows < 1:
            raise LocalError(f"room {room} with {total_rows} rows")
        if flaw_of_room(room) or (self._rooms.get(room) is None and self._shared.ended.get(room)):
            return [DropRows(room)]
        return [*self._room(room, now).submit(total_rows, absent, ready, now), *self._serve_queue()]

    def forget_items(self, room: int) -> None:
        """Its rows will be others than those with the keys of its items, unless they have been handed over already."""
        known = self._rooms.get(room)
        if known is not None and known.total is None:
            known.items.forget()

    def more_rows(self, room: int, ready: int, now: float, absent: Iterable[int] = ()) -> list[EncodeEffect]:
        """Every row before `ready` exists now, but for those of the items that are absent."""
        known = self._rooms.get(room)
        return [*known.more_rows(ready, absent, now), *self._serve_queue()] if known else [DropRows(room)]

    def refuse(self, room: int, failure: Failure, now: float) -> list[EncodeEffect]:
        """Our half failed or was dropped: the language side is told now, or when it asks."""
        known = self._rooms.get(room)
        if known is not None and not known.is_over:
            return [*known.fail(failure, now), *self._serve_queue()]
        if not flaw_of_room(room):
            self._end_unopened(room, failure, now)
        return []

    def _end_unopened(self, room: int, failure: Failure, now: float) -> None:
        """It is over before anybody has offered blocks for it: whoever comes for it later finds the reason."""
        if self._shared.ended.get(room) is None:
            self._shared.ended.fail(room, failure, now)
            self._shared.counts.failures[failure.code] += 1

    def transferred(self, room: int, transfer_id: int, errors: Mapping[str, str], now: float) -> list[EncodeEffect]:
        """A `TransferEmbeddingChunk` came back: `errors` says for each session what went wrong, if anything did."""
        known = self._rooms.get(room)
        if known is None:
            raise LocalError(f"room {room} has no transfer {transfer_id} under way")
        return [*known.transferred(transfer_id, errors, now), *self._serve_queue()]

    def progressed(self, room: int, transfer_id: int, session_id: str, rows: int) -> list[EncodeEffect]:
        """Of a `TransferEmbeddingChunk` that is under way, every row before `rows` is in the memory of the session."""
        known = self._rooms.get(room)
        return known.progressed(transfer_id, session_id, rows) if known else []

    def session_quiet(self, session_id: str, now: float) -> list[EncodeEffect]:
        """It is proven that no write reported as failed before this call can still land at the session."""
        effects: list[EncodeEffect] = []
        for address, room in self._sessions.quiet(session_id):
            known = self._rooms.get(room)
            if known is not None and known.under_way is not None:
                known.unacknowledged[session_id] = address  # one more write of it is with the workers
            else:
                effects.append(Send(address, AbortAck(room)))
        return effects

    def proven(self, session_id: str, address: Address, is_gone: bool, now: float) -> list[EncodeEffect]:
        """The answer to `ProveGone`: is it certain that the process at `address` is gone?"""
        return [*self._admission.proven(session_id, address, is_gone, now), *self._serve_queue()]

    # ---- from the language side

    def receive(self, message: ToEncode, now: float) -> list[EncodeEffect]:
        return [*self._take(message, now), *self._serve_queue()]

    def _take(self, message: ToEncode, now: float) -> list[EncodeEffect]:
        if isinstance(message, Register):
            return self._admission.register(message, now)
        session = self._sessions.hear(message.session_id, message.address, now)
        if isinstance(message, Ping):
            is_stranger = session is None or not session.served
            return [Send(message.address, Pong(self._instance, message.instance), to_stranger=is_stranger)]
        if isinstance(message, Abort):
            return self._abort(message, now)
        if isinstance(message, Have):
            return self._take_have(message, session, now)
        if (whose := rank_of_room(message.room, self._ranks)) != self._rank:
            text = f"room {message.room} is at rank {whose} of this encode instance, and rank {self._rank} was asked"
            return self._turn_away(message, BAD_GATEWAY, text)
        if ending := self._shared.ended.get(message.room):
            return self._answer_for_ended(message, ending)
        if session is None and self._admission.keep_waiting(message):
            return []
        if session is None:
            unknown = not_registered(message.session_id)
            return self._turn_away(message, unknown.code, unknown.text)
        if isinstance(message, Queued):
            return self._take_queued(message, session, now)
        return self._take_offer(message, session, now)

    def _take_have(self, message: Have, session: Session | None, now: float) -> list[EncodeEffect]:
        """No answer, whatever becomes of it: who promises has offered blocks too, or will."""
        known = self._rooms.get(message.room)
        is_elsewhere = rank_of_room(message.room, self._ranks) != self._rank
        is_for_others = known is not None and known.is_complete and message.session_id not in known.destinations
        if session is None or session.refusal or is_elsewhere or is_for_others or self._shared.ended.get(message.room):
            self._count(Event.PROMISE_IGNORED)
            return []
        return [*self._room(message.room, now).take_have(message, session, now), *self._end_too_many_unexpected(now)]

    def _take_queued(self, message: Queued, session: Session, now: float) -> list[EncodeEffect]:
        """The first message about a room whose init will be late."""
        room = self._room(message.room, now)
        if message.session_id in room.destinations or message.session_id in room.queued:
            self._count(Event.QUEUED_REPEATED)
            return []
        if room.is_complete:
            return self._turn_away_from_complete(message, room)
        if session.refusal:
            return [_tell(message, session.refusal), *room.fail(session.refusal, now)]
        room.note_queued(message, session, now)
        return self._end_too_many_unexpected(now)

    def _take_offer(self, info: TransferEmbeddingInfo, session: Session, now: float) -> list[EncodeEffect]:
        """An init or a resume: the same checks, and the same way on."""
        known = self._rooms.get(info.room)
        destination = known.destinations.get(info.session_id) if known else None
        if info.is_resume and destination is None:
            return self._turn_away(info, BAD_GATEWAY, f"room {info.room} is not under way at this encode instance")
        if known is not None and destination is not None and destination.has_answered(info):
            self._count(Event.REPORT_REPEATED)
            return [Send(destination.address, known.report(destination))]
        if known is not None and not known.waits_for(info):
            self._count(Event.RESUME_IGNORED if info.is_resume else Event.INIT_REPEATED)
            return []
        room = self._room(info.room, now)
        if room.is_complete and destination is None:
            return self._turn_away_from_complete(info, room)
        failure = session.refusal or session.flaw(info) or room.disagreement(info)
        if failure is None and info.is_resume:
            # An init's blocks are claimed later, when its room has everything that it needs to begin.
            failure = session.claim(info.room, info.dst_embedding_indices)
        if failure is not None:
            told = [] if destination else [_tell(info, failure)]  # a destination of the room is told with the others
            return [*told, *room.fail(failure, now)]
        return [*room.accept(info, session, now), *self._end_too_many_unexpected(now)]

    def _end_too_many_unexpected(self, now: float) -> list[EncodeEffect]:
        """Too many rooms that nobody here expects: the oldest of them end."""
        effects: list[EncodeEffect] = []
        while (room := self._shared.unexpected.one_too_many()) is not None:
            text = f"no request of room {room} has come, and too many rooms wait for theirs"
            effects += self._rooms[room].fail(Failure(UNAVAILABLE, text), now)
        return effects

    def _answer_for_ended(self, message: TransferEmbeddingInfo | Queued, ending: Ending) -> list[EncodeEffect]:
        if isinstance(message, TransferEmbeddingInfo) and message.identity in ending.answered:
            self._count(Event.REPORT_REPEATED)
            held = ending.answered[message.identity]
            report = StatusReport(message.room, ending.status, rows=ending.rows, held=held)
            return [Send(message.address, report, to_stranger=True)]
        self._count(Event.OFFER_FOR_ENDED_ROOM)
        if ending.failure is not None:
            return [_tell(message, ending.failure)]
        if isinstance(message, TransferEmbeddingInfo) and message.is_resume:
            return []  # a late repetition: this destination has been told of its success
        return [_tell(message, Failure(CONFLICT, f"room {message.room} was used before"))]

    def _turn_away(self, message: TransferEmbeddingInfo | Queued, code: int, text: str) -> list[EncodeEffect]:
        """Only the sender of this message is told; the room, if there is one, goes on."""
        self._count(Event.OFFER_TURNED_AWAY)
        room = self._rooms.get(message.room)
        if room and room.has_destination_at(message.address):
            return []  # somebody else asks for the answer to be sent there, where it would end the room
        return [_tell(message, Failure(code, text))]

    def _turn_away_from_complete(self, message: TransferEmbeddingInfo | Queued, room: EncodeRoom) -> list[EncodeEffect]:
        text = f"room {room.room} has all of its {room.required} destinations"
        return self._turn_away(message, BAD_GATEWAY, text)

    def _abort(self, message: Abort, now: float) -> list[EncodeEffect]:
        room, session_id = message.room, message.session_id
        if self._sessions.must_wait(session_id, room, message.address):
            return []
        failure = message.failure or Failure(CLIENT_GONE, f"room {room} was dropped by the language side")
        if (known := self._rooms.get(room)) is not None:
            return known.take_abort(session_id, message.address, failure, now)
        # Its init may be behind it on the way: it must not begin what is declared quiet here.
        self._end_unopened(room, failure, now)
        return [Send(message.address, AbortAck(room), to_stranger=True)]

    # ---- time

    def tick(self, now: float) -> list[EncodeEffect]:
        effects: list[EncodeEffect] = []
        while (key := self._shared.alarms.pop_due(now)) is not None:
            if isinstance(key, str):
                effects += self._admission.take_alarm(key, now)
            else:
                effects += self._rooms[key].take_alarm(now)
            effects += self._serve_queue()
        self._shared.ended.forget_due(now)
        return effects

    def next_wakeup(self) -> float | None:
        due = (self._shared.alarms.next(), self._shared.ended.next())
        return min((at for at in due if at is not None), default=None)

    # ---- what the transport and the tests may look at

    def session(self, session_id: str) -> Register | None:
        session = self._sessions.get(session_id)
        return session.register if session else None

    def sessions(self) -> frozenset[str]:
        return self._sessions.names()

    def is_settled(self, room: int) -> bool:
        """Every rank of the room has asked, or the room is over: strangers cannot do anything about it any more."""
        known = self._rooms.get(room)
        return known.is_complete if known else self._shared.ended.get(room) is not None

    def is_over(self, room: int) -> bool:
        """Nobody needs what might still be written for it."""
        known = self._rooms.get(room)
        return known is None or known.is_over

    def is_empty(self) -> bool:
        return not self._rooms

    def sizes(self) -> dict[str, int]:
        shared = self._shared
        return {
            "rooms": len(self._rooms),
            "unexpected": len(shared.unexpected),
            "waiting_for_blocks": len(shared.queue),
            "transfers": sum(room.under_way is not None for room in self._rooms.values()),
            "remembered": len(shared.ended),
            "sessions": len(self._sessions),
            "contenders": len(self._sessions.contenders),
            "unquiet": self._sessions.unquiet,
            **shared.pool.sizes(),
        }

    @property
    def counts(self) -> Counts:
        return self._shared.counts


def _tell(message: TransferEmbeddingInfo | Queued, failure: Failure) -> Send:
    return Send(message.address, StatusReport(message.room, Status.FAILED, failure=failure), to_stranger=True)
