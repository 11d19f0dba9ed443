"""The bootstrap registry over real HTTP."""

import http.client
import socket
from collections.abc import Iterator

import pytest

from embedding_relay.protocol.errors import SettingError
from embedding_relay.protocol.messages import Address
from embedding_relay.registry.client import RegistryError, announce, look_up, parse_address
from embedding_relay.registry.entry import EncodeRank
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from support.loopback import HOST, small_layout

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
    with pytest.raises(RegistryError, match="no encode rank 0"):
        look_up(registry, 0)
    announce(registry, RANK)
    assert look_up(registry, 0) == RANK


def test_a_new_process_replaces_the_old_one(registry: Address) -> None:
    announce(registry, RANK)
    newer = EncodeRank(0, HOST, 4321, "def", RANK.handshake)
    announce(registry, newer)
    assert look_up(registry, 0) == newer


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
