"""What goes wrong: both halves hear of it in time and in the same words, and nothing stays behind."""

from __future__ import annotations

import dataclasses
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from embedding_relay.config import MOONCAKE, SHARED_MEMORY, RelayConfig
from embedding_relay.memory.engine import MooncakeDataPlane
from embedding_relay.protocol.counts import Event
from embedding_relay.protocol.errors import Failure, SettingError
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from embedding_relay.transport.encode import EncodeManager
from embedding_relay.transport.language import LanguageManager
from support.dying import LanguageProcess
from support.loopback import (
    HOST,
    EncodeInstance,
    LanguageRank,
    assert_all_given_back,
    encode_instance,
    language_rank,
    settle,
    small_layout,
    wait_until,
)
from support.planes import both_planes, only
from support.rooms import next_room
from support.rows import LIMITS, Spec

LAYOUT = small_layout()
# A peer that is dead is missed within seconds. The other deadlines are far away: on a busy machine nothing is quick.
QUICK = RelayConfig(
    bootstrap_timeout=60, waiting_timeout=60, heartbeat_interval=0.5, heartbeat_max_failures=3, write_timeout=5
)
# For tests that wait for a deadline to pass.
IMPATIENT = dataclasses.replace(QUICK, bootstrap_timeout=2)


@pytest.fixture(scope="module")
def encode() -> Iterator[EncodeInstance]:
    with encode_instance(LAYOUT, QUICK) as instance:
        yield instance


@pytest.fixture(scope="module")
def language(encode: EncodeInstance) -> Iterator[LanguageRank]:
    with language_rank(LAYOUT, QUICK) as rank:
        yield rank


@pytest.fixture(scope="module")
def impatient() -> Iterator[EncodeInstance]:
    with encode_instance(LAYOUT, IMPATIENT) as instance:
        yield instance


def failure_of(language: LanguageRank, peer: str, room: int) -> Failure:
    receivers = language.start(peer, room)
    language.wait(receivers.values())
    failure = receivers[room].failure()
    assert failure is not None
    return failure


def test_a_handshake_mismatch_names_both_values_on_both_sides(encode: EncodeInstance, room: int) -> None:
    with language_rank(small_layout(block_size=64, dtype="float16"), QUICK) as other:
        encode.expect(Spec(room, 100))
        failure = failure_of(other, encode.peer, room)
        assert failure.code == 500
        for words in ("block_size is 128 at the encode side and 64 at the language side", "bfloat16", "float16"):
            assert words in failure.text
        assert encode.end_of(room) == (Status.FAILED, failure)
        assert_all_given_back(encode, other)


def test_two_models_whose_rows_have_the_same_size_do_not_meet(encode: EncodeInstance, room: int) -> None:
    with language_rank(small_layout(model=(("architecture", "Another"),)), QUICK) as other:
        encode.expect(Spec(room, 100))
        failure = failure_of(other, encode.peer, room)
        words = "model architecture is unknown at the encode side and Another at the language side"
        assert failure == Failure(500, f"handshake refused: {words}")
        assert encode.end_of(room) == (Status.FAILED, failure)
        assert_all_given_back(encode, other)


def test_an_abort_is_acknowledged_and_then_the_blocks_are_free(
    encode: EncodeInstance, language: LanguageRank, room: int
) -> None:
    receivers = language.start(encode.peer, room)
    encode.expect(Spec(room, 2000, held=True))
    receiver = receivers[room]
    wait_until(lambda: receiver.poll() is Status.WAITING_FOR_INPUT, language.manager, 30)
    receiver.abort()
    receiver.abort()
    language.wait([receiver])
    assert receiver.failure() == Failure(499, f"the client of room {room} is gone")
    assert encode.end_of(room) == (Status.FAILED, receiver.failure())
    receiver.abort()
    assert_all_given_back(encode, language)


@both_planes
def test_an_abort_in_the_middle_of_a_transfer(encode: EncodeInstance, room: int) -> None:
    with language_rank(small_layout(blocks=1), QUICK) as tight:
        receivers = tight.start(encode.peer, room)
        encode.expect(Spec(room, 200_000))
        wait_until(lambda: receivers[room].poll() is Status.TRANSFERRING, tight.manager, 30)
        receivers[room].abort(Failure(503, "the language instance is full"))
        tight.wait(receivers.values())
        assert encode.end_of(room) == (Status.FAILED, Failure(503, "the language instance is full"))
        assert_all_given_back(encode, tight)


