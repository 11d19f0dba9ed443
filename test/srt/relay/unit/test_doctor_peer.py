"""What `doctor --peer` says about an instance, and about two halves: each as it should be, and as it should not."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from embedding_relay import __version__, config, keys
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.protocol.messages import Address
from embedding_relay.registry.client import announce
from embedding_relay.registry.entry import EncodeRank
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.tools import doctor_peer
from embedding_relay.tools.doctor_machine import Finding, Outcome
from embedding_relay.tools.doctor_peer import Peer
from embedding_relay.tools.local_process import free_ports
from support.stub_pages import Pages, serving

HOST = "127.0.0.1"
LAYOUT = BufferLayout(64, "bfloat16", 0, 128, 16, model=(("architecture", "Qwen"), ("layers", "2")))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SGLANG_", "MC_", "MOONCAKE_")):
            monkeypatch.delenv(name)


def facts(mode: str, layout: BufferLayout = LAYOUT, **changes: Any) -> dict[str, Any]:
    """As a scheduler of ours says it."""
    said = {
        "version": __version__,
        "mode": mode,
        "handshake": msgspec.to_builtins(layout.handshake()),
        "data_plane": "auto",
        "has_secret": False,
        "heartbeat": 15.0,
    }
    return said | changes


def server_info(mode: str, port: int = 8998, facts: Mapping[str, Any] | None = None, **changes: Any) -> str:
    """The part of SGLang's page that is looked at."""
    said = {
        "disaggregation_mode": mode,
        "disaggregation_bootstrap_port": port,
        "version": "0.5.23",
        "model_path": "/models/qwen",
        "internal_states": [{"some": "thing", "embedding_relay": facts} if facts else {"some": "thing"}],
    }
    return json.dumps(said | changes)


@dataclasses.dataclass
class Encode:
    """What of an encode instance can be reached: pages, a registry that knows its rank, and a control port."""

    pages: Pages
    registry: MooncakeEmbeddingBootstrapServer
    control: socket.socket

    @property
    def rank(self) -> EncodeRank:
        return EncodeRank(0, HOST, self.control.getsockname()[1], "encode-1", LAYOUT.handshake())

    def shows(self, **changes: Any) -> None:
        said = server_info("encode", self.registry.port, facts("encode"), **changes)
        self.pages.pages["/server_info"] = (200, said)


def registry(key: bytes | None = None) -> MooncakeEmbeddingBootstrapServer:
    server = MooncakeEmbeddingBootstrapServer(HOST, 0, key)
    server.start()
    return server


@pytest.fixture
def encode() -> Iterator[Encode]:
    with (
        serving(health="") as pages,
        closing(registry()) as server,
        closing(socket.create_server((HOST, 0))) as control,
    ):
        made = Encode(pages, server, control)
        announce(Address(HOST, server.port), made.rank)
        made.shows()
        yield made


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Any]], list[Any]]:
    """The process that takes rows answers this. The lanes with servers show the real one."""

    def answer(with_this: Mapping[str, Any]) -> list[Any]:
        jobs: list[Any] = []

        def process(job: Any, timeout: float) -> Mapping[str, Any]:
            jobs.append(job)
            return with_this

        monkeypatch.setattr(doctor_peer, "transfer_process", process)
        return jobs

    return answer


MOVED = {"over": "Mooncake (TCP)", "rows": 1600, "rounds": 13, "bytes": 4_000_000, "bytes_per_s": 5e8}


def found(*urls: str, key: str | None = None) -> dict[tuple[str, str], Finding]:
    return {(about, finding.name): finding for about, finding in doctor_peer.check_peers(urls, key)}


def only(findings: Mapping[tuple[str, str], Finding]) -> dict[str, Finding]:
    """Those of one peer, by name."""
    return {name: finding for (_, name), finding in findings.items()}


def is_wrong(finding: Finding, outcome: Outcome, said: str, todo: str = "") -> None:
    assert finding.outcome is outcome, finding
    assert said in finding.said
    assert finding.todo
    assert todo in finding.todo


# ---- one instance


