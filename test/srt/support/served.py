"""The paths that programs answer at, as the programs themselves name them."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path


@functools.cache
def paths_of_an_instance() -> frozenset[str]:
    """SGLang's own, and that of the metrics, which it adds when it starts with them."""
    from sglang.srt.entrypoints.http_server import app

    return frozenset({route.path for route in app.routes if hasattr(route, "path")} | {"/metrics"})


@functools.cache
def paths_of_the_router() -> frozenset[str]:
    """Of those that are asked for here, the ones that its library has as a text."""
    found = importlib.util.find_spec("sglang_router.sglang_router_rs")
    assert found is not None
    assert found.origin is not None
    library = Path(found.origin).read_bytes()
    return frozenset(path for path in ("/health", "/liveness", "/readiness") if path.encode() in library)
