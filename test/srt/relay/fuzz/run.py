"""The fuzz run: `python test/srt/relay/fuzz/run.py --messages 1000000`. Ends with 1 if anything was found.

An input that found something is kept in `test/srt/relay/fuzz/crashes/`, and this runs it again:
`python test/srt/relay/fuzz/targets.py NAME 0 FILE`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CRASHES = HERE / "crashes"

# In hundredths of all messages. Raw HTTP costs a connection each.
SHARES = {"frames": 20, "attack": 25, "attack-with-faults": 25, "insider": 18, "rows": 5, "registry": 6, "http": 1}

_COVERED = re.compile(r"^#\d+\s.* cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    target: str
    messages: int
    seconds: float
    inputs: int
    covered: tuple[int, int]
    """Places in the code that the first inputs reached, and that all of them reached."""
    kept: int
    """Inputs that reached something new."""
    finding: str

    def __str__(self) -> str:
        first, last = self.covered
        counts = f"{self.messages} messages in {self.inputs} inputs, {self.messages / max(self.seconds, 0.001):.0f}/s"
        return f"{self.target}: {counts}, coverage {first} -> {last}, {self.kept} inputs kept{self.finding}"


def fuzz(target: str, messages: int, seed: int) -> Outcome:
    CRASHES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as kept:
        options = [f"-seed={seed}", "-max_len=4096", "-len_control=0", "-timeout=60", "-rss_limit_mb=4096"]
        command = [sys.executable, HERE / "targets.py", target, str(messages), *options]
        done = subprocess.run(
            [*command, f"-artifact_prefix={CRASHES}/{target}-", kept], capture_output=True, text=True, errors="replace"
        )
    covered = [tuple(map(int, found)) for found in _COVERED.findall(done.stderr)] or [(0, 0, 0)]
    finding = (
        ""
        if done.returncode == 0
        else f"\n{target}: FOUND, status {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    )
    last_line = (done.stdout.strip().splitlines() or ["{}"])[-1]
    counted = json.loads(last_line) if last_line.startswith("{") else {}
    return Outcome(
        target,
        counted.get("messages", 0),
        counted.get("seconds", 0.0),
        counted.get("inputs", 0),
        (covered[0][0], covered[-1][0]),
        covered[-1][2],
        finding,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=SHARES, action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    outcomes = []
    for target in arguments.target or SHARES:
        outcomes.append(fuzz(target, max(1, arguments.messages * SHARES[target] // 100), arguments.seed))
        print(outcomes[-1], flush=True)
    messages, seconds = sum(o.messages for o in outcomes), sum(o.seconds for o in outcomes)
    found = sum(bool(o.finding) for o in outcomes)
    print(f"{messages} messages, {messages / max(seconds, 0.001):.0f}/s, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
