"""This lane moves rows between real processes, over the real Mooncake engine and real sockets, without a model."""

import os
from collections.abc import Iterator

import pytest

from support import rooms
from support.installed import require_installed
from support.side_by_side import runs_tests

# Before the engine reads it; the smallest that Mooncake takes, so that a test can wait for it.
os.environ["MC_TRANSFER_TIMEOUT"] = "5"


def pytest_configure(config: pytest.Config) -> None:
    require_installed()
    if not runs_tests(config):
        return
    from support import forks

    forks.prepare()
    import embedding_relay.transport.manager  # noqa: F401

    forks.spare_the_collector()


@pytest.fixture(autouse=True)
def room(request: pytest.FixtureRequest) -> int:
    """A room of this test alone; `support.rooms` has more."""
    rooms.begin(request.node.nodeid)
    return rooms.next_room()


@pytest.fixture
def plane(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the language ranks of a test receive rows by: see `support.planes`."""
    from support.loopback import data_plane

    with data_plane(request.param):
        yield request.param


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread of ours, no eventfd and no socket may outlive the tests of a module."""
    from support.leftovers import Leftovers, import_mooncake
    from support.loopback import finish_stopping

    import_mooncake()
    before = Leftovers.now()
    yield
    finish_stopping()
    before.assert_same()
