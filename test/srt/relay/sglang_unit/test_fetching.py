"""Where an encode instance fetches pictures: at public addresses, unless the operator says otherwise.

SGLang's tokenizer manager, processor and loaders are real; support/tokenizing.py says what is not there.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from sglang.srt.disaggregation.multimodal import preparation
from sglang.srt.utils import ImageData
from support.preparing import PNG, refusal
from support.tokenizing import IMAGE, TokenizerManagerWithoutScheduler

MODE = "encode"


class Pictures(BaseHTTPRequestHandler):
    """/picture is one, /to-<address> redirects there, /<number> answers with it."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        name = self.path[1:]
        self.send_response(200 if name == "picture" else 302 if name.startswith("to-") else int(name))
        if name.startswith("to-"):
            self.send_header("Location", f"http://{name[3:]}/picture")
        self.end_headers()
        if name == "picture":
            self.wfile.write(PNG)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Pictures) as http:
        http.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def fresh_sessions(manager: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own connections: what one may connect to is decided when it is opened."""
    from sglang.srt.utils import common

    monkeypatch.setattr(common, "_mm_http_session", threading.local())
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def names(monkeypatch: pytest.MonkeyPatch, **addresses: list[str]) -> None:
    """What names mean, one answer after the other; the last one stays. Addresses mean themselves."""
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        known = addresses.get(str(host).replace(".", "_"))
        meant = known.pop(0) if known and len(known) > 1 else known[0] if known else host
        return real(meant, port, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def fetch(manager: TokenizerManagerWithoutScheduler, url: str) -> str:
    return refusal(manager, text=f"{IMAGE}a", image_data=[ImageData(url)])


def test_a_private_address_is_not_connected_to(manager: TokenizerManagerWithoutScheduler, server: HTTPServer) -> None:
    for host in ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"):
        for scheme in ("http", "https"):
            url = f"{scheme}://{host}:{server.server_port}/picture"
            assert "has an address that is not public" in fetch(manager, url)
    assert server.asked == []  # type: ignore[attr-defined]


def test_whether_a_private_port_is_open_does_not_show(manager: TokenizerManagerWithoutScheduler) -> None:
    assert "has an address that is not public" in fetch(manager, "http://127.0.0.1:9/picture")


def test_a_name_that_means_a_private_address_a_moment_later_is_sent_nothing(
    manager: TokenizerManagerWithoutScheduler, server: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names(monkeypatch, two_faced=["8.8.8.8", "127.0.0.1"])
    assert "has an address that is not public" in fetch(manager, f"http://two_faced:{server.server_port}/picture")
    assert server.asked == []  # type: ignore[attr-defined]


def test_a_redirect_to_a_private_address_is_not_followed(
    manager: TokenizerManagerWithoutScheduler, server: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first host counts as public here, as nobody can have a public address in a test."""
    from sglang.srt.disaggregation.multimodal import fetching

    real = fetching.is_public
    monkeypatch.setattr(fetching, "is_public", lambda address: str(address) == "127.0.0.1" or real(address))
    url = f"http://127.0.0.1:{server.server_port}/to-127.0.0.2:{server.server_port}"
    assert "or one that it redirects to" in fetch(manager, url)
    assert server.asked == [f"/to-127.0.0.2:{server.server_port}"]  # type: ignore[attr-defined]


@pytest.fixture
def private_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_private_urls_allowed", lambda: True)


@pytest.mark.usefixtures("private_urls")
def test_an_operator_can_allow_private_addresses(manager: TokenizerManagerWithoutScheduler, server: HTTPServer) -> None:
    there = f"127.0.0.1:{server.server_port}"
    for url in (f"http://{there}/picture", f"http://{there}/to-{there}"):
        assert len(manager.prepare(text=f"{IMAGE}a", image_data=[url]).mm_inputs.mm_items) == 1


def test_a_list_of_domains_is_the_whole_answer(
    manager: TokenizerManagerWithoutScheduler, server: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host on it may be private; the list itself is the operator's affair."""
    from sglang.srt.runtime_context import get_mm
    from sglang.srt.utils import common

    common.configure_media_url_security(["127.0.0.1"])
    try:
        with get_mm().override(allowed_media_domains=["127.0.0.1"]):
            url = f"http://127.0.0.1:{server.server_port}/picture"
            assert len(manager.prepare(text=f"{IMAGE}a", image_data=[url]).mm_inputs.mm_items) == 1
            words = fetch(manager, f"http://localhost:{server.server_port}/picture")
            assert words == "a media URL names a host that this server does not fetch from"
    finally:
        common.configure_media_url_security([])


@pytest.mark.usefixtures("private_urls")
def test_what_the_server_of_a_url_does_is_the_clients_affair(
    manager: TokenizerManagerWithoutScheduler, server: HTTPServer
) -> None:
    there = f"127.0.0.1:{server.server_port}"
    assert "its server answered 404" in fetch(manager, f"http://{there}/404")
    assert "its server answered 503" in fetch(manager, f"http://{there}/503")
    assert "could not be reached" in fetch(manager, "http://127.0.0.1:9/picture")
    assert "malformed" in fetch(manager, "http://[::1/picture")
