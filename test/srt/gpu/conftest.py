"""This lane needs torch and a card, and neither SGLang nor a model: rows are made by kernels that take their time."""

import pytest
import torch


def pytest_configure() -> None:
    if not torch.cuda.is_available():
        pytest.exit("this machine has no card that torch can use: the gpu lane proves nothing here", returncode=4)
    torch.cuda.init()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
