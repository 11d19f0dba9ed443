"""`sglang-relay batch`: what its options become, and how little is imported before there is something to do."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from embedding_relay.batch.command_line import settings_of
from embedding_relay.batch.settings import Settings
from embedding_relay.tools.cli import build_parser
from support.repo import SOURCE

RUN = ("batch", "run", "prompts.csv", "--out", "answers.csv")
SERVE = ("batch", "serve")
ENDPOINT = ("--endpoint", "http://127.0.0.1:8000/v1/")


def parsed(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(arguments)


# ---- options


@pytest.mark.parametrize("command", [RUN, SERVE])
def test_defaults_are_those_of_the_settings(command: tuple[str, ...], tmp_path: Path) -> None:
    cache = ("--cache-dir", str(tmp_path))
    settings = settings_of(parsed(*command, *ENDPOINT, *cache))
    assert settings == Settings(endpoint="http://127.0.0.1:8000", cache_dir=tmp_path)


def test_every_option_arrives(tmp_path: Path) -> None:
    options = {
        "--concurrency": "7",
        "--retries": "0",
        "--request-seconds": "2.5",
        "--cache-dir": str(tmp_path / "cache"),
        "--max-upload-mib": "3",
        "--max-expanded-mib": "4",
        "--max-rows": "5",
    }
    flags = ("--allow-private-urls", "--allowed-media-domains", "one.example", "two.example")
    given = [part for option in options.items() for part in option]
    settings = settings_of(parsed(*SERVE, *ENDPOINT, *given, *flags), port=1)
    assert settings == Settings(
        endpoint="http://127.0.0.1:8000",
        cache_dir=tmp_path / "cache",
        port=1,
        concurrency=7,
        retries=0,
        request_seconds=2.5,
        upload_mib=3,
        expanded_mib=4,
        rows=5,
        allow_private_urls=True,
        allowed_media_domains=("one.example", "two.example"),
    )


@pytest.mark.parametrize("wrong", [("--endpoint", "localhost:1"), (*ENDPOINT, "--allowed-media-domains", "a/b")])
def test_what_no_setting_can_be_is_refused(wrong: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=wrong[-1]):
        settings_of(parsed(*RUN, *wrong))


@pytest.mark.parametrize("wrong", [("--concurrency", "0"), ("--retries", "-1"), ("--port", "65536"), ("--port", "x")])
def test_a_number_out_of_range_is_refused(wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*SERVE, *ENDPOINT, *wrong)
    assert wrong[0] in capsys.readouterr().err


# ---- what is imported

# Runs the command with the rest of its arguments, and tells which modules it has imported.
LOADED = """
import json, sys
from embedding_relay.tools.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
NEVER = {"sglang", "torch", "transformers", "mooncake", "numpy", "zmq", "fastapi", "uvicorn", "starlette", "redis"}
NOT_FOR_HELP = {"asyncio", "msgspec", "aiohttp", "diskcache", "sqlite3", "openpyxl", "PIL", "tqdm"}
NOT_BEFORE_THE_WORKBOOK_NEEDS_IT = {"openpyxl", "PIL", "tqdm"}


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (("--help",), NOT_FOR_HELP),
        (("batch", "--help"), NOT_FOR_HELP),
        (("batch", "run", "--help"), NOT_FOR_HELP),
        (("batch", "serve", "--help"), NOT_FOR_HELP),
        ((*RUN, *ENDPOINT), NOT_BEFORE_THE_WORKBOOK_NEEDS_IT),
    ],
)
def test_what_a_command_does_not_import(arguments: tuple[str, ...], absent: set[str], tmp_path: Path) -> None:
    """Whoever asks for help, or names a workbook that does not exist, waits for none of these."""
    environ = {"PYTHONPATH": str(SOURCE), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", LOADED, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ)
    assert ended.returncode == 0, ended.stderr
    *_, loaded = ended.stdout.splitlines()
    assert set(json.loads(loaded)) & (NEVER | absent) == set()
