"""A short fuzz run with a fixed seed; `test/srt/relay/fuzz/run.py` is the long one."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run.py"
MESSAGES = 60_000


@pytest.mark.parametrize("target", ["frames", "attack", "attack-with-faults", "insider", "rows", "registry", "http"])
def test_strangers_break_nothing(target: str) -> None:
    done = subprocess.run(
        [sys.executable, RUN, "--messages", str(MESSAGES), "--target", target], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    messages = int(done.stdout.splitlines()[-1].split()[0])
    assert messages >= MESSAGES // 100, "the fuzzer ended early"
    print(done.stdout)
