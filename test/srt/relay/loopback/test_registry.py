"""The bootstrap registry over real HTTP."""

import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from embedding_relay.config import RelayConfig
from embedding_relay.pairing import AllowedHosts
from embedding_relay.protocol.errors import BAD_GATEWAY, SettingError
from embedding_relay.protocol.messages import Address
from embedding_relay.registry import client
from embedding_relay.registry.client import (
    InstanceSizes,
    PeerLookup,
    RegistryError,
    announce,
    look_up,
    parse_address,
    parse_peer,
)
from embedding_relay.registry.entry import EncodeRank, name_of_rank
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from support.loopback import HOST, language_rank, small_layout

RANK = EncodeRank(0, HOST, 1234, "abc", small_layout().handshake())


@pytest.fixture
def registry() -> Iterator[Address]:
    server = MooncakeEmbeddingBootstrapServer(HOST, 0)
    server.start()
    yield Address(HOST, server.port)
    server.close()
    server.close()


def request(registry: Address, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(registry.host, registry.port, timeout=5)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_rank_is_found_where_it_said(registry: Address) -> None:
    with pytest.raises(RegistryError, match="knows no such encode rank") as caught:
        look_up(registry, 0)
    assert 'it said "404 no encode rank 0 has registered here"' in caught.value.for_the_log
    announce(registry, RANK)
    assert look_up(registry, 0) == RANK


def test_a_new_process_replaces_the_old_one(registry: Address) -> None:
    announce(registry, RANK)
    newer = EncodeRank(0, HOST, 4321, "def", RANK.handshake)
    announce(registry, newer)
    assert look_up(registry, 0) == newer


def test_each_data_parallel_rank_has_an_entry_that_says_how_many_there_are(registry: Address) -> None:
    ranks = [EncodeRank(rank, HOST, 1234 + rank, f"process-{rank}", RANK.handshake, ranks=2) for rank in (0, 1)]
    for rank in ranks:
        announce(registry, rank)
    assert [look_up(registry, rank) for rank in (0, 1)] == ranks
    assert InstanceSizes().ask(registry) == 2


def test_what_a_language_rank_calls_an_encode_rank_says_where_it_is() -> None:
    for registry in (Address("host", 80), Address("fd00::1", 80)):
        for rank in (0, 3):
            assert parse_peer(name_of_rank(registry, rank)) == (registry, rank)


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"\xff", b'{"rank": 99999999}', b'{"rank": -1}'])
def test_nonsense_is_answered_and_changes_nothing(registry: Address, body: bytes) -> None:
    assert request(registry, "PUT", "/relay/ranks", body)[0] == 400
    assert request(registry, "GET", "/health") == (200, b"OK")


def test_too_much_is_refused(registry: Address) -> None:
    assert request(registry, "PUT", "/relay/ranks", b"x" * 100_000)[0] == 413


@pytest.mark.parametrize("path", ["/relay/ranks/x", "/relay/ranks/-1", "/relay/ranks/²", "/relay/ranks/99"])
def test_unknown_ranks_are_not_found(registry: Address, path: str) -> None:
    assert request(registry, "GET", path.encode("utf-8").decode("latin-1").replace("Â²", "%C2%B2"))[0] == 404


def test_an_occupied_port_is_one_line_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = MooncakeEmbeddingBootstrapServer(HOST, port)
        with pytest.raises(
            SettingError, match=f"bootstrap port {port} cannot be used on {HOST}: Address already in use"
        ):
            server.start()
        server.close()


def test_a_registry_that_is_not_there_is_an_error_with_its_name() -> None:
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        port = closed.getsockname()[1]
        with pytest.raises(RegistryError, match=f"bootstrap registry {HOST}:{port} did not answer"):
            look_up(Address(HOST, port), 0)


def test_the_port_is_free_again_after_close() -> None:
    first = MooncakeEmbeddingBootstrapServer(HOST, 0)
    first.start()
    announce(Address(HOST, first.port), RANK)
    first.close()
    second = MooncakeEmbeddingBootstrapServer(HOST, first.port)
    second.start()
    with pytest.raises(RegistryError):
        look_up(Address(HOST, second.port), 0)
    second.close()


def test_ipv6() -> None:
    server = MooncakeEmbeddingBootstrapServer("::1", 0)
    server.start()
    registry = parse_address(f"[::1]:{server.port}")
    announce(registry, RANK)
    assert look_up(registry, 0) == RANK
    server.close()


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":80", "host:0", "host:65536", "host:\uff18\uff10", "host:x", "host:-1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(RegistryError, match="no address"):
        parse_address(text)


# ---- a client names a host that is no registry

HIDDEN = "hidden-word"


