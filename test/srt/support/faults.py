"""Processes that are stopped and killed at random moments: how often, and what the other requests must not notice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from embedding_relay.protocol.effects import Send
from embedding_relay.protocol.messages import TransferEmbeddingInfo
from embedding_relay.protocol.status import Status
from embedding_relay.transport.language import MooncakeEmbeddingReceiver
from support.loopback import ENDED, EncodeInstance, LanguageRank
from support.rooms import next_room
from support.rows import Spec

DAILY = 2  # over each data plane
ROUNDS = int(os.environ.get("RELAY_FAULT_ROUNDS", DAILY))
SEED = int(os.environ.get("RELAY_FAULT_SEED", random.SystemRandom().randrange(2**32)))

# The limit of the daily lane is for a few rounds.
unhurried = pytest.mark.timeout(120 + 10 * ROUNDS)


class Offers:
    """What the language rank has offered to whom, seen where it goes on the wire: not asked from the pool."""

    def __init__(self, language: LanguageRank) -> None:
        self._manager = language.manager
        self._send = self._manager._send
        column = language.manager._buffers._memory["input_embeddings"]
        self._memory = column.view(language.layout.blocks, -1)[:, ::4096]
        self._last: dict[int, tuple[int, ...]] = {}
        self._frozen: dict[int, MooncakeEmbeddingReceiver] = {}
        self.violations: list[str] = []

    def __enter__(self) -> Offers:
        self._manager._send = self._note  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._manager._send = self._send  # type: ignore[method-assign]

    def _note(self, effect: Send) -> None:
        if isinstance(effect.message, TransferEmbeddingInfo):
            self._check(effect.message)
        self._send(effect)

    def _check(self, info: TransferEmbeddingInfo) -> None:
        for room, receiver in self._frozen.items():
            both = set(self._last.get(room, ())) & set(info.dst_embedding_indices)
            if room != info.room and both and receiver.poll() is not Status.SUCCESS:
                self.violations.append(f"blocks {both} of room {room} were offered to room {info.room}")
        self._last[info.room] = info.dst_embedding_indices

    @contextmanager
    def frozen(self, receiver: MooncakeEmbeddingReceiver) -> Iterator[None]:
        """Its writer is stopped: what was offered to it may be written to when it goes on."""
        self._frozen = {receiver.room: receiver}
        yield
        self._frozen = {}

    def were_made_to(self, room: int) -> bool:
        """If not, its encode instance was stopped before anybody had found it, and knows of no block."""
        return room in self._last

    def sample(self, room: int) -> torch.Tensor:
        """Some bytes of the blocks that the room was offered last."""
        return self._memory[list(self._last.get(room, ()))]


class Traffic:
    """The other requests of the language rank, from an encode instance that nothing happens to."""

    def __init__(self, language: LanguageRank, encode: EncodeInstance, chance: random.Random, most_rows: int) -> None:
        self._language = language
        self._encode = encode
        self._chance = chance
        self._most_rows = most_rows
        self.requests = 0

    def until(self, condition: Callable[[], bool], at_least: int = 0, patience: float = 30.0) -> None:
        """Request after request, each compared bit for bit."""
        deadline, enough = time.monotonic() + patience, self.requests + at_least
        while self.requests < enough or not condition():
            assert time.monotonic() < deadline, f"nothing came of it: {self._language.manager.metrics()}"
            total = self._chance.randint(1, self._most_rows)
            self._language.receive(self._encode, Spec(next_room(), total), hint_rows=self._chance.choice([128, 512]))
            self.requests += 1


def wait_for_bytes(offers: Offers, receiver: MooncakeEmbeddingReceiver) -> None:
    """Until something has been written to the blocks of the room, or it has ended."""
    deadline = time.monotonic() + 10
    before = offers.sample(receiver.room)
    while receiver.poll() not in ENDED and time.monotonic() < deadline:
        now = offers.sample(receiver.room)
        if now.shape == before.shape and not torch.equal(now, before):
            return
        before = now


@contextmanager
def stopped(encode: EncodeInstance) -> Iterator[None]:
    encode.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        encode.signal(signal.SIGCONT)
