"""The units, by systemd's own check."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from embedding_relay.config import RelayConfig
from support.deployment import DEPLOY

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
# Where the guide installs them; on this machine the programs are in this environment.
PREFIX = "/opt/sglang-relay"


def verify(tmp_path: Path, right: str = "", wrong: str = "") -> str:
    """What systemd says about the units, in which something may be replaced by something wrong."""
    files = []
    for unit in UNITS:
        text = unit.read_text()
        assert f"ExecStart={PREFIX}/bin/" in text
        files.append(tmp_path / unit.name.replace("@.", "@encode."))
        files[-1].write_text(text.replace(right or PREFIX, wrong or sys.prefix).replace(PREFIX, sys.prefix))
    program = shutil.which("systemd-analyze")
    assert program, "run scripts/setup --tests"
    ended = subprocess.run([program, "verify", "--man=no", *map(str, files)], capture_output=True, text=True)
    return f"{ended.stdout}{ended.stderr}" + (f"status {ended.returncode}" if ended.returncode else "")


def test_systemd_has_nothing_to_say(tmp_path: Path) -> None:
    assert verify(tmp_path) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("KillMode=mixed", "KillMode=most"), ("LimitNOFILE", "LimitOpenFiles"), ("/bin/sglang", "/bin/sglange")],
)
def test_it_would_notice(right: str, wrong: str, tmp_path: Path) -> None:
    assert wrong.removeprefix("KillMode=") in verify(tmp_path, right, wrong)


def test_an_instance_has_the_time_to_finish_its_requests() -> None:
    lines = (DEPLOY / "systemd/sglang-relay@.service").read_text().splitlines()
    assert f"TimeoutStopSec={int(RelayConfig().waiting_timeout) + 30}" in lines
    # A signal to all of its processes would end those that are to finish.
    assert "KillMode=mixed" in lines


def test_the_guide_names_the_units_and_their_settings() -> None:
    guide = (DEPLOY.parent / "docs/two-hosts.md").read_text()
    for path in UNITS:
        assert path.stem in guide
    for path in (DEPLOY / "systemd").glob("*.env"):
        assert f"`{path.name}`" in guide
