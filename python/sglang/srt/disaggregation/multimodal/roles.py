"""What a scheduler in one of our modes does beside scheduling, and what both halves have in common."""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final, NamedTuple

import zmq

from sglang.srt.disaggregation.multimodal import modes
from sglang.srt.disaggregation.multimodal.protocol.errors import BAD_REQUEST, CLIENT_GONE, INTERNAL, Failure

logger = logging.getLogger(__name__)

_LONGEST_SLEEP_MS: Final = 1000


# ---- in the tokenizer manager


class Refusal(NamedTuple):
    """A room that will never be asked for here, because its request failed before the scheduler saw it."""

    room: int
    host: str | None
    port: int | None
    failure: Failure


_with_scheduler: Final[set[int]] = set()
"""Rooms that the scheduler has been given, while their request is under way: how they end is its business."""


def note_dispatched(obj: Any) -> None:
    if (room := getattr(obj, "bootstrap_room", None)) is not None:
        _with_scheduler.add(room)


async def generate_or_tell(
    original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, request: Any
) -> AsyncGenerator[Any, None]:
    """Around a whole request. Whatever one half alone finds wrong with it, the other half must not wait in vain."""
    try:
        async with contextlib.aclosing(original(manager, obj, request)) as answers:
            async for answer in answers:
                yield answer
    except Exception as error:
        for refusal in _refusals(obj, error):
            logger.info("relay room=%d refused: %s", refusal.room, refusal.failure)
            manager._dispatch_to_scheduler(_as_message(refusal))
        raise
    finally:
        _with_scheduler.difference_update(_rooms(obj))


def _refusals(obj: Any, error: Exception) -> list[Refusal]:
    rooms = [room for room in _rooms(obj) if room not in _with_scheduler]
    if not rooms or not obj.contains_mm_input():
        return []  # no other half, or one that waits for nothing
    code = getattr(error, "status_code", BAD_REQUEST if isinstance(error, ValueError) else INTERNAL)
    failure = Failure(code, str(getattr(error, "detail", error)) or type(error).__name__)
    return [Refusal(room, _first(obj.bootstrap_host), _first(obj.bootstrap_port), failure) for room in rooms]


def _rooms(obj: Any) -> list[int]:
    """One for each prompt; SGLang numbers samples too, but they share the room of their prompt."""
    rooms = getattr(obj, "bootstrap_room", None)
    if isinstance(rooms, list):
        return [room for room in rooms[: getattr(obj, "batch_size", len(rooms))] if room is not None]
    return [] if rooms is None else [rooms]


def _first(value: Any) -> Any:
    """The router pairs a whole batch with one encode instance."""
    return value[0] if isinstance(value, list) else value


def _as_message(refusal: Refusal) -> Any:
    """An abort of nobody: of all that SGLang's two processes can tell each other, the one with room for a reason."""
    from sglang.srt.managers.io_struct import AbortReq

    room, host, port, failure = refusal
    reason = {"type": "abort", "status_code": failure.code, "message": failure.text}
    return AbortReq(
        rid=f"relay-refused-{room}",
        finished_reason={**reason, "relay_room": room, "relay_host": host, "relay_port": port},
    )


def _from_message(recv_req: Any) -> Refusal | None:
    reason = recv_req.finished_reason
    if not reason or "relay_room" not in reason:
        return None
    failure = Failure(reason["status_code"], reason["message"])
    return Refusal(reason["relay_room"], reason["relay_host"], reason["relay_port"], failure)


# ---- in the scheduler


class Role(abc.ABC):
    """Owned by one scheduler; every method runs in the scheduler's own thread."""

    def __init__(self, scheduler: Any, manager: Any) -> None:
        self.scheduler = scheduler
        self.manager = manager
        self.scheduler_idle = False
        self._poller = zmq.Poller()

    def start(self) -> None:
        self.manager.start()
        channels = self.scheduler.ipc_channels
        for socket in (channels.recv_from_tokenizer, channels.recv_from_rpc):
            if isinstance(socket, zmq.Socket):
                self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self.manager.wakeup_fd, zmq.POLLIN)
        if self.scheduler.idle_sleeper is not None:
            self.scheduler.idle_sleeper.poller.register(self.manager.wakeup_fd, zmq.POLLIN)

    def close(self) -> None:
        self.manager.close()

    @abc.abstractmethod
    def take_over(self, recv_req: Any) -> bool:
        """Look at a request before SGLang does; True: it is ours from here on."""

    def take_from_queue(self, req: Any) -> bool:
        """Look at a validated request before it is queued; True: it never enters SGLang's queue."""
        return False

    @abc.abstractmethod
    def step(self) -> None:
        """Once per turn of the scheduler's loop, after it has read its messages."""

    def hear_abort(self, recv_req: Any) -> None:
        refusal = _from_message(recv_req)
        if refusal is None:
            self.abort(recv_req)
        else:
            self.refuse(refusal)

    @abc.abstractmethod
    def abort(self, recv_req: Any) -> None:
        """These requests were aborted, by their clients or by an operator."""

    @abc.abstractmethod
    def refuse(self, refusal: Refusal) -> None:
        """Tell the other half of a request that will never come here."""

    @abc.abstractmethod
    def is_idle(self) -> bool:
        """No request is parked here."""

    def has_work(self) -> bool:
        """The next `step` has something to do even if no message comes."""
        return False

    def sleep_until_something_happens(self) -> None:
        """Called when the scheduler has no batch: while nothing but parked requests keeps it awake, wait for a message.

        SGLang spins when it has work of its own that no message announces (a grammar, a prefetch): so it must here too.
        """
        if self.scheduler_idle and not self.is_idle() and not self.has_work():
            self._poller.poll(_LONGEST_SLEEP_MS)

    def answer_with_failure(self, recv_req: Any, failure: Failure) -> None:
        from sglang.srt.managers.io_struct import AbortReq

        code = BAD_REQUEST if failure.code == CLIENT_GONE else failure.code
        reason = {"type": "abort", "status_code": code, "message": failure.text}
        self.scheduler.send_abort_output(AbortReq(rid=recv_req.rid, finished_reason=reason), recv_req)


def aborted(recv_req: Any, rid: str) -> bool:
    """SGLang aborts by prefix: a batch's requests share the beginning of their ids."""
    return bool(recv_req.abort_all or rid.startswith(recv_req.rid))


def is_local(req: Any) -> bool:
    """Warm-up and health requests name a host that nobody has: they must not leave this instance."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    return bool(req.bootstrap_host == FAKE_BOOTSTRAP_HOST)


def start_role(scheduler: Any, mode: str) -> Role:
    role: Role
    if mode == modes.ENCODE:
        from sglang.srt.disaggregation.multimodal.multimodal_embedding import EncodeRole

        role = EncodeRole.of(scheduler)
    else:
        from sglang.srt.disaggregation.multimodal.multimodal_language import LanguageRole

        role = LanguageRole.of(scheduler)
    role.start()
    held = sum(parameter.numel() for parameter in scheduler.tp_worker.model_runner.model.parameters())
    logger.info("relay mode=%s parameters=%d", mode, held)
    return role
