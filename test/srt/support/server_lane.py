"""What the lanes that start real servers have in common: the conftest of each imports these hooks and fixtures."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from support.installed import require_installed

__all__ = ["logs", "pytest_configure", "pytest_runtest_makereport"]


def pytest_configure() -> None:
    # Before anything of ours is imported, hence the late import below.
    require_installed()
    # Whoever stops the run stops its servers. A shell starts what it puts into the background with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    from support.servers import active_log_tails

    report = yield
    if report.failed:
        report.sections.extend(active_log_tails())
    return report


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the servers' logs go: pytest keeps the folders of the last three runs.

    Whoever starts servers names it, so it is the last to go, when all of them must have ended.
    """
    from support.servers import finish_stopping

    yield tmp_path_factory.mktemp("logs")
    finish_stopping()
