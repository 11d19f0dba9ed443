"""Frames that are given in the specification, and frames that must be refused."""

import msgspec
import pytest

from embedding_relay.protocol import codec
from embedding_relay.protocol.errors import Failure, UndecodableFrames
from embedding_relay.protocol.messages import (
    MAX_ITEMS,
    MAX_ROOM,
    MAX_RUNS,
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
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status

HERE, SESSION = Address("10.0.0.2", 4711), "10.0.0.2:15001"
SENDER = [b"10.0.0.2", b"4711", b"10.0.0.2:15001"]
ONE = b"\1" + b"\0" * 7
HANDSHAKE = b'{"version":1,"block_size":128,"item_lens":[9],"dtype":"bfloat16","deepstack_rows":0,"blocks":8}'


def test_the_frames_of_the_specification() -> None:
    register = Register(HERE, SESSION, (1, 2**64 - 72), Handshake(1, 128, (64, 9), "bfloat16", 0, 8))
    frames = codec.encode(register)
    assert frames[:4] == [b"None", *SENDER]
    assert frames[4] == b"\1" + b"\0" * 7 + b"\xb8" + b"\xff" * 7
    assert codec.decode_to_encode(frames) == register
    info = TransferEmbeddingInfo(7, HERE.host, HERE.port, SESSION, (3, 0, 2), 2, 0, 300)
    assert codec.encode(info) == [b"7", *SENDER, b"3,0,2", b"2", b"300"]
    resume = TransferEmbeddingInfo(7, HERE.host, HERE.port, SESSION, (1,), 2, 300, 128)
    assert codec.encode(resume) == [b"7", *SENDER, b"1", b"2", b"300", b"128"]
    assert codec.encode(StatusReport(7, Status.SUCCESS, 2000)) == [b"7", b"4", b"2000"]
    assert codec.encode(StatusReport(7, Status.FAILED, failure=Failure(400, "no"))) == [b"7", b"0", b"400 no"]


def test_our_own_frames() -> None:
    assert codec.encode(Queued(7, HERE, SESSION)) == [b"7", *SENDER, b"QUEUED"]
    assert codec.decode_to_encode([b"7", *SENDER, b"QUEUED"]) == Queued(7, HERE, SESSION)
    assert codec.encode(Abort(7, HERE, SESSION)) == [b"7", *SENDER, b"ABORT"]
    assert codec.encode(Abort(7, HERE, SESSION, Failure(499, "gone")))[5:] == [b"499 gone"]
    assert codec.encode(Ping(HERE, SESSION, "b7c1")) == [b"PING", *SENDER, b"b7c1"]
    assert codec.encode(Pong("b7c1", "a001")) == [b"PONG", b"b7c1", b"a001"]
    assert codec.encode(AbortAck(7)) == [b"7", b"ABORTED"]
    assert codec.encode(Progress(7, 300)) == [b"7", b"PROGRESS", b"300"]
    assert codec.decode_to_language([b"7", b"PROGRESS", b"300"]) == Progress(7, 300)


KEY = "0f" * 16


def test_keys_and_items_are_one_frame_of_json() -> None:
    said = Have(7, HERE, SESSION, (KEY,))
    assert codec.encode(said) == [b"7", *SENDER, b"HAVE", b'["%s"]' % KEY.encode()]
    assert codec.decode_to_encode(codec.encode(said)) == said
    items = Item(KEY, ((6, 9), (12, 13))), Item("", ((0, 6),))
    frame = b'[["%s",[[6,9],[12,13]]],["",[[0,6]]]]' % KEY.encode()
    assert codec.encode(Manifest(7, items)) == [b"7", b"MANIFEST", frame]
    assert codec.decode_to_language([b"7", b"MANIFEST", frame]) == Manifest(7, items)
    held = StatusReport(7, Status.SUCCESS, 2000, held=items[:1])
    assert codec.encode(held) == [b"7", b"4", b"2000", b'[["%s",[[6,9],[12,13]]]]' % KEY.encode()]
    assert codec.decode_to_language(codec.encode(held)) == held


def test_the_most_items_that_there_can_be_fit_into_their_frame() -> None:
    runs = [(9_000_000 + 2 * run, 9_000_001 + 2 * run) for run in range(MAX_RUNS)]
    share = MAX_RUNS // MAX_ITEMS
    items = tuple(Item(KEY, tuple(runs[at * share : (at + 1) * share])) for at in range(MAX_ITEMS))
    frames = codec.encode(Manifest(7, items))
    assert len(frames[2]) <= codec.MAX_ITEM_BYTES
    assert codec.decode_to_language(frames) == Manifest(7, items)
    one_more = Item("", (*items[-1].runs, (20_000_000, 20_000_001)))
    with pytest.raises(UndecodableFrames, match="32769 runs are more than 32768"):
        codec.decode_to_language(codec.encode(Manifest(7, (*items[:-1], one_more))))
    with pytest.raises(UndecodableFrames, match="too long"):
        codec.decode_to_encode([b"7", *SENDER, b"HAVE", b"[%s]" % (b" " * codec.MAX_ITEM_BYTES)])


def test_a_handshake_says_which_of_the_two_it_takes_and_others_pass_it_over() -> None:
    plain = Handshake(1, 128, (9,), "bfloat16", 0, 8)
    assert b"takes" not in codec.encode(Register(HERE, SESSION, (1,), plain))[5]
    both = msgspec.structs.replace(plain, takes_manifest=True, takes_have=True)
    assert codec.encode(Register(HERE, SESSION, (1,), both))[5].endswith(b',"takes_manifest":true,"takes_have":true}')


def test_where_records_are_is_added_to_a_registration_and_passed_over_by_who_does_not_know_it() -> None:
    plain = Register(HERE, SESSION, (1,), Handshake(1, 128, (9,), "bfloat16", 0, 8))
    assert b"records" not in codec.encode(plain)[5]
    assert not plain.handshake.takes_records
    for size, is_ours in ((32, True), (36, False)):
        handshake = msgspec.structs.replace(plain.handshake, records=(1 << 45, size))
        frames = codec.encode(msgspec.structs.replace(plain, handshake=handshake))
        assert frames[5].endswith(b',"records":[35184372088832,%d]}' % size)
        assert codec.decode_to_encode(frames) == Register(HERE, SESSION, (1,), handshake)
        assert handshake.takes_records is is_ours
        assert codec.decode_to_encode([*frames[:5], frames[5].replace(b"records", b"columns")]) == plain


@pytest.mark.parametrize("records", [[0, 32], [1, 0], [1], [1, 2, 3], [-1, 32], ["1", 32], 1, [1, 1 << 48]])
def test_records_that_are_nowhere_are_not_a_registration(records: object) -> None:
    said = HANDSHAKE.replace(b":8}", b":1048576}")[:-1] + b',"records":' + msgspec.json.encode(records) + b"}"
    with pytest.raises(UndecodableFrames):
        codec.decode_to_encode([b"None", *SENDER, ONE, said])


def test_the_name_of_shared_memory_is_added_to_a_registration_and_passed_over_by_who_does_not_know_it() -> None:
    plain = Register(HERE, SESSION, (1,), Handshake(1, 128, (9,), "bfloat16", 0, 8))
    assert b"memory" not in codec.encode(plain)[5]
    named = msgspec.structs.replace(plain, handshake=msgspec.structs.replace(plain.handshake, memory="0f" * 16))
    frames = codec.encode(named)
    assert frames[:5] == codec.encode(plain)[:5]
    assert msgspec.json.decode(frames[5])["memory"] == "0f" * 16
    assert codec.decode_to_encode(frames) == named
    newer = frames[5].replace(b"memory", b"something_of_a_later_version")
    assert codec.decode_to_encode([*frames[:5], newer]) == plain


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../shm", "0f" * 15, "0F" * 16, "0f" * 16 + "\n", "0f" * 17, 7, None]
)
def test_a_name_that_no_rank_gives_its_memory_is_not_a_registration(name: object) -> None:
    said = HANDSHAKE[:-1] + b',"memory":' + msgspec.json.encode(name) + b"}"
    with pytest.raises(UndecodableFrames, match="cannot be read"):
        codec.decode_to_encode([b"None", *SENDER, ONE, said])


