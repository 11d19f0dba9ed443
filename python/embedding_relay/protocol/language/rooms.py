"""The rooms of the language side from the queue to the end: their status, their receive blocks, their quarantine."""

from __future__ import annotations

import collections

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import Deliver, LanguageEffect, Note, Send, StatusChanged
from embedding_relay.protocol.ended import EndedRooms
from embedding_relay.protocol.errors import BAD_GATEWAY, Failure, LocalError
from embedding_relay.protocol.language.peers import Peer, Peers
from embedding_relay.protocol.language.reserve import DefaultReservation
from embedding_relay.protocol.language.room import ReceiverRoom
from embedding_relay.protocol.messages import Address, Register, ToEncode
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Alarms, Timing


class LanguageRooms:
    def __init__(
        self,
        register: Register,
        pool: BlockPool,
        reservation: DefaultReservation,
        ranks: int,
        timing: Timing,
        peers: Peers,
        alarms: Alarms[int | str],
    ) -> None:
        self._register = register
        self._block_size = register.handshake.block_size
        self._pool = pool
        self._reservation = reservation
        self._ranks = ranks
        self._timing = timing
        self._peers = peers
        self._alarms = alarms
        self._rooms: dict[int, ReceiverRoom] = {}
        self._queue: dict[int, None] = {}
        """Rooms that wait for their first block, in order of arrival; they hold nothing."""
        self.ended = EndedRooms(timing)
        self.failures: collections.Counter[int] = collections.Counter()

    def __len__(self) -> int:
        return len(self._rooms)

    def __getitem__(self, room: int) -> ReceiverRoom:
        return self._rooms[room]

    def get(self, room: int) -> ReceiverRoom | None:
        return self._rooms.get(room)

    def sizes(self) -> dict[str, int]:
        over = [receiver for receiver in self._rooms.values() if receiver.is_over]
        return {
            "rooms": len(self._rooms) - len(over),
            "waiting_for_blocks": len(self._queue),
            "quarantined_rooms": len(over),
            "quarantine_overdue": sum(receiver.overdue for receiver in over),
            "remembered": len(self.ended),
        }

    # ---- from the queue to the offer

    def enqueue(self, room: int, peer: Peer, wanted_rows: int, now: float) -> None:
        self._rooms[room] = ReceiverRoom(room, peer.name, wanted_rows)
        self._queue[room] = None
        peer.queued.add(room)
        self._alarms.set(room, now + self._timing.bootstrap)

    def serve_queue(self, now: float) -> list[LanguageEffect]:
        """First come, first served for the first block.

        With several ranks, a room must not lose its place to a later one only because its peer is still being looked
        up here: on another rank it may be the other way round, and each would hold what the other waits for. So one
        block is left for each of those.
        """
        effects: list[LanguageEffect] = []
        kept_for_all = self._unresolved() if self._ranks > 1 else 0
        kept_for_earlier = 0
        for room in list(self._queue):
            receiver = self._rooms[room]
            peer = self._peers[receiver.peer]
            if peer.address is None:
                kept_for_earlier += min(1, kept_for_all)
                continue
            if self._pool.free <= kept_for_earlier:
                break
            wanted = -(-receiver.wanted_rows // self._block_size)
            count = max(1, min(wanted, self._pool.free - kept_for_all))
            receiver.offer(self._pool.lease(count, room), self._block_size, receiver.wanted_rows)
            effects += self._begin(receiver, peer, peer.address, now)
        return effects

    def _unresolved(self) -> int:
        return sum(self._peers[self._rooms[room].peer].address is None for room in self._queue)

    def _begin(self, receiver: ReceiverRoom, peer: Peer, address: Address, now: float) -> list[LanguageEffect]:
        del self._queue[receiver.room]
        self._peers.begin(peer, receiver.room, now)
        self._alarms.set(receiver.room, now + self._timing.waiting)
        receiver.address, receiver.instance = address, peer.instance
        receiver.words += 1
        receiver.move(Status.WAITING_FOR_INPUT)
        introduction = self._introduce(peer, address)
        return [*introduction, self.offer(receiver), StatusChanged(receiver.room, receiver.status)]

    def announce(self, peer: Peer, now: float) -> list[LanguageEffect]:
        """Rooms that must wait for blocks say so, or the encode side would take them for lost."""
        rooms = sorted(peer.queued - peer.announced)
        if peer.address is None or not rooms:
            return []
        self._peers.announce(peer, rooms, now)
        effects = self._introduce(peer, peer.address)
        for room in rooms:
            self._rooms[room].words += 1
            effects.append(Send(peer.address, self._rooms[room].queued(self._register)))
        return effects

    def _introduce(self, peer: Peer, address: Address) -> list[LanguageEffect]:
        if peer.is_registered:
            return []
        peer.note_registered()
        return [Send(address, self._register)]

    def ask_again(self, receiver: ReceiverRoom) -> list[LanguageEffect]:
        """The encode side has forgotten this session. With the same blocks it does not matter which init it takes."""
        if not receiver.is_queued:
            return [self.send(receiver, self._register), self.offer(receiver)]
        address = self._peers[receiver.peer].address
        if address is None:
            return []  # it is announced again when the peer is found again
        return [Send(address, self._register), Send(address, receiver.queued(self._register))]

    def offer(self, receiver: ReceiverRoom) -> Send:
        """The init, or the resume: where the rows after those received so far may go."""
        return self.send(receiver, receiver.message(self._register, self._ranks))

    def resume(self, receiver: ReceiverRoom, now: float) -> list[LanguageEffect]:
        self._alarms.set(receiver.room, now + self._timing.waiting)
        self._refill(receiver)
        return [self.offer(receiver), *self.serve_queue(now)]

    def _refill(self, receiver: ReceiverRoom) -> None:
        """Go on with the blocks in hand: fewer if fewer will do, more if nobody else could want them, never waiting."""
        needed, blocks = receiver.needed_blocks(self._block_size), receiver.blocks
        more = min(needed - len(blocks), self._pool.free - 1)
        if needed < len(blocks):
            self._pool.give_back(blocks[needed:], receiver.room)
            blocks = blocks[:needed]
        elif more > 0 and not self._queue:
            blocks = tuple(sorted(blocks + self._pool.lease(more, receiver.room)))
        receiver.offer(blocks, self._block_size)

    def send(self, receiver: ReceiverRoom, message: ToEncode) -> Send:
        if receiver.address is None:
            raise LocalError(f"room {receiver.room} has no peer yet")
        return Send(receiver.address, message)

    # ---- the end

    def deliver(self, receiver: ReceiverRoom, now: float) -> list[LanguageEffect]:
        receiver.move(Status.SUCCESS)
        self.ended.add(receiver.room, receiver.status, None, now)
        self._reservation.observe(receiver.received)
        self._pool.give_back(receiver.blocks, receiver.room)
        self._drop(receiver)
        delivered = Deliver(receiver.room, receiver.received, receiver.rounds)
        return [delivered, StatusChanged(receiver.room, receiver.status), *self.serve_queue(now)]

    def fail(self, receiver: ReceiverRoom, failure: Failure, now: float) -> list[LanguageEffect]:
        """The status is final at once; the blocks wait for the proof that no write can land in them any more."""
        changed = self._end(receiver, failure, now)
        if receiver.is_queued:
            return [changed, *self._tell_peer(receiver), *self._leave_queue(receiver, now)]
        self._pool.quarantine(receiver.blocks, receiver.room)
        return [changed, self._send_abort(receiver, now)]

    def fail_queued(self, receiver: ReceiverRoom, failure: Failure, now: float) -> list[LanguageEffect]:
        """The encode side has said so itself."""
        return [self._end(receiver, failure, now), *self._leave_queue(receiver, now)]

    def _end(self, receiver: ReceiverRoom, failure: Failure, now: float) -> StatusChanged:
        receiver.move(Status.FAILED)
        receiver.failure, receiver.over_since = failure, now
        self.ended.add(receiver.room, receiver.status, failure, now)
        self.failures[failure.code] += 1
        return StatusChanged(receiver.room, receiver.status, failure)

    def disown(self, receiver: ReceiverRoom, now: float) -> list[LanguageEffect]:
        """Another process is where the room's was."""
        if receiver.is_over:
            return []
        return self.fail(receiver, Failure(BAD_GATEWAY, f"encode instance {receiver.peer} was restarted"), now)

    def bury(self, receiver: ReceiverRoom, now: float) -> list[LanguageEffect]:
        """No process that could write to the room is left, which is as good as its acknowledgement."""
        return [*self.disown(receiver, now), *self.acknowledged(receiver, now)]

    def _tell_peer(self, receiver: ReceiverRoom) -> list[Send]:
        """It holds nothing, so nothing needs an answer; but the other half of the request should not wait in vain."""
        peer, abort = self._peers[receiver.peer], receiver.abort(self._register)
        if peer.address is not None:
            return [Send(peer.address, abort)]
        peer.tell_later(abort)
        return []

    def _leave_queue(self, receiver: ReceiverRoom, now: float) -> list[LanguageEffect]:
        del self._queue[receiver.room]
        self._drop(receiver)
        return self.serve_queue(now)

    def _send_abort(self, receiver: ReceiverRoom, now: float) -> Send:
        self._alarms.set(receiver.room, now + receiver.next_abort(self._timing.abort_interval))
        return self.send(receiver, receiver.abort(self._register))

    def repeat_abort(self, receiver: ReceiverRoom, now: float) -> list[LanguageEffect]:
        abort = self._send_abort(receiver, now)
        silence = now - receiver.over_since
        if receiver.overdue or silence < self._timing.quarantine:
            return [abort]
        receiver.overdue = True
        held = f"{len(receiver.blocks)} blocks of room {receiver.room} stay in quarantine"
        return [abort, Note(f"{held}: {receiver.peer} has not acknowledged its abort for {silence:g} s")]

    def acknowledged(self, receiver: ReceiverRoom, now: float) -> list[LanguageEffect]:
        """No write of this room can land any more."""
        receiver.acknowledged = True
        self._alarms.cancel(receiver.room)
        return self.release(receiver, now)

    def release(self, receiver: ReceiverRoom, now: float) -> list[LanguageEffect]:
        """The last of the room, unless a write may still land in its blocks or somebody still reads them."""
        if not receiver.acknowledged or receiver.copying is not None:
            return []
        self._pool.release_quarantine(receiver.room)
        self._drop(receiver)
        return self.serve_queue(now)

    def _drop(self, receiver: ReceiverRoom) -> None:
        self._alarms.cancel(receiver.room)
        del self._rooms[receiver.room]
        self._peers.end(self._peers[receiver.peer], receiver.room)
