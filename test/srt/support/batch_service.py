"""A real batch service for tests: its worker processes, calls over HTTP, and workbooks to send."""

from __future__ import annotations

import csv
import http.client
import io
import json
import os
import signal
import ssl
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openpyxl

from embedding_relay.tools.local_process import LocalProcess, free_ports, stop_all, wait_all_ready
from support.patience import wait_until

TESTS = Path(__file__).resolve().parents[1]
RELAY = (sys.executable, "-m", "embedding_relay")
SLOW_RELAY = (sys.executable, "-m", "support.slow_service")
# What a call raises whose worker was killed before it had answered.
BROKEN = (OSError, http.client.HTTPException)
# Plain HTTP needs none, and to make one, as a client does by default, would cost more than the call.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

# What is shown when a test fails.
_active: list[LocalProcess] = []


def active_log_tails() -> Iterator[tuple[str, str]]:
    for process in _active:
        yield f"log of {process.name}", process.log_tail()


class BatchService:
    def __init__(self, process: LocalProcess, workers: int, cache_dir: Path, saving_file: Path) -> None:
        self.process = process
        self.url = process.url
        self.cache_dir = cache_dir
        self._address = str(urlsplit(process.url).netloc)
        self._workers = workers
        self._saving_file = saving_file

    def folder(self, session_id: str) -> Path:
        return self.cache_dir / "sessions" / session_id

    @contextmanager
    def saving(self, seconds: float) -> Iterator[None]:
        """Every saving takes so long, or until this ends. The service was started with `saving_seconds`."""
        before = self._saving_file.read_text()
        say_seconds(self._saving_file, seconds)
        try:
            yield
        finally:
            say_seconds(self._saving_file, float(before))

    # ---- its processes

    def worker_pids(self) -> list[int]:
        """The processes that serve: forks of one that has imported all they need, which is no worker itself."""
        return [pid for pid in self.process.group_members() if b"forkserver" in _command_line(_parent_of(pid))]

    def kill_worker(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def wait_for_all_workers(self) -> None:
        wait_until(lambda: len(self.worker_pids()) == self._workers, 60)

    # ---- calls; each on a connection of its own, so that any worker may get it

    def call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=NO_TLS) as client:
            return client.request(method, path, **arguments)

    def get(self, path: str) -> Any:
        return self._json("GET", path)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._json("POST", path, json.dumps(body))

    def _json(self, method: str, path: str, body: str | None = None) -> Any:
        """As `call`, by a client that takes a fifth of its time: tests ask thousands of times."""
        connection = http.client.HTTPConnection(self._address, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        assert answer.status == 200, f"{method} {path}: {answer.status} {text.decode()}"
        return json.loads(text)

    def patiently(self, path: str) -> Any:
        """From whichever worker lives: a killed one takes its connections along, and answers nothing else."""
        while True:
            try:
                return self.get(path)
            except BROKEN:
                continue

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


def say_seconds(file: Path, seconds: float) -> None:
    """In one step, so that nobody reads half of it."""
    partial = file.with_suffix(".part")
    partial.write_text(str(seconds))
    partial.replace(file)


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


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
    saving_seconds: float | None = None,
    name: str = "batch service",
    log: str = "service.log",
) -> Iterator[BatchService]:
    """`where` keeps its sessions and its log. Nothing of it is left running afterwards.

    With `saving_seconds` its disk can be slow: every saving takes that much longer, in each worker, or as long as
    `saving` says.
    """
    (port,) = free_ports(1)
    environ = dict(environ or {})
    program: Sequence[str] = RELAY
    saving_file = where / "saving"
    if saving_seconds is not None:
        program = SLOW_RELAY
        say_seconds(saving_file, saving_seconds)
        environ |= {"TEST_SAVING_FILE": str(saving_file), "PYTHONPATH": str(TESTS)}
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
            service = BatchService(process, workers, where / "cache", saving_file)
            service.wait_for_all_workers()
            yield service
        finally:
            stop_all([process])
        assert process.group_members() == []
    finally:
        _active.remove(process)