def test_an_encode_instance_that_is_well(encode: Encode, transfers: Callable[..., list[Any]]) -> None:
    jobs = transfers(MOVED)
    findings = only(found(encode.pages.url))
    assert {name: finding.outcome for name, finding in findings.items()} == dict.fromkeys(
        ("reach", "health", "registry", "clocks", "version", "settings", "transfer"), Outcome.OK
    )
    assert "encode instance, SGLang 0.5.23" in findings["reach"].said
    assert findings["transfer"].said == (
        "a picture of 1600 rows, 4 MB, came over Mooncake (TCP) in 13 rounds, 500 MB/s from its first row to its last"
    )
    assert jobs == [
        {"peer": {"url": encode.pages.url, "registry": f"{HOST}:{encode.registry.port}", "host": HOST, "headers": {}}}
    ]


def test_a_registry_is_enough_for_most(encode: Encode, transfers: Callable[..., list[Any]]) -> None:
    jobs = transfers(MOVED)
    findings = only(found(f"http://{HOST}:{encode.registry.port}"))
    assert findings["reach"].outcome is findings["registry"].outcome is findings["settings"].outcome is Outcome.OK
    assert findings["health"].outcome is findings["transfer"].outcome is Outcome.SKIPPED
    assert jobs == []


def test_a_language_instance(transfers: Callable[..., list[Any]]) -> None:
    jobs = transfers(MOVED)
    with serving(health="", server_info=server_info("language", facts=facts("language"))) as pages:
        findings = only(found(pages.url))
    assert findings["settings"].outcome is Outcome.OK
    assert findings["registry"].outcome is findings["transfer"].outcome is Outcome.SKIPPED
    assert jobs == []


def test_a_prefill_instance_is_a_language_instance() -> None:
    """SGLang knows the second of three stages by another mode."""
    with serving(health="", server_info=server_info("prefill", facts=facts("language"))) as pages:
        assert "language instance" in only(found(pages.url))["reach"].said


def test_nobody_is_there() -> None:
    findings = only(found(f"http://{HOST}:{free_ports(1)[0]}"))
    assert list(findings) == ["reach"]
    is_wrong(findings["reach"], Outcome.FAILED, "refused", "start the instance")


def test_something_else_is_there() -> None:
    with serving() as pages:
        is_wrong(only(found(pages.url))["reach"], Outcome.FAILED, "no instance", "--disaggregation-bootstrap-port")
    with serving(server_info=server_info("null")) as pages:
        is_wrong(only(found(pages.url))["reach"], Outcome.FAILED, "not a half", "encode or language")


def test_somebody_is_there_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_peer, "_PATIENCE", 0.05)
    with closing(socket.create_server((HOST, 0))) as silent:
        findings = only(found(f"http://{HOST}:{silent.getsockname()[1]}"))
    is_wrong(findings["reach"], Outcome.FAILED, "takes connections and has not answered", "see its log")


@pytest.mark.parametrize("info", ["[" * 5000, "[]", '{"disaggregation_mode": "encode", "internal_states": 7}', "{"])
def test_nonsense_is_survived(info: str, transfers: Callable[..., list[Any]]) -> None:
    transfers(MOVED)
    with serving(server_info=info) as pages:
        findings = found(pages.url).values()
    assert not any("failed itself" in finding.said for finding in findings), findings


def test_an_api_key(encode: Encode, transfers: Callable[..., list[Any]]) -> None:
    jobs = transfers(MOVED)
    found(encode.pages.url, key="sesame")
    assert {sent for _, sent in encode.pages.asked} == {"Bearer sesame"}
    assert jobs[0]["peer"]["headers"] == {"Authorization": "Bearer sesame"}
    encode.pages.pages["/server_info"] = (401, '{"error": "Unauthorized"}')
    is_wrong(only(found(encode.pages.url))["reach"], Outcome.FAILED, "API key", "--api-key")


def test_an_instance_that_is_not_well(encode: Encode, transfers: Callable[..., list[Any]]) -> None:
    transfers({"error": "the engine of 10.0.0.1:15000 cannot be reached"})
    encode.pages.pages["/health"] = (503, "")
    encode.pages.clock_error = 90.0
    encode.control.close()
    findings = only(found(encode.pages.url))
    is_wrong(findings["health"], Outcome.FAILED, "503", "relay is unhealthy")
    is_wrong(findings["clocks"], Outcome.FAILED, "ahead of", "chrony")
    is_wrong(findings["registry"], Outcome.FAILED, "cannot be reached from here", "--host")
    is_wrong(findings["transfer"], Outcome.FAILED, "10.0.0.1:15000", "docs/security.md")


