"""Around a whole request in the HTTP process of either half: what the other half hears, and what the client is told.

SGLang's tokenizer manager is real; support/tokenizing.py says what is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from fastapi import HTTPException

from embedding_relay.protocol.errors import BAD_GATEWAY, BAD_REQUEST, INTERNAL, UNAVAILABLE, Failure
from sglang.srt.disaggregation.multimodal import front, request_notes
from sglang.srt.managers.io_struct import AbortReq, EmbeddingReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.tokenizer_manager import ServerStatus
from support import tokenizing
from support.tokenizing import GOOD, IMAGE, TokenizerManagerWithoutScheduler, Watch, answers, asked, refusals, run

BAD = "data:image/png;base64,AAAA"


@pytest.fixture(scope="module")
def encode() -> Iterator[TokenizerManagerWithoutScheduler]:
    with tokenizing.serving("encode") as made:
        yield made


@pytest.fixture(scope="module")
def language() -> Iterator[TokenizerManagerWithoutScheduler]:
    with tokenizing.serving("language") as made:
        yield made


def fresh(manager: TokenizerManagerWithoutScheduler) -> Watch:
    manager.make_current()
    manager.sent.clear()
    manager.rid_to_state.clear()
    front._with_scheduler.clear()
    return manager.watch_nobody()


def abort(failure: Failure) -> Any:
    return lambda rid: front.abort_message(rid, failure)


# ---- the other half


def test_what_fails_before_the_scheduler_has_it_is_told_to_the_other_half(
    encode: TokenizerManagerWithoutScheduler,
) -> None:
    fresh(encode)
    with pytest.raises(ValueError, match="Could not decode image"):
        run(answers(encode, asked(image_data=[BAD])))
    (refusal,) = refusals(encode)
    assert (refusal.room, refusal.host, refusal.port) == (7, "10.0.0.1", 8998)
    assert refusal.failure.code == BAD_REQUEST
    assert "Could not decode image" in refusal.failure.text
    assert encode.rid_to_state == {}


def test_both_halves_get_the_same_class(
    encode: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("/usr/lib/x.so is missing")

    fresh(encode)
    monkeypatch.setattr("sglang.srt.multimodal.processors.base_processor.load_image", fail)
    with pytest.raises(HTTPException) as failed:
        run(answers(encode, asked()))
    (refusal,) = refusals(encode)
    assert refusal.failure == Failure(failed.value.status_code, failed.value.detail)
    assert refusal.failure.code == INTERNAL
    assert "/usr" not in refusal.failure.text


def test_a_failure_that_nobody_foresaw_shows_nothing_of_its_inside(
    encode: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AttributeError("'X' object has no attribute '/etc/y'")

    fresh(encode)
    monkeypatch.setattr(encode, "_init_req_state", fail)
    with pytest.raises(HTTPException) as failed:
        run(answers(encode, asked()))
    (refusal,) = refusals(encode)
    assert refusal.failure == Failure(failed.value.status_code, failed.value.detail)
    assert refusal.failure.code == INTERNAL
    assert "/etc" not in refusal.failure.text


def test_what_the_scheduler_has_been_given_is_its_affair(encode: TokenizerManagerWithoutScheduler) -> None:
    fresh(encode)
    with pytest.raises(HTTPException):
        run(answers(encode, asked(), abort(Failure(BAD_GATEWAY, "gone"))))
    assert refusals(encode) == []
    assert front._with_scheduler == set()


def test_of_a_batch_those_are_told_that_were_not_sent_yet(encode: TokenizerManagerWithoutScheduler) -> None:
    fresh(encode)
    obj = asked(text=[f"{IMAGE}a", f"{IMAGE}b"], image_data=[[GOOD], [BAD]], bootstrap_room=[7, 8])
    with pytest.raises(ValueError, match="Could not decode"):
        run(answers(encode, obj))
    assert [refusal.room for refusal in refusals(encode)] == [8]


@pytest.mark.parametrize("without", [{"image_data": None, "text": ""}, {"bootstrap_room": None}])
def test_who_has_no_other_half_tells_nobody(encode: TokenizerManagerWithoutScheduler, without: dict[str, Any]) -> None:
    fresh(encode)
    with pytest.raises(ValueError, match=r"."):
        run(answers(encode, asked(**{"image_data": [BAD], **without, "sampling_params": {"temperature": -1}})))
    assert refusals(encode) == []


def test_a_language_half_tells_too(language: TokenizerManagerWithoutScheduler) -> None:
    fresh(language)
    with pytest.raises(ValueError, match="longer than"):
        run(answers(language, asked(text="word " * 40_000)))
    (refusal,) = refusals(language)
    assert (refusal.room, refusal.failure.code) == (7, BAD_REQUEST)


# ---- the language half loads nothing


@pytest.mark.parametrize("media", ["/etc/passwd", "http://127.0.0.1:9/a.png", BAD, {"url": "/etc/passwd"}])
def test_media_are_nothing_but_placeholders(language: TokenizerManagerWithoutScheduler, media: Any) -> None:
    fresh(language)
    obj = asked(image_data=[media])
    with pytest.raises(HTTPException):
        run(answers(language, obj, abort(Failure(BAD_GATEWAY, "gone"))))
    (sent,) = (one for one in language.sent if isinstance(one, TokenizedGenerateReqInput))
    assert sent.mm_inputs is None
    assert sent.need_wait_for_mm_inputs is True
    assert list(sent.input_ids).count(language.mm_processor.mm_tokens.image_token_id) == 1
    assert obj.image_data == [media]


def test_a_client_cannot_have_text_wait_for_rows(language: TokenizerManagerWithoutScheduler) -> None:
    fresh(language)
    obj = asked(text="a", image_data=None, need_wait_for_mm_inputs=True)
    with pytest.raises(HTTPException):
        run(answers(language, obj, abort(Failure(BAD_GATEWAY, "gone"))))
    assert language.sent[0].need_wait_for_mm_inputs is False


@pytest.mark.parametrize("mode", ["encode", "language"])
def test_an_embedding_of_a_picture_is_refused(mode: str, request: pytest.FixtureRequest) -> None:
    manager = request.getfixturevalue(mode)
    fresh(manager)
    obj = EmbeddingReqInput(text=f"{IMAGE}a", image_data=[GOOD])
    with pytest.raises(ValueError, match=r"embedding model|bootstrap room"):
        run(answers(manager, obj))


# ---- what the client is told


def test_a_stream_names_the_status_of_a_failure(language: TokenizerManagerWithoutScheduler) -> None:
    """Between processes an HTTPStatus becomes an int, in which SGLang's streams see no failure."""
    fresh(language)
    (answer,) = run(answers(language, asked(stream=True), abort(Failure(BAD_GATEWAY, "gone"))))
    reason = answer["meta_info"]["finish_reason"]
    assert reason["status_code"] is http.HTTPStatus.BAD_GATEWAY
    assert reason["message"] == "gone"


