"""With the secret: who has it works as always, who has another or none reaches nothing and is told so."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import psutil
import pytest
import torch
import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from embedding_relay.config import SECRET_FILE, RelayConfig
from embedding_relay.keys import Keys
from embedding_relay.memory.engine import MooncakeDataPlane
from embedding_relay.memory.plane import Region
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from embedding_relay.registry import client as registry_client
from embedding_relay.registry import seal as seals
from embedding_relay.registry.client import RegistryError, announce, look_up
from embedding_relay.registry.entry import EncodeRank
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.transport.language import LanguageManager
from embedding_relay.transport.manager import warn_if_open
from support.loopback import (
    HOST,
    EncodeInstance,
    assert_all_given_back,
    encode_instance,
    language_rank,
    small_layout,
    wait_until,
)
from support.recorder import Recorder
from support.rows import LIMITS, Spec
from support.tap import Tap
from support.target import Target

OURS, OTHER = Keys.of(b"ours" * 8), Keys.of(b"others" * 8)
KEY = OURS.registry
LAYOUT = small_layout()
OPEN = RelayConfig(bootstrap_timeout=30, waiting_timeout=30, heartbeat_interval=0.5, default_allocate_tokens=1024)
SECURE = dataclasses.replace(OPEN, keys=OURS)
RANK = EncodeRank(0, HOST, 1234, "abc", LAYOUT.handshake())
# An address of this machine that is neither the usual one nor all of them.
ELSEWHERE = "127.0.0.2"


@pytest.fixture(scope="module")
def encode() -> Iterator[EncodeInstance]:
    with encode_instance(LAYOUT, SECURE) as instance:
        yield instance


@pytest.fixture(scope="module")
def open_encode() -> Iterator[EncodeInstance]:
    with encode_instance(LAYOUT, OPEN) as instance:
        yield instance


@pytest.fixture
def room() -> int:
    """Twelve digits: nobody meets them by chance among random bytes."""
    return random.randrange(10**11, 10**12)


@contextlib.contextmanager
def registry(key: bytes | None = KEY) -> Iterator[Address]:
    server = MooncakeEmbeddingBootstrapServer(HOST, 0, key)
    server.start()
    try:
        yield Address(HOST, server.port)
    finally:
        server.close()


# ---- whole requests


def test_rows_cross_over_when_both_sides_have_the_secret(encode: EncodeInstance, room: int) -> None:
    with language_rank(LAYOUT, SECURE) as language:
        received = language.receive(encode, Spec(room, 2000), Spec(room + 1, 10_000), Spec(room + 2, 1))
        assert received[room].rounds == 2
        assert_all_given_back(encode, language)


@pytest.mark.parametrize(
    ("theirs", "ours", "said", "logged"),
    [
        (OURS, None, f"{SECRET_FILE} is set there, and is missing here", "is missing where the request came from"),
        (OURS, OTHER, f"{SECRET_FILE} or the clock differs there", "is another secret at the registry"),
        (None, OURS, f"does not prove that it has our secret: {SECRET_FILE} differs or is missing there", "it said"),
    ],
    ids=["none here", "another here", "none there"],
)
def test_a_request_between_instances_without_a_common_secret_fails_in_time_and_says_why(
    encode: EncodeInstance,
    open_encode: EncodeInstance,
    room: int,
    theirs: Keys | None,
    ours: Keys | None,
    said: str,
    logged: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(registry_client, "_LOOKUP_PATIENCE", 0.0)
    instance, started = encode if theirs else open_encode, time.monotonic()
    known = instance.ask("sessions")  # as of now: published numbers may be a moment old
    with language_rank(LAYOUT, dataclasses.replace(OPEN, keys=ours)) as language:
        receivers = language.start(instance.peer, room)
        language.wait(receivers.values())
        failure = receivers[room].failure()
        assert failure is not None
        assert failure.code == 502
        assert instance.peer in failure.text
        assert said in failure.text
        assert logged in caplog.text
        assert time.monotonic() - started < OPEN.bootstrap_timeout
        assert instance.ask("sessions") == known, "it reached the control port"
        assert_all_given_back(instance, language)


@pytest.mark.parametrize(("config", "readable"), [(SECURE, False), (OPEN, True)], ids=["secure", "open"])
def test_whoever_listens_on_the_way_reads_nothing_of_a_message(config: RelayConfig, readable: bool, room: int) -> None:
    """The open half of the test shows that the tap would have heard it."""
    key = config.keys.registry if config.keys else None
    with encode_instance(LAYOUT, config) as encode:
        own_registry = Address(HOST, encode.port)
        rank = announced(own_registry, key)
        with Tap(rank.address) as tap, language_rank(LAYOUT, config) as language:
            announce(own_registry, msgspec.structs.replace(rank, port=tap.address.port), key)
            language.receive(encode, Spec(room, 2000))
            held = language.start(encode.peer, room + 1)
            encode.expect(Spec(room + 1, 100, held=True))
            wait_until(lambda: held[room + 1].poll() is Status.WAITING_FOR_INPUT, language.manager, 30)
            held[room + 1].abort()
            assert encode.end_of(room + 1)[0] is Status.FAILED
            assert_all_given_back(encode, language)
            session = language.manager.plane.session_id
        for word in (str(room), "ABORT", "bfloat16", session):
            assert (word.encode() in tap.said) is readable, word
        assert (b"CURVE" in tap.said) is not readable


def announced(own_registry: Address, key: bytes | None) -> EncodeRank:
    """The rank of an encode instance that has just started."""
    deadline = time.monotonic() + 5
    while True:
        try:
            return look_up(own_registry, 0, key)
        except RegistryError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


# ---- the control port


def pair_of(key: bytes) -> tuple[bytes, bytes]:
    secret = z85.encode(key)
    return zmq.curve_public(secret), secret


SERVER, STRANGER = pair_of(OURS.control), pair_of(OTHER.control)


@pytest.mark.parametrize(
    ("server_key", "client"),
    [
        (OURS.control, None),
        (None, (SERVER[0], SERVER)),
        (OURS.control, (STRANGER[0], STRANGER)),
        (OURS.control, (STRANGER[0], SERVER)),
        (OURS.control, (SERVER[0], STRANGER)),
    ],
    ids=["plain to curve", "curve to plain", "another secret", "another server key", "another client key"],
)
def test_no_handshake_succeeds_without_the_secret(
    server_key: bytes | None,
    client: tuple[bytes, tuple[bytes, bytes]] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with contextlib.closing(Recorder(key=server_key)) as there, contextlib.closing(Recorder(key=server_key)) as friend:
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.setsockopt(zmq.LINGER, 0)
            if client:
                push.curve_serverkey, (push.curve_publickey, push.curve_secretkey) = client
            with watched(push) as monitor:
                push.connect(f"tcp://{there.address}")
                push.send_multipart([b"let me in"])
                events = events_until_turned_away(monitor)
        friend.send(there.address, b"good")
        there.await_frames(1)
    assert zmq.Event.HANDSHAKE_SUCCEEDED not in events
    assert there.frames == [[b"good"]]
    knew_the_server = client == (SERVER[0], STRANGER)
    assert (there.loop.refused_clients > 0) is knew_the_server
    assert [record.message for record in caplog.records] == (
        [f"relay control: a client at {HOST} with another key is refused"] if knew_the_server else []
    )


@contextlib.contextmanager
def watched(socket: zmq.Socket[bytes]) -> Iterator[zmq.Socket[bytes]]:
    monitor = socket.get_monitor_socket()
    try:
        yield monitor
    finally:
        socket.disable_monitor()  # first: libzmq waits for ever for a reader that is gone
        monitor.close()


def events_until_turned_away(monitor: zmq.Socket[bytes]) -> list[zmq.Event]:
    events = []
    while not events or events[-1] not in TURNED_AWAY:
        assert monitor.poll(5000), f"nothing after {events}"
        events.append(zmq.Event(recv_monitor_message(monitor)["event"]))
    return events


TURNED_AWAY = (
    zmq.Event.HANDSHAKE_FAILED_AUTH,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
    zmq.Event.DISCONNECTED,
)


# ---- the registry


def raw(to: Address, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
    connection = http.client.HTTPConnection(to.host, to.port, timeout=5)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_registry_answers_who_has_the_secret_and_nobody_else() -> None:
    with registry() as ours:
        announce(ours, RANK, KEY)
        assert look_up(ours, 0, KEY) == RANK
        with pytest.raises(RegistryError, match="knows no such encode rank"):
            look_up(ours, 7, KEY)
        for key in (None, OTHER.registry):
            with pytest.raises(RegistryError, match=f"refuses this instance: {SECRET_FILE}"):
                look_up(ours, 0, key)
            with pytest.raises(RegistryError, match="refuses this instance"):
                announce(ours, msgspec.structs.replace(RANK, port=6666), key)
        assert look_up(ours, 0, KEY) == RANK
        assert raw(ours, "GET", "/health", b"", {}) == (200, "OK")
        for method, path in (("GET", "/relay/ranks/0"), ("GET", "/nothing"), ("DELETE", "/relay/ranks"), ("HEAD", "/")):
            assert raw(ours, method, path, b"", {})[0] == 401


def test_what_was_said_to_the_registry_cannot_be_said_again() -> None:
    older, newer = (msgspec.json.encode(msgspec.structs.replace(RANK, instance=name)) for name in ("older", "newer"))
    with registry() as ours, registry() as another:
        request = seals.Request("PUT", "/relay/ranks", older, str(ours))
        headers = seals.seal_request(KEY, request, time.time_ns())
        assert raw(ours, "PUT", request.path, older, headers)[0] == 200
        announce(ours, msgspec.json.decode(newer, type=EncodeRank), KEY)
        assert raw(ours, "PUT", request.path, older, headers) == (401, "the same request was received before")
        assert look_up(ours, 0, KEY).instance == "newer"
        said = f"the request was sent to {ours}, and has arrived at {another}"
        assert raw(another, "PUT", request.path, older, headers) == (401, said)
        fresh = seals.seal_request(KEY, request, time.time_ns())
        assert raw(ours, "PUT", request.path, newer, fresh)[0] == 401
        assert raw(ours, "PUT", request.path, older, fresh)[0] == 200
        with pytest.raises(RegistryError, match="knows no such encode rank"):
            look_up(another, 0, KEY)


def test_what_was_overheard_on_the_way_is_of_no_use() -> None:
    with registry() as ours, Tap(ours) as tap:
        announce(ours, RANK, KEY)
        assert look_up(tap.address, 0, KEY) == RANK
        with socket.create_connection((ours.host, ours.port), timeout=5) as again:
            again.sendall(tap.said)
            assert b"401 Unauthorized" in again.recv(4096)
        genuine = bytes(tap.answered)
        assert b"200 OK" in genuine
        with Parrot(genuine) as false, pytest.raises(RegistryError, match="does not prove that it has our secret"):
            look_up(false.address, 0, KEY)


class Parrot:
    """Somebody who took the registry's place, and gives the next who asks an answer of its own making."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.create_server((HOST, 0))
        self.address = Address(HOST, self._listener.getsockname()[1])

    def __enter__(self) -> Parrot:
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(self._answer)


