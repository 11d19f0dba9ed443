"""Is the installed package this checkout? A test of an older installed file would prove nothing."""

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from support.repo import DISTRIBUTION, REPO, doors


def installed_doors() -> dict[str, Path]:
    """The files inside SGLang's directories that the installed distribution says it has, and where they are."""
    try:
        files = distribution(DISTRIBUTION).files or []
    except PackageNotFoundError:
        return {}
    return {str(file): Path(str(file.locate())) for file in files if str(file).startswith("sglang/")}


def difference(installed: Mapping[str, Path], ours: Mapping[str, Path]) -> str | None:
    """One line that says how the installed files differ from ours, or None."""
    if not installed:
        return f"{DISTRIBUTION} is not installed"
    if missing := sorted(ours.keys() - installed.keys()):
        return f"not installed: {', '.join(missing)}"
    if extra := sorted(installed.keys() - ours.keys()):
        return f"installed, but not in the checkout: {', '.join(extra)}"
    if other := [name for name in sorted(ours) if not _same(installed[name], ours[name])]:
        return f"installed in another version: {', '.join(other)}"
    return None


def _same(installed: Path, ours: Path) -> bool:
    return installed.exists() and installed.read_bytes() == ours.read_bytes()


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
    if problem := _package_is_elsewhere() or difference(installed_doors(), doors()):
        pytest.exit(f"the installed package is not this checkout ({problem}): run scripts/link", returncode=4)
