"""One room of the language side: it takes what happens to it, and returns what must be done about it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.counts import Counts, Event
from embedding_relay.protocol.effects import (
    ClearAux,
    CopyAhead,
    CopyOut,
    Deliver,
    LanguageEffect,
    LookUp,
    Note,
    Send,
    StatusChanged,
)
from embedding_relay.protocol.ended import EndedRooms
from embedding_relay.protocol.errors import (
    BAD_GATEWAY,
    BAD_REQUEST,
    INTERNAL,
    MISDIRECTED,
    UNAVAILABLE,
    Failure,
    LocalError,
    not_registered,
)
from embedding_relay.protocol.language.peers import Peer, Peers
from embedding_relay.protocol.language.reserve import DefaultReservation, PeerShare
from embedding_relay.protocol.messages import (
    MAX_ITEMS,
    Abort,
    Address,
    Have,
    Item,
    Manifest,
    Progress,
    Queued,
    Register,
    StatusReport,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status, is_final, move
from embedding_relay.protocol.timing import Alarms, Timing

# In bytes. What a half hides (a round trip, and copying its end) must be more than what one more chunk costs.
SMALLEST_HALF: Final = 2 << 20


@dataclasses.dataclass
class Shared:
    """What all rooms of one language rank have in common."""

    register: Register
    pool: BlockPool
    reservation: DefaultReservation
    share: PeerShare
    ranks: int
    max_rows: int
    smallest_half: int
    """A room whose blocks make no two halves of so many bytes has one offer at a time."""
    timing: Timing
    alarms: Alarms[int | str]
    """By room number, or by the name of a peer."""
    peers: Peers
    ended: EndedRooms
    counts: Counts = dataclasses.field(default_factory=Counts)
    rooms: dict[int, LanguageRoom] = dataclasses.field(default_factory=dict)
    queue: dict[int, LanguageRoom] = dataclasses.field(default_factory=dict)
    """Rooms that wait for their first block, in order of arrival; they hold nothing."""

    @property
    def block_size(self) -> int:
        return self.register.handshake.block_size

    @property
    def looked_up(self) -> int:
        """Rooms of the queue whose peer has not been found yet."""
        return sum(len(peer.queued) for peer in self.peers if peer.address is None)

    @property
    def held_back(self) -> int:
        """Rooms of the queue that get no block even if some are free, because their peer may have no more."""
        found = (peer for peer in self.peers if peer.queued and peer.address is not None)
        return sum(len(self._held_back_of(peer)) for peer in found)

    def _held_back_of(self, peer: Peer) -> set[int]:
        if not self.share.left(peer):
            return peer.queued
        return set() if self.left_for_many(peer) else peer.queued_with_many

    def left_for_many(self, peer: Peer) -> int:
        return self.share.left_for_many(peer, self._held_by_many)

    def first_blocks(self, room: LanguageRoom) -> int:
        """How many it may have now, that has none."""
        if room.many_items:
            return self.left_for_many(room.peer)
        return self.share.first_for_few(room.peer, self._held_by_many)

    @property
    def _held_by_many(self) -> int:
        return sum(peer.held_by_many for peer in self.peers)

    @property
    def servable(self) -> int:
        """Rooms of the queue that get a block as soon as one is free."""
        return len(self.queue) - self.looked_up - self.held_back


class Offer(NamedTuple):
    """Rows `[first_row, end)` of the room may be written into these blocks, row `first_row` at offset 0."""

    blocks: tuple[int, ...]
    first_row: int
    allocated: int

    @property
    def end(self) -> int:
        return self.first_row + self.allocated


class LanguageRoom:
    """From the queue through offers and copies to its end, and then to the proof that nothing more can land."""

    def __init__(
        self,
        room: int,
        peer: Peer,
        wanted_rows: int,
        kept: Iterable[str],
        shared: Shared,
        now: float,
        *,
        many_items: bool = False,
    ) -> None:
        self.room = room
        self.peer = peer
        self.many_items = many_items
        self.wanted_rows = wanted_rows
        self.kept = tuple(kept)
        """Keys of items that may turn out to be in the prompt, and whose rows are kept here until the room is over."""
        self.promised: dict[str, None] = {}
        """Keys that the peer has been told of, in the order in which it was; it may leave out the rows of these."""
        self.has_manifest = False
        self.status = Status.BOOTSTRAPPING
        self.address: Address | None = None
        """Where its messages go, once it has left the queue."""
        self.instance = ""
        self.offers: tuple[Offer, ...] = ()
        """What is being written, from row `received` on; then what comes next, if the peer takes an offer ahead."""
        self.received = 0
        self.ahead = 0
        """Rows of the room that may have been copied before their report came."""
        self.total: int | None = None
        self.rounds = 0
        self.introductions = 0
        """Messages that introduced the room over there: that it is queued, and its init."""
        self.misdirected = 0
        """Answers that this session is not registered there; each introduction may have one."""
        self.copying: StatusReport | None = None
        """The newest report, while rows of the first offer are being copied out."""
        self.acknowledged = False
        """No write of this room can land any more."""
        self.failure: Failure | None = None
        self.over_since = 0.0
        self.overdue = False
        self._shared = shared
        self._deadline = now + shared.timing.bootstrap
        """Of what the room waits for now."""
        self._repetitions = 0
        """How often the last message has been sent again."""
        self._trial_ends = math.inf
        shared.rooms[room] = shared.queue[room] = self
        peer.queued.add(room)
        if many_items:
            peer.queued_with_many.add(room)
        shared.alarms.set(room, self._deadline)

    @property
    def is_over(self) -> bool:
        return is_final(self.status)

    @property
    def is_queued(self) -> bool:
        return self.address is None

    @property
    def blocks(self) -> tuple[int, ...]:
        """All that it has."""
        return tuple(block for offer in self.offers for block in offer.blocks)

    @property
    def end(self) -> int:
        """The row up to which there are offers."""
        return self.offers[-1].end if self.offers else self.received

    def move(self, wanted: Status) -> None:
        self.status = move(self.status, wanted)

    def _send(self, message: Register | TransferEmbeddingInfo | Have | Abort) -> Send:
        if self.address is None:
            raise LocalError(f"room {self.room} has no peer yet")
        return Send(self.address, message)

    # ---- waiting

    def _wait_for(self, seconds: float, now: float) -> None:
        """A message is going out. It is sent again, at growing intervals, until it is answered or time is up."""
        self._deadline, self._repetitions = now + seconds, 0
        self._set_alarm(now)

    def _set_alarm(self, now: float) -> None:
        again = now + self._shared.timing.until_repeat(self._repetitions)
        self._shared.alarms.set(self.room, min(again, self._deadline))

    def _wait_for_copy(self, now: float) -> None:
        """Nothing is on its way that could be lost."""
        self._deadline = now + self._shared.timing.waiting
        self._shared.alarms.set(self.room, self._deadline)

    # ---- from the queue to the offer

    def announce(self, now: float) -> Queued:
        """It must wait for blocks, and says so, or the encode side would take it for lost."""
        self.introductions += 1
        self._repetitions = 0
        self._set_alarm(now)
        return self._queued_message()

    def _queued_message(self) -> Queued:
        register = self._shared.register
        return Queued(self.room, register.address, register.session_id)

    def begin(self, count: int, address: Address, now: float) -> list[LanguageEffect]:
        """Leave the queue with `count` blocks, and offer them."""
        shared = self._shared
        blocks = self._lease(count)
        self.offers = (Offer(blocks, 0, min(self.wanted_rows, count * shared.block_size)),)
        del shared.queue[self.room]
        shared.peers.begin(self.peer, self.room, now)
        if not self.peer.is_proven:
            self.peer.trial, self._trial_ends = self.room, now + shared.timing.trial
        self._wait_for(shared.timing.waiting, now)
        self.address, self.instance = address, self.peer.instance
        self.introductions += 1
        self.move(Status.WAITING_FOR_INPUT)
        return [
            *self.peer.registration(shared.register),
            ClearAux(blocks[0]),
            *self._promise(self.kept),
            *self._say(self.offers),
            StatusChanged(self.room, self.status),
        ]

    def _lease(self, count: int) -> tuple[int, ...]:
        self._count_held(count)
        return self._shared.pool.lease(count, self.room)

    def _give_back(self, blocks: tuple[int, ...]) -> None:
        self._shared.pool.give_back(blocks, self.room)
        self._count_held(-len(blocks))

    def _count_held(self, more: int) -> None:
        self.peer.held += more
        self.peer.held_by_many += more if self.many_items else 0

    def _say(self, offers: Iterable[Offer]) -> list[LanguageEffect]:
        return [self._send(self._info(offer)) for offer in offers]

    def _info(self, offer: Offer) -> TransferEmbeddingInfo:
        """An init if it is for the first row, else a resume: where the next rows may go."""
        register = self._shared.register
        return TransferEmbeddingInfo(
            room=self.room,
            endpoint=register.address.host,
            dst_port=register.address.port,
            mooncake_session_id=register.session_id,
            dst_embedding_indices=offer.blocks,
            required_dst_info_num=self._shared.ranks,
            sent_tokens=offer.first_row,
            allocated_tokens=offer.allocated,
        )

    def _resume(self, now: float) -> list[LanguageEffect]:
        """The blocks of the first offer are read. They are offered for the rows for which there is no offer yet."""
        self._wait_for(self._shared.timing.waiting, now)
        used_up, self.offers = self.offers[0], self.offers[1:]
        offers = self._divide(self._refill(used_up.blocks))
        self.offers += offers
        return self._say(offers)

    def needed_blocks(self) -> int:
        """For the rows for which there is no offer yet; at least one until their number is known."""
        left = 1 if self.total is None else self.total - self.end
        return max(0, -(-left // self._shared.block_size))

    def _refill(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Go on with the blocks in hand: fewer if fewer will do, more if nobody else could want them, never waiting."""
        shared, needed = self._shared, self.needed_blocks()
        left = shared.left_for_many(self.peer) if self.many_items else shared.share.left(self.peer)
        more = min(needed - len(blocks), shared.pool.free - 1, left)
        if needed < len(blocks):
            self._give_back(blocks[needed:])
            return blocks[:needed]
        if more > 0 and len(shared.queue) == shared.held_back:
            return tuple(sorted(blocks + self._lease(more)))
        return blocks

    def _divide(self, blocks: tuple[int, ...]) -> tuple[Offer, ...]:
        """One offer; or two halves, so that rows are written into one while the other is copied out."""
        shared, half = self._shared, len(blocks) // 2
        is_small = half * sum(shared.register.handshake.item_lens) < shared.smallest_half
        is_all = len(blocks) == self.needed_blocks()
        if not half or is_small or is_all or self.offers or not self.peer.takes_offer_ahead:
            half = 0
        offers, row, middle = [], self.end, len(blocks) - half
        for part in (blocks[:middle], blocks[middle:]):
            if part:
                offers.append(Offer(part, row, len(part) * shared.block_size))
                row = offers[-1].end
        return tuple(offers)

    # ---- items whose rows are kept here

    def take_manifest(self, manifest: Manifest) -> list[LanguageEffect]:
        if self.is_queued or self.has_manifest:
            self._shared.counts.events[Event.STATUS_STALE] += 1
            return []
        self.has_manifest = True
        return [LookUp(self.room, manifest.items)]

    def holds(self, keys: Iterable[str]) -> list[LanguageEffect]:
        """The rows of these are kept here until the room is over."""
        return [] if self.is_queued or self.is_over else self._promise(keys)

    def _promise(self, keys: Iterable[str]) -> list[LanguageEffect]:
        """The first ones, if there are more than a prompt can have items; nothing if that is no news."""
        if not self.peer.takes_have:
            return []
        news = [key for key in dict.fromkeys(keys) if key not in self.promised][: MAX_ITEMS - len(self.promised)]
        self.promised.update(dict.fromkeys(news))
        return self._say_promised() if news else []

    def _say_promised(self) -> list[LanguageEffect]:
        if not self.promised:
            return []
        register = self._shared.register
        return [self._send(Have(self.room, register.address, register.session_id, tuple(self.promised)))]

    def _flaw_of_held(self, held: Iterable[Item], rows: int) -> Failure | None:
        for item in held:
            if item.key not in self.promised:
                problem = f"an item is said to be kept here that was not promised: {item.key}"
                return Failure(BAD_GATEWAY, f"room {self.room}: {problem}")
            if item.runs[-1][1] > rows:
                problem = f"an item is said to end at row {item.runs[-1][1]}, and there are at most {rows} rows"
                return Failure(BAD_GATEWAY, f"room {self.room}: {problem}")
        return None

    # ---- what the encode side reports

    def take_report(self, report: StatusReport, now: float) -> list[LanguageEffect]:
        if report.status is Status.FAILED:
            return self._take_failure(report, now)
        if self._is_stale(report):
            self._shared.counts.events[Event.STATUS_STALE] += 1
            return []
        rows = self.total or self._shared.max_rows
        if failure := self._contradicts_the_offers(report) or self._flaw_of_held(report.held, rows):
            return self.fail(failure, now)
        effects: list[LanguageEffect] = []
        if report.status is Status.TRANSFERRING:
            if self.status is not Status.TRANSFERRING:
                effects.append(StatusChanged(self.room, report.status))
            self.move(report.status)
        if self.copying is None:
            effects.append(self._copy_out(report))
        self.copying = report
        self._wait_for_copy(now)
        return effects

    def _copy_out(self, report: StatusReport) -> CopyOut:
        self.rounds += 1
        offer = self.offers[0]
        held = tuple(item for item in report.held if item.overlaps(offer.first_row, offer.end))
        return CopyOut(self.room, offer.blocks, offer.first_row, offer.allocated, self._shared.max_rows, held)

    def take_progress(self, progress: Progress) -> list[LanguageEffect]:
        """Only a hint: what does not fit the offer that is out is ignored, and the report says what counts.

        Only the report says which rows were left out, so that none are copied ahead of it once something is promised.
        """
        rows = progress.rows
        if self.promised:
            return []
        if self.is_queued or self.copying or not max(self.received, self.ahead) < rows < self.offers[0].end:
            self._shared.counts.events[Event.STATUS_STALE] += 1
            return []
        self.ahead = rows
        offer = self.offers[0]
        return [CopyAhead(self.room, offer.blocks, offer.first_row, rows, self._shared.max_rows)]

    def _is_stale(self, report: StatusReport) -> bool:
        """A repetition, or of no consequence here: no rows have landed that are not known."""
        if self.is_queued or report.status not in (Status.TRANSFERRING, Status.SUCCESS):
            return True
        if report.rows is None:
            return self.copying is not None
        if report.rows <= self.received:
            return True
        # What is being copied has been reported, so this can only be the same once more.
        return self.copying is not None and report.rows <= max(self.offers[0].end, self.copying.rows or 0)

    def _contradicts_the_offers(self, report: StatusReport) -> Failure | None:
        """A report uses up exactly an offer that is out, and those before it; only the last may leave some of it."""
        ends = [offer.end for offer in self.offers]
        is_short = report.status is Status.TRANSFERRING and report.rows not in ends
        if report.rows is None or not (is_short or report.rows > self.end):
            return None
        on_offer = f"rows {self.received}..{self.end} were on offer"
        return Failure(BAD_GATEWAY, f"room {self.room} is said to have {report.rows} rows, but {on_offer}")

    def _take_failure(self, report: StatusReport, now: float) -> list[LanguageEffect]:
        failure = report.failure or Failure(BAD_GATEWAY, f"room {self.room} failed at the encode side")
        if self.copying is not None and self.copying.status is Status.SUCCESS:
            self._shared.counts.events[Event.STATUS_STALE] += 1
            return []  # every row is here; the answer to a repeated init may still say otherwise
        if failure.code != MISDIRECTED:
            # A queued room holds nothing, and the encode side has said so itself: nobody needs to be told.
            return self._end_in_queue(failure, now) if self.is_queued else self.fail(failure, now)
        if failure != not_registered(self._shared.register.session_id):
            # Somebody has asked for this room with a session of their own, and had the answer sent here.
            self._shared.counts.events[Event.STATUS_STALE] += 1
            return []
        self.misdirected += 1
        if self.received or self.ahead or self.copying is not None or self.misdirected > self.introductions:
            return self.fail(Failure(BAD_GATEWAY, failure.text), now)
        return self._ask_again()

    def _ask_again(self) -> list[LanguageEffect]:
        """The encode side has forgotten this session. With the same blocks it does not matter which init it takes."""
        register = self._shared.register
        if not self.is_queued:
            return [self._send(register), *self._say_promised(), *self._say(self.offers)]
        if self.peer.address is None:
            return []  # it is announced again when the peer is found again
        return [Send(self.peer.address, register), Send(self.peer.address, self._queued_message())]

    # ---- what came of a copy

    def copied(self, rows: int, total: int, now: float) -> list[LanguageEffect]:
        report = self._end_copy()
        if self.is_over:
            return self._release()
        if failure := self._objection(report, rows, total):
            return self.fail(failure, now)
        self.total = total
        self.received += rows
        self.peer.is_proven = True
        if self.received == total:
            return self._deliver(now)
        effects = self._resume(now)
        if report.rows is not None and report.rows > self.received:
            effects.append(self._copy_out(report))
            self.copying = report
            self._wait_for_copy(now)
        return effects

    def copy_failed(self, text: str, now: float) -> list[LanguageEffect]:
        return self._fail_copy(Failure(INTERNAL, f"the rows of room {self.room} could not be copied: {text}"), now)

    def refuse_rows(self, flaw: str, now: float) -> list[LanguageEffect]:
        """What was copied must not reach the model."""
        text = f"encode instance {self.peer.name} sent rows of room {self.room} that cannot be used: {flaw}"
        return self._fail_copy(Failure(BAD_GATEWAY, text), now)

    def _fail_copy(self, failure: Failure, now: float) -> list[LanguageEffect]:
        self._end_copy()
        return self._release() if self.is_over else self.fail(failure, now)

    def _end_copy(self) -> StatusReport:
        if self.copying is None:
            raise LocalError(f"room {self.room} has no rows to be copied")
        report, self.copying = self.copying, None
        return report

    def _objection(self, report: StatusReport, rows: int, total: int) -> Failure | None:
        """What does not add up must not reach the model."""
        room, most = self.room, self._shared.max_rows
        if total > most:
            return Failure(BAD_REQUEST, f"room {room} has {total} rows, more than the {most} that fit")
        if total < 1 or self.total not in (None, total):
            return Failure(BAD_GATEWAY, f"room {room} has {total} rows, and {self.total} were announced before")
        if failure := self._flaw_of_held(report.held, total):
            return failure
        if problem := self._problem_with_count(report, rows, total):
            return Failure(BAD_GATEWAY, f"room {room} does not add up: {problem}")
        return None

    def _problem_with_count(self, report: StatusReport, rows: int, total: int) -> str | None:
        offer, left = self.offers[0], total - self.received
        due = min(left, offer.allocated)
        # It may be about the offer behind this one too: then that this one was used up is all that it says of it.
        is_last = report.status is Status.SUCCESS and (report.rows is None or report.rows <= offer.end)
        if is_last is not (left <= offer.allocated):
            return f"{report.status.name} was reported with {left} rows to come and space for {offer.allocated}"
        if is_last and report.rows not in (None, total):
            return f"row {report.rows} was reported as the last, but there are {total}"
        if rows != due:
            return f"{rows} rows were copied, and {due} had to be"
        return None

    def _deliver(self, now: float) -> list[LanguageEffect]:
        shared = self._shared
        self.move(Status.SUCCESS)
        shared.ended.succeed(self.room, now, self.received)
        shared.reservation.observe(self.received)
        self._give_back(self.blocks)
        self._forget()
        return [Deliver(self.room, self.received, self.rounds), StatusChanged(self.room, self.status)]

    # ---- failure

    def fail(self, failure: Failure, now: float) -> list[LanguageEffect]:
        """The status is final at once; the blocks wait for the proof that no write can land in them any more."""
        changed = self._end(failure, now)
        if self.is_queued:
            return [changed, *self._leave_queue(now)]
        self._shared.pool.quarantine(self.blocks, self.room)
        self.peer.quarantined += len(self.blocks)
        self._wait_for(math.inf, now)
        return [changed, self._send(self._abort_message())]

    def _end_in_queue(self, failure: Failure, now: float) -> list[LanguageEffect]:
        changed = self._end(failure, now)
        del self._shared.queue[self.room]
        return [changed, *self._forget()]

    def _end(self, failure: Failure, now: float) -> StatusChanged:
        self.move(Status.FAILED)
        self.failure, self.over_since = failure, now
        self._shared.ended.fail(self.room, failure, now)
        self._shared.counts.failures[failure.code] += 1
        return StatusChanged(self.room, self.status, failure)

    def _leave_queue(self, now: float) -> list[LanguageEffect]:
        """It holds nothing; but the other half of the request must not wait in vain."""
        del self._shared.queue[self.room]
        if self.peer.address is not None:
            return self.tell(self.peer.address, now)
        if not self._shared.peers.tell_later(self.peer, self.room):
            return self._forget()
        self._shared.alarms.set(self.room, self._deadline)
        return []

    def tell(self, address: Address, now: float) -> list[LanguageEffect]:
        """The room has ended in the queue. It holds no blocks, so it does not wait for an answer for ever."""
        self.address = address
        self._shared.peers.begin(self.peer, self.room, now)
        self._wait_for(self._shared.timing.silence, now)
        return [self._send(self._abort_message())]

    def fail_after_restart(self, now: float) -> list[LanguageEffect]:
        """Another process is where the room's was."""
        if self.is_over:
            return []
        return self.fail(Failure(BAD_GATEWAY, f"encode instance {self.peer.name} was restarted"), now)

    def fail_and_release(self, now: float) -> list[LanguageEffect]:
        """No process that could write to the room is left, which is as good as its acknowledgement."""
        return [*self.fail_after_restart(now), *self.acknowledge()]

    def take_acknowledgement(self) -> list[LanguageEffect]:
        if not self.is_over:
            self._shared.counts.events[Event.ACK_IGNORED] += 1
            return []
        return self.acknowledge()

    def acknowledge(self) -> list[LanguageEffect]:
        """No write of this room can land any more."""
        self.acknowledged = True
        self._shared.alarms.cancel(self.room)
        return self._release()

    def _release(self) -> list[LanguageEffect]:
        """The last of the room, unless a write may still land in its blocks or somebody still reads them."""
        if self.copying is not None or not self.acknowledged:
            return []
        if self.blocks:
            self._shared.pool.release_quarantine(self.room)
            self._count_held(-len(self.blocks))
            self.peer.quarantined -= len(self.blocks)
            self.peer.overdue -= self.overdue
        return self._forget()

    def _forget(self) -> list[LanguageEffect]:
        self._shared.alarms.cancel(self.room)
        del self._shared.rooms[self.room]
        self._shared.peers.end(self.peer, self.room)
        return []

    def _abort_message(self) -> Abort:
        register = self._shared.register
        return Abort(self.room, register.address, register.session_id, self.failure)

    def fail_for_lost_blocks(self, now: float) -> list[LanguageEffect]:
        """Its peer gets no blocks, and nobody knows when it will."""
        return self.fail(self._no_blocks(), now)

    def _no_blocks(self, how_long: str = "") -> Failure:
        if why := self._shared.share.why_none(self.peer):
            return Failure(BAD_GATEWAY, f"no receive blocks{how_long}: encode instance {self.peer.name} {why}")
        return Failure(UNAVAILABLE, f"no receive blocks{how_long}")

    # ---- time

    def take_alarm(self, now: float) -> list[LanguageEffect]:
        if self.is_over:
            return self._repeat_abort(now)
        if now < self._deadline:
            return self._repeat(now)
        failure = self._lateness()
        if self.is_queued and self.peer.address is None:
            self.peer.looking = False  # whoever comes next asks anew
        return self.fail(failure, now)

    def _repeat(self, now: float) -> list[LanguageEffect]:
        """No answer: the message is lost, or its answer is, or it only takes long. Whoever has it knows it again."""
        self._repetitions += 1
        self._set_alarm(now)
        if now >= self._trial_ends and self.peer.trial == self.room:
            self.peer.trial = None  # its picture may take long, or its other half may never come: let another room try
        address = self.peer.address if self.is_queued else self.address
        if address is None:
            return []  # the peer is looked up again, and then told of the room
        if not self.received:
            self.introductions += 1
        again = self._say(self.offers) or [Send(address, self._queued_message())]
        self._shared.counts.events[Event.OFFER_REPEATED] += len(again)
        return again if self.is_queued else [*self._say_promised(), *again]

    def _repeat_abort(self, now: float) -> list[LanguageEffect]:
        if now >= self._deadline:
            return self._forget()
        self._repetitions += 1
        self._set_alarm(now)
        abort = self._send(self._abort_message())
        silence = now - self.over_since
        if self.overdue or silence < self._shared.timing.quarantine:
            return [abort]
        self.overdue = True
        self.peer.overdue += 1
        held = f"{len(self.blocks)} blocks of room {self.room} stay in quarantine"
        return [abort, Note(f"{held}: {self.peer.name} has not acknowledged its abort for {silence:g} s")]

    def _lateness(self) -> Failure:
        """What the room waited for when its time was up."""
        peer, timing = self.peer, self._shared.timing
        if self.copying is not None:
            return Failure(INTERNAL, f"rows of room {self.room} were not copied within {timing.waiting:g} s")
        if not self.is_queued:
            text = f"encode instance {peer.name} sent no more rows of room {self.room} within {timing.waiting:g} s"
            return Failure(BAD_GATEWAY, text)
        if peer.address is not None:
            return self._no_blocks(f" within {timing.bootstrap:g} s")
        return Failure(BAD_GATEWAY, f"bootstrap registry {peer.name} did not answer within {timing.bootstrap:g} s")
