"""An HTTP server of fixed pages, in a thread of the test. It reproduces nothing of a server but statuses and bodies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Pages:
    """`pages` may change while it serves: a path without its page is a 404."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, str]] = {}
        self.clock_error = 0.0
        """Seconds by which its Date is ahead."""
        self.asked: list[tuple[str, str]] = []
        """Each path that was asked for, and what came as `Authorization`."""
        self.url = ""
        self.on_post: Callable[[str], tuple[int, str]] = lambda body: (405, "only GET")
        """What answers a POST, whatever its path."""


@contextmanager
def serving(**pages: str) -> Iterator[Pages]:
    """Each page by its path without the slash, with status 200."""
    stub = Pages()
    stub.pages = {f"/{name}": (200, text) for name, text in pages.items()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stub.asked.append((self.path, self.headers.get("Authorization", "")))
            self.answer(*stub.pages.get(self.path, (404, "no such page")))

        def do_POST(self) -> None:
            self.answer(*stub.on_post(self.rfile.read(int(self.headers["Content-Length"])).decode()))

        def answer(self, status: int, text: str) -> None:
            body = text.encode()
            self.send_response_only(status)
            self.send_header("Date", formatdate(time.time() + stub.clock_error, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
