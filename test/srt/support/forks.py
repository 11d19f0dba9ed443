"""Processes forked from one that has imported everything and opened nothing: a new instance costs milliseconds."""

import multiprocessing
import os
from multiprocessing import forkserver, resource_tracker

from support.repo import REPO

fork = multiprocessing.get_context("forkserver")


def prepare() -> None:
    """Start the process that is forked from, so that it imports while others do something else."""
    fork.set_forkserver_preload(["support.loopback", "support.target"])
    resource_tracker.ensure_running()
    # The fork server does not get our sys.path.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(REPO / "test/srt")
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
