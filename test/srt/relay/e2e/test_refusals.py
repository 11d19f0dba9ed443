"""One bad request gets its own clear error, at once on both halves; nothing is lost, and the next one works."""

from __future__ import annotations

import itertools
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from embedding_relay.available_memory import available_bytes
from embedding_relay.config import ADMISSION
from embedding_relay.tools.chat_client import Answer, ask, chat_body, data_uri, post
from embedding_relay.tools.local_cluster import HOST
from embedding_relay.tools.local_process import free_ports
from support.pairs import CONTEXT, DEADLINE, MOST_WAITING, SMALL, Pair
from support.patience import wait_until
from support.questions import Question, squares, stories
from support.server_numbers import numbers_of
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=240, suite="base-c-test-cpu")

AT_ONCE = DEADLINE / 2  # too soon for a half that nobody told

seeds = itertools.count(1000)

pytestmark = pytest.mark.parametrize("pair", [SMALL], ids=[SMALL.name], indirect=True, scope="session")


@pytest.fixture(autouse=True)
def works_afterwards(pair: Pair) -> Iterator[None]:
    """A new picture, and as few rounds as only a full pool allows."""
    yield
    answer = Question("after", (squares(pair.family, 20, 20, next(seeds)), "still there?")).ask(pair.url)
    assert answer.status == 200, answer.body
    story = stories(pair["language"].log_text())[-1]
    assert story.rows == answer.prompt_tokens
    assert story.rounds == pair.settings.rounds(story.rows)


def refused(answer: Answer, status: int, *words: str, within: float = AT_ONCE) -> None:
    assert answer.status == status, answer.body
    for word in words:
        assert word in str(answer.body)
    assert answer.seconds < within


def test_an_image_that_cannot_be_decoded(pair: Pair) -> None:
    refused(ask(pair.url, ["data:image/png;base64,AAAA"], "what"), 400, "image")


def test_an_image_that_cannot_be_fetched(pair: Pair) -> None:
    refused(ask(pair.url, [f"http://{HOST}:{free_ports(1)[0]}/picture.png"], "what"), 400)


def test_a_good_image_beside_a_bad_one(pair: Pair) -> None:
    refused(ask(pair.url, [squares(pair.family, 4, 4, 1), "data:image/png;base64,AAAA"], "what"), 400, "image")


def test_a_text_beyond_the_context_length(pair: Pair) -> None:
    refused(ask(pair.url, [squares(pair.family, 4, 4, 1)], "word " * CONTEXT), 400, str(CONTEXT))


def test_images_beyond_the_context_length(pair: Pair) -> None:
    """The text alone would fit: only the encode half can know."""
    refused(ask(pair.url, [squares(pair.family, 36, 36, 2)], "what"), 400, str(CONTEXT))


def test_pictures_that_would_take_more_memory_than_the_machine_has(pair: Pair) -> None:
    """Small on the wire, large once they are decoded: nothing is, because their headers say so."""
    blank = data_uri(Image.new("1", (13_000, 13_000)))
    each = 13_000**2 * 6  # as `media_costs` has it, and a few more pictures than that would take
    many = [blank] * (available_bytes() // each + 2)
    refused(ask(pair.url, many, "what"), 400, "memory", ADMISSION)


def test_what_only_the_language_half_refuses(pair: Pair) -> None:
    """SGLang's own limit of `n`; the encode half, which needs no samples, would wait for its room to be asked for."""
    answer = ask(pair.url, [squares(pair.family, 4, 4, 3), squares(pair.family, 4, 4, 4)], "what", n=2)
    refused(answer, 400, "image_data", "batch size")


def test_what_only_the_language_half_refuses_may_be_told_to_nobody(pair: Pair) -> None:
    """Whom it would have to tell cannot be found."""
    (port,) = free_ports(1)
    where = {"bootstrap_host": HOST, "bootstrap_port": port, "bootstrap_room": 6}
    url = f"{pair['language'].url}/v1/chat/completions"
    pictures = [squares(pair.family, 4, 4, 3), squares(pair.family, 4, 4, 4)]
    refused(post(url, chat_body(pictures, "what", n=2, **where)), 400, "batch size")
    wait_until(lambda: "room=6 status=Failed" in pair["language"].log_text())


@pytest.mark.parametrize("samples", [1, 2])
def test_a_stream_ends_with_the_reason(pair: Pair, samples: int) -> None:
    answer = ask(pair.url, ["data:image/png;base64,AAAA"], "what", stream=True, n=samples)
    assert "Could not decode image" in str(answer.body)
    assert "used before" not in str(answer.body)


@pytest.mark.parametrize("half", ["encode", "language"])
def test_a_request_for_an_embedding_model(pair: Pair, half: str) -> None:
    refused(post(f"{pair[half].url}/v1/embeddings", {"model": "default", "input": "hello"}), 400, "embedding model")


@pytest.mark.parametrize("half", ["encode", "language"])
def test_no_room(pair: Pair, half: str) -> None:
    refused(ask(pair[half].url, [squares(pair.family, 4, 4, 3)], "what"), 400, "without bootstrap room id")


def test_text_needs_no_room_on_the_language_instance(pair: Pair) -> None:
    assert ask(pair["language"].url, [], "hello").status == 200


def to_half_alone(pair: Pair, half: str, port: int, room: int, timeout: float = 300, **options: object) -> Answer:
    where = {"bootstrap_host": HOST, "bootstrap_port": port, "bootstrap_room": room}
    url = f"{pair[half].url}/v1/chat/completions"
    return post(url, chat_body([squares(pair.family, 4, 4, 4)], "what", **where, **options), timeout=timeout)


def test_what_the_schedulers_refuse_without_queueing_it(pair: Pair) -> None:
    """Beam search. Each half is refused by its own SGLang, or told by the other, whichever comes first."""
    where = {"bootstrap_host": HOST, "bootstrap_port": pair.bootstrap_port, "bootstrap_room": 8}
    picture = {
        "text": "<|vision_start|><|image_pad|><|vision_end|>",
        "image_data": data_uri(squares(pair.family, 4, 4, 8)),
    }
    body = {**picture, **where, "sampling_params": {"beam_width": 2, "max_new_tokens": 4}}
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda half: post(f"{pair[half].url}/generate", body), ("encode", "language")))
    for answer in answers:
        refused(answer, 400, "Beam search is not supported")


