"""What a scheduler in one of our modes does beside scheduling, and what both halves have in common."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final, Generic, TypeVar

import msgspec
import zmq

from embedding_relay import __version__
from embedding_relay.observer import NOBODY
from embedding_relay.protocol.errors import BAD_REQUEST, CLIENT_GONE, UNAVAILABLE, Failure
from embedding_relay.pulse import Pulse, socket_name
from embedding_relay.recorder_socket import Teller, name_of_scheduler
from embedding_relay.transport.encode import NoTransfer
from embedding_relay.transport.manager import Manager, MooncakeEmbeddingManager
from sglang.srt.disaggregation.multimodal import compatibility
from sglang.srt.disaggregation.multimodal.front import Refusal, abort_message, lost_rows_in, refusal_in
from sglang.srt.runtime_context import get_parallel, get_serving

M = TypeVar("M", bound=Manager | NoTransfer)

_DECIDED: Final = "relay-decided"


class Part(msgspec.Struct, frozen=True):
    """Of a request at an encode instance: which of its media items go through the tower now. By their indexes."""

    number: int
    items: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    """Items whose rows are at every language rank already: nobody makes them."""


class Decisions(msgspec.Struct, frozen=True):
    """What the first rank of an instance has decided since its last turn. Requests are named by number: see the halves.

    All ranks compute together, in collectives: each must begin the same request in the same turn, or all wait for ever.
    So nothing that one rank alone knows (how a room stands, what time it is, whether a thread has died) may decide
    anything, but for the first rank, which puts it into SGLang's stream of requests. SGLang brings that stream to every
    rank of every pipeline stage in the same order, with the collective by which it hands on requests in each turn
    anyway. There is no collective of ours, so none that a rank could wait in while the others do something else; and
    whoever reads the same stream does the same.
    """

    unhealthy_reason: str | None = None
    is_reachable: bool = False
    begun: tuple[int, ...] = ()
    """Encode: the language side waits for these rows."""
    batch: tuple[Part, ...] = ()
    """Encode: these go through the tower now."""
    ended: tuple[tuple[int, Failure | None], ...] = ()
    forgotten: tuple[int, ...] = ()
    """Language: nobody has come for these rows for long."""


class Role(abc.ABC, Generic[M]):
    """Owned by one scheduler; every method runs in the scheduler's own thread."""

    mode: ClassVar[str]

    def __init__(self, scheduler: Any, manager: M, *, is_first: bool = True) -> None:
        """`is_first`: of the ranks that get the same requests, this one decides."""
        self.scheduler = scheduler
        self.manager = manager
        self.is_first = is_first
        self.unhealthy_reason: str | None = None
        """As all ranks know it."""
        self.is_reachable = False
        self._unheard: Decisions | None = None
        self._heard: list[Decisions] = []
        self.scheduler_idle = False
        self.counts_parked = True
        """Whether SGLang hears that this instance has work while requests are parked here."""
        self._tables: dict[str, int] = {}
        self._poller = zmq.Poller()
        serving = get_serving()
        self._where = (serving.host, serving.port, get_parallel().dp_rank or 0)
        self.pulse = Pulse(socket_name(*self._where), lambda: manager.unhealthy_reason)
        self.recorder = manager.recorder
        self.teller = Teller(self.recorder)

    def start(self) -> None:
        self.manager.start()
        if not self.is_first:
            return
        self.pulse.start()
        self.teller.start(name_of_scheduler(*self._where))
        channels = self.scheduler.ipc_channels
        for socket in (channels.recv_from_tokenizer, channels.recv_from_rpc):
            if isinstance(socket, zmq.Socket):
                self._poller.register(socket, zmq.POLLIN)
        assert not isinstance(self.manager, NoTransfer)
        self.wake_up_for(self.manager.wakeup_fd)

    def wake_up_for(self, source: int | zmq.Socket[bytes]) -> None:
        """However the scheduler sleeps, it looks when something comes from there."""
        self._poller.register(source, zmq.POLLIN)
        if self.scheduler.idle_sleeper is not None:
            self.scheduler.idle_sleeper.poller.register(source, zmq.POLLIN)

    def close(self) -> None:
        self.pulse.close()
        self.teller.close()
        self.manager.close()

    def take_over(self, recv_req: Any) -> bool:
        """Look at a request before SGLang does; True: it is ours from here on."""
        if is_local(recv_req):
            # To SGLang any answer to a health request means health: an unhealthy instance takes it and gives none.
            return self.unhealthy_reason is not None
        return self.take_over_remote(recv_req)

    @abc.abstractmethod
    def take_over_remote(self, recv_req: Any) -> bool:
        """The same for a request that has another half at another instance, or might have."""

    def pass_on(self, recv_req: Any, to_sglang: Callable[[], object]) -> None:
        """Let SGLang validate and queue a request that was not taken over."""
        to_sglang()

    def note_created(self, req: Any) -> None:
        """SGLang has made its `Req` of the request that was passed on."""

    def take_from_queue(self, req: Any) -> bool:
        """Look at a validated request before it is queued; True: it never enters SGLang's queue."""
        return False

    # ---- what the ranks of this instance do alike

    def decide(self) -> list[Any]:
        """In the first rank, before its messages are handed on: a message to itself and to the others.

        SGLang may hand on nothing in a turn (`--scheduler-recv-interval`). What was not heard is said again.
        """
        if not self.is_first:
            return []
        if self._unheard is None:
            decisions = self.decisions()
            if decisions == Decisions(self.unhealthy_reason, self.is_reachable):
                return []
            self._unheard = decisions
        return [_as_message(self._unheard)]

    @abc.abstractmethod
    def decisions(self) -> Decisions:
        """What has become possible since the last turn."""

    def _hear(self, decisions: Decisions) -> None:
        self._unheard = None
        self.unhealthy_reason, self.is_reachable = decisions.unhealthy_reason, decisions.is_reachable
        self._heard.append(decisions)

    def after_messages(self, messages: Sequence[Any]) -> None:
        """Once per turn of the scheduler's loop, after it has done what these messages asked for."""
        self.pulse.beat()
        if any(isinstance(message, weight_changes()) for message in messages):
            self.weights_changed()
        heard, self._heard = self._heard, []
        self.act_on(heard)
        if self.manager.observer is not NOBODY and (tables := self.tables()) != self._tables:
            self._tables = tables
            self.manager.observer.parked(tables)

    @abc.abstractmethod
    def act_on(self, heard: Sequence[Decisions]) -> None:
        """Once per turn of the scheduler's loop: do what the first rank has decided."""

    @abc.abstractmethod
    def tables(self) -> dict[str, int]:
        """The sizes of what is kept here, for those who watch."""

    def hear_abort(self, recv_req: Any) -> None:
        if (decisions := (recv_req.finished_reason or {}).get(_DECIDED)) is not None:
            self._hear(decisions)
        elif (refusal := refusal_in(recv_req)) is not None:
            self.refuse(refusal)
        elif (lost := lost_rows_in(recv_req)) is not None:
            self.lose(*lost)
        else:
            self.abort(recv_req)

    @abc.abstractmethod
    def abort(self, recv_req: Any) -> None:
        """These requests were aborted, by their clients or by an operator."""

    @abc.abstractmethod
    def refuse(self, refusal: Refusal) -> None:
        """Tell the other half of a request that will never come here."""

    def lose(self, room: int, failure: Failure) -> None:
        """The other half of a request has failed before the transfer could say so."""

    @abc.abstractmethod
    def is_idle(self) -> bool:
        """No request is parked here."""

    def has_work(self) -> bool:
        """There is something to do in the next turn even if no message comes."""
        return False

    @property
    def longest_sleep_ms(self) -> int:
        """What no message announces is looked for so often."""
        return 1000

    def sleep_until_something_happens(self) -> None:
        """Called when the scheduler has no batch: while nothing but parked requests keeps it awake, wait for a message.

        SGLang spins when it has work of its own that no message announces (a grammar, a prefetch): so it must here too.
        Only the first rank sleeps here: the others wait for it when they are about to get their messages.
        """
        if not (self.is_first and self.scheduler_idle) or self.is_idle():
            return
        longest = self.longest_sleep_ms  # first: what it counts down to is work when it has come
        if not self.has_work():
            self._poller.poll(longest)

    def facts(self) -> dict[str, Any] | None:
        """What this instance is, for an operator's tools; nothing secret. None in a rank without a transfer."""
        manager = self.manager
        if not isinstance(manager, MooncakeEmbeddingManager):
            return None
        config = manager.config
        return {
            "version": __version__,
            "mode": self.mode,
            "handshake": msgspec.to_builtins(manager.layout.handshake()),
            "data_plane": config.data_plane,
            "has_secret": config.keys is not None,
            "heartbeat": config.heartbeat_interval * (config.heartbeat_max_failures + 1),
        }

    def reason_to_turn_away(self) -> Failure | None:
        """Why no further request that waits for rows is admitted, if so."""
        if self.unhealthy_reason is not None:
            return Failure(UNAVAILABLE, f"this {self.mode} instance is unhealthy: {self.unhealthy_reason}")
        most, waiting = self.manager.config.max_waiting_requests, self.tables()["parked"]
        if waiting < most:
            return None
        return Failure(UNAVAILABLE, f"{waiting} requests are waiting at this {self.mode} instance, of at most {most}")

    def answer_with_failure(self, recv_req: Any, failure: Failure) -> None:
        code = BAD_REQUEST if failure.code == CLIENT_GONE else failure.code
        abort = abort_message(recv_req.rid, Failure(code, failure.text))
        compatibility.send_abort(self.scheduler, abort, recv_req)

    # ---- an operator's commands

    def is_held(self) -> bool:
        """An operator has stopped the model: it is paused, between the parts of a weight update, or without memory.

        Then no tower runs and nothing is handed over to SGLang. Messages, transfers, deadlines and answers go on.
        """
        updater = self.scheduler.weight_updater
        return bool(self.scheduler._engine_paused or updater._session or updater.offload_tags)

    @contextlib.contextmanager
    def parked_requests_hold_nothing(self) -> Iterator[None]:
        """While SGLang flushes its cache or gives memory back: it must be idle then, but parked requests have none."""
        counted, self.counts_parked = self.counts_parked, False
        try:
            yield
        finally:
            self.counts_parked = counted

    def finish_computing(self) -> None:
        """Before memory is given back: what was started on the device must not read it any more."""

    def forget_computed(self) -> None:
        """The weights have changed, or the cache was flushed: what the model made before is not used again."""

    def weights_changed(self) -> None:
        self.forget_computed()


def _as_message(decisions: Decisions) -> Any:
    """An abort of no request, as in `front`: what one rank may decide for all, SGLang says by aborts only."""
    from sglang.srt.managers.io_struct import AbortReq

    return AbortReq(rid=_DECIDED, finished_reason={_DECIDED: decisions})


def aborted(recv_req: Any, rid: str) -> bool:
    """SGLang aborts by prefix: a batch's requests share the beginning of their ids."""
    return bool(recv_req.abort_all or rid.startswith(recv_req.rid))


def weight_changes() -> tuple[type, ...]:
    """The messages after which the model may have other weights."""
    from sglang.srt.managers import io_struct

    return (
        io_struct.UpdateWeightFromDiskReqInput,
        io_struct.UpdateWeightsFromDistributedReqInput,
        io_struct.UpdateWeightsFromTensorReqInput,
        io_struct.UpdateWeightsFromIPCReqInput,
        io_struct.EndWeightUpdateReqInput,
    )


def is_local(req: Any) -> bool:
    """Warm-up and health requests name a host that nobody has: they must not leave this instance."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    return bool(req.bootstrap_host == FAKE_BOOTSTRAP_HOST)