@pytest.mark.parametrize("refused_first", [True, False])
def test_what_the_encode_side_refuses_fails_on_the_language_side(
    encode: EncodeInstance, language: LanguageRank, room: int, refused_first: bool
) -> None:
    refusal = Failure(400, 'the image "ü.png" cannot be decoded')
    if refused_first:
        encode.refuse(room, refusal)
        assert failure_of(language, encode.peer, room).code == 400
    else:
        receivers = language.start(encode.peer, room)
        encode.expect(Spec(room, 100, held=True))
        wait_until(lambda: receivers[room].poll() is Status.WAITING_FOR_INPUT, language.manager, 30)
        encode.refuse(room, refusal)
        language.wait(receivers.values())
        failure = receivers[room].failure()
        assert failure is not None
        assert (failure.code, "cannot be decoded" in failure.text) == (400, True)
    assert_all_given_back(encode, language)


def test_more_rows_than_fit_are_a_bad_request(encode: EncodeInstance, room: int) -> None:
    with language_rank(LAYOUT, QUICK, max_rows=1000) as small:
        encode.expect(Spec(room, 1001))
        assert failure_of(small, encode.peer, room) == Failure(
            400, f"room {room} has 1001 rows, more than the 1000 that fit"
        )
        assert_all_given_back(encode, small)


def test_a_room_is_used_once_at_a_time(encode: EncodeInstance, language: LanguageRank, room: int) -> None:
    encode.expect(Spec(room, 300), Spec(room, 300))
    first = language.start(encode.peer, room)
    second = language.start(encode.peer, room)
    language.wait([*first.values(), *second.values()])
    assert second[room].failure() == Failure(409, f"room {room} is in use by another request")
    language.check(first, [Spec(room, 300)])
    assert failure_of(language, encode.peer, room) == Failure(409, f"room {room} was used before")
    assert_all_given_back(encode, language)


def test_a_room_that_gets_no_block_in_time(encode: EncodeInstance, room: int) -> None:
    """The holder's encoder takes its time; the one behind it is told why it failed."""
    sooner = dataclasses.replace(QUICK, bootstrap_timeout=4)
    with language_rank(small_layout(blocks=1), sooner) as tight:
        tight.receive(encode, Spec(next_room(), 100))  # more than one room at a time is for instances that deliver
        holder = tight.start(encode.peer, room)
        encode.expect(Spec(room, 100, held=True))
        wait_until(lambda: holder[room].poll() is Status.WAITING_FOR_INPUT, tight.manager, 30)
        waiting = next_room()
        assert failure_of(tight, encode.peer, waiting) == Failure(503, "no receive blocks within 4 s")
        holder[room].abort()
        assert_all_given_back(tight)


def test_a_language_side_that_nobody_expects_is_told_so(
    impatient: EncodeInstance, language: LanguageRank, room: int
) -> None:
    failure = failure_of(language, impatient.peer, room)
    assert failure.code == 503
    assert "did not reach the encode instance within 2 s" in failure.text
    assert_all_given_back(impatient, language)


def test_a_request_that_no_language_side_has(impatient: EncodeInstance, room: int) -> None:
    impatient.expect(Spec(room, 100))
    failure = Failure(503, f"no language instance has asked for room {room} within 2 s")
    assert impatient.end_of(room) == (Status.FAILED, failure)
    assert_all_given_back(impatient)


def test_registries_that_cannot_be_reached() -> None:
    receivers = {}
    with language_rank(LAYOUT, IMPATIENT) as language:
        started = time.monotonic()
        for peer in ("127.0.0.1:1", "no-such-host.invalid:80", "x" * 100 + ":80", "nonsense"):
            receivers[peer] = language.start(peer, next_room()).popitem()[1]
        language.wait(receivers.values())
        for peer, receiver in receivers.items():
            failure = receiver.failure()
            assert failure is not None
            assert (failure.code, peer in failure.text) == (502, True), failure
        assert time.monotonic() - started < 8
        assert_all_given_back(language)


