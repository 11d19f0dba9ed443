"""With the plugin, a pair behind the router and SGLang's own split say what one undivided server says.

Same tokens, same log-probabilities. The undivided servers of both families are asked first, everything that the others
will be asked, from an empty prefix cache.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from embedding_relay.tools import tiny_model
from embedding_relay.tools.chat_client import Answer, ask, picture, post
from embedding_relay.tools.local_cluster import LocalCluster, Options, sglang_server
from embedding_relay.tools.local_process import LocalProcess, free_ports
from support import pairs, servers
from support.pairs import LARGE, SMALL, Pair
from support.questions import TOLERANCE, Question, Story, difference, filler_for, squares, stories
from support.sglang_ci import register_cpu_ci, run_tests
from support.today import EVERYTHING

register_cpu_ci(est_time=600, suite="base-c-test-cpu")

PAIRS = [SMALL, LARGE, *(pairs.OTHERS if EVERYTHING else ())]
DEFAULT = LARGE.default  # a multiple of both block sizes
SPLIT_FAMILY = "qwen2_5_vl"  # the family of SGLang's own split

each_pair = pytest.mark.parametrize(
    "pair", PAIRS, ids=[settings.name for settings in PAIRS], indirect=True, scope="session"
)


def questions(family: str, url: str) -> list[Question]:
    """Cold first, so that every server meets each picture for the first time in the same place."""
    image = partial(squares, family)

    def sized(name: str, wide: int, high: int, seed: int, rows: int) -> Question:
        # The same size, but not the same picture: that would be in the prefix cache of this server alone.
        ruler = Question(name, (image(wide, high, 1000 + seed), "what is this"))
        return Question(name, (image(wide, high, seed), "what is this"), filler_for(ruler, rows, url))

    return [
        Question("text only", ("tell me something",)),
        Question("below one block", (image(2, 3, 1), "what")),
        sized("exactly the default", 12, 12, 2, DEFAULT),
        sized("one more than the default", 12, 12, 3, DEFAULT + 1),
        Question("two rounds", (image(20, 20, 4), "what is this")),
        Question("three rounds", (image(22, 28, 5), "what is this")),
        Question("twenty rounds of the small pair", (image(30, 32, 6), "what is this")),
        Question("two adjacent images", (image(5, 5, 7), image(5, 5, 8), "compare")),
        Question(
            "five images with text between",
            (
                image(3, 4, 9), "first", image(8, 2, 10), "second", image(2, 2, 11), "third",
                image(7, 7, 12), "fourth", image(4, 9, 13), "compare them all",
            ),
        ),
        Question("same image twice in one prompt", (image(6, 6, 14), "and", image(6, 6, 14), "equal?")),
        Question("an image seen before", (image(20, 20, 4), "what is this")),
    ]  # fmt: skip


def split_questions(url: str, flush: bool) -> list[Answer]:
    """`flush`: each from an empty prefix cache. The split has none here: it hashes pictures in its own way."""
    asked = [
        ([picture(224, 224, seed=1)], "what is this"),
        ([picture(224, 224, seed=2)], "what is this"),
        ([picture(224, 224, seed=1), picture(140, 280, seed=3)], "compare these two"),
        ([], "no picture at all"),
    ]
    answers = []
    for pictures, text in asked:
        assert not flush or post(f"{url}/flush_cache", None).ok
        answers.append(ask(url, pictures, text))
    return answers


@dataclass(frozen=True)
class Reference:
    """What the undivided server of one family answered."""

    questions: list[Question]
    answers: list[Answer]
    other_image: float
    of_split: list[Answer]


@pytest.fixture(scope="session")
def references(undivided: dict[str, LocalProcess]) -> dict[str, Reference]:
    """By family."""
    return {family: ask_reference(family, server.url) for family, server in undivided.items()}


def ask_reference(family: str, url: str) -> Reference:
    asked = questions(family, url)
    answers = [question.ask(url) for question in asked]
    one, other = (Question("control", (squares(family, 20, 20, seed), "what is this")).ask(url) for seed in (100, 101))
    return Reference(asked, answers, difference(one, other), split_questions(url, flush=True))


def sglangs_own_split(options: Options) -> LocalCluster:
    """SGLang's own split of the encoder from the rest, over ZMQ."""
    encoder_port, language_port, bootstrap_port = free_ports(3)
    transfer = ("--encoder-transfer-backend", "zmq_to_scheduler")
    encoder = sglang_server("encoder", options, encoder_port, "--encoder-only", *transfer)
    where = ("--encoder-urls", encoder.url, "--encoder-bootstrap-port", str(bootstrap_port))
    language = sglang_server("language", options, language_port, "--language-only", *transfer, *where)
    return LocalCluster(language.url, [[encoder, language]])


