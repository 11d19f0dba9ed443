"""One side of the protocol alone, driven message by message: sides to begin with, messages, and what comes of them."""

from collections.abc import Sequence
from typing import TypeVar

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import (
    CopyOut,
    EncodeEffect,
    LanguageEffect,
    Send,
    StatusChanged,
    TransferEmbeddingChunk,
)
from embedding_relay.protocol.encode.side import EncodeSide
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import (
    PROTOCOL_VERSION,
    Address,
    Handshake,
    Have,
    Item,
    Ping,
    Queued,
    Register,
    StatusReport,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Timing

T = TypeVar("T")

BLOCK = 4
TIMING = Timing(bootstrap=30.0, first_word=10.0, waiting=60.0, heartbeat_interval=5.0, heartbeat_max_failures=2)
ENCODE = Address("encode", 1)
ROOM = 7
PROVED = 77
SESSION, KNOWN_AT = "language-0:1", Address("language", 100)
KEY, OTHER_KEY = "0f" * 16, "a1" * 16
PEER, SECOND = "registry:80", "registry2:80"

# ---- messages


def handshake(**changes: object) -> Handshake:
    fields = {
        "version": PROTOCOL_VERSION,
        "block_size": BLOCK,
        "item_lens": (64, 16),
        "dtype": "bfloat16",
        "deepstack_rows": 0,
        "blocks": 8,
        "model": (("name", "a"),),
    }
    return Handshake(**{**fields, **changes})  # type: ignore[arg-type]


def register(rank: int = 0, **changes: object) -> Register:
    return Register(Address("language", 100 + rank), f"language-{rank}:1", (1 << 20, 1 << 21), handshake(**changes))


def offer(
    rows: int, *blocks: int, sent: int = 0, rank: int = 0, ranks: int = 1, room: int = ROOM
) -> TransferEmbeddingInfo:
    """An init, or with `sent` a resume."""
    who = register(rank)
    return TransferEmbeddingInfo(
        room, who.address.host, who.address.port, who.session_id, blocks or (0,), ranks, sent, rows
    )


def queued(rank: int = 0, room: int = ROOM) -> Queued:
    who = register(rank)
    return Queued(room, who.address, who.session_id)


ITEM = Item(KEY, ((2, 5),))


def have(*keys: str, rank: int = 0, room: int = ROOM) -> Have:
    who = register(rank)
    return Have(room, who.address, who.session_id, keys)


def ping(side: EncodeSide, now: float) -> None:
    """The session of rank 0 is heard of."""
    side.receive(Ping(KNOWN_AT, SESSION, "x"), now)


# Another process that registers the session of rank 0.
RIVAL_AT = Address("language", 999)
RIVAL = Register(RIVAL_AT, SESSION, (3 << 20, 3 << 21), handshake())


def rival_offer(room: int) -> TransferEmbeddingInfo:
    return TransferEmbeddingInfo(room, RIVAL_AT.host, RIVAL_AT.port, SESSION, (0, 1), 1, 0, 8)


def report(status: Status, rows: int | None, room: int = ROOM) -> StatusReport:
    return StatusReport(room, status, rows)


# ---- an encode side


def encode_side(blocks: int = 8, timing: Timing = TIMING) -> EncodeSide:
    return EncodeSide(handshake=handshake(), instance="encode-1", pool=BlockPool(blocks), timing=timing)


def encode_side_with(*ranks: int, blocks: int = 8) -> EncodeSide:
    """These language ranks are registered; without any, rank 0."""
    side = encode_side(blocks)
    for rank in ranks or (0,):
        side.receive(register(rank), 0.0)
    return side


def encode_side_that_writes(
    total: int = 20, allocated: int = 8, **changes: object
) -> tuple[EncodeSide, TransferEmbeddingChunk]:
    """The first write of its room is under way; `changes` are of the language rank's handshake."""
    side = encode_side()
    side.receive(register(**changes), 0.0)
    side.expect(ROOM, 0.0)
    side.receive(offer(allocated, 0, 1), 0.0)
    (chunk,) = only(side.submit(ROOM, total, 0.0), TransferEmbeddingChunk)
    return side, chunk


# ---- a language side


def language_side(
    blocks: int = 8,
    default: int | None = 8,
    ranks: int = 1,
    max_rows: int = 1000,
    timing: Timing = TIMING,
    smallest_half: int = 1,
) -> LanguageSide:
    return LanguageSide(
        register=register(blocks=blocks),
        pool=BlockPool(blocks),
        default_tokens=default,
        max_rows=max_rows,
        ranks=ranks,
        timing=timing,
        smallest_half=smallest_half,
    )


def language_side_with_proven_peer(
    blocks: int = 8, default: int | None = 8, max_rows: int = 1000, timing: Timing = TIMING
) -> LanguageSide:
    """The peer has delivered the rows of one room, so that it may have blocks for as many as there are."""
    side = language_side(blocks, default, max_rows=max_rows, timing=timing)
    request_and_resolve(side, PROVED)
    side.receive(report(Status.SUCCESS, 1, room=PROVED), 0.0)
    side.copied(PROVED, 1, 1, 0.0)
    return side


def request_and_resolve(
    side: LanguageSide,
    *rooms: int,
    now: float = 0.0,
    takes_offer_ahead: bool = False,
    takes_have: bool = False,
    held: Sequence[str] = (),
) -> list[LanguageEffect]:
    """The rooms are requested, then their peer is found."""
    for room in rooms or (ROOM,):
        side.request(room, PEER, now, held=held)
    return side.peer_resolved(PEER, ENCODE, "encode-1", now, takes_offer_ahead=takes_offer_ahead, takes_have=takes_have)


def first_offers(side: LanguageSide, *rooms: int) -> dict[int, TransferEmbeddingInfo]:
    """What each room has on offer after its init."""
    messages = sent(request_and_resolve(side, *rooms))
    return {message.room: message for message in messages if isinstance(message, TransferEmbeddingInfo)}


def receive_chunk(side: LanguageSide, rows: int, total: int, now: float = 0.0) -> list[LanguageEffect]:
    """A chunk arrives that ends at `rows`, and is copied out."""
    last = rows == total
    effects = side.receive(report(Status.SUCCESS if last else Status.TRANSFERRING, rows), now)
    (copy,) = only(effects, CopyOut)
    return side.copied(ROOM, min(copy.capacity, total - copy.first_row), total, now)


def language_side_with_two_offers(total: int = 100) -> LanguageSide:
    """Of a room's four blocks, all there are, two are on offer for rows 24 to 31, and two for 32 to 39."""
    side = language_side(blocks=4, default=16)
    request_and_resolve(side, takes_offer_ahead=True)
    effects = [*receive_chunk(side, 16, total), *receive_chunk(side, 24, total)]
    offers = [message for message in sent(effects) if isinstance(message, TransferEmbeddingInfo)]
    assert [(one.sent_tokens, one.dst_embedding_indices) for one in offers[1:]] == [(24, (2, 3)), (32, (0, 1))]
    return side


def waiting_room(room: int = 8) -> LanguageSide:
    """Another peer's room has all blocks, so that this peer has nothing but a room that waits."""
    side = language_side(blocks=2)
    side.request(1, SECOND, 0.0)
    side.peer_resolved(SECOND, Address("other", 1), "encode-2", 0.0)
    assert sent(request_and_resolve(side, room)) == [register(blocks=2), queued(room=room)]
    return side


# ---- what came of it


def counted(side: EncodeSide | LanguageSide) -> dict[str | int, int]:
    """Everything that the side has counted: events by name, failed rooms by status code."""
    counts = side.counts
    return {**{event.value: number for event, number in counts.events.items()}, **counts.failures}


def only(effects: Sequence[EncodeEffect] | Sequence[LanguageEffect], kind: type[T]) -> list[T]:
    return [effect for effect in effects if isinstance(effect, kind)]


def sent(effects: Sequence[EncodeEffect] | Sequence[LanguageEffect]) -> list[object]:
    """The messages among the effects."""
    return [effect.message for effect in only(effects, Send)]


def offer_in(effects: Sequence[LanguageEffect]) -> TransferEmbeddingInfo:
    """The only init or resume among the effects."""
    (info,) = [message for message in sent(effects) if isinstance(message, TransferEmbeddingInfo)]
    return info


def reported_failures(effects: Sequence[EncodeEffect]) -> list[Failure]:
    """What language ranks are told."""
    failures = [message.failure for message in sent(effects) if isinstance(message, StatusReport)]
    return [failure for failure in failures if failure is not None]


def failure_of(effects: Sequence[EncodeEffect] | Sequence[LanguageEffect]) -> Failure | None:
    """What this instance's own half is told."""
    for change in only(effects, StatusChanged):
        if change.status is Status.FAILED:
            return change.failure
    return None
