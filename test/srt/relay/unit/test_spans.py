"""Spans between the moments of one half."""

from __future__ import annotations

from embedding_relay import recorder
from embedding_relay.recorder import Moment
from embedding_relay.spans import ENCODE, LANGUAGE, Span, names, spans


def test_each_chunk_ends_with_its_own_end() -> None:
    moments = [
        Moment(1.0, recorder.CHUNK_BEGAN, 0, 16),
        Moment(2.0, recorder.CHUNK_WRITTEN, 0, 16, 640),
        Moment(4.0, recorder.CHUNK_BEGAN, 16, 8),
        Moment(5.0, recorder.CHUNK_WRITTEN, 16, 8, 320),
    ]
    assert spans(ENCODE, moments) == [Span("chunk", 1.0, 2.0, 0, 16, 640), Span("chunk", 4.0, 5.0, 16, 8, 320)]


def test_what_has_not_ended_has_no_end() -> None:
    assert spans(ENCODE, [Moment(1.0, recorder.TOWER_BEGAN)]) == [Span("tower", 1.0, None)]


def test_only_the_first_offer_ends_the_wait_for_blocks() -> None:
    moments = [Moment(1.0, recorder.PARKED), Moment(2.0, recorder.OFFERED), Moment(3.0, recorder.OFFERED, 16)]
    assert spans(LANGUAGE, moments) == [Span("wait for blocks", 1.0, 2.0)]


def test_sglangs_own_spans_can_be_left_out() -> None:
    moments = [
        Moment(1.0, recorder.RECEIVED),
        Moment(2.0, recorder.PREPARED),
        Moment(3.0, recorder.COPY_BEGAN),
        Moment(4.0, recorder.COPIED),
    ]
    assert [span.name for span in spans(LANGUAGE, moments)] == ["tokenize", "copy"]
    assert [span.name for span in spans(LANGUAGE, moments, with_sglangs=False)] == ["copy"]


def test_names_are_in_the_order_in_which_a_request_meets_them() -> None:
    assert names(ENCODE) == ["preprocess", "wait", "tower", "chunk"]
    assert names(LANGUAGE)[-1] == "prefill"
