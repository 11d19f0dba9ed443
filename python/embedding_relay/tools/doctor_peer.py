"""What `sglang-relay doctor --peer` finds out about instances that run, alone and as two halves of a pair."""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import functools
import http.client
import json
import secrets
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from embedding_relay import __version__, config
from embedding_relay.pairing import ALLOWED_HOSTS
from embedding_relay.protocol.encode.sessions import disagreement
from embedding_relay.protocol.messages import MAX_ROOM, RECORD_BYTES, Address, Handshake
from embedding_relay.registry.client import RegistryError, look_up
from embedding_relay.registry.entry import EncodeRank
from embedding_relay.tools.chat_client import chat_body, picture
from embedding_relay.tools.doctor_machine import (
    Finding,
    failed,
    guarded,
    ok,
    settings,
    shown_bytes,
    shown_rate,
    skipped,
    transfer_process,
    warning,
)

_TIMEOUT: Final = 5.0
# Of questions that the scheduler answers, as the router's health checks in the README: a busy one is healthy and slow.
_PATIENCE: Final = 15.0
_LARGEST_ANSWER: Final = 8 << 20
_ENCODE: Final = "encode"
_TRANSFER_TIMEOUT: Final = 120.0
_REQUEST_TIMEOUT: Final = 60.0
_PICTURE: Final = 448
# Of two clocks: what a secret allows, and what makes logs hard to compare.
_CLOCK_LIMIT: Final = 60.0
_CLOCK_UNTIDY: Final = 5.0
# What is about prompts and pictures: the encode instance makes the prompt, the language instance answers for it.
_SAME_FLAGS: Final = (
    "chat_template",
    "context_length",
    "dtype",
    "limit_mm_data_per_request",
    "reasoning_parser",
    "served_model_name",
    "tokenizer_path",
    "tool_call_parser",
)


class InstanceFacts(msgspec.Struct, frozen=True):
    """What an instance says of itself below `internal_states` of SGLang's /server_info."""

    version: str
    mode: str
    handshake: Handshake
    data_plane: str
    has_secret: bool
    heartbeat: float
    """Seconds of silence after which it takes another instance for lost."""


@dataclasses.dataclass
class Peer:
    """An instance, and what it has said so far."""

    address: Address
    """As somebody has named it."""
    url: str
    """Of its HTTP server; empty where only a registry was named."""
    headers: Mapping[str, str]
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """SGLang's /server_info."""
    facts: InstanceFacts | None = None
    registry: Address | None = None
    entry: EncodeRank | None = None
    clock_error: float | None = None
    """Seconds by which its clock is ahead of ours."""

    @property
    def mode(self) -> str:
        if self.facts is not None:
            return self.facts.mode
        return _ENCODE if self.entry is not None else str(self.info.get("disaggregation_mode") or "")

    @property
    def handshake(self) -> Handshake | None:
        if self.facts is not None:
            return self.facts.handshake
        return self.entry.handshake if self.entry is not None else None


# ---- asking


