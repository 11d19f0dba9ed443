"""Network namespaces that are hosts to each other: each with an address and a loopback interface of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

_networks = itertools.count(1)


class Host(NamedTuple):
    namespace: str
    address: str

    def command(self, command: Sequence[str]) -> list[str]:
        """As it is run on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many of them, on one network with this process, which is at its first address. Needs root."""
    # Names and networks of this process's own: two test runs may share a machine. The benchmark network, RFC 2544.
    name, network = f"relay{os.getpid() % 10**6}", f"198.18.{os.getpid() % 250}"
    bridge = f"{name}b{next(_networks)}"
    with ExitStack() as undo:
        _ip("link", "add", bridge, "type", "bridge")
        undo.callback(_ip, "link", "del", bridge)
        _ip("address", "add", f"{network}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        found = []
        for index in range(count):
            host = Host(f"{bridge}h{index}", f"{network}.{2 + index}")
            _ip("netns", "add", host.namespace)
            undo.callback(_ip, "netns", "del", host.namespace)  # and with it both ends of its link
            _ip("link", "add", f"{bridge}v{index}", "type", "veth", "peer", "eth0", "netns", host.namespace)
            _ip("link", "set", f"{bridge}v{index}", "master", bridge, "up")
            inside = ("-netns", host.namespace)
            _ip(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip(*inside, "link", "set", device, "up")
            # SGLang learns its own address from the way to the rest of the world.
            _ip(*inside, "route", "add", "default", "via", f"{network}.1")
            found.append(host)
        yield found


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
