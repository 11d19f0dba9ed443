"""The halves on two hosts, as docs/two-hosts.md has them typed: hosts are network namespaces with one network.

Nothing is at 127.0.0.1 for anybody but a process itself, so whatever one half tells the other must name its host. What
this does not reproduce is two file systems: the page copies the secret, and here it is there already.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from embedding_relay.tools import local_cluster, tiny_model
from embedding_relay.tools.local_cluster import LocalCluster
from embedding_relay.tools.local_process import LocalProcess, free_ports
from support import deployment, kubernetes_api, pages, servers
from support.namespaces import Host, hosts
from support.pairs import SMALL
from support.patience import wait_until
from support.questions import TOLERANCE, Question, difference, squares, stories
from support.repo import REPO
from support.server_numbers import not_at_rest, numbers_of
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=45, suite="base-c-test-cpu")

GUIDE: Final = REPO / "docs/two-hosts.md"
SECRET, FIREWALL = ("2. A secret", "3. A firewall")
ENCODE, LANGUAGE = ("4. The encode instance", "5. The language instance")
ROUTER, ASK, CHECK = ("6. The router", "7. Ask", "8. Check")
TYPED: Final = (SECRET, FIREWALL, ENCODE, LANGUAGE, ROUTER, ASK, CHECK)
# Of commands that this machine does not run: it has one file system.
OVER_THE_NETWORK: Final = ("ssh ", "scp ")
# Which way rows take is left to the instances.
HOSTS = dataclasses.replace(SMALL, environ=(*SMALL.environ, ("SGLANG_EMBEDDING_DATA_PLANE", "auto")))
QUESTION = Question("two hosts", (squares(SMALL.family, 22, 22, 77), "what is this"))
ROUTER_PORT = 8000

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces, which need root, are the two hosts")


class Typed(NamedTuple):
    """A block of the page, with the addresses and files of this machine. Its first line says on which host."""

    host: str
    """An address, `both` or `anywhere`."""
    text: str

    def server(self) -> tuple[list[str], dict[str, str]]:
        """The words of the one command that does not end, and what was exported before it."""
        (command,) = (command for command in pages.commands(self.text) if command.words != ("export",))
        exported = [command.environ for command in pages.commands(self.text)]
        return list(command.words), {name: value for environ in exported for name, value in environ.items()}


def typed_blocks(replaced: Mapping[str, str]) -> dict[str, Typed]:
    """By section."""
    found, lines = {}, GUIDE.read_text().splitlines()
    for block in pages.blocks(GUIDE):
        if block.run_by:
            section = next(line for line in reversed(lines[: block.line]) if line.startswith("## "))
            text = re.sub("|".join(map(re.escape, replaced)), lambda name: replaced[name[0]], block.text)
            first, _, rest = text.partition("\n")
            found[section.removeprefix("## ")] = Typed(first.removeprefix("# ").removeprefix("on "), rest)
    return found


class Machines(NamedTuple):
    """Both hosts of the page, one that is neither, and the running servers."""

    by_address: dict[str, Host]
    stranger: Host
    typed: dict[str, Typed]
    folder: Path
    cluster: LocalCluster

    def type(self, section: str, **environ: str) -> str:
        """What the commands of a section print. Clients are on a host of their own."""
        host, text = self.typed[section]
        places = {"both": list(self.by_address.values()), "anywhere": [self.stranger]}
        here = "\n".join(line for line in text.splitlines() if not line.startswith(OVER_THE_NETWORK))
        command = ["bash", "-euo", "pipefail", "-c", here]
        return "".join(
            run(place, command, self.folder, **environ) for place in places.get(host) or [self.by_address[host]]
        )


def run(host: Host, command: Sequence[str], folder: Path, **environ: str) -> str:
    environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    ended = subprocess.run(
        host.command(command), cwd=folder, env=os.environ | environ, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def serve_on(host: Host, block: Typed, logs: Path, *arguments: str) -> LocalProcess:
    """The server of a section; its own flags come after those that a tiny model on a CPU needs, and win."""
    (program, action, *words), environ = block.server()
    assert (program, action) == ("sglang", "serve")
    name = words[words.index("--disaggregation-mode") + 1]
    port = int(words[words.index("--port") + 1])
    server = local_cluster.sglang_server(name, HOSTS.options(logs), port, *arguments, *words, environ=environ)
    server.command = tuple(host.command(server.command))
    server.url = f"http://{host.address}:{port}"
    return server


def route_on(host: Host, block: Typed, logs: Path) -> LocalProcess:
    (python, *words), environ = block.server()
    assert python == "python"
    quick = ("--worker-startup-check-interval", "1", "--shutdown-grace-period-secs", "3")
    command = host.command([sys.executable, *words, *quick])
    url = f"http://{host.address}:{ROUTER_PORT}"
    return HOSTS.options(logs).process("router", command, url, logs / "router.log", environ, ready_path="/readiness")


@pytest.fixture(scope="module")
def machines(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("typed")
    with hosts(3) as (one, other, stranger):
        replaced = {"10.0.0.1": one.address, "10.0.0.2": other.address, "/etc/sglang-relay": str(folder / "etc")}
        typed = typed_blocks(replaced | {"MODEL": str(tiny_model.cached(SMALL.family))})
        started = [
            serve_on(one, typed[ENCODE], logs / "hosts"),
            serve_on(other, typed[LANGUAGE], logs / "hosts", *SMALL.generating(logs)),
            route_on(other, typed[ROUTER], logs / "hosts"),
        ]
        cluster = LocalCluster(started[-1].url, [started])
        made = Machines({one.address: one, other.address: other}, stranger, typed, folder, cluster)
        made.type(SECRET)
        made.type(FIREWALL)
        for host in (one, other):
            # This process, at the first address of the network, watches the servers.
            watcher = host.address.rpartition(".")[0] + ".1"
            run(
                host,
                ["nft", "insert", "rule", "inet", "sglang_relay", "input", "ip", "saddr", watcher, "accept"],
                folder,
            )
        with servers.running(cluster):
            yield made
        servers.finish_stopping()  # while there is a network between them


def test_the_blocks_that_name_this_file_are_typed() -> None:
    assert tuple(typed_blocks({"MODEL": "MODEL"})) == TYPED


def test_a_long_picture_crosses_from_one_host_to_the_other(
    machines: Machines, undivided: dict[str, LocalProcess]
) -> None:
    cluster = machines.cluster
    answer = QUESTION.ask(cluster.url)
    assert answer.ok, answer.body
    assert difference(answer, QUESTION.ask(undivided[SMALL.family].url)) < TOLERANCE
    (story,) = stories(cluster["language"].log_text())
    assert story.rounds == SMALL.rounds(story.rows) > 2
    assert "go over Mooncake: it is on another host" in cluster["encode"].log_text()
    assert [not_at_rest(numbers_of(cluster[name])) for name in ("encode", "language")] == [[], []]


def test_the_question_of_the_page_is_answered(machines: Machines) -> None:
    squares(SMALL.family, 8, 8, 5).save(machines.folder / "picture.png")
    printed = machines.type(ASK)
    decoder = json.JSONDecoder()
    router, end = decoder.raw_decode(printed)
    answer, _ = decoder.raw_decode(printed, end)
    assert router["status"] == "ready"
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] > 64, "no rows of the picture"


def test_the_doctor_finds_nothing_wrong(machines: Machines, logs: Path) -> None:
    # The instances of the page have the settings of whoever types; these have a tiny pool.
    pool = {name: each for name, each in HOSTS.options(logs).environ.items() if name.startswith("SGLANG_EMBEDDING")}
    printed = machines.type(CHECK, **pool)
    assert all(address in printed for address in machines.by_address)


# ---- the firewall

CONNECT = """
import asyncio, sys
async def reaches(port):
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(sys.argv[1], port), 2)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
async def main(ports):
    print(*[port for port, is_open in zip(ports, await asyncio.gather(*map(reaches, ports))) if is_open])
