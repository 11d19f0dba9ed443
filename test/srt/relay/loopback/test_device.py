"""Rows that are still being made on a device are not read before they are made.

The device here is a stand-in: an event whose `synchronize` is what finishes the rows. Real streams, on which the same
mistake shows by itself, are in the gpu lane.
"""

from typing import Any

import pytest
import torch

from embedding_relay.memory import device as devices
from embedding_relay.memory.buffers import EmbeddingBuffers
from embedding_relay.protocol.effects import ChunkDestination, TransferEmbeddingChunk, Window
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
        def write(self, entries: Any) -> None:
            written.extend(entries)

    ChunkJob(chunk, source, buffers, lambda _: None).write(chunk.destinations[0], buffers.pointers, Records())  # type: ignore[arg-type]
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

    source = media.source_rows(Req, [torch.empty(4, 8, device="meta")])
    assert isinstance(source.ready, Event)
    assert recorded == [("meta", "the stream of meta")]
    assert source.device.type == "meta"
    assert media.source_rows(Req, [torch.empty(4, 8)]).ready is None


def test_nothing_is_queued_on_the_host() -> None:
    assert devices.everything_queued_on(devices.device_of([torch.empty(1)])) is None
    with devices.copies_from(devices.HOST):
        pass