@pytest.mark.parametrize("key", [None, OTHER.registry], ids=["no secret", "another secret"])
def test_a_false_registry_is_not_believed(key: bytes | None) -> None:
    with registry(key) as false:
        announce(false, msgspec.structs.replace(RANK, port=6666), key)
        with pytest.raises(RegistryError, match=SECRET_FILE):
            look_up(false, 0, KEY)
        with pytest.raises(RegistryError, match=SECRET_FILE):
            announce(false, RANK, KEY)


def test_clocks_that_differ_are_named() -> None:
    with registry() as ours:
        request = seals.Request("GET", "/relay/ranks/0", b"")
        late = seals.seal_request(KEY, request, time.time_ns() - 3600 * 10**9)
        status, said = raw(ours, request.method, request.path, request.body, late)
    assert status == 401
    assert said.startswith("the clocks of the two machines are 36")


# ---- who listens where


def listening() -> set[tuple[str, int]]:
    return {
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def test_our_own_ports_are_open_on_the_given_address_only() -> None:
    before = listening()
    with contextlib.closing(Recorder(ELSEWHERE)) as recorder:
        server = MooncakeEmbeddingBootstrapServer(ELSEWHERE, 0)
        server.start()
        opened = listening() - before
        server.close()
    assert opened == {(ELSEWHERE, recorder.address.port), (ELSEWHERE, server.port)}


def test_what_the_security_page_says_about_mooncake_is_true() -> None:
    """Its ports are open on every address, whatever it is told; whoever knows a session reads and writes its memory."""
    before = listening()
    manager = LanguageManager.open(LAYOUT, SECURE, host=ELSEWHERE, ranks=1, max_rows=1000, limits=LIMITS)
    manager.start()
    opened = listening() - before
    address = manager.address
    manager.close()
    assert (ELSEWHERE, address.port) in opened
    assert [ip for ip, port in opened if port != address.port].count("0.0.0.0") == 1
    assert {ip for ip, port in opened if port != address.port} == {"0.0.0.0", "::"}
    target, memory = Target(HOST), torch.zeros(64, dtype=torch.uint8)
    stranger = MooncakeDataPlane(HOST, "tcp")
    stranger.start([Region(memory.data_ptr(), 64)])
    engine, mine = stranger.make_engine(), memory.data_ptr()
    found = engine.get_first_buffer_address(target.session_id)
    assert found == target.pointer
    assert engine.transfer_sync_write(target.session_id, mine, found, 64) == 0
    memory.fill_(7)
    assert engine.transfer_sync_read(target.session_id, mine, found, 64) == 0
    assert memory.tolist() == [0] * 64
    del engine
    stranger.close()
    target.close()


# ---- what the operator is told


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_no_warning_on_loopback(host: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_if_open(RelayConfig(), host)
    assert caplog.records == []


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::1", "8.8.8.8", "0.0.0.0"])
def test_a_loud_warning_without_the_secret_on_an_address_that_others_reach(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_open(SECURE, host)
    assert caplog.records == []
    warn_if_open(OPEN, host)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    for word in (host, SECRET_FILE, "docs/security.md", "make-secret"):
        assert word in caplog.text
