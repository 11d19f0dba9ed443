"""A thread that does not end unnoticed: whatever ends it before its work is done is logged and reported."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class WatchedThread(threading.Thread):
    """A daemon thread. `report` is called in it with one line that says what ended it, unless `work` has returned."""

    def __init__(self, name: str, work: Callable[[], None], report: Callable[[str], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._report = report

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # SystemExit too, which threading ignores in silence
            logger.exception("%s died", self.name)
            self._report(f"{self.name} died: {error!r}")
