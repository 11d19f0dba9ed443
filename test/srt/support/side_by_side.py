"""Pytest in several processes: one that has started the others, and those in which tests run."""

import os
from typing import Final

import pytest

NAME: Final = os.environ.get("PYTEST_XDIST_WORKER", "alone")
"""Of this process, where each has a file of its own."""


def runs_tests(config: pytest.Config) -> bool:
    """What only tests need, the process that starts the others does without: it would be imported there first."""
    return not config.getoption("numprocesses", None)