@dataclass(frozen=True)
class Alone:
    """What requests to one half were told whose other half did not come."""

    port_of_nobody: int
    port_of_silence: int
    no_registry: Answer
    no_registry_stream: Answer
    silent_registry: Answer
    no_encode_half: Answer
    no_language_half: Answer


@pytest.fixture(scope="module")
def alone(pair: Pair) -> Alone:
    """All at the same time, because most of them wait for a deadline."""
    (nobody,) = free_ports(1)
    with closing(socket.create_server((HOST, 0))) as silent, ThreadPoolExecutor() as clients:
        silence = silent.getsockname()[1]
        ask_half = partial(clients.submit, to_half_alone, pair)
        waiting = [
            ask_half("language", nobody, room=1),
            ask_half("language", nobody, room=11, stream=True),
            ask_half("language", silence, room=2),
            ask_half("language", pair.bootstrap_port, room=3),
            ask_half("encode", 1, room=4),
        ]
        return Alone(nobody, silence, *(answer.result() for answer in waiting))


def test_a_registry_that_is_not_there(alone: Alone) -> None:
    refused(alone.no_registry, 502, str(alone.port_of_nobody), within=2 * DEADLINE)


def test_a_stream_that_has_begun_ends_with_the_reason_too(alone: Alone) -> None:
    """Its status line is out when the scheduler says what is wrong: an event says it."""
    assert "502" in str(alone.no_registry_stream.body)
    assert str(alone.port_of_nobody) in str(alone.no_registry_stream.body)


def test_a_registry_that_does_not_answer(alone: Alone) -> None:
    refused(alone.silent_registry, 502, str(alone.port_of_silence), within=2 * DEADLINE)


def test_a_language_half_without_its_encode_half(alone: Alone) -> None:
    """The encode instance lives, but nobody sends it this request."""
    refused(alone.no_encode_half, 502, "room 3", within=2 * DEADLINE)


def test_an_encode_half_without_its_language_half(alone: Alone) -> None:
    refused(alone.no_language_half, 503, "no language instance has asked for room 4", within=2 * DEADLINE)


def test_a_client_that_goes_away(pair: Pair) -> None:
    """It waits for rows that nobody sends; when it hangs up, the room is dropped long before its deadline."""
    with pytest.raises(TimeoutError):
        to_half_alone(pair, "language", pair.bootstrap_port, room=5, timeout=0.5)
    wait_until(lambda: "room=5 status=Failed" in pair["language"].log_text(), DEADLINE - 2)


def retry_after(pair: Pair, half: str, port: int, room: int) -> int:
    """Of an answer 503: in how many seconds the client may come back."""
    where = {"bootstrap_host": HOST, "bootstrap_port": port, "bootstrap_room": room}
    body = json.dumps(chat_body([squares(pair.family, 4, 4, 4)], "what", **where)).encode()
    headers = {"Content-Type": "application/json"}
    with pytest.raises(HTTPError, match="503") as told:
        urlopen(Request(f"{pair[half].url}/v1/chat/completions", body, headers), timeout=DEADLINE)
    with told.value as answer:
        return int(answer.headers["Retry-After"])


@pytest.mark.parametrize("half", ["encode", "language"])
def test_more_requests_than_may_wait(pair: Pair, half: str) -> None:
    """Rows that nobody sends, or nobody asks for, are awaited by as many requests as may wait; the next one is not."""
    first = 100 if half == "encode" else 200
    port, name = pair.bootstrap_port, "relay-encode" if half == "encode" else "relay"
    with ThreadPoolExecutor(MOST_WAITING) as clients:
        waiting = [clients.submit(to_half_alone, pair, half, port, first + at) for at in range(MOST_WAITING)]
        wait_until(lambda: numbers_of(pair[half])["parked_requests"] == MOST_WAITING)
        whole = ask(pair.url, [squares(pair.family, 4, 4, 7)], "what")
        refused(whole, 503, f"{MOST_WAITING} requests are waiting at this {half} instance")
        assert 1 <= retry_after(pair, half, port, first + MOST_WAITING) <= 60
        assert ask(pair.url, [], "text only").status == 200
        assert not any(one.done() for one in waiting), "the others were still waiting"
        for one in waiting:
            answer = one.result()
            assert answer.status in (502, 503), answer.body
            assert answer.seconds < 3 * DEADLINE, "some had to wait for a block first"
    assert re.search(rf"{name} room=\d+ refused: 503 {MOST_WAITING} requests", pair[half].log_text())


if __name__ == "__main__":
    run_tests(__file__)
