"""The language half in the scheduler: park a request until its rows are here, then hand it over as if it were local."""

from __future__ import annotations

import logging
import time
from typing import Any

from embedding_relay.memory.buffers import ReceivedRows
from embedding_relay.protocol.errors import BAD_REQUEST, CLIENT_GONE, INTERNAL, Failure
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from sglang.srt.disaggregation.mooncake.conn_multimodal import LanguageManager, MooncakeEmbeddingReceiver
from sglang.srt.disaggregation.multimodal import compatibility, media, modes
from sglang.srt.disaggregation.multimodal.front import Refusal, prompt_ids_message, reason_of, wants_prompt_ids
from sglang.srt.disaggregation.multimodal.roles import Role, aborted

logger = logging.getLogger(__name__)


class MultimodalLanguageRequest:
    """One room: its end of the transfer, and everyone who waits for its rows.

    With `n > 1` SGLang asks `n + 1` times for one room, first once to fill the prefix cache. The rows are received
    once, by the first, and kept until the last has had them. So is a failure: a stream asks on after it.
    """

    def __init__(self, receiver: MooncakeEmbeddingReceiver) -> None:
        self.receiver = receiver
        self.uses_left = 1
        self.waiting: list[Any] = []
        self.over_since = 0.0


class MultimodalLanguagePreallocQueue:
    """Rooms that have no receive blocks yet; the manager serves them first come, first served."""

    def __init__(self, manager: LanguageManager) -> None:
        self.manager = manager
        self.queue: dict[int, MultimodalLanguageRequest] = {}

    @property
    def default_allocate_tokens(self) -> int | None:
        """How many rows the manager reserves blocks for at first; None learns it from recent requests."""
        return self.manager.config.default_allocate_tokens

    def add(self, recv_req: Any) -> None:
        room, peer = recv_req.bootstrap_room, Address(recv_req.bootstrap_host, recv_req.bootstrap_port)
        request = MultimodalLanguageRequest(MooncakeEmbeddingReceiver(self.manager, str(peer), room))
        request.uses_left = uses_of_room(recv_req)
        request.waiting.append(recv_req)
        self.queue[room] = request
        request.receiver.start()

    def decline(self, host: str, port: int, room: int, failure: Failure) -> None:
        """The other half of the request is told that nobody wants its rows."""
        receiver = MooncakeEmbeddingReceiver(self.manager, str(Address(host, port)), room)
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

    def pop_transferred(self, *, failed_only: bool = False) -> dict[int, MultimodalLanguageRequest]:
        """Rooms that have ended, in the order in which they were announced."""
        ended = (Status.FAILED,) if failed_only else (Status.SUCCESS, Status.FAILED)
        moved = {room: request for room, request in self.queue.items() if request.receiver.poll() in ended}
        for room in moved:
            del self.queue[room]
        return moved


