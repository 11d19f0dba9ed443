"""Waiting for something to become true: as long as it takes, and not longer than it may."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], seconds: float = 24) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"it did not happen within {seconds:g} s"
        time.sleep(0.1)
