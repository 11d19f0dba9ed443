"""Is the scheduler alive? Its process answers datagrams, and the HTTP process in front of it asks while requests wait.

SGLang ends a server whose scheduler died. One that is frozen, or stuck in its loop, would keep its clients waiting, and
with them a router that waits for both halves of a request. The answer comes from a thread of its own, because the
scheduler's may rightly be busy for seconds, and says for how long it has been.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from embedding_relay.config import RelayConfig
from embedding_relay.protocol.errors import SettingError

_LARGEST: Final = 4096
MOST_ROOMS: Final = 128
"""That one question may be about: with their commas they take 2560 bytes."""
_STOP: Final = b"stop"
# How long one request waits for news of a scheduler that was in trouble.
_LONGEST_WAIT: Final = 1.0


class Condition(msgspec.Struct, frozen=True):
    """What the scheduler's process says about itself."""

    busy_for: float
    """Seconds since the scheduler's loop last came round."""
    unhealthy_reason: str | None = None
    offered: tuple[int, ...] = ()
    """Of the rooms that were asked about: those that the other half has offered blocks for."""


def socket_name(host: str, port: int, dp_rank: int = 0) -> str:
    """In Linux's abstract namespace, where nothing is left behind. One server of a machine has this address, and for
    each data-parallel rank a scheduler that answers.
    """
    return f"\0sglang-embedding-relay/{host}/{port}/{dp_rank}"


class Pulse:
    """In the scheduler's process: answers who asks. `unhealthy_reason` is called in the answering thread."""

    def __init__(self, name: str, unhealthy_reason: Callable[[], str | None]) -> None:
        self.is_offered: Callable[[int], bool] = lambda room: False
        """Whether the other half of a room has offered blocks for it; called in the answering thread too."""
        self._name = name
        self._unhealthy_reason = unhealthy_reason
        self._came_round_at = time.monotonic()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            bound.bind(self._name)
        except OSError as error:
            bound.close()
            raise SettingError(f"another server of this machine has the same --host and --port: {error}") from None
        self._thread = threading.Thread(target=self._answer, args=(bound,), name="relay-pulse", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """The scheduler's loop has come round."""
        self._came_round_at = time.monotonic()

    def close(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(_STOP, self._name)
        self._thread.join()

    def _answer(self, bound: socket.socket) -> None:
        with bound:
            while True:
                question, asker = bound.recvfrom(_LARGEST)
                if question == _STOP:
                    return
                offered = tuple(filter(self.is_offered, _rooms_in(question)))
                condition = Condition(time.monotonic() - self._came_round_at, self._unhealthy_reason(), offered)
                with contextlib.suppress(OSError):  # the asker has gone, or does not read
                    bound.sendto(msgspec.json.encode(condition), socket.MSG_DONTWAIT, asker)


def _rooms_in(question: bytes) -> list[int]:
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(question, type=list[int])
    return []  # the question about its health alone


class SchedulerWatch:
    """In the HTTP process: asks while a request waits, and costs nothing while none does.

    Belongs to the event loop in which it is started, and never waits for its socket.
    """

    _loop: asyncio.AbstractEventLoop
    _socket: socket.socket

    def __init__(
        self,
        name: str,
        config: RelayConfig,
        *,
        on_trouble: Callable[[str], None],
        on_unhealthy: Callable[[str], None],
    ) -> None:
        """`on_trouble` is called again and again while requests wait; `on_unhealthy` once, because that is for good."""
        self._name = name
        self._interval = config.heartbeat_interval
        self._silence = config.timing.silence
        self._longest_busy = config.waiting_timeout
        self._on_trouble = on_trouble
        self._on_unhealthy = on_unhealthy
        self.on_offered: Callable[[tuple[int, ...]], None] | None = None
        """What is done about rooms of `ask_offered`."""
        self._is_connected = False
        self._has_ended = False
        self._answered = asyncio.Event()
        self._asked_at: float | None = None
        """When the first question was asked that has no answer yet."""
        self._waiting = 0
        self._task: asyncio.Task[None] | None = None
        self._trouble: str | None = None
        self._is_unhealthy = False

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind("")  # Linux chooses a name, and the answer comes back to it
        self._loop.add_reader(self._socket.fileno(), self._read_answer)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        if self._task is not None:
            self._task.cancel()

    async def trouble_before_a_request(self) -> str | None:
        """Why nothing should be sent there. A scheduler that was in trouble must say first that it is not any more."""
        self._connect()
        if self._trouble is None or self._has_ended:
            return self._trouble
        self._answered.clear()
        self._ask()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._answered.wait(), min(_LONGEST_WAIT, self._interval))
        return self._trouble

    @contextlib.contextmanager
    def a_request_waits(self) -> Iterator[None]:
        self._waiting += 1
        if self._task is None:
            self._task = self._loop.create_task(self._keep_asking())
        try:
            yield
        finally:
            self._waiting -= 1

    async def _keep_asking(self) -> None:
        while self._waiting:
            if self._asked_at is None:
                self._asked_at = self._loop.time()
            self._ask()
            await asyncio.sleep(self._interval)
            self._read_answer()  # this loop may have been the busy one, and the answer be there
            silence = 0.0 if self._asked_at is None else self._loop.time() - self._asked_at
            if silence >= self._silence and not self._has_ended:
                self._trouble = f"the scheduler of this instance has not answered for {silence:.3g} s"
            if self._trouble is not None and self._waiting:
                self._on_trouble(self._trouble)
        self._asked_at = None
        self._task = None

    def ask_offered(self, rooms: list[int]) -> None:
        """Which of them the other half has offered blocks for; `MOST_ROOMS` at a time."""
        self._ask(msgspec.json.encode(rooms[:MOST_ROOMS]))

    def _ask(self, question: bytes = b"?") -> None:
        self._connect()
        with contextlib.suppress(OSError):  # nobody is there, or its queue is full: no answer is one too
            self._socket.send(question)

    def _connect(self) -> None:
        """The first time binds us to its answers alone; from then on this notices whether it is still there."""
        try:
            self._socket.connect(self._name)
            self._is_connected = True
        except ConnectionRefusedError:
            if self._is_connected:
                self._has_ended, self._trouble = True, "this instance has ended: its scheduler has gone"

    def _read_answer(self) -> None:
        condition = self._latest_answer()
        if condition is None or self._has_ended:
            return
        self._asked_at = None
        self._trouble = self._trouble_in(condition)
        self._answered.set()

    def _latest_answer(self) -> Condition | None:
        latest = None
        with contextlib.suppress(OSError):  # nothing more is there, or nobody
            while True:
                latest = msgspec.json.decode(self._socket.recv(_LARGEST), type=Condition)
                if latest.offered and self.on_offered is not None:
                    self.on_offered(latest.offered)
        return latest

    def _trouble_in(self, condition: Condition) -> str | None:
        if condition.unhealthy_reason is not None:
            if not self._is_unhealthy:
                self._is_unhealthy = True
                self._on_unhealthy(condition.unhealthy_reason)
            return f"this instance is unhealthy: {condition.unhealthy_reason}"
        if condition.busy_for > self._longest_busy:
            return f"the scheduler of this instance has been stuck for {condition.busy_for:.3g} s"
        return None
