"""The checks of command lines in pages and deployment files: they take what the programs take, and nothing else."""

from __future__ import annotations

import shlex

import pytest

from support.command_lines import Wrong, check_command, check_environment

SERVE = "sglang serve --model-path MODEL --host 10.0.0.1 --port 30000 "
ROUTER = "python -m sglang_router.launch_router --pd-disaggregation --decode http://10.0.0.2:30000 "


@pytest.mark.parametrize(
    "command",
    [
        f"{SERVE} --disaggregation-mode encode --disaggregation-bootstrap-port 8998",
        f"{SERVE} --disaggregation-mode language --encoder-urls http://10.0.0.1:30000",
        "sglang serve MODEL --tp-size 2",
        "python -m sglang.launch_server --model-path MODEL --disaggregation-mode encode",
        f"{ROUTER} --prefill http://10.0.0.1:30000 8998 --policy round_robin",
        "sglang-relay demo --keep",
        "sglang-relay --help",
    ],
)
def test_what_the_programs_take(command: str) -> None:
    check_command(shlex.split(command))


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (f"{SERVE} --disaggregation-mode encoder", "encoder"),
        (f"{SERVE} --disaggregation-bootstrap-prt 8998", "--disaggregation-bootstrap-prt"),
        (f"{SERVE} --disaggregation-bootstrap-po 8998", "--disaggregation-bootstrap-po"),  # an abbreviation
        ("sglang serve --port 30000", "--model-path"),
        (f"{ROUTER} --prefill http://10.0.0.1:30000 bootstrap", "bootstrap"),
        (f"{ROUTER} --policy any", "any"),
        ("sglang-relay demo --kept", "--kept"),
        ("sglang-relay bath", "bath"),
        ("sglang-router --decode x", "sglang-router"),
    ],
)
def test_what_they_refuse(command: str, named: str) -> None:
    with pytest.raises(Wrong, match=named):
        check_command(shlex.split(command))


def test_settings_that_somebody_reads() -> None:
    check_environment(
        {
            "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "16",
            "SGLANG_EMBEDDING_SECRET_FILE": "/run/secrets/relay",
            "SGLANG_PLATFORM": "relay_cpu",
            "SGLANG_HOST_IP": "10.0.0.1",
            "SESSION_API_KEY": "a",
            "MC_TCP_BIND_ADDRESS": "10.0.0.1",
            "HF_HUB_OFFLINE": "1",
        }
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SGLANG_EMBEDDING_CACHE_BUFFER_SIZE", "many"),
        ("SGLANG_EMBEDDING_CACHE_BUFER_SIZE", "16"),
        ("SGLANG_PLATFORMS", "relay_cpu"),
        ("SESSION_KEY", "a"),
        ("MC_FORCE_TPC", "1"),
        ("VLLM_USE_V1", "1"),
    ],
)
def test_settings_that_nobody_reads_or_takes(name: str, value: str) -> None:
    with pytest.raises(Wrong, match=name):
        check_environment({name: value})
