"""The language half in the scheduler: park a request until its rows are here, then hand it over as if it were local."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

import msgspec

from embedding_relay import recorder
from embedding_relay.memory.buffers import ReceivedRows
from embedding_relay.protocol.errors import BAD_REQUEST, CLIENT_GONE, INTERNAL, Failure
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status, is_final
from embedding_relay.registry.entry import name_of_rank
from embedding_relay.transport.ranks import Agreement, Reporter, Reports, RoomEnded, Unhealthy
from sglang.srt.disaggregation.mooncake.conn_multimodal import (
    BorrowingManager,
    LanguageManager,
    MooncakeEmbeddingReceiver,
)
from sglang.srt.disaggregation.multimodal import compatibility, media, modes, request_notes, tracing
from sglang.srt.disaggregation.multimodal.front import Refusal, prompt_ids_message, reason_of
from sglang.srt.disaggregation.multimodal.prefix import Prefix, PrefixPrefill, why_not
from sglang.srt.disaggregation.multimodal.request_notes import EncodeHalf, encode_half
from sglang.srt.disaggregation.multimodal.roles import Decisions, Role, aborted

logger = logging.getLogger(__name__)

_MOST_LOST: Final = 256

AnyLanguageManager = LanguageManager | BorrowingManager


class MultimodalLanguageRequest:
    """One room: its end of the transfer, and everyone who waits for its rows.

    With `n > 1` SGLang asks `n + 1` times for one room, first once to fill the prefix cache. The rows are received
    once, by the first, and kept until the last has had them. So is a failure: a stream asks on after it.
    By its number all ranks of this instance know it, however often the room's is used.
    """

    def __init__(self, receiver: MooncakeEmbeddingReceiver, number: int) -> None:
        self.receiver = receiver
        self.number = number
        self.is_decided = False
        """The room has ended on every rank, or need not."""
        self.failure: Failure | None = None
        self.uses_left = 1
        self.waiting: list[Any] = []
        self.over_since = 0.0
        self.prefix: Prefix | None = None
        """What SGLang was given of the prompt before all its rows were here."""
        self.prefilled = 0
        """Rows that were in a prefix."""


class MultimodalLanguagePreallocQueue:
    """Rooms that have no receive blocks yet; the manager serves them in order, those with few items apart."""

    def __init__(
        self, manager: AnyLanguageManager, on_end: Callable[[int, Failure | None], None] | None = None
    ) -> None:
        """`on_end` is called, in another thread, with the number of a room that has ended on this rank."""
        self.manager = manager
        self.queue: dict[int, MultimodalLanguageRequest] = {}
        self._on_end = on_end
        self._numbers = itertools.count()

    @property
    def default_allocate_tokens(self) -> int | None:
        """How many rows the manager reserves blocks for at first; None learns it from recent requests."""
        return self.manager.config.default_allocate_tokens

    def add(self, recv_req: Any, half: EncodeHalf) -> MultimodalLanguageRequest:
        room = half.room
        number = next(self._numbers)
        note = request_notes.read(recv_req)
        receiver = MooncakeEmbeddingReceiver(self.manager, peer_of(half), room, number, note.sources, note.items)
        request = MultimodalLanguageRequest(receiver, number)
        if self._on_end is not None:
            receiver.on_end = functools.partial(self._on_end, request.number)
        request.uses_left = uses_of_room(recv_req)
        request.waiting.append(recv_req)
        self.queue[room] = request
        receiver.start()
        return request

    def decline(self, peer: str, room: int, failure: Failure) -> None:
        """The other half of the request is told that nobody wants its rows."""
        receiver = MooncakeEmbeddingReceiver(self.manager, peer, room)
        receiver.start()
        receiver.abort(failure)

    def pop_preallocated(self) -> dict[int, MultimodalLanguageRequest]:
        """Rooms whose blocks are reserved and announced to the encode side, and those that failed before."""
        moved = {
            room: request for room, request in self.queue.items() if request.receiver.poll() is not Status.BOOTSTRAPPING
        }
        for room in moved:
            del self.queue[room]
        return moved


class MultimodalLanguageTransferQueue:
    """Rooms whose rows are on their way. Copying out and resuming happen in the manager, beside the scheduler."""

    def __init__(self) -> None:
        self.queue: dict[int, MultimodalLanguageRequest] = {}

    def extend(self, rooms: dict[int, MultimodalLanguageRequest]) -> None:
        self.queue.update(rooms)

    def pop_transferred(
        self, *, failed_only: bool = False, stays: Callable[[MultimodalLanguageRequest], bool] | None = None
    ) -> dict[int, MultimodalLanguageRequest]:
        """Rooms that have ended on every rank, in the order in which that was decided; but for those that stay."""
        moved = {
            room: request
            for room, request in self.queue.items()
            if request.is_decided
            and (request.failure is not None or not failed_only)
            and not (stays is not None and stays(request))
        }
        for room in moved:
            del self.queue[room]
        return moved


class LanguageRole(Role[AnyLanguageManager]):
    mode = modes.LANGUAGE

    def __init__(
        self,
        scheduler: Any,
        manager: AnyLanguageManager,
        *,
        ranks: int = 1,
        reports: Reports | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        """Of `ranks` ranks that have the same requests the first has `reports` of the others, and they a `reporter`."""
        super().__init__(scheduler, manager, is_first=reporter is None)
        self.prealloc_queue = MultimodalLanguagePreallocQueue(manager, self._report if reporter else None)
        self.transfer_queue = MultimodalLanguageTransferQueue()
        self.shared: dict[int, MultimodalLanguageRequest] = {}
        self.lost: dict[int, Failure] = {}
        """Rooms whose rows will not come, and whose request has not come either: the news was faster."""
        self.keep_shared_s = manager.config.waiting_timeout
        self.agreement = Agreement(ranks, manager.config.waiting_timeout)
        self.reports = reports
        self.reporter = reporter
        self._handing_over: int | None = None
        """The room whose rows SGLang is given at this moment."""
        self.prefixes = self._prefix_prefill(ranks)

    def _prefix_prefill(self, ranks: int) -> PrefixPrefill | None:
        if not self.manager.config.prefix_prefill or self.reporter is not None:
            return None
        if (reason := why_not(self.scheduler, ranks)) is not None:
            logger.info("relay: no prompt is begun before all its rows are here: %s", reason)
            return None
        return PrefixPrefill(self.scheduler, self.manager.limits, self.recorder, self.manager.observer)

    def start(self) -> None:
        if self.reporter is not None:
            self.reporter.start()
            self.manager.on_unhealthy = lambda reason: self._say(Unhealthy(reason))
        super().start()
        for socket in self.reports.sockets if self.reports else ():
            self.wake_up_for(socket)

    def close(self) -> None:
        super().close()
        for end in (self.reports, self.reporter):
            if end is not None:
                end.close()

    def _report(self, number: int, failure: Failure | None) -> None:
        self._say(RoomEnded(number, failure))

    def _say(self, report: RoomEnded | Unhealthy) -> None:
        assert self.reporter is not None
        self.reporter.say(report)

    def take_over_remote(self, recv_req: Any) -> bool:
        if not recv_req.need_wait_for_mm_inputs:
            return False
        half = encode_half(recv_req)
        if half.host is None:
            self.answer_with_failure(recv_req, Failure(BAD_REQUEST, "the request names no bootstrap_host"))
        else:
            self._park(recv_req, msgspec.structs.replace(half, port=self._port(half.port)))
        return True

    def _park(self, recv_req: Any, half: EncodeHalf) -> None:
        room = half.room
        if (over := self.shared.pop(room, None)) is not None:
            over.waiting.append(recv_req)
            self.transfer_queue.extend({room: over})
        elif (parked := self._parked(room)) is not None:
            parked.waiting.append(recv_req)
        elif (failure := self.lost.pop(room, None) or self.reason_to_turn_away()) is not None:
            logger.warning("relay room=%d refused: %s", room, failure)
            self.prealloc_queue.decline(peer_of(half), room, failure)
            self.answer_with_failure(recv_req, failure)
        else:
            self.agreement.begin(self.prealloc_queue.add(recv_req, half).number)

    def _parked(self, room: int) -> MultimodalLanguageRequest | None:
        return self.transfer_queue.queue.get(room) or self.prealloc_queue.queue.get(room)

    def _port(self, port: int | None) -> int:
        return int(self.scheduler.server_args.disaggregation_bootstrap_port if port is None else port)

    # ---- which rooms have ended

    def decisions(self) -> Decisions:
        now = time.monotonic()
        if self._look():
            for request in (*self.prealloc_queue.queue.values(), *self.transfer_queue.queue.values()):
                if is_final(request.receiver.poll()):
                    self.agreement.hear(0, RoomEnded(request.number, request.receiver.failure()), now)
        for rank, report in self.reports.drain() if self.reports else ():
            if isinstance(report, RoomEnded):
                self.agreement.hear(rank, report, now)
            else:
                self.manager.report_unhealthy(f"rank {rank}: {report.reason}")
        return Decisions(
            self.manager.unhealthy_reason,
            self.manager.reachable(),
            ended=self.agreement.take_decided(now),
            forgotten=tuple(one.number for one in self.shared.values() if one.over_since <= now - self.keep_shared_s),
        )

    def _look(self) -> bool:
        """Whether a room has changed on this rank."""
        has_changed = bool(self.manager.drain_events())
        if has_changed:
            self.transfer_queue.extend(self.prealloc_queue.pop_preallocated())
        return has_changed

    def act_on(self, heard: Sequence[Decisions]) -> None:
        if not self.is_first:
            self._look()
        for decisions in heard:
            for number, failure in decisions.ended:
                self._end(number, failure)
            self._forget(decisions.forgotten)
        # In the order of the decisions, which is the same on every rank: so SGLang's queues are, too.
        transferred = self.transfer_queue.pop_transferred(failed_only=self.is_held(), stays=self._waits_for_prefix)
        for room, request in transferred.items():
            self._hand_over(room, request)
        if self.prefixes is not None and not self.is_held():
            self.prefixes.advance(self.transfer_queue.queue.values())

    def _waits_for_prefix(self, request: MultimodalLanguageRequest) -> bool:
        if self.prefixes is None:
            return False
        if request.failure is None and request.waiting:
            return self.prefixes.holds_up(request)
        self.prefixes.give_up(request)
        return False

    def _end(self, number: int, failure: Failure | None) -> None:
        for queue in (self.prealloc_queue.queue, self.transfer_queue.queue):
            for room, request in [(room, one) for room, one in queue.items() if one.number == number]:
                request.is_decided, request.failure = True, failure
                if failure is not None:
                    request.receiver.abort(failure)  # it may go on here
                del queue[room]
                self.transfer_queue.extend({room: request})  # behind all that were decided before

    def _hand_over(self, room: int, request: MultimodalLanguageRequest) -> None:
        if not request.waiting and not request.over_since:
            return  # nobody wants it any more
        if not request.over_since and request.failure is None:
            self.recorder.note(room, recorder.HANDED_OVER)
        request.over_since = request.over_since or time.monotonic()
        self.shared[room] = request
        for recv_req in request.waiting:
            self._use(request, recv_req)
        request.waiting.clear()

    def _use(self, request: MultimodalLanguageRequest, recv_req: Any) -> None:
        """From here on SGLang sees an ordinary request whose embeddings were computed beforehand."""
        room = encode_half(recv_req).room
        request.uses_left -= 1
        if request.uses_left == 0:
            self.shared.pop(room, None)
        if (failure := request.failure) is not None:
            self.answer_with_failure(recv_req, failure)
            return
        self._handing_over = room
        try:
            self._give_to_sglang(request.receiver.rows(), recv_req)
        except Exception as error:  # rows are checked when they come: a mistake of ours, for which one request pays
            logger.exception("relay room=%d could not be handed over", room)
            text = f"the rows of room {room} could not be handed over ({type(error).__name__})"
            self.answer_with_failure(recv_req, Failure(INTERNAL, text))
        finally:
            self._handing_over = None

    def note_created(self, req: Any) -> None:
        if self.prefixes is not None and self.prefixes.note_created(req):
            return
        if (room := self._handing_over) is not None:
            tracing.note_handed_over(self.recorder, room, req)
            tracing.emit_spans(self.recorder, self.mode, room, req)

    def _give_to_sglang(self, rows: ReceivedRows, recv_req: Any) -> None:
        """A copy: the message itself may still have to go to the next pipeline stage, which has rows of its own."""
        recv_req = copy.copy(recv_req)
        recv_req.input_ids, recv_req.mm_inputs = media.request_inputs(rows, self.manager.limits)
        media.limit_new_tokens(recv_req.sampling_params, rows, self.manager.limits)
        recv_req.need_wait_for_mm_inputs = False
        if request_notes.read(recv_req).wants_prompt_ids:
            message = prompt_ids_message(recv_req.rid, list(recv_req.input_ids))
            compatibility.send_abort(self.scheduler, message, recv_req)
        self.scheduler.handle_generate_request(recv_req)

    def _forget(self, numbers: Collection[int]) -> None:
        """Samples that never come (their client left between the first use and the others) must not keep rows."""
        if numbers:
            self.shared = {room: request for room, request in self.shared.items() if request.number not in numbers}

    def abort(self, recv_req: Any) -> None:
        gone = reason_of(recv_req) or Failure(CLIENT_GONE, "the request was aborted")
        for request in (*self.prealloc_queue.queue.values(), *self.transfer_queue.queue.values()):
            for waiting in [one for one in request.waiting if aborted(recv_req, one.rid)]:
                request.waiting.remove(waiting)
                self.answer_with_failure(waiting, gone)
            if not request.waiting:
                request.receiver.abort(gone)

    def lose(self, room: int, failure: Failure) -> None:
        if (request := self._parked(room)) is not None:
            request.receiver.abort(failure)
            for waiting in request.waiting:
                self.answer_with_failure(waiting, failure)
            request.waiting.clear()
        elif room not in self.shared:
            self.lost[room] = failure
            while len(self.lost) > _MOST_LOST:
                del self.lost[next(iter(self.lost))]

    def refuse(self, refusal: Refusal) -> None:
        if refusal.host is not None and self._parked(refusal.room) is None:
            peer = name_of_rank(Address(refusal.host, self._port(refusal.port)), refusal.encode_rank)
            self.prealloc_queue.decline(peer, refusal.room, refusal.failure)

    def forget_computed(self) -> None:
        """Rows that were received for earlier requests are not used again."""
        self.manager.forget_rows()

    def tables(self) -> dict[str, int]:
        rooms = (*self.prealloc_queue.queue.values(), *self.transfer_queue.queue.values())
        return {"parked": sum(len(room.waiting) for room in rooms), "shared": len(self.shared)}

    def is_idle(self) -> bool:
        return not (self.prealloc_queue.queue or self.transfer_queue.queue)

    def has_work(self) -> bool:
        """A room is over whose prompt had to wait for its prefix, and need not any more."""
        return not self.is_held() and any(request.is_decided for request in self.transfer_queue.queue.values())

    @contextlib.contextmanager
    def parked_requests_hold_nothing(self) -> Iterator[None]:
        if self.prefixes is not None:
            self.prefixes.take_back_all(self.transfer_queue.queue.values())
        with super().parked_requests_hold_nothing():
            yield


def peer_of(half: EncodeHalf) -> str:
    """The encode rank that makes the rows of a request."""
    assert half.host is not None
    assert half.port is not None
    return name_of_rank(Address(half.host, half.port), half.rank)


def uses_of_room(recv_req: Any) -> int:
    """How often SGLang will ask for this room: once, or once per sample and once before them all."""
    samples = int(recv_req.sampling_params.n)
    return 1 if samples == 1 else samples + 1
