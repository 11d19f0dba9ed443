"""The table of legal moves, every message in every status of either side, and rooms that are over."""

import pytest

from embedding_relay.protocol.errors import Failure, IllegalMove, not_registered
from embedding_relay.protocol.messages import (
    Abort,
    AbortAck,
    Ping,
    Pong,
    Queued,
    StatusReport,
    ToEncode,
    ToLanguage,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import LEGAL_MOVES, Status, is_final, move
from embedding_relay.testing.nodes import EncodeNode, LanguageNode
from embedding_relay.testing.world import World

B, W, T, S, F = (
    Status.BOOTSTRAPPING,
    Status.WAITING_FOR_INPUT,
    Status.TRANSFERRING,
    Status.SUCCESS,
    Status.FAILED,
)

# The specification, written down a second time.
ALLOWED = {(B, W), (B, F), (W, T), (W, S), (W, F), (T, T), (T, S), (T, F)}

ROOM, TOTAL = 7, 20
# Of the only language rank of a new world.
SESSION = "language-4:1"


@pytest.mark.parametrize("current", list(Status))
@pytest.mark.parametrize("wanted", list(Status))
def test_every_move_is_in_the_table_or_refused(current: Status, wanted: Status) -> None:
    if (current, wanted) in ALLOWED:
        assert move(current, wanted) is wanted
    else:
        with pytest.raises(IllegalMove, match=f"{current.name} to {wanted.name}"):
            move(current, wanted)


def test_every_status_has_an_entry_and_the_final_ones_are_final() -> None:
    assert set(LEGAL_MOVES) == set(Status)
    assert {status for status in Status if is_final(status)} == {S, F}


def test_the_numbers_on_the_wire_are_those_of_sglang() -> None:
    assert {status.name: status.value for status in Status} == {
        "FAILED": 0,
        "BOOTSTRAPPING": 1,
        "WAITING_FOR_INPUT": 2,
        "TRANSFERRING": 3,
        "SUCCESS": 4,
    }


def world_in(status: Status) -> tuple[World, EncodeNode, LanguageNode]:
    """A room of 20 rows and a first offer of 8, brought to a status on both sides."""
    world = World(block_size=4, encode_blocks=8, language_blocks=(2,), default_tokens=8)
    encode, language = next(iter(world.encodes.values())), world.languages[0]
    world.start(ROOM, TOTAL)
    if status is B:
        return world, encode, language
    language.look_up()
    while world.in_flight:
        world.deliver()
    if status is F:
        encode.refuse(ROOM, Failure(400, "a bad image"))
    elif status in (T, S):
        encode.run_tower()
        encode.write()
    world.settle() if status in (S, F) else [world.deliver() for _ in list(world.in_flight)]
    assert encode.journal.statuses[ROOM] is status
    assert language.journal.statuses[ROOM] is status
    return world, encode, language


def messages_to_encode(language: LanguageNode) -> dict[str, ToEncode]:
    register = language.core._shared.register

    def info(sent: int, ranks: int = 1, blocks: tuple[int, ...] = (0, 1)) -> TransferEmbeddingInfo:
        where = language.address
        return TransferEmbeddingInfo(ROOM, where.host, where.port, register.session_id, blocks, ranks, sent, 8)

    return {
        "register": register,
        "queued": Queued(ROOM, language.address, register.session_id),
        "init": info(0),
        "init of other blocks": info(0, blocks=(1, 0)),
        "init of another number of ranks": info(0, ranks=2),
        "resume of this chunk": info(8),
        "resume of the next chunk": info(16),
        "resume of no chunk": info(5),
        "abort": Abort(ROOM, language.address, register.session_id),
        "ping": Ping(language.address, register.session_id, "encode-2"),
    }


@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("name", list(messages_to_encode(World(encode_blocks=1).languages[0])))
@pytest.mark.parametrize("times", [1, 2])
def test_every_message_to_an_encode_room_in_every_status(status: Status, name: str, times: int) -> None:
    """Whatever comes, once or twice, moves are legal (the journal checks), and both sides come to the same end."""
    world, encode, language = world_in(status)
    message = messages_to_encode(language)[name]
    for _ in range(times):
        encode.run(encode.core.receive(message, world.clock.now))
        if is_final(status):
            assert encode.journal.statuses[ROOM] is status
    world.settle()
    assert is_final(encode.journal.statuses[ROOM])
    if name == "abort":
        # The rank did not send it, so the acknowledgement means nothing to it; its own deadline helps.
        world.advance(world.timing.waiting, between=world.settle)
    assert is_final(language.journal.statuses[ROOM])
    if name == "abort" and not is_final(status):
        assert encode.journal.statuses[ROOM] is F
    if name in ("register", "ping", "queued", "resume of no chunk", "resume of the next chunk") and status is not F:
        assert encode.journal.statuses[ROOM] is S
    if name in ("init", "init of other blocks") and status in (W, T):
        assert language.journal.statuses[ROOM] is S


MESSAGES_TO_LANGUAGE: dict[str, ToLanguage] = {
    "bootstrapping": StatusReport(ROOM, B),
    "waiting for input": StatusReport(ROOM, W),
    "transferring without rows": StatusReport(ROOM, T),
    "transferring, this offer": StatusReport(ROOM, T, rows=8),
    "transferring, the next offer": StatusReport(ROOM, T, rows=16),
    "success without rows": StatusReport(ROOM, S),
    "success, this offer": StatusReport(ROOM, S, rows=8),
    "success, all rows": StatusReport(ROOM, S, rows=TOTAL),
    "failed": StatusReport(ROOM, F, failure=Failure(400, "a bad image")),
    "failed without reason": StatusReport(ROOM, F),
    "not registered": StatusReport(ROOM, F, failure=not_registered(SESSION)),
    "somebody else not registered": StatusReport(ROOM, F, failure=not_registered("stranger-0:1")),
    "abort acknowledged": AbortAck(ROOM),
    "pong": Pong("encode-2", "encode-2"),
    "pong of a stranger": Pong("encode-99", "encode-98"),
}


@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("name", list(MESSAGES_TO_LANGUAGE))
@pytest.mark.parametrize("times", [1, 2])
def test_every_message_to_a_language_room_in_every_status(status: Status, name: str, times: int) -> None:
    world, _, language = world_in(status)
    assert language.plane.session_id == SESSION
    for _ in range(times):
        language.run(language.core.receive(MESSAGES_TO_LANGUAGE[name], world.clock.now))
        if is_final(status):
            assert language.journal.statuses[ROOM] is status
    if name in ("failed", "failed without reason") and status in (W, T):
        assert language.journal.statuses[ROOM] is F
    world.settle()
    assert is_final(language.journal.statuses[ROOM])
    harmless = ("bootstrapping", "waiting for input", "somebody else not registered", "abort acknowledged")
    if name in (*harmless, "pong", "pong of a stranger") and status is not F:
        assert language.journal.statuses[ROOM] is S
    assert language.core.sizes()["blocks_leased"] == 0
