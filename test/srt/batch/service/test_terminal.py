"""`sglang-relay batch run`: a workbook from the terminal, stopped and gone on with, and what it says when it cannot."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import openpyxl
import pytest

from support.batch_service import RELAY as QUICK
from support.batch_service import sheet_of, workbook_of
from support.patience import wait_until
from support.stub_endpoint import StubEndpoint, answer_to

INSTALLED = (str(Path(sys.executable).with_name("sglang-relay")),)


class Terminal:
    def __init__(self, where: Path, endpoint: str) -> None:
        self.where = where
        self.out = where / "answers.csv"
        self._endpoint = endpoint

    def command(self, workbook: Path, *arguments: str, by: Sequence[str] = QUICK) -> list[str]:
        places = ["--out", str(self.out), "--cache-dir", str(self.where / "cache"), "--endpoint", self._endpoint]
        return [*by, "batch", "run", str(workbook), *places, *arguments]

    def run(self, workbook: Path, *arguments: str, by: Sequence[str] = QUICK) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(workbook, *arguments, by=by), capture_output=True, text=True, timeout=100)

    def file(self, content: bytes, name: str = "prompts.csv") -> Path:
        path = self.where / name
        path.write_bytes(content)
        return path


@pytest.fixture
def terminal(tmp_path: Path, stub: StubEndpoint) -> Terminal:
    return Terminal(tmp_path, stub.url)


def test_a_workbook_from_end_to_end(terminal: Terminal) -> None:
    """By the name that it is installed under."""
    prompts = [f"row {number}" for number in range(40)]
    terminal.out = terminal.where / "answers.xlsx"
    ended = terminal.run(terminal.file(workbook_of(prompts), "prompts.xlsx"), by=INSTALLED)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == f"{terminal.out}: 40 answered, 0 failed"
    assert "100%" in ended.stderr
    assert "40/40" in ended.stderr
    header, *rows = openpyxl.load_workbook(terminal.out).active.iter_rows(values_only=True)
    assert header == ("prompt", "answer", "status", "error", "prompt_tokens", "completion_tokens")
    assert [(row[0], row[1]) for row in rows] == [(prompt, answer_to(prompt)) for prompt in prompts]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_goes_on_where_it_stopped(terminal: Terminal, stub: StubEndpoint, number: signal.Signals) -> None:
    prompts = [f"row {at}" for at in range(120)]
    workbook = terminal.file(sheet_of(prompts))
    stub.delay(0.1)
    process = subprocess.Popen(
        terminal.command(workbook, "--concurrency", "4"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: sum(stub.counts().values()) > 40, 60)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert said.endswith("stopped; the same command goes on from here\n")
    assert not terminal.out.exists()
    stub.delay(0)
    ended = terminal.run(workbook, "--concurrency", "4")
    assert ended.returncode == 0, ended.stderr
    rows = list(csv.DictReader(io.StringIO(terminal.out.read_text())))
    assert [row["answer"] for row in rows] == [answer_to(prompt) for prompt in prompts]
    assert sum(stub.counts().values()) <= len(prompts) + 4, "rows that were finished were paid for twice"


def test_what_is_finished_is_written_again_and_not_asked_again(terminal: Terminal, stub: StubEndpoint) -> None:
    workbook = terminal.file(sheet_of(["a", "b"]))
    assert terminal.run(workbook).returncode == 0
    terminal.out.unlink()
    assert terminal.run(workbook).returncode == 0
    assert terminal.out.exists()
    assert stub.counts() == {"a": 1, "b": 1}
    assert terminal.run(workbook, "--fresh").returncode == 0
    assert stub.counts() == {"a": 2, "b": 2}
    assert terminal.run(workbook, "--max-tokens", "7").returncode == 0
    assert stub.counts() == {"a": 3, "b": 3}, "another question is another run"


def test_a_template_over_two_columns(terminal: Terminal, stub: StubEndpoint) -> None:
    workbook = terminal.file(b"text,language\nguten Tag,French\n{x},Latin\n")
    ended = terminal.run(workbook, "--template", "Translate {text} into {language}")
    assert ended.returncode == 0, ended.stderr
    assert set(stub.counts()) == {"Translate guten Tag into French", "Translate {x} into Latin"}


def test_rows_that_fail_are_told(terminal: Terminal, stub: StubEndpoint) -> None:
    stub.next(None, "bad", status=400, message="I will not look at that")
    ended = terminal.run(terminal.file(sheet_of([*(f"bad {at}" for at in range(7)), "good"])))
    assert ended.returncode == 0
    assert ended.stdout.endswith("1 answered, 7 failed\n")
    assert "row 2: " in ended.stderr
    assert "I will not look at that" in ended.stderr
    assert "… and 2 more" in ended.stderr


@pytest.mark.parametrize(
    ("content", "name", "arguments", "says"),
    [
        (None, "absent.csv", (), "there is no such file"),
        (b"%PDF-1.7 and so on", "prompts.xlsx", (), "PDF"),
        (b"prompt\nx\n", "p.csv", ("--prompt-column", "nothing"), "nothing"),
        (b"prompt\nx\n", "p.csv", ("--template", "{{nothing}}"), "nothing"),
        (b"prompt\nx\n", "p.csv", ("--endpoint", "localhost:1"), "no http:// or https:// URL"),
        (b"prompt\nx\n", "p.csv", ("--out", "/nowhere/at/all.csv"), "there is no such directory"),
        (b"prompt\nx\n", "p.csv", ("--out", "{workbook}"), "would replace the workbook"),
        (b"prompt\nx\n", "p.csv", ("--out", "a.xlsx"), "the answered workbook is .csv"),
        (b"prompt\nx\n", "p.csv", ("--allowed-media-domains", "a/b"), "a/b"),
        (b"prompt\nx\n", "p.csv", ("--temperature", "3"), "temperature must be between 0 and 2"),
    ],
)
def test_what_cannot_be_is_one_line(
    terminal: Terminal, content: bytes | None, name: str, arguments: tuple[str, ...], says: str
) -> None:
    workbook = terminal.where / name if content is None else terminal.file(content, name)
    ended = terminal.run(workbook, *(argument.format(workbook=workbook) for argument in arguments))
    assert ended.returncode == 1
    assert says in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert not terminal.out.exists()


@pytest.mark.parametrize("arguments", [("--concurrency", "0"), ("--retries", "many"), ("--request-seconds", "-1")])
def test_a_wrong_option_is_named(terminal: Terminal, arguments: tuple[str, ...]) -> None:
    ended = terminal.run(terminal.file(sheet_of(["a"])), *arguments)
    assert ended.returncode == 2
    assert arguments[0] in ended.stderr


def test_a_port_that_is_taken_is_one_line(stub: StubEndpoint, tmp_path: Path) -> None:
    port = stub.url.rpartition(":")[2]
    command = [*QUICK, "batch", "serve", "--endpoint", stub.url, "--port", port, "--cache-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in ended.stderr.splitlines()[-1]


def test_a_library_that_is_missing_is_named(tmp_path: Path) -> None:
    """As after an install without the extra: the import of one library fails."""
    code = "import runpy, sys; sys.modules['openpyxl'] = None; "
    code += "runpy.run_module('embedding_relay', None, '__main__')"
    workbook = tmp_path / "a.csv"
    workbook.write_text("prompt\na\n")
    arguments = ["batch", "run", str(workbook), "--out", str(tmp_path / "o.csv"), "--endpoint", "http://localhost:1"]
    environ = os.environ | {"PYTHONWARNINGS": "ignore"}
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environ)
    assert ended.returncode == 1
    assert "pip install 'sglang-embedding-relay[batch]'" in ended.stderr
