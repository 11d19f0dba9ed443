"""What the fuzzer drives. `python targets.py NAME MESSAGES [options of libFuzzer]`; `NAME 0 FILE` replays one input."""

import asyncio
import contextlib
import http.client
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import atheris
import numpy as np

if os.environ.get("PYTHONHASHSEED") != "0":  # the same input must be the same schedule
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) + more for depth, more in ((2, ""), (4, "/python"))]

with atheris.instrument_imports(include=["embedding_relay"]):
    from embedding_relay.memory.checks import SmallColumns
    from embedding_relay.memory.layout import Aux
    from embedding_relay.protocol import codec
    from embedding_relay.protocol.errors import RemoteError, UndecodableFrames
    from embedding_relay.protocol.messages import Address
    from embedding_relay.registry.client import look_up
    from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
    from embedding_relay.testing.world import World
    from support.columns import EDGES, LIMITS, WHERE, changed, columns, is_safe
    from support.hostile import Seeded, Stranger, run_attack, run_attack_with_faults, run_insider_attack


class Fuzzed:
    """Decisions from the bytes of an input, and an end with them."""

    def __init__(self, data: bytes) -> None:
        self._provider = atheris.FuzzedDataProvider(data)

    def number(self, low: int, high: int) -> int:
        return int(self._provider.ConsumeIntInRange(low, high))

    def raw(self, most: int) -> bytes:
        return bytes(self._provider.ConsumeBytes(self.number(0, most)))

    def is_used_up(self) -> bool:
        return self._provider.remaining_bytes() == 0


class FuzzedFirst(Seeded):
    """Decisions from the bytes of an input, then from a seed made of it: a world for ten bytes alone is too slow."""

    def __init__(self, data: bytes) -> None:
        super().__init__(int.from_bytes(data[:16], "little"))
        self._input = Fuzzed(data)

    def number(self, low: int, high: int) -> int:
        return super().number(low, high) if self._input.is_used_up() else self._input.number(low, high)

    def raw(self, most: int) -> bytes:
        return super().raw(most) if self._input.is_used_up() else self._input.raw(most)


# Names for messages to speak of.
_SOMEWHERE = World()


# ---- one input each; they return how many messages it was


def frames_of_anything(data: bytes) -> int:
    """Frames and nothing else: whatever decodes has one spelling."""
    choices, messages = Fuzzed(data), 0
    stranger = Stranger(choices, _SOMEWHERE)
    while not choices.is_used_up():
        messages += 1
        frames = stranger.frames(stranger.to_encode if choices.number(0, 2) else stranger.to_language)
        for decode in (codec.decode_to_encode, codec.decode_to_language):
            with contextlib.suppress(UndecodableFrames):
                message = decode(frames)
                assert decode(codec.encode(message)) == message, frames
    return messages


def attack(data: bytes) -> int:
    choices = FuzzedFirst(data)
    return run_attack(choices, keeps_rows=bool(choices.number(0, 1))).messages


def attack_with_faults(data: bytes) -> int:
    choices = FuzzedFirst(data)
    return run_attack_with_faults(choices, keeps_rows=bool(choices.number(0, 1))).messages


def insider(data: bytes) -> int:
    choices = FuzzedFirst(data)
    return run_insider_attack(choices, keeps_rows=bool(choices.number(0, 1))).messages


def received_rows(data: bytes) -> int:
    """Small columns of anything, and good ones with changes: what could harm a model is seen, and nothing else is."""
    choices, messages = Fuzzed(data), 0
    while not choices.is_used_up():
        messages += 1
        received = _any_columns(choices) if choices.number(0, 3) == 0 else _changed_columns(choices)
        assert (received.flaw(LIMITS) is None) is is_safe(received, LIMITS), received
    return messages


def _any_columns(choices: Fuzzed) -> SmallColumns:
    rows = choices.number(1, 6)
    values = np.frombuffer(choices.raw(4 * 8 * rows).ljust(4 * 8 * rows, b"\0"), np.int32).reshape(rows, 8)
    aux = Aux(rows, choices.number(-9, 600), bool(choices.number(0, 1)), choices.number(-1, 7))
    return SmallColumns(aux, values[:, 0], values[:, 1:4], values[:, 4:])


def _changed_columns(choices: Fuzzed) -> SmallColumns:
    runs = [choices.number(-1, 3) for _ in range(choices.number(1, 8))]
    received = columns(*runs, modality=choices.number(0, 3))
    for _ in range(choices.number(0, 3)):
        where, value = WHERE[choices.number(0, len(WHERE) - 1)], EDGES[choices.number(0, len(EDGES) - 1)]
        received = changed(received, where, choices.number(0, len(runs) - 1), choices.number(0, 3), value)
    return received


