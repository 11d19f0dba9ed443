"""Every family of models: a pair says what an undivided server says, in many rounds, and each half holds only its own.

Starting three servers takes a while, so each day has its share of the families (support/today.py); `RELAY_FAMILIES`
names others, or all.
`scripts/families` runs all of them and writes the table of docs/models.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from embedding_relay.tools import tiny_model
from support import families
from support.questions import TOLERANCE
from support.repo import REPO
from support.sglang_ci import register_cpu_ci, run_tests
from support.today import todays

register_cpu_ci(est_time=600, suite="base-c-test-cpu")

A_DAY: Final = 2


def chosen() -> list[str]:
    named, every = os.environ.get("RELAY_FAMILIES", ""), list(tiny_model.FAMILIES)
    if named:
        return every if named == "all" else named.split(",")
    return todays(every, A_DAY)


@pytest.mark.parametrize("name", chosen())
def test_a_pair_is_equal_to_an_undivided_server(name: str, logs: Path) -> None:
    line = families.compare(name, logs)
    print(line)
    families.save(line, REPO / "test-output/families")
    assert line.trouble == ""
    assert line.difference < TOLERANCE
    assert line.rounds > 1
    assert min(line.saved_encode, line.saved_language) > 0.1, "a half that is not needed takes memory"
    assert line.saved_encode + line.saved_language > 0.99, "something is held twice"


if __name__ == "__main__":
    run_tests(__file__)
