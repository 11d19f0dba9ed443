"""Marks of tests that are about the data plane: on both of them, or about what only one of them does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.loopback import PLANES

Test = Callable[..., Any]


def both_planes(test: Test) -> Test:
    return _on(PLANES)(test)


def only(plane: str) -> Callable[[Test], Test]:
    return _on((plane,))


def _on(planes: tuple[str, ...]) -> Callable[[Test], Test]:
    parametrize = pytest.mark.parametrize("plane", planes, indirect=True)
    return lambda test: pytest.mark.usefixtures("plane")(parametrize(test))  # type: ignore[no-any-return]