class ForeignHost:
    """Answers whoever connects with these bytes, one connection at a time, and notes how many there were."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self._answer = answer
        self._listening = socket.create_server((HOST, 0))
        self.address = Address(HOST, self._listening.getsockname()[1])
        self.asked = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            with connection:
                if not connection.recv(65536):
                    return  # that was `close`
                self.asked += 1
                self._answer(connection)

    def close(self) -> None:
        with socket.create_connection((self.address.host, self.address.port)):
            pass
        self._thread.join()
        self._listening.close()


def says(*lines: str, body: str = "") -> Callable[[socket.socket], None]:
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "Connection: close", "", ""])
    return lambda connection: connection.sendall((head + body).encode())


def entry(**changes: object) -> str:
    return msgspec.json.encode({**msgspec.to_builtins(RANK), **changes}).decode()


@pytest.fixture
def foreign(request: pytest.FixtureRequest) -> Iterator[ForeignHost]:
    host = ForeignHost(request.param)
    yield host
    host.close()


ANSWERS = {
    "a page": says("HTTP/1.1 200 OK", body=f"<html>{HIDDEN}\n\x1b[31m" + "x" * 1000),
    "not found": says("HTTP/1.1 404 Not Found", body=HIDDEN),
    "unauthorized": says("HTTP/1.1 401 Unauthorized", body=HIDDEN),
    "an error": says(f"HTTP/1.1 500 {HIDDEN}", body=HIDDEN),
    "a redirect": says("HTTP/1.1 302 Found", f"Location: http://{HIDDEN}/", body=HIDDEN),
    "no HTTP": says(f"SSH-2.0-{HIDDEN}"),
    "an unknown version": says(f"HTTP/9.{HIDDEN} 200 OK"),
    "almost an entry": says("HTTP/1.1 200 OK", body=entry(port=HIDDEN)),
    "an entry of another version": says("HTTP/1.1 200 OK", body=entry(handshake={HIDDEN: HIDDEN})),
    "an endless header": says("HTTP/1.1 200 OK", f"{HIDDEN}: {'x' * 70_000}"),
}


@pytest.mark.parametrize("foreign", ANSWERS.values(), ids=ANSWERS, indirect=True)
def test_what_a_foreign_host_answers_is_for_the_log_only(
    foreign: ForeignHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client chooses which host is asked: it must not read there through us."""
    monkeypatch.setattr(client, "_LOOKUP_PATIENCE", 0.0)
    with caplog.at_level(logging.WARNING), language_rank(small_layout()) as language:
        receivers = language.start(str(foreign.address), 1)
        language.wait(receivers.values())
    failure = receivers[1].failure()
    assert failure is not None
    assert failure.code == BAD_GATEWAY
    assert str(foreign.address) in failure.text
    assert HIDDEN not in failure.text
    assert len(failure.text) < 300
    (line,) = [record.getMessage() for record in caplog.records if "cannot be found" in record.getMessage()]
    assert "it said" in line
    assert line.isprintable()
    assert len(line) < 700
    assert foreign.asked == 1


def test_a_host_that_answers_a_byte_at_a_time_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_WHOLE_REQUEST_TIMEOUT", 0.5)
    gone = threading.Event()

    def drip(connection: socket.socket) -> None:
        try:
            while not gone.wait(0.01):
                connection.sendall(b"x")
        except OSError:
            gone.set()

    host = ForeignHost(drip)
    began = time.monotonic()
    with pytest.raises(RegistryError):
        look_up(host.address, 0)
    assert gone.wait(5.0), "the connection was left open"
    assert time.monotonic() - began < 4.0
    host.close()


@pytest.mark.parametrize("foreign", [says("HTTP/1.1 200 OK", body=entry(host="192.0.2.1"))], ids=[""], indirect=True)
def test_a_registry_cannot_name_a_host_that_may_not_be_asked(
    foreign: ForeignHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_LOOKUP_PATIENCE", 0.0)
    monkeypatch.setattr(client, "is_refused", lambda address: pytest.fail(f"{address} was asked"))
    config = RelayConfig(allowed_hosts=AllowedHosts.parse(HOST))
    with language_rank(small_layout(), config) as language:
        receivers = language.start(str(foreign.address), 1)
        language.wait(receivers.values())
    failure = receivers[1].failure()
    assert failure is not None
    assert failure.text.endswith(f"cannot be found: {foreign.address} names a host that may not be asked")


class Answers:
    """Notes what a lookup finds out."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *what: self.heard.append((name, *what[:-1]))


@pytest.mark.parametrize("moves", [False, True])
def test_a_process_is_gone_when_the_data_plane_agrees_about_that_very_one(
    registry: Address, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its address refuses, or a successor has another one. It may still be there, stopped in the middle of a write."""
    monkeypatch.setattr(client, "_LOOKUP_PATIENCE", 0.1)
    answers, may_write = Answers(), {"a1"}
    lookup = PeerLookup(answers, lambda call: call(0.0), has_read_everything=lambda writer: writer not in may_write)
    peer = str(registry)
    with socket.create_server((HOST, 0)) as first, socket.create_server((HOST, 0)) as second:
        known = EncodeRank(0, HOST, first.getsockname()[1], "a1", RANK.handshake)
        announce(registry, known)
        lookup._find(peer)
        assert answers.heard.pop() == ("peer_resolved", peer, known)
        first.close()
        successor = EncodeRank(0, HOST, second.getsockname()[1], "a2", RANK.handshake)
        if moves:
            announce(registry, successor)
        lookup._find(peer)
        assert [name for name, *_ in answers.heard] == ["peer_unreachable"]
        may_write.clear()
        lookup._find(peer)
        assert answers.heard[1] == ("peer_dead", peer)
        assert (("peer_resolved", peer, successor) in answers.heard) is moves
    lookup.close()
