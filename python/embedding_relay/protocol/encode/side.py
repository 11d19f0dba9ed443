"""The encode side: what reaches it, from this instance and from language ranks, and what it does about it."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import DropRows, EncodeEffect, Send, StatusChanged
from embedding_relay.protocol.encode.admission import Admission
from embedding_relay.protocol.encode.room import SenderRoom
from embedding_relay.protocol.encode.rooms import EncodeRooms
from embedding_relay.protocol.encode.sessions import Session, Sessions
from embedding_relay.protocol.ended import Ending
from embedding_relay.protocol.errors import (
    BAD_GATEWAY,
    CLIENT_GONE,
    CONFLICT,
    MISDIRECTED,
    Failure,
    LocalError,
)
from embedding_relay.protocol.messages import (
    Abort,
    AbortAck,
    Address,
    Handshake,
    Ping,
    Pong,
    Queued,
    Register,
    StatusReport,
    ToEncode,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Alarms, Timing


class EncodeSide:
    """One encode rank. Every method returns what must be done, in this order; none of them waits."""

    def __init__(self, *, handshake: Handshake, instance: str, pool: BlockPool, timing: Timing) -> None:
        self._instance = instance
        self._pool = pool
        self._timing = timing
        self._alarms: Alarms[int | str] = Alarms()
        """By room number, or by session id."""
        self._sessions = Sessions(handshake)
        self._rooms = EncodeRooms(pool, handshake.block_size, timing, self._sessions, self._alarms)
        self._counts: collections.Counter[str] = collections.Counter()
        self._admission = Admission(self._sessions, self._rooms, self._alarms, timing, self._counts)

    # ---- from this instance

    def expect(self, room: int, now: float) -> list[EncodeEffect]:
        """Our half of the request arrived. Repeated for a room that is over, it says how the room ended."""
        if ending := self._rooms.ended.get(room):
            return [StatusChanged(room, ending.status, ending.failure)]
        sender = self._rooms.open(room, now)
        self._rooms.expect(sender, now)
        return self._rooms.advance(sender, now)

    def submit(self, room: int, total_rows: int, now: float) -> list[EncodeEffect]:
        """The tower has run: the rows exist, and the shell can stage them until it is told to drop them."""
        if total_rows < 1:
            raise LocalError(f"room {room} with {total_rows} rows")
        if self._rooms.get(room) is None and self._rooms.ended.get(room):
            return [DropRows(room)]
        sender = self._rooms.open(room, now)
        if sender.total is not None:
            self._counts["submit_repeated"] += 1
            return []
        self._rooms.expect(sender, now)
        sender.total = total_rows
        if sender.status is Status.WAITING_FOR_INPUT:
            self._alarms.set(room, now + self._timing.waiting)
        return self._rooms.advance(sender, now)

    def refuse(self, room: int, failure: Failure, now: float) -> list[EncodeEffect]:
        """Our half failed or was dropped: the language side is told now, or when it asks."""
        sender = self._rooms.get(room)
        if sender is not None and not sender.is_over:
            return self._rooms.fail(sender, failure, now)
        self._rooms.end_unopened(room, failure, now)
        return []

    def transferred(self, room: int, transfer_id: int, errors: Mapping[str, str], now: float) -> list[EncodeEffect]:
        """A `TransferEmbeddingChunk` came back: `errors` says for each session what went wrong, if anything did."""
        sender = self._rooms.get(room)
        if sender is None:
            raise LocalError(f"room {room} has no transfer {transfer_id} under way")
        step = sender.end_step(transfer_id)
        for session_id in errors:
            self._sessions.note_failed_write(session_id, room, sender.destinations[session_id].address)
        if sender.is_over:
            return self._rooms.close(sender)
        if errors:
            problems = "; ".join(f"the write to {session_id} failed: {text}" for session_id, text in errors.items())
            return self._rooms.fail(sender, Failure(BAD_GATEWAY, problems), now)
        sender.note_written(step)
        return self._rooms.written(sender, now)

    def session_quiet(self, session_id: str, now: float) -> list[EncodeEffect]:
        """It is proven that no write reported as failed before this call can still land at the session."""
        return [Send(address, AbortAck(room)) for address, room in self._sessions.quiet(session_id)]

    def proven(self, session_id: str, address: Address, is_gone: bool, now: float) -> list[EncodeEffect]:
        """The answer to `ProveGone`: is it certain that the process at `address` is gone?"""
        return self._admission.proven(session_id, address, is_gone, now)

    # ---- from the language side

    def receive(self, message: ToEncode, now: float) -> list[EncodeEffect]:
        if isinstance(message, Register):
            return self._admission.register(message, now)
        session = self._sessions.hear(message.session_id, message.address, now)
        if isinstance(message, Ping):
            is_stranger = session is None or not session.served
            return [Send(message.address, Pong(self._instance, message.instance), courtesy=is_stranger)]
        if isinstance(message, Abort):
            return self._abort(message, now)
        if ending := self._rooms.ended.get(message.room):
            return self._answer_for_ended(message, ending)
        if session is None and self._admission.keep_waiting(message):
            return []
        if session is None:
            return self._turn_away(message, MISDIRECTED, f"session {message.session_id} is not registered here")
        if isinstance(message, Queued):
            return self._take_queued(message, session, now)
        return self._take_offer(message, session, now)

    def _take_queued(self, message: Queued, session: Session, now: float) -> list[EncodeEffect]:
        """The first word about a room whose init will be late."""
        sender = self._rooms.open(message.room, now)
        if message.session_id in sender.destinations or message.session_id in sender.queued:
            self._counts["queued_repeated"] += 1
            return []
        if sender.is_complete:
            return self._turn_away_from_complete(message, sender)
        if session.refusal:
            return [_tell(message, session.refusal), *self._rooms.fail(sender, session.refusal, now)]
        self._rooms.note_queued(message, sender, session, now)
        return self._rooms.make_place(now)

    def _take_offer(self, info: TransferEmbeddingInfo, session: Session, now: float) -> list[EncodeEffect]:
        """An init or a resume: the same checks, and the same way on."""
        sender = self._rooms.get(info.room)
        destination = sender.destinations.get(info.mooncake_session_id) if sender else None
        if info.is_resume and destination is None:
            return self._turn_away(info, BAD_GATEWAY, f"room {info.room} is not under way at this encode instance")
        if destination is not None and not destination.waits_for(info):
            self._counts["resume_ignored" if info.is_resume else "init_repeated"] += 1
            return []
        sender = sender or self._rooms.open(info.room, now)
        if sender.is_complete and destination is None:
            return self._turn_away_from_complete(info, sender)
        if failure := session.refusal or session.flaw(info) or sender.disagreement(info) or _conflict(session, info):
            told = [] if destination else [_tell(info, failure)]  # a destination of the room is told with the others
            return [*told, *self._rooms.fail(sender, failure, now)]
        self._rooms.accept(info, sender, session, now)
        return [*self._rooms.advance(sender, now), *self._rooms.make_place(now)]

    def _answer_for_ended(self, message: TransferEmbeddingInfo | Queued, ending: Ending) -> list[EncodeEffect]:
        self._counts["offer_for_ended_room"] += 1
        if ending.failure is not None:
            return [_tell(message, ending.failure)]
        if isinstance(message, TransferEmbeddingInfo) and message.is_resume:
            return []  # a late repetition: this destination has been told of its success
        return [_tell(message, Failure(CONFLICT, f"room {message.room} was used before"))]

    def _turn_away(self, message: TransferEmbeddingInfo | Queued, code: int, text: str) -> list[EncodeEffect]:
        """Only the sender of this message is told; the room, if there is one, goes on."""
        self._counts["offer_turned_away"] += 1
        sender = self._rooms.get(message.room)
        if sender and sender.has_destination_at(message.address):
            return []  # somebody else asks for the answer to be sent there, where it would end the room
        return [_tell(message, Failure(code, text))]

    def _turn_away_from_complete(
        self, message: TransferEmbeddingInfo | Queued, sender: SenderRoom
    ) -> list[EncodeEffect]:
        text = f"room {sender.room} has all of its {sender.required} destinations"
        return self._turn_away(message, BAD_GATEWAY, text)

    def _abort(self, message: Abort, now: float) -> list[EncodeEffect]:
        room, session_id = message.room, message.session_id
        if self._sessions.must_wait(session_id, room, message.address):
            return []
        failure = message.failure or Failure(CLIENT_GONE, f"room {room} was dropped by the language side")
        sender = self._rooms.get(room)
        if sender is not None and sender.is_complete and session_id not in sender.destinations:
            self._counts["abort_ignored"] += 1
            return []
        if sender is not None:
            sender.unacknowledged[session_id] = message.address
            return [] if sender.is_over else self._rooms.fail(sender, failure, now)
        # Its init may be behind it on the way: it must not begin what is declared quiet here.
        self._rooms.end_unopened(room, failure, now)
        return [Send(message.address, AbortAck(room), courtesy=True)]

    # ---- time

    def tick(self, now: float) -> list[EncodeEffect]:
        effects: list[EncodeEffect] = []
        while (key := self._alarms.pop_due(now)) is not None:
            if isinstance(key, str):
                effects += self._admission.alarm(key, now)
            else:
                sender = self._rooms[key]
                effects += self._rooms.fail(sender, sender.lateness(self._timing), now)
        self._rooms.ended.forget_due(now)
        return effects

    def next_wakeup(self) -> float | None:
        return min((at for at in (self._alarms.next(), self._rooms.ended.next()) if at is not None), default=None)

    # ---- what the shell and the tests may look at

    def session(self, session_id: str) -> Register | None:
        session = self._sessions.get(session_id)
        return session.register if session else None

    def sessions(self) -> frozenset[str]:
        return self._sessions.names()

    def is_settled(self, room: int) -> bool:
        """Every rank of the room has asked, or the room is over: strangers cannot do anything about it any more."""
        sender = self._rooms.get(room)
        return sender.is_complete if sender else self._rooms.ended.get(room) is not None

    def is_empty(self) -> bool:
        return not len(self._rooms)

    def sizes(self) -> dict[str, int]:
        return {
            **self._rooms.sizes(),
            "sessions": len(self._sessions),
            "contenders": len(self._sessions.contenders),
            "unquiet": self._sessions.unquiet,
            "blocks_free": self._pool.free,
            "blocks_leased": self._pool.leased,
            "blocks_quarantined": self._pool.quarantined,
        }

    def counts(self) -> dict[str, int]:
        return {**self._counts, **{f"failed_{code}": count for code, count in self._rooms.failures.items()}}


def _conflict(session: Session, info: TransferEmbeddingInfo) -> Failure | None:
    """The blocks of an init are claimed when its room has everything that it needs to begin."""
    return session.claim(info.room, info.dst_embedding_indices) if info.is_resume else None


def _tell(message: TransferEmbeddingInfo | Queued, failure: Failure) -> Send:
    return Send(message.address, StatusReport(message.room, Status.FAILED, failure=failure), courtesy=True)
