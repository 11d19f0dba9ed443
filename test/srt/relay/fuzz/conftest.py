"""This lane runs without SGLang, as the protocol does, and needs atheris."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def nothing_has_imported_sglang() -> Iterator[None]:
    yield
    assert "sglang" not in sys.modules, "a test of this lane, or what it tests, has imported SGLang"
