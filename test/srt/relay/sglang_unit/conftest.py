"""This lane runs what is inside SGLang in SGLang's own scheduler, without a model and without any other process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support.installed import require_installed

if TYPE_CHECKING:
    from support.scheduler import SchedulerWithoutModel, TransferWithoutThread
    from support.tokenizing import TokenizerManagerWithoutScheduler


def pytest_configure() -> None:
    require_installed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang's imports warn about hardware that is not there
        import support.scheduler  # noqa: F401


@pytest.fixture(scope="module")
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """The mode that a module's tests are about: its name is the module's `MODE`."""
    from support import scheduler

    with scheduler.serving(request.module.MODE):
        yield request.module.MODE


@pytest.fixture(scope="module")
def manager(request: pytest.FixtureRequest) -> Iterator[TokenizerManagerWithoutScheduler]:
    """The tokenizer manager of a server in the mode of the module."""
    from support import tokenizing

    with tokenizing.serving(request.module.MODE) as made:
        yield made


@pytest.fixture
def transfer() -> Iterator[TransferWithoutThread]:
    from support.scheduler import TransferWithoutThread

    made = TransferWithoutThread()
    yield made
    made.close()


@pytest.fixture
def scheduler(mode: str) -> SchedulerWithoutModel:
    from support.scheduler import SchedulerWithoutModel

    return SchedulerWithoutModel()
