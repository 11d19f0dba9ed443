"""A fork server that has imported everything and opened nothing: a new process for a test costs milliseconds."""

import gc
import multiprocessing
import os
from multiprocessing import forkserver, resource_tracker

from support.repo import REPO
from support.side_by_side import NAME

LOG = REPO / "test-output" / f"loopback-processes-{NAME}.log"
fork = multiprocessing.get_context("forkserver")


def spare_the_collector() -> None:
    """Looking through all that torch imports takes it long, in which no thread of the process runs."""
    gc.freeze()


def prepare() -> None:
    """Start the process that is forked from, so that it imports while others do something else.

    What it and its children print goes to a file: Mooncake says a lot.
    """
    fork.set_forkserver_preload(["support.loopback", "support.target"])
    resource_tracker.ensure_running()
    # The fork server does not get our sys.path.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO / "test/srt"), *([before] if before else [])])
    LOG.parent.mkdir(exist_ok=True)
    stderr = os.dup(2)
    with LOG.open("w") as log:
        os.dup2(log.fileno(), 2)
    try:
        forkserver.ensure_running()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