def _ask(url: str, headers: Mapping[str, str], body: Any = None, timeout: float = 0) -> tuple[int, bytes, str]:
    """The status, the body, and the date that it was sent at.

    Raises OSError where no HTTP answer comes, and of these TimeoutError where somebody is there and silent.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with opener.open(request, timeout=timeout or _TIMEOUT) as reply:
            return reply.status, reply.read(_LARGEST_ANSWER), reply.headers.get("Date", "")
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, refusal.read(_LARGEST_ANSWER), refusal.headers.get("Date", "")
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None  # no connection came about
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"it does not speak HTTP ({error!r})") from None


def address_of(url: str) -> Address:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return Address(parts.hostname, parts.port)


def reach(url: str, api_key: str | None) -> tuple[Peer | None, Finding]:
    """Find out what answers there: SGLang's HTTP server, or the registry of an encode instance."""
    address = address_of(url)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    peer = Peer(address, url, headers)
    try:
        status, body, date = _ask(f"{peer.url}/server_info", headers, timeout=_PATIENCE)
    except TimeoutError:
        said = f"{address} takes connections and has not answered for {_PATIENCE:.0f} s"
        todo = "see its log: its scheduler is busy for that long (large pictures on a CPU), stopped, or not there yet"
        return None, failed("reach", said, todo)
    except OSError as error:
        todo = "start the instance, or mend its address (its --host), its port or the firewall between"
        return None, failed("reach", f"nothing answers at {address}: {error}", todo)
    peer.clock_error = _clock_error(date)
    if status == HTTPStatus.OK and (info := _mapping(body)) is not None and "disaggregation_mode" in info:
        peer.info, peer.facts = info, _facts_in(info)
        return _known(peer, address)
    # A registry that refuses says a sentence, SGLang a mapping.
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN) and _mapping(body) is not None:
        return None, failed("reach", f"{address} wants an API key, or another one ({status})", "name it with --api-key")
    try:
        peer.entry, peer.registry, peer.url = _look_up(address), address, ""
    except RegistryError as error:
        if status == HTTPStatus.UNAUTHORIZED:
            return None, failed("reach", str(error), "give this machine a copy of the secret file of that instance")
        todo = "name the --port of an instance, or the --disaggregation-bootstrap-port of an encode instance"
        return None, failed("reach", f"what answers at {address} is no instance: {error}", todo)
    return peer, ok("reach", f"the registry of an encode instance, whose rank 0 is at {peer.entry.address}")


def _known(peer: Peer, address: Address) -> tuple[Peer | None, Finding]:
    version, mode = peer.info.get("version"), peer.mode
    if peer.facts is None and mode not in (_ENCODE, "language"):
        said = f"SGLang {version} with --disaggregation-mode {mode or 'null'}: not a half of a pair"
        return None, failed("reach", said, "name an instance with --disaggregation-mode encode or language")
    if mode == _ENCODE:
        port = peer.info.get("disaggregation_bootstrap_port")
        if isinstance(port, int):
            peer.registry = Address(address.host, port)
    plugin = peer.facts.version if peer.facts else "unknown, older than this one"
    said = f"{mode} instance, SGLang {version}, relay {plugin}, model {peer.info.get('model_path')}"
    return peer, ok("reach", said, mode=mode, sglang=version, relay=plugin)


def _facts_in(info: Mapping[str, Any]) -> InstanceFacts | None:
    states = info.get("internal_states")
    for state in states if isinstance(states, list) else []:
        with contextlib.suppress(msgspec.ValidationError, AttributeError):
            return msgspec.convert(state.get("embedding_relay"), InstanceFacts)
    return None


def _mapping(body: bytes) -> Mapping[str, Any] | None:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _look_up(registry: Address) -> EncodeRank:
    keys = settings().keys
    return look_up(registry, 0, keys.registry if keys else None)


