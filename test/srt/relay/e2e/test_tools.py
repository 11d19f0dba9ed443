"""What users do to a pair: bursts, SGLang's benchmark, several tokenizer workers, health checks."""

from __future__ import annotations

import io
import json
import random
import re
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openpyxl
import openpyxl.drawing.image
import pytest

from embedding_relay.tools import tiny_model
from embedding_relay.tools.chat_client import ask, data_uri, post
from embedding_relay.tools.local_cluster import COMMON_ENVIRON, HOST
from support.pairs import LARGE, Pair
from support.patience import wait_until
from support.questions import TOLERANCE, Question, difference, squares, stories, token_ids
from support.server_numbers import numbers_of
from support.sglang_ci import register_cpu_ci, run_tests
from support.warm_start import WarmProcess

register_cpu_ci(est_time=120, suite="base-c-test-cpu")

REQUESTS = 12
BURST = 200
FEW = 4
RELAY = str(Path(sys.executable).with_name("sglang-relay"))

# Two tokenizer workers at each half, and a pool that a burst has to wait for.
pytestmark = pytest.mark.parametrize("pair", [LARGE], ids=[LARGE.name], indirect=True, scope="session")


@pytest.mark.parametrize("half", ["encode", "language"])
def test_health(pair: Pair, half: str) -> None:
    """A tokenizer worker says 503 until its own start is over, and the second one starts after the first."""
    for path in ("/health", "/health_generate"):
        wait_until(lambda url=pair[half].url + path: is_well(url))  # type: ignore[misc]


