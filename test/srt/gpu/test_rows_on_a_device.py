"""Rows that a card is still making are read when they are made, and copied beside what it does next."""

import enum
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedding_relay.memory import device as devices
from embedding_relay.memory import layout as columns
from embedding_relay.memory.buffers import EmbeddingBuffers, ReceivedRows, SourceRows
from embedding_relay.memory.layout import BufferLayout
from sglang.srt.disaggregation.multimodal import media
from sglang.srt.disaggregation.multimodal.tower import VisionTower

ROWS, HIDDEN = 4096, 1024
LAYOUT = BufferLayout(hidden_size=HIDDEN, dtype="bfloat16", deepstack_rows=1, block_size=128, blocks=ROWS // 128)
WIDTH = 2 * HIDDEN
# Some hundred milliseconds of a card's clock: for a copy that does not wait, an age.
LONG = 500_000_000


@pytest.fixture
def buffers(device: torch.device) -> Any:
    made = EmbeddingBuffers(LAYOUT, device)
    made.allocate()
    yield made
    made.release()


def slowly_made_rows(device: torch.device) -> tuple[SourceRows, torch.Tensor]:
    """As the encode scheduler makes them: the kernels are queued, the call has returned, the rows are not there yet."""
    made = torch.randn(ROWS, WIDTH, device=device).to(torch.bfloat16)
    rows = torch.zeros_like(made)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    rows.copy_(made)
    item = SimpleNamespace(offsets=[(0, ROWS - 1)], hash=1, modality=SimpleNamespace(value=1))
    inputs = SimpleNamespace(mm_items=[item], mrope_positions=None, mrope_position_delta=None)
    req = SimpleNamespace(origin_input_ids_unpadded=[5] * ROWS, multimodal_inputs=inputs)
    return media.source_rows(req, {0: rows}), made


def in_another_thread(work: Callable[[], None]) -> None:
    """As a transfer worker does it: a thread has a stream of its own."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures, failures


def through(buffers: EmbeddingBuffers, source: SourceRows) -> ReceivedRows:
    blocks = range(LAYOUT.blocks)
    in_another_thread(lambda: buffers.stage(source, 0, ROWS, blocks))
    target = buffers.make_target(buffers.read_aux(0))
    buffers.copy_out(target, blocks, 0, ROWS)
    return target


@pytest.mark.parametrize("attempt", range(5))
def test_rows_are_read_after_the_tower_has_made_them(
    buffers: EmbeddingBuffers, device: torch.device, attempt: int
) -> None:
    source, made = slowly_made_rows(device)
    assert torch.equal(through(buffers, source).embeddings, made.cpu())


def test_without_their_event_they_are_read_too_early(buffers: EmbeddingBuffers, device: torch.device) -> None:
    """The race is there: what the test before proves is not a matter of luck."""
    source, made = slowly_made_rows(device)
    source.ready = None
    assert not torch.equal(through(buffers, source).embeddings, made.cpu())


def test_copies_do_not_wait_for_the_next_batch_of_the_tower(buffers: EmbeddingBuffers, device: torch.device) -> None:
    source, made = slowly_made_rows(device)
    torch.cuda._sleep(LONG)
    next_batch = torch.cuda.Event()
    next_batch.record()
    received = through(buffers, source)
    assert not next_batch.query(), "the copies have waited for it, or it was too short to tell"
    assert torch.equal(received.embeddings, made.cpu())


def test_received_rows_are_copied_to_the_card_while_it_works(buffers: EmbeddingBuffers, device: torch.device) -> None:
    """As a scheduler does it that must not stop: the copy is queued, and the call returns before it has begun."""
    source, made = slowly_made_rows(device)
    received = through(buffers, source)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    there = received.embeddings.to(device, non_blocking=True)
    is_over = torch.cuda.Event()
    is_over.record()
    assert not is_over.query(), "the call has waited for the copy"
    assert torch.equal(there, made)


def test_the_memory_that_rows_pass_through_is_page_locked_until_it_is_released(device: torch.device) -> None:
    buffers = EmbeddingBuffers(LAYOUT, device)
    buffers.allocate()
    memory = [buffers._memory[name] for name in (columns.EMBEDDINGS, columns.DEEPSTACK)]
    assert all(one.is_pinned() for one in memory)
    buffers.release()
    assert not any(one.is_pinned() for one in memory)


def test_a_pool_in_memory_that_cannot_be_page_locked_still_works(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refuses:
        def cudaHostRegister(self, *_: int) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Refuses)
    buffers = EmbeddingBuffers(LAYOUT, device)
    buffers.allocate()
    monkeypatch.undo()
    assert "could not be page-locked" in caplog.text
    source, made = slowly_made_rows(device)
    assert torch.equal(through(buffers, source).embeddings, made.cpu())
    buffers.release()


def test_a_slow_reader_keeps_its_own_rows_and_not_the_batch(device: torch.device) -> None:
    """The tower here is one tensor for the whole batch, as SGLang's is: what SGLang's does besides is left out."""

    class Tower(VisionTower):
        def _encode_items(self, items: list[Any]) -> list[torch.Tensor]:
            return list(torch.split(torch.randn(len(items) * ROWS, HIDDEN, device=device), ROWS))

    modality = enum.Enum("Modality", ["IMAGE"]).IMAGE  # type: ignore[attr-defined]

    def request() -> list[Any]:
        return [SimpleNamespace(offsets=[(0, ROWS - 1)], modality=modality, precomputed_embeddings=None)]

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    slow = Tower(None, str(device), 1 << 20).encode([request() for _ in range(8)])[3]
    one = ROWS * HIDDEN * 4
    assert one <= torch.cuda.memory_allocated(device) - before < 2 * one
    del slow
    assert torch.cuda.memory_allocated(device) == before


def test_nothing_is_left_on_the_card_when_a_request_is_over(buffers: EmbeddingBuffers, device: torch.device) -> None:
    source, _ = slowly_made_rows(device)
    through(buffers, source)
    assert devices.device_of([source.segments[0][1]]) == device
    del source, _
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated(device) == 0
