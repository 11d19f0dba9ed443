"""Every number has a metric, every metric a line on the page, and values arrive as they are, also across processes."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from embedding_relay import metrics
from embedding_relay.observer import Numbers, Summary
from embedding_relay.protocol.counts import Event
from support.protocol import encode_side, language_side
from support.repo import SOURCE

REPO = Path(__file__).resolve().parents[4]
PACKAGES = SOURCE / "embedding_relay"
LABELS = {"model_name": "m", "tp_rank": 0}


class Served:
    """One instance's metrics, and what a scrape of them would find."""

    def __init__(self, mode: str) -> None:
        self.registry = CollectorRegistry()
        self.metrics = metrics.RelayMetrics(mode, LABELS, self.registry)
        self._common = {**{name: str(label) for name, label in LABELS.items()}, "mode": mode}

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(metrics.PREFIX + name, {**self._common, **labels})


def sources(mode: str, *kinds: str) -> set[str]:
    return {metric.source for metric in metrics.METRICS if mode in metric.modes and metric.kind in kinds}


def test_a_gauge_says_the_last_number_and_a_counter_all_of_them() -> None:
    language = Served("language")
    for rooms, rounds in ((3, 10), (1, 15), (0, 15)):
        language.metrics.counted(Numbers(sizes={"rooms": rooms}, totals={"chunks": rounds}))
    assert language.value("rooms") == 0
    assert language.value("chunks_total") == 15


def test_what_the_tower_was_asked_for_is_counted_beside_what_it_did() -> None:
    encode = Served("encode")
    for asked, done in ((3, 3), (7, 5), (7, 5)):
        encode.metrics.encoded({"media_items": asked, "encoded_items": done})
    assert (encode.value("media_items_total"), encode.value("encoded_items_total")) == (7, 5)


def test_failures_are_told_apart_by_status_code_and_successes_are_counted_with_them() -> None:
    encode = Served("encode")
    encode.metrics.counted(Numbers(failures=Counter({400: 2, 502: 1})))
    encode.metrics.counted(Numbers(failures=Counter({400: 3, 502: 1})))
    encode.metrics.succeeded(Summary(rows=100, rounds=2, bytes=5000, wait_s=0.02, transfer_s=0.2))
    found = {code: encode.value("requests_total", status_code=code) for code in ("200", "400", "502", "503")}
    assert found == {"200": 1, "400": 3, "502": 1, "503": None}


def test_every_event_is_there_before_it_happens() -> None:
    encode = Served("encode")
    assert {encode.value("events_total", event=event.value) for event in Event} == {0}


def test_events_have_their_names() -> None:
    encode = Served("encode")
    encode.metrics.counted(Numbers(events=Counter({Event.UNDECODABLE: 4, Event.RESUME_IGNORED: 2})))
    assert encode.value("events_total", event="undecodable") == 4
    assert encode.value("events_total", event="resume_ignored") == 2


def test_a_number_that_is_no_metric_harms_nobody() -> None:
    """This runs in the control thread: a new table, or a total that shrinks, must not end it."""
    encode = Served("encode")
    for size in (5, 2):
        encode.metrics.counted(Numbers(sizes={"a_new_table": size}, totals={"a_new_total": size, "chunks": size}))
    assert encode.value("chunks_total") == 5


def test_a_request_fills_the_histograms() -> None:
    language = Served("language")
    language.metrics.succeeded(Summary(rows=1000, rounds=8, bytes=500_000, wait_s=0.002, transfer_s=2.5))
    sums = {
        name: language.value(f"{name}_sum")
        for name in ("wait_seconds", "transfer_seconds", "request_rounds", "request_rows", "request_bytes")
    }
    assert sums == {
        "wait_seconds": 0.002,
        "transfer_seconds": 2.5,
        "request_rounds": 8,
        "request_rows": 1000,
        "request_bytes": 500_000,
    }
    assert language.value("request_rounds_bucket", le="8.0") == 1
    assert language.value("request_rounds_bucket", le="6.0") == 0


def test_the_schedulers_tables() -> None:
    language = Served("language")
    language.metrics.parked({"parked": 4, "shared": 1})
    language.metrics.parked({"parked": 0, "shared": 1})
    assert (language.value("parked_requests"), language.value("shared_rooms")) == (0, 1)


