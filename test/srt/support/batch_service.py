"""A real batch service for tests: its worker processes, calls over HTTP, and workbooks to send."""

from __future__ import annotations

import csv
import io
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openpyxl

from embedding_relay.tools.local_process import LocalProcess, free_ports, stop_all, wait_all_ready
from support.patience import wait_until

TESTS = Path(__file__).resolve().parents[1]
RELAY = (sys.executable, "-m", "embedding_relay")
SLOW_RELAY = (sys.executable, "-m", "support.slow_service")

# What is shown when a test fails.
_active: list[LocalProcess] = []


def active_log_tails() -> Iterator[tuple[str, str]]:
    for process in _active:
        yield f"log of {process.name}", process.log_tail()


class BatchService:
    def __init__(self, process: LocalProcess, workers: int, cache_dir: Path) -> None:
        self.process = process
        self.url = process.url
        self.cache_dir = cache_dir
        self._workers = workers

    def folder(self, session_id: str) -> Path:
        return self.cache_dir / "sessions" / session_id

    # ---- its processes

    def worker_pids(self) -> list[int]:
        """The processes that serve; their parent and its bookkeeper are not among them."""
        return [pid for pid in self.process.group_members() if b"spawn_main" in _command_line(pid)]

    def kill_worker(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def wait_for_all_workers(self) -> None:
        wait_until(lambda: len(self.worker_pids()) == self._workers, 60)

    # ---- calls; each on a connection of its own, so that any worker may get it

    def call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        # Plain HTTP: the certificates that a client loads by default would cost more than the call.
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=False) as client:
            return client.request(method, path, **arguments)

    def get(self, path: str) -> Any:
        answer = self.call("GET", path)
        assert answer.status_code == 200, f"GET {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        answer = self.call("POST", path, json=body)
        assert answer.status_code == 200, f"POST {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def upload(self, content: bytes, name: str = "prompts.csv", **fields: str) -> Any:
        answer = self.call("POST", "/api/analyze/upload", files={"file": (name, content)}, data=fields)
        assert answer.status_code == 200, f"upload: {answer.status_code} {answer.text}"
        return answer.json()

    # ---- a whole session, step by step

    def split(self, session_id: str, seconds: float = 60, **options: Any) -> Any:
        self.post("/api/tasks/split", {"session_id": session_id, **options})
        return self.wait_split(session_id, seconds)

    def wait_split(self, session_id: str, seconds: float = 60) -> Any:
        wait_until(lambda: self._split_over(session_id), seconds)
        return self.get(f"/api/tasks/split/status/{session_id}")

    def _split_over(self, session_id: str) -> bool:
        return self.get(f"/api/tasks/split/status/{session_id}")["status"] in ("completed", "failed")

    def start(self, session_id: str, **options: Any) -> Any:
        return self.post("/api/execute/start", {"session_id": session_id, **options})

    def wait_stage(self, session_id: str, *stages: str, seconds: float = 60) -> Any:
        wait_until(lambda: self.get(f"/api/sessions/{session_id}")["stage"] in stages, seconds)
        return self.get(f"/api/sessions/{session_id}")

    def wait_running(self, session_id: str, seconds: float = 60) -> None:
        wait_until(lambda: self.get(f"/api/execute/status/{session_id}")["ready_for_monitoring"], seconds)

    def run(self, content: bytes, name: str = "prompts.csv", seconds: float = 60, **options: Any) -> str:
        """Upload, split, start, and wait for the end."""
        session_id = str(self.upload(content, name)["session_id"])
        assert self.split(session_id)["ready_for_next_stage"]
        self.start(session_id, **options)
        self.wait_stage(session_id, "completed", seconds=seconds)
        return session_id

    def download(self, session_id: str) -> bytes:
        answer = self.call("GET", f"/api/download/{session_id}")
        assert answer.status_code == 200, answer.text
        return answer.content

    def answers(self, session_id: str) -> list[dict[str, str]]:
        """The rows of a downloaded .csv."""
        return list(csv.DictReader(io.StringIO(self.download(session_id).decode("utf-8-sig"))))


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def sheet_of(prompts: Iterable[str], column: str = "prompt") -> bytes:
    """A .csv with one column."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([column])
    writer.writerows([prompt] for prompt in prompts)
    return out.getvalue().encode()


def workbook_of(prompts: Iterable[str], column: str = "prompt") -> bytes:
    """A .xlsx with one column."""
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append([column])
    for prompt in prompts:
        sheet.append([prompt])
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


@contextmanager
def batch_service(
    where: Path,
    endpoint: str,
    *arguments: str,
    workers: int = 4,
    environ: Mapping[str, str] | None = None,
    saving_seconds: float = 0.0,
    name: str = "batch service",
    log: str = "service.log",
) -> Iterator[BatchService]:
    """`where` keeps its sessions and its log. Nothing of it is left running afterwards.

    With `saving_seconds` its disk is slow: every saving takes that much longer, in each worker.
    """
    (port,) = free_ports(1)
    environ = dict(environ or {})
    program: Sequence[str] = RELAY
    if saving_seconds:
        program = SLOW_RELAY
        environ |= {"TEST_SAVING_SECONDS": str(saving_seconds), "PYTHONPATH": str(TESTS)}
    command: Sequence[str] = [
        *(*program, "batch", "serve", "--endpoint", endpoint),
        *("--port", str(port), "--workers", str(workers), "--cache-dir", str(where / "cache"), *arguments),
    ]
    process = LocalProcess(name, command, f"http://127.0.0.1:{port}", where / log, environ)
    _active.append(process)
    try:
        process.start()
        try:
            wait_all_ready([process], 60)
            service = BatchService(process, workers, where / "cache")
            service.wait_for_all_workers()
            yield service
        finally:
            stop_all([process])
        assert process.group_members() == []
    finally:
        _active.remove(process)