@pytest.mark.parametrize("room", [-1, 1 << 63, (1 << 64) - 1])
def test_no_message_is_about_a_room_outside_63_bits(room: int) -> None:
    assert room not in range(MAX_ROOM + 1)
    to_encode = [Queued(room, HERE, SESSION), Abort(room, HERE, SESSION), Abort(room, HERE, SESSION, Failure(499, ""))]
    offers = [TransferEmbeddingInfo(room, HERE.host, HERE.port, SESSION, (0,), 1, sent, 8) for sent in (0, 8)]
    for message in (*to_encode, *offers):
        with pytest.raises(UndecodableFrames):
            codec.decode_to_encode(codec.encode(message))
    for answer in (
        StatusReport(room, Status.SUCCESS, 8),
        StatusReport(room, Status.SUCCESS),
        AbortAck(room),
        Progress(room, 1),
    ):
        with pytest.raises(UndecodableFrames):
            codec.decode_to_language(codec.encode(answer))


def test_a_peer_that_sends_less_is_understood() -> None:
    assert codec.decode_to_language([b"7", b"3"]) == StatusReport(7, Status.TRANSFERRING)
    assert codec.decode_to_language([b"7", b"0"]) == StatusReport(7, Status.FAILED)
    report = codec.decode_to_language([b"7", b"0", b"out of memory"])
    assert report == StatusReport(7, Status.FAILED, failure=Failure(502, "out of memory"))


