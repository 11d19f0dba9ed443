"""A rank that reads what another has received has it where its card can read from, and gives the rest back at once."""

import socket
from collections.abc import Iterator

import pytest
import torch

from embedding_relay.memory.buffers import EmbeddingBuffers
from embedding_relay.memory.shared_rows import Borrower, Lender
from support.row_sharing import LAYOUT, LIMIT, Heard, filled, is_all, until


@pytest.fixture
def pair(device: torch.device) -> Iterator[tuple[Lender, Borrower, Heard]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lender, borrower, heard = Lender({1: ours}, LIMIT), Borrower(theirs, LAYOUT, device), Heard()
    lender.start(lambda: None, heard.ends.append)
    borrower.start(heard.give, heard.ends.append)
    yield lender, borrower, heard
    lender.close()
    borrower.close()
    assert heard.ends == []


def test_the_copy_is_page_locked_and_outlives_the_memory_of_the_lender(
    pair: tuple[Lender, Borrower, Heard], device: torch.device
) -> None:
    lender, _, heard = pair
    on_the_card = []
    for number in range(20):
        rows = filled(lender, 2000, number)
        lender.lend(number, rows)
        there = heard.wait_for(number)
        assert there.embeddings.is_pinned()
        until(lambda: lender.lent == 0)  # though the rows are still here
        on_the_card.append(there.embeddings.to(device, non_blocking=True))
        rows.embeddings.fill_(99)
        assert is_all(there, number)
        del heard.rows[number], there
    torch.cuda.synchronize()
    assert all(bool((made == number).all()) for number, made in enumerate(on_the_card))


def test_the_rank_that_receives_has_its_own_page_locked_copy(
    pair: tuple[Lender, Borrower, Heard], device: torch.device
) -> None:
    lender, _, heard = pair
    buffers = EmbeddingBuffers(LAYOUT, device)
    buffers.make_targets_in(lender.take)
    rows = filled(lender, 2000, 5)
    assert not rows.embeddings.is_pinned()
    own = buffers.for_the_model(rows)
    assert own.embeddings.is_pinned()
    lender.lend(0, rows)
    assert is_all(own, 5)
    assert is_all(heard.wait_for(0), 5)
    assert own.aux == rows.aux
