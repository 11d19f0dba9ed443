"""The encode side: what reaches it, from this instance and from language ranks, and what it does about it."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from sglang.srt.disaggregation.multimodal.blocks import BlockPool
from sglang.srt.disaggregation.multimodal.protocol.effects import DropRows, EncodeEffect, Note, Send, StatusChanged
from sglang.srt.disaggregation.multimodal.protocol.encode_rooms import EncodeRooms
from sglang.srt.disaggregation.multimodal.protocol.ended import Ending
from sglang.srt.disaggregation.multimodal.protocol.errors import (
    BAD_GATEWAY,
    CLIENT_GONE,
    CONFLICT,
    MISDIRECTED,
    Failure,
    LocalError,
)
from sglang.srt.disaggregation.multimodal.protocol.messages import (
    Abort,
    AbortAck,
    Handshake,
    Ping,
    Pong,
    Register,
    StatusReport,
    ToEncode,
    TransferEmbeddingInfo,
)
from sglang.srt.disaggregation.multimodal.protocol.sessions import Session, Sessions
from sglang.srt.disaggregation.multimodal.protocol.status import Status
from sglang.srt.disaggregation.multimodal.protocol.timing import Alarms, Timing


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

    # ---- from this instance

    def expect(self, room: int, now: float) -> list[EncodeEffect]:
        """Our half of the request arrived. Repeated for a room that is over, it says how the room ended."""
        if ending := self._rooms.ended.get(room):
            return [StatusChanged(room, ending.status, ending.failure)]
        sender = self._rooms.open(room, now)
        sender.expected = True
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
        sender.expected, sender.total = True, total_rows
        if sender.status is Status.WAITING_FOR_INPUT:
            self._alarms.set(room, now + self._timing.waiting)
        return self._rooms.advance(sender, now)

    def refuse(self, room: int, failure: Failure, now: float) -> list[EncodeEffect]:
        """Our half failed or was dropped: the language side is told now, or when it asks."""
        sender = self._rooms.get(room)
        if sender is not None and not sender.is_over:
            return self._rooms.fail(sender, failure, now)
        if self._rooms.ended.get(room) is None:
            self._rooms.ended.add(room, Status.FAILED, failure, now)
        return []

    def transferred(self, room: int, transfer_id: int, errors: Mapping[str, str], now: float) -> list[EncodeEffect]:
        """A `TransferEmbeddingChunk` came back: `errors` says for each session what went wrong, if anything did."""
        sender = self._rooms.get(room)
        if sender is None:
            raise LocalError(f"room {room} has no transfer {transfer_id} under way")
        step = sender.end_step(transfer_id)
        for session_id in errors:
            self._sessions.note_failed_write(session_id, room)
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

    # ---- from the language side

    def receive(self, message: ToEncode, now: float) -> list[EncodeEffect]:
        if isinstance(message, Register):
            return self._register(message, now)
        sent_by = message.mooncake_session_id if isinstance(message, TransferEmbeddingInfo) else message.session_id
        session = self._sessions.get(sent_by)
        if session is not None:
            session.heard = now
        if isinstance(message, Ping):
            return [Send(message.address, Pong(self._instance, message.instance))]
        if isinstance(message, Abort):
            return self._abort(message, now)
        return self._take_offer(message, session, now)

    def _register(self, message: Register, now: float) -> list[EncodeEffect]:
        session = self._sessions.get(message.session_id)
        if session is not None and session.register == message:
            session.heard = now
            return []
        effects: list[EncodeEffect] = []
        if session is not None:
            text = f"session {message.session_id} was registered again with other buffers"
            effects += self._fail_rooms(session, text, now)
        # Another session at the same address is left to its own silence: this message may be the older of the two.
        session = self._sessions.add(message, now)
        self._alarms.set(message.session_id, now + self._timing.forget_session)
        if session.refusal:
            effects.append(Note(f"session {message.session_id} at {message.address}: {session.refusal.text}"))
        return effects

    def _take_offer(self, info: TransferEmbeddingInfo, session: Session | None, now: float) -> list[EncodeEffect]:
        """An init or a resume: the same checks, and the same way on."""
        if ending := self._rooms.ended.get(info.room):
            return self._answer_for_ended(info, ending)
        if session is None:
            return self._turn_away(info, MISDIRECTED, f"session {info.mooncake_session_id} is not registered here")
        sender = self._rooms.get(info.room)
        destination = sender.destinations.get(info.mooncake_session_id) if sender else None
        if info.is_resume and destination is None:
            return self._turn_away(info, BAD_GATEWAY, f"room {info.room} is not under way at this encode instance")
        if destination is not None and not destination.waits_for(info):
            self._counts["resume_ignored" if info.is_resume else "init_repeated"] += 1
            return []
        sender = sender or self._rooms.open(info.room, now)
        if sender.is_complete and destination is None:
            return self._turn_away(info, BAD_GATEWAY, f"room {info.room} has all of its {sender.required} destinations")
        if failure := session.refusal or session.flaw(info) or sender.disagreement(info):
            told = [] if destination else [_tell(info, failure)]  # a destination of the room is told with the others
            return [*told, *self._rooms.fail(sender, failure, now)]
        self._rooms.accept(info, sender, session, now)
        return self._rooms.advance(sender, now)

    def _answer_for_ended(self, info: TransferEmbeddingInfo, ending: Ending) -> list[EncodeEffect]:
        self._counts["offer_for_ended_room"] += 1
        if ending.failure is not None:
            return [_tell(info, ending.failure)]
        if info.is_resume:
            return []  # a late repetition: this destination has been told of its success
        return [_tell(info, Failure(CONFLICT, f"room {info.room} was used before"))]

    def _turn_away(self, info: TransferEmbeddingInfo, code: int, text: str) -> list[EncodeEffect]:
        """Only the sender of this message is told; the room, if there is one, goes on."""
        self._counts["offer_turned_away"] += 1
        return [_tell(info, Failure(code, text))]

    def _abort(self, message: Abort, now: float) -> list[EncodeEffect]:
        room, session_id = message.room, message.session_id
        if self._sessions.must_wait(session_id, room, message.address):
            return []
        failure = message.failure or Failure(CLIENT_GONE, f"room {room} was dropped by the language side")
        sender = self._rooms.get(room)
        if sender is not None:
            sender.unacknowledged[session_id] = message.address
            return [] if sender.is_over else self._rooms.fail(sender, failure, now)
        # Its init may be behind it on the way: it must not begin what is declared quiet here.
        if self._rooms.ended.get(room) is None:
            self._rooms.ended.add(room, Status.FAILED, failure, now)
        return [Send(message.address, AbortAck(room))]

    # ---- time

    def tick(self, now: float) -> list[EncodeEffect]:
        effects: list[EncodeEffect] = []
        while (key := self._alarms.pop_due(now)) is not None:
            if isinstance(key, str):
                effects += self._session_alarm(key, now)
            else:
                sender = self._rooms[key]
                effects += self._rooms.fail(sender, sender.lateness(self._timing), now)
        self._rooms.ended.forget_due(now)
        return effects

    def next_wakeup(self) -> float | None:
        return min((at for at in (self._alarms.next(), self._rooms.ended.next()) if at is not None), default=None)

    def _session_alarm(self, session_id: str, now: float) -> list[EncodeEffect]:
        session = self._sessions.get(session_id)
        if session is None:
            raise LocalError(f"an alarm for session {session_id}, which is not known")
        patience = self._timing.silence if session.rooms else self._timing.forget_session
        if now < session.heard + patience:
            self._alarms.set(session_id, session.heard + patience)
            return []
        if not session.rooms:
            self._sessions.forget(session_id)
            return []
        self._alarms.set(session_id, now + patience)
        return self._fail_rooms(session, f"session {session_id} was silent for {patience:g} s", now)

    def _fail_rooms(self, session: Session, text: str, now: float) -> list[EncodeEffect]:
        effects: list[EncodeEffect] = []
        for room in sorted(session.rooms):
            sender = self._rooms[room]
            if not sender.is_over:
                effects += self._rooms.fail(sender, Failure(BAD_GATEWAY, text), now)
        return effects

    # ---- what the shell and the tests may look at

    def session(self, session_id: str) -> Register | None:
        session = self._sessions.get(session_id)
        return session.register if session else None

    def sessions(self) -> frozenset[str]:
        return self._sessions.names()

    def is_empty(self) -> bool:
        return not len(self._rooms)

    def sizes(self) -> dict[str, int]:
        return {
            **self._rooms.sizes(),
            "sessions": len(self._sessions),
            "unquiet": self._sessions.unquiet,
            "blocks_free": self._pool.free,
            "blocks_leased": self._pool.leased,
            "blocks_quarantined": self._pool.quarantined,
        }

    def counts(self) -> dict[str, int]:
        return {**self._counts, **{f"failed_{code}": count for code, count in self._rooms.failures.items()}}


def _tell(info: TransferEmbeddingInfo, failure: Failure) -> Send:
    return Send(info.address, StatusReport(info.room, Status.FAILED, failure=failure))
