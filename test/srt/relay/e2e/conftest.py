"""This lane starts real servers from the installed package. A pair serves every module that names its settings.

Pytest runs the tests of one pair after each other, in whatever module they are, and stops it when another one is asked
for: `parametrize` it with `indirect=True` and `scope="session"`. What a pair answers is compared with `undivided`, the
servers with the same flags in which nothing is divided. A test that kills a server starts its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.server_lane import logs, pytest_configure, pytest_runtest_makereport  # noqa: F401

if TYPE_CHECKING:
    from embedding_relay.tools.local_process import LocalProcess
    from support.pairs import Pair

# Two servers that start on two cores take half a minute; a test adds its own work to that.
SECONDS = 600


def pytest_sessionstart(session: pytest.Session) -> None:
    """What servers are forked from imports while the tests are collected."""
    if not session.config.option.collectonly:
        from support.warm_start import fork_server

        fork_server()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Behind pytest's own order. Servers end while the next ones start, so those that take most memory stand apart."""
    other_day = [item for item in items if not _is_for_today(item)]
    config.hook.pytest_deselected(items=other_day)
    items[:] = [item for item in items if item not in other_day]
    items.sort(key=lambda item: item.path.name == "test_three_stages.py")  # else next to test_ranks.py
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS))


def _is_for_today(item: pytest.Item) -> bool:
    """A module may name the values of `part` that it is the day of."""
    today = getattr(item.getparent(pytest.Module).obj, "TODAY", None)  # type: ignore[union-attr]
    callspec = getattr(item, "callspec", None)
    return today is None or callspec is None or callspec.params.get("part", today[0]) in today


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen3_vl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model(family: str) -> Path:
    from embedding_relay.tools import tiny_model

    return tiny_model.cached(family)


@pytest.fixture(scope="session")
def pair(request: pytest.FixtureRequest, logs: Path) -> Iterator[Pair]:  # noqa: F811  (the fixture, by its name)
    """The running pair of the settings that a test names."""
    from support import pairs

    with pairs.running(request.param, logs) as running:
        yield running


@pytest.fixture(scope="session")
def undivided(logs: Path) -> Iterator[dict[str, LocalProcess]]:  # noqa: F811  (the fixture, by its name)
    """By family. A test that takes a pair as well names this one first: two starts at once take longer than in turn."""
    from support import pairs

    with pairs.undivided(logs) as members:
        yield members
