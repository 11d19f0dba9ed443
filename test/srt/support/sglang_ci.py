"""For test files that could live in SGLang's tree: what its CI looks for in them, and how it runs them."""

import os
import sys


def register_cpu_ci(*, est_time: float, suite: str) -> None:
    """A call by this name is looked for. SGLang's own function does as little, and importing it imports torch."""


def run_tests(file: str) -> None:
    """The file was run as a program. Pytest wants to come before what the file has imported."""
    os.execv(sys.executable, [sys.executable, "-m", "pytest", file])