def test_an_undivided_server_answers(references: dict[str, Reference]) -> None:
    answers = references[SPLIT_FAMILY].of_split
    assert [answer.status for answer in answers] == [200] * 4
    first, second, both, none = answers
    assert first.logprobs != second.logprobs, "the picture must matter, or no test would see a wrong embedding"
    assert both.prompt_tokens > first.prompt_tokens > none.prompt_tokens


def test_sglangs_own_split_gives_the_same_answers(references: dict[str, Reference], logs: Path) -> None:
    options = servers.options(tiny_model.cached(SPLIT_FAMILY), logs / "split", "--disable-radix-cache")
    with servers.running(sglangs_own_split(options)) as cluster:
        answers = split_questions(cluster.url, flush=False)
    assert [answer.status for answer in answers] == [200] * 4
    for here, there in zip(answers, references[SPLIT_FAMILY].of_split, strict=True):
        assert [token for token, _ in here.logprobs] == [token for token, _ in there.logprobs]
        # Two pictures go through the split's tower one by one and through the other's together: the last bits differ.
        assert [value for _, value in here.logprobs] == pytest.approx([value for _, value in there.logprobs], abs=0.05)


@each_pair
def test_same_answers(references: dict[str, Reference], pair: Pair) -> None:
    reference, earlier = references[pair.family], len(stories(pair["language"].log_text()))
    assert reference.other_image >= 20 * TOLERANCE, "another image would not be noticed"
    answers = [question.ask(pair.url) for question in reference.questions]
    assert [answer.status for answer in answers] == [200] * len(answers), [answer.body for answer in answers]
    differences = {
        question.name: difference(answer, expected)
        for question, answer, expected in zip(reference.questions, answers, reference.answers, strict=True)
    }
    print(f"largest difference in log-probability: {max(differences.values())}")
    assert {name: value for name, value in differences.items() if value > TOLERANCE} == {}
    assert [answer.prompt_tokens for answer in answers] == [answer.prompt_tokens for answer in reference.answers]
    _the_last_one_hits_the_prefix_cache(answers[-1])
    _rounds_are_as_many_as_the_rule_says(reference, pair, stories(pair["language"].log_text())[earlier:])
    _streamed_equals_whole(reference, pair)


def _the_last_one_hits_the_prefix_cache(answer: Answer) -> None:
    cached = answer.body["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= answer.prompt_tokens - 1, f"{cached} of {answer.prompt_tokens} tokens came from the cache"


def _rounds_are_as_many_as_the_rule_says(reference: Reference, pair: Pair, told: list[Story]) -> None:
    lengths = [answer.prompt_tokens for answer in reference.answers]
    assert lengths[2:4] == [DEFAULT, DEFAULT + 1]
    assert [story.rows for story in told] == lengths[1:], "one transfer per question with an image, of its true length"
    for story in told:
        assert story.rounds == pair.settings.rounds(story.rows), story
    if pair.settings == SMALL:
        assert min(story.rounds for story in told) > 1
    print(f"rounds of the longest request: {max(story.rounds for story in told)}")


def _streamed_equals_whole(reference: Reference, pair: Pair) -> None:
    answer = reference.questions[-1].ask(pair.url, stream=True)
    assert answer.status == 200
    assert streamed_text(answer) == reference.answers[-1].text


def streamed_text(answer: Answer) -> str:
    chunks = [line.removeprefix("data: ") for line in str(answer.body).splitlines() if line.startswith("data: {")]
    deltas = [json.loads(chunk)["choices"] for chunk in chunks]
    return "".join(choice["delta"].get("content") or "" for choices in deltas for choice in choices)


@each_pair
def test_eight_at_once(pair: Pair) -> None:
    """In the small pair eight requests of two to four rounds share four blocks."""
    asked = [Question(f"at once {seed}", (squares(pair.family, 7, 9 + seed, 200 + seed), "what")) for seed in range(8)]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda question: question.ask(pair.url), asked))
    assert [answer.status for answer in together] == [200] * len(asked), [answer.body for answer in together]
    alone = [question.ask(pair.url) for question in asked]
    for one, other in zip(together, alone, strict=True):
        assert [token for token, _ in one.logprobs] == [token for token, _ in other.logprobs]


@each_pair
def test_three_samples_of_one_prompt(pair: Pair) -> None:
    question = Question("three samples", (squares(pair.family, 9, 9, 300), "what"))
    answer = question.ask(pair.url, n=3)
    assert answer.status == 200, answer.body
    one = question.ask(pair.url)
    assert [choice["message"]["content"] for choice in answer.body["choices"]] == [one.text] * 3


if __name__ == "__main__":
    run_tests(__file__)