def _clock_error(date: str) -> float | None:
    """To a second, which is what HTTP says."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() - time.time() + 0.5
    except ValueError:
        return None


# ---- one instance


def check_health(peer: Peer) -> Finding:
    if not peer.url:
        return skipped("health", "only its registry was named; name its --port to have this looked at")
    todo = "look for `relay is unhealthy` in its log, or wait for its start"
    try:
        status, _, _ = _ask(f"{peer.url}/health", peer.headers, timeout=_PATIENCE)
    except OSError as error:
        return failed("health", f"/health has not answered in {_PATIENCE:.0f} s ({error})", todo)
    if status == HTTPStatus.OK:
        return ok("health", "it says that it is well")
    return failed("health", f"/health answers {status}", todo)


def check_registry(peer: Peer) -> Finding:
    """Whoever wants rows asks there first, and then connects to the address that it names."""
    if peer.mode != _ENCODE or peer.registry is None:
        return skipped("registry", "it names none, as language instances")
    if peer.entry is None:
        try:
            peer.entry = _look_up(peer.registry)
        except RegistryError as error:
            todo = f"let this machine reach that port, or mend {config.SECRET_FILE}, equal on both machines"
            return failed("registry", str(error), todo)
    where = peer.entry.address
    try:
        socket.create_connection((where.host, where.port), _TIMEOUT).close()
    except OSError as error:
        said = f"{peer.registry} names {where} as its control port, which cannot be reached from here: {error}"
        return failed("registry", said, "give that instance a --host that this machine reaches; see docs/security.md")
    secret = "both have the same secret" if settings().keys else "neither has a secret"
    said = f"{peer.registry} answers, {secret}; its control port {where} can be reached"
    return ok("registry", said, handshake=msgspec.to_builtins(peer.entry.handshake))


def check_clock(peer: Peer) -> Finding:
    off = peer.clock_error
    if off is None:
        return skipped("clocks", "it does not say what time it is there")
    said = f"its clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the clock here"
    if abs(off) > _CLOCK_LIMIT:
        todo = "set both clocks (chrony, systemd-timesyncd): with a secret, a registry refuses who is a minute off"
        return failed("clocks", said, todo, seconds=off)
    if abs(off) > _CLOCK_UNTIDY:
        return warning("clocks", said, "set both clocks: lines of the two logs cannot be compared", seconds=off)
    return ok("clocks", "equal to within what HTTP tells, about a second", seconds=off)


def check_settings(peer: Peer) -> Finding:
    """Would an instance that is started in this environment fit?"""
    theirs, here = peer.handshake, settings()
    if theirs is None:
        return skipped("settings", "it does not say how it is set up: its relay is older than this one")
    if theirs.block_size != here.block_size:
        said = f"{config.BLOCK_SIZE} is {here.block_size} in this environment, and {theirs.block_size} there"
        return failed("settings", said, "set the same on both machines: what differs is refused with 500")
    facts = peer.facts
    if facts is not None and facts.has_secret != (here.keys is not None):
        where = ("there", "here") if facts.has_secret else ("here", "there")
        said = f"{config.SECRET_FILE} is set {where[0]}, and not {where[1]}"
        return failed("settings", said, "give both machines a copy of the same secret file")
    if facts is not None and {facts.data_plane, here.data_plane} == {config.MOONCAKE, config.SHARED_MEMORY}:
        said = f"{config.DATA_PLANE} is {here.data_plane} in this environment, and {facts.data_plane} there"
        return failed("settings", said, "leave it at auto on one of them at least")
    hosts = {peer.address.host, *([peer.entry.host] if peer.entry else [])}
    if peer.mode == _ENCODE and (strange := sorted(host for host in hosts if not here.may_ask(host))):
        said = f"{ALLOWED_HOSTS} of this environment does not name {', '.join(strange)}"
        return failed("settings", said, "add it, as the router and the registry name that instance")
    pool = theirs.blocks * (sum(theirs.item_lens) + RECORD_BYTES * theirs.block_size)
    said = f"blocks of {theirs.block_size} rows on both; its pool of {theirs.blocks} takes {shown_bytes(pool)}"
    return ok("settings", said, pool_bytes=pool)


def check_version(peer: Peer) -> Finding:
    if peer.facts is None:
        return skipped("version", "it does not say which version of the relay it has")
    if peer.facts.version != __version__:
        said = f"the relay is {peer.facts.version} there, and {__version__} here"
        return warning("version", said, "install the same on both: other pairs are not tested")
    return ok("version", f"the relay is {__version__} on both")


def check_transfer(peer: Peer) -> Finding:
    """Rows go from encode to language instances, so this machine can take some from an encode instance only."""
    if peer.mode != _ENCODE:
        return skipped("transfer", "rows come from encode instances: run this on its machine, with one as the --peer")
    if not peer.url or peer.registry is None or peer.entry is None:
        return skipped("transfer", "it takes the HTTP port and the registry of an encode instance")
    host = _own_address(peer.entry.address)
    job = {"url": peer.url, "registry": str(peer.registry), "host": host, "headers": dict(peer.headers)}
    answer = transfer_process({"peer": job}, _TRANSFER_TIMEOUT)
    if "skipped" in answer:
        return skipped("transfer", answer["skipped"])
    if "error" in answer:
        todo = f"it connects to {host}: see docs/security.md for the ports, docs/operations.md for what the line says"
        return failed("transfer", answer["error"], todo)
    said = f"a picture of {answer['rows']} rows, {shown_bytes(answer['bytes'])}, came over {answer['over']}"
    said += f" in {answer['rounds']} rounds"
    if "bytes_per_s" in answer:
        said += f", {shown_rate(answer)} from its first row to its last"
    return ok("transfer", said, **answer)


def _own_address(other: Address) -> str:
    """By which the other side reaches this machine, as far as routes tell. No packet is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(other.host, other.port, type=socket.SOCK_DGRAM)[0]
    with contextlib.closing(socket.socket(family, kind, protocol)) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


