"""With the plugin installed, SGLang's own modes answer as they do without it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_relay.tools import local_cluster, tiny_model
from embedding_relay.tools.chat_client import Answer, ask, picture
from embedding_relay.tools.local_cluster import LocalCluster, Options, sglang_server
from embedding_relay.tools.local_process import free_ports
from support import servers

FAMILY = "qwen2_5_vl"  # the other one is answered by an undivided server in test_equality

# The split hashes pictures in its own way, so prefix hits, and with them the last bits, would differ.
SAME_WORK = "--disable-radix-cache"


def questions(url: str) -> list[Answer]:
    return [
        ask(url, [picture(224, 224, seed=1)], "what is this"),
        ask(url, [picture(224, 224, seed=2)], "what is this"),
        ask(url, [picture(224, 224, seed=1), picture(140, 280, seed=3)], "compare these two"),
        ask(url, [], "no picture at all"),
    ]


def sglangs_own_split(options: Options) -> LocalCluster:
    """SGLang's own split of the encoder from the rest, over ZMQ."""
    encoder_port, language_port, bootstrap_port = free_ports(3)
    transfer = ("--encoder-transfer-backend", "zmq_to_scheduler")
    encoder = sglang_server("encoder", options, encoder_port, "--encoder-only", *transfer)
    where = ("--encoder-urls", encoder.url, "--encoder-bootstrap-port", str(bootstrap_port))
    language = sglang_server("language", options, language_port, "--language-only", *transfer, *where)
    return LocalCluster(language.url, [[encoder, language]])


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model.cached(FAMILY)


@pytest.fixture(scope="module")
def undivided_answers(model: Path, logs: Path) -> Iterator[list[Answer]]:
    cluster = local_cluster.undivided(servers.options(model, logs / "undivided", SAME_WORK))
    with servers.running(cluster):
        yield questions(cluster.url)


def test_an_undivided_server_answers(undivided_answers: list[Answer]) -> None:
    assert [answer.status for answer in undivided_answers] == [200] * 4
    first, second, both, none = undivided_answers
    assert first.logprobs != second.logprobs, "the picture must matter, or no test would see a wrong embedding"
    assert both.prompt_tokens > first.prompt_tokens > none.prompt_tokens


def test_sglangs_own_split_gives_the_same_answers(undivided_answers: list[Answer], model: Path, logs: Path) -> None:
    cluster = sglangs_own_split(servers.options(model, logs / "split", SAME_WORK))
    with servers.running(cluster):
        answers = questions(cluster.url)
    assert [answer.status for answer in answers] == [200] * 4
    for here, there in zip(answers, undivided_answers, strict=True):
        assert [token for token, _ in here.logprobs] == [token for token, _ in there.logprobs]
        # Two pictures go through the split's tower one by one and through the other's together: the last bits differ.
        assert [value for _, value in here.logprobs] == pytest.approx([value for _, value in there.logprobs], abs=0.05)
