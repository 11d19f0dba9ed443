"""The files of deploy/ are checked with the programs that read them, or with their schemas. No server is started."""

from __future__ import annotations

import warnings

import pytest

from support.installed import require_installed
from support.side_by_side import runs_tests


def pytest_configure(config: pytest.Config) -> None:
    require_installed()
    if runs_tests(config):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SGLang's imports warn about hardware that is not there
            import sglang.srt.entrypoints.http_server
            import sglang.srt.server_args  # noqa: F401
