"""Finds out whether processes of other machines are gone, in threads of its own: the control thread never waits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from embedding_relay.memory.quiet import is_refused
from embedding_relay.protocol.effects import ProveGone

logger = logging.getLogger(__name__)

_THREADS: Final = 4


class Prover:
    """How many questions wait is bounded by the protocol core, which asks them."""

    def __init__(self, answer: Callable[[ProveGone, bool], None]) -> None:
        self._answer = answer
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="relay-proof")

    def ask(self, question: ProveGone) -> None:
        self._pool.submit(self._find_out, question)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _find_out(self, question: ProveGone) -> None:
        is_gone = False
        try:
            is_gone = is_refused(question.address)
        except BaseException:  # whatever it was: who waits for this answer must get one
            logger.exception("no proof about %s", question.address)
        self._answer(question, is_gone)
