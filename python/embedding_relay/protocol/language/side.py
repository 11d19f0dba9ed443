"""The language side: what reaches it, from this instance and from encode ranks, and what it does about it."""

from __future__ import annotations

import collections

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import LanguageEffect, Note, Send, StatusChanged
from embedding_relay.protocol.errors import (
    BAD_GATEWAY,
    CLIENT_GONE,
    CONFLICT,
    INTERNAL,
    MISDIRECTED,
    Failure,
    LocalError,
)
from embedding_relay.protocol.language.peers import Peer, Peers, Vigil
from embedding_relay.protocol.language.reserve import DefaultReservation
from embedding_relay.protocol.language.room import ReceiverRoom, Verdict
from embedding_relay.protocol.language.rooms import LanguageRooms
from embedding_relay.protocol.messages import (
    AbortAck,
    Address,
    Ping,
    Pong,
    Register,
    StatusReport,
    ToLanguage,
)
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Alarms, Timing


class LanguageSide:
    """One language rank. Every method returns what must be done, in this order; none of them waits."""

    def __init__(
        self,
        *,
        register: Register,
        pool: BlockPool,
        default_tokens: int | None,
        max_rows: int,
        ranks: int,
        timing: Timing,
    ) -> None:
        self._register = register
        self._pool = pool
        self._max_rows = max_rows
        self._timing = timing
        self._reservation = DefaultReservation(default_tokens, pool.count * register.handshake.block_size)
        self._alarms: Alarms[int | str] = Alarms()
        """By room number, or by the name of a peer."""
        self._peers = Peers(timing, self._alarms)
        self._rooms = LanguageRooms(register, pool, self._reservation, ranks, timing, self._peers, self._alarms)
        self._counts: collections.Counter[str] = collections.Counter()

    # ---- from this instance

    def request(self, room: int, peer: str, now: float, *, hint_rows: int | None = None) -> list[LanguageEffect]:
        """Get the rows of a room from the encode instance whose registry is at `peer`."""
        known = self._rooms.get(room)
        if known is not None and not known.is_over:
            raise LocalError(f"room {room} is under way already")
        if known is not None or self._rooms.ended.get(room):
            # A late message about its first use could be taken for one about the second.
            self._rooms.failures[CONFLICT] += 1
            return [StatusChanged(room, Status.FAILED, Failure(CONFLICT, f"room {room} was used before"))]
        wanted = hint_rows or self._reservation.rows(len(self._rooms) + 1)
        source = self._peers.for_new_room(peer, now)
        self._rooms.enqueue(room, source, max(1, min(wanted, self._max_rows)), now)
        if source.address is None:
            return self._peers.look_up(source)
        return [*self._rooms.serve_queue(now), *self._rooms.announce(source, now)]

    def cancel(self, room: int, now: float, failure: Failure | None = None) -> list[LanguageEffect]:
        receiver = self._rooms.get(room)
        if receiver is None or receiver.is_over:
            return []
        return self._rooms.fail(receiver, failure or Failure(CLIENT_GONE, f"the client of room {room} is gone"), now)

    def copied(self, room: int, rows: int, total: int, now: float) -> list[LanguageEffect]:
        """The answer to `CopyOut`: how many rows were copied, and the true length as the aux row has it."""
        receiver, report = self._end_copy(room)
        if receiver.is_over:
            return self._rooms.release(receiver, now)
        if failure := receiver.account(report, rows, total, self._max_rows):
            return self._rooms.fail(receiver, failure, now)
        if report.status is Status.SUCCESS:
            return self._rooms.deliver(receiver, now)
        return self._rooms.resume(receiver, now)

    def copy_failed(self, room: int, text: str, now: float) -> list[LanguageEffect]:
        receiver, _ = self._end_copy(room)
        if receiver.is_over:
            return self._rooms.release(receiver, now)
        failure = Failure(INTERNAL, f"the rows of room {room} could not be copied: {text}")
        return self._rooms.fail(receiver, failure, now)

    def _end_copy(self, room: int) -> tuple[ReceiverRoom, StatusReport]:
        receiver = self._rooms.get(room)
        if receiver is None or receiver.copying is None:
            raise LocalError(f"room {room} has no rows to be copied")
        report, receiver.copying = receiver.copying, None
        return receiver, report

    # ---- about peers

    def peer_resolved(self, peer: str, address: Address, instance: str, now: float) -> list[LanguageEffect]:
        source = self._peers.get(peer)
        if source is None:
            return []
        self._peers.resolved(source, address, instance, now)
        effects: list[LanguageEffect] = [Send(address, abort) for abort in source.pop_untold()]
        for room in sorted(source.under_way):
            receiver = self._rooms[room]
            if receiver.instance == instance:
                continue
            # Whoever has taken the address over may have taken the room over too, and will acknowledge its abort.
            end = self._rooms.disown if receiver.address == address else self._rooms.bury
            effects += end(receiver, now)
        return [*effects, *self._rooms.serve_queue(now), *self._rooms.announce(source, now)]

    def peer_unreachable(self, peer: str, reason: str, now: float) -> list[LanguageEffect]:
        text = f"encode instance {peer} cannot be found: {reason}"
        return self.peer_refused(peer, Failure(BAD_GATEWAY, text), now)

    def peer_refused(self, peer: str, failure: Failure, now: float) -> list[LanguageEffect]:
        """Nothing may be asked of this peer. That proves nothing about writes of rooms that are under way there."""
        source = self._peers.get(peer)
        if source is None:
            return []
        source.looking = False
        source.pop_untold()  # there is nobody to be told
        source.lose()
        effects: list[LanguageEffect] = []
        for room in sorted(source.queued):
            effects += self._rooms.fail(self._rooms[room], failure, now)
        self._peers.forget_if_useless(source)
        return effects

    def peer_dead(self, peer: str, now: float) -> list[LanguageEffect]:
        """It is proven that no process is left at the address of the peer: nothing of it can land any more."""
        source = self._peers.get(peer)
        if source is None:
            return []
        effects = self._look_again(source)
        for room in sorted(source.under_way):
            effects += self._rooms.bury(self._rooms[room], now)
        self._peers.forget_if_useless(source)
        return effects

    def _look_again(self, source: Peer) -> list[LanguageEffect]:
        source.lose()
        return self._peers.look_up(source) if source.queued else []

    def _lose(self, source: Peer, now: float) -> list[LanguageEffect]:
        text = f"encode instance {source.name} did not answer for {now - source.heard:g} s"
        source.lose()
        effects: list[LanguageEffect] = [Note(text), *self._peers.look_up(source)]
        for room in sorted(source.under_way):
            if not self._rooms[room].is_over:
                effects += self._rooms.fail(self._rooms[room], Failure(BAD_GATEWAY, text), now)
        return effects

    # ---- from the encode side

    def receive(self, message: ToLanguage, now: float) -> list[LanguageEffect]:
        if isinstance(message, Pong):
            return self._take_pong(message, now)
        receiver = self._rooms.get(message.room)
        if receiver is None or not receiver.words:
            self._counts["message_for_unknown_room"] += 1
            return []
        self._peers[receiver.peer].hear(now)
        if isinstance(message, AbortAck):
            return self._take_ack(receiver, now)
        if receiver.is_over:
            self._counts["status_stale"] += 1
            return []
        return self._take_report(receiver, message, now)

    def _take_pong(self, pong: Pong, now: float) -> list[LanguageEffect]:
        effects: list[LanguageEffect] = []
        for source in self._peers.known_as(pong.asked):
            if pong.instance == pong.asked:
                source.hear(now)
                continue
            effects += self._look_again(source)
            for room in sorted(source.under_way):
                effects += self._rooms.disown(self._rooms[room], now)
        return effects

    def _take_ack(self, receiver: ReceiverRoom, now: float) -> list[LanguageEffect]:
        if not receiver.is_over:
            self._counts["ack_ignored"] += 1
            return []
        return self._rooms.acknowledged(receiver, now)

    def _take_report(self, receiver: ReceiverRoom, report: StatusReport, now: float) -> list[LanguageEffect]:
        if report.status is Status.FAILED:
            return self._take_failure(receiver, report, now)
        verdict = Verdict.STALE if receiver.is_queued else receiver.judge(report)
        if isinstance(verdict, Failure):
            return self._rooms.fail(receiver, verdict, now)
        if verdict is Verdict.STALE:
            self._counts["status_stale"] += 1
            return []
        self._alarms.set(receiver.room, now + self._timing.waiting)
        effects: list[LanguageEffect] = []
        if report.status is Status.TRANSFERRING:
            if receiver.status is not Status.TRANSFERRING:
                effects.append(StatusChanged(receiver.room, report.status))
            receiver.move(report.status)
        return [*effects, receiver.copy_out(report, self._max_rows)]

    def _take_failure(self, receiver: ReceiverRoom, report: StatusReport, now: float) -> list[LanguageEffect]:
        failure = report.failure or Failure(BAD_GATEWAY, f"room {receiver.room} failed at the encode side")
        if receiver.copying is not None and receiver.copying.status is Status.SUCCESS:
            self._counts["status_stale"] += 1
            return []  # every row is here; the answer to a repeated init may still say otherwise
        if failure.code != MISDIRECTED:
            end = self._rooms.fail_queued if receiver.is_queued else self._rooms.fail
            return end(receiver, failure, now)
        receiver.misdirected += 1
        if receiver.received or receiver.copying is not None or receiver.misdirected > receiver.words:
            return self._rooms.fail(receiver, Failure(BAD_GATEWAY, failure.text), now)
        return self._rooms.ask_again(receiver)

    # ---- time

    def tick(self, now: float) -> list[LanguageEffect]:
        effects: list[LanguageEffect] = []
        while (key := self._alarms.pop_due(now)) is not None:
            effects += self._peer_alarm(key, now) if isinstance(key, str) else self._room_alarm(key, now)
        self._rooms.ended.forget_due(now)
        return effects

    def next_wakeup(self) -> float | None:
        return min((at for at in (self._alarms.next(), self._rooms.ended.next()) if at is not None), default=None)

    def _room_alarm(self, room: int, now: float) -> list[LanguageEffect]:
        receiver = self._rooms[room]
        if receiver.is_over:
            return self._rooms.repeat_abort(receiver, now)
        source = self._peers[receiver.peer]
        if receiver.is_queued and source.address is None:
            source.looking = False  # whoever comes next asks anew
        return self._rooms.fail(receiver, receiver.lateness(source.address is not None, self._timing), now)

    def _peer_alarm(self, name: str, now: float) -> list[LanguageEffect]:
        source = self._peers[name]
        vigil = self._peers.alarm(source, now)
        if vigil is Vigil.SEARCH:
            return self._peers.look_up(source)
        if vigil is Vigil.LOST:
            return self._lose(source, now)
        if vigil is Vigil.PING and source.address is not None:
            ping = Ping(self._register.address, self._register.session_id, source.instance)
            return [Send(source.address, ping)]
        return []

    # ---- what the shell and the tests may look at

    def is_empty(self) -> bool:
        return not len(self._rooms)

    def sizes(self) -> dict[str, int]:
        return {
            **self._rooms.sizes(),
            "peers": len(self._peers),
            "blocks_free": self._pool.free,
            "blocks_leased": self._pool.leased,
            "blocks_quarantined": self._pool.quarantined,
        }

    def counts(self) -> dict[str, int]:
        return {**self._counts, **{f"failed_{code}": count for code, count in self._rooms.failures.items()}}