def is_well(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return bool(reply.status == 200)
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return False


def test_two_tokenizer_workers(pair: Pair) -> None:
    """More requests than workers, so that both see some, the refused kind too."""
    question = Question("again", (squares(pair.family, 5, 5, 1), "what"))
    texts = {question.ask(pair.url).text for _ in range(6)}
    assert len(texts) == 1
    assert question.ask(pair.url, n=3).status == 200
    assert {ask(pair.url, ["data:image/png;base64,AAAA"], "what").status for _ in range(4)} == {400}


def test_a_batch_of_token_ids(pair: Pair) -> None:
    """Several rooms in one request. (The router takes no batch of texts.)"""
    ids = token_ids(pair.family, "<|vision_start|><|image_pad|><|vision_end|>what is this")
    pictures = [data_uri(squares(pair.family, 5, 5, seed)) for seed in (2, 3)]
    # Log-probabilities of the prompt too: the router looks for them in the answers of both halves.
    options = {
        "sampling_params": {"max_new_tokens": 8, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    url = f"{pair.url}/generate"
    both = post(url, {"input_ids": [ids, ids], "image_data": [[one] for one in pictures], **options})
    alone = [post(url, {"input_ids": ids, "image_data": one, **options}) for one in pictures]
    assert [answer.status for answer in (both, *alone)] == [200] * 3, both.body
    texts = [one["text"] for one in both.body]
    assert texts == [answer.body["text"] for answer in alone]
    assert texts[0] != texts[1], "two pictures with one answer would prove nothing"
    for meta in (one["meta_info"] for one in (*both.body, *(answer.body for answer in alone))):
        assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]


def test_a_constrained_answer(pair: Pair) -> None:
    """The grammar is for the language half. Random weights would not find one of these words on their own."""
    question = Question("constrained", (squares(pair.family, 5, 5, 4), "what"))
    answer = question.ask(pair.url, regex="(north|south)")
    assert answer.status == 200, answer.body
    assert answer.text in ("north", "south")


def test_bench_serving(pair: Pair, tmp_path: Path) -> None:
    """A client, started as servers are here: it imports as much as they do."""
    result = tmp_path / "bench.jsonl"
    model = str(tiny_model.cached(pair.family))
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang-oai-chat", "--base-url", pair.url]
    command += ["--model", model, "--tokenizer", model, "--dataset-name", "image", "--image-count", "2"]
    command += ["--image-resolution", "112x112", "--num-prompts", str(REQUESTS), "--max-concurrency", "4"]
    command += ["--random-input-len", "32", "--random-output-len", "8", "--output-file", str(result)]
    benchmark = WarmProcess("benchmark", command, "", tmp_path / "log", COMMON_ENVIRON)
    benchmark.start()
    try:
        wait_until(lambda: benchmark.returncode() is not None, 300)
    finally:
        benchmark.kill_group()
    assert benchmark.returncode() == 0, benchmark.log_text()
    assert json.loads(result.read_text().splitlines()[-1])["completed"] == REQUESTS


def test_a_workbook_of_pictures(pair: Pair, tmp_path: Path) -> None:
    """Each row's answer is what the pair says when it is asked for that row alone."""
    rows = [("what is this", 6, 500), ("count the squares", 9, 501), ("and this", 4, 502), ("what is this", 7, 503)]
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["prompt", "picture"])
    for at, (prompt, side, seed) in enumerate(rows, 2):
        sheet.append([prompt])
        shown = io.BytesIO()
        squares(pair.family, side, side, seed).save(shown, "PNG")
        sheet.add_image(openpyxl.drawing.image.Image(shown), f"B{at}")
    book.save(tmp_path / "prompts.xlsx")
    command = [str(Path(sys.executable).with_name("sglang-relay")), "batch", "run", str(tmp_path / "prompts.xlsx")]
    command += ["--endpoint", pair.url, "--out", str(tmp_path / "answers.xlsx"), "--cache-dir", str(tmp_path / "cache")]
    command += ["--max-tokens", "8", "--temperature", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    answered = openpyxl.load_workbook(tmp_path / "answers.xlsx").active
    header = [cell.value for cell in answered[1]]
    assert header[:2] == ["prompt", "picture"]
    answers = [row[header.index("answer")] for row in answered.iter_rows(min_row=2, values_only=True)]
    assert answers == [
        Question("row", (squares(pair.family, side, side, seed), text)).ask(pair.url).text for text, side, seed in rows
    ]


def test_the_doctor_finds_both_halves_well(pair: Pair) -> None:
    """Rows come to it, as to a language rank of this host."""
    command = [RELAY, "doctor", "--json", "--peer", pair["encode"].url, "--peer", pair["language"].url]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    findings = json.loads(ended.stdout)["findings"]
    assert [one for one in findings if one["outcome"] == "failed"] == []
    assert ended.returncode == 0
    together = {one["name"]: one["outcome"] for one in findings if " and " in one["about"]}
    assert together == dict.fromkeys(("versions", "model", "settings", "flags", "request"), "ok")
    moved = {one["name"]: one["facts"] for one in findings if one["facts"].get("bytes_per_s")}
    assert moved.keys() == {"mooncake", "shared memory", "transfer"}
    assert moved["transfer"]["over"] == "shared memory"
    assert moved["transfer"]["rounds"] > 1


def test_top_shows_the_instances_of_the_router(pair: Pair) -> None:
    ended = subprocess.run([RELAY, "top", "--once", "--router", pair.url], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    shown = {
        kind: lines[at + 1].split()[0] for at, line in enumerate(lines) for kind in line.split()[:1] if kind.isupper()
    }
    assert shown == {half.upper(): pair[half].url.removeprefix("http://") for half in ("encode", "language")}


TRACED = (
    *("request received", "prompt processed", "asked for rows from 0 on", "vision tower begins", "vision tower ends"),
    *("blocks offered for 256 rows", "resume: blocks for row 256 on", "rows 0-255 written", "rows 0-255 copied"),
    *("rows are here", "handed over to SGLang", "prefill began", "prefill ended", "first token", "answered"),
)


def test_trace_shows_what_became_of_a_request_on_both_halves(pair: Pair, tmp_path: Path) -> None:
    """Whichever of the tokenizer workers had it, on either half."""
    question = Question("traced", (squares(pair.family, 20, 20, 77), "what"))
    answer = question.ask(pair.url)
    assert answer.ok
    command = [RELAY, "trace", "--last", "1", "--router", pair.url, "--svg", str(tmp_path / "trace.svg")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"{answer.prompt_tokens} rows in 2 rounds" in ended.stdout
    assert [said for said in TRACED if said not in ended.stdout] == [], ended.stdout
    assert "one clock: both halves are on one machine" in ended.stdout
    assert "did not answer" not in ended.stdout
    took = float(re.search(r"first token after ([\d,.]+) ms", ended.stdout)[1].replace(",", ""))  # type: ignore[index]
    assert took < answer.seconds * 1000
    assert "first token" in (tmp_path / "trace.svg").read_text()


def test_trace_is_not_for_the_clients_of_the_router(pair: Pair) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{pair.url}/relay/trace?last=1", timeout=30)
    refused.value.close()
    assert refused.value.code == 404
    for half in ("encode", "language"):
        from_a_page = urllib.request.Request(f"{pair[half].url}/relay/trace?last=1", headers={"Origin": "http://x"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(from_a_page, timeout=30)
        refused.value.close()
        assert refused.value.code == 403


def burst_questions(family: str) -> list[Question]:
    """From a handful of token rows to 3000, the long ones of many small pictures."""
    sizes = [
        (1, 2),
        (1, 5),
        (1, 8),
        (1, 12),
        (2, 4),
        (2, 9),
        (3, 6),
        (4, 8),
        (6, 5),
        (8, 8),
        (10, 10),
        (16, 8),
        (30, 10),
    ]
    return [
        Question(f"{count} of {side}", (*(squares(family, side, side, 50 * at + one) for one in range(count)), "what"))
        for at, (count, side) in enumerate(sizes)
    ]


def show_few_at_a_time(questions: list[Question]) -> Iterator[Question]:
    """What the tower has seen it remembers, and on a CPU what it does is quadratic in the pictures of a request."""
    for question in questions:
        pictures = question.parts[:-1]
        for at in range(0, len(pictures), FEW):
            yield Question("few", (*pictures[at : at + FEW], "look"))


def test_one_picture_is_answered_while_requests_with_many_hold_all_blocks_that_they_may(pair: Pair) -> None:
    """Of these only the language halves are sent, so they would wait until their deadline, five minutes away."""
    language, where = pair["language"], {"bootstrap_host": HOST, "bootstrap_port": pair.bootstrap_port}
    many = Question("many", (*(squares(pair.family, 2, 2, 600 + at) for at in range(6)), "compare"))
    one, another = (Question("one", (squares(pair.family, 5, 5, seed), "what")) for seed in (610, 611))
    assert one.ask(pair.url).ok, "before it has delivered, an encode instance has one room at a time"
    clients = [many.send(language.url, **where, bootstrap_room=secrets.randbits(62)) for _ in range(5)]
    try:
        wait_until(lambda: numbers_of(language)["waiting_rooms"] == 2)  # three have two blocks each, of eight
        answer = another.ask(pair.url)
        assert answer.ok, answer.body
        assert answer.seconds < 60
        assert numbers_of(language)["waiting_rooms"] == 2
    finally:
        for client in clients:
            client.close()
    pair.wait_until_at_rest()


def test_two_hundred_at_once(pair: Pair) -> None:
    """The pool takes 1024 rows. Nobody is refused, nobody starves, and every answer is the one to its own question."""
    questions = burst_questions(pair.family)
    for few in show_few_at_a_time(questions):
        assert few.ask(pair.url, max_tokens=1).ok
    alone = [question.ask(pair.url) for question in questions]
    assert [answer.status for answer in alone] == [200] * len(questions), [answer.body for answer in alone]
    assert max(answer.prompt_tokens for answer in alone) > 3000
    asked = random.Random(1).choices(range(len(questions)), k=BURST)
    before = len(stories(pair["language"].log_text()))
    with ThreadPoolExecutor(BURST) as clients:
        answers = list(clients.map(lambda at: questions[at].ask(pair.url), asked))
    assert [answer.status for answer in answers] == [200] * BURST, [answer.body for answer in answers if not answer.ok]
    for at, answer in zip(asked, answers, strict=True):
        assert difference(answer, alone[at]) < TOLERANCE, questions[at].name
    told = stories(pair["language"].log_text())[before:]
    assert sorted(story.rows for story in told) == sorted(answer.prompt_tokens for answer in answers)
    print(
        f"{BURST} at once on {pair.settings.blocks} blocks: {sum(story.rows for story in told)} rows,"
        f" worst wait for a block {max(story.wait_ms for story in told) / 1000:.1f} s,"
        f" worst answer {max(answer.seconds for answer in answers):.1f} s, most rounds {max(s.rounds for s in told)}"
    )
    pair.wait_until_at_rest()


if __name__ == "__main__":
    run_tests(__file__)
