"""One endpoint over real sockets: keys, certificates, health, and addresses that lead nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from embedding_relay.batch.asking import endpoint as endpoint_module
from embedding_relay.batch.asking.endpoint import Endpoint
from embedding_relay.batch.asking.replies import Away, Reply
from embedding_relay.tools.local_process import free_ports
from support.stub_endpoint import StubEndpoint


def test_the_key_goes_to_the_endpoint(stub: StubEndpoint) -> None:
    async def ask() -> None:
        async with Endpoint(stub.url + "/v1/", api_key="secret") as endpoint:
            await endpoint.ask("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}]}')
            assert await endpoint.model() == "stub"
            assert await endpoint.is_there()

    asyncio.run(ask())
    headers = stub.seen()["last_headers"]
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Accept-Encoding"] == "identity"


def test_health_that_is_refused_is_asked_of_the_models(stub: StubEndpoint) -> None:
    async def look() -> bool:
        async with Endpoint(stub.url) as endpoint:
            return await endpoint.is_there()

    for status, there in ((404, True), (503, False), (500, False), (200, True)):
        stub.health(status)
        assert asyncio.run(look()) is there


def test_an_endpoint_that_does_not_even_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine is gone, or nobody takes connections any more: what is sent to it is dropped."""
    monkeypatch.setattr(endpoint_module, "CONNECT_SECONDS", 0.3)
    with contextlib.ExitStack() as sockets:
        deaf = sockets.enter_context(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):  # more than may wait to be taken
            knock = sockets.enter_context(socket.socket())
            knock.setblocking(False)
            knock.connect_ex(deaf.getsockname())

        async def ask() -> Reply:
            async with Endpoint(f"http://127.0.0.1:{deaf.getsockname()[1]}") as endpoint:
                return await endpoint.ask("/v1/chat/completions", b"{}")

        assert asyncio.run(ask()) == Away("no connection within 0.3 s", connected=False)


def test_no_model_is_a_sentence() -> None:
    (port,) = free_ports(1)

    async def ask() -> None:
        async with Endpoint(f"http://127.0.0.1:{port}") as endpoint:
            await endpoint.model()

    with pytest.raises(ConnectionError, match=rf"cannot reach the endpoint \S+:{port} \(connection refused\)"):
        asyncio.run(ask())


def test_a_certificate_of_nobody(tmp_path: Path) -> None:
    """A setting that is wrong is told like an endpoint that is away: it is waited for, and nothing else happens."""
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=there", "-days", "1"]
    subprocess.run([*made, "-keyout", tmp_path / "key", "-out", tmp_path / "cert"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")

    async def ask(scheme: str, context: ssl.SSLContext | None) -> Reply:
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=context)
        async with server, Endpoint(f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}") as endpoint:
            return await endpoint.ask("/v1/chat/completions", b"{}")

    certificate = asyncio.run(ask("https", context))
    assert isinstance(certificate, Away)
    assert certificate.reason == "its certificate is not valid: self-signed certificate"
    no_tls = asyncio.run(ask("https", None))
    assert isinstance(no_tls, Away)
    assert not {"_", "["} & set(no_tls.reason), "these are the words of a library"


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://there", "", "http://", "http://user:pass@there", "http://there/?key=1", "http://[::"],
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        Endpoint(url)
