"""What SGLang knows of this process, kept and put back.

Its own snapshot holds the tables of parallel ranks by reference, and `override` writes into them: what a test overrode
while one was held would be there again when that is put back.
"""

from __future__ import annotations

from typing import Any

from sglang.srt import runtime_context

_PARALLEL = "__parallel__"


def kept() -> dict[str, Any]:
    return _with_own_tables(runtime_context.snapshot_context())


def put_back(state: dict[str, Any]) -> None:
    runtime_context.restore_context(_with_own_tables(state))


def _with_own_tables(state: dict[str, Any]) -> dict[str, Any]:
    tables = {name: dict(value) if isinstance(value, dict) else value for name, value in state[_PARALLEL].items()}
    return {**state, _PARALLEL: tables}
