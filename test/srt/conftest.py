"""Every lane tests the package of this checkout, whichever environment runs it."""

from pathlib import Path

import pytest

import embedding_relay
from support.repo import SOURCE


def pytest_configure() -> None:
    if not Path(embedding_relay.__file__).is_relative_to(SOURCE):
        pytest.exit(f"embedding_relay is {embedding_relay.__file__}: run scripts/setup here", returncode=4)
