"""A control loop without a protocol: it writes down what arrives."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from embedding_relay.protocol.errors import UndecodableFrames
from embedding_relay.protocol.messages import Address
from embedding_relay.transport.loop import ControlLoop

MAX_FRAME = 1000


class Recorder:
    """A handler that takes everything but `bad`."""

    def __init__(self, host: str = "127.0.0.1", key: bytes | None = None) -> None:
        self.frames: list[list[bytes]] = []
        self.ticks: list[float] = []
        self.counted = 0
        self.wakeup: float | None = None
        self.arrived = threading.Event()
        self.loop = ControlLoop(host, MAX_FRAME, key)
        self.address = self.loop.open()
        self._thread = threading.Thread(target=self.loop.run, args=(self, self.count))
        self._thread.start()

    def await_frames(self, number: int, patience: float = 10.0) -> None:
        deadline = time.monotonic() + patience
        while len(self.frames) < number:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(self.frames)} of {number} messages arrived"
            self.arrived.wait(left)
            self.arrived.clear()

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        if frames[0] == b"bad":
            raise UndecodableFrames("it says so itself")
        self.frames.append(list(frames))
        self.arrived.set()

    def tick(self, now: float) -> None:
        self.ticks.append(now)
        self.wakeup = None

    def next_wakeup(self) -> float | None:
        return self.wakeup

    def count(self) -> None:
        self.counted += 1

    def send(self, to: Address, *frames: bytes) -> None:
        self.loop.post(lambda now: self.loop.send(to, frames))

    def close(self) -> None:
        self.loop.stop()
        self._thread.join()
