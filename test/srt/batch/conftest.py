"""This lane starts the real batch service, with its worker processes, against an endpoint that answers at once."""

from collections.abc import Generator, Iterator

import pytest

from support.bare import use_bare_sglang
from support.installed import require_installed


def pytest_configure() -> None:
    # Before anything of ours is imported, hence the late imports below. The service itself is the installed one.
    require_installed()
    use_bare_sglang()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    from support.batch_service import active_log_tails

    report = yield
    if report.failed:
        report.sections.extend(active_log_tails())
    return report


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis of this machine, for this test run only."""
    from support.redis_server import redis_server

    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url