def test_clocks_that_are_some_seconds_apart(encode: Encode, transfers: Callable[..., list[Any]]) -> None:
    transfers(MOVED)
    encode.pages.clock_error = -20.0
    is_wrong(only(found(encode.pages.url))["clocks"], Outcome.WARNING, "behind", "logs")


def test_the_registry_of_an_instance_is_gone(encode: Encode, transfers: Callable[..., list[Any]]) -> None:
    transfers(MOVED)
    encode.registry.close()
    findings = only(found(encode.pages.url))
    is_wrong(findings["registry"], Outcome.FAILED, "did not answer", "port")
    assert findings["transfer"].outcome is Outcome.SKIPPED


# ---- an instance and this environment


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    keys.make_secret(tmp_path / "secret")
    return tmp_path / "secret"


def test_a_secret_that_only_we_have(encode: Encode, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(config.SECRET_FILE, str(secret))
    findings = only(found(encode.pages.url))
    is_wrong(findings["registry"], Outcome.FAILED, "does not prove that it has our secret", config.SECRET_FILE)
    is_wrong(findings["settings"], Outcome.FAILED, "is set here, and not there", "same secret")


def test_a_secret_that_only_the_peer_has(secret: Path) -> None:
    with closing(registry(keys.read_keys(str(secret)).registry)) as server:
        finding = only(found(f"http://{HOST}:{server.port}"))["reach"]
    is_wrong(finding, Outcome.FAILED, f"{config.SECRET_FILE} is set there, and is missing here", "a copy of the secret")


def test_another_block_size(encode: Encode, transfers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    transfers(MOVED)
    monkeypatch.setenv(config.BLOCK_SIZE, "64")
    is_wrong(only(found(encode.pages.url))["settings"], Outcome.FAILED, "is 64 in this environment, and 128", "same")


def test_planes_that_have_nothing_in_common(
    encode: Encode, transfers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    transfers(MOVED)
    said = server_info("encode", encode.registry.port, facts("encode", data_plane="mooncake"))
    encode.pages.pages["/server_info"] = (200, said)
    assert only(found(encode.pages.url))["settings"].outcome is Outcome.OK
    monkeypatch.setenv(config.DATA_PLANE, config.SHARED_MEMORY)
    is_wrong(only(found(encode.pages.url))["settings"], Outcome.FAILED, config.DATA_PLANE, "auto")


def test_a_host_that_may_not_be_asked(
    encode: Encode, transfers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    transfers(MOVED)
    monkeypatch.setenv("SGLANG_EMBEDDING_ALLOWED_HOSTS", "10.0.0.0/8")
    is_wrong(only(found(encode.pages.url))["settings"], Outcome.FAILED, HOST, "add it")


def test_another_version(encode: Encode, transfers: Callable[..., Any]) -> None:
    transfers(MOVED)
    said = server_info("encode", encode.registry.port, facts("encode", version="0.0.9"))
    encode.pages.pages["/server_info"] = (200, said)
    is_wrong(only(found(encode.pages.url))["version"], Outcome.WARNING, "0.0.9 there", "same")
    encode.pages.pages["/server_info"] = (200, server_info("encode", encode.registry.port))  # it says nothing of itself
    findings = only(found(encode.pages.url))
    assert findings["version"].outcome is Outcome.SKIPPED
    assert findings["settings"].outcome is Outcome.OK, "its registry does"


# ---- two halves


def half(mode: str, port: int, said: Mapping[str, Any] | None = None, **info: Any) -> Peer:
    everything = {"version": "0.5.23", "model_path": "/models/qwen", **info}
    known = msgspec.convert(facts(mode) | dict(said or {}), doctor_peer.InstanceFacts)
    return Peer(Address(HOST, port), f"http://{HOST}:{port}", {}, everything, known)


def test_two_halves_that_fit(encode: Encode, transfers: Callable[..., Any]) -> None:
    transfers(MOVED)
    rooms = []

    def answer(body: str) -> tuple[int, str]:
        asked = json.loads(body)
        rooms.append((asked["bootstrap_host"], asked["bootstrap_port"], asked["bootstrap_room"]))
        return 200, "{}"

    with serving(health="", server_info=server_info("language", facts=facts("language"))) as language:
        language.on_post = encode.pages.on_post = answer
        findings = found(language.url, encode.pages.url)
    assert len(rooms) == 2
    assert len(set(rooms)) == 1, "both are asked about one room, as by a router"
    assert rooms[0][:2] == (HOST, encode.registry.port)
    [together] = {about for about, _ in findings if " and " in about}
    assert together == f"{encode.pages.url[7:]} and {language.url[7:]}"
    assert {name: one.outcome for (about, name), one in findings.items() if about == together} == dict.fromkeys(
        doctor_peer.TOGETHER, Outcome.OK
    )
    compared = {name for about, name in findings if about != together}
    assert not compared & set(doctor_peer.WITH_THIS_MACHINE), "they are compared with each other, and not with us"


def test_two_models() -> None:
    other = dataclasses.replace(LAYOUT, model=(("architecture", "Qwen"), ("layers", "36")), dtype="float16")
    said = {"handshake": msgspec.to_builtins(other.handshake())}
    finding = doctor_peer.check_model(half("encode", 1), half("language", 2, said))
    is_wrong(finding, Outcome.FAILED, "model layers is 2 at the encode side and 36 at the language side", "same model")
    assert "dtype is bfloat16" in finding.said


@pytest.mark.parametrize(
    ("said", "outcome", "text"),
    [
        ({"has_secret": True}, Outcome.FAILED, f"{config.SECRET_FILE} is not set at {HOST}:1"),
        ({"heartbeat": 60.0}, Outcome.WARNING, "60 s"),
    ],
)
def test_settings_of_two_halves(said: Mapping[str, Any], outcome: Outcome, text: str) -> None:
    is_wrong(doctor_peer.check_pair_settings(half("encode", 1), half("language", 2, said)), outcome, text)


def test_planes_of_two_halves() -> None:
    planes = [{"data_plane": plane} for plane in (config.MOONCAKE, config.SHARED_MEMORY)]
    finding = doctor_peer.check_pair_settings(half("encode", 1, planes[0]), half("language", 2, planes[1]))
    is_wrong(finding, Outcome.FAILED, config.DATA_PLANE, "auto")


def test_flags_about_prompts_belong_on_both() -> None:
    one, other = half("encode", 1, chat_template="a", page_size=1), half("language", 2, chat_template="b", page_size=2)
    finding = doctor_peer.check_flags(one, other)
    is_wrong(finding, Outcome.WARNING, "--chat-template is a and b", "same")
    assert "page" not in finding.said, "what is about generating differs as it likes"


def test_each_half_may_have_its_own_copy_of_the_model() -> None:
    """SGLang fills in names that follow the path."""
    one, other = (
        half(mode, 1, model_path=path, served_model_name=path, tokenizer_path=path)
        for mode, path in (("encode", "/a"), ("language", "/b"))
    )
    assert doctor_peer.check_flags(one, other).outcome is Outcome.OK


def test_a_request_that_fails_is_quoted(encode: Encode, transfers: Callable[..., Any]) -> None:
    transfers(MOVED)
    with serving(health="", server_info=server_info("language", facts=facts("language"))) as language:
        language.on_post = lambda body: (502, '{"message": "encode instance did not answer"}')
        rooms = []
        encode.pages.on_post = lambda body: rooms.append(json.loads(body)["bootstrap_room"]) or (200, "{}")
        findings = {name: one for (_, name), one in found(encode.pages.url, language.url).items()}
    is_wrong(findings["request"], Outcome.FAILED, "502", f"look for room {rooms[0]} in both logs")
    assert "did not answer" in findings["request"].said


@pytest.mark.parametrize("info", [{"disaggregation_mode": "prefill"}, {"encoder_urls": ["http://a:1"]}])
def test_a_language_instance_that_asks_by_itself_is_not_paired(info: Mapping[str, Any]) -> None:
    encode, language = half("encode", 1), half("language", 2, **({"disaggregation_mode": "language"} | dict(info)))
    encode.registry = Address(HOST, 8998)
    assert doctor_peer.check_request(encode, language).outcome is Outcome.SKIPPED


def test_versions_of_two_halves() -> None:
    finding = doctor_peer.check_versions(half("encode", 1), half("language", 2, version="0.5.22"))
    is_wrong(finding, Outcome.WARNING, "0.5.22", "same")