_RANK = {
    "rank": 0, "host": "h", "port": 1, "instance": "i",
    "handshake": {
        "version": 1, "block_size": 1, "item_lens": [1], "dtype": "x", "deepstack_rows": 0, "blocks": 1,
        "model": [["a", "b"]],
    },
}  # fmt: skip
_VALUES = (0, 1, -1, 4096, 65536, 1 << 64, 10**4000, "", "x" * 300, "\n", "ü", None, [], [1, 2], {}, 1.5, True)


class Registry:
    """The registry of an encode instance, asked in turn through its handlers and through a socket."""

    def __init__(self) -> None:
        self._server = MooncakeEmbeddingBootstrapServer("127.0.0.1", 0)
        self._loop = asyncio.new_event_loop()

    def handlers(self, data: bytes) -> int:
        choices, messages = Fuzzed(data), 0
        while not choices.is_used_up():
            messages += 1
            body = choices.raw(200) if choices.number(0, 3) == 0 else _damaged(choices)
            put = self._loop.run_until_complete(self._server._put(_request(body=body)))
            assert put.status in (200, 400), put.status
            for name in ("0", choices.raw(8).decode("latin-1")):
                got = self._loop.run_until_complete(self._server._get(_request(rank=name)))
                assert got.status in (200, 404), got.status
        return messages

    def sockets(self, data: bytes) -> int:
        """Anything at all, over TCP; afterwards it answers as before."""
        if self._server.port == 0:
            self._server.start()
        choices, messages = Fuzzed(data), 0
        address = Address("127.0.0.1", self._server.port)
        while not choices.is_used_up():
            messages += 1
            with socket.create_connection((address.host, address.port), timeout=5) as connection:
                connection.sendall(_http(choices))
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(OSError):
                    while connection.recv(65536):
                        pass
            with contextlib.suppress(RemoteError):
                look_up(address, 0)
        health = http.client.HTTPConnection(address.host, address.port, timeout=5)
        health.request("GET", "/health")
        assert health.getresponse().status == 200
        health.close()
        return messages


def _request(body: bytes = b"", rank: str = "") -> SimpleNamespace:
    async def read() -> bytes:
        return body

    return SimpleNamespace(read=read, match_info={"rank": rank})


def _damaged(choices: Fuzzed) -> bytes:
    rank = {**_RANK, "handshake": dict(_RANK["handshake"])}
    for _ in range(choices.number(0, 2)):
        part = rank if choices.number(0, 1) else rank["handshake"]
        key = list(part)[choices.number(0, len(part) - 1)]
        part[key] = _VALUES[choices.number(0, len(_VALUES) - 1)]
        if not isinstance(rank["handshake"], dict):
            break
    return json.dumps(rank).encode()


def _http(choices: Fuzzed) -> bytes:
    method = (b"GET", b"PUT", b"POST", b"\xff", b"")[choices.number(0, 4)]
    path = (b"/relay/ranks", b"/relay/ranks/0", b"/relay/ranks/" + choices.raw(20), b"/health", choices.raw(30))
    body = _damaged(choices) if choices.number(0, 1) else choices.raw(100)
    length = (b"%d" % len(body), b"99999999", b"-1", choices.raw(5))[min(3, choices.number(0, 6))]
    head = b"%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %s\r\n" % (method, path[choices.number(0, 4)], length)
    return head + choices.raw(40) + b"\r\n\r\n" + body if choices.number(0, 4) else choices.raw(300)


# ---- counting


class Counted:
    """Runs a target until it has had enough messages, and says how it went."""

    def __init__(self, name: str, run: Callable[[bytes], int], most: int) -> None:
        self._name = name
        self._run = run
        self._most = most
        self._messages = self._inputs = 0
        self._started = time.monotonic()

    def __call__(self, data: bytes) -> None:
        self._messages += self._run(data)
        self._inputs += 1
        if self._most and self._messages >= self._most:
            seconds = time.monotonic() - self._started
            result = {"messages": self._messages, "inputs": self._inputs, "seconds": seconds}
            print(json.dumps(result), flush=True)
            os._exit(0)  # the fuzzer has no way to be told that it is over


def main() -> None:
    name, messages, *options = sys.argv[1:]
    registry = Registry()
    targets = {
        "frames": frames_of_anything,
        "attack": attack,
        "attack-with-faults": attack_with_faults,
        "insider": insider,
        "rows": received_rows,
        "registry": registry.handlers,
        "http": registry.sockets,
    }
    atheris.Setup([sys.argv[0], *options], Counted(name, targets[name], int(messages)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
