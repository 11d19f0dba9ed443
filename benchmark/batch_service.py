"""A large workbook through the whole batch service: how long each stage takes, and what its workers need for it.

    .venv/bin/python benchmark/batch_service.py [--rows 100000] [--workers 4] [--concurrency 64]

The real service with its worker processes, and an endpoint of its own process that answers at once, so that what is
left is the service's own share. Memory is the most that each worker held of its own (RssAnon), sampled while it worked.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "test/srt"))
import openpyxl  # noqa: E402

from support.batch_service import BatchService, batch_service  # noqa: E402
from support.stub_endpoint import stub_endpoint  # noqa: E402

MIB = 2**20
LOOK_EVERY = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=64)
    arguments = parser.parse_args()
    content = workbook(arguments.rows)
    print(f"{arguments.rows:,} rows, {len(content) / MIB:.1f} MiB of .xlsx, {arguments.workers} workers")
    with tempfile.TemporaryDirectory(prefix="relay-batch-") as name:
        where = Path(name)
        options = ("--concurrency", str(arguments.concurrency))
        with (
            stub_endpoint(where) as stub,
            batch_service(where, stub.url, *options, workers=arguments.workers) as service,
            watched(service) as memory,
        ):
            through(service, content, arguments.rows)
    print(f"{'memory of each worker':<34} {', '.join(f'{peak / MIB:.0f}' for peak in sorted(memory.values()))} MiB")
    return 0


def workbook(rows: int) -> bytes:
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(["id", "prompt", "language", "note"])
    for row in range(rows):
        sheet.append([row, f"Translate sentence {row}: the quick brown fox {uuid.UUID(int=row)}", "French", "a note"])
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def through(service: BatchService, content: bytes, rows: int) -> None:
    with step("upload and analysis"):
        session_id = upload(service.url, content)
    with step("split, saved and read back"):
        service.split(session_id, 600)
    started = time.monotonic()
    with step("answers, until they can be saved"):
        service.start(session_id)
        wait(lambda: view(service, session_id)["execution"]["saving"])
    print(f"{'':<34} {rows / (time.monotonic() - started):,.0f} rows per second")
    with step("saved and read back"):
        wait(lambda: view(service, session_id)["execution"]["ready_for_download"])
    execution = view(service, session_id)["execution"]
    if (execution["done"], execution["failed"]) != (rows, 0):
        raise SystemExit(f"FAILED {execution}")
    with step("download"):
        size = len(service.download(session_id))
    print(f"{'':<34} {size / MIB:.1f} MiB")


def view(service: BatchService, session_id: str) -> Any:
    session = service.get(f"/api/sessions/{session_id}")
    if session["stage"] == "failed":
        raise SystemExit(f"FAILED {session['split']['error']} {session['execution']['error']}")
    if session["execution"]["ready_for_download"]:
        session["execution"]["saving"] = True
    return session


def wait(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(LOOK_EVERY)


def upload(url: str, content: bytes) -> str:
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="large.xlsx"\r\n\r\n'.encode()
    body = head + content + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{url}/api/analyze/upload", body, headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return str(json.loads(answer.read())["session_id"])


@contextmanager
def step(name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    print(f"{name:<34} {time.monotonic() - started:.1f} s", flush=True)


@contextmanager
def watched(service: BatchService) -> Iterator[dict[int, int]]:
    """The peaks, by process, complete when the block has ended."""
    peaks: dict[int, int] = dict.fromkeys(service.worker_pids(), 0)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_EVERY):
            for pid in peaks:
                status = Path(f"/proc/{pid}/status").read_text()
                held = int(status.partition("RssAnon:")[2].split()[0]) * 1024
                peaks[pid] = max(peaks[pid], held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        ended.set()
        watcher.join()


if __name__ == "__main__":
    sys.exit(main())
