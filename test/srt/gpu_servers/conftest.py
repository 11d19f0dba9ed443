"""This lane starts SGLang itself on a card, from the installed package; its models take some megabytes of it.

What RELAY_GPU_ARGUMENTS has are arguments for all servers, such as another attention backend than SGLang's own choice.
"""

from __future__ import annotations

import pytest

from support import server_lane
from support.server_lane import logs, pytest_runtest_makereport  # noqa: F401

# Three servers that have to compile kernels.
SECONDS = 900


def pytest_configure() -> None:
    server_lane.pytest_configure()
    import torch

    if not torch.cuda.is_available():
        pytest.exit("this machine has no card that torch can use: this lane proves nothing here", returncode=4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(SECONDS))
