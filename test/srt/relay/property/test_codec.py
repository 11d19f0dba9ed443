"""Frames and messages: what is encoded is decoded to the same, and no frames whatever raise anything else."""

import contextlib
import itertools

from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.protocol import codec
from embedding_relay.protocol.errors import Failure, UndecodableFrames
from embedding_relay.protocol.messages import (
    MAX_ROOM,
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
)
from embedding_relay.protocol.status import Status
from support.effort import effort, unhurried

pytestmark = unhurried

words = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=codec.MAX_TEXT)
short_words = words.filter(lambda word: len(word) <= 64)
rooms = st.integers(0, MAX_ROOM)
rows = st.integers(1, codec.MAX_ROWS)
hosts = st.from_regex(r"[0-9A-Za-z][0-9A-Za-z_.:%-]{0,60}|::[0-9a-f]{1,4}", fullmatch=True)
addresses = st.builds(Address, hosts, st.integers(1, 65535))
sentences = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200)
failures = st.builds(Failure, st.integers(400, 599), sentences)
indices = st.lists(st.integers(0, codec.MAX_BLOCKS - 1), min_size=1, max_size=40, unique=True).map(tuple)


keys = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)


@st.composite
def items(draw: st.DrawFn, keys: st.SearchStrategy[str]) -> tuple[Item, ...]:
    """In any order of their rows, each with one run or several."""
    edges = sorted(draw(st.sets(st.integers(0, codec.MAX_ROWS), min_size=2, max_size=30)))
    runs = list(itertools.pairwise(edges))[:: draw(st.integers(1, 2))]
    owners = [draw(st.integers(0, 5)) for _ in runs]
    own = [tuple(run for run, owner in zip(runs, owners, strict=True) if owner == one) for one in set(owners)]
    return tuple(Item(draw(keys), part) for part in draw(st.permutations(own)))


@st.composite
def registers(draw: st.DrawFn) -> Register:
    columns = draw(st.integers(1, 8))
    lens = tuple(draw(st.lists(st.integers(1, 2**40), min_size=columns, max_size=columns)))
    blocks = draw(st.integers(1, codec.MAX_BLOCKS))
    pointers = tuple(draw(st.integers(1, 2**64 - blocks * item_len)) for item_len in lens)
    dtype = draw(short_words)
    facts = tuple(draw(st.lists(st.tuples(short_words, short_words), max_size=5)))
    memory = draw(st.sampled_from(["", "0f" * 16]))
    handshake = Handshake(1, draw(st.integers(1, 4096)), lens, dtype, draw(st.integers(0, 9)), blocks, facts, memory)
    return Register(draw(addresses), draw(words), pointers, handshake)


infos = st.builds(
    TransferEmbeddingInfo,
    room=rooms,
    endpoint=hosts,
    dst_port=st.integers(1, 65535),
    mooncake_session_id=words,
    dst_embedding_indices=indices,
    required_dst_info_num=st.integers(1, codec.MAX_RANKS),
    sent_tokens=st.just(0) | rows,
    allocated_tokens=rows,
)
to_encode = st.one_of(
    registers(),
    infos,
    st.builds(Queued, rooms, addresses, words),
    st.builds(Have, rooms, addresses, words, st.lists(keys, min_size=1, max_size=20).map(tuple)),
    st.builds(Abort, rooms, addresses, words, st.none() | failures),
    st.builds(Ping, addresses, words, words),
)
reports = st.one_of(
    st.builds(StatusReport, rooms, st.sampled_from(Status)),
    st.builds(StatusReport, rooms, st.sampled_from([Status.TRANSFERRING, Status.SUCCESS]), rows),
    st.builds(StatusReport, rooms, st.just(Status.FAILED), st.none(), failures),
    st.builds(
        StatusReport, rooms, st.sampled_from([Status.TRANSFERRING, Status.SUCCESS]), rows, st.none(), items(keys)
    ),
)
to_language = st.one_of(
    reports,
    st.builds(Progress, rooms, rows),
    st.builds(Manifest, rooms, items(st.just("") | keys)),
    st.builds(AbortAck, rooms),
    st.builds(Pong, words, words),
)

# Bytes that come near to being something.
near_frames = st.one_of(
    st.binary(max_size=20),
    st.sampled_from(
        [b"None", b"ABORT", b"ABORTED", b"QUEUED", b"PING", b"PONG", b"", b"0", b"-1", b"1,2", b"1,1", b"1_0", b"+1"]
    ),
    st.sampled_from([b"HAVE", b"MANIFEST", b"[]", b'["0f"]', b'[["",[[0,1]]]]', b'[["",[[0,2],[1,3]]]]', b"[" * 3000]),
    st.sampled_from([b"\xd9\xa1", b"007", b"9" * 19, b"9" * 30, b"{}", b"[" * 3000, b"1,", b",", b" 1", b"4", b"3"]),
    st.integers(-(2**65), 2**65).map(lambda value: str(value).encode()),
)


@given(to_encode)
@effort(200)
def test_messages_to_the_encode_side_survive_the_wire(message: ToEncode) -> None:
    frames = codec.encode(message)
    assert len(frames) <= codec.MAX_FRAMES
    assert codec.decode_to_encode(frames) == message


@given(to_language)
@effort(200)
def test_messages_to_the_language_side_survive_the_wire(message: ToLanguage) -> None:
    assert codec.decode_to_language(codec.encode(message)) == message


@given(infos)
@effort(100)
def test_seven_frames_are_an_init_and_eight_a_resume(info: TransferEmbeddingInfo) -> None:
    assert len(codec.encode(info)) == (8 if info.sent_tokens else 7)


@given(st.lists(near_frames, max_size=10))
@effort(600)
def test_arbitrary_frames_are_a_message_or_undecodable(frames: list[bytes]) -> None:
    for decode in (codec.decode_to_encode, codec.decode_to_language):
        with contextlib.suppress(UndecodableFrames):
            decode(frames)


@given(to_encode | to_language, st.data())
@effort(600)
def test_damaged_frames_are_a_message_or_undecodable(message: ToEncode | ToLanguage, data: st.DataObject) -> None:
    frames = codec.encode(message)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(frames) - 1)) if frames else 0
        damage = data.draw(st.sampled_from(["drop", "repeat", "replace", "cut", "flip"]))
        if not frames:
            break
        if damage == "drop":
            del frames[at]
        elif damage == "repeat":
            frames.insert(at, frames[at])
        elif damage == "replace":
            frames[at] = data.draw(near_frames)
        elif damage == "cut":
            frames[at] = frames[at][: data.draw(st.integers(0, len(frames[at])))]
        elif frames[at]:
            where = data.draw(st.integers(0, len(frames[at]) - 1))
            frames[at] = frames[at][:where] + bytes([data.draw(st.integers(0, 255))]) + frames[at][where + 1 :]
    for decode in (codec.decode_to_encode, codec.decode_to_language):
        with contextlib.suppress(UndecodableFrames):
            again = decode(frames)
            # What has JSON or a sentence in it may be written in several ways.
            if not isinstance(again, Register | StatusReport | Abort | Have | Manifest):
                assert codec.encode(again) == frames, "two spellings of one message"


@given(st.text(max_size=9000))
@effort(200)
def test_a_reason_of_any_text_arrives_as_ascii(text: str) -> None:
    frames = codec.encode(StatusReport(1, Status.FAILED, failure=Failure(500, text)))
    report = codec.decode_to_language(frames)
    assert isinstance(report, StatusReport)
    assert report.failure is not None
    assert report.failure.code == 500
    assert report.failure.text.isascii()
    assert len(frames[2]) <= codec.MAX_REASON
