"""One side of the protocol alone, driven message by message."""

from collections.abc import Sequence
from typing import TypeVar

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import EncodeEffect, LanguageEffect, Send, StatusChanged
from embedding_relay.protocol.encode.side import EncodeSide
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import (
    PROTOCOL_VERSION,
    Address,
    Handshake,
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


def handshake(**changes: object) -> Handshake:
    fields = {
        "version": PROTOCOL_VERSION,
        "block_size": BLOCK,
        "item_lens": (64, 16),
        "dtype": "bfloat16",
        "deepstack_rows": 0,
        "blocks": 8,
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


def encode_side(blocks: int = 8, timing: Timing = TIMING) -> EncodeSide:
    return EncodeSide(handshake=handshake(), instance="encode-1", pool=BlockPool(blocks), timing=timing)


def language_side(
    blocks: int = 8, default: int | None = 8, ranks: int = 1, max_rows: int = 1000, timing: Timing = TIMING
) -> LanguageSide:
    return LanguageSide(
        register=register(blocks=blocks),
        pool=BlockPool(blocks),
        default_tokens=default,
        max_rows=max_rows,
        ranks=ranks,
        timing=timing,
    )


def counted(side: EncodeSide | LanguageSide) -> dict[str | int, int]:
    """Everything that the side has counted: events by name, failed rooms by status code."""
    counts = side.counts
    return {**{event.value: number for event, number in counts.events.items()}, **counts.failures}


def only(effects: Sequence[EncodeEffect] | Sequence[LanguageEffect], kind: type[T]) -> list[T]:
    return [effect for effect in effects if isinstance(effect, kind)]


def sent(effects: Sequence[EncodeEffect] | Sequence[LanguageEffect]) -> list[object]:
    """The messages among the effects."""
    return [effect.message for effect in only(effects, Send)]


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
