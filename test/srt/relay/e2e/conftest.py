"""This lane starts real servers from the installed package. A pair serves every module that names its settings.

Pytest runs the tests of one pair after each other, in whatever module they are, and stops it when another one is asked
for: `parametrize` it with `indirect=True` and `scope="session"`. What a pair answers is compared with `undivided`, the
servers with the same flags in which nothing is divided. A test that kills a server starts its own.

Two processes share the tests (`BESIDE`): most of the time a server waits, starts, or computes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from support.server_lane import logs, pytest_configure, pytest_runtest_makereport  # noqa: F401
from support.side_by_side import runs_tests

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

    from embedding_relay.tools.local_process import LocalProcess
    from support.pairs import Pair

# Two servers that start on two cores take half a minute; a test adds its own work to that.
SECONDS = 600

# What the second of two processes tests, in this order: modules whose servers no other module uses. That is half of the
# work, and what both processes run at a time must fit into 24 GiB: a server, or a rank of one, takes about one.
BESIDE: Final = (
    *("test_tiny_model", "test_before_serving", "test_families", "test_two_hosts"),
    *("test_many_instances", "test_demo", "test_three_stages", "test_pause"),
)
# What the first one begins with: a dozen ranks, before there is a pair that stays, and while the other one has little.
LARGEST: Final = "test_ranks"


def pytest_sessionstart(session: pytest.Session) -> None:
    """What servers are forked from imports while the tests are collected; each process that runs some has its own."""
    if not session.config.option.collectonly and runs_tests(session.config):
        from support.warm_start import fork_server

        fork_server()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """With `-n 2`."""
    from xdist.scheduler import LoadScopeScheduling

    absent = [name for name in (LARGEST, *BESIDE) if not Path(__file__).with_name(f"{name}.py").exists()]
    assert absent == [], "has a module another name?"

    class TwoParts(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "beside" if Path(nodeid.partition("::")[0]).stem in BESIDE else "pairs"

    return TwoParts(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    other_day = [item for item in items if not _is_for_today(item)]
    config.hook.pytest_deselected(items=other_day)
    items[:] = [item for item in items if item not in other_day]
    items.sort(key=_turn)
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS))


def _turn(item: pytest.Item) -> int:
    in_turn = (LARGEST, *BESIDE)
    return in_turn.index(item.path.stem) if item.path.stem in in_turn else len(in_turn)


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