def test_a_status_that_is_none_is_left_alone() -> None:
    answer = {"meta_info": {"finish_reason": {"status_code": 999}}}
    front._name_status(answer)
    assert answer["meta_info"]["finish_reason"]["status_code"] == 999
    for other in ({"meta_info": {"finish_reason": None}}, {"no": "meta_info"}, ["a batch"]):
        front._name_status(other)


# ---- a scheduler that does not answer


def test_nothing_is_sent_to_a_scheduler_in_trouble(language: TokenizerManagerWithoutScheduler) -> None:
    watch = fresh(language)
    watch.trouble = "the scheduler has not answered"
    with pytest.raises(HTTPException) as failed:
        run(answers(language, asked()))
    assert (failed.value.status_code, failed.value.detail) == (UNAVAILABLE, watch.trouble)
    assert [type(one) for one in language.sent] == [AbortReq]  # the other half hears of it, should it go on


def test_those_that_wait_are_answered_in_its_place(language: TokenizerManagerWithoutScheduler) -> None:
    watch = fresh(language)

    def trouble(_: str) -> Any:
        assert watch.waiting == 1
        front._answer_all(language, "the scheduler has not answered")
        return front.abort_message("somebody else", Failure(BAD_GATEWAY, "late"))

    with pytest.raises(HTTPException) as failed:
        run(answers(language, asked(), trouble))
    assert (failed.value.status_code, failed.value.detail) == (UNAVAILABLE, "the scheduler has not answered")
    assert front.reason_of(language.sent[-1]) == Failure(UNAVAILABLE, "the scheduler has not answered")
    assert watch.waiting == 0


