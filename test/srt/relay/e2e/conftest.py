"""This lane starts real servers from the installed package. A pair serves every module that names its settings.

Pytest runs the tests of one pair after each other, in whatever module they are, and stops it when another one is asked
for: `parametrize` it with `indirect=True` and `scope="session"`. What a pair answers is compared with `undivided`, the
servers with the same flags in which nothing is divided. A test that kills a server starts its own.

The lane runs in two processes, each with servers of its own: what one test waits for, another one computes meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from support.server_lane import logs, pytest_configure, pytest_runtest_makereport  # noqa: F401
from support.side_by_side import runs_tests

if TYPE_CHECKING:
    from embedding_relay.tools.local_process import LocalProcess
    from support.pairs import Pair

# Two servers that start on two cores take half a minute; a test adds its own work to that.
SECONDS = 600

# Tests of one group run in one process, after each other: those of a pair, those of a module that starts servers of its
# own, or those that name the same `xdist_group`. What takes longest begins first, the rest after it, so that both
# processes end at about the same time.
LONGEST_FIRST: Final = (
    *("qwen2_5_vl-4x16", "test_ranks", "qwen3_vl-8x128", "test_three_stages", "test_demo", "test_many_instances"),
    *("qwen2_5_vl-8x16", "test_two_hosts"),
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """What servers are forked from imports while the tests are collected."""
    if runs_tests(session.config) and not session.config.option.collectonly:
        from support.warm_start import fork_server

        fork_server()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    other_day = [item for item in items if not _is_for_today(item)]
    config.hook.pytest_deselected(items=other_day)
    items[:] = sorted((item for item in items if item not in other_day), key=lambda item: _begins(_group(item)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS))


def _group(item: pytest.Item) -> str:
    """Whose servers it uses."""
    if named := item.get_closest_marker("xdist_group"):
        return str(named.args[0])
    callspec = getattr(item, "callspec", None)
    pair = callspec.params.get("pair") if callspec else None
    return str(pair.name if pair else item.path.stem)


def _begins(group: str) -> int:
    return LONGEST_FIRST.index(group) if group in LONGEST_FIRST else len(LONGEST_FIRST)


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
def undivided(logs: Path) -> Iterator[Mapping[str, LocalProcess]]:  # noqa: F811  (the fixture, by its name)
    """By family: each starts when it is first asked for, and serves until the end."""
    from support import pairs

    with pairs.undivided(logs) as members:
        yield members