# ---- two halves


def check_model(encode: Peer, language: Peer) -> Finding:
    if encode.handshake is None or language.handshake is None:
        return skipped("model", "one of the two does not say how it is set up: its relay is older than this one")
    if differs := disagreement(encode.handshake, language.handshake):
        return failed("model", differs, "start both with the same model, --dtype and settings: this is a 500 now")
    facts = dict(encode.handshake.model)
    said = f"{facts.get('architecture', 'the same')}, {encode.handshake.dtype}, rows and blocks alike"
    return ok("model", f"{said} (two fine-tunes of one model look alike)")


def check_pair_settings(encode: Peer, language: Peer) -> Finding:
    one, other = encode.facts, language.facts
    if one is None or other is None:
        return skipped("settings", "one of the two does not say how it is set up: its relay is older than this one")
    if one.has_secret != other.has_secret:
        who = (language if one.has_secret else encode).address
        said = f"{config.SECRET_FILE} is not set at {who}, and at the other it is"
        return failed("settings", said, "give both a copy of the same secret file")
    if {one.data_plane, other.data_plane} == {config.MOONCAKE, config.SHARED_MEMORY}:
        said = f"{config.DATA_PLANE} is {one.data_plane} at {encode.address}, {other.data_plane} at {language.address}"
        return failed("settings", said, "leave it at auto on one of them at least")
    if one.heartbeat != other.heartbeat:
        said = f"{encode.address} waits {one.heartbeat:g} s for a silent peer, {language.address} {other.heartbeat:g} s"
        return warning("settings", said, f"set {config.HEARTBEAT_INTERVAL} and its maximum of failures alike")
    return ok("settings", "secret, data plane and heartbeat fit")


def check_flags(encode: Peer, language: Peer) -> Finding:
    """Flags about prompts belong on both: the encode instance makes the prompt."""
    if not encode.info or not language.info:
        return skipped("flags", "it takes the HTTP port of both")
    one, other = ({name: peer.info.get(name) for name in _SAME_FLAGS} for peer in (encode, language))
    if encode.info.get("model_path") != language.info.get("model_path"):  # each has its own copy: these follow it
        one = {name: None if value == encode.info.get("model_path") else value for name, value in one.items()}
        other = {name: None if value == language.info.get("model_path") else value for name, value in other.items()}
    differing = [name for name in _SAME_FLAGS if one[name] != other[name]]
    if differing:
        said = "; ".join(f"--{name.replace('_', '-')} is {one[name]} and {other[name]}" for name in differing)
        return warning(
            "flags", f"at {encode.address} and {language.address}: {said}"[:500], "give both instances the same"
        )
    return ok("flags", "those about prompts and pictures are the same")


