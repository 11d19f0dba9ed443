"""A server that speaks the protocol of S3 over HTTP: moto's, which simulates S3 and keeps all in memory.

The clients (s3fs, aiobotocore) are the real ones, and so are requests, signatures and answers. What it does not
reproduce: it checks no keys, is never slow or partly away, and is one process on this machine.
"""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from embedding_relay.tools.local_process import free_ports
from support.patience import wait_until

BUCKET = "sessions-of-tests"


@dataclass(frozen=True)
class S3:
    url: str

    @property
    def place(self) -> str:
        return f"s3://{BUCKET}/batch"

    @property
    def environ(self) -> dict[str, str]:
        """For whoever is to use it, as a user of another object store than Amazon's would set it."""
        keys = {"AWS_ACCESS_KEY_ID": "anybody", "AWS_SECRET_ACCESS_KEY": "anything", "AWS_DEFAULT_REGION": "us-east-1"}
        return {"AWS_ENDPOINT_URL": self.url} | keys

    def names(self) -> list[str]:
        with urllib.request.urlopen(f"{self.url}/{BUCKET}?list-type=2", timeout=10) as answer:
            nodes = list(ElementTree.fromstring(answer.read()).iter())
        return [node.text or "" for node in nodes if node.tag.endswith("Key")]


@contextmanager
def s3_server(where: Path) -> Iterator[S3]:
    (port,) = free_ports(1)
    s3 = S3(f"http://127.0.0.1:{port}")
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with (where / "s3.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: _made(s3), 30)
        yield s3
    finally:
        process.terminate()
        process.wait(20)


def _made(s3: S3) -> bool:
    """The bucket, once the server answers."""
    request = urllib.request.Request(f"{s3.url}/{BUCKET}", method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except urllib.error.HTTPError:
        raise
    except OSError:
        return False
