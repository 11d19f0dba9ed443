"""`sglang-relay doctor`: what is printed, how it ends, and that one bad check stops no other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from embedding_relay.tools import cli, doctor, doctor_machine, doctor_peer
from embedding_relay.tools.doctor_machine import Finding, Outcome, failed, ok, skipped, warning


def raises() -> Finding:
    raise RuntimeError("a disk is on fire")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with these checks and findings, on which nothing is transferred and SGLang is not imported."""

    def of(*checks: Callable[[], Finding]) -> None:
        monkeypatch.setattr(doctor_machine, "CHECKS", [(f"check {at}", check) for at, check in enumerate(checks)])
        monkeypatch.setattr(doctor_machine, "check_transfer", lambda host: [])
        monkeypatch.setattr(doctor_machine, "apply_hooks", lambda: ok("import", "every hook applies"))

    return of


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (ok("a", "well"), 0),
        (warning("a", "hm", "do this"), 0),
        (skipped("a", "not here"), 0),
        (failed("a", "no", "do this"), 1),
    ],
    ids=lambda found: getattr(found, "outcome", None),
)
def test_the_exit_status(machine: Callable[..., None], found: Finding, status: int) -> None:
    machine(lambda: found)
    assert cli.main(["doctor"]) == status
    assert cli.main(["doctor", "--json"]) == status


def test_each_line_that_is_not_well_says_what_to_do(
    machine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    machine(lambda: ok("python", "3.11"), lambda: failed("wheel", "two of them\033[2J", "pip uninstall one"))
    assert cli.main(["doctor", "--thorough"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "this machine"
    assert lines[1].split() == ["ok", "python", "3.11"]
    assert lines[2].split() == ["FAIL", "wheel", "two", "of", "them?[2J"], "what it found may not move the cursor"
    assert lines[3].strip() == "-> pip uninstall one"
    assert lines[4].split() == ["ok", "import", "every", "hook", "applies"]
    assert lines[-1].startswith("3 checks in ")
    assert lines[-1].endswith(": 2 ok, 1 failed")


def test_a_check_that_fails_itself_stops_no_other(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(raises, lambda: ok("b", "well"))
    monkeypatch.setattr(doctor_machine, "check_transfer", lambda host: raises())
    monkeypatch.setattr(doctor_machine, "apply_hooks", raises)
    monkeypatch.setattr(doctor_peer, "reach", lambda url, key: raises())
    assert cli.main(["doctor", "--thorough", "--json", "--peer", "a:1", "--peer", "b:2"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [(one["about"], one["name"], one["outcome"]) for one in told["findings"]] == [
        ("this machine", "check 0", "failed"),
        ("this machine", "b", "ok"),
        ("this machine", "transfer", "failed"),
        ("this machine", "import", "failed"),
        ("peer a:1", "reach", "failed"),
        ("peer b:2", "reach", "failed"),
    ]
    assert all("a disk is on fire" in one["said"] for one in told["findings"] if one["outcome"] == "failed")


def test_sglang_is_imported_only_when_that_was_asked_for(
    machine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    machine(lambda: ok("python", "3.11", version="3.11.9"))
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert 0 <= told["seconds"] < 10
    assert told["findings"] == [
        {
            "about": "this machine",
            "name": "python",
            "outcome": "ok",
            "said": "3.11",
            "todo": "",
            "facts": {"version": "3.11.9"},
        }
    ]


def test_an_interrupt_ends_it_quietly(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> Finding:
        raise KeyboardInterrupt

    machine(lambda: ok("a", "well"), interrupted)
    assert cli.main(["doctor"]) == 130
    assert "Traceback" not in "".join(capsys.readouterr())


def test_whoever_reads_it_may_stop_reading() -> None:
    """As `| head` does."""
    command = [sys.executable, "-m", "embedding_relay", "doctor"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    running.stdout.readline()
    running.stdout.close()
    assert running.wait(30) == 141
    assert running.stderr is not None
    assert running.stderr.read() == b""
    running.stderr.close()


def test_long_lines_are_wrapped_to_the_terminal(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    machine(lambda: failed("settings", "a word " * 40, "another word " * 40))
    cli.main(["doctor"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_terminal_gets_colours(capsys: pytest.CaptureFixture[str]) -> None:
    for outcome in Outcome:
        doctor.Report(coloured=True).show("this machine", Finding("a", outcome, "said"))
    assert capsys.readouterr().out.count("\033[0m") == len(Outcome)


@pytest.mark.parametrize("peer", ["10.0.0.1", "10.0.0.1:http", "ftp://10.0.0.1:1", "http://10.0.0.1:1/path", ":1"])
def test_a_peer_that_is_no_address_is_refused(peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--peer", peer])
    assert ended.value.code == 2
    assert "it should be like 10.0.0.1:30000" in capsys.readouterr().err
