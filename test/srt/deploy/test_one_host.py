"""The image and the containers of one host: by Docker's schema, and whether what one file names is there in another.

This does not reproduce Docker: no image is built.
"""

from __future__ import annotations

import copy
import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema.validators import validator_for
from packaging.requirements import Requirement

from embedding_relay.config import DATA_PLANE, SECRET_FILE, SHARED_MEMORY, RelayConfig
from sglang.srt.disaggregation.multimodal import modes
from sglang.srt.disaggregation.multimodal.compatibility import TESTED_SGLANG
from support import deployment
from support.deployment import DEPLOY, INSTANCES
from support.repo import REPO
from support.served import paths_of_an_instance, paths_of_the_router

COMPOSE = deployment.compose()
SERVICES = COMPOSE["services"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


# ---- the image


def instructions() -> dict[str, list[str]]:
    """What follows each word, by word; lines that go on are one."""
    lines = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    found: dict[str, list[str]] = {}
    for word, rest in (line.split(None, 1) for line in lines if line):
        found.setdefault(word, []).append(" ".join(rest.split()))
    return found


def test_the_image_begins_with_a_tested_sglang() -> None:
    (base,) = instructions()["ARG"]
    assert instructions()["FROM"] == ["${SGLANG_IMAGE}"]
    assert base == f"SGLANG_IMAGE=lmsysorg/sglang:v{TESTED_SGLANG[-1]}"
    (other,) = re.findall(r"--build-arg SGLANG_IMAGE=lmsysorg/sglang:v(\S+)", DOCKERFILE)
    assert other in TESTED_SGLANG[:-1]


def test_everybody_means_the_same_image() -> None:
    (built,) = re.findall(r"docker build .* -t (\S+) \.", DOCKERFILE)
    assert {SERVICES[name]["image"] for name in (*INSTANCES, "router")} == {built}
    (image,) = deployment.kustomization()["images"]
    assert f"{image['name']}:{image['newTag']}" == built
    assert built.endswith(TESTED_SGLANG[-1])
    pushed = re.findall(r"registry\.example/\S+:\S+", (REPO / "docs/kubernetes.md").read_text())
    assert set(pushed) == {f"{image['newName']}:{image['newTag']}"}


def test_shells_can_read_what_the_image_runs() -> None:
    for script in instructions()["RUN"]:
        commands = re.sub(r"^(--\S+ )+", "", script)
        assert subprocess.run(["sh", "-n", "-c", commands], capture_output=True).returncode == 0, commands


def test_the_image_gets_the_libraries_that_set_up_installs() -> None:
    (needed,) = re.findall(r"^LIBRARIES=\(([^)]*)\)", (REPO / "scripts/setup").read_text(), re.MULTILINE)
    (install,) = (script for script in instructions()["RUN"] if "apt-get install" in script)
    assert {*needed.split(), "ffmpeg", "ibverbs-providers", "curl"} <= set(install.split())


def test_the_image_gets_extras_that_exist_and_one_engine() -> None:
    (install,) = (script for script in instructions()["RUN"] if "pip install" in script)
    (extras,) = re.findall(r'pip install "/src\[([^]]*)\]"', install)
    for cuda in ("12", "13"):
        assert set(extras.replace("${cuda}", cuda).split(",")) == {f"cuda{cuda}", "router"} <= set(EXTRAS)
    engines = {Requirement(each).name for extra in ("cpu", "cuda12", "cuda13") for each in EXTRAS[extra]}
    (removed,) = re.findall(r"pip uninstall -y ([\w -]+?) &&", install)
    assert set(removed.split()) == engines


def test_the_build_notices_a_missing_plugin() -> None:
    (looked_for,) = re.findall(r"launch_server --help \| grep '([^']*)'", DOCKERFILE)
    assert looked_for in modes.HELP


def test_the_builder_gets_what_packaging_needs_and_nothing_more() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    kept = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert patterns[0] == "*"
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    named = [*wheel["only-include"], *wheel["force-include"], PROJECT["tool"]["hatch"]["version"]["path"]]
    needed = {Path(name).parts[0] for name in named} | {"pyproject.toml", PROJECT["project"]["readme"], "LICENSE"}
    assert kept == needed
    assert all((REPO / name).exists() for name in kept)
    assert not any(fnmatch.fnmatch(".venv", name) for name in kept)


# ---- compose


def test_docker_knows_every_key() -> None:
    assert refused(COMPOSE) == []


def test_the_schema_notices_what_is_wrong() -> None:
    wrong = copy.deepcopy(COMPOSE)
    wrong["services"]["encode"]["stop_grace_time"] = wrong["services"]["encode"].pop("stop_grace_period")
    (said,) = refused(wrong)
    assert "stop_grace_time" in said


def refused(compose: dict[str, Any]) -> list[str]:
    schema = get_builtin_schema("vendor.compose-spec")
    return [error.message for error in validator_for(schema)(schema).iter_errors(compose)]


def test_rows_go_through_shared_memory_on_one_network() -> None:
    for name in INSTANCES:
        (part,) = (part for part in deployment.compose_parts() if part.name == name)
        assert SERVICES[name]["network_mode"] == "host"
        assert part.environ[DATA_PLANE] == SHARED_MEMORY
        assert part.flag("--host") == "127.0.0.1"
    listening = [SERVICES[name]["command"] for name in (*INSTANCES, "router")]
    (ports,) = (re.findall(r"(?:--port|--\S+-port) (\d+)", " ".join(listening)),)
    assert len(ports) == len(set(ports)) == 5


def test_the_secret_is_where_the_setting_says() -> None:
    for name in INSTANCES:
        (secret,) = SERVICES[name]["secrets"]
        assert SERVICES[name]["environment"][SECRET_FILE] == f"/run/secrets/{secret}"
        assert COMPOSE["secrets"][secret]["file"] == "./relay.secret"


def test_health_checks_ask_for_what_is_served() -> None:
    for part in deployment.compose_parts():
        if part.name not in (*INSTANCES, "router"):
            continue
        url = SERVICES[part.name]["healthcheck"]["test"][-1]
        path = url.removeprefix(f"http://127.0.0.1:{part.flag('--port')}")
        assert path in (paths_of_the_router() if part.name == "router" else paths_of_an_instance())


@pytest.mark.parametrize("name", INSTANCES)
def test_an_instance_has_the_time_to_finish_its_requests(name: str) -> None:
    assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > RelayConfig().waiting_timeout


def test_what_is_mounted_is_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith("./") else source in COMPOSE["volumes"]
