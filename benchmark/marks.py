"""A plugin of SGLang that `waterfall.py` gives to its servers: it notes when what happens to a request happens.

For one request at a time: what is noted between its beginning and its first token belongs to it.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any, Final

VARIABLE: Final = "RELAY_BENCHMARK_MARKS"
"""The environment variable that names the file of a server's marks; without it nothing is noted."""

_TOKENIZER: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_SCHEDULER: Final = "sglang.srt.managers.scheduler.Scheduler"
_HALVES: Final = "sglang.srt.disaggregation.multimodal"
_TRANSPORT: Final = "embedding_relay.transport"

# What is called, whether its begin or its end counts, and what that means.
POINTS: Final = (
    (f"{_TOKENIZER}.generate_request", False, "HTTP: request read"),
    (f"{_TOKENIZER}._mark_state_dispatched", True, "HTTP: tokenized, sent to the scheduler"),
    (f"{_SCHEDULER}.handle_generate_request", False, "scheduler: has the request"),
    (f"{_HALVES}.multimodal_embedding.MultimodalEmbeddingBootstrapQueue.add", True, "scheduler: parked"),
    (f"{_TRANSPORT}.encode.EncodeManager._expect", False, "control: room expected"),
    (f"{_HALVES}.tower.VisionTower.encode", False, "scheduler: tower begins"),
    (f"{_HALVES}.tower.VisionTower.encode", True, "scheduler: tower ends"),
    (f"{_TRANSPORT}.encode.EncodeManager._submit", False, "control: has the rows"),
    (f"{_TRANSPORT}.workers.ChunkJob.write", False, "transfer: stages and writes"),
    (f"{_TRANSPORT}.workers.ChunkJob.write", True, "transfer: written"),
    (f"{_TRANSPORT}.encode.EncodeManager._transferred", True, "control: reported"),
    (f"{_HALVES}.multimodal_language.MultimodalLanguagePreallocQueue.add", True, "scheduler: parked"),
    (f"{_TRANSPORT}.language.LanguageManager._request", True, "control: blocks offered"),
    (f"{_TRANSPORT}.language.LanguageManager._copy_out", False, "control: report read, rows copied"),
    (f"{_TRANSPORT}.language.LanguageManager._deliver", True, "control: rows there"),
    (f"{_HALVES}.multimodal_language.LanguageRole._give_to_sglang", False, "scheduler: handed over"),
    (f"{_SCHEDULER}.run_batch", False, "scheduler: forward pass begins"),
    (f"{_SCHEDULER}.run_batch", True, "scheduler: forward pass ends"),
    (f"{_TOKENIZER}._handle_batch_output", False, "HTTP: has the token"),
)


def install() -> None:
    """Called by SGLang in each process of a server."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for target, at_end, name in POINTS:
        hook = functools.partial(_note, file, name)
        functools.update_wrapper(hook, _note)
        HookRegistry.register(target, hook, HookType.AFTER if at_end else HookType.BEFORE)


def _note(file: int, name: str, *_: Any, **__: Any) -> None:
    os.write(file, f"{time.monotonic_ns()} {name}\n".encode())
