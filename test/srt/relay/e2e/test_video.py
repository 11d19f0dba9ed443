"""A pair and an undivided server say the same about videos. SGLang's decoder needs FFmpeg's libraries."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

import pytest

from embedding_relay.tools.chat_client import Answer, chat_body, data_uri, post
from embedding_relay.tools.local_process import LocalProcess
from support.pairs import LARGE, SMALL, Pair
from support.questions import TOLERANCE, difference, squares, stories
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=120, suite="base-c-test-cpu")

each_pair = pytest.mark.parametrize(
    "pair", [SMALL, LARGE], ids=[settings.name for settings in (SMALL, LARGE)], indirect=True, scope="session"
)

FRAMES, PER_SECOND = 4, 2


def video(family: str, wide: int, high: int, seed: int) -> dict[str, Any]:
    """A part of a message. SGLang makes the frames larger: two of them are at least 128 tokens."""
    import numpy
    import torch
    from torchcodec.encoders import VideoEncoder

    frames = [numpy.asarray(squares(family, wide, high, seed + at)) for at in range(FRAMES)]
    encoder = VideoEncoder(
        torch.from_numpy(numpy.stack(frames)).permute(0, 3, 1, 2).contiguous(), frame_rate=PER_SECOND
    )
    content = base64.b64encode(encoder.to_tensor(format="mp4").numpy().tobytes()).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{content}"}}


def ask(url: str, *parts: dict[str, Any] | str) -> Answer:
    body = chat_body([], "")
    body["messages"][0]["content"] = [
        {"type": "text", "text": part} if isinstance(part, str) else part for part in parts
    ]
    return post(f"{url}/v1/chat/completions", body)


@each_pair
def test_videos(undivided: dict[str, LocalProcess], pair: Pair) -> None:
    """One, two, and one beside a picture; the same again from the cache."""
    make = partial(video, pair.family, 6, 5)
    still = {"type": "image_url", "image_url": {"url": data_uri(squares(pair.family, 5, 5, 400))}}
    asked = [
        (make(410), "what happens"),
        (make(420), "and", make(430), "which is longer"),
        (still, "is this in", make(440), "somewhere"),
        (make(410), "what happens"),
    ]
    earlier = len(stories(pair["language"].log_text()))
    ours, theirs = ([ask(server.url, *parts) for parts in asked] for server in (pair, undivided[pair.family]))
    assert [answer.status for answer in (*ours, *theirs)] == [200] * 2 * len(asked), [
        one.body for one in (*ours, *theirs)
    ]
    assert max(difference(one, other) for one, other in zip(ours, theirs, strict=True)) < TOLERANCE
    assert [one.prompt_tokens for one in ours] == [other.prompt_tokens for other in theirs]
    assert difference(ours[0], ask(pair.url, make(450), "what happens")) > 20 * TOLERANCE, "a video must matter"
    told = stories(pair["language"].log_text())[earlier:]
    assert [story.rows for story in told[: len(asked)]] == [answer.prompt_tokens for answer in ours]
    assert all(story.rounds == pair.settings.rounds(story.rows) for story in told)


@each_pair
def test_a_video_that_cannot_be_decoded(pair: Pair) -> None:
    nothing = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    answer = ask(pair.url, nothing, "what happens")
    assert answer.status == 400, answer.body
    assert "video" in str(answer.body)


if __name__ == "__main__":
    run_tests(__file__)
