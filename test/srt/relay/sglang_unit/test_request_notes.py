"""What the HTTP process notes on a request for its scheduler."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from sglang.srt.disaggregation.multimodal import request_notes
from sglang.srt.disaggregation.multimodal.request_notes import EncodeHalf, Note
from support import scheduler as stand_ins

HALF = EncodeHalf("10.0.0.1", 8998, 2**63 - 1, 3)


@pytest.mark.parametrize("note", [Note(), Note(HALF), Note(HALF, True, ("a", "")), Note(wants_prompt_ids=True)])
def test_a_note_goes_with_its_request_to_another_process(note: Note) -> None:
    recv_req = stand_ins.request("a", 7)
    request_notes.write(recv_req, note)
    assert request_notes.read(pickle.loads(pickle.dumps(recv_req))) == note


@pytest.mark.parametrize("said", [None, [], ["http://a:1"], ["http://a:1", "http://b:1"]])
def test_what_is_no_note_says_nothing(said: Any) -> None:
    recv_req = stand_ins.request("a", 7)
    recv_req.encoder_urls = said
    assert request_notes.read(recv_req) == Note()


def test_where_nothing_is_noted_the_router_has_chosen() -> None:
    recv_req = stand_ins.request("a", 7, disagg_prefill_dp_rank=1)
    assert request_notes.encode_half(recv_req) == EncodeHalf("127.0.0.1", 8998, 7, 1)
    request_notes.write(recv_req, Note(HALF))
    assert request_notes.encode_half(recv_req) == HALF
