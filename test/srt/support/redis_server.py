"""A real Redis server on this machine, started and ended by the tests; it keeps nothing on disk."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from embedding_relay.tools.local_process import free_ports
from support.patience import wait_until


@contextmanager
def redis_server(where: Path) -> Iterator[str]:
    program = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    assert program, "Redis is not here: scripts/setup --tests installs it"
    (port,) = free_ports(1)
    # Debian's redis-tools has the server under another of its names, and unlike redis-server starts no daemon. The
    # program looks at the name that it is called by.
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with (where / "redis.log").open("wb") as log:
        process = subprocess.Popen([*command, "--dir", str(where)], executable=program, stdout=log, stderr=log)
    try:
        client = redis.Redis(port=port)
        wait_until(lambda: _answers(client))
        client.close()
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(20)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
