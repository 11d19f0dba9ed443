"""What a scheduler in one of our modes does beside scheduling, and what both halves have in common."""

from __future__ import annotations

import abc
import logging
from typing import Any, Final

import zmq

from sglang.srt.disaggregation.multimodal import modes
from sglang.srt.disaggregation.multimodal.protocol.errors import BAD_REQUEST, CLIENT_GONE, Failure

logger = logging.getLogger(__name__)

_LONGEST_SLEEP_MS: Final = 1000


class Role(abc.ABC):
    """Owned by one scheduler; every method runs in the scheduler's own thread."""

    def __init__(self, scheduler: Any, manager: Any) -> None:
        self.scheduler = scheduler
        self.manager = manager
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

    @abc.abstractmethod
    def abort(self, recv_req: Any) -> None:
        """The client of these requests is gone."""

    @abc.abstractmethod
    def is_idle(self) -> bool:
        """No request is parked here."""

    def has_work(self) -> bool:
        """The next `step` has something to do even if no message comes."""
        return False

    def sleep_until_something_happens(self) -> None:
        """Called when the scheduler has no batch: while requests are parked, wait for a message instead of spinning."""
        if not (self.is_idle() or self.has_work() or self.scheduler.grammar_manager.grammar_queue):
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
    return role
