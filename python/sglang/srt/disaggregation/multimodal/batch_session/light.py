"""Runs `sglang-relay batch` without SGLang. Started as a file, never imported.

Importing anything of the package `sglang` runs its `__init__`, which brings torch: seconds and most of a gigabyte, once
per worker process, for a service that needs none of it. So here the name stands for the directory alone. A worker
process is made by running this file again under another name, which does the same for it.
"""

import sys
import types
from pathlib import Path

bare = types.ModuleType("sglang")
bare.__path__ = [str(Path(__file__).absolute().parents[4])]
sys.modules["sglang"] = bare
# The directory of a script comes first on the path; our modules have names that others have, too.
sys.path[:] = [place for place in sys.path if place != str(Path(__file__).absolute().parent)]

if __name__ == "__main__":
    from sglang.srt.disaggregation.multimodal.cli import main

    sys.exit(main())
