"""Rows that are still being made on a device are not read before they are made.

The device here is a stand-in: an event whose `synchronize` is what finishes the rows. Real streams, on which the same
mistake shows by itself, are in the gpu lane.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from embedding_relay.memory import device as devices
from embedding_relay.memory.buffers import EmbeddingBuffers
from embedding_relay.protocol.effects import ChunkDestination, TransferEmbeddingChunk, Window
from embedding_relay.protocol.messages import Address, Register
from embedding_relay.transport.workers import ChunkJob
from sglang.srt.disaggregation.multimodal import media
from support.loopback import small_layout
from support.rows import Spec, difference, make_rows


class Finishes:
    """The rows are written when somebody waits for this event, and not before."""

    def __init__(self, segments: list[tuple[int, torch.Tensor]]) -> None:
        self._pending = [(rows, rows.clone()) for _, rows in segments]
        for rows, _ in self._pending:
            rows.zero_()

    def record(self, stream: torch.Stream) -> None:
        raise AssertionError("recorded when the rows were queued")

    def synchronize(self) -> None:
        for rows, made in self._pending:
            rows.copy_(made)


def test_a_chunk_is_staged_only_after_the_event_that_made_its_rows() -> None:
    layout = small_layout(deepstack_rows=1)
    buffers = EmbeddingBuffers(layout)
    buffers.allocate()
    expected = make_rows(layout, Spec(room=1, total=500))
    source = make_rows(layout, Spec(room=1, total=500))
    source.ready = Finishes(list(source.segments))
    blocks = (3, 4, 9, 10)
    chunk = TransferEmbeddingChunk(
        room=1,
        transfer_id=1,
        window=Window(first_row=0, rows=500, blocks=blocks, stage=True),
        destinations=(ChunkDestination("127.0.0.1:1", blocks, 0, 0, 500, with_aux=True),),
    )
    written: list[Any] = []

    class Records:
        def write_in_turn(self, pieces: Any) -> Iterator[None]:
            for entries in pieces:
                written.extend(entries)
                yield

    job = ChunkJob(chunk, source, buffers, lambda _: None, lambda *_: None, from_where_they_are=False)
    register = Register(Address("127.0.0.1", 1), "127.0.0.1:1", buffers.pointers, layout.handshake())
    job.write(chunk.destinations[0], register, Records())  # type: ignore[arg-type]
    assert written
    target = buffers.make_target(buffers.read_aux(3))
    buffers.copy_out(target, blocks, 0, 500)
    assert difference(layout, expected, target) is None


def test_the_rows_of_a_request_carry_an_event_of_the_stream_on_which_they_were_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device is torch's `meta`, which has shapes and no streams: its event and its stream are stand-ins."""
    recorded = []

    class Event:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def record(self, stream: object) -> None:
            recorded.append((self.device.type, stream))

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"the stream of {device.type}")

    class Item:
        offsets = ((2, 5),)
        hash = 7
        modality = type("Modality", (), {"value": 1})

    class Inputs:
        mm_items = (Item,)
        mrope_positions = mrope_position_delta = None

    class Req:
        origin_input_ids_unpadded = (1, 2, 3, 3, 3, 3, 9)
        multimodal_inputs = Inputs

    source = media.source_rows(Req, {0: torch.empty(4, 8, device="meta")})
    assert isinstance(source.ready, Event)
    assert recorded == [("meta", "the stream of meta")]
    assert source.device.type == "meta"
    assert media.source_rows(Req, {0: torch.empty(4, 8)}).ready is None


def test_nothing_is_queued_on_the_host() -> None:
    assert devices.everything_queued_on(devices.device_of([torch.empty(1)])) is None
    with devices.copies_from(devices.HOST):
        pass


# ---- streams, and page-locked memory: CUDA's calls are stand-ins


@pytest.mark.parametrize("error", [None, ValueError("a copy failed")])
def test_copies_have_a_stream_of_their_own_and_have_ended_when_the_block_has(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Module:
        class Stream:
            def __init__(self, device: torch.device) -> None:
                done.append(f"a stream of {device.type}")

            def synchronize(self) -> None:
                done.append("waited for")

        @contextlib.contextmanager
        def stream(self, stream: object) -> Iterator[None]:
            done.append("used")
            yield

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module())
    with contextlib.suppress(ValueError), devices.copies_from(torch.device("meta")):
        done.append("copied")
        if error:
            raise error
    expected = ["a stream of meta", "used", "copied", "waited for"]
    assert done == expected
    with devices.copies_from(devices.HOST):
        pass
    assert done == expected


def test_of_rows_on_several_devices_the_accelerator_counts() -> None:
    here, there = torch.empty(1), torch.empty(1, device="meta")
    assert devices.device_of([here, there]).type == "meta"
    assert devices.device_of([here]) == devices.device_of([]) == devices.HOST


def test_who_waits_for_an_event_of_cuda_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[bool, object]] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            self.blocking = blocking

        def record(self, stream: object) -> None:
            recorded.append((self.blocking, stream))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"the stream of {device.type}")
    assert devices.everything_queued_on(devices.HOST) is None
    assert isinstance(devices.everything_queued_on(torch.device("cuda")), Event)
    assert recorded == [(True, "the stream of cuda")]


@pytest.mark.parametrize("code", [0, 2])
def test_memory_is_page_locked_where_it_is(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[tuple[object, ...]] = []

    class Runtime:
        def cudaHostRegister(self, *what: object) -> int:
            calls.append(what)
            return code

        def cudaHostUnregister(self, *what: object) -> None:
            calls.append(what)

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    memory = torch.empty(3, dtype=torch.int32)
    assert devices.pin(memory) is (code == 0)
    devices.unpin(memory)
    assert calls == [(memory.data_ptr(), 12, 0), (memory.data_ptr(),)]
    assert ["12 bytes could not be page-locked" in line for line in caplog.messages] == ([True] if code else [])


@pytest.mark.parametrize(("device", "works", "locked"), [("cpu", True, 0), ("cuda", True, 2), ("cuda", False, 0)])
def test_only_the_rows_of_embeddings_are_page_locked_and_all_are_let_go(
    device: str, works: bool, locked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def pin(memory: torch.Tensor) -> bool:
        held.extend([memory.data_ptr()] * works)
        return works

    monkeypatch.setattr(devices, "pin", pin)
    monkeypatch.setattr(devices, "unpin", lambda memory: held.remove(memory.data_ptr()))
    layout = small_layout(deepstack_rows=1)
    buffers = EmbeddingBuffers(layout, torch.device(device))
    buffers.allocate()
    of_embeddings = {
        region.pointer for region, (column, _) in zip(buffers.regions, layout.memory, strict=True) if column.media_only
    }
    assert len(held) == locked
    assert set(held) <= of_embeddings
    buffers.release()
    assert held == []
    assert buffers.regions == ()
