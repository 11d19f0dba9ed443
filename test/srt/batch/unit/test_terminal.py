"""What `sglang-relay batch run` says when something goes wrong inside: one line, and the rest in a file."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from embedding_relay.batch import terminal
from embedding_relay.batch.command_line import settings_of
from embedding_relay.tools.cli import build_parser, main


def run(tmp_path: Path) -> int:
    (tmp_path / "a.csv").write_text("prompt\na\n")
    places = ["--out", str(tmp_path / "b.csv"), "--cache-dir", str(tmp_path / "cache")]
    words = ["batch", "run", str(tmp_path / "a.csv"), *places, "--endpoint", "http://127.0.0.1:9"]
    arguments = build_parser().parse_args(words)
    return terminal.run(settings_of(arguments), arguments)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("inside of a library"), "this is a bug of the command (KeyError); {log} says where"),
        (OSError(errno.ENOSPC, "No space left on device", "/d/e"), "/d/e: no space left on device"),
    ],
)
def test_an_error_of_others_is_one_line_of_ours(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    says: str,
) -> None:
    def raising(path: Path) -> None:
        raise error

    monkeypatch.setattr(terminal, "open_store", raising)
    assert run(tmp_path) == 1
    log = tmp_path / "cache" / "error.log"
    assert capsys.readouterr().err == f"sglang-relay batch run: {says.format(log=log)}\n"
    assert log.exists() is isinstance(error, KeyError)
    assert not log.exists() or "inside of a library" in log.read_text()


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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    content: bytes | None,
    name: str,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    workbook, out = tmp_path / name, tmp_path / "answers.csv"
    if content is not None:
        workbook.write_bytes(content)
    places = ["--out", str(out), "--cache-dir", str(tmp_path / "cache"), "--endpoint", "http://127.0.0.1:9"]
    words = ["batch", "run", str(workbook), *places, *(word.format(workbook=workbook) for word in arguments)]
    assert main(words) == 1
    said = capfd.readouterr().err
    assert says in said
    assert len(said.strip().splitlines()) == 1, said
    assert not out.exists()


@pytest.mark.parametrize("option", [("--concurrency", "0"), ("--retries", "many"), ("--request-seconds", "-1")])
def test_a_wrong_option_is_named(capfd: pytest.CaptureFixture[str], option: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["batch", "run", "a.csv", "--out", "b.csv", "--endpoint", "http://127.0.0.1:9", *option])
    assert ended.value.code == 2
    assert option[0] in capfd.readouterr().err


def test_old_runs_that_another_command_removes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both commands have listed the same folders; while this one removes the first, the other removes all of them."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / "young").mkdir()
    real = shutil.rmtree

    def remove_all_that_is_old(_path: Path, ignore_errors: bool) -> None:
        for name in ("a", "b", "c"):
            real(tmp_path / name, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", remove_all_that_is_old)
    terminal._forget_old_runs(tmp_path, 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["young"]