def test_the_longest_list_of_blocks_fits_into_a_frame() -> None:
    indices = tuple(range(codec.MAX_BLOCKS))
    frames = codec.encode(TransferEmbeddingInfo(7, "h", 1, "s", indices, 1, 0, 1))
    assert max(map(len, frames)) <= codec.MAX_FRAME_BYTES
    assert codec.decode_to_encode(frames).dst_embedding_indices == indices  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"7"],
        [b"None"],
        [b"None", *SENDER, b"1234567", HANDSHAKE],
        [b"None", *SENDER, b"", HANDSHAKE],
        [b"None", *SENDER, b"\0" * 16, HANDSHAKE],
        [b"None", *SENDER, b"\0" * 8 * 33, HANDSHAKE],
        [b"None", *SENDER, ONE, b"{}"],
        [b"None", *SENDER, ONE * (codec.MAX_COLUMNS + 1), HANDSHAKE.replace(b"[9]", b"[9%b]" % (b",9" * 32))],
        [b"None", *SENDER, ONE, b"[" * 4000],
        [b"None", *SENDER, ONE, HANDSHAKE.replace(b"128", b"0")],
        [b"None", *SENDER, ONE, HANDSHAKE.replace(b":8}", b":0}")],
        [b"None", *SENDER, ONE, HANDSHAKE.replace(b":8}", b":1048577}")],
        [b"None", *SENDER, ONE, HANDSHAKE.replace(b"[9]", b"[0]")],
        [b"None", *SENDER, ONE, HANDSHAKE.replace(b"[9]", b"[]")],
        [b"None", *SENDER, ONE, HANDSHAKE.replace(b"[9]", b"[%d]" % (1 << 49))],
        [b"None", *SENDER, ONE, HANDSHAKE.replace(b"bfloat16", "bfl\u00f6at".encode())],
        [b"None", *SENDER, ONE, HANDSHAKE.replace(b"bfloat16", rb"a\nline")],
        [b"None", *SENDER, ONE, HANDSHAKE.replace(b"bfloat16", b"b" * 5000)],
        [b"None", *SENDER, b"\0" * 8, HANDSHAKE],
        [b"None", *SENDER, b"\xb9" + b"\xff" * 7, HANDSHAKE],
        [b"PING", b"!", b"1", b"s", b"x"],
        [b"PING", b"10.0.0.2;10.0.0.1", b"1", b"s", b"x"],
        [b"PING", b"*", b"1", b"s", b"x"],
        [b"7", *SENDER, b"", b"1", b"300"],
        [b"7", *SENDER, b"1,1", b"1", b"300"],
        [b"7", *SENDER, b"1,", b"1", b"300"],
        [b"7", *SENDER, b"-1", b"1", b"300"],
        [b"7", *SENDER, b"1048576", b"1", b"300"],
        [b"7", *SENDER, b"1", b"0", b"300"],
        [b"7", *SENDER, b"1", b"1", b"0"],
        [b"7", *SENDER, b"1", b"1", b"-5"],
        [b"7", *SENDER, b"1", b"1", b"0", b"300"],
        [b"7", *SENDER, b"1", b"1", b"300", b"0"],
        [b"7", *SENDER, b"1", b"1", b"1", b"1", b"1"],
        [b"-7", *SENDER, b"1", b"1", b"300"],
        [b"9223372036854775808", *SENDER, b"1", b"1", b"300"],
        [b"07", *SENDER, b"1", b"1", b"300"],
        [b"7", b"10.0.0.2", b"0", b"s", b"1", b"1", b"300"],
        [b"7", b"10.0.0.2", b"65536", b"s", b"1", b"1", b"300"],
        [b"7", b"", b"1", b"s", b"1", b"1", b"300"],
        [b"7", b"a b", b"1", b"s", b"1", b"1", b"300"],
        [b"7", b"h" * 257, b"1", b"s", b"1", b"1", b"300"],
        [b"7", b"h\n", b"1", b"s", b"1", b"1", b"300"],
        [b"7\n", *SENDER, b"1", b"1", b"300"],
        [b"7", *SENDER, b"ABORT", b"499 gone", b"more"],
        [b"7", *SENDER, b"ABORTED"],
        [b"7", *SENDER, b"QUEUED", b"more"],
        [b"7", *SENDER[:2], b"QUEUED"],
        [b"7", *SENDER, b"queued"],
        [b"-7", *SENDER, b"QUEUED"],
        [b"7", b"10.0.0.2", b"0", b"s", b"QUEUED"],
        [b"7", *SENDER, b"ABORT", b"\xff"],
        [b"7", *SENDER, b"ABORT", b"x" * 5000],
        [b"PING", *SENDER],
        [b"PING", *SENDER, b""],
    ],
)
def test_undecodable_for_the_encode_side(frames: list[bytes]) -> None:
    with pytest.raises(UndecodableFrames):
        codec.decode_to_encode(frames)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"7"],
        [b"7", b"5"],
        [b"7", b"-1"],
        [b"7", b"x"],
        [b"x", b"ABORTED"],
        [b"7", b"3", b"0"],
        [b"7", b"3", b"x"],
        [b"7", b"1", b"5"],
        [b"7", b"2", b"5"],
        [b"7", b"0", b"\xff"],
        [b"7", b"4", b"5", b"6"],
        [b"PONG", b"x"],
        [b"PONG", b"x", b"y z"],
        [b"7", b"3" * (codec.MAX_FRAME_BYTES + 1)],
    ],
)
def test_undecodable_for_the_language_side(frames: list[bytes]) -> None:
    with pytest.raises(UndecodableFrames):
        codec.decode_to_language(frames)