asyncio.run(main([int(port) for port in sys.argv[2:]]))
"""


def test_the_firewall_lets_the_two_reach_each_other_and_everybody_the_router(machines: Machines) -> None:
    encode, language = machines.by_address.values()
    for host, peer in ((encode, language), (language, encode)):
        ports = open_ports(host, machines.folder)
        assert len(ports) >= 4, "HTTP, control, and two of Mooncake's"
        assert reached(peer, host, ports, machines.folder) == ports
        router = {ROUTER_PORT} if host is language else set()
        assert reached(machines.stranger, host, ports, machines.folder) == router


def open_ports(host: Host, folder: Path) -> set[int]:
    """What processes of this host listen at, for others too."""
    places = [line.split()[3] for line in run(host, ["ss", "-Hltn"], folder).splitlines()]
    return {int(place.rpartition(":")[2]) for place in places if not place.startswith(("127.", "[::1]"))}


def reached(by: Host, host: Host, ports: set[int], folder: Path) -> set[int]:
    command = [sys.executable, "-c", CONNECT, host.address, *map(str, sorted(ports))]
    return set(map(int, run(by, command, folder).split()))


# ---- the router of deploy/kubernetes, before the same instances


def test_the_router_of_kubernetes_uses_pods_by_their_labels(machines: Machines, logs: Path, tmp_path: Path) -> None:
    (part,) = (part for part in deployment.kubernetes_parts() if part.name == "router")
    templates = {name: one["spec"]["template"] for name, one in deployment.deployments().items()}
    addresses = dict(zip(deployment.INSTANCES, machines.by_address, strict=True))
    pods = kubernetes_api.Cluster(part.environ["POD_NAMESPACE"])
    for name, address in addresses.items():
        pods.put(name, templates[name], address, is_ready=name == "encode")
    router = kubernetes_router(part, logs, tmp_path / "kubeconfig")
    with kubernetes_api.serving(pods, tmp_path / "kubeconfig"), servers.running(LocalCluster(router.url, [[router]])):
        # Alive without a pair, and not ready: the language pod is not.
        wait_until(lambda: kinds_of_instances(router) == ["prefill"])
        router.ready_path = "/readiness"
        assert not router.healthy()
        pods.put("language", templates["language"], addresses["language"], is_ready=True)
        wait_until(router.healthy)
        assert QUESTION.ask(router.url).ok
        pods.delete("encode")
        wait_until(lambda: not router.healthy())
    (role,) = deployment.objects()["Role"]
    assert pods.asked == {(verb, pods.path) for verb in role["rules"][0]["verbs"]}


def kubernetes_router(part: deployment.Part, logs: Path, kubeconfig: Path) -> LocalProcess:
    """With its own flags; only the ports are others, because this machine may use those."""
    port, metrics_port = free_ports(2)
    mine = {f"--port={ROUTER_PORT}": f"--port={port}", "--prometheus-port=29000": f"--prometheus-port={metrics_port}"}
    assert set(mine) < set(part.words)
    quick = ("--worker-startup-check-interval", "1", "--shutdown-grace-period-secs", "3")
    command = [sys.executable, *(mine.get(word, word) for word in part.words[1:]), *quick]
    log = logs / "hosts" / "kubernetes-router.log"
    environ = {"KUBECONFIG": str(kubeconfig)}
    return HOSTS.options(logs).process("router", command, f"http://127.0.0.1:{port}", log, environ, "/liveness")


def kinds_of_instances(router: LocalProcess) -> list[str]:
    with urllib.request.urlopen(f"{router.url}/workers", timeout=10) as reply:
        return sorted(worker["worker_type"] for worker in json.load(reply)["workers"])


if __name__ == "__main__":
    run_tests(__file__)
