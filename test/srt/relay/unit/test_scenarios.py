"""The scenarios of the specification (protocol.md section 10), with every byte checked by the simulated world."""

import pytest

from embedding_relay.protocol.status import Status
from embedding_relay.testing.world import World
from support.protocol import counted

W, T, S = Status.WAITING_FOR_INPUT, Status.TRANSFERRING, Status.SUCCESS
ONCE, RESUMED = [W, S], [W, T, S]


def run(total: int, default: int | None, block_size: int = 128, blocks: int = 512, ranks: int = 1) -> World:
    world = World(block_size=block_size, encode_blocks=blocks, language_blocks=[blocks] * ranks, default_tokens=default)
    world.start(7, total)
    world.settle()
    for language in world.languages:
        assert language.delivered[7].rows == total
    return world


@pytest.mark.parametrize(
    ("total", "default", "offers", "statuses"),
    [
        (500, 1024, [(0, 1024)], ONCE),
        (1024, 1024, [(0, 1024)], ONCE),
        (1025, 1024, [(0, 1024), (1024, 128)], RESUMED),
        (2000, 1024, [(0, 1024), (1024, 1024)], RESUMED),
        (2000, 1200, [(0, 1200), (1200, 896)], RESUMED),
    ],
)
def test_offers_and_statuses(total: int, default: int, offers: list[tuple[int, int]], statuses: list[Status]) -> None:
    world = run(total, default)
    language = world.languages[0]
    assert [(offer.sent_tokens, offer.allocated_tokens) for offer in language.offers] == offers
    assert language.journal.history[7] == statuses
    assert next(iter(world.encodes.values())).journal.history[7] == statuses


def test_the_second_transfer_begins_within_a_source_block() -> None:
    """1200 = 9 blocks and 48 rows: the rest starts 48 rows into a block, and at the beginning of one over there."""
    world = World(default_tokens=1200)
    encode, language = next(iter(world.encodes.values())), world.languages[0]
    world.start(7, 2000)
    starts = []
    while 7 not in language.delivered:
        if encode.jobs:
            (destination,) = encode.jobs[0][0].destinations
            starts.append((destination.start_row, destination.first_row, destination.stop_row, destination.with_aux))
            repeated = language.offers[0]
            encode.run(encode.core.receive(repeated, world.clock.now))  # a repeated send request in between
            encode.run(encode.core.submit(7, 2000, world.clock.now))
        if not world._step():
            break
    assert starts == [(0, 0, 1200, True), (1200, 1200, 2000, False)]
    assert counted(encode.core) == {"init_repeated": 2, "submit_repeated": 2}


@pytest.mark.parametrize("blocks", [10, 512])
def test_ten_thousand_rows_take_ten_transfers_or_fewer(blocks: int) -> None:
    """Eight blocks are 1024 rows. Of a pool of eight, one encode instance may have seven."""
    world = run(10_000, 1024, blocks=blocks)
    assert world.languages[0].delivered[7].rounds <= 10


@pytest.mark.parametrize("encode_blocks", [1, 3, 8000])
def test_a_hundred_thousand_rows_through_one_block_of_sixteen(encode_blocks: int) -> None:
    world = World(block_size=16, encode_blocks=encode_blocks, language_blocks=(1,), default_tokens=16)
    world.start(7, 100_000)
    world.settle()
    assert world.languages[0].delivered[7].rounds == 6250


def test_sixty_four_requests_share_eight_blocks() -> None:
    world = World(encode_blocks=8, language_blocks=(8,))
    for room in range(64):
        world.start(room, 2000)
    world.settle()
    assert len(world.languages[0].delivered) == 64
    assert list(world.languages[0].delivered) == sorted(world.languages[0].delivered), "first come, first served"
    assert world.languages[0].core.sizes()["blocks_free"] == 8
    assert next(iter(world.encodes.values())).core.sizes()["blocks_free"] == 8


@pytest.mark.parametrize("encode_blocks", [2, 64])
@pytest.mark.parametrize("defaults", [(1024, 1024), (1024, 300), (128, 2000), (1, 1)])
def test_one_encode_rank_and_two_language_ranks(encode_blocks: int, defaults: tuple[int, int]) -> None:
    """Ranks may offer different amounts; each gets the same rows."""
    world = World(encode_blocks=encode_blocks, language_blocks=(64, 40), default_tokens=defaults)
    world.start(7, 2000, media_runs=[(10, 900), (905, 1990)])
    world.settle()
    for language in world.languages:
        assert language.delivered[7].rows == 2000


def test_two_encode_ranks_and_one_language_rank() -> None:
    """Every encode rank has all rows, so the language rank asks one of them and the other is not needed."""
    world = World(encodes=2)
    world.start(7, 2000, peer="registry1:80")
    world.settle()
    assert world.languages[0].delivered[7].rounds == 2
    assert world.encodes["registry0:80"].core.is_empty()


def test_only_media_rows_of_the_embeddings_travel() -> None:
    world = World()
    encode = next(iter(world.encodes.values()))
    world.start(7, 300, media_runs=[(20, 120), (125, 280)])
    written: list[int] = []
    watch = world.fabric.on_landing
    assert watch is not None

    def count(label: object, session: str, entry: object) -> None:
        written.append(entry.length)  # type: ignore[attr-defined]

    world.fabric.on_landing = count  # type: ignore[assignment]
    world.settle()
    embeddings, ids, aux, items = 255 * 8, 300 * 4, 8, 300 * 2
    assert sum(written) == embeddings + ids + aux + items
    assert encode.core.is_empty()
