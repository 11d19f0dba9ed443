"""What clients may have an encode instance load, whose fault it is when that fails, and which ids a prompt has.

On real servers. The many ways in which pictures and prompts are wrong are in sglang_unit/test_faults.py.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from embedding_relay.tools.chat_client import Answer, ask, chat_body, data_uri, post
from embedding_relay.tools.local_cluster import HOST
from embedding_relay.tools.local_process import LocalProcess
from support.pairs import DEADLINE, SMALL, Pair
from support.questions import Question, squares, stories
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=120, suite="base-c-test-cpu")

AT_ONCE = DEADLINE / 2  # too soon for a half that nobody told
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
NOT_READ = "must be an http or https URL, a data: URI or base64"

rooms = itertools.count(900_000)
seeds = itertools.count(5000)

pytestmark = pytest.mark.parametrize("pair", [SMALL], ids=[SMALL.name], indirect=True, scope="session")


@pytest.fixture(autouse=True)
def works_afterwards(pair: Pair) -> Iterator[None]:
    yield
    answer = Question("after", (squares(pair.family, 4, 4, next(seeds)), "still there?")).ask(pair.url)
    assert answer.status == 200, answer.body


def refused(answer: Answer, status: int, words: str) -> None:
    assert answer.status == status, answer.body
    assert words in str(answer.body)
    assert not re.search(r"<_io|0x[0-9a-f]{6}|Traceback|Errno|/etc|/test|\w+Error\(", str(answer.body)), answer.body
    assert answer.seconds < AT_ONCE


def to_both(pair: Pair, path: str, body: dict[str, Any], **fields: Any) -> tuple[Answer, Answer]:
    """What the router does, without what it does about failures: encode half and language half."""
    where = {"bootstrap_host": HOST, "bootstrap_port": pair.bootstrap_port, "bootstrap_room": next(rooms)}
    body = {**body, "parameters": where} if "instances" in body else {**body, **where}
    with ThreadPoolExecutor(2) as clients:
        encode, language = clients.map(lambda half: post(f"{pair[half].url}{path}", body), ("encode", "language"))
    return encode, language


# ---- files and URLs


@pytest.mark.parametrize("url", [__file__, f"file://{__file__}", "/etc/nothing.png", "FILE:///etc/passwd", "~/a.png"])
def test_files_of_the_server_are_refused_in_the_same_words(pair: Pair, url: str) -> None:
    refused(ask(pair.url, [url], "what"), 400, NOT_READ)
    for images in (url, [url]):
        refused(post(f"{pair.url}/generate", {"text": f"{IMAGE}a", "image_data": images}), 400, NOT_READ)
    for answer in to_both(pair, "/generate", {"text": f"{IMAGE}a", "image_data": {"url": url}}):
        refused(answer, 400, NOT_READ)
    streamed = ask(pair.url, [url], "what", stream=True)
    assert NOT_READ in str(streamed.body)


def test_a_private_address_is_not_asked(pair: Pair) -> None:
    asked: list[str] = []

    class Private(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    with HTTPServer((HOST, 0), Private) as private:
        thread = threading.Thread(target=private.serve_forever)
        thread.start()
        try:
            for host in (HOST, "localhost"):
                url = f"http://{host}:{private.server_port}/a.png"
                refused(ask(pair.url, [url], "what"), 400, "an address that is not public")
        finally:
            private.shutdown()
            thread.join()
    assert asked == []


# ---- whose fault it is


@pytest.mark.parametrize("text", ["<|image_pad|>", "<|video_pad|>"])
def test_a_text_with_the_models_own_tokens_is_answered(pair: Pair, text: str) -> None:
    """An undivided server never answers the first of them: a thread of its processor ends with a StopIteration."""
    refused(ask(pair.url, [squares(pair.family, 4, 4, next(seeds))], text), 400, "token")


def test_a_prompt_that_ends_as_a_picture_begins_is_answered(pair: Pair) -> None:
    """An undivided server says that it is at fault, with an IndexError."""
    image = data_uri(squares(pair.family, 4, 4, next(seeds)))
    body = {"text": f"{IMAGE}a<|vision_start|>", "image_data": image}
    refused(post(f"{pair.url}/generate", body), 400, "2 tokens <|vision_start|>, but 1 media")


def decodes_videos() -> bool:
    from torchcodec.decoders import VideoDecoder

    try:
        VideoDecoder(b"no video")
    except (RuntimeError, ValueError) as error:
        return "libtorchcodec" not in str(error)
    return True


def test_what_the_machine_lacks_is_not_put_down_to_the_client(pair: Pair) -> None:
    body = chat_body([], "what happens")
    body["messages"][0]["content"].append({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}})
    status, words = (400, "Could not decode video") if decodes_videos() else (500, "lacks FFmpeg's libraries")
    for answer in to_both(pair, "/v1/chat/completions", body):
        refused(answer, status, words)


# ---- precomputed media


@pytest.mark.parametrize(
    "given",
    [
        {"format": "precomputed_embedding", "feature": [[0.5] * 256] * 4, "image_grid_thw": [[1, 4, 4]]},
        {"format": "processor_output", "precomputed_embeddings": [[0.5] * 256] * 4, "image_grid_thw": [[1, 4, 4]]},
        {"format": "processor_output", "pixel_values": [[0.5] * 1176] * 16, "image_grid_thw": [[1, 4, 4]]},
    ],
    ids=["embeddings", "embeddings-of-a-processor", "pixels-of-a-processor"],
)
def test_precomputed_media_in_json(pair: Pair, given: dict[str, Any]) -> None:
    """SGLang refuses them on `/generate`, but not on all of its routes."""
    refused(post(f"{pair.url}/generate", {"text": f"{IMAGE}a", "image_data": [given]}), 400, "unknown field `format`")
    instances = {"instances": [{"text": f"{IMAGE}a", "image_data": given}]}
    for answer in to_both(pair, "/vertex_generate", instances):
        refused(answer, 400, "only a caller in the same process can hand over")


# ---- the ids of a prompt


def events(answer: Answer) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in str(answer.body).splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


@pytest.fixture
def image(pair: Pair) -> str:
    return data_uri(squares(pair.family, 6, 7, next(seeds)))


@pytest.mark.parametrize("sampling", [{}, {"n": 2}])
def test_ids_of_prompts(undivided: dict[str, LocalProcess], pair: Pair, image: str, sampling: dict[str, Any]) -> None:
    other = data_uri(squares(pair.family, 5, 3, next(seeds)))
    defaults = {"max_new_tokens": 3, "temperature": 0}
    body = {
        "text": f"look {IMAGE} and {IMAGE} now",
        "image_data": [[image, other]] if "n" in sampling else [image, other],
        "sampling_params": {**defaults, **sampling},
        "return_prompt_token_ids": True,
        "return_logprob": True,
        "logprob_start_len": 40,
        "return_text_in_logprobs": True,
    }
    earlier = len(stories(pair["language"].log_text()))
    _, ours = to_both(pair, "/generate", body)
    theirs = post(f"{undivided[pair.family].url}/generate", body)
    assert ours.status == theirs.status == 200, (ours.body, theirs.body)
    pairs = zip(*(answer.body if "n" in sampling else [answer.body] for answer in (ours, theirs)), strict=True)
    for one, expected in pairs:
        assert one["prompt_token_ids"] == expected["prompt_token_ids"]
        assert (
            len(one["prompt_token_ids"]) == one["meta_info"]["prompt_tokens"] == expected["meta_info"]["prompt_tokens"]
        )
        for ours_, theirs_ in zip(*(a["meta_info"]["input_token_logprobs"] for a in (one, expected)), strict=True):
            assert ours_[1:] == theirs_[1:]
    assert len(stories(pair["language"].log_text())) > earlier


def test_ids_of_a_stream(undivided: dict[str, LocalProcess], pair: Pair, image: str) -> None:
    body = {"text": f"{IMAGE}a", "image_data": image, "stream": True, "return_prompt_token_ids": True}
    _, ours = to_both(pair, "/generate", body)
    theirs = post(f"{undivided[pair.family].url}/generate", body)
    expected = events(theirs)[0]["prompt_token_ids"]
    assert len(expected) > 42
    assert [event["prompt_token_ids"] for event in events(ours)] == [expected] * len(events(ours))


@pytest.mark.parametrize("wish", ["return_prompt_token_ids", "return_token_ids", "return_input_ids_in_sglext"])
def test_ids_of_a_chat(undivided: dict[str, LocalProcess], pair: Pair, image: str, wish: str) -> None:
    body = chat_body([image], "what", **{wish: True})
    _, ours = to_both(pair, "/v1/chat/completions", body)
    theirs = post(f"{undivided[pair.family].url}/v1/chat/completions", body)
    assert ours.status == theirs.status == 200, (ours.body, theirs.body)
    found = [
        (answer.body["choices"][0].get("prompt_token_ids"), (answer.body.get("sglext") or {}).get("input_ids"))
        for answer in (ours, theirs)
    ]
    assert found[0] == found[1]
    assert max(len(ids or ()) for ids in found[1]) == theirs.prompt_tokens == ours.prompt_tokens


def test_ids_of_text_alone(undivided: dict[str, LocalProcess], pair: Pair) -> None:
    body = {"text": "no picture", "return_prompt_token_ids": True, "sampling_params": {"max_new_tokens": 2}}
    ours, theirs = (post(f"{where.url}/generate", body) for where in (pair["language"], undivided[pair.family]))
    assert ours.body["prompt_token_ids"] == theirs.body["prompt_token_ids"]


if __name__ == "__main__":
    run_tests(__file__)