@both_planes
def test_a_killed_encode_instance_fails_its_rooms_and_no_others(encode: EncodeInstance, room: int) -> None:
    survivor = next_room()
    with language_rank(small_layout(blocks=2), QUICK) as language:
        doomed_instance = EncodeInstance(LAYOUT, QUICK)
        doomed = language.start(doomed_instance.peer, room)
        doomed_instance.expect(Spec(room, 500_000))
        wait_until(lambda: doomed[room].poll() is Status.TRANSFERRING, language.manager, 30)
        started = time.monotonic()
        doomed_instance.kill()
        language.wait(doomed.values())
        failure = doomed[room].failure()
        assert failure is not None
        assert failure.code == 502
        assert failure.text.startswith(f"encode instance {doomed_instance.peer} did not answer for ")
        assert time.monotonic() - started < 2 * QUICK.timing.silence
        language.receive(encode, Spec(survivor, 2000))
        # Its control port refuses, and what it had sent was read: the blocks come out of quarantine.
        assert_all_given_back(encode, language)
        doomed_instance.stop()


@only(MOONCAKE)
def test_blocks_of_a_dead_encode_instance_wait_for_what_it_had_sent(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its control port refuses, and that alone says nothing about bytes in this machine's kernel."""
    has_read, looks = threading.Event(), []

    def has_read_everything(_: MooncakeDataPlane, __: str) -> bool:
        looks.append(has_read.is_set())
        return has_read.is_set()

    monkeypatch.setattr(MooncakeDataPlane, "has_read_everything", has_read_everything)
    with language_rank(small_layout(blocks=2), QUICK) as language:
        doomed_instance = EncodeInstance(LAYOUT, QUICK)
        doomed = language.start(doomed_instance.peer, room)
        doomed_instance.expect(Spec(room, 500_000))
        wait_until(lambda: doomed[room].poll() is Status.TRANSFERRING, language.manager, 30)
        doomed_instance.kill()
        language.wait(doomed.values())
        settle(language.manager.metrics, lambda _: len(looks) >= 2, patience=10)
        assert language.manager.metrics().sizes["quarantined_rooms"] == 1
        has_read.set()
        assert_all_given_back(language)
        doomed_instance.stop()


@only(MOONCAKE)
def test_a_language_rank_whose_data_plane_is_dead_loses_requests_and_no_blocks(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its control plane lives. Something takes connections where its engine should be, and answers nothing."""
    rooms = [room, next_room()]
    with socket.create_server((HOST, 0)) as silent, encode_instance(LAYOUT, QUICK) as encode:
        session_id = f"{HOST}:{silent.getsockname()[1]}"
        monkeypatch.setattr(MooncakeDataPlane, "session_id", session_id)
        with language_rank(small_layout(blocks=8), QUICK) as dead:
            started = time.monotonic()
            receivers = dead.start(encode.peer, *rooms)
            encode.expect(*(Spec(number, 2000) for number in rooms))
            dead.wait(receivers.values())
            assert time.monotonic() - started < 20, "one after another, and each within seconds"
            for receiver in receivers.values():
                failure = receiver.failure()
                assert failure is not None
                assert failure.code == 502
                assert f"the engine of {session_id} cannot be reached: timed out" in failure.text
            assert_all_given_back(encode, dead)


@both_planes
def test_a_killed_language_rank_costs_the_encode_side_nothing_for_long(encode: EncodeInstance, room: int) -> None:
    before = encode.metrics().totals["bytes"]
    dying = LanguageProcess(small_layout(blocks=1), QUICK, encode.peer, room)
    encode.expect(Spec(room, 500_000))
    settle(encode.metrics, lambda m: m.totals["bytes"] > before + 100_000 and m.sizes["rooms"] == 1)
    dying.kill()
    status, failure = encode.end_of(room)
    assert status is Status.FAILED
    assert failure is not None
    assert failure.code == 502
    assert_all_given_back(encode)
    settle(encode.metrics, lambda m: m.sizes["unquiet"] == 0)


def test_a_language_rank_that_is_killed_while_a_room_waits_there_is_missed(room: int) -> None:
    holder = next_room()
    with encode_instance(LAYOUT, QUICK) as encode:
        dying = LanguageProcess(small_layout(blocks=1), QUICK, encode.peer, holder, room)
        settle(encode.metrics, lambda m: m.sizes["rooms"] == 2)  # one is asked for, the other announced
        encode.expect(Spec(holder, 100, held=True), Spec(room, 100, held=True))
        dying.kill()
        for waiting in (holder, room):
            status, failure = encode.end_of(waiting)
            assert status is Status.FAILED
            assert failure is not None
            assert (failure.code, f"was silent for {QUICK.timing.silence:g} s" in failure.text) == (502, True)
        assert_all_given_back(encode)


def test_a_room_that_waits_for_blocks_outlives_the_deadline_of_the_first_word(room: int) -> None:
    holder, brief = next_room(), dataclasses.replace(QUICK, first_word_timeout=2)
    with encode_instance(LAYOUT, brief) as encode, language_rank(small_layout(blocks=1), brief) as tight:
        holding = tight.start(encode.peer, holder)
        encode.expect(Spec(holder, 100, held=True))
        wait_until(lambda: holding[holder].poll() is Status.WAITING_FOR_INPUT, tight.manager, 30)
        waiting = tight.start(encode.peer, room)
        lonely = next_room()
        encode.expect(Spec(room, 100), Spec(lonely, 100))
        assert encode.end_of(lonely)[0] is Status.FAILED, "expected at the same time, and never announced"
        assert waiting[room].poll() is Status.BOOTSTRAPPING
        holding[holder].abort()
        tight.wait(waiting.values())
        assert waiting[room].poll() is Status.SUCCESS
        assert_all_given_back(encode, tight)


@only(MOONCAKE)
def test_a_stopped_language_rank_gets_its_blocks_back_when_the_late_write_is_over(room: int) -> None:
    """S3 from end to end: it is stopped before a write of 32 MiB, and goes on when the sender has given up."""
    wide, warm = small_layout(hidden_size=4096, blocks=32), next_room()
    patient = dataclasses.replace(QUICK, heartbeat_interval=1.0)
    with encode_instance(wide, patient) as encode:
        stopped = LanguageProcess(wide, patient, encode.peer, warm, room, rows=2048)
        encode.expect(Spec(warm, 100))
        assert encode.end_of(warm)[0] is Status.SUCCESS
        settle(encode.metrics, lambda m: m.sizes["rooms"] == 1)
        stopped.signal(signal.SIGSTOP)
        encode.expect(Spec(room, 2048))
        assert encode.end_of(room)[0] is Status.FAILED
        settle(encode.metrics, lambda m: m.sizes["unquiet"] == 1 and m.sizes["transfers"] == 0, patience=10)
        stopped.signal(signal.SIGCONT)
        settle(stopped.metrics, lambda m: m.sizes["quarantined_rooms"] == 0 and m.sizes["blocks_free"] == 32)
        settle(encode.metrics, lambda m: m.sizes["unquiet"] == 0)
        assert_all_given_back(encode)
        stopped.kill()


@only(SHARED_MEMORY)
def test_a_stopped_language_rank_is_written_to_and_has_its_rows_when_it_goes_on(room: int) -> None:
    """A copy into its memory needs nothing of it, and is over when it is made: nobody waits for proof."""
    wide, warm = small_layout(hidden_size=4096, blocks=32), next_room()
    with encode_instance(wide, QUICK) as encode:
        stopped = LanguageProcess(wide, QUICK, encode.peer, warm, room, rows=2048)
        encode.expect(Spec(warm, 100))
        assert encode.end_of(warm)[0] is Status.SUCCESS
        settle(encode.metrics, lambda m: m.sizes["rooms"] == 1)
        stopped.signal(signal.SIGSTOP)
        encode.expect(Spec(room, 2048))
        assert encode.end_of(room)[0] is Status.SUCCESS
        assert encode.metrics().sizes["unquiet"] == 0
        stopped.signal(signal.SIGCONT)
        settle(stopped.metrics, lambda m: m.sizes["rooms"] == 0 and m.sizes["blocks_free"] == 32)
        assert stopped.metrics().totals["rows"] == 2148
        assert_all_given_back(encode)
        stopped.kill()


@only(SHARED_MEMORY)
def test_a_language_rank_that_is_stopped_before_the_first_write_fails_its_room_within_seconds(room: int) -> None:
    patient = dataclasses.replace(QUICK, heartbeat_interval=5.0)
    with encode_instance(LAYOUT, patient) as encode:
        stopped = LanguageProcess(LAYOUT, patient, encode.peer, room)
        settle(encode.metrics, lambda m: m.sizes["rooms"] == 1)
        stopped.signal(signal.SIGSTOP)
        encode.expect(Spec(room, 2000))
        status, failure = encode.end_of(room)
        assert status is Status.FAILED
        assert failure is not None
        assert (failure.code, "the process whose memory this is does not answer" in failure.text) == (502, True)
        stopped.signal(signal.SIGCONT)
        settle(stopped.metrics, lambda m: m.sizes["rooms"] == m.sizes["quarantined_rooms"] == 0)
        assert_all_given_back(encode)
        stopped.kill()


@only(MOONCAKE)
def test_an_engine_that_rejects_everything_is_renewed_and_the_chunk_goes_through(room: int) -> None:
    """A full queue poisons an engine: it refuses later writes, and what it has queued would land after the retry."""
    config = dataclasses.replace(QUICK, data_plane=MOONCAKE)
    with encode_instance(LAYOUT, config) as encode, language_rank(LAYOUT, config) as language:
        language.receive(encode, Spec(room, 300))
        encode.ask("poison")
        language.receive(encode, Spec(next_room(), 5000), hint_rows=1024)
        settle(encode.metrics, lambda m: m.totals["rows"] == 5300)
        renewed = encode.metrics().events[Event.ENGINES_RENEWED]
        assert renewed in (1, 2), "with the one that has half of the entries where they are many"
        language.receive(encode, Spec(next_room(), 5000))
        settle(encode.metrics, lambda m: m.totals["rows"] == 10300)
        assert encode.metrics().events[Event.ENGINES_RENEWED] == renewed
        assert_all_given_back(encode, language)


def test_nonsense_on_the_control_ports_is_counted_and_named_once(
    encode: EncodeInstance, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    with language_rank(LAYOUT, QUICK) as language, zmq.Context() as context:
        for address in (encode.ask("address"), language.manager.address):
            with context.socket(zmq.PUSH) as push:
                push.connect(f"tcp://{address}")
                for frames in ([b""], [b"None"] * 6, [b"1", b"\xff"], [b"x" * 100_000] * 7, [b"7"] * 40):
                    push.send_multipart(frames)
                push.setsockopt(zmq.LINGER, 1000)
        settle(encode.metrics, lambda m: m.events[Event.UNDECODABLE] >= 5)
        settle(language.manager.metrics, lambda m: m.events[Event.UNDECODABLE] >= 5)
        complaints = [record for record in caplog.records if "dropped" in record.message]
        assert len(complaints) == 1, caplog.text
        assert HOST in complaints[0].message
        language.receive(encode, Spec(room, 2000))


def test_the_log_has_one_line_per_room(
    encode: EncodeInstance, language: LanguageRank, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        language.receive(encode, Spec(room, 2000), hint_rows=1024)
        failed = next_room()
        encode.refuse(failed, Failure(400, 'not "even"\none line'))
        failure_of(language, encode.peer, failed)
    lines = [record.message for record in caplog.records if record.message.startswith("relay room=")]
    assert len(lines) == 2, lines
    words = dict(word.split("=") for word in lines[0].removeprefix("relay ").split())
    assert list(words) == ["room", "status", "rows", "rounds", "bytes", "wait_ms", "transfer_ms"]
    assert (words["room"], words["status"], words["rows"], words["rounds"]) == (str(room), "Success", "2000", "2")
    assert lines[1] == f'relay room={failed} status=Failed reason="400 not \\"even\\"\\none line"'


def test_an_idle_manager_uses_no_cpu(encode: EncodeInstance, language: LanguageRank, room: int) -> None:
    language.receive(encode, Spec(room, 500))
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.02


def test_a_manager_that_cannot_start_leaves_nothing() -> None:
    with socket.socket() as probe, pytest.raises(OSError, match="assign"):
        probe.bind(("192.0.2.1", 0))
    with pytest.raises(SettingError, match=r"192\.0\.2\.1"):
        LanguageManager.open(LAYOUT, QUICK, host="192.0.2.1", ranks=1, max_rows=1000, limits=LIMITS)


def test_a_manager_whose_registry_never_comes_is_ill() -> None:
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        nobody = Address(HOST, closed.getsockname()[1])
        quick = dataclasses.replace(QUICK, bootstrap_timeout=1)
        manager = EncodeManager.open(LAYOUT, quick, host=HOST, bootstrap=nobody)
        manager.start()
        deadline = time.monotonic() + 5
        while manager.healthy() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert str(manager.unhealthy_reason).startswith("no bootstrap registry within 1 s")
        manager.close()
