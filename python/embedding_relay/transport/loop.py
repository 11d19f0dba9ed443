"""The control loop: one thread that owns the protocol core, its sockets and its timers; others post calls to it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Final, Protocol

import zmq

from embedding_relay.protocol.errors import LocalError, UndecodableFrames
from embedding_relay.protocol.messages import Address
from embedding_relay.threads import WakeUp, ask_for_short_slices
from embedding_relay.transport.curve import Authenticator, Curve
from embedding_relay.transport.sockets import MAX_SOCKETS, Listener, PeerSockets

logger = logging.getLogger(__name__)

Call = Callable[[float], None]

# A peer is named once in the log; a flood of invented addresses must not fill memory either.
_MAX_NAMED_PEERS: Final = 1000

# How old the published numbers may be.
_COUNT_AFTER: Final = 0.25


class Handler(Protocol):
    """One side of the protocol; every method runs in the control thread."""

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        """Raise UndecodableFrames for frames that are no message."""

    def tick(self, now: float) -> None: ...

    def next_wakeup(self) -> float | None: ...


class ControlLoop:
    def __init__(self, host: str, max_frame: int, key: bytes | None = None) -> None:
        """With a `key`, it talks to others with the same key only, and nobody else can read along."""
        self._host = host
        self._max_frame = max_frame
        self._key = key
        self._calls: SimpleQueue[Call] = SimpleQueue()
        self._wakeup = WakeUp()
        self._stopping = False
        self._count_at: float | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._listener: Listener | None = None
        self._peers: PeerSockets | None = None
        self._authenticator: Authenticator | None = None
        self._named_peers: set[str] = set()
        self.undecodable = 0

    # ---- any thread

    def open(self) -> Address:
        self._wakeup.open()
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        try:
            curve = Curve(self._key) if self._key else None
            self._authenticator = Authenticator.open(self._context, curve) if curve else None
            self._listener = Listener.open(self._context, self._host, self._max_frame, curve)
        except BaseException:
            self.close()
            raise
        self._peers = PeerSockets(self._context, curve)
        return self._listener.address

    def post(self, call: Call) -> None:
        """Have `call(now)` run in the control thread, after what was posted before."""
        self._calls.put(call)
        self._wakeup.set()

    def stop(self) -> None:
        """Ask `run` to return, after what was posted before."""

        def note(_: float) -> None:
            self._stopping = True

        self.post(note)

    def close(self) -> None:
        """Close every socket: in the control thread when `run` ends, elsewhere only if it never began."""
        if self._context is None:
            return
        if self._listener:
            self._listener.close()
        if self._peers:
            self._peers.close()
        if self._authenticator:
            self._authenticator.close()
        self._context.term()
        self._wakeup.close()
        self._context = None

    # ---- control thread

    def run(self, handler: Handler, count: Callable[[], None]) -> None:
        """Work until `stop`; `count` is called soon after something happened, and never while nothing does."""
        listener, peers = self._listener, self._peers
        if listener is None or peers is None:
            raise LocalError("a control loop is opened before it runs")
        ask_for_short_slices()  # and for the threads that write, which are started from here
        poller = zmq.Poller()
        poller.register(listener.socket, zmq.POLLIN)
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        if self._authenticator:
            poller.register(self._authenticator.socket, zmq.POLLIN)
        try:
            while not self._stopping:
                ready = poller.poll(_timeout_ms(handler.next_wakeup(), peers.next_wakeup(), self._count_at))
                self._turn(handler, listener, peers, woken=(self._wakeup.fileno(), zmq.POLLIN) in ready)
                self._count_soon(count)
        finally:
            self.close()

    def _turn(self, handler: Handler, listener: Listener, peers: PeerSockets, *, woken: bool) -> None:
        if woken:
            self._wakeup.clear()
            self._run_calls()
        if self._authenticator:
            self._authenticator.answer()
        for peer, frames in listener.messages():
            self._receive(handler, peer, frames)
        now = time.monotonic()
        due = handler.next_wakeup()
        if due is not None and due <= now:
            handler.tick(now)
        peers.close_idle(now)

    def _count_soon(self, count: Callable[[], None]) -> None:
        now = time.monotonic()
        if self._count_at is None:
            self._count_at = now + _COUNT_AFTER
        elif self._count_at <= now:
            self._count_at = None
            count()

    def _run_calls(self) -> None:
        # Only those that were there at the beginning: messages and timers get their turn.
        for _ in range(self._calls.qsize()):
            try:
                call = self._calls.get_nowait()
            except Empty:
                return
            call(time.monotonic())
        if not self._calls.empty():
            self._wakeup.set()

    def _receive(self, handler: Handler, peer: str, frames: list[bytes]) -> None:
        try:
            handler.receive(frames, time.monotonic())
        except UndecodableFrames as reason:
            self.undecodable += 1
            if peer not in self._named_peers and len(self._named_peers) < _MAX_NAMED_PEERS:
                self._named_peers.add(peer)
                logger.warning("relay message from %s dropped, and so will be all like it: %s", peer, reason)

    def send(self, to: Address, frames: Sequence[bytes], *, to_stranger: bool = False) -> None:
        if self._peers is None:
            raise LocalError("a control loop is opened before it sends")
        self._peers.send(to, frames, time.monotonic(), to_stranger=to_stranger)

    @property
    def refused_clients(self) -> int:
        """Who came with a key of CURVE's that is not ours."""
        return self._authenticator.refused if self._authenticator else 0

    @property
    def connections(self) -> int:
        return len(self._peers) if self._peers else 0


def _timeout_ms(*wakeups: float | None) -> int | None:
    """Rounded up: waking too early would only mean to wait again."""
    due = [wakeup for wakeup in wakeups if wakeup is not None]
    return max(0, math.ceil((min(due) - time.monotonic()) * 1000)) if due else None