def test_the_log_line_and_the_metrics_have_one_source() -> None:
    summary = Summary(rows=1058, rounds=9, bytes=558208, wait_s=0.0039, transfer_s=5.716)
    assert str(summary) == "rows=1058 rounds=9 bytes=558208 wait_ms=3.9 transfer_ms=5716.0"
    kept = dataclasses.replace(summary, cached=1000)
    assert str(kept) == "rows=1058 rounds=9 bytes=558208 wait_ms=3.9 transfer_ms=5716.0 cached=1000"


def test_what_requests_cost_is_told_by_their_class_and_by_the_http_process_only() -> None:
    registry = CollectorRegistry()
    admission = metrics.AdmissionMetrics("encode", {"model_name": "m"}, registry)
    admission.stands("large", 5000, 2)
    admission.stands("small", 10, 0)
    admission.let_in("large", 0.2)
    admission.refused("large")

    def value(name: str, size: str) -> float | None:
        return registry.get_sample_value(metrics.PREFIX + name, {"model_name": "m", "mode": "encode", "class": size})

    found = [value(f"admission_{name}", "large") for name in ("bytes", "waiting", "refused_total", "wait_seconds_sum")]
    assert found == [5000, 2, 1, 0.2]
    assert (value("admission_bytes", "small"), value("admission_refused_total", "small")) == (10, 0)
    assert Served("encode").value("admission_bytes", **{"class": "large"}) is None


# ---- complete


def test_every_size_is_a_gauge() -> None:
    assert set(encode_side().sizes()) <= sources("encode", "gauge")
    assert set(language_side().sizes()) <= sources("language", "gauge")


def test_every_event_has_its_line_on_the_page() -> None:
    assert set(metrics.EVENTS_ABOUT) == set(Event)


def test_no_event_is_invented() -> None:
    code = "".join(path.read_text() for path in PACKAGES.rglob("*.py") if path.name not in ("metrics.py", "counts.py"))
    assert [event.name for event in Event if f"Event.{event.name}" not in code] == []


# ---- pages


def test_the_page_is_up_to_date() -> None:
    ended = subprocess.run([sys.executable, REPO / "scripts/metrics", "--check"], capture_output=True, text=True)
    assert ended.returncode == 0, f"run scripts/metrics\n{ended.stdout}{ended.stderr}"


@pytest.mark.parametrize("page", ["docs/metrics.md", "deploy/grafana/dashboard.json"])
def test_pages_name_only_metrics_that_exist(page: str) -> None:
    exist = {metric.name for metric in metrics.METRICS}
    exist |= {
        f"{metric.name}_{part}"
        for metric in metrics.METRICS
        if metric.kind == "histogram"
        for part in ("bucket", "count", "sum")
    }
    named = set(re.findall(f"{metrics.PREFIX}([a-z_]+)", (REPO / page).read_text()))
    assert named
    assert named <= exist


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads((REPO / "deploy/grafana/dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    for panel in panels:
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")


# ---- across processes, as SGLang serves them

CHILD = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from embedding_relay.metrics import RelayMetrics
    from embedding_relay.observer import Numbers
    assert "prometheus_client" not in sys.modules, "too early: SGLang has not said yet where its files go"
    served = RelayMetrics("language", {"model_name": "m"})
    served.counted(Numbers(sizes={"rooms": 7}, totals={"chunks": 7}))
    served.counted(Numbers(sizes={"rooms": 2}, totals={"chunks": 9}))
"""
SCRAPE = """
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    print(generate_latest(registry).decode())
"""


def run(code: str, environ: Mapping[str, str], *arguments: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    ended = subprocess.run(command, env=dict(environ), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_another_process_can_serve_them(tmp_path: Path) -> None:
    """And of two that have had the role, a table is the later one's, a total is both's."""
    environ = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        run(CHILD, environ, str(SOURCE))
    page = run(SCRAPE, environ)
    where = '{mode="language",model_name="m"}'
    assert f"{metrics.PREFIX}rooms{where} 2.0" in page
    assert f"{metrics.PREFIX}chunks_total{where} 18.0" in page
