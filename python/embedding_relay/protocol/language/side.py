"""The language side of one rank: it finds the room or the peer that something is about, and serves the queue."""

from __future__ import annotations

from collections.abc import Iterable

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.counts import Counts, Event
from embedding_relay.protocol.effects import LanguageEffect, Note, Send, StatusChanged
from embedding_relay.protocol.ended import EndedRooms
from embedding_relay.protocol.errors import BAD_GATEWAY, CLIENT_GONE, CONFLICT, Failure, LocalError
from embedding_relay.protocol.language.peers import Peer, PeerCheck, Peers
from embedding_relay.protocol.language.reserve import DefaultReservation, PeerShare, has_many
from embedding_relay.protocol.language.room import SMALLEST_HALF, LanguageRoom, Shared
from embedding_relay.protocol.messages import (
    AbortAck,
    Address,
    Manifest,
    Ping,
    Pong,
    Progress,
    Register,
    ToLanguage,
    flaw_of_room,
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
        smallest_half: int = SMALLEST_HALF,
    ) -> None:
        """`smallest_half`: how many bytes must fit into each half of a room's blocks for it to offer them in halves."""
        alarms: Alarms[int | str] = Alarms()
        capacity = pool.count * register.handshake.block_size
        self._peers = Peers(timing, alarms)
        self._shared = Shared(
            register=register,
            pool=pool,
            reservation=DefaultReservation(default_tokens, capacity, register.handshake.block_size),
            share=PeerShare(pool.count),
            ranks=ranks,
            max_rows=max_rows,
            smallest_half=smallest_half,
            timing=timing,
            alarms=alarms,
            peers=self._peers,
            ended=EndedRooms(timing),
        )
        self._rooms = self._shared.rooms

    # ---- from this instance

    def request(
        self,
        room: int,
        peer: str,
        now: float,
        *,
        hint_rows: int | None = None,
        held: Iterable[str] = (),
        items: int = 1,
    ) -> list[LanguageEffect]:
        """Get the rows of a room from the encode instance whose registry is at `peer`.

        `items`: how many pictures, videos and sounds its prompt has.
        `held`: keys of items that it may have, whose rows are here and are kept until the room is over.
        """
        shared, known = self._shared, self._rooms.get(room)
        if flaw := flaw_of_room(room):
            shared.counts.failures[flaw.code] += 1
            return [StatusChanged(room, Status.FAILED, flaw)]
        if known is not None and not known.is_over:
            raise LocalError(f"room {room} is under way already")
        if known is not None or shared.ended.get(room):
            # A late message about its first use could be taken for one about the second.
            shared.counts.failures[CONFLICT] += 1
            return [StatusChanged(room, Status.FAILED, Failure(CONFLICT, f"room {room} was used before"))]
        wanted = hint_rows or shared.reservation.rows(len(self._rooms) + 1)
        source = self._peers.for_new_room(peer, now)
        wanted = max(1, min(wanted, shared.max_rows))
        LanguageRoom(room, source, wanted, held, shared, now, many_items=has_many(items))
        if source.address is None:
            return self._peers.look_up(source)
        return [*self._serve_queue(now), *self._announce(source, now)]

    def holds(self, room: int, keys: Iterable[str], now: float) -> list[LanguageEffect]:
        """The answer to `LookUp`: the rows of these items are here, and are kept until the room is over."""
        known = self._rooms.get(room)
        return known.holds(keys) if known else []

    def cancel(self, room: int, now: float, failure: Failure | None = None) -> list[LanguageEffect]:
        known = self._rooms.get(room)
        if known is None or known.is_over:
            return []
        failure = failure or Failure(CLIENT_GONE, f"the client of room {room} is gone")
        return [*known.fail(failure, now), *self._serve_queue(now)]

    def copied(self, room: int, rows: int, total: int, now: float) -> list[LanguageEffect]:
        """The answer to `CopyOut`: how many rows were copied, and the true length as the aux row has it."""
        return [*self._being_copied(room).copied(rows, total, now), *self._serve_queue(now)]

    def copy_failed(self, room: int, text: str, now: float) -> list[LanguageEffect]:
        return [*self._being_copied(room).copy_failed(text, now), *self._serve_queue(now)]

    def refuse_rows(self, room: int, flaw: str, now: float) -> list[LanguageEffect]:
        """Another answer to `CopyOut`: what was copied must not reach the model, and this is why."""
        return [*self._being_copied(room).refuse_rows(flaw, now), *self._serve_queue(now)]

    def _being_copied(self, room: int) -> LanguageRoom:
        if room not in self._rooms:
            raise LocalError(f"room {room} has no rows to be copied")
        return self._rooms[room]

    # ---- the queue

    def _serve_queue(self, now: float) -> list[LanguageEffect]:
        """First come, first served for the first block, except for rooms that may have none of what is left of a share.

        With several ranks, a room must not lose its place to a later one only because its peer is still being looked
        up here: on another rank it may be the other way round, and each would hold what the other waits for. So one
        block is left for each of those. A peer that is held back needs none: it leaves a share of every pool to others.
        """
        shared, pool = self._shared, self._shared.pool
        effects = self._fail_for_lost_blocks(now)
        left_for_each = 1 if shared.ranks > 1 else 0
        left_for_all = left_for_each * shared.looked_up
        left_for_earlier = 0
        for room in list(shared.queue.values()) if pool.free and shared.servable else ():
            peer = room.peer
            if peer.address is None:
                left_for_earlier += left_for_each
                continue
            if not (share := shared.first_blocks(room)):
                continue
            if pool.free <= left_for_earlier:
                break
            wanted = -(-room.wanted_rows // shared.block_size)
            effects += room.begin(max(1, min(wanted, share, pool.free - left_for_all)), peer.address, now)
            if not shared.servable:
                break
        return effects

    def _fail_for_lost_blocks(self, now: float) -> list[LanguageEffect]:
        """Rooms of a peer that gets no blocks, and of which it is not known when it will: others may serve them."""
        effects: list[LanguageEffect] = []
        for peer in self._peers:
            if peer.overdue and peer.address is not None and self._shared.share.why_none(peer):
                for number in sorted(peer.queued):
                    effects += self._rooms[number].fail_for_lost_blocks(now)
        return effects

    def _announce(self, peer: Peer, now: float) -> list[LanguageEffect]:
        """Rooms that must wait for blocks say so, or the encode side would take them for lost."""
        rooms = sorted(peer.queued - peer.announced)
        if peer.address is None or not rooms:
            return []
        self._peers.announce(peer, rooms, now)
        effects = peer.registration(self._shared.register)
        effects += [Send(peer.address, self._rooms[room].announce(now)) for room in rooms]
        return effects

    # ---- about peers

    def peer_resolved(
        self,
        peer: str,
        address: Address,
        instance: str,
        now: float,
        *,
        takes_offer_ahead: bool = False,
        takes_have: bool = False,
    ) -> list[LanguageEffect]:
        """What it takes is what its handshake says."""
        source = self._peers.get(peer)
        if source is None:
            return []
        source.takes_offer_ahead, source.takes_have = takes_offer_ahead, takes_have
        self._peers.resolved(source, address, instance, now)
        effects: list[LanguageEffect] = []
        for number in sorted(source.untold):
            effects += self._rooms[number].tell(address, now)
        for room in self._under_way(source):
            if room.instance == instance:
                continue
            # Whoever has taken the address over may have taken the room over too, and will acknowledge its abort.
            effects += room.fail_after_restart(now) if room.address == address else room.fail_and_release(now)
        return [*effects, *self._serve_queue(now), *self._announce(source, now)]

    def peer_unreachable(self, peer: str, reason: str, now: float) -> list[LanguageEffect]:
        text = f"encode instance {peer} cannot be found: {reason}"
        return self.peer_refused(peer, Failure(BAD_GATEWAY, text), now)

    def peer_refused(self, peer: str, failure: Failure, now: float) -> list[LanguageEffect]:
        """Nothing may be asked of this peer. That proves nothing about writes of rooms that are under way there."""
        source = self._peers.get(peer)
        if source is None:
            return []
        source.looking = False
        source.lose()
        for room in sorted(source.untold):
            self._rooms[room].acknowledge()  # there is nobody to be told
        effects: list[LanguageEffect] = []
        for room in sorted(source.queued):
            effects += self._rooms[room].fail(failure, now)
        self._peers.forget_if_useless(source)
        return [*effects, *self._serve_queue(now)]

    def peer_dead(self, peer: str, now: float) -> list[LanguageEffect]:
        """It is proven that no process is left at the address of the peer: nothing of it can land any more."""
        source = self._peers.get(peer)
        if source is None:
            return []
        effects = self._look_again(source)
        for room in self._under_way(source):
            effects += room.fail_and_release(now)
        self._peers.forget_if_useless(source)
        return [*effects, *self._serve_queue(now)]

    def _under_way(self, source: Peer) -> list[LanguageRoom]:
        return [self._rooms[room] for room in sorted(source.under_way)]

    def _look_again(self, source: Peer) -> list[LanguageEffect]:
        source.lose()
        return self._peers.look_up(source) if source.queued else []

    # ---- from the encode side

    def receive(self, message: ToLanguage, now: float) -> list[LanguageEffect]:
        if isinstance(message, Pong):
            return [*self._take_pong(message, now), *self._serve_queue(now)]
        room = self._rooms.get(message.room)
        if room is None or not (room.introductions or room.address):
            self._shared.counts.events[Event.MESSAGE_FOR_UNKNOWN_ROOM] += 1
            return []
        room.peer.hear(now)
        if isinstance(message, AbortAck):
            effects = room.take_acknowledgement()
        elif room.is_over:
            self._shared.counts.events[Event.STATUS_STALE] += 1
            effects = []
        elif isinstance(message, Progress):
            effects = room.take_progress(message)
        elif isinstance(message, Manifest):
            effects = room.take_manifest(message)
        else:
            effects = room.take_report(message, now)
        return [*effects, *self._serve_queue(now)]

    def _take_pong(self, pong: Pong, now: float) -> list[LanguageEffect]:
        effects: list[LanguageEffect] = []
        for source in self._peers.known_as(pong.asked):
            if pong.instance == pong.asked:
                source.hear(now)
                continue
            effects += self._look_again(source)
            for room in self._under_way(source):
                effects += room.fail_after_restart(now)
        return effects

    # ---- time

    def tick(self, now: float) -> list[LanguageEffect]:
        effects: list[LanguageEffect] = []
        while (key := self._shared.alarms.pop_due(now)) is not None:
            effects += self._check_peer(key, now) if isinstance(key, str) else self._rooms[key].take_alarm(now)
            effects += self._serve_queue(now)
        self._shared.ended.forget_due(now)
        return effects

    def next_wakeup(self) -> float | None:
        due = (self._shared.alarms.next(), self._shared.ended.next())
        return min((at for at in due if at is not None), default=None)

    def _check_peer(self, name: str, now: float) -> list[LanguageEffect]:
        source = self._peers[name]
        match self._peers.check(source, now):
            case PeerCheck.SEARCH:
                return self._peers.look_up(source)
            case PeerCheck.LOST:
                return self._lose(source, now)
            case PeerCheck.PING if source.address is not None:
                register = self._shared.register
                return [Send(source.address, Ping(register.address, register.session_id, source.instance))]
        return []

    def _lose(self, source: Peer, now: float) -> list[LanguageEffect]:
        text = f"encode instance {source.name} did not answer for {now - source.heard:g} s"
        source.lose()
        effects: list[LanguageEffect] = [Note(text), *self._peers.look_up(source)]
        for room in self._under_way(source):
            if not room.is_over:
                effects += room.fail(Failure(BAD_GATEWAY, text), now)
        return effects

    # ---- what the transport and the tests may look at

    def is_empty(self) -> bool:
        return not self._rooms

    def sizes(self) -> dict[str, int]:
        over = [room for room in self._rooms.values() if room.is_over]
        return {
            "rooms": len(self._rooms) - len(over),
            "waiting_for_blocks": len(self._shared.queue),
            "held_back": self._shared.held_back,
            "quarantined_rooms": len(over),
            "quarantine_overdue": sum(room.overdue for room in over),
            "remembered": len(self._shared.ended),
            "peers": len(self._peers),
            **self._shared.pool.sizes(),
        }

    @property
    def counts(self) -> Counts:
        return self._shared.counts
