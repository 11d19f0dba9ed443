"""Strangers at real sockets: nothing dies, and who is at work there does not notice."""

from __future__ import annotations

import dataclasses
import random
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import pytest
import zmq

from embedding_relay.config import RelayConfig
from embedding_relay.protocol import codec
from embedding_relay.protocol.counts import Event
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.messages import (
    Address,
    Ping,
    Register,
    StatusReport,
    ToEncode,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status
from embedding_relay.transport.sockets import MAX_STRANGERS
from support.corpus import CORPUS, read_corpus
from support.engine_stand_in import EngineStandIn
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
from support.rooms import next_room
from support.rows import Spec

LAYOUT = small_layout()
# What a stranger asks for is forgotten within seconds. Those whose rows shall arrive meanwhile have time.
QUICK = RelayConfig(bootstrap_timeout=3, waiting_timeout=60, heartbeat_interval=2, heartbeat_max_failures=3)
PATIENT = dataclasses.replace(QUICK, bootstrap_timeout=60)


class Stranger:
    """Sends what it likes, and hears what is answered to its own address."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._inlet = self._context.socket(zmq.PULL)
        self.address = Address(HOST, self._inlet.bind_to_random_port(f"tcp://{HOST}"))
        self._outlets: dict[Address, zmq.Socket[bytes]] = {}

    def send(self, to: Address, frames: Sequence[bytes]) -> None:
        if to not in self._outlets:
            self._outlets[to] = self._context.socket(zmq.PUSH)
            self._outlets[to].connect(f"tcp://{to}")
        self._outlets[to].send_multipart(list(frames))

    def say(self, to: Address, *messages: ToEncode) -> None:
        for message in messages:
            self.send(to, codec.encode(message))

    def hear(self) -> StatusReport:
        assert self._inlet.poll(10_000), "no answer"
        report = codec.decode_to_language(self._inlet.recv_multipart())
        assert isinstance(report, StatusReport)
        return report

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    someone = Stranger()
    yield someone
    someone.close()


@pytest.fixture(scope="module")
def encode() -> Iterator[EncodeInstance]:
    with encode_instance(LAYOUT, QUICK) as instance:
        yield instance


@pytest.fixture(scope="module")
def patient() -> Iterator[EncodeInstance]:
    with encode_instance(LAYOUT, PATIENT) as instance:
        yield instance


@pytest.fixture(scope="module")
def language() -> Iterator[LanguageRank]:
    with language_rank(small_layout(blocks=6), PATIENT) as rank:
        yield rank


def words(language: LanguageRank, encode_address: Address, room: int) -> Mapping[str, bytes]:
    manager = language.manager
    register = Register(
        manager.address, manager.plane.session_id, manager._buffers.pointers, language.layout.handshake()
    )
    _, host, port, session, pointers, handshake = codec.encode(register)
    return {
        "room": b"%d" % room,
        "host": host,
        "port": port,
        "session": session,
        "pointers": pointers,
        "handshake": handshake,
        "encode_host": encode_address.host.encode(),
        "encode_port": b"%d" % encode_address.port,
    }


def raw_noise(to: Address, rng: random.Random) -> None:
    """What does not even speak ZMTP."""
    with socket.create_connection((to.host, to.port)) as connection:
        connection.sendall(rng.randbytes(rng.randint(1, 2000)))


def test_rooms_under_way_do_not_notice_a_flood(
    patient: EncodeInstance, language: LanguageRank, stranger: Stranger
) -> None:
    where = patient.ask("address")
    long = Spec(next_room(), 200_000)
    receivers = language.start(patient.peer, long.room)
    patient.expect(long)
    wait_until(lambda: receivers[long.room].poll() is Status.TRANSFERRING, language.manager, 30)
    known = words(language, where, long.room)
    lines = [line for file in sorted(CORPUS.glob("*.txt")) for line in read_corpus(file, known) if line.frames]
    rng, undecodable = random.Random(1), patient.metrics().events[Event.UNDECODABLE]
    specs = [long]
    sent = 0
    for turn in range(25):
        rng.shuffle(lines)
        # A frame that is too long costs the connection, and with it what waits there: those go another way.
        for line in (line for line in lines if max(map(len, line.frames)) < codec.MAX_FRAME_BYTES // 4):
            stranger.send(where, line.frames)
            stranger.send(language.manager.address, line.frames)
            sent += 2
        raw_noise(where, rng)
        raw_noise(language.manager.address, rng)
        if turn % 5 == 0:
            specs.append(Spec(next_room(), rng.randint(1, 3000)))
            receivers |= language.start(patient.peer, specs[-1].room)
            patient.expect(specs[-1])
    assert sent > 4000
    language.wait(receivers.values(), timeout=60)
    language.check(receivers, specs)
    settle(patient.metrics, lambda m: m.events[Event.UNDECODABLE] >= undecodable + 1000, patience=10)
    assert language.manager.metrics().events[Event.UNDECODABLE] > 1000
    assert_all_given_back(patient, language)


def test_frames_that_are_too_long_cost_only_their_sender(
    encode: EncodeInstance, language: LanguageRank, stranger: Stranger
) -> None:
    known = words(language, encode.ask("address"), 0)
    for line in read_corpus(CORPUS / "huge_frames.txt", known):
        stranger.send(encode.ask("address"), line.frames)
        stranger.send(language.manager.address, line.frames)
    language.receive(encode, Spec(next_room(), 2000))
    assert_all_given_back(encode, language)


def registration(session_id: str, address: Address, pointer: int = 1 << 20) -> Register:
    return Register(address, session_id, (pointer,) * len(LAYOUT.item_lens), LAYOUT.handshake())


def init(session_id: str, address: Address) -> TransferEmbeddingInfo:
    return TransferEmbeddingInfo(next_room(), address.host, address.port, session_id, (0,), 1, 0, 1)


def free_address() -> Address:
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        return Address(HOST, closed.getsockname()[1])


def test_a_rank_that_came_back_with_the_session_of_its_predecessor_is_let_in(
    encode: EncodeInstance, stranger: Stranger
) -> None:
    where, dead = encode.ask("address"), free_address()
    back, first = registration("back:1", stranger.address, 1 << 21), init("back:1", stranger.address)
    stranger.say(where, registration("back:1", dead), back, first)
    failure = stranger.hear().failure
    if failure == Failure(421, "session back:1 is not registered here"):
        # The offer was quicker than the proof. Its answer says that there is one: now the session is known.
        stranger.say(where, back, init("back:1", stranger.address))
        failure = stranger.hear().failure
    assert failure is not None
    assert failure.code == 503, "it was let in, and its request never came"
    assert_all_given_back(encode)


def test_a_session_whose_engine_is_none_costs_its_own_request_and_holds_up_nobody(
    language: LanguageRank, stranger: Stranger
) -> None:
    """The names of sessions are a stranger's words: nothing is sent to what is not an engine of that place."""
    elsewhere, other = EngineStandIn(HOST), EngineStandIn(HOST)
    elsewhere.says["tcp_data_host"], other.says["protocol"] = "192.0.2.1", "rdma"
    with (
        encode_instance(LAYOUT, QUICK) as encode,
        socket.create_server((HOST, 0)) as silent,
        closing(elsewhere),
        closing(other),
    ):
        session_ids = [f"{HOST}:{silent.getsockname()[1]}", elsewhere.session_id, other.session_id]
        offers = {session_id: init(session_id, stranger.address) for session_id in session_ids}
        for session_id, offer in offers.items():
            stranger.say(encode.ask("address"), registration(session_id, stranger.address), offer)
        encode.expect(*(Spec(offer.room, 1) for offer in offers.values()))
        started = time.monotonic()
        language.receive(encode, Spec(next_room(), 2000))
        assert time.monotonic() - started < 5, "a silent engine is given up after six seconds"
        failures = {report.room: report.failure for report in (stranger.hear() for _ in offers)}
        for session_id, offer in offers.items():
            failure = failures[offer.room]
            assert failure is not None
            assert (failure.code, f"the engine of {session_id} cannot be reached" in failure.text) == (502, True)
        assert elsewhere.connections == other.connections == []
        assert_all_given_back(encode)
        settle(encode.metrics, lambda m: m.sizes["unquiet"] == 0)


def test_a_session_cannot_be_taken_from_a_living_process(encode: EncodeInstance, stranger: Stranger) -> None:
    where, owner = encode.ask("address"), Stranger()
    refused = encode.metrics().events[Event.REGISTRATION_REFUSED]
    stranger.say(where, registration("mine:1", owner.address), registration("mine:1", stranger.address, 1 << 21))
    for _ in range(2):
        stranger.say(where, init("mine:1", stranger.address))
        failure = stranger.hear().failure
        assert failure is not None
        assert failure.code == 421
    owner.say(where, init("mine:1", owner.address))
    failure = owner.hear().failure
    assert failure is not None
    assert failure.code == 503, "it still has its session"
    assert encode.metrics().events[Event.REGISTRATION_REFUSED] > refused
    owner.close()
    assert_all_given_back(encode)


def test_invented_addresses_cost_a_bounded_number_of_sockets(
    patient: EncodeInstance, language: LanguageRank, stranger: Stranger
) -> None:
    where = patient.ask("address")
    under_way, later = Spec(next_room(), 100_000), Spec(next_room(), 2000)
    receivers = language.start(patient.peer, under_way.room)
    patient.expect(under_way)
    for number in range(4000):
        address = Address(f"127.0.{number % 250}.{1 + number // 250}", 1 + number)
        stranger.say(where, Ping(address, "stranger:1", "x"))
    language.wait(receivers.values())
    language.check(receivers, [under_way])
    language.receive(patient, later)
    settle(patient.metrics, lambda m: 0 < m.sizes["connections"] <= MAX_STRANGERS + 1)
    assert_all_given_back(patient, language)
