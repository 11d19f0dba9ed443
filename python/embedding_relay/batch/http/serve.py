"""`sglang-relay batch serve`: one socket, several worker processes, and a parent that replaces those that end."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading

import uvicorn
import uvicorn._subprocess
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from embedding_relay.batch.asking.endpoint import Endpoint
from embedding_relay.batch.errors import in_words
from embedding_relay.batch.http.app import create_app, is_loopback
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.contract import StoreAway
from embedding_relay.batch.store.opening import open_mirror, open_store

logger = logging.getLogger(__name__)

# Time for calls under way when the service is stopped; a live stream would go on for hours.
GRACE_SECONDS = 5
# A worker that does not answer its parent for so long is replaced.
HANGING_SECONDS = 30


def run(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C. Runs under way go on when the service is started again."""
    _log_to_stderr()
    try:
        Endpoint(settings.endpoint, api_key=settings.endpoint_api_key)  # raises for a URL or a key that cannot be used
        settings.sessions_dir.mkdir(parents=True, exist_ok=True)
        store = open_store(settings.store_place)
        store.keys("session:")
        store.close()
        open_mirror(settings.files)
        listener = _listen(settings.host, settings.port)
    except (OSError, StoreAway, ValueError) as error:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        print(f"sglang-relay batch serve: {where}{in_words(error)}", file=sys.stderr)
        return 1
    config = uvicorn.Config(
        functools.partial(_worker_app, settings),
        factory=True,
        workers=settings.workers,
        log_level="warning",
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_worker_healthcheck=HANGING_SECONDS,
        server_header=False,
    )
    if not is_loopback(settings.host) and not settings.api_key:
        logger.warning(
            "batch: this service listens on %s without an API key: everybody who reaches it can read every workbook "
            "and spend the endpoint's time. Set SESSION_API_KEY, or listen on 127.0.0.1.",
            settings.host,
        )
    host, port = listener.getsockname()[:2]
    logger.info("batch: %d workers at http://%s:%d, asking %s", settings.workers, host, port, settings.endpoint)
    with listener:
        _fork_workers()
        supervisor = Multiprocess(config, sockets=[listener])
        supervisor.run()
    return int(any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes))


def _listen(host: str, port: int) -> socket.socket:
    """Bound before any worker starts, so that a port in use is one error and not a crash of each worker."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error


def _fork_workers() -> None:
    """Workers are forks of one process that has imported all they need: one that was killed is replaced at once.

    uvicorn would have each of them import everything anew. It has no option for that; where it does not look at this
    name any more, workers start as it likes them to, and later.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__])
    uvicorn._subprocess.spawn = forks  # type: ignore[assignment]


def _worker_app(settings: Settings) -> FastAPI:
    """Called once in each worker process."""
    _log_to_stderr()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with_parent, args=(parent,), name="parent watch", daemon=True).start()
    return create_app(settings)


def _end_with_parent(parent: multiprocessing.process.BaseProcess) -> None:
    """A worker whose parent was killed would serve on, and nobody would replace it when it ends."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s] %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S", force=True
    )
    # A line per call is of no use while pages poll, and where keys were found is the business of their library.
    for name in ("uvicorn.access", "botocore", "aiobotocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
