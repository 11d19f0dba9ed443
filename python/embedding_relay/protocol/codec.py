"""Frames <-> messages, and the only place that tells messages apart by their frames.

To the encode side:   register 6, queued 5, init 7, resume 8 frames; have 6, abort 5 or 6; ping 5.
To the language side: status 2, 3 or, with items that are held there, 4 frames; progress 3, manifest 3, acknowledged
abort 2, pong 3 frames.

A word in a fixed place tells those of equal length apart: the first frame of register, ping and pong; the fifth of
queued, have and abort; the second of progress, manifest and acknowledged abort. Keys and items are JSON in one frame.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Annotated, Final, TypeVar

import msgspec

from embedding_relay.protocol.errors import BAD_GATEWAY, Failure, UndecodableFrames
from embedding_relay.protocol.messages import (
    HOST,
    MAX_BLOCKS,
    MAX_COLUMNS,
    MAX_ITEMS,
    MAX_ROOM,
    MAX_ROWS,
    Abort,
    AbortAck,
    Address,
    Handshake,
    Have,
    Item,
    Manifest,
    Ping,
    Pong,
    Progress,
    Queued,
    Register,
    StatusReport,
    ToEncode,
    ToLanguage,
    TransferEmbeddingInfo,
    flaw_of_items,
)
from embedding_relay.protocol.status import Status

T = TypeVar("T")

MAX_RANKS: Final = 1024
MAX_TEXT: Final = 256
MAX_REASON: Final = 4096
MAX_HANDSHAKE: Final = 4096
# Every run there can be, with row numbers of seven digits, and every key. A list that is longer is not sent.
MAX_ITEM_BYTES: Final = 1 << 20

MAX_FRAMES: Final = 8
# The longest frame is the list of indices: seven digits and a comma for every block there can be.
MAX_FRAME_BYTES: Final = MAX_BLOCKS * 8

_REGISTER: Final = b"None"
_QUEUED: Final = b"QUEUED"
_ABORT: Final = b"ABORT"
_ABORTED: Final = b"ABORTED"
_PROGRESS: Final = b"PROGRESS"
_MANIFEST: Final = b"MANIFEST"
_HAVE: Final = b"HAVE"
_PING: Final = b"PING"
_PONG: Final = b"PONG"

_LAST_STATUS: Final = max(status.value for status in Status)

_INTEGER: Final = re.compile(rb"0|[1-9][0-9]{0,18}")
_INDICES: Final = re.compile(rb"(?:0|[1-9][0-9]{0,6})(?:,(?:0|[1-9][0-9]{0,6}))*")
_HOST: Final = re.compile(HOST.encode())
_WORD: Final = re.compile(rb"[!-~]{1,%d}" % MAX_TEXT)
_REASON: Final = re.compile(r"([45][0-9]{2}) (.*)", re.DOTALL)

_Key = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
_KEYS: Final = msgspec.json.Decoder(Annotated[tuple[_Key, ...], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)])
_ITEMS: Final = msgspec.json.Decoder(Annotated[tuple[Item, ...], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)])


# ---- messages -> frames


def encode(message: ToEncode | ToLanguage) -> list[bytes]:
    if isinstance(message, TransferEmbeddingInfo):
        return _encode_info(message)
    if isinstance(message, StatusReport):
        return _encode_report(message)
    if isinstance(message, Progress):
        return [_integer(message.room), _PROGRESS, _integer(message.rows)]
    if isinstance(message, Register):
        pointers = message.buffer_pointers
        packed = struct.pack(f"<{len(pointers)}Q", *pointers)
        handshake = msgspec.json.encode(message.handshake)
        return [_REGISTER, *_sender(message.address, message.session_id), packed, handshake]
    if isinstance(message, Queued):
        return [_integer(message.room), *_sender(message.address, message.session_id), _QUEUED]
    if isinstance(message, Abort):
        reason = [] if message.failure is None else [_encode_failure(message.failure)]
        return [_integer(message.room), *_sender(message.address, message.session_id), _ABORT, *reason]
    if isinstance(message, Have):
        keys = msgspec.json.encode(message.keys)
        return [_integer(message.room), *_sender(message.address, message.session_id), _HAVE, keys]
    if isinstance(message, Ping):
        return [_PING, *_sender(message.address, message.session_id), message.instance.encode()]
    if isinstance(message, Manifest):
        return [_integer(message.room), _MANIFEST, msgspec.json.encode(message.items)]
    if isinstance(message, AbortAck):
        return [_integer(message.room), _ABORTED]
    return [_PONG, message.instance.encode(), message.asked.encode()]


def _encode_info(info: TransferEmbeddingInfo) -> list[bytes]:
    frames = [
        _integer(info.room),
        *_sender(info.address, info.mooncake_session_id),
        ",".join(map(str, info.dst_embedding_indices)).encode(),
        _integer(info.required_dst_info_num),
    ]
    if info.is_resume:
        frames.append(_integer(info.sent_tokens))
    return [*frames, _integer(info.allocated_tokens)]


def _encode_report(report: StatusReport) -> list[bytes]:
    frames = [_integer(report.room), _integer(report.status.value)]
    if report.failure is not None:
        frames.append(_encode_failure(report.failure))
    elif report.rows is not None:
        frames.append(_integer(report.rows))
        if report.held:
            frames.append(msgspec.json.encode(report.held))
    return frames


def _encode_failure(failure: Failure) -> bytes:
    """A reason may quote a file name or a foreign exception: what is not ASCII is escaped, what is long is cut."""
    return str(failure).encode("ascii", "backslashreplace")[:MAX_REASON]


def _sender(address: Address, session_id: str) -> list[bytes]:
    return [address.host.encode(), _integer(address.port), session_id.encode()]


def _integer(value: int) -> bytes:
    return b"%d" % value


# ---- frames -> messages


def decode_to_encode(frames: Sequence[bytes]) -> ToEncode:
    _check_sizes(frames)
    if not frames:
        raise UndecodableFrames("no frames")
    if frames[0] == _REGISTER:
        return _decode_register(frames)
    if frames[0] == _PING:
        return _decode_ping(frames)
    if len(frames) == 5 and frames[4] == _QUEUED:
        return Queued(_decode_integer(frames[0], 0, MAX_ROOM), *_decode_sender(frames))
    if len(frames) == 6 and frames[4] == _HAVE:
        keys = _decode_json(frames[5], _KEYS)
        return Have(_decode_integer(frames[0], 0, MAX_ROOM), *_decode_sender(frames), keys)
    if len(frames) in (5, 6) and frames[4] == _ABORT:
        address, session_id = _decode_sender(frames)
        failure = _decode_failure(frames[5]) if len(frames) == 6 else None
        return Abort(_decode_integer(frames[0], 0, MAX_ROOM), address, session_id, failure)
    if len(frames) in (7, 8):
        return _decode_info(frames)
    raise UndecodableFrames(f"{len(frames)} frames that begin with {frames[0][:20]!r} are no message to an encode side")


def decode_to_language(frames: Sequence[bytes]) -> ToLanguage:
    _check_sizes(frames)
    if len(frames) == 3 and frames[0] == _PONG:
        return Pong(_decode_word(frames[1]), _decode_word(frames[2]))
    if len(frames) == 3 and frames[1] == _PROGRESS:
        return Progress(_decode_integer(frames[0], 0, MAX_ROOM), _decode_integer(frames[2], 1, MAX_ROWS))
    if len(frames) == 3 and frames[1] == _MANIFEST:
        return Manifest(_decode_integer(frames[0], 0, MAX_ROOM), _decode_items(frames[2]))
    if len(frames) == 2 and frames[1] == _ABORTED:
        return AbortAck(_decode_integer(frames[0], 0, MAX_ROOM))
    if len(frames) in (2, 3, 4):
        return _decode_report(frames)
    raise UndecodableFrames(f"{len(frames)} frames are no message to a language side")


def _decode_register(frames: Sequence[bytes]) -> Register:
    if len(frames) != 6:
        raise UndecodableFrames(f"a registration of {len(frames)} frames")
    address, session_id = _decode_sender(frames)
    packed = frames[4]
    if not packed or len(packed) % 8 or len(packed) > 8 * MAX_COLUMNS:
        raise UndecodableFrames(f"{len(packed)} bytes of buffer pointers")
    pointers = struct.unpack(f"<{len(packed) // 8}Q", packed)
    if len(frames[5]) > MAX_HANDSHAKE or not frames[5].isascii():
        raise UndecodableFrames(f"a handshake of {len(frames[5])} bytes that is too long or not ASCII")
    try:
        handshake = msgspec.json.decode(frames[5], type=Handshake)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UndecodableFrames(f"a handshake that cannot be read: {error}") from None
    if len(handshake.item_lens) != len(pointers):
        raise UndecodableFrames(f"{len(pointers)} buffer pointers and {len(handshake.item_lens)} item lengths")
    columns = list(zip(pointers, handshake.item_lens, strict=True))
    if handshake.records is not None:
        columns.append((handshake.records[0], handshake.records[1] * handshake.block_size))
    for pointer, item_len in columns:
        if pointer == 0 or pointer + handshake.blocks * item_len > 1 << 64:
            raise UndecodableFrames(f"{handshake.blocks} blocks of {item_len} bytes cannot be at {pointer:#x}")
    return Register(address, session_id, pointers, handshake)


def _decode_ping(frames: Sequence[bytes]) -> Ping:
    if len(frames) != 5:
        raise UndecodableFrames(f"a ping of {len(frames)} frames")
    address, session_id = _decode_sender(frames)
    return Ping(address, session_id, _decode_word(frames[4]))


def _decode_info(frames: Sequence[bytes]) -> TransferEmbeddingInfo:
    address, session_id = _decode_sender(frames)
    is_resume = len(frames) == 8
    return TransferEmbeddingInfo(
        room=_decode_integer(frames[0], 0, MAX_ROOM),
        endpoint=address.host,
        dst_port=address.port,
        mooncake_session_id=session_id,
        dst_embedding_indices=_decode_indices(frames[4]),
        required_dst_info_num=_decode_integer(frames[5], 1, MAX_RANKS),
        sent_tokens=_decode_integer(frames[6], 1, MAX_ROWS) if is_resume else 0,
        allocated_tokens=_decode_integer(frames[-1], 1, MAX_ROWS),
    )


def _decode_report(frames: Sequence[bytes]) -> StatusReport:
    room = _decode_integer(frames[0], 0, MAX_ROOM)
    status = Status(_decode_integer(frames[1], 0, _LAST_STATUS))
    if len(frames) == 2:
        return StatusReport(room, status)
    if status is Status.FAILED and len(frames) == 3:
        return StatusReport(room, status, failure=_decode_failure(frames[2]))
    if status in (Status.TRANSFERRING, Status.SUCCESS):
        held = _decode_held(frames[3]) if len(frames) == 4 else ()
        return StatusReport(room, status, rows=_decode_integer(frames[2], 1, MAX_ROWS), held=held)
    raise UndecodableFrames(f"{len(frames)} frames with status {status.name}")


def _decode_held(frame: bytes) -> tuple[Item, ...]:
    held = _decode_items(frame)
    if not all(item.key for item in held):
        raise UndecodableFrames("an item without a key that is said to be held")
    return held


def _decode_items(frame: bytes) -> tuple[Item, ...]:
    items: tuple[Item, ...] = _decode_json(frame, _ITEMS)
    if flaw := flaw_of_items(items):
        raise UndecodableFrames(f"items that cannot be read: {flaw}")
    return items


def _decode_json(frame: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    if len(frame) > MAX_ITEM_BYTES or not frame.isascii():
        raise UndecodableFrames(f"keys or items of {len(frame)} bytes that are too long or not ASCII")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UndecodableFrames(f"keys or items that cannot be read: {error}") from None


def _decode_sender(frames: Sequence[bytes]) -> tuple[Address, str]:
    host = frames[1]
    if not _HOST.fullmatch(host):
        raise UndecodableFrames(f"{host[:24]!r} is no host")
    return Address(host.decode("ascii"), _decode_integer(frames[2], 1, 65535)), _decode_word(frames[3])


def _decode_failure(frame: bytes) -> Failure:
    """Another implementation may give a bare sentence; its code is then ours to choose."""
    if len(frame) > MAX_REASON or not frame.isascii():
        raise UndecodableFrames(f"a reason of {len(frame)} bytes that is too long or not ASCII")
    text = frame.decode("ascii")
    match = _REASON.fullmatch(text)
    return Failure(int(match[1]), match[2]) if match else Failure(BAD_GATEWAY, text)


def _decode_indices(frame: bytes) -> tuple[int, ...]:
    # At once: a stranger's list of a million indices must not cost a million calls.
    indices = tuple(map(int, frame.split(b","))) if _INDICES.fullmatch(frame) else ()
    if not indices or max(indices) >= MAX_BLOCKS:
        raise UndecodableFrames(f"{frame[:24]!r} are no block indices below {MAX_BLOCKS}")
    if len(set(indices)) != len(indices):
        raise UndecodableFrames("a block index that is named twice")
    return indices


def _decode_integer(frame: bytes, lowest: int, highest: int) -> int:
    # One spelling per number: int() also takes signs, spaces, underscores and leading zeros.
    if not _INTEGER.fullmatch(frame) or not lowest <= (value := int(frame)) <= highest:
        raise UndecodableFrames(f"{frame[:24]!r} is no integer of {lowest}..{highest}")
    return value


def _decode_word(frame: bytes) -> str:
    if not _WORD.fullmatch(frame):
        raise UndecodableFrames(f"{frame[:24]!r} is not 1 to {MAX_TEXT} printable ASCII characters")
    return frame.decode("ascii")


def _check_sizes(frames: Sequence[bytes]) -> None:
    if len(frames) > MAX_FRAMES or max(map(len, frames), default=0) > MAX_FRAME_BYTES:
        raise UndecodableFrames(f"{len(frames)} frames of up to {max(map(len, frames))} bytes are too much")
