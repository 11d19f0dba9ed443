"""The `sglang-relay` command line."""

import sys
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


def test_what_comes_with_sglang_is_named_when_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["tiny-model", str(tmp_path / "model")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "is missing: pip install 'sglang-embedding-relay[sglang]'" in said[0]
