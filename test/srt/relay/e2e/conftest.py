"""This lane starts real servers from the installed package."""

from collections.abc import Generator
from pathlib import Path

import pytest

from support.installed import require_installed

# Two servers that start on two cores take half a minute; a test adds its own work to that.
SECONDS = 600


def pytest_configure() -> None:
    # Before anything of ours is imported, hence the late imports below.
    require_installed()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    from support.servers import active_log_tails

    report = yield
    if report.failed:
        report.sections.extend(active_log_tails())
    return report


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen3_vl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model(family: str) -> Path:
    from embedding_relay.tools import tiny_model

    return tiny_model.cached(family)


@pytest.fixture(scope="module")
def logs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2] + "-logs")
