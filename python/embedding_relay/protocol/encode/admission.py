"""Which language ranks are sessions of an encode rank: registration, rival registrations, and silence."""

from __future__ import annotations

from typing import Final

from embedding_relay.protocol.counts import Event
from embedding_relay.protocol.effects import EncodeEffect, Note, ProveGone, Send
from embedding_relay.protocol.encode.room import Shared
from embedding_relay.protocol.encode.sessions import Contender, Session
from embedding_relay.protocol.errors import LocalError, not_registered
from embedding_relay.protocol.messages import (
    Address,
    Queued,
    Register,
    StatusReport,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status

# Each costs a connection attempt of a second or two, so strangers must not be able to ask for more at a time.
MAX_CONTENDERS: Final = 64
_MAX_KEPT_WAITING: Final = 64
# Different texts; what happens after that is only counted.
_MAX_SAID: Final = 1000


class Admission:
    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._sessions = shared.sessions
        self._said: set[str] = set()

    def _say_once(self, text: str) -> list[EncodeEffect]:
        """An operator reads it once and not a thousand times, however often a stranger makes it happen."""
        if text in self._said or len(self._said) >= _MAX_SAID:
            return []
        self._said.add(text)
        return [Note(text)]

    def _count(self, event: Event) -> None:
        self._shared.counts.events[event] += 1

    # ---- registrations

    def register(self, message: Register, now: float) -> list[EncodeEffect]:
        session = self._sessions.get(message.session_id)
        if session is None:
            return self._admit(message, now)
        if session.register == message:
            self._sessions.hear(message.session_id, message.address, now)
            return []
        return self._contest(session, message)

    def _admit(self, message: Register, now: float) -> list[EncodeEffect]:
        # Another session at the same address is left to its own silence: this message may be the older of the two.
        effects = self._make_space(message.session_id)
        if effects is None:
            self._count(Event.REGISTRATION_REFUSED)
            return self._say_once(f"{len(self._sessions)} sessions are busy: no more are registered")
        session = self._sessions.add(message, now)
        self._shared.alarms.set(message.session_id, now + self._shared.timing.forget_session)
        if session.refusal:
            self._count(Event.HANDSHAKE_REFUSED)
            effects += self._say_once(f"session {message.session_id} at {message.address}: {session.refusal.text}")
        return effects

    def _make_space(self, session_id: str) -> list[EncodeEffect] | None:
        if len(self._sessions) < self._shared.timing.max_sessions or self._sessions.get(session_id):
            return []
        idle = self._sessions.longest_idle()
        if idle is None:
            return None
        self._forget(idle)
        self._count(Event.SESSION_DISPLACED)
        return self._say_once(f"more than {self._shared.timing.max_sessions} sessions: idle ones must register again")

    def _forget(self, session_id: str) -> None:
        self._sessions.forget(session_id)
        self._shared.alarms.cancel(session_id)

    # ---- two registrations of one session

    def _contest(self, known: Session, message: Register) -> list[EncodeEffect]:
        """Whoever has the session may have died and come back. But anyone can say so: only proof will do."""
        contenders = self._sessions.contenders
        if message.session_id in contenders:
            return []  # whatever is proven, the loser may ask again
        if len(contenders) >= MAX_CONTENDERS:
            self._count(Event.REGISTRATION_REFUSED)
            return self._say_once("too many sessions are claimed by two at a time: some are not looked into")
        contenders[message.session_id] = Contender(message)
        return [ProveGone(message.session_id, known.register.address)]

    def keep_waiting(self, message: TransferEmbeddingInfo | Queued) -> bool:
        """The answer to a contender's message waits for the proof; a 421 then makes it ask again, whoever has won."""
        contender = self._sessions.contenders.get(message.session_id)
        if contender is None or contender.register.address != message.address:
            return False
        if len(contender.kept_waiting) >= _MAX_KEPT_WAITING:
            return False
        contender.kept_waiting[message.room] = message.address
        return True

    def proven(self, session_id: str, address: Address, is_gone: bool, now: float) -> list[EncodeEffect]:
        """The answer to `ProveGone`."""
        contender = self._sessions.contenders.pop(session_id, None)
        if contender is None:
            raise LocalError(f"nobody asked for a proof about session {session_id}")
        effects: list[EncodeEffect] = []
        known = self._sessions.get(session_id)
        if is_gone and (known is None or known.register.address == address):
            if known is not None:
                text = f"session {session_id} has ended: another process is registered in its place"
                effects += self._shared.fail_rooms_of(known, text, now)
            effects += self._admit(contender.register, now)
        else:
            self._count(Event.REGISTRATION_REFUSED)
            rival = contender.register.address
            effects += self._say_once(f"session {session_id} is claimed from {rival}, but {address} may be alive")
        misdirected = not_registered(session_id)
        for room, where in contender.kept_waiting.items():
            effects.append(Send(where, StatusReport(room, Status.FAILED, failure=misdirected), to_stranger=True))
        return effects

    # ---- time

    def take_alarm(self, session_id: str, now: float) -> list[EncodeEffect]:
        session = self._sessions.get(session_id)
        if session is None:
            raise LocalError(f"an alarm for session {session_id}, which is not known")
        patience = self._shared.timing.silence if session.rooms else self._shared.timing.forget_session
        if now < session.heard + patience:
            self._shared.alarms.set(session_id, session.heard + patience)
            return []
        if not session.rooms:
            self._forget(session_id)
            return []
        self._shared.alarms.set(session_id, now + patience)
        return self._shared.fail_rooms_of(session, f"session {session_id} was silent for {patience:g} s", now)
