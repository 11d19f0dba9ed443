"""The test transfers of `sglang-relay doctor`, in a process of their own: it is given a job as JSON, and answers so.

On one machine the two data planes write from memory to memory. From an encode instance that runs, this process takes
rows as a language rank does: found in the registry, asked for over the control port, written by the data plane.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import math
import mmap
import secrets
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

from embedding_relay.config import MOONCAKE, RelayConfig
from embedding_relay.memory.engine import MooncakeDataPlane
from embedding_relay.memory.layout import DTYPE_BYTES, BufferLayout
from embedding_relay.memory.plane import DataPlane, Entry, Region
from embedding_relay.memory.shared_plane import SharedMemoryDataPlane
from embedding_relay.protocol.errors import RelayError
from embedding_relay.protocol.messages import MAX_ROOM, Handshake
from embedding_relay.protocol.status import Status, is_final
from embedding_relay.registry.client import look_up, parse_address

if TYPE_CHECKING:
    from embedding_relay.transport.language import LanguageManager

# Of a local transfer: as much at once as a large picture has, again and again for a moment.
_LENGTH: Final = 16 << 20
_PIECE: Final = 1 << 20
_SECONDS: Final = 0.3

# Of a transfer from a peer: rows that are on offer at a time, and pools of them, so that a picture takes some rounds.
_OFFERED: Final = 64
_POOLS: Final = 2
# Its side in pixels: some hundred rows with most models, and soon encoded where there is no accelerator.
_PICTURE: Final = 448
_LARGEST_POOL: Final = 2 << 30
_PATIENCE: Final = 60.0
_LOOK_EVERY: Final = 0.001


class Flawed(RelayError):
    """A transfer that came to nothing, and why."""


# ---- on this machine


def local(host: str, transport: str | None, planes: list[str]) -> dict[str, Any]:
    return {plane: _tried(plane, host, transport) for plane in planes}


def _tried(plane: str, host: str, transport: str | None) -> dict[str, Any]:
    try:
        if plane == MOONCAKE:
            reader, writer = (MooncakeDataPlane(host, transport, receives=receives) for receives in (True, False))
            return _write(reader, writer, f"Mooncake ({'TCP' if reader.is_tcp else 'RDMA'})")
        return _write(SharedMemoryDataPlane(None), SharedMemoryDataPlane(None, "doctor"), "shared memory")
    except (RelayError, OSError) as error:
        return {"error": str(error)}


def _write(reader: DataPlane, writer: DataPlane, over: str) -> dict[str, Any]:
    """Until the time is up; then the reader's memory must be what the writer's is."""
    target, source = reader.allocate(_LENGTH), writer.allocate(_LENGTH)
    source[:] = secrets.token_bytes(_LENGTH)
    there, here = _region(target), _region(source)
    with closing(reader), closing(writer):
        reader.start([there])
        writer.start([here])
        link = writer.link(reader.session_id, reader.memory_name)
        entries = [Entry(here.pointer + at, there.pointer + at, _PIECE) for at in range(0, _LENGTH, _PIECE)]
        link.write(entries)  # the first one makes the connection
        started, times = time.monotonic(), 0
        while time.monotonic() < started + _SECONDS:
            link.write(entries)
            times += 1
        seconds = time.monotonic() - started
        link.close()
    if target[:] != source[:]:
        raise Flawed(f"what arrived over {over} is not what was sent")
    moved = times * _LENGTH
    return {"over": over, "bytes": moved, "seconds": seconds, "bytes_per_s": moved / seconds}


def _region(memory: mmap.mmap) -> Region:
    return Region(ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory))


# ---- from an encode instance


def from_peer(url: str, registry: str, host: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """One picture at the server `url`, whose rows come here. `host`: an address of this machine that it reaches."""
    # What a receiver of rows needs; torch is imported when it is known that there will be some.
    if missing := [name for name in ("torch", "numpy", "PIL") if importlib.util.find_spec(name) is None]:
        return {"skipped": f"{', '.join(missing)}: not installed here, which a receiver of rows needs"}
    try:
        return _take_rows(url, registry, host, headers)
    except (RelayError, OSError) as error:
        return {"error": str(error)}


def _take_rows(url: str, registry: str, host: str, headers: Mapping[str, str]) -> dict[str, Any]:
    config = RelayConfig.from_environment()
    rank = look_up(parse_address(registry), 0, config.keys.registry if config.keys else None)
    layout = layout_of(rank.handshake)
    config = dataclasses.replace(
        config,
        cache_blocks=layout.blocks,
        block_size=layout.block_size,
        default_allocate_tokens=max(_OFFERED, layout.block_size),
        bootstrap_timeout=_PATIENCE,
        waiting_timeout=_PATIENCE,
    )
    from embedding_relay.memory.checks import ModelLimits
    from embedding_relay.transport.language import LanguageManager

    # A picture of any kind, and nobody computes with its rows.
    anything = ModelLimits(vocabulary=(1 << 31) - 1, modalities=frozenset(range(64)))
    manager = LanguageManager.open(layout, config, host=host, ranks=1, max_rows=1 << 20, limits=anything)
    with closing(manager):
        manager.start()
        # The first of its ranks has such a room.
        room = secrets.randbelow(MAX_ROOM // rank.ranks) * rank.ranks
        return _take_picture(manager, Request(url, registry, room, headers))


def _take_picture(manager: LanguageManager, request: Request) -> dict[str, Any]:
    from embedding_relay.transport.language import MooncakeEmbeddingReceiver

    receiver = MooncakeEmbeddingReceiver(manager, request.registry, request.room)
    request.start()
    receiver.start()
    began, first_bytes, deadline = 0.0, 0, time.monotonic() + _PATIENCE
    while not is_final(receiver.poll()):
        now = time.monotonic()
        if receiver.bytes and not began:
            began, first_bytes = now, receiver.bytes
        if (request.refusal and not began) or now > deadline:
            receiver.abort()
            raise request.failure(f"the rows did not come within {_PATIENCE:g} s: the room is {receiver.poll().name}")
        time.sleep(_LOOK_EVERY)
    seconds = time.monotonic() - began
    if receiver.poll() is not Status.SUCCESS:
        raise request.failure(str(receiver.failure()))
    mooncake = f"Mooncake ({'TCP' if manager.plane.reads_any_memory else 'RDMA'})"
    answer: dict[str, Any] = {
        "over": "shared memory" if manager.plane.mapped else mooncake,
        "rows": receiver.rows().total,
        "rounds": receiver.rounds,
        "bytes": receiver.bytes,
    }
    if began and receiver.bytes > first_bytes:  # else all were there when we first looked
        answer |= {"seconds": seconds, "bytes_per_s": (receiver.bytes - first_bytes) / seconds}
    return answer


def layout_of(theirs: Handshake) -> BufferLayout:
    """Ours, made so that the two agree; raises Flawed if they cannot."""
    width = DTYPE_BYTES.get(theirs.dtype, 0) * theirs.block_size
    if not width or not theirs.item_lens[0] // width:
        raise Flawed(f"the encode instance has rows of {theirs.dtype}, which this version does not know")
    offered = math.ceil(_OFFERED / theirs.block_size)
    layout = BufferLayout(
        hidden_size=theirs.item_lens[0] // width,
        dtype=theirs.dtype,
        deepstack_rows=theirs.deepstack_rows,
        block_size=theirs.block_size,
        blocks=max(2, _POOLS * offered),
        model=theirs.model,
    )
    ours = layout.handshake()
    if ours.version != theirs.version or ours.item_lens != theirs.item_lens:
        raise Flawed("the encode instance runs another version of the relay, whose rows have other columns")
    if layout.pool_bytes > _LARGEST_POOL:
        raise Flawed("the encode instance names rows that take more memory than a test is worth")
    return layout


class Request:
    """The request at the encode instance, which is answered when its rows have left."""

    def __init__(self, url: str, registry: str, room: int, headers: Mapping[str, str]) -> None:
        self.registry = registry
        self.room = room
        self.refusal = ""
        self._url = url
        self._headers = headers

    def failure(self, otherwise: str) -> Flawed:
        return Flawed(f"{self._url} refuses the request for rows: {self.refusal}" if self.refusal else otherwise)

    def start(self) -> None:
        from embedding_relay.tools.chat_client import chat_body, picture

        where = parse_address(self.registry)
        pairing = {"bootstrap_host": where.host, "bootstrap_port": where.port, "bootstrap_room": self.room}
        # One that its cache has not.
        shown = picture(_PICTURE, _PICTURE, secrets.randbelow(1 << 32))
        body = chat_body([shown], "What is this?", max_tokens=1, logprobs=False, **pairing)
        threading.Thread(target=self._ask, args=(body,), daemon=True).start()

    def _ask(self, body: Mapping[str, Any]) -> None:
        from embedding_relay.tools.chat_client import post

        try:
            answer = post(f"{self._url}/v1/chat/completions", body, headers=self._headers, timeout=_PATIENCE)
        except OSError as error:
            self.refusal = str(error)
            return
        self.refusal = "" if answer.ok else f"{answer.status} {json.dumps(answer.body)[:300]}"


def main() -> None:
    job = json.load(sys.stdin)
    # A proxy of the environment is for the world outside, not for our own instances.
    urllib.request.install_opener(urllib.request.build_opener(urllib.request.ProxyHandler({})))
    answer = local(**job["local"]) if "local" in job else from_peer(**job["peer"])
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
