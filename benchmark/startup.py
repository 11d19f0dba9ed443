"""How long the `sglang-relay` command takes to start: the median of several runs, in seconds.

    .venv/bin/python benchmark/startup.py [--runs 11]

`batch run` is given a workbook that does not exist: what is measured is all that comes before its first look at it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

RELAY = ("-m", "embedding_relay")
COMMANDS = {
    "python alone": ("-c", ""),
    "--help": (*RELAY, "--help"),
    "batch --help": (*RELAY, "batch", "--help"),
    "batch run": (*RELAY, "batch", "run", "absent.csv", "--out", "answers.csv", "--endpoint", "http://127.0.0.1:1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs
    print(f"{'':<14} {'median':>7} {'fastest':>8} {'slowest':>8}   of {runs} runs, in seconds")
    for name, arguments in COMMANDS.items():
        seconds = sorted(seconds_of(arguments) for _ in range(runs))
        print(f"{name:<14} {statistics.median(seconds):>7.3f} {seconds[0]:>8.3f} {seconds[-1]:>8.3f}", flush=True)


def seconds_of(arguments: tuple[str, ...]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
