"""This lane kills, freezes and soaks real servers: a short form every day, longer ones by hand.

    .venv/bin/python -m pytest -s test/srt/stress/test_strikes.py   faults at random moments (-k encode-killed: one)
    .venv/bin/python -m pytest -s test/srt/stress/test_soak.py      mixed traffic, after which nothing may have grown

    RELAY_STRESS_SEED=N      the same random moments and choices again; printed by every run
    RELAY_STRIKES=5          that many strikes of every fault; without it, one of each of the four that differ most,
                             or of every one with RELAY_EVERYTHING=1
    RELAY_SOAK_MINUTES=30    minutes of traffic after the warm-up, instead of one
    RELAY_SOAK_CLIENTS=4     how many ask at the same time
    RELAY_SOAK_FAMILY=...    the tiny model: qwen2_5_vl or qwen3_vl
    RELAY_SOAK_FREEZES=0     freeze nothing
    RELAY_SOAK_ALLOW_MIB=8   growth of one process that is no failure

`-s` shows the progress and the tables while it runs.
"""

from support.server_lane import logs, pytest_configure, pytest_runtest_makereport  # noqa: F401
