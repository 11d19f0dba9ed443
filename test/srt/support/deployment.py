"""What the files of deploy/ start: each process with its command line and its environment, as its program gets them."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from support.repo import REPO

DEPLOY: Final = REPO / "deploy"
KUBERNETES: Final = DEPLOY / "kubernetes"
INSTANCES: Final = ("encode", "language")
# What Kubernetes knows when a pod starts.
OF_A_POD: Final = {"status.podIP": "10.1.2.3", "metadata.namespace": "embedding-relay"}


class Part(NamedTuple):
    """One process. `name` says what it is: encode, language, router, or something that is not ours."""

    file: str
    name: str
    words: list[str]
    environ: dict[str, str]

    def flag(self, name: str) -> str | None:
        """The value of an option, however it is written."""
        for at, word in enumerate(self.words):
            if word == name:
                return self.words[at + 1]
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
        return None


def ours() -> list[Part]:
    """Every instance and every router that a file of deploy/ starts."""
    parts = [*compose_parts(), *kubernetes_parts(), *unit_parts()]
    return [part for part in parts if part.name in (*INSTANCES, "router")]


# ---- compose


@functools.cache
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


def compose_parts() -> Iterator[Part]:
    for name, service in compose()["services"].items():
        command = re.sub(r"\$\{(\w+):\?[^}]*\}", r"\1", service.get("command", ""))
        environ = {key: "" if value is None else str(value) for key, value in service.get("environment", {}).items()}
        yield Part("compose.yaml", name, shlex.split(command), environ)


# ---- Kubernetes


@functools.cache
def documents(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / file).read_text()))


def kustomization() -> dict[str, Any]:
    (loaded,) = documents("kustomization.yaml")
    return loaded


@functools.cache
def objects() -> dict[str, list[dict[str, Any]]]:
    """By kind: all that is applied, the autoscaler included."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(KUBERNETES.glob("*.yaml")):
        for document in documents(file.name):
            found.setdefault(document["kind"], []).append(document | {"file": file.name})
    return found


def deployments() -> dict[str, dict[str, Any]]:
    return {deployment["metadata"]["name"]: deployment for deployment in objects()["Deployment"]}


def container(deployment: Mapping[str, Any]) -> dict[str, Any]:
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(only)


def settings() -> dict[str, str]:
    """Of the generated ConfigMap."""
    (generated,) = kustomization()["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generated["literals"])


def kubernetes_parts() -> Iterator[Part]:
    for name, deployment in deployments().items():
        started = container(deployment)
        environ = settings() if started.get("envFrom") else {}
        for variable in started.get("env", []):
            field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            environ[variable["name"]] = OF_A_POD[field] if field else variable["value"]
        words = [expanded(word, environ) for word in (*started["command"], *started["args"])]
        yield Part(f"kubernetes/{deployment['file']}", name, words, environ)


def expanded(word: str, environ: Mapping[str, str]) -> str:
    """As Kubernetes does it; a name that is not there stays what it is, and so ends up in a wrong argument."""
    return re.sub(r"\$\((\w+)\)", lambda found: environ.get(found[1], found[0]), word)


# ---- systemd


def unit_parts() -> Iterator[Part]:
    for name in (*INSTANCES, "router"):
        unit = DEPLOY / "systemd" / ("sglang-relay-router.service" if name == "router" else "sglang-relay@.service")
        lines = [line.replace("%i", name) for line in unit.read_text().splitlines()]
        environ = env_file(f"{name}.env")
        environ |= dict(value.split("=", 1) for value in _values(lines, "Environment"))
        (command,) = _values(lines, "ExecStart")
        program, *words = [piece for word in command.split() for piece in _as_systemd_does(word, environ)]
        yield Part(f"systemd/{unit.name}", name, [Path(program).name, *words], environ)


def env_file(name: str) -> dict[str, str]:
    lines = (DEPLOY / "systemd" / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _values(lines: list[str], key: str) -> list[str]:
    return [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")]


def _as_systemd_does(word: str, environ: Mapping[str, str]) -> list[str]:
    """`${NAME}` becomes one word, `$NAME` as many as it has."""
    if found := re.fullmatch(r"\$(\w+)", word):
        return environ[found[1]].split()
    return [re.sub(r"\$\{(\w+)\}", lambda found: environ[found[1]], word)]