def test_an_unhealthy_instance_says_so_for_good(language: TokenizerManagerWithoutScheduler) -> None:
    language.server_status = ServerStatus.Up
    front._report_unhealthy(language, "a thread died")
    assert language.server_status == ServerStatus.Starting


# ---- the ids of an expanded prompt


def expanded(*ids: int) -> Any:
    """What the language half's scheduler says when the rows are here."""
    return lambda rid: front.prompt_ids_message(rid, list(ids))


def finished(rid: str) -> Any:
    """Not what an undivided server sends at the end of a request, but it ends it, and takes the same ids along."""
    return front.abort_message(rid, Failure(99, "the end"))


@pytest.mark.parametrize("stream", [False, True])
def test_the_ids_of_the_prompt_are_those_that_the_scheduler_has(
    language: TokenizerManagerWithoutScheduler, stream: bool
) -> None:
    fresh(language)
    obj = asked(return_prompt_token_ids=True, stream=stream)
    found = run(answers(language, obj, expanded(1, 9, 9, 2), finished))
    assert found[-1]["prompt_token_ids"] == [1, 9, 9, 2]
    sent = next(one for one in language.sent if isinstance(one, TokenizedGenerateReqInput))
    assert request_notes.read(sent).wants_prompt_ids
    assert len(request_notes.read(sent).sources) == 1, "the scheduler is told what the picture was called"


def test_without_them_there_are_none_rather_than_placeholders(language: TokenizerManagerWithoutScheduler) -> None:
    fresh(language)
    (answer,) = run(answers(language, asked(return_prompt_token_ids=True), finished))
    assert "prompt_token_ids" not in answer


def test_ids_that_nobody_asked_for_are_not_sent(language: TokenizerManagerWithoutScheduler) -> None:
    fresh(language)
    (answer,) = run(answers(language, asked(encoder_urls=["relay", '{"wants_prompt_ids":true}']), finished))
    assert "prompt_token_ids" not in answer
    assert not request_notes.read(language.sent[0]).wants_prompt_ids


def test_ids_of_a_request_that_is_over_are_dropped(language: TokenizerManagerWithoutScheduler) -> None:
    fresh(language)
    language._result_dispatcher(front.prompt_ids_message("gone", [1]))
    assert language.rid_to_state == {}


def test_of_text_they_are_sglangs_own(language: TokenizerManagerWithoutScheduler) -> None:
    fresh(language)
    obj = asked(text="word", image_data=None, return_prompt_token_ids=True)
    (answer,) = run(answers(language, obj, finished))
    assert answer["prompt_token_ids"] == language.tokenizer.encode("word")


def test_closing_a_request_early_closes_what_is_below(language: TokenizerManagerWithoutScheduler) -> None:
    watch = fresh(language)

    async def leave() -> None:
        asking: AsyncGenerator[Any, None] = language.generate_request(asked(), None)
        reading = asyncio.ensure_future(asking.__anext__())
        while not language.sent:
            await asyncio.sleep(0)
        assert watch.waiting == 1
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        await asking.aclose()

    run(leave())
    assert watch.waiting == 0
    assert front._with_scheduler == set()
