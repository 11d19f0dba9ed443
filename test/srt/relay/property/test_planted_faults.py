"""Would the schedules notice? Faults that an implementer might well make are planted here, and each must be caught."""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest

from embedding_relay.protocol import codec
from embedding_relay.protocol.effects import (
    CopyAhead,
    CopyOut,
    EncodeEffect,
    LanguageEffect,
    Send,
    StatusChanged,
    TransferEmbeddingChunk,
)
from embedding_relay.protocol.encode.admission import Admission
from embedding_relay.protocol.encode.items import PromptItems
from embedding_relay.protocol.encode.room import Destination, EncodeRoom
from embedding_relay.protocol.encode.room import Shared as EncodeShared
from embedding_relay.protocol.encode.sessions import Session, Sessions
from embedding_relay.protocol.encode.side import EncodeSide
from embedding_relay.protocol.encode.unexpected import UnexpectedRooms
from embedding_relay.protocol.ended import EndedRooms
from embedding_relay.protocol.errors import Failure, LocalError
from embedding_relay.protocol.language.peers import Peer, Peers
from embedding_relay.protocol.language.reserve import PeerShare
from embedding_relay.protocol.language.room import LanguageRoom, Offer
from embedding_relay.protocol.language.room import Shared as LanguageShared
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import (
    Abort,
    AbortAck,
    Have,
    Progress,
    Queued,
    Register,
    StatusReport,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status
from embedding_relay.testing.nodes import LanguageNode
from embedding_relay.testing.watch import Picture, Violation
from embedding_relay.testing.world import World
from support.effort import unhurried
from support.hostile import AttackedWorld, Seeded, run_attack, run_attack_with_faults
from support.schedules import (
    LANDS_LATE,
    TIMING,
    Shape,
    run_chaos,
    run_lossy,
    run_offers_and_reports_lost,
    run_one_data_plane_dies,
    run_one_side_dies,
    run_orderly,
    run_slow,
)

pytestmark = unhurried

Patch = pytest.MonkeyPatch


# ---- the faults


def allocate_before_release(patch: Patch) -> None:
    """A resume takes its new blocks before it gives back the old ones, and waits for them if there are none."""

    def resume(self: LanguageRoom, now: float) -> list[LanguageEffect]:
        self._shared.__dict__.setdefault("waiting", []).append(self)
        return []

    def serve_queue(self: LanguageSide, now: float) -> list[LanguageEffect]:
        effects: list[LanguageEffect] = []
        waiting, pool = self._shared.__dict__.get("waiting", []), self._shared.pool
        for room in list(waiting):
            wanted = min(room.needed_blocks(), len(room.blocks))
            if pool.free >= wanted:
                waiting.remove(room)
                blocks = pool.lease(wanted, room.room)
                pool.give_back(room.blocks, room.room)
                room.offers = (Offer(blocks, room.received, wanted * self._shared.block_size),)
                effects += room._say(room.offers)
        return effects + original_serve_queue(self, now)

    original_serve_queue = LanguageSide._serve_queue
    patch.setattr(LanguageRoom, "_resume", resume)
    patch.setattr(LanguageSide, "_serve_queue", serve_queue)


def status_reset_on_resume_at_language(patch: Patch) -> None:
    def resume(self: LanguageRoom, now: float) -> list[LanguageEffect]:
        self.status = Status.WAITING_FOR_INPUT
        return [*original(self, now), StatusChanged(self.room, self.status)]

    original = LanguageRoom._resume
    patch.setattr(LanguageRoom, "_resume", resume)


def status_reset_on_resume_at_encode(patch: Patch) -> None:
    def advance(self: EncodeRoom, now: float) -> list[EncodeEffect]:
        if self.status is Status.TRANSFERRING:
            self.status = Status.BOOTSTRAPPING
        return original(self, now)

    original = EncodeRoom.advance
    patch.setattr(EncodeRoom, "advance", advance)


def is_last_from_the_default(patch: Patch) -> None:
    patch.setattr(Destination, "is_last", lambda self, total: total - self.sent <= 8)


def repeated_first_send_accepted(patch: Patch) -> None:
    def waits_for(self: Destination, info: TransferEmbeddingInfo) -> bool:
        if info.is_resume:
            return original(self, info)
        self.sent = self.written = 0
        return True

    original = Destination.waits_for
    patch.setattr(Destination, "waits_for", waits_for)


def repeated_resume_accepted(patch: Patch) -> None:
    def waits_for(self: Destination, info: TransferEmbeddingInfo) -> bool:
        if not info.is_resume:
            return original(self, info)
        self.sent = self.written = info.sent_tokens
        return True

    original = Destination.waits_for
    patch.setattr(Destination, "waits_for", waits_for)


def offer_ahead_accepted_at_a_wrong_row(patch: Patch) -> None:
    """One that repeats the offer in use, or that comes late, is taken for what comes next."""

    def waits_for(self: Destination, info: TransferEmbeddingInfo) -> bool:
        if not self.has_offer:
            return original(self, info)
        return info.is_resume and not (self.ahead or self.finished) and info.sent_tokens >= self.sent

    original = Destination.waits_for
    patch.setattr(Destination, "waits_for", waits_for)


def blocks_offered_again_before_they_are_copied_out(patch: Patch) -> None:
    """As soon as a report says that they are used up."""

    def take_report(self: LanguageRoom, report: StatusReport, now: float) -> list[LanguageEffect]:
        effects = take(self, report, now)
        is_taken = any(isinstance(effect, CopyOut) for effect in effects)
        if not (is_taken and self.peer.takes_offer_ahead and self.total and self.end < self.total):
            return effects
        blocks = self.offers[0].blocks
        early = Offer(blocks, self.end, len(blocks) * self._shared.block_size)
        self.offers += (early,)
        return [*effects, *self._say([early])]

    def resume_(self: LanguageRoom, now: float) -> list[LanguageEffect]:
        first, *others = self.offers
        if not any(offer.blocks == first.blocks for offer in others):
            return resume(self, now)
        self.offers = tuple(others)
        return []

    take, resume = LanguageRoom.take_report, LanguageRoom._resume
    patch.setattr(LanguageRoom, "take_report", take_report)
    patch.setattr(LanguageRoom, "_resume", resume_)


def only_the_first_of_two_offers_repeated(patch: Patch) -> None:
    def repeat(self: LanguageRoom, now: float) -> list[LanguageEffect]:
        return original(self, now)[:1]

    original = LanguageRoom._repeat
    patch.setattr(LanguageRoom, "_repeat", repeat)


def only_the_blocks_of_the_first_offer_quarantined(patch: Patch) -> None:
    """What was offered ahead is free at once when its room fails, though its turn may have come."""

    def fail(self: LanguageRoom, failure: Failure, now: float) -> list[LanguageEffect]:
        for offer in self.offers[1:]:
            self._give_back(offer.blocks)
        self.offers = self.offers[:1]
        return original(self, failure, now)

    original = LanguageRoom.fail
    patch.setattr(LanguageRoom, "fail", fail)


def cleanup_at_transferring(patch: Patch) -> None:
    def report_chunk(self: EncodeRoom, now: float) -> list[EncodeEffect]:
        effects = original(self, now)
        return effects if self.is_over else effects + self._close()

    original = EncodeRoom._report_chunk
    patch.setattr(EncodeRoom, "_report_chunk", report_chunk)


def blocks_freed_when_a_write_failed(patch: Patch) -> None:
    def fail(self: LanguageRoom, failure: Failure, now: float) -> list[LanguageEffect]:
        was_queued = self.is_queued
        effects = original(self, failure, now)
        return effects if was_queued else effects + self.acknowledge()

    original = LanguageRoom.fail
    patch.setattr(LanguageRoom, "fail", fail)


def abort_acknowledged_after_a_failed_write(patch: Patch) -> None:
    patch.setattr(Sessions, "note_failed_write", lambda self, session_id, room, address: None)


def abort_acknowledged_during_a_write(patch: Patch) -> None:
    def abort(self: EncodeSide, message: Abort, now: float) -> list[EncodeEffect]:
        effects = original(self, message, now)
        ack = AbortAck(message.room)
        told = any(isinstance(effect, Send) and effect.message == ack for effect in effects)
        return effects if told else [*effects, Send(message.address, ack)]

    original = EncodeSide._abort
    patch.setattr(EncodeSide, "_abort", abort)


def new_process_at_the_old_address_taken_for_proof(patch: Patch) -> None:
    def fail_after_restart(self: LanguageRoom, now: float) -> list[LanguageEffect]:
        return [*original(self, now), *self.acknowledge()]

    original = LanguageRoom.fail_after_restart
    patch.setattr(LanguageRoom, "fail_after_restart", fail_after_restart)
    patch.setattr(LanguageRoom, "fail_and_release", fail_after_restart)


def one_offer_taken_for_all_ranks(patch: Patch) -> None:
    """The first rank's offer decides how much every rank gets."""

    def begin_step(self: EncodeRoom) -> Any:
        for other in self.unfinished[1:]:
            other.allocated = self.unfinished[0].allocated
        return original(self)

    original = EncodeRoom.begin_step
    patch.setattr(EncodeRoom, "begin_step", begin_step)


def no_block_left_for_rooms_that_are_looked_up(patch: Patch) -> None:
    patch.setattr(LanguageShared, "looked_up", property(lambda self: 0))


def status_advanced_by_max(patch: Patch) -> None:
    """SGLang's way: `Failed` is 0, so whatever comes later wins over it."""

    def move(self: LanguageRoom, wanted: Status) -> None:
        self.status = Status(max(self.status.value, wanted.value))

    patch.setattr(LanguageRoom, "move", move)


def aux_left_out_when_there_are_two_ranks(patch: Patch) -> None:
    def change(step: TransferEmbeddingChunk, block_size: int) -> TransferEmbeddingChunk:
        first, *others = step.destinations
        return _replaced(step, destinations=(first, *map(_without_aux, others)))

    _change_steps(patch, change)


def resumed_rows_put_at_the_wrong_place(patch: Patch) -> None:
    """An offset that is right only for whole blocks."""

    def change(step: TransferEmbeddingChunk, block_size: int) -> TransferEmbeddingChunk:
        shifted = [
            _replaced(d, first_row=d.first_row - d.first_row % block_size)
            if d.stop_row - d.first_row + d.first_row % block_size <= len(d.blocks) * block_size
            else d
            for d in step.destinations
        ]
        return _replaced(step, destinations=tuple(shifted))

    _change_steps(patch, change)


def window_not_staged_again(patch: Patch) -> None:
    def change(step: TransferEmbeddingChunk, block_size: int) -> TransferEmbeddingChunk:
        return _replaced(step, window=_replaced(step.window, stage=False)) if step.window.first_row > 0 else step

    _change_steps(patch, change)


def progress_reported_before_it_is_made(patch: Patch) -> None:
    """The row after those that are there is said to be there too."""
    original = EncodeRoom.progressed

    def progressed(self: EncodeRoom, transfer_id: int, session_id: str, rows: int) -> list[EncodeEffect]:
        return original(self, transfer_id, session_id, rows + 1)

    patch.setattr(EncodeRoom, "progressed", progressed)


def progress_of_a_used_up_offer_believed(patch: Patch) -> None:
    """A late one is taken for one about the offer that is out, counted from its beginning."""

    def take_progress(self: LanguageRoom, progress: Progress) -> list[LanguageEffect]:
        if self.is_queued or self.copying is not None:
            return []
        offer = self.offers[0]
        stop = offer.first_row + progress.rows % offer.allocated
        return [CopyAhead(self.room, offer.blocks, offer.first_row, stop, self._shared.max_rows)]

    patch.setattr(LanguageRoom, "take_progress", take_progress)


def used_up_offers_kept(patch: Patch) -> None:
    """The next room that is given these blocks is refused: they seem to be another room's."""
    patch.setattr(Session, "end_offer", lambda self, room, blocks: None)


def growth_into_the_last_block(patch: Patch) -> None:
    def refill(self: LanguageRoom, blocks: tuple[int, ...]) -> tuple[int, ...]:
        blocks = original(self, blocks)
        if self._shared.pool.free == 1 and self.needed_blocks() > len(blocks):
            return blocks + self._shared.pool.lease(1, self.room)
        return blocks

    original = LanguageRoom._refill
    patch.setattr(LanguageRoom, "_refill", refill)


def last_come_first_served(patch: Patch) -> None:
    def serve_queue(self: LanguageSide, now: float) -> list[LanguageEffect]:
        newest_first = dict(reversed(self._shared.queue.items()))
        self._shared.queue.clear()
        self._shared.queue.update(newest_first)
        return original(self, now)

    original = LanguageSide._serve_queue
    patch.setattr(LanguageSide, "_serve_queue", serve_queue)


def ended_room_left_in_the_table_of_its_peer(patch: Patch) -> None:
    patch.setattr(Peers, "end", lambda self, peer, room: None)


def no_deadline_for_a_room_that_stands_still(patch: Patch) -> None:
    def tick(self: EncodeSide, now: float) -> list[EncodeEffect]:
        return [effect for effect in original(self, now) if not isinstance(effect, StatusChanged)]

    original = EncodeSide.tick
    patch.setattr(EncodeSide, "tick", tick)


def finished_rank_must_keep_talking(patch: Patch) -> None:
    """The silence of a rank that has all its rows ends the room of the others."""

    def report_chunk(self: EncodeRoom, now: float) -> list[EncodeEffect]:
        ranks = [destination.session_id for destination in self.unfinished]
        effects = original(self, now)
        for rank in ranks:
            session = self._shared.sessions.get(rank)
            if session is not None and not self.is_over:
                session.rooms.add(self.room)
        return effects

    original = EncodeRoom._report_chunk
    patch.setattr(EncodeRoom, "_report_chunk", report_chunk)


def next_room_begins_while_those_of_a_dead_session_end(patch: Patch) -> None:
    """The blocks of the first go to the second, whose rows then go to the process that came after."""

    def fail_rooms_of(self: EncodeShared, session: Session, text: str, now: float) -> list[EncodeEffect]:
        effects: list[EncodeEffect] = []
        for room in sorted(session.rooms):
            if not self.rooms[room].is_over:
                effects += self.rooms[room].fail(Failure(502, text), now)
            while self.queue and self.pool.free:
                effects += next(iter(self.queue.values())).begin()
        return effects

    patch.setattr(EncodeShared, "fail_rooms_of", fail_rooms_of)


def second_registration_believed_without_proof(patch: Patch) -> None:
    def contest(self: Admission, known: Session, message: Register) -> list[EncodeEffect]:
        original(self, known, message)
        return self.proven(message.session_id, known.register.address, True, known.heard)

    original = Admission._contest
    patch.setattr(Admission, "_contest", contest)


def abort_of_a_stranger_accepted(patch: Patch) -> None:
    def abort(self: EncodeSide, message: Abort, now: float) -> list[EncodeEffect]:
        room = self._rooms.get(message.room)
        if room is None or message.session_id in room.destinations or room.is_over:
            return original(self, message, now)
        return room.fail(Failure(499, "gone"), now)

    original = EncodeSide._abort
    patch.setattr(EncodeSide, "_abort", abort)


def offer_alone_claims_its_blocks(patch: Patch) -> None:
    """Anybody can then take the blocks of a session away from its real rooms, without knowing any of them."""

    def take_offer(self: EncodeSide, info: TransferEmbeddingInfo, session: Session | None, now: float) -> Any:
        if session is not None and session.flaw(info) is None and self._shared.ended.get(info.room) is None:
            session.claim(info.room, info.dst_embedding_indices)
        return original(self, info, session, now)

    original = EncodeSide._take_offer
    patch.setattr(EncodeSide, "_take_offer", take_offer)


def only_the_first_block_of_an_offer_claimed(patch: Patch) -> None:
    def claim(self: Session, room: int, blocks: tuple[int, ...]) -> Failure | None:
        return original(self, room, blocks[:1])

    original = Session.claim
    patch.setattr(Session, "claim", claim)


def proof_taken_for_proof_about_whoever_has_the_session_now(patch: Patch) -> None:
    def proven(self: Admission, session_id: str, address: Any, is_gone: bool, now: float) -> list[EncodeEffect]:
        known = self._sessions.get(session_id)
        return original(self, session_id, known.register.address if known else address, is_gone, now)

    original = Admission.proven
    patch.setattr(Admission, "proven", proven)


def answer_sent_to_an_address_that_a_stranger_chose(patch: Patch) -> None:
    """The stranger asks for a room that has its ranks, and one of those is told that the room has failed."""
    patch.setattr(EncodeRoom, "has_destination_at", lambda self, address: False)


def acknowledgement_sent_to_an_address_that_a_stranger_chose(patch: Patch) -> None:
    """Nothing can land at the stranger's session; but another rank is told so, where something still can."""

    def must_wait(self: Sessions, session_id: str, room: int, address: Any) -> bool:
        own = self._unquiet.get(session_id, {}).get(room)
        if own is not None:
            own.was_asked_about = True
        return own is not None

    patch.setattr(Sessions, "must_wait", must_wait)


def invented_rooms_without_bound(patch: Patch) -> None:
    patch.setattr(UnexpectedRooms, "one_too_many", lambda self: None)


def rooms_that_are_only_promised_for_without_bound(patch: Patch) -> None:
    def take_have(self: EncodeRoom, message: Have, session: Session, now: float) -> list[EncodeEffect]:
        was_known = self.asked or self.expected
        effects = original(self, message, session, now)
        if not was_known:
            self._shared.unexpected.discard(self.room)
        return effects

    original = EncodeRoom.take_have
    patch.setattr(EncodeRoom, "take_have", take_have)


def sessions_without_bound(patch: Patch) -> None:
    patch.setattr(Admission, "_make_space", lambda self, session_id: [])


def block_indices_not_checked(patch: Patch) -> None:
    patch.setattr(Session, "flaw", lambda self, info: None)


def first_message_never_sent(patch: Patch) -> None:
    patch.setattr(LanguageSide, "_announce", lambda self, peer, now: [])


def first_message_without_a_deadline(patch: Patch) -> None:
    def expect(self: EncodeRoom, now: float, items: Any = ()) -> list[EncodeEffect]:
        self.asked, asked = True, self.asked
        effects = original(self, now, items)
        self.asked = asked
        return effects

    original = EncodeRoom.expect
    patch.setattr(EncodeRoom, "expect", expect)


def queued_room_not_bound_to_its_session(patch: Patch) -> None:
    def note_queued(self: EncodeRoom, message: Queued, session: Session, now: float) -> None:
        original(self, message, session, now)
        session.rooms.discard(self.room)

    original = EncodeRoom.note_queued
    patch.setattr(EncodeRoom, "note_queued", note_queued)


def queued_room_left_in_the_table_of_its_session(patch: Patch) -> None:
    patch.setattr(EncodeRoom, "_unbind_others", lambda self: self.queued.clear())


def no_pings_for_rooms_that_are_queued(patch: Patch) -> None:
    patch.setattr(Peer, "is_checked", property(lambda self: bool(self.under_way)))


def offer_never_repeated(patch: Patch) -> None:
    patch.setattr(LanguageRoom, "_repeat", lambda self, now: [])


def repeated_offer_not_answered(patch: Patch) -> None:
    patch.setattr(Destination, "has_answered", lambda self, info: False)


def success_not_reported_again(patch: Patch) -> None:
    def succeed(self: EndedRooms, room: int, now: float, rows: int, answered: Any = None) -> None:
        original(self, room, now, rows)

    original = EndedRooms.succeed
    patch.setattr(EndedRooms, "succeed", succeed)


def end_of_a_queued_room_told_once(patch: Patch) -> None:
    def tell(self: LanguageRoom, address: Any, now: float) -> list[LanguageEffect]:
        effects = original(self, address, now)
        self._forget()
        return effects

    original = LanguageRoom.tell
    patch.setattr(LanguageRoom, "tell", tell)


def report_about_a_failed_room_not_repeated(patch: Patch) -> None:
    """Whoever asks for a room that is over hears nothing."""
    patch.setattr(EncodeSide, "_answer_for_ended", lambda self, message, ending: [])


def one_peer_may_have_everything(patch: Patch) -> None:
    """Blocks of failed rooms are not counted: when its data plane dies, one room after the other takes its blocks."""

    def left(self: PeerShare, peer: Peer) -> int:
        return 1000

    patch.setattr(PeerShare, "left", left)


def peer_trusted_before_it_has_delivered_anything(patch: Patch) -> None:
    def for_new_room(self: Peers, name: str, now: float) -> Peer:
        peer = original(self, name, now)
        peer.is_proven = True
        return peer

    original = Peers.for_new_room
    patch.setattr(Peers, "for_new_room", for_new_room)


def rooms_that_are_held_back_hold_up_those_behind_them(patch: Patch) -> None:
    def serve_queue(self: LanguageSide, now: float) -> list[LanguageEffect]:
        shared, later = self._shared, {}
        for number, room in list(shared.queue.items()):
            if later or (room.peer.address is not None and not shared.share.left(room.peer)):
                later[number] = shared.queue.pop(number)
        effects = original(self, now)
        shared.queue.update(later)
        return effects

    original = LanguageSide._serve_queue
    patch.setattr(LanguageSide, "_serve_queue", serve_queue)
    patch.setattr(LanguageShared, "servable", property(lambda self: len(self.queue)))


def equal_keys_for_different_rows(patch: Patch) -> None:
    """The key leaves out whose picture it is."""
    key = Picture.key.fget
    assert key is not None
    patch.setattr(Picture, "key", property(lambda self: key(dataclasses.replace(self, tenant=0))))


def promise_taken_back(patch: Patch) -> None:
    """Only what is new is said, and what is said last counts."""

    def promise(self: PromptItems, session_id: str, keys: Iterable[str]) -> int:
        self._promised.pop(session_id, None)
        return original(self, session_id, keys)

    def say_promised(self: LanguageRoom) -> list[LanguageEffect]:
        effects = say(self)
        said = self.__dict__.setdefault("said", set())
        for index, effect in enumerate(effects):
            if isinstance(effect, Send) and isinstance(effect.message, Have):
                news = tuple(key for key in effect.message.keys if key not in said)
                said.update(news)
                effects[index] = _replaced(effect, message=_replaced(effect.message, keys=news or ("0" * 32,)))
        return effects

    original, say = PromptItems.promise, LanguageRoom._say_promised
    patch.setattr(PromptItems, "promise", promise)
    patch.setattr(LanguageRoom, "_say_promised", say_promised)


def item_left_out_that_another_rank_has_promised(patch: Patch) -> None:
    def leave_out(self: PromptItems, session_id: str, decided: Any, start: int, stop: int) -> Any:
        everybody = set().union(*self._promised.values())
        self._promised = dict.fromkeys([*self._promised, session_id], everybody)
        return original(self, session_id, decided, start, stop)

    original = PromptItems.leave_out
    patch.setattr(PromptItems, "leave_out", leave_out)


def item_not_made_that_one_rank_of_two_has_promised(patch: Patch) -> None:
    def newly_held_by_all(self: PromptItems, destinations: dict[str, Any]) -> tuple[int, ...]:
        first = dict(list(destinations.items())[:1])
        return original(self, first)

    original = PromptItems.newly_held_by_all
    patch.setattr(PromptItems, "newly_held_by_all", newly_held_by_all)


def item_decided_twice(patch: Patch) -> None:
    """A promise that comes late counts for the rest of an item of which rows are written."""

    def leave_out(self: PromptItems, session_id: str, decided: Any, start: int, stop: int) -> Any:
        for index in [index for index, is_left_out in decided.items() if not is_left_out]:
            del decided[index]
        return original(self, session_id, decided, start, stop)

    original = PromptItems.leave_out
    patch.setattr(PromptItems, "leave_out", leave_out)


def left_out_in_the_first_step_only(patch: Patch) -> None:
    """As if an item could not go on in a later step."""

    def leave_out(self: PromptItems, session_id: str, decided: Any, start: int, stop: int) -> Any:
        return original(self, session_id, decided, start, stop) if start == 0 else ()

    original = PromptItems.leave_out
    patch.setattr(PromptItems, "leave_out", leave_out)


def held_items_named_in_the_first_report_only(patch: Patch) -> None:
    def report(self: EncodeRoom, destination: Destination) -> StatusReport:
        whole = original(self, destination)
        told = self.__dict__.setdefault("told", set())
        held = tuple(item for item in whole.held if (destination.session_id, item) not in told)
        told.update((destination.session_id, item) for item in whole.held)
        return _replaced(whole, held=held)

    original = EncodeRoom.report
    patch.setattr(EncodeRoom, "report", report)


def held_items_forgotten_with_the_room(patch: Patch) -> None:
    """The report is repeated after the end of the room, without them."""

    def succeed(self: EndedRooms, room: int, now: float, rows: int, answered: Any = None) -> None:
        original(self, room, now, rows, dict.fromkeys(answered or (), ()))

    original = EndedRooms.succeed
    patch.setattr(EndedRooms, "succeed", succeed)


def rows_sent_that_are_not_made(patch: Patch) -> None:
    patch.setattr(EncodeRoom, "_reach", lambda self, destination: destination.goal(self._known_total()))

    def begin_step(self: EncodeRoom) -> list[EncodeEffect]:
        self.ready = self._known_total()
        return original(self)

    original = EncodeRoom.begin_step
    patch.setattr(EncodeRoom, "begin_step", begin_step)


def chunk_reported_when_what_is_made_is_written(patch: Patch) -> None:
    """The offer counts as used up, and more rows were said to be there than are."""
    patch.setattr(EncodeRoom, "_waits_for_rows", property(lambda self: False))


def rows_of_a_later_step_not_sent(patch: Patch) -> None:
    patch.setattr(EncodeRoom, "more_rows", lambda self, ready, absent, now: [])


def pin_released_with_the_first_copy(patch: Patch) -> None:
    """And other rows take the place of what it has released, at once."""

    def copy(self: LanguageNode, index: int = 0) -> None:
        room = self.copies[index].room
        original(self, index)
        for key in self.kept.pinned.pop(room, ()):
            self.kept._rows.pop(key, None)

    original = LanguageNode.copy
    patch.setattr(LanguageNode, "copy", copy)


def rows_copied_ahead_although_some_are_held(patch: Patch) -> None:
    def take_progress(self: LanguageRoom, progress: Progress) -> list[LanguageEffect]:
        promised, self.promised = self.promised, {}
        effects = original(self, progress)
        self.promised = promised
        return effects

    original = LanguageRoom.take_progress
    patch.setattr(LanguageRoom, "take_progress", take_progress)


def held_items_of_the_first_report_used_for_all(patch: Patch) -> None:
    """Those of the report that came first are taken for those of the room."""

    def copy_out(self: LanguageRoom, report: StatusReport) -> CopyOut:
        held = self.__dict__.setdefault("held", report.held)
        return original(self, _replaced(report, held=held))

    original = LanguageRoom._copy_out
    patch.setattr(LanguageRoom, "_copy_out", copy_out)


def rooms_of_a_peer_that_delivers_nothing_wait_for_their_deadline(patch: Patch) -> None:
    patch.setattr(LanguageSide, "_fail_for_lost_blocks", lambda self, now: [])


def the_step_behind_not_waited_for(patch: Patch) -> None:
    """A room that has failed is closed when the write that failed is back."""

    def transferred(self: EncodeRoom, transfer_id: int, *arguments: Any) -> list[EncodeEffect]:
        if self.under_way is None:
            return []
        if self.is_over or arguments[0]:
            self.next_step = None
        return original(self, transfer_id, *arguments)

    original = EncodeRoom.transferred
    patch.setattr(EncodeRoom, "transferred", transferred)
    side = EncodeSide.transferred
    patch.setattr(
        EncodeSide, "transferred", lambda self, room, *rest: side(self, room, *rest) if room in self._rooms else []
    )


def the_step_behind_begins_before_the_rows_are_there(patch: Patch) -> None:
    """Beyond the window that is staged, into which nobody has put these rows."""

    def begin_next_step(self: EncodeRoom) -> list[EncodeEffect]:
        first, stop = self._staged
        self._staged = first, self.total or stop
        effects = original(self)
        self._staged = first, stop
        return effects

    original = EncodeRoom._begin_next_step
    patch.setattr(EncodeRoom, "_begin_next_step", begin_next_step)


def _change_steps(patch: Patch, change: Callable[[TransferEmbeddingChunk, int], TransferEmbeddingChunk]) -> None:
    """Every step of a chunk is another one than the room has planned."""

    def begin_step(self: EncodeRoom) -> list[EncodeEffect]:
        effects = original(self)
        if self.under_way is None or not effects:
            return effects
        self.under_way = change(self.under_way, self._shared.block_size)
        return [self.under_way]

    original = EncodeRoom.begin_step
    patch.setattr(EncodeRoom, "begin_step", begin_step)


def _replaced(struct: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(struct, **changes)


def _without_aux(destination: Any) -> Any:
    return _replaced(destination, with_aux=False)


# ---- the search


@dataclasses.dataclass(frozen=True)
class Planted:
    fault: Callable[[Patch], None]
    schedules: Callable[..., World]
    invariants: tuple[str, ...]
    """Which of them it must be caught by; `refused`: our own table or allocator raised."""


def attack(seed: int) -> World:
    return run_attack(Seeded(seed)).world


def attack_with_faults(seed: int) -> World:
    return run_attack_with_faults(Seeded(seed)).world


# One rank has everything long before the other, and then nothing more to say.
lopsided = functools.partial(run_slow, busy=0.05, shape=Shape(1, 6, (5, 1), (20, 1), 1))


def forged_offers(seed: int) -> World:
    """Requests of a stranger are offered blocks in the name of the only language rank."""
    rng = random.Random(seed)
    attacked = AttackedWorld(Seeded(seed), Shape(1, 4, (4,), (3,), 1), knows_all=True)
    attacked.schedule.warm_up()
    rank = attacked.world.languages[0]
    for _ in range(40):
        attacked.start()
        attacked.start_own()
        blocks = tuple(rng.sample(range(4), 2))
        offer = TransferEmbeddingInfo(
            attacked.own_rooms[-1], rank.address.host, rank.address.port, rank.plane.session_id, blocks, 1, 0, 2
        )
        attacked.attack_encode(codec.encode(offer))
        for _ in range(4):
            attacked.go_on()
    attacked.finish()
    return attacked.world


def misdirected_aborts(seed: int) -> World:
    """Writes fail and land late, and a stranger asks for the acknowledgement to be sent to a rank of the room."""
    rng = random.Random(seed)
    attacked = AttackedWorld(Seeded(seed), Shape(1, 4, (4, 4), (3, 3), 1))
    attacked.schedule.warm_up()
    for _ in range(20):
        attacked.start()
        attacked.schedule.spoil_write(rng.randrange(2), LANDS_LATE)
        for _ in range(12):
            attacked.go_on()
        room, rank = rng.choice(list(attacked.world.truths)[-3:]), rng.choice(attacked.world.languages)
        attacked.attack_encode(codec.encode(Abort(room, rank.address, "stranger-1:1")))
        if rng.random() < 0.5:
            attacked.schedule.land_late()
    attacked.finish()
    return attacked.world


# Every lookup takes its time, and two ranks have few blocks.
lookups = functools.partial(
    run_orderly, warm=0.0, shape=lambda rng: Shape(2, 4, (rng.randint(1, 2), rng.randint(1, 2)), (3, 3), 2)
)
restarts = functools.partial(run_chaos, focus=("replace encode", "pass time"))

replacements = functools.partial(run_chaos, focus=("replace language",))
# A session that is not busy makes way for the next, and two ranks want the only place.
few_sessions = functools.partial(
    run_chaos,
    focus=("replace language", "pass time"),
    shape=lambda rng: Shape(2, 4, (rng.randint(1, 5), rng.randint(1, 5)), (3, 3), 1),
    timing=msgspec.structs.replace(TIMING, max_sessions=1),
)


# Every room takes many rounds, with rows that are kept.
def keeping(rng: random.Random) -> Shape:
    return Shape(rng.randint(1, 3), 4, (rng.randint(1, 3),), (3,), 1, keeps_rows=True)


keeping_rows = functools.partial(run_orderly, shape=keeping)
keeping_rows_with_losses = functools.partial(run_offers_and_reports_lost, shape=keeping)

# Rooms that are one offer ahead, whose writes fail and land late.
late_writes = functools.partial(run_chaos, focus=("write late", "land late"), shape=Shape.wide)

FAULTS = [
    Planted(allocate_before_release, run_orderly, ("L1",)),
    Planted(status_reset_on_resume_at_language, run_orderly, ("S4",)),
    Planted(status_reset_on_resume_at_encode, run_orderly, ("S4",)),
    Planted(is_last_from_the_default, run_orderly, ("L1", "S1", "refused")),
    Planted(repeated_first_send_accepted, run_orderly, ("L1", "S1", "S2", "S3", "refused")),
    Planted(repeated_resume_accepted, run_orderly, ("L1", "S1", "S3", "refused")),
    Planted(offer_ahead_accepted_at_a_wrong_row, run_orderly, ("L1", "S1", "S2", "S3", "refused")),
    Planted(blocks_offered_again_before_they_are_copied_out, run_orderly, ("S1",)),
    Planted(only_the_first_of_two_offers_repeated, run_offers_and_reports_lost, ("L1",)),
    Planted(only_the_blocks_of_the_first_offer_quarantined, late_writes, ("S2", "S3")),
    Planted(cleanup_at_transferring, run_orderly, ("L1", "refused")),
    Planted(progress_reported_before_it_is_made, run_orderly, ("S1",)),
    Planted(progress_of_a_used_up_offer_believed, run_chaos, ("S1",)),
    Planted(blocks_freed_when_a_write_failed, run_chaos, ("S2", "S3")),
    Planted(abort_acknowledged_after_a_failed_write, run_chaos, ("S3",)),
    Planted(abort_acknowledged_during_a_write, run_chaos, ("S3",)),
    Planted(new_process_at_the_old_address_taken_for_proof, restarts, ("S3",)),
    Planted(one_offer_taken_for_all_ranks, run_orderly, ("L1", "S1", "S3", "refused")),
    Planted(no_block_left_for_rooms_that_are_looked_up, lookups, ("L1",)),
    Planted(status_advanced_by_max, run_chaos, ("S4", "L3", "S5", "refused")),
    Planted(aux_left_out_when_there_are_two_ranks, run_orderly, ("L1", "S1", "refused")),
    Planted(resumed_rows_put_at_the_wrong_place, run_orderly, ("S1",)),
    Planted(window_not_staged_again, run_orderly, ("S1",)),
    Planted(used_up_offers_kept, run_orderly, ("L1",)),
    Planted(growth_into_the_last_block, run_orderly, ("L2",)),
    Planted(last_come_first_served, run_orderly, ("L1", "L2")),
    Planted(ended_room_left_in_the_table_of_its_peer, run_orderly, ("S5", "refused")),
    Planted(finished_rank_must_keep_talking, lopsided, ("L1",)),
    Planted(first_message_never_sent, run_slow, ("L1",)),
    Planted(first_message_without_a_deadline, run_one_side_dies, ("L3",)),
    Planted(queued_room_not_bound_to_its_session, run_one_side_dies, ("L3",)),
    Planted(queued_room_left_in_the_table_of_its_session, run_one_side_dies, ("S5", "refused")),
    Planted(no_pings_for_rooms_that_are_queued, run_slow, ("L1",)),
    Planted(no_pings_for_rooms_that_are_queued, run_one_side_dies, ("L3",)),
    Planted(offer_never_repeated, run_lossy, ("L3",)),
    Planted(repeated_offer_not_answered, run_lossy, ("L3",)),
    Planted(repeated_offer_not_answered, run_offers_and_reports_lost, ("L1",)),
    Planted(success_not_reported_again, run_offers_and_reports_lost, ("L1",)),
    Planted(end_of_a_queued_room_told_once, run_lossy, ("L3",)),
    Planted(report_about_a_failed_room_not_repeated, run_lossy, ("L3",)),
    Planted(one_peer_may_have_everything, run_one_data_plane_dies, ("share", "L1")),
    Planted(peer_trusted_before_it_has_delivered_anything, run_one_data_plane_dies, ("share",)),
    Planted(rooms_that_are_held_back_hold_up_those_behind_them, run_one_data_plane_dies, ("L1",)),
    Planted(rooms_of_a_peer_that_delivers_nothing_wait_for_their_deadline, run_one_data_plane_dies, ("L3",)),
    Planted(equal_keys_for_different_rows, run_orderly, ("S1",)),
    Planted(promise_taken_back, run_orderly, ("S1", "held", "refused")),
    Planted(item_left_out_that_another_rank_has_promised, run_orderly, ("L1",)),
    Planted(item_not_made_that_one_rank_of_two_has_promised, run_orderly, ("S1",)),
    Planted(item_decided_twice, run_orderly, ("held",)),
    Planted(left_out_in_the_first_step_only, run_orderly, ("held", "S1")),
    Planted(held_items_named_in_the_first_report_only, run_orderly, ("held", "S1")),
    Planted(held_items_forgotten_with_the_room, keeping_rows_with_losses, ("held", "S1")),
    Planted(rows_sent_that_are_not_made, run_orderly, ("S1",)),
    Planted(chunk_reported_when_what_is_made_is_written, run_orderly, ("held", "S1", "L1")),
    Planted(rows_of_a_later_step_not_sent, run_orderly, ("L1",)),
    Planted(pin_released_with_the_first_copy, keeping_rows, ("held",)),
    Planted(rows_copied_ahead_although_some_are_held, run_orderly, ("S1",)),
    Planted(held_items_of_the_first_report_used_for_all, run_orderly, ("S1",)),
    Planted(the_step_behind_not_waited_for, late_writes, ("rows", "S3", "refused")),
    Planted(the_step_behind_begins_before_the_rows_are_there, run_orderly, ("S1", "refused")),
    Planted(no_deadline_for_a_room_that_stands_still, run_chaos, ("L3",)),
    Planted(next_room_begins_while_those_of_a_dead_session_end, replacements, ("S3",)),
    Planted(second_registration_believed_without_proof, attack, ("attack",)),
    Planted(abort_of_a_stranger_accepted, attack, ("attack",)),
    Planted(offer_alone_claims_its_blocks, attack, ("attack",)),
    Planted(only_the_first_block_of_an_offer_claimed, forged_offers, ("S2",)),
    Planted(proof_taken_for_proof_about_whoever_has_the_session_now, few_sessions, ("session",)),
    Planted(answer_sent_to_an_address_that_a_stranger_chose, attack, ("attack",)),
    Planted(acknowledgement_sent_to_an_address_that_a_stranger_chose, misdirected_aborts, ("S3",)),
    Planted(invented_rooms_without_bound, attack_with_faults, ("bounds",)),
    Planted(rooms_that_are_only_promised_for_without_bound, attack_with_faults, ("bounds",)),
    Planted(sessions_without_bound, attack_with_faults, ("bounds",)),
    Planted(block_indices_not_checked, attack_with_faults, ("S3", "bounds", "refused")),
]

ENOUGH = 3000


def first_catch(schedules: Callable[..., World]) -> tuple[int, str]:
    """The first seed whose schedule goes wrong, and what was seen."""
    for seed in range(ENOUGH):
        try:
            schedules(seed)
        except Violation as violation:
            return seed, str(violation).split(":", 1)[0]
        except (LocalError, KeyError):
            return seed, "refused"
    pytest.fail(f"{ENOUGH} schedules noticed nothing")


@pytest.mark.parametrize("planted", FAULTS, ids=lambda planted: planted.fault.__name__)
def test_a_planted_fault_is_caught(planted: Planted, monkeypatch: Patch) -> None:
    planted.fault(monkeypatch)
    seed, seen = first_catch(planted.schedules)
    print(f"{planted.fault.__name__}: caught as {seen} at seed {seed}")
    assert seen in planted.invariants, f"seed {seed} was caught as {seen}"
