"""What pages tell a reader to type at a pair that runs, and what `sglang-relay size` says of it."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from embedding_relay.tools import cli, tiny_model
from embedding_relay.tools.chat_client import ask, picture
from embedding_relay.tools.demo import TransferReport, last_report
from support import pages, snippets
from support.pairs import LARGE, Pair
from support.patience import wait_until
from support.questions import stories
from support.repo import REPO
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=10, suite="base-c-test-cpu")

# In a module that others have made start it, this pair costs nothing more.
pytestmark = pytest.mark.parametrize("pair", [LARGE], ids=[LARGE.name], indirect=True, scope="session")


def report_of(pair: Pair, before: TransferReport | None) -> TransferReport:
    """Of the request after that one: the answer may arrive before the log line is written."""
    wait_until(lambda: last_report(pair["language"].log_text()) != before)
    report = last_report(pair["language"].log_text())
    assert report is not None
    return report


def test_what_the_tutorial_types(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The calls of tutorial.md, at the ports of these servers. Their pool is another one, and small as well."""
    ports = {"http://127.0.0.1:8000": pair.url, "http://127.0.0.1:30001": pair["language"].url}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    before, kinds = len(stories(pair["language"].log_text())), []
    for block in pages.blocks(REPO / "docs/tutorial.md"):
        if not block.run_by:
            continue
        text = block.text
        for written, here in ports.items():
            text = text.replace(written, here)
        kinds.append(block.language)
        if block.language == "python":
            exec(compile(text, str(block), "exec"), {})
        else:
            for command in pages.commands(text):
                assert answered(snippets.curl(command.words[1:])) == 200
    assert kinds == ["bash", "python", "python", "bash", "bash"]
    assert "prompt_tokens" in capsys.readouterr().out
    assert "sglang:embedding_relay_resumes_total" in metrics_of(pair)
    wait_until(lambda: len(stories(pair["language"].log_text())) == before + 1)  # text alone has no rows to transfer
    assert stories(pair["language"].log_text())[-1].rounds > 1


def answered(call: snippets.Call) -> int:
    headers = dict(header.split(": ", 1) for header in call.headers)
    request = urllib.request.Request(call.url, call.data.encode() or None, headers, method=call.method)
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.read()
        return int(reply.status)


def metrics_of(pair: Pair) -> str:
    with urllib.request.urlopen(f"{pair['language'].url}/metrics", timeout=30) as reply:
        return str(reply.read().decode())


@pytest.mark.parametrize("side", [64, 600])
def test_size_says_what_a_request_takes(pair: Pair, side: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["size", "--json", "--model", str(tiny_model.cached(pair.family)), "--side", str(side)]
    assert cli.main(model) == 0
    media_rows = json.loads(capsys.readouterr().out)["rows_per_picture"]
    before = last_report(pair["language"].log_text())
    answer = ask(pair.url, [picture(side, side, seed=side)], "what is this")
    assert answer.ok, answer.body
    report = report_of(pair, before)
    assert cli.main([*model, "--text-tokens", str(answer.prompt_tokens - media_rows)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows_per_request"], figures["request_bytes"]) == (report.rows, report.bytes)


if __name__ == "__main__":
    run_tests(__file__)
