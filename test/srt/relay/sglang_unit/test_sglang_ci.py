"""SGLang's CI would find our end-to-end tests, and run each file as it does: as a program."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest

from sglang.test.ci import ci_register
from support import sglang_ci
from support.repo import REPO

FILES = sorted((REPO / "test/srt/relay/e2e").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_registered(file: os.PathLike[str]) -> None:
    """`support/sglang_ci.py` has what to call. SGLang's own check wants that, and that the file is a program."""
    (registered,) = ci_register.collect_tests([str(file)])
    assert registered.backend is ci_register.HWBackend.CPU
    assert registered.suite == "base-c-test-cpu"


def test_our_call_is_one_that_sglang_takes() -> None:
    ours, theirs = (inspect.signature(module.register_cpu_ci) for module in (sglang_ci, ci_register))
    assert set(ours.parameters) <= set(theirs.parameters)


def test_a_file_runs_its_tests_when_it_is_run() -> None:
    """Found rather than run here. In SGLang's tree `support` would be where its tests have their helpers."""
    environ = os.environ | {"PYTHONPATH": str(REPO / "test/srt"), "PYTEST_ADDOPTS": "--collect-only -q"}
    file = REPO / "test/srt/relay/e2e/test_tiny_model.py"
    ended = subprocess.run([sys.executable, file, "-f"], env=environ, capture_output=True, text=True, cwd=REPO)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "test_tiny_model.py::" in ended.stdout
