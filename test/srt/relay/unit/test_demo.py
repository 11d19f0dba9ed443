"""What the demo reads and says; the servers it starts are the e2e lane's business."""

import importlib.util

import pytest

from embedding_relay.tools import cli, demo
from embedding_relay.tools.chat_client import Answer
from embedding_relay.tools.demo import Reporter, TransferReport, last_report, summary

LANGUAGE_LOG = """\
[04:07:14] relay room=1 status=Failed reason="the encode instance is gone"
[04:07:15] relay room=2 status=Success rows=500 rounds=1 bytes=264000 wait_ms=0.1 transfer_ms=12.0
[04:07:16] relay room=9007199254740993 status=Success rows=1030 rounds=9 bytes=543840 wait_ms=7.4 transfer_ms=854.1
"""
ENCODE_LOG = """\
[4:07] relay-encode room=9007199254740993 status=Success rows=1030 rounds=9 bytes=543840 wait_ms=812.4 transfer_ms=41.7
"""
LANGUAGE = TransferReport(9007199254740993, 1030, 9, 543840, 7.4, 854.1)
ENCODE = TransferReport(9007199254740993, 1030, 9, 543840, 812.4, 41.7)


def test_the_last_report_of_a_log() -> None:
    assert last_report(LANGUAGE_LOG) == LANGUAGE
    assert last_report(ENCODE_LOG) == ENCODE
    assert last_report("nothing of ours") is None


def test_the_summary_names_rounds_bytes_and_times() -> None:
    body = {"choices": [{"message": {"content": "an answer"}}]}
    said = "\n".join(summary(Answer(200, body, 1.0), LANGUAGE, ENCODE, 128))
    parts = (
        "'an answer'",
        "1030 token rows",
        "9 rounds",
        "543,840 bytes",
        "7 ms for receive",
        "812 ms",
        "42 ms",
        "139 ms",
    )
    for part in parts:
        assert part in said
    assert "139 ms for the rest" in said


def test_progress_without_a_terminal_is_a_line_per_change(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    for seconds in (0.0, 0.2, 0.4):
        reporter.progress("encode", "starting", seconds)
    reporter.progress("encode", "ready", 0.6)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["encode starting", "encode ready after 0.6 s"]


def test_a_missing_package_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sglang_router" else object())
    assert demo.run(cli.build_parser().parse_args(["demo"])) == 2
    assert "install the extra router" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--default-tokens", "0"], ["--max-tokens", "-1"], ["--device", "toaster"]])
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
