"""The test transfer of `sglang-relay doctor`: rows of an encode instance without SGLang.

Here the receiver is in the process of the test, which has torch already; else it is in one of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embedding_relay import config, keys
from embedding_relay.config import RelayConfig
from embedding_relay.tools import doctor_transfer
from support.loopback import EncodeInstance, encode_instance, small_layout
from support.rows import Spec
from support.stub_pages import Pages, serving

ROWS = 200
LAYOUT = small_layout(block_size=16)


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deployment") / "secret"
    keys.make_secret(path)
    return path


@pytest.fixture(scope="module")
def encode(secret: Path) -> Iterator[EncodeInstance]:
    with encode_instance(LAYOUT, RelayConfig(keys=keys.read_keys(str(secret)))) as instance:
        yield instance


@pytest.fixture
def server(encode: EncodeInstance) -> Iterator[Pages]:
    """In place of the instance's HTTP server: the rows of any picture are those of its room."""

    def answer(body: str) -> tuple[int, str]:
        encode.expect(Spec(json.loads(body)["bootstrap_room"], ROWS))
        return 200, "{}"

    with serving() as pages:
        pages.on_post = answer
        yield pages


def take_rows(server: Pages, encode: EncodeInstance) -> dict[str, Any]:
    return doctor_transfer.from_peer(server.url, encode.peer, "127.0.0.1", {})


@pytest.mark.parametrize(
    ("plane", "over"), [(config.MOONCAKE, "Mooncake (TCP)"), (config.AUTO, "shared memory")], ids=["mooncake", "auto"]
)
def test_rows_come_by_the_plane_that_an_instance_would_have(
    plane: str, over: str, server: Pages, encode: EncodeInstance, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(config.SECRET_FILE, str(secret))
    monkeypatch.setenv(config.DATA_PLANE, plane)
    answer = take_rows(server, encode)
    assert (answer.get("over"), answer.get("rows")) == (over, ROWS), answer
    assert answer["rounds"] > 1
    assert answer["bytes_per_s"] > 0


def test_what_stands_in_the_way_is_said(
    server: Pages, encode: EncodeInstance, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret that is missing here; then an instance that refuses the picture."""
    assert config.SECRET_FILE in take_rows(server, encode)["error"]
    monkeypatch.setenv(config.SECRET_FILE, str(secret))
    server.on_post = lambda body: (503, '{"message": "512 requests are waiting"}')
    error = take_rows(server, encode)["error"]
    assert "refuses the request for rows: 503" in error
    assert "512 requests are waiting" in error
