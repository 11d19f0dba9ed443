"""The `sglang-relay` command on a slow disk, for tests: each saving takes TEST_SAVING_SECONDS longer.

Run as `python -m support.slow_service batch serve …`. The service starts its workers as new Python processes, and each
of them imports the module that its parent was started with: this one. So all of them have the slow disk.
"""

import os
import sys
import time
from pathlib import Path

from embedding_relay.batch.session import folder
from embedding_relay.tools.cli import main

_at_once = folder.move_into_place


def _slowly(partial: Path, place: Path) -> None:
    time.sleep(float(os.environ["TEST_SAVING_SECONDS"]))
    _at_once(partial, place)


folder.move_into_place = _slowly

if __name__ == "__main__":
    sys.exit(main())
