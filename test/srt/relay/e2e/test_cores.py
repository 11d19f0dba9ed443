"""How many threads real instances have, on the cores that this machine allows."""

from __future__ import annotations

import os
import re

import pytest

from embedding_relay import cores
from support.pairs import SMALL, Pair
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=60, suite="base-c-test-cpu")

pytestmark = pytest.mark.parametrize("pair", [SMALL], ids=[SMALL.name], indirect=True, scope="session")

# What the scheduler's own torch says, after the model was loaded.
STARTED = re.compile(r"relay mode=\w+ parameters=\d+ threads=(\d+)")


@pytest.mark.parametrize("half", ["encode", "language"])
def test_an_instance_beside_another_one(pair: Pair, half: str) -> None:
    sharing = cores.share(os.environ, len(os.sched_getaffinity(0)), cores.usable_cores())
    log = pair[half].log_text()
    assert f"relay cores: {sharing.why}" in log
    (threads,) = STARTED.findall(log)
    assert int(threads) == int(os.environ.get("OMP_NUM_THREADS") or cores.usable_cores())


if __name__ == "__main__":
    run_tests(__file__)
