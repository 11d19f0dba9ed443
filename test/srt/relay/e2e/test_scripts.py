"""The long scripts in their short form: servers killed and frozen at random moments, and soaked in mixed traffic."""

from __future__ import annotations

import subprocess
import sys

from support.repo import REPO

# One of each kind; the others differ in who is struck.
FAULTS = ("encode killed", "encode scheduler frozen", "language scheduler killed", "clients gone")


def run(script: str, *arguments: str) -> None:
    """It looks for itself whether everything is right; its output has the seed and, after a failure, the reason."""
    command = [sys.executable, str(REPO / "benchmark" / script), *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(ended.stdout)
    assert ended.returncode == 0


def test_every_client_gets_an_answer_whatever_is_struck() -> None:
    run("faults.py", "--strikes", "1", "--only", *FAULTS)


def test_nothing_grows() -> None:
    run("soak.py", "--minutes", "1")
