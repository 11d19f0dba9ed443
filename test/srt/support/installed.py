"""Is the installed package this checkout? A test of an older installed file would prove nothing."""

import json
from importlib.metadata import PackageNotFoundError, distribution

import pytest

from support.repo import DISTRIBUTION, REPO


def _package_is_elsewhere() -> str | None:
    try:
        origin = json.loads(distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return f"{DISTRIBUTION} is not installed"
    if not origin.get("dir_info", {}).get("editable") or origin.get("url") != REPO.as_uri():
        return f"installed from {origin.get('url', 'a wheel')}"
    return None


def require_installed() -> None:
    """For a lane's conftest: end the whole run, because every result would be about something else."""
    if problem := _package_is_elsewhere():
        pytest.exit(f"the installed package is not this checkout ({problem}): run scripts/setup", returncode=4)
