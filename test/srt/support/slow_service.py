"""The `sglang-relay` command on a disk that tests make slow: a saving takes as long as the file TEST_SAVING_FILE says.

Run as `python -m support.slow_service batch serve …`. The service starts its workers as new processes, and each of them
imports the module that its parent was started with: this one. So all of them have the slow disk.
"""

import os
import sys
import time
from pathlib import Path

from embedding_relay.batch.session import folder
from embedding_relay.tools.cli import main

_at_once = folder.move_into_place


def _slowly(partial: Path, place: Path) -> None:
    """What is being saved when the file says less goes on then."""
    begun, said = time.monotonic(), Path(os.environ["TEST_SAVING_FILE"])
    while time.monotonic() - begun < float(said.read_text()):
        time.sleep(0.02)
    _at_once(partial, place)


folder.move_into_place = _slowly

if __name__ == "__main__":
    sys.exit(main())
