"""Runs Python programs, each in a fork of one interpreter that has imported torch and transformers for all of them.

    python -P forked_programs.py FOLDER

FOLDER/programs.json says what to run: name -> {"code", "arguments", "environ"}. Each program leaves NAME.out, NAME.err
and NAME.status in the folder. As many run at the same time as there are cores. What torch and transformers import is
half of the time that a program with SGLang takes before it does anything; SGLang itself is imported by each program.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch  # noqa: F401
import transformers.modeling_utils  # noqa: F401


def fork_each(folder: Path) -> "dict[str, Any] | None":
    """In a fork: its program. In the process that forked, when all have ended: None."""
    names: dict[int, str] = {}

    def reap() -> None:
        pid, status = os.wait()
        (folder / f"{names.pop(pid)}.status").write_text(str(os.waitstatus_to_exitcode(status)))

    gc.freeze()
    for name, program in json.loads((folder / "programs.json").read_text()).items():
        if len(names) == os.cpu_count():
            reap()
        if (pid := os.fork()) == 0:
            for suffix, descriptor in (("out", 1), ("err", 2)):
                os.dup2(os.open(folder / f"{name}.{suffix}", os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
            return dict(program)
        names[pid] = name
    while names:
        reap()
    return None


# Not in a function: a program that ends does so as a script does, with its status and its traceback.
if (program := fork_each(Path(sys.argv[1]))) is not None:
    sys.argv = ["-c", *program["arguments"]]
    os.environ.update(program["environ"])
    exec(program["code"], {"__name__": "__main__"})
