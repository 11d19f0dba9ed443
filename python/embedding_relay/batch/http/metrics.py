"""Prometheus metrics, counted from the sessions themselves, so that every worker answers the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from embedding_relay.batch.session.records import ExecutionStatus, Stage

if TYPE_CHECKING:
    from embedding_relay.batch.service import Service
    from embedding_relay.batch.session.records import Session

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
PREFIX: Final = "sglang_relay_batch_"


def text(service: Service) -> str:
    registry = CollectorRegistry()
    registry.register(_Sessions(service.sessions.all()))
    return generate_latest(registry).decode()


class _Sessions(Collector):
    def __init__(self, sessions: list[Session]) -> None:
        self._sessions = sessions

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """All of them gauges, because a session that is deleted or expires takes its numbers along."""
        stages = Counter(session.stage for session in self._sessions)
        family = GaugeMetricFamily(PREFIX + "sessions", "Sessions kept, by stage.", labels=["stage"])
        for stage in Stage:
            family.add_metric([stage.value], stages[stage])
        yield family
        executions = [session.execution for session in self._sessions]
        running = [one for one in executions if one.status is ExecutionStatus.RUNNING]
        rows = GaugeMetricFamily(
            PREFIX + "rows", "Rows of the sessions kept, by what became of each.", labels=["state"]
        )
        rows.add_metric(["done"], sum(one.counts.done for one in executions))
        rows.add_metric(["failed"], sum(one.counts.failed for one in executions))
        rows.add_metric(["running"], sum(one.counts.running for one in running))
        rows.add_metric(["waiting"], sum(one.total - one.counts.done - one.counts.failed for one in running))
        yield rows
        tokens = GaugeMetricFamily(PREFIX + "tokens", "Tokens of the sessions kept, by kind.", labels=["kind"])
        tokens.add_metric(["prompt"], sum(one.counts.prompt_tokens for one in executions))
        tokens.add_metric(["completion"], sum(one.counts.completion_tokens for one in executions))
        yield tokens
        yield GaugeMetricFamily(
            PREFIX + "rows_per_second", "Rows answered per second in the last minute, all runs together.",
            value=sum(one.counts.rate for one in running),
        )  # fmt: skip
        yield GaugeMetricFamily(
            PREFIX + "runs_waiting",
            "Runs that ask nothing at the moment: the endpoint is away or overloaded, or other runs have all requests.",
            value=sum(bool(one.counts.waiting) for one in running),
        )  # fmt: skip
        yield GaugeMetricFamily(
            PREFIX + "retries", "Times that a row was asked again, in the sessions kept.",
            value=sum(one.counts.retries for one in executions),
        )  # fmt: skip
