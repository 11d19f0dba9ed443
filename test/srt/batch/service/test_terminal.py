"""`sglang-relay batch run`: a workbook from the terminal, stopped and gone on with, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import openpyxl
import pytest

from embedding_relay.tools.local_process import free_ports
from support.batch_service import RELAY as QUICK
from support.batch_service import sheet_of, workbook_of
from support.patience import wait_until
from support.stub_endpoint import StubEndpoint, answer_to

INSTALLED = (str(Path(sys.executable).with_name("sglang-relay")),)


class Terminal:
    def __init__(self, where: Path, endpoint: str) -> None:
        self.where = where
        self.out = where / "answers.csv"
        self.endpoint = endpoint

    def command(self, workbook: Path, *arguments: str, by: Sequence[str] = QUICK) -> list[str]:
        places = ["--out", str(self.out), "--cache-dir", str(self.where / "cache"), "--endpoint", self.endpoint]
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


def test_a_dead_endpoint_is_told_on_80_columns_and_given_up(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, f"http://127.0.0.1:{free_ports(1)[0]}")
    workbook = terminal.file(sheet_of(["a", "b", "c"]))
    status, said = on_a_terminal(terminal.command(workbook, "--give-up-after", "1"), columns=80)
    assert status == 4, said
    lines = [line for part in said.splitlines() for line in part.split("\r")]
    shown = [line for line in lines if line.startswith("cannot reach: ")]
    assert shown, said
    for line in shown:
        assert len(line) <= 80
        assert "0/3" in line
        assert "|" in line
    assert f"cannot reach the endpoint {terminal.endpoint} (connection refused); waiting for it, up to 1 s" in lines
    assert lines[-1].startswith("gave up after 1 s: cannot reach the endpoint")
    assert lines[-1].endswith("; the same command goes on from here")
    assert not terminal.out.exists()


def on_a_terminal(command: list[str], columns: int) -> tuple[int, str]:
    """The exit status, and all that was shown, without the sequences that move the cursor."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = bytearray()
    with contextlib.suppress(OSError):  # when its other end is closed
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    return process.wait(60), re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown.decode()).replace("\r\n", "\n").rstrip("\n")


def test_rows_that_fail_are_told(terminal: Terminal, stub: StubEndpoint) -> None:
    stub.next(None, "bad", status=400, message="I will not look at that")
    ended = terminal.run(terminal.file(sheet_of([*(f"bad {at}" for at in range(7)), "good"])))
    assert ended.returncode == 3
    assert ended.stdout.endswith("1 answered, 7 failed\n")
    assert "7 rows failed (" in ended.stderr
    assert "): 400: I will not look at that\n" in ended.stderr
    assert ended.stderr.endswith("the same command with --retry-failed asks the failed rows again\n")


def test_the_failed_rows_are_asked_again_and_only_these(terminal: Terminal, stub: StubEndpoint) -> None:
    workbook = terminal.file(sheet_of(["bad", "good"]))
    stub.next(1, "bad", status=400, message="not yet")
    assert terminal.run(workbook).returncode == 3
    for _ in range(2):  # the second time nothing is left to ask
        ended = terminal.run(workbook, "--retry-failed")
        assert (ended.returncode, ended.stdout) == (0, f"{terminal.out}: 2 answered, 0 failed\n")
        assert stub.counts() == {"bad": 2, "good": 1}
    rows = list(csv.DictReader(io.StringIO(terminal.out.read_text())))
    assert [row["answer"] for row in rows] == [answer_to("bad"), answer_to("good")]


def test_it_says_what_it_asks_and_why(terminal: Terminal, stub: StubEndpoint) -> None:
    ended = terminal.run(terminal.file(b"id,question\n1,what?\n"), "--model", "m")
    assert ended.stderr.startswith(
        "prompts.csv: 1 row\n"
        "  prompt    B question (its name says so)\n"
        f"  endpoint  {stub.url}, model: m\n"
    )  # fmt: skip


# ---- before it is asked


def previewed(terminal: Terminal, workbook: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*QUICK, "batch", "preview", str(workbook), "--endpoint", terminal.endpoint, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=terminal.where)


def test_a_preview_asks_nothing(terminal: Terminal, stub: StubEndpoint) -> None:
    workbook = terminal.file(sheet_of([f"row {number}\x1b[31m" for number in range(9)]))
    ended = previewed(terminal, workbook, "--rows", "2")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "prompts.csv: 9 rows",
        "  prompt    A prompt (its name says so)",
        f"  endpoint  {stub.url}, model stub",
        "row 2",
        "  row 0 [31m",
        "row 3",
        "  row 1 [31m",
    ]
    assert stub.counts() == {}
    assert [path.name for path in terminal.where.iterdir() if path.is_dir()] == [], "something was kept"


def test_a_preview_with_answers(terminal: Terminal, stub: StubEndpoint) -> None:
    stub.next(1, "row 1", status=400, message="no")
    ended = previewed(terminal, terminal.file(sheet_of([f"row {number}" for number in range(90)])), "--try")
    assert ended.returncode == 3
    assert sum(stub.counts().values()) == 5
    assert answer_to("row 0") in ended.stdout
    assert "FAILED: 400: no" in ended.stdout
    assert "90 rows like these: about 180 tokens in and 360 out" in ended.stdout


def test_a_preview_of_an_endpoint_that_is_away(terminal: Terminal) -> None:
    terminal.endpoint = "http://127.0.0.1:1"
    for arguments in ((), ("--try",)):
        ended = previewed(terminal, terminal.file(sheet_of(["a"])), *arguments)
        assert ended.returncode == 1
        assert "cannot reach the endpoint http://127.0.0.1:1 (connection refused)" in ended.stdout + ended.stderr


def test_what_cannot_be_is_one_line(terminal: Terminal) -> None:
    """Every other way in which it cannot be is in unit/test_terminal.py."""
    ended = terminal.run(terminal.file(b"%PDF-1.7 and so on", "prompts.xlsx"))
    assert ended.returncode == 1
    assert "PDF" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert not terminal.out.exists()


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
