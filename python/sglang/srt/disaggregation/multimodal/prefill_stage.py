"""The second of three stages: a language half whose tokens come from a decode instance of SGLang's own.

To SGLang the instance is an ordinary prefill instance, and a request that has its rows an ordinary request of it. What
is added here: a request that fails before SGLang sees it has a decode half, which would wait for minutes.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from embedding_relay.protocol.errors import Failure
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.multimodal.front import Refusal
from sglang.srt.disaggregation.multimodal.multimodal_language import LanguageRole
from sglang.srt.disaggregation.multimodal.roles import Decisions, is_local
from sglang.srt.disaggregation.utils import KVClassType, get_kv_class
from sglang.srt.environ import envs

_LOOK_AGAIN_MS: Final = 20
# Clients can have any number of requests fail, and each is looked at.
_MOST_UNTOLD: Final = 1000


class PrefillRole(LanguageRole):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.untold: deque[tuple[Any, Failure]] = deque()
        """Decode halves that have not asked for their request's cache yet, and why it will not come. One may never ask,
        because it has refused the request itself: SGLang's deadline ends the wait for it.
        """
        self._look_again_at = 0.0
        # Every backend's decode instance reads a reason, and not every backend sends one.
        self.scheduler.disagg_prefill_bootstrap_queue.kv_manager.kv_status_msg_carries_reason = True

    def answer_with_failure(self, recv_req: Any, failure: Failure) -> None:
        super().answer_with_failure(recv_req, failure)
        if recv_req.bootstrap_room is not None and not is_local(recv_req):
            self._tell_decode_half(recv_req.bootstrap_host, recv_req.bootstrap_room, failure)

    def refuse(self, refusal: Refusal) -> None:
        """The encode half, if it was asked already, hears it by the end of its connection."""
        self._tell_decode_half(refusal.host, refusal.room, refusal.failure)

    def _tell_decode_half(self, host: str | None, room: int, failure: Failure) -> None:
        queue = self.scheduler.disagg_prefill_bootstrap_queue
        # As SGLang makes one for a request that it takes: then it notices the decode half, or that none comes.
        address = f"{host}:{queue.bootstrap_port}"
        sender = _sender_class(queue)(mgr=queue.kv_manager, bootstrap_addr=address, bootstrap_room=room)
        self.untold.append((sender, failure))
        if len(self.untold) > _MOST_UNTOLD:
            _clear(self.untold.popleft()[0])

    def act_on(self, heard: Sequence[Decisions]) -> None:
        super().act_on(heard)
        if self.untold and (now := time.monotonic()) >= self._look_again_at:
            self._look_again_at = now + _LOOK_AGAIN_MS / 1000
            self.untold = deque(one for one in self.untold if not self._tell(*one))

    def is_idle(self) -> bool:
        return super().is_idle() and not self.untold

    @property
    def longest_sleep_ms(self) -> int:
        return _LOOK_AGAIN_MS if self.untold else super().longest_sleep_ms

    def _tell(self, sender: Any, failure: Failure) -> bool:
        """Whether the decode half has heard of it, or never will."""
        status = sender.poll()
        if status == KVPoll.Bootstrapping:
            return False
        if status != KVPoll.Failed:
            sender.kv_mgr.conclude_failure(bootstrap_room=sender.bootstrap_room, failure_reason=failure.text)
        _clear(sender)
        return True


def _clear(sender: Any) -> None:
    with contextlib.suppress(Exception):  # that is how SGLang clears a room that has failed
        sender.failure_exception()


def do_without_cuda(scheduler: Any) -> None:
    """On a machine without an accelerator. SGLang's prefill instances, ours or not, send in two ways that save time
    there and wait for an event of CUDA: page numbers from pinned memory, and a cached prefix ahead of the rest.
    """
    _sender_class(scheduler.disagg_prefill_bootstrap_queue).supports_host_tensor_indices = False
    envs.SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX.set(False)


def _sender_class(queue: Any) -> Any:
    return get_kv_class(queue.transfer_backend, KVClassType.SENDER)