class LanguageRole(Role[LanguageManager]):
    mode = modes.LANGUAGE

    def __init__(self, scheduler: Any, manager: LanguageManager) -> None:
        super().__init__(scheduler, manager)
        self.prealloc_queue = MultimodalLanguagePreallocQueue(manager)
        self.transfer_queue = MultimodalLanguageTransferQueue()
        self.shared: dict[int, MultimodalLanguageRequest] = {}
        self.held_back = False
        """Rooms may have ended that nobody has looked at since."""
        self.keep_shared_s = manager.config.waiting_timeout

    def take_over_remote(self, recv_req: Any) -> bool:
        if not recv_req.need_wait_for_mm_inputs:
            return False
        if recv_req.bootstrap_host is None:
            self.answer_with_failure(recv_req, Failure(BAD_REQUEST, "the request names no bootstrap_host"))
            return True
        self._park(recv_req)
        return True

    def _park(self, recv_req: Any) -> None:
        room = recv_req.bootstrap_room
        recv_req.bootstrap_port = self._port(recv_req.bootstrap_port)
        if (over := self.shared.pop(room, None)) is not None:
            over.waiting.append(recv_req)
            self.transfer_queue.extend({room: over})
            self.held_back = True
        elif (parked := self._parked(room)) is not None:
            parked.waiting.append(recv_req)
        elif (failure := self.reason_to_turn_away()) is not None:
            logger.warning("relay room=%d refused: %s", room, failure)
            self.prealloc_queue.decline(recv_req.bootstrap_host, recv_req.bootstrap_port, room, failure)
            self.answer_with_failure(recv_req, failure)
        else:
            self.prealloc_queue.add(recv_req)

    def _parked(self, room: int) -> MultimodalLanguageRequest | None:
        return self.transfer_queue.queue.get(room) or self.prealloc_queue.queue.get(room)

    def _port(self, port: int | None) -> int:
        return int(self.scheduler.server_args.disaggregation_bootstrap_port if port is None else port)

    def act_on_changes(self) -> None:
        held = self.is_held()
        if self.manager.drain_events() or (self.held_back and not held):
            self.transfer_queue.extend(self.prealloc_queue.pop_preallocated())
            for room, request in self.transfer_queue.pop_transferred(failed_only=held).items():
                self._hand_over(room, request)
            self.held_back = held
        self._forget_unused()

    def _hand_over(self, room: int, request: MultimodalLanguageRequest) -> None:
        if not request.waiting and not request.over_since:
            return  # nobody wants it any more
        request.over_since = request.over_since or time.monotonic()
        self.shared[room] = request
        for recv_req in request.waiting:
            self._use(request, recv_req)
        request.waiting.clear()

    def _use(self, request: MultimodalLanguageRequest, recv_req: Any) -> None:
        """From here on SGLang sees an ordinary request whose embeddings were computed beforehand."""
        request.uses_left -= 1
        if request.uses_left == 0:
            self.shared.pop(recv_req.bootstrap_room, None)
        if (failure := request.receiver.failure()) is not None:
            self.answer_with_failure(recv_req, failure)
            return
        try:
            self._give_to_sglang(request.receiver.rows(), recv_req)
        except Exception as error:  # rows are checked when they come: a mistake of ours, for which one request pays
            logger.exception("relay room=%d could not be handed over", recv_req.bootstrap_room)
            text = f"the rows of room {recv_req.bootstrap_room} could not be handed over ({type(error).__name__})"
            self.answer_with_failure(recv_req, Failure(INTERNAL, text))

    def _give_to_sglang(self, rows: ReceivedRows, recv_req: Any) -> None:
        recv_req.input_ids, recv_req.mm_inputs = media.request_inputs(rows, self.manager.limits)
        media.limit_new_tokens(recv_req.sampling_params, rows, self.manager.limits)
        recv_req.need_wait_for_mm_inputs = False
        if wants_prompt_ids(recv_req):
            message = prompt_ids_message(recv_req.rid, list(recv_req.input_ids))
            compatibility.send_abort(self.scheduler, message, recv_req)
        self.scheduler.handle_generate_request(recv_req)

    def _forget_unused(self) -> None:
        """Samples that never come (their client left between the first use and the others) must not keep rows."""
        if not self.shared:
            return
        oldest = time.monotonic() - self.keep_shared_s
        self.shared = {room: request for room, request in self.shared.items() if request.over_since > oldest}

    def abort(self, recv_req: Any) -> None:
        gone = reason_of(recv_req) or Failure(CLIENT_GONE, "the request was aborted")
        for request in (*self.prealloc_queue.queue.values(), *self.transfer_queue.queue.values()):
            for waiting in [one for one in request.waiting if aborted(recv_req, one.rid)]:
                request.waiting.remove(waiting)
                self.answer_with_failure(waiting, gone)
            if not request.waiting:
                request.receiver.abort(gone)

    def refuse(self, refusal: Refusal) -> None:
        if refusal.host is not None and self._parked(refusal.room) is None:
            self.prealloc_queue.decline(refusal.host, self._port(refusal.port), refusal.room, refusal.failure)

    def tables(self) -> dict[str, int]:
        rooms = (*self.prealloc_queue.queue.values(), *self.transfer_queue.queue.values())
        return {"parked": sum(len(room.waiting) for room in rooms), "shared": len(self.shared)}

    def is_idle(self) -> bool:
        return not (self.prealloc_queue.queue or self.transfer_queue.queue)


def uses_of_room(recv_req: Any) -> int:
    """How often SGLang will ask for this room: once, or once per sample and once before them all."""
    samples = int(recv_req.sampling_params.n)
    return 1 if samples == 1 else samples + 1
