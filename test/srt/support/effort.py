"""How many random schedules a property test runs: a few hundred by default, as many as RELAY_SCHEDULES says."""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

DAILY = 300
SCHEDULES = int(os.environ.get("RELAY_SCHEDULES", DAILY))


def effort(daily: int = DAILY, steps: int = 50) -> settings:
    """`daily` examples, and in proportion more if more was asked for."""
    return settings(
        max_examples=max(1, daily * SCHEDULES // DAILY),
        stateful_step_count=steps,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )


# The time limit of a test, whoever sets it, is for a few hundred schedules: it stays for these, and falls for more.
unhurried = pytest.mark.timeout(0) if SCHEDULES > DAILY else pytest.mark.daily