def check_request(encode: Peer, language: Peer) -> Finding:
    """One question about a picture, sent to both halves as the router does."""
    if not encode.url or not language.url or encode.registry is None:
        return skipped("request", "it takes the HTTP port of both")
    if language.info.get("disaggregation_mode") != "language" or language.info.get("encoder_urls"):
        return skipped("request", "it takes a language instance that a router pairs")
    try:
        shown = picture(_PICTURE, _PICTURE, secrets.randbelow(1 << 32))
    except ModuleNotFoundError as error:
        return skipped("request", f"{error.name} is not installed here, which makes a picture")
    where, room = encode.registry, secrets.randbelow(MAX_ROOM)
    pairing = {"bootstrap_host": where.host, "bootstrap_port": where.port, "bootstrap_room": room}
    body = chat_body([shown], "What is this?", max_tokens=1, logprobs=False, **pairing)
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda peer: _answer(peer, body), (encode, language)))
    seconds = time.monotonic() - started
    if flaws := "; ".join(filter(None, answers)):
        return failed("request", flaws[:500], f"look for room {room} in both logs; docs/operations.md, By what you see")
    return ok("request", f"a picture went through both halves, and was answered in {seconds:.2g} s", seconds=seconds)


def _answer(peer: Peer, body: Mapping[str, Any]) -> str:
    """Empty if it is one."""
    try:
        status, text, _ = _ask(f"{peer.url}/v1/chat/completions", peer.headers, body, _REQUEST_TIMEOUT)
    except OSError as error:
        return f"{peer.address} does not answer the request: {error}"
    return "" if status == HTTPStatus.OK else f"{peer.address} answers {status} {text[:200].decode(errors='replace')}"


def check_versions(encode: Peer, language: Peer) -> Finding:
    one, other = (
        (peer.facts.version if peer.facts else "unknown", str(peer.info.get("version", "unknown")))
        for peer in (encode, language)
    )
    if one != other:
        said = (
            f"{encode.address} has relay {one[0]} on SGLang {one[1]}, {language.address} relay {other[0]} on {other[1]}"
        )
        return warning("versions", said, "install the same on both: other pairs are not tested")
    return ok("versions", f"relay {one[0]} on SGLang {one[1]} at both")


# ---- all of it

PeerCheck = Callable[[Peer], Finding]
PairCheck = Callable[[Peer, Peer], Finding]

ALONE: Final[Mapping[str, PeerCheck]] = {"health": check_health, "registry": check_registry, "clocks": check_clock}
WITH_THIS_MACHINE: Final[Mapping[str, PeerCheck]] = {"version": check_version, "settings": check_settings}
TOGETHER: Final[Mapping[str, PairCheck]] = {
    "versions": check_versions,
    "model": check_model,
    "settings": check_pair_settings,
    "flags": check_flags,
    "request": check_request,
}


def check_peers(urls: Sequence[str], api_key: str | None) -> Iterator[tuple[str, Finding]]:
    """What each finding is about, and the finding. A single peer is compared with what would be started here."""
    peers = []
    for url in urls:
        name = f"peer {address_of(url)}"
        try:
            peer, finding = reach(url, api_key)
        except Exception as error:
            peer, finding = None, failed("reach", f"this check failed itself: {error!r}", "report it, with this line")
        yield name, finding
        if peer is None:
            continue
        peers.append(peer)
        checks = {**ALONE, **(WITH_THIS_MACHINE if len(urls) == 1 else {}), "transfer": check_transfer}
        for check_name, check in checks.items():
            yield name, guarded(check_name, functools.partial(check, peer))
    encodes = [peer for peer in peers if peer.mode == _ENCODE]
    for encode in encodes:
        for language in (peer for peer in peers if peer.mode != _ENCODE):
            for check_name, together in TOGETHER.items():
                finding = guarded(check_name, functools.partial(together, encode, language))
                yield f"{encode.address} and {language.address}", finding
