"""The encode half in the scheduler: wait for the language side, run the vision tower, hand the rows to the transfer."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from embedding_relay import recorder
from embedding_relay.protocol.errors import (
    BAD_REQUEST,
    CLIENT_GONE,
    INTERNAL,
    Failure,
)
from embedding_relay.protocol.status import Status, is_final
from embedding_relay.transport.encode import NoTransfer
from sglang.srt.disaggregation.mooncake.conn_multimodal import EncodeManager, MooncakeEmbeddingSender
from sglang.srt.disaggregation.multimodal import compatibility, media, modes, request_notes, tracing
from sglang.srt.disaggregation.multimodal.admitting import encoded_message
from sglang.srt.disaggregation.multimodal.front import Refusal, reason_of
from sglang.srt.disaggregation.multimodal.item_keys import ItemKeys
from sglang.srt.disaggregation.multimodal.roles import Decisions, Part, Role, aborted, is_local
from sglang.srt.disaggregation.multimodal.tower import VisionTower
from sglang.srt.disaggregation.multimodal.turns import EncodeRequest, Turns

logger = logging.getLogger(__name__)


class MultimodalEmbeddingBootstrapQueue:
    """Requests whose language side has not offered blocks yet. No tower time is spent on them."""

    def __init__(self, keys: ItemKeys | None = None) -> None:
        """`keys`: by which a language rank knows the items whose rows it has; None where nobody asks."""
        self.keys = keys
        self.queue: list[EncodeRequest] = []

    def add(self, request: EncodeRequest) -> None:
        request.sender.init(media.manifest_items(request.req, self.keys) if self.keys is not None else ())
        self.queue.append(request)

    def bootstrapped(self) -> list[int]:
        """The numbers of those whose language side waits for rows, in order of arrival."""
        return [one.number for one in self.queue if one.sender.poll() is Status.WAITING_FOR_INPUT]

    def pop_bootstrapped(self, numbers: Collection[int]) -> list[EncodeRequest]:
        moved = [request for request in self.queue if request.number in numbers]
        self.queue = [request for request in self.queue if request.number not in numbers]
        return moved


class EncodeRole(Role[EncodeManager | NoTransfer]):
    mode = modes.ENCODE

    def __init__(
        self, scheduler: Any, manager: EncodeManager | NoTransfer, tower: VisionTower, keys: ItemKeys | None = None
    ) -> None:
        super().__init__(scheduler, manager, is_first=not isinstance(manager, NoTransfer))
        self.tower = tower
        self.bootstrap_queue = MultimodalEmbeddingBootstrapQueue(keys)
        self.turns = Turns(tower)
        self.inflight: list[EncodeRequest] = []
        self.before_reachable: list[Any] = []
        self._numbers = itertools.count()
        self.passed_on: Any = None
        """The request that SGLang is looking at."""
        self.not_queued: Any = None
        """What SGLang has made of it, until it queues that."""
        self.max_bytes_in_flight = manager.config.max_in_flight_mib * 2**20

    def take_over_remote(self, recv_req: Any) -> bool:
        if recv_req.bootstrap_room is None:
            text = f"Disaggregated request received without bootstrap room id. {recv_req.rid=}"
            self.answer_with_failure(recv_req, Failure(BAD_REQUEST, text))
            return True
        if recv_req.mm_inputs is not None and (failure := self.reason_to_turn_away()) is not None:
            logger.warning("relay-encode room=%d refused: %s", recv_req.bootstrap_room, failure)
            MooncakeEmbeddingSender(self.manager, recv_req.bootstrap_room).refuse(failure)
            self.answer_with_failure(recv_req, failure)
            return True
        # Not earlier: the server in front of us gives a client that asked for them their (empty) places.
        recv_req.return_logprob = False
        return False

    def pass_on(self, recv_req: Any, to_sglang: Callable[[], object]) -> None:
        """What SGLang neither queues nor keeps back for its grammar, it has refused, and told nobody but its client."""
        self.passed_on, self.not_queued = recv_req, None
        to_sglang()
        req, self.passed_on, self.not_queued = self.not_queued, None, None
        if req is None or is_local(req) or req in self.scheduler.grammar_manager.grammar_queue:
            return
        failure = _reason_in(req.finished_reason)
        logger.warning("relay-encode room=%d refused: %s", req.bootstrap_room, failure)
        MooncakeEmbeddingSender(self.manager, req.bootstrap_room).refuse(failure)

    def note_created(self, req: Any) -> None:
        self.not_queued = req
        # SGLang leaves them out where it has nothing but an error to queue.
        req.bootstrap_host, req.bootstrap_room = self.passed_on.bootstrap_host, self.passed_on.bootstrap_room

    def take_from_queue(self, req: Any) -> bool:
        self.not_queued = None
        if is_local(req) and not self.is_reachable:
            self.before_reachable.append(req)  # the warm-up request: SGLang's /health is red until it is answered
            return True
        if is_local(req) or (req.multimodal_inputs is None and req.to_finish is None):
            self._finish(req)
            return True
        sender = MooncakeEmbeddingSender(self.manager, req.bootstrap_room)
        failure = self._flaw(req)
        if failure is None:
            request = EncodeRequest(req, sender, next(self._numbers))
            self.bootstrap_queue.add(request)
            if self.passed_on is not None:  # it comes now, and not after SGLang has made its grammar
                self.turns.came(request, request_notes.read(self.passed_on).behind)
        else:
            sender.refuse(failure)
            self._finish(req, failure)
        return True

    def _flaw(self, req: Any) -> Failure | None:
        if req.to_finish is not None:
            return _reason_in(req.to_finish)
        if any(item.offsets is None for item in req.multimodal_inputs.mm_items):
            return Failure(INTERNAL, f"SGLang's processor for {self.tower.name} does not say which tokens are media")
        return None

    def decisions(self) -> Decisions:
        """One batch a turn: between two batches the scheduler reads its messages."""
        assert not isinstance(self.manager, NoTransfer)
        begun: list[int] = []
        ended: list[tuple[int, Failure | None]] = []
        if self.manager.drain_events():
            begun = self.bootstrap_queue.bootstrapped()
            ended = [(one.number, one.sender.failure()) for one in self._parked() if is_final(one.sender.poll())]
        over = {number for number, _ in ended}
        batch = self._next_batch([one for one in self.bootstrap_queue.queue if one.number in begun], over)
        return Decisions(self.manager.unhealthy_reason, self.manager.reachable(), tuple(begun), batch, tuple(ended))

    def _next_batch(self, others: Sequence[EncodeRequest] = (), over: Collection[int] = ()) -> tuple[Part, ...]:
        """The tower rests while slow readers have left too many rows here: they lie in the device's memory."""
        if self.is_held():
            return ()
        has_rows = [one for one in (*self.inflight, *self.turns.queue) if one.number not in over]
        may_begin = sum(one.bytes for one in has_rows) < self.max_bytes_in_flight
        return self.turns.next_batch(others, over, may_begin=may_begin)

    @property
    def longest_sleep_ms(self) -> int:
        left = self.turns.gathering.seconds_left() if self.turns.queue else 0.0
        return min(super().longest_sleep_ms, int(left * 1000) + 1) if left else super().longest_sleep_ms

    def _parked(self) -> list[EncodeRequest]:
        return [*self.bootstrap_queue.queue, *self.turns.queue, *self.inflight]

    def act_on(self, heard: Sequence[Decisions]) -> None:
        for decisions in heard:
            self.turns.add(self.bootstrap_queue.pop_bootstrapped(decisions.begun))
            for number, failure in decisions.ended:
                self._end(number, failure)
            if decisions.batch and not self.is_held():
                self._encode(decisions.batch)
        if self.before_reachable and self.is_reachable:
            waiting, self.before_reachable = self.before_reachable, []
            for req in waiting:
                self._finish(req)

    def _encode(self, parts: Sequence[Part]) -> None:
        work = self.turns.take(parts)
        if together := [(request, items) for request, items in work if items]:
            self._encode_together(together)
        for request, items in work:
            if not items:  # nobody needs anything of it that is not made yet
                self._encode_together([(request, items)])
        finished = self.turns.pop_finished()
        self.inflight += finished
        if self.is_first and self.manager.config.admission_mib != 0:
            for request in finished:  # whose pixels were counted by the HTTP process
                compatibility.send_abort(self.scheduler, encoded_message(request.sender.room), request.req)

    def _encode_together(self, work: Sequence[tuple[EncodeRequest, tuple[int, ...]]]) -> None:
        """Of each request these items, by their indexes."""
        began_at, computed = time.monotonic(), time.thread_time()
        for request, items in work:
            if items:
                self.recorder.note(request.sender.room, recorder.TOWER_BEGAN, began_at)
        rows = None
        try:
            for request, _ in work:
                request.wait_for_device()
            rows = self.tower.encode([[request.items[index] for index in items] for request, items in work])
            for (request, items), embeddings in zip(work, rows, strict=True):
                if items:
                    made = sum(map(len, embeddings))
                    self.recorder.note(request.sender.room, recorder.TOWER_ENDED, rows=made)
                request.take(items, embeddings)
            send_embedding_chunk([request for request, _ in work])
            if any(items for _, items in work):
                took = time.monotonic() - began_at
                self.turns.passed([request for request, _ in work], took, time.thread_time() - computed)
            self.manager.observer.encoded(self.tower.totals)
        except Exception:  # the tower runs model code on a user's pixels: the batch fails, not the instance
            rooms = [request.sender.room for request, _ in work]
            logger.exception("the vision tower failed on rooms %s", rooms)
            if rows is None and len(work) > 1 and self.tower.device == "cpu":  # only what fails alone fails
                for one in work:
                    self._encode_together([one])
                return
            for request, items in work:
                request.fail(items, asks_for_more=not self.is_first)
                request.sender.refuse(
                    Failure(INTERNAL, "the vision tower failed: the log of the encode instance says why")
                )

    def _end(self, number: int, failure: Failure | None) -> None:
        for queue in (self.bootstrap_queue.queue, self.turns.queue, self.inflight):
            for request in [one for one in queue if one.number == number]:
                queue.remove(request)
                self._finish(request.req, failure)

    def _finish(self, req: Any, failure: Failure | None = None) -> None:
        """Answer this half: an empty completion, or an error of the class that the language side will give too."""
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH

        if not is_local(req) and req.multimodal_inputs is not None:
            tracing.emit_spans(self.recorder, modes.ENCODE, req.bootstrap_room, req)
        req.time_stats.set_completion_time()  # as SGLang does; it ends the request's span in this process
        if req.multimodal_inputs is not None:
            req.multimodal_inputs.release_features()
        if failure is not None:
            self.answer_with_failure(req, failure)
            return
        req.finished_reason = FINISH_LENGTH(length=0)
        self.scheduler.output_streamer.stream_output([req], False)

    def abort(self, recv_req: Any) -> None:
        for request in self._parked():
            if aborted(recv_req, request.req.rid):
                gone = Failure(CLIENT_GONE, "the encode half of the request was aborted")
                request.sender.refuse(reason_of(recv_req) or gone)

    def refuse(self, refusal: Refusal) -> None:
        MooncakeEmbeddingSender(self.manager, refusal.room).refuse(refusal.failure)

    def finish_computing(self) -> None:
        self.tower.wait_for_device()

    def forget_computed(self) -> None:
        self.tower.forget()

    def weights_changed(self) -> None:
        super().weights_changed()
        if self.bootstrap_queue.keys is not None:
            self.bootstrap_queue.keys.renew()
        for request in (*self.bootstrap_queue.queue, *self.turns.queue):
            if not request.has_begun:
                request.sender.forget_items()  # keys, and what was promised by them, are of rows of the old weights

    def tables(self) -> dict[str, int]:
        queues = (self.bootstrap_queue.queue, self.turns.queue, self.inflight, self.before_reachable)
        return {"parked": sum(map(len, queues))}

    def is_idle(self) -> bool:
        return not self._parked()

    def has_work(self) -> bool:
        return bool(self._next_batch())


def _reason_in(reason: Any) -> Failure:
    """Why SGLang refused a request; of some it tells their client only."""
    if reason is None:
        return Failure(BAD_REQUEST, "SGLang refused the request at the encode instance")
    return Failure(int(reason.status_code or BAD_REQUEST), reason.message)


def send_embedding_chunk(requests: Sequence[EncodeRequest]) -> None:
    """Give what is made of every request to its transfer; from here on the transfer workers do the rest."""
    for request in requests:
        request.hand_over()
