"""This lane runs what is inside SGLang in SGLang's own scheduler, without a model and without any other process."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support.installed import require_installed
from support.side_by_side import runs_tests

if TYPE_CHECKING:
    from support.scheduler import SchedulerWithoutModel, TransferWithoutThread
    from support.tokenizing import TokenizerManagerWithoutScheduler


def pytest_configure(config: pytest.Config) -> None:
    require_installed()
    if not runs_tests(config):
        return
    gc.disable()  # nothing of what is imported could be freed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang's imports warn about hardware that is not there
        import support.scheduler  # noqa: F401
    gc.freeze()
    gc.enable()


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
