"""A stand-in for Kubernetes' API that knows pods: whoever asks gets a list of them, and hears what changes.

It does not reproduce labels in queries (all pods are sent), rights, versions that are too old, or several namespaces.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Pod = dict[str, Any]
SECONDS_PER_WATCH = 30


class Cluster:
    """The pods of one namespace. Each change has a number, by which a watcher says what it has seen."""

    def __init__(self, namespace: str) -> None:
        self.path = f"/api/v1/namespaces/{namespace}/pods"
        self.asked: set[tuple[str, str]] = set()
        """Verb and path of each question, as a role must allow them."""
        self._pods: dict[str, Pod] = {}
        self._changes: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._is_over = False

    def put(self, name: str, template: Mapping[str, Any], address: str, *, is_ready: bool) -> None:
        """A pod as a deployment makes it, or what has become of it."""
        pod: Pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**template["metadata"], "name": name, "uid": name},
            "spec": {"containers": []},
            "status": {
                "phase": "Running",
                "podIP": address,
                "conditions": [{"type": "Ready", "status": str(is_ready)}],
            },
        }
        self._change("MODIFIED" if name in self._pods else "ADDED", pod)
        self._pods[name] = pod

    def delete(self, name: str) -> None:
        """First Kubernetes says when the pod is to have ended, then that it has."""
        pod = self._pods[name]
        ending = {**pod, "metadata": {**pod["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}
        self._change("MODIFIED", ending)
        self._change("DELETED", ending)
        del self._pods[name]

    def _change(self, kind: str, pod: Pod) -> None:
        with self._changed:
            metadata = {**pod["metadata"], "resourceVersion": str(len(self._changes) + 1)}
            self._changes.append({"type": kind, "object": {**pod, "metadata": metadata}})
            self._changed.notify_all()

    def pods(self) -> dict[str, Any]:
        with self._changed:
            version = {"resourceVersion": str(len(self._changes))}
            return {"apiVersion": "v1", "kind": "PodList", "metadata": version, "items": list(self._pods.values())}

    def changes_after(self, seen: int) -> list[dict[str, Any]]:
        """As soon as there are some; none when that takes long, or when this has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or len(self._changes) > seen, SECONDS_PER_WATCH)
            return [] if self._is_over else self._changes[seen:]

    def end(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


@contextmanager
def serving(cluster: Cluster, kubeconfig: Path) -> Iterator[None]:
    """Serve the cluster, and say in a file how it is reached."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            options = parse_qs(asked.query)
            is_watch = options.get("watch", ["false"])[0] in ("true", "1")
            cluster.asked.add(("watch" if is_watch else "list", asked.path))
            if asked.path != cluster.path:
                self.send_error(404)
            elif is_watch:
                self.stream(int(options.get("resourceVersion", ["0"])[0]))
            else:
                body = json.dumps(cluster.pods()).encode()
                self.start_answer("Content-Length", str(len(body)))
                self.wfile.write(body)

        def stream(self, seen: int) -> None:
            self.start_answer("Transfer-Encoding", "chunked")
            while changes := cluster.changes_after(seen):
                seen += len(changes)
                for change in changes:
                    line = json.dumps(change).encode() + b"\n"
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")

        def start_answer(self, name: str, value: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        here = {"server": f"http://127.0.0.1:{server.server_address[1]}"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "users": [{"name": "me", "user": {}}],
        }
        config["clusters"] = [{"name": "here", "cluster": here}]
        config["contexts"] = [{"name": "here", "context": {"cluster": "here", "user": "me"}}]
        kubeconfig.write_text(json.dumps(config))
        thread = threading.Thread(target=server.serve_forever, name="kubernetes")
        thread.start()
        try:
            yield
        finally:
            cluster.end()
            server.shutdown()
            thread.join()
