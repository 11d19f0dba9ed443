"""The halves on two hosts, the router and its clients on a third: hosts are network namespaces with one network.

Nothing is at 127.0.0.1 for anybody but a process itself, so whatever one half tells the other must name its host.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_relay.tools import local_cluster
from embedding_relay.tools.local_cluster import LocalCluster
from embedding_relay.tools.local_process import LocalProcess, free_ports
from support import servers
from support.namespaces import Host, hosts
from support.pairs import SMALL
from support.questions import TOLERANCE, Question, difference, squares, stories
from support.server_numbers import not_at_rest, numbers_of
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=30, suite="base-c-test-cpu")

# Which way rows take is left to the instances.
HOSTS = dataclasses.replace(SMALL, environ=(*SMALL.environ, ("SGLANG_EMBEDDING_DATA_PLANE", "auto")))

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces, which need root, are the two hosts")


def serve_on(host: Host, name: str, logs: Path, *arguments: str) -> LocalProcess:
    (port,) = free_ports(1)
    server = local_cluster.sglang_server(name, HOSTS.options(logs / "hosts"), port, *arguments, "--host", host.address)
    server.command = tuple(host.command(server.command))
    server.url = f"http://{host.address}:{port}"
    return server


@pytest.fixture(scope="module")
def cluster(logs: Path) -> Iterator[LocalCluster]:
    bootstrap_port, router_port = free_ports(2)
    with hosts(2) as (one, other):
        mode = ("--disaggregation-mode", "encode", "--disaggregation-bootstrap-port", str(bootstrap_port))
        encode = serve_on(one, "encode", logs, *mode)
        language = serve_on(other, "language", logs, "--disaggregation-mode", "language", *SMALL.generating(logs))
        options = HOSTS.options(logs / "hosts")
        router = local_cluster.router(options, router_port, [(encode.url, bootstrap_port)], [language.url])
        with servers.running(LocalCluster(router.url, [[encode, language], [router]])) as cluster:
            yield cluster
        servers.finish_stopping()  # while there is a network between them


def test_a_long_picture_crosses_from_one_host_to_the_other(
    cluster: LocalCluster, undivided: dict[str, LocalProcess]
) -> None:
    question = Question("two hosts", (squares(SMALL.family, 22, 22, 77), "what is this"))
    answer = question.ask(cluster.url)
    assert answer.ok, answer.body
    assert difference(answer, question.ask(undivided[SMALL.family].url)) < TOLERANCE
    (story,) = stories(cluster["language"].log_text())
    assert story.rounds == SMALL.rounds(story.rows) > 2
    assert "go over Mooncake: it is on another host" in cluster["encode"].log_text()
    assert [not_at_rest(numbers_of(cluster[name])) for name in ("encode", "language")] == [[], []]


if __name__ == "__main__":
    run_tests(__file__)
