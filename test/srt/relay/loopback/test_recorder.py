"""What both halves of a transfer note of their requests, over real sockets and memory: each offer, chunk and copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from embedding_relay import recorder
from embedding_relay.config import RelayConfig
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.protocol.effects import ChunkDestination
from embedding_relay.protocol.errors import BAD_GATEWAY, Failure
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from embedding_relay.recorder import MOST_ROUNDS, Moment
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.tools.trace_story import Request, Told, line_up
from embedding_relay.transport.encode import _MOST_EARLY_OFFERS, EncodeManager, MooncakeEmbeddingSender
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver
from embedding_relay.transport.workers import ChunkJob
from support.loopback import ENDED, HOST, small_layout
from support.patience import wait_until
from support.rows import LIMITS, Spec, make_rows

LAYOUT = small_layout()
BLOCK = LAYOUT.block_size
WIDE = small_layout(hidden_size=4096)
"""A block has 1 MiB, so that four are halved."""
CONFIG = RelayConfig(default_allocate_tokens=BLOCK, data_plane="shared_memory")
PATIENCE = 30

Pair = tuple[EncodeManager, LanguageManager, str]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with opened_pair(LAYOUT, blocks=1) as pair:  # each round has one block
        yield pair


@contextmanager
def opened_pair(layout: BufferLayout, blocks: int) -> Iterator[Pair]:
    """`blocks`: of the language half."""
    with ExitStack() as opened:
        registry = MooncakeEmbeddingBootstrapServer(HOST, 0)
        opened.callback(registry.close)
        registry.start()
        where = Address(HOST, registry.port)
        encode = EncodeManager.open(layout, CONFIG, host=HOST, bootstrap=where)
        opened.callback(encode.close)
        encode.start()
        small = dataclasses.replace(layout, blocks=blocks)
        language = LanguageManager.open(small, CONFIG, host=HOST, ranks=1, max_rows=100_000, limits=LIMITS)
        opened.callback(language.close)
        language.start()
        yield encode, language, str(where)


def transfer(pair: Pair, room: int, total: int, *, asks_first: bool = False, hint_rows: int | None = None) -> None:
    encode, language, peer = pair
    sender, receiver = MooncakeEmbeddingSender(encode, room), MooncakeEmbeddingReceiver(language, peer, room)
    if asks_first:
        receiver.start(hint_rows)
        wait_until(lambda: room in encode._early_offers, PATIENCE)
    sender.init()
    if not asks_first:
        receiver.start(hint_rows)
    wait_until(lambda: sender.poll() is Status.WAITING_FOR_INPUT, PATIENCE)
    sender.send_embedding(make_rows(encode.layout, Spec(room, total=total)))
    wait_until(lambda: sender.poll() in ENDED and receiver.poll() in ENDED, PATIENCE)
    assert receiver.poll() is Status.SUCCESS


def rows_of(moments: list[Moment], what: str) -> list[tuple[int, int]]:
    return [(moment.first_row, moment.rows) for moment in moments if moment.what == what]


@pytest.mark.parametrize("asks_first", [False, True])
def test_each_round_is_noted_on_both_halves(pair: Pair, asks_first: bool) -> None:
    room, total = 100 + asks_first, 2 * BLOCK + 5
    transfer(pair, room, total, asks_first=asks_first)
    encode, language = (half.recorder.moments(room) for half in pair[:2])
    offers = [(0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, BLOCK)]
    rounds = [(0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 5)]
    assert rows_of(language, recorder.OFFERED) == rows_of(encode, recorder.ASKED) == offers
    for moments, what in (
        (encode, recorder.CHUNK_BEGAN),
        (encode, recorder.CHUNK_WRITTEN),
        (language, recorder.COPY_BEGAN),
        (language, recorder.COPIED),
    ):
        assert rows_of(moments, what) == rounds
    (sent,) = [moment for moment in encode if moment.what == recorder.SENT]
    (complete,) = [moment for moment in language if moment.what == recorder.COMPLETE]
    assert (sent.rows, sent.rounds) == (complete.rows, complete.rounds) == (total, 3)
    assert sent.bytes > 0


def test_what_is_offered_ahead_is_with_the_worker_before_what_comes_first_is_written(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    def write(self: ChunkJob, destination: ChunkDestination, *rest: Any) -> None:
        if destination.start_row == 4 * BLOCK:
            wait_until(lambda: (6 * BLOCK, 2 * BLOCK) in rows_of(encode.recorder.moments(room), began), PATIENCE)
        original(self, destination, *rest)

    original, began = ChunkJob.write, recorder.CHUNK_BEGAN
    monkeypatch.setattr(ChunkJob, "write", write)
    with opened_pair(WIDE, blocks=4) as (encode, language, peer):
        transfer((encode, language, peer), room, 9 * BLOCK, hint_rows=4 * BLOCK)
        offers = rows_of(language.recorder.moments(room), recorder.OFFERED)
        written = rows_of(encode.recorder.moments(room), recorder.CHUNK_WRITTEN)
    halves = [(first * BLOCK, 2 * BLOCK) for first in (4, 6)]
    assert offers[:3] == [(0, 4 * BLOCK), *halves]
    assert written[:3] == offers[:3]


def test_clocks_would_be_lined_up_by_what_is_noted(pair: Pair) -> None:
    """Both halves are in this process, so their clocks do not differ: what is said of two machines must allow that."""
    transfer(pair, 200, 3 * BLOCK)
    told = [
        (Told(mode, mode, 0.0, 0.0, [Request(200, half.recorder.moments(200))]), half.recorder.moments(200))
        for mode, half in zip(("encode", "language"), pair[:2], strict=True)
    ]
    clocks = line_up(*told)
    assert clocks.uncertain is not None
    assert abs(clocks.shift) <= clocks.uncertain


def test_of_very_many_rounds_the_first_are_noted(pair: Pair) -> None:
    transfer(pair, 300, (MOST_ROUNDS + 6) * BLOCK)
    encode, language = (half.recorder.moments(300) for half in pair[:2])
    for moments, what in (
        (encode, recorder.CHUNK_WRITTEN),
        (encode, recorder.ASKED),
        (language, recorder.OFFERED),
        (language, recorder.COPIED),
    ):
        assert MOST_ROUNDS - 1 <= len(rows_of(moments, what)) <= MOST_ROUNDS + 1
    assert [moment.rounds for moment in language if moment.what == recorder.COMPLETE] == [MOST_ROUNDS + 6]


def test_a_failure_is_noted_on_both_halves(pair: Pair) -> None:
    encode, language, peer = pair
    sender, receiver = MooncakeEmbeddingSender(encode, 400), MooncakeEmbeddingReceiver(language, peer, 400)
    sender.init()
    receiver.start()
    sender.refuse(Failure(BAD_GATEWAY, "the tower is ill"))
    wait_until(lambda: sender.poll() in ENDED and receiver.poll() in ENDED, PATIENCE)
    for half in (encode, language):
        (failed,) = [moment for moment in half.recorder.moments(400) if moment.what == recorder.FAILED]
        assert "the tower is ill" in failed.text


def test_rooms_that_anybody_invents_are_not_kept(pair: Pair) -> None:
    """Their offers are of no request that this instance has."""
    encode, language, peer = pair
    before = len(encode.recorder.latest(10_000))
    receivers = [MooncakeEmbeddingReceiver(language, peer, 10_000 + number) for number in range(3)]
    for receiver in receivers:
        receiver.start()
    wait_until(lambda: 10_000 in encode._early_offers, PATIENCE)
    assert len(encode.recorder.latest(10_000)) == before
    assert len(encode._early_offers) <= _MOST_EARLY_OFFERS
    for receiver in receivers:
        receiver.abort()
    wait_until(lambda: all(receiver.poll() in ENDED for receiver in receivers), PATIENCE)
