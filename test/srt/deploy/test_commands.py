"""Every command line and setting of deploy/, by the parsers of the programs that read them; and what they agree on."""

from __future__ import annotations

import re

import pytest

from embedding_relay import config
from embedding_relay.tools.local_cluster import ROUTER_ARGUMENTS
from support import deployment
from support.command_lines import Wrong, check_command, check_environment, check_router
from support.deployment import DEPLOY, INSTANCES, Part

PARTS = deployment.ours()
# Read by the command lines of the same file, and by nobody else.
IN_COMMAND_LINES = {"MODEL", "HOST", "ARGUMENTS", "INSTANCES", "POD_IP", "POD_NAMESPACE"}
EVERYWHERE = pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.file}-{part.name}")
# Each file, and the test that would notice a mistake in it.
LOOKED_AT = {
    "Dockerfile": "test_one_host.py",
    "Dockerfile.dockerignore": "test_one_host.py",
    "README.md": "unit/test_docs.py",
    "compose.yaml": "test_one_host.py",
    "grafana": "test_monitoring.py",
    "kubernetes": "test_kubernetes.py",
    "prometheus": "test_monitoring.py",
    "systemd": "test_systemd.py",
}


def test_no_file_is_left_out() -> None:
    assert {path.name for path in DEPLOY.iterdir() if path.name not in (".gitignore", "relay.secret")} == set(LOOKED_AT)
    found = {(folder_of(part), part.name) for part in PARTS}
    assert found == {(of, name) for of in ("compose.yaml", "kubernetes", "systemd") for name in (*INSTANCES, "router")}


@EVERYWHERE
def test_the_program_takes_the_command_line(part: Part) -> None:
    assert not re.search(r"[$%]", " ".join(part.words)), "a variable that nobody sets"
    arguments = check_command(part.words)
    if part.name == "router":
        assert arguments.pd_disaggregation
    else:
        assert (arguments.disaggregation_mode, arguments.enable_metrics) == (part.name, True)
        assert arguments.host != "0.0.0.0", "the address that it tells the others"


@EVERYWHERE
def test_somebody_reads_each_setting(part: Part) -> None:
    check_environment({name: value for name, value in part.environ.items() if name not in IN_COMMAND_LINES})


def test_a_wrong_flag_and_a_wrong_setting_are_noticed() -> None:
    part = next(part for part in PARTS if part.name == "encode")
    with pytest.raises(Wrong, match="--enable-metric"):
        check_command([word.replace("--enable-metrics", "--enable-metric") for word in part.words])
    with pytest.raises(Wrong, match="SGLANG_EMBEDDING_SECRET"):
        check_environment({"SGLANG_EMBEDDING_SECRET": "/run/secrets/relay.secret"})


@EVERYWHERE
def test_instances_have_the_secret_and_name_whom_they_ask(part: Part) -> None:
    needed = {config.SECRET_FILE, config.ALLOWED_HOSTS}
    assert (needed & set(part.environ)) == (set() if part.name == "router" else needed)


@pytest.mark.parametrize("part", [part for part in PARTS if part.name == "router"], ids=lambda part: part.file)
def test_the_router_can_tell_a_dead_instance_from_its_partner(part: Part) -> None:
    fields = ("disable_circuit_breaker", "health_check_interval_secs", "health_failure_threshold")
    fields += ("health_success_threshold", "health_check_timeout_secs")
    wanted, found = check_router(ROUTER_ARGUMENTS), check_command(part.words)
    assert {name: getattr(found, name) for name in fields} == {name: getattr(wanted, name) for name in fields}


@pytest.mark.parametrize("folder", ["compose.yaml", "systemd"])
def test_the_router_is_told_where_its_instances_listen(folder: str) -> None:
    parts = {part.name: part for part in PARTS if folder_of(part) == folder}
    router = check_command(parts["router"].words)
    bootstrap_port = int(parts["encode"].flag("--disaggregation-bootstrap-port") or 0)
    assert router.prefill_urls == [(url_of(parts["encode"]), bootstrap_port)]
    assert router.decode_urls == [url_of(parts["language"])]


@pytest.mark.parametrize("part", [part for part in PARTS if part.name != "router"], ids=lambda part: part.file)
def test_an_instance_may_ask_the_encode_instances_of_its_file(part: Part) -> None:
    settings = {config.ALLOWED_HOSTS: part.environ[config.ALLOWED_HOSTS]}
    (encode,) = (other for other in PARTS if other.name == "encode" and folder_of(other) == folder_of(part))
    assert config.RelayConfig.from_environment(settings).may_ask(str(encode.flag("--host")))


def folder_of(part: Part) -> str:
    return part.file.split("/")[0]


def url_of(part: Part) -> str:
    return f"http://{part.flag('--host')}:{part.flag('--port')}"
