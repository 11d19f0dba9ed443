"""This lane starts the real batch service, with its worker processes, against an endpoint that answers at once."""

from collections.abc import Generator, Iterator

import pytest

from support.batch_service import active_log_tails
from support.installed import require_installed
from support.stub_endpoint import StubEndpoint, stub_endpoint


def pytest_configure() -> None:
    # The service that is started is the installed one.
    require_installed()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.extend(active_log_tails())
    return report


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubEndpoint]:
    with stub_endpoint(tmp_path_factory.mktemp("stub")) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def _as_new(request: pytest.FixtureRequest) -> None:
    """No test sees what another has asked, or told the endpoint to do."""
    if "stub" in request.fixturenames:
        request.getfixturevalue("stub").forget()
