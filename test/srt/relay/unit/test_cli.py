"""The `sglang-relay` command line."""

import argparse
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import embedding_relay
from embedding_relay.tools import cli, tiny_model


def test_tiny_model_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    monkeypatch.setattr(tiny_model, "make", lambda *arguments: calls.append(arguments))
    assert cli.main(["tiny-model", "some/where", "--family", "qwen3_vl", "--seed", "7"]) == 0
    assert cli.main(["tiny-model", "else/where"]) == 0
    assert calls == [(Path("some/where"), "qwen3_vl", 7), (Path("else/where"), "qwen2_5_vl", 0)]
    assert capsys.readouterr().out == "some/where\nelse/where\n"


@pytest.mark.parametrize("command", [["tiny-model", "out"], ["demo"]])
def test_the_families_offered_are_the_families_there_are(command: list[str]) -> None:
    parser = cli.build_parser()
    assert parser.parse_args(command).family in tiny_model.FAMILIES
    for family in tiny_model.FAMILIES:
        assert parser.parse_args([*command, "--family", family]).family == family


@pytest.mark.parametrize("arguments", [["--help"], ["tiny-model", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    assert "usage: sglang-relay" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["no-such-command"], ["tiny-model"], ["tiny-model", "out", "--family", "gpt"]]
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: sglang-relay" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"sglang-relay {embedding_relay.__version__}\n"


def commands(parser: argparse.ArgumentParser, *before: str) -> Iterator[tuple[str, ...]]:
    """Every command there is, as it is typed, with the commands below it."""
    yield before
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from commands(below, *before, name)


@pytest.mark.parametrize("option", ["--help", "--no-such-option"])
@pytest.mark.parametrize("command", list(commands(cli.build_parser())), ids=" ".join)
def test_help_and_wrong_options_are_answered_in_half_a_second(command: tuple[str, ...], option: str) -> None:
    """Of a processor's time, which does not depend on what else this machine does."""
    before = seconds_of_children()
    line = [sys.executable, "-m", "embedding_relay", *command, option]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert seconds_of_children() - before < 0.5
    assert ended.returncode == (0 if option == "--help" else 2), ended.stderr
    assert "usage: sglang-relay" in (ended.stdout or ended.stderr)


def seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_what_comes_with_sglang_is_named_when_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["tiny-model", str(tmp_path / "model")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "is missing: pip install 'sglang-embedding-relay[sglang]'" in said[0]
