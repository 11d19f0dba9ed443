"""The test transfers of `sglang-relay doctor`, without Mooncake and without servers: those are in other lanes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from embedding_relay.config import SHARED_MEMORY
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.memory.shared_plane import SharedMemoryDataPlane
from embedding_relay.tools import doctor_machine, doctor_transfer
from embedding_relay.tools.doctor_transfer import Flawed


def test_bytes_move_through_shared_memory_and_are_compared() -> None:
    """In the process that the doctor starts."""
    job = {"local": {"host": "127.0.0.1", "transport": None, "planes": [SHARED_MEMORY]}}
    answer = doctor_machine.transfer_process(job)[SHARED_MEMORY]
    assert answer["over"] == "shared memory"
    assert answer["bytes"] > 0
    assert answer["bytes_per_s"] == pytest.approx(answer["bytes"] / answer["seconds"])


def test_bytes_that_arrive_otherwise_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loses:
        """A link that writes nothing."""

        def write(self, entries: Any) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(SharedMemoryDataPlane, "link", lambda *_: Loses())
    answer = doctor_transfer.local("127.0.0.1", None, [SHARED_MEMORY])[SHARED_MEMORY]
    assert answer == {"error": "what arrived over shared memory is not what was sent"}


JOB = {"peer": {"url": "http://127.0.0.1:9", "registry": "127.0.0.1:9", "host": "127.0.0.1", "headers": {}}}
MAIN = """
import sys
{}
from embedding_relay.tools import doctor_transfer
doctor_transfer.main()
assert not sys.modules.get("torch")
"""


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("sys.modules['torch'] = None", "torch: not installed here, which a receiver of rows needs"),
        ("import importlib.util; importlib.util.find_spec = lambda name: 1", "127.0.0.1:9 did not answer"),
    ],
    ids=["without torch", "nobody is at the registry"],
)
def test_what_is_said_without_a_transfer(first: str, said: str) -> None:
    """And without the import of torch, which takes seconds."""
    ended = subprocess.run(
        [sys.executable, "-c", MAIN.format(first)], input=json.dumps(JOB), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert said in str(json.loads(ended.stdout))


@pytest.mark.parametrize("deepstack", [0, 3])
@pytest.mark.parametrize(("dtype", "block_size"), [("bfloat16", 16), ("float32", 128), ("float16", 8192)])
def test_the_layout_of_a_peer_is_taken_over(dtype: str, block_size: int, deepstack: int) -> None:
    theirs = BufferLayout(96, dtype, deepstack, block_size, 512, model=(("layers", "2"),))
    ours = doctor_transfer.layout_of(theirs.handshake())
    assert ours.blocks < theirs.blocks
    assert dataclasses.replace(ours, blocks=theirs.blocks) == theirs


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float8"}, "float8"),
        ({"version": 99}, "another version"),
        ({"item_lens": (1 << 12, 1 << 12)}, "other columns"),
        ({"item_lens": (1,)}, "bfloat16"),
    ],
)
def test_a_peer_that_does_not_fit_is_refused(change: dict[str, Any], reason: str) -> None:
    theirs = BufferLayout(96, "bfloat16", 0, 16, 512).handshake()
    with pytest.raises(Flawed, match=reason):
        doctor_transfer.layout_of(msgspec.structs.replace(theirs, **change))


def test_a_peer_cannot_have_us_take_all_memory() -> None:
    theirs = BufferLayout(1 << 30, "bfloat16", 0, 16, 512).handshake()
    with pytest.raises(Flawed, match="more memory"):
        doctor_transfer.layout_of(theirs)
