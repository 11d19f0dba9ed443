"""Rows from a card to a card, between two processes, by either data plane: in one round, and resumed."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch

from embedding_relay.config import MOONCAKE, SHARED_MEMORY, RelayConfig
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.protocol.status import Status
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver
from support.device_rows import HOST, encode_instance, wait_until
from support.rows import LIMITS, Spec, make_rows

LAYOUT = BufferLayout(hidden_size=512, dtype="bfloat16", deepstack_rows=1, block_size=128, blocks=64)
SMALL = BufferLayout(hidden_size=512, dtype="bfloat16", deepstack_rows=1, block_size=128, blocks=8)
_spawn = multiprocessing.get_context("spawn")  # a process that has used the card must not be forked


@pytest.fixture(scope="module")
def rows() -> int:
    return 5000


@pytest.fixture(scope="module")
def encode(rows: int) -> Iterator[tuple[Connection, str]]:
    here, there = _spawn.Pipe()
    process = _spawn.Process(target=encode_instance, args=(there, LAYOUT, rows))
    process.start()
    yield here, f"{HOST}:{here.recv()}"
    here.send(None)
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("plane", [MOONCAKE, SHARED_MEMORY])
@pytest.mark.parametrize(("layout", "rounds"), [(LAYOUT, 1), (SMALL, 5)], ids=["in one round", "resumed"])
def test_every_bit_arrives(
    encode: tuple[Connection, str], rows: int, device: torch.device, layout: BufferLayout, rounds: int, plane: str
) -> None:
    pipe, peer = encode
    config = RelayConfig(data_plane=plane)
    manager = LanguageManager.open(layout, config, host=HOST, ranks=1, max_rows=rows, limits=LIMITS, device="cuda")
    manager.start()
    room = layout.blocks + (plane == MOONCAKE)
    pipe.send(room)
    receiver = MooncakeEmbeddingReceiver(manager, peer, room)
    receiver.start()
    wait_until(manager, receiver, Status.SUCCESS, Status.FAILED)
    assert receiver.failure() is None
    received = receiver.rows()
    there = received.embeddings.to(device, non_blocking=True)
    expected = make_rows(LAYOUT, Spec(room, rows))
    assert torch.equal(received.fill_ids, expected.fill_ids)
    for start, values in expected.segments:
        here = there[start : start + len(values)]
        assert torch.equal(here.view(torch.int16), values.to(device).view(torch.int16))
    assert receiver.rounds >= rounds
    manager.close()
