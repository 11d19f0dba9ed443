"""Pages that are written by scripts say what the code says now."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize("script", ["structure", "protocol-diagrams"])
def test_page_is_up_to_date(script: str) -> None:
    ended = subprocess.run([sys.executable, REPO / "scripts" / script, "--check"], capture_output=True, text=True)
    assert ended.returncode == 0, f"run scripts/{script}\n{ended.stdout}{ended.stderr}"
