"""The Prometheus metrics of an instance, served beside SGLang's own when it runs with --enable-metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from embedding_relay.observer import Numbers, Summary
from embedding_relay.protocol.counts import Event

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

PREFIX: Final = "sglang:embedding_relay_"

ENCODE: Final = "encode"
LANGUAGE: Final = "language"
BOTH: Final = (ENCODE, LANGUAGE)


class Metric(NamedTuple):
    """`source` is the name of a size or a total that the observer hears, or a field of the summary of a request.

    A counter with a label of its own has many sources: whoever increments it looks it up by this one.
    """

    kind: str
    name: str
    source: str
    about: str
    modes: tuple[str, ...] = BOTH
    label: str = ""
    buckets: tuple[float, ...] = ()
    in_http: bool = False
    """Of an HTTP process; all others are a scheduler's."""


def _gauge(name: str, source: str, about: str, *modes: str) -> Metric:
    return Metric("gauge", name, source, about, modes or BOTH)


def _counter(name: str, source: str, about: str, *modes: str, label: str = "") -> Metric:
    return Metric("counter", name, source, about, modes or BOTH, label)


def _histogram(name: str, source: str, about: str, buckets: tuple[float, ...]) -> Metric:
    return Metric("histogram", name, source, about, buckets=buckets)


_SECONDS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_ROWS: Final = tuple(float(2**power) for power in range(6, 18))
_ROUNDS: Final = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_BYTES: Final = tuple(float(4**power) for power in range(7, 17))

REQUESTS: Final = _counter(
    "requests_total",
    "requests by status code",
    "Requests that ended, by the status code that they ended with; 200 is a success.",
    label="status_code",
)
EVENTS: Final = _counter(
    "events_total", "events by name", "What a healthy pair rarely meets, by name: see below.", label="event"
)

CLASS: Final = "class"
CLASSES: Final = ("small", "large", "body")
ADMISSION: Final = (
    Metric(
        "gauge",
        "admission_bytes",
        "taken",
        "What the requests that were let in cost of the host's memory: `small` and `large` ones with media (encode),"
        " and the `body` of each.",
        label=CLASS,
        in_http=True,
    ),
    Metric(
        "gauge",
        "admission_waiting",
        "waiting",
        "Requests that wait for memory that others have.",
        label=CLASS,
        in_http=True,
    ),
    Metric(
        "counter",
        "admission_refused_total",
        "refused",
        "Requests that were refused because of what they cost: 503, or 400 if they could never be let in.",
        label=CLASS,
        in_http=True,
    ),
    Metric(
        "histogram",
        "admission_wait_seconds",
        "waited",
        "How long those that were let in have waited for it.",
        label=CLASS,
        buckets=_SECONDS,
        in_http=True,
    ),
)

METRICS: Final = (
    *ADMISSION,
    _gauge("pool_blocks", "blocks", "Blocks of the pool."),
    _gauge("free_blocks", "blocks_free", "Blocks that nobody has."),
    _gauge("leased_blocks", "blocks_leased", "Blocks that rooms have."),
    _gauge(
        "quarantined_blocks",
        "blocks_quarantined",
        "Blocks of failed rooms that a write may still reach; nobody gets them before the proof that none will.",
    ),
    _gauge("rooms", "rooms", "Rooms that the transfer has and that have not ended."),
    _gauge("waiting_rooms", "waiting_for_blocks", "Rooms that wait, in order, for their first block."),
    _gauge("held_back_rooms", "held_back", "Those of them whose encode instance may have no more blocks.", LANGUAGE),
    _gauge(
        "quarantined_rooms",
        "quarantined_rooms",
        "Failed rooms whose end the encode instance has not acknowledged yet.",
        LANGUAGE,
    ),
    _gauge(
        "overdue_rooms",
        "quarantine_overdue",
        "Those of them whose blocks have waited too long for the proof that nothing more can land.",
        LANGUAGE,
    ),
    _gauge("remembered_rooms", "remembered", "Rooms that are over; each is remembered for a while, then forgotten."),
    _gauge("followed_rooms", "followed", "Rooms whose end the scheduler waits for."),
    _gauge("open_requests", "senders", "Requests that the transfer has and that have not ended.", ENCODE),
    _gauge("open_requests", "receivers", "Requests that the transfer has and that have not ended.", LANGUAGE),
    _gauge("parked_requests", "parked", "Requests that the scheduler keeps aside until their transfer has ended."),
    _gauge("shared_rooms", "shared", "Rooms whose rows are kept for further samples of one request.", LANGUAGE),
    _gauge("transfers", "transfers", "Rooms of which a chunk is being written.", ENCODE),
    _gauge("source_rooms", "sources", "Rooms whose encoded rows are kept until they are written.", ENCODE),
    _gauge("unquiet_rooms", "unquiet", "Rooms of which a failed write may still land at the other side.", ENCODE),
    _gauge("unexpected_rooms", "unexpected", "Rooms that are asked for and whose request has not come yet.", ENCODE),
    _gauge("sessions", "sessions", "Language ranks that are registered.", ENCODE),
    _gauge("contested_sessions", "contenders", "Those of them that somebody else claims to be.", ENCODE),
    _gauge("workers", "workers", "Transfer workers: a thread and an engine for each rank written to.", ENCODE),
    _gauge("peers", "peers", "Encode instances that are known.", LANGUAGE),
    _gauge(
        "shared_memory_peers",
        "mapped",
        "Ranks of the other side, on this host, with which memory is shared: their rows take no network.",
    ),
    _gauge("borrowing_ranks", "borrowers", "Ranks of this host that read the rows which this rank receives.", LANGUAGE),
    _gauge(
        "lent_rooms",
        "lent",
        "Rooms whose rows some of those ranks still have. When idle, those that SGLang has not let go.",
        LANGUAGE,
    ),
    _gauge("connections", "connections", "Control connections to the other side that are open."),
    REQUESTS,
    _counter("chunks_total", "chunks", "Chunks that were written (encode) or copied out (language)."),
    _counter("resumes_total", "resumes", "Offers of more blocks, after the first one of a request.", LANGUAGE),
    _counter("rows_total", "rows", "Token rows in those chunks."),
    _counter("bytes_total", "bytes", "Bytes in those chunks."),
    _counter("media_items_total", "media_items", "Images, videos and audio whose embeddings were asked for.", ENCODE),
    _counter(
        "encoded_items_total",
        "encoded_items",
        "Those of them that the tower was run for; of the others SGLang's cache still had the embeddings.",
        ENCODE,
    ),
    _counter(
        "left_out_items_total",
        "left_out_items",
        "Those of them that nobody had to make, because every language rank of their request had their rows.",
        ENCODE,
    ),
    _gauge("row_cache_items", "row_cache_items", "Items whose rows are kept for requests to come.", LANGUAGE),
    _gauge("row_cache_bytes", "row_cache_bytes", "Bytes of memory that these rows take.", LANGUAGE),
    _counter(
        "row_cache_hits_total",
        "row_cache_hits",
        "Images, videos and audio whose rows did not travel, because they were kept here.",
        LANGUAGE,
    ),
    _counter(
        "row_cache_misses_total",
        "row_cache_misses",
        "Those whose rows could be kept, and had to travel.",
        LANGUAGE,
    ),
    _counter("row_cache_saved_bytes_total", "row_cache_saved", "Bytes that did not travel.", LANGUAGE),
    _counter(
        "row_cache_evictions_total",
        "row_cache_evictions",
        "Items whose rows made place for those of others.",
        LANGUAGE,
    ),
    _counter(
        "prefix_prefills_total",
        "prefixes",
        "Times that SGLang was given the beginning of a prompt while other rows of it were on their way.",
        LANGUAGE,
    ),
    _counter("prefix_rows_total", "prefix_rows", "Rows that were prefilled then.", LANGUAGE),
    EVENTS,
    _histogram(
        "wait_seconds",
        "wait_s",
        "How long a request waited for its first receive blocks (language) or for the vision tower (encode).",
        _SECONDS,
    ),
    _histogram("transfer_seconds", "transfer_s", "From there to its last row.", _SECONDS),
    _histogram("request_rounds", "rounds", "Chunks of a request.", _ROUNDS),
    _histogram("request_rows", "rows", "Token rows of a request.", _ROWS),
    _histogram("request_bytes", "bytes", "Bytes of a request.", _BYTES),
)

EVENTS_ABOUT: Final = {
    Event.UNDECODABLE: "a control message was no message of this protocol",
    Event.REFUSED_CLIENTS: "a client with another key was refused at the control port (see security.md)",
    Event.ENGINES_RENEWED: "an engine was thrown away after a failed write, and made anew",
    Event.HANDSHAKE_REFUSED: "a language rank registered whose block size, types or version do not fit",
    Event.REGISTRATION_REFUSED: "there were too many sessions, or one was claimed that may be alive",
    Event.SESSION_DISPLACED: "an idle session was forgotten for a new one, and must register again",
    Event.MESSAGE_FOR_UNKNOWN_ROOM: "a message was about a room that is not, or not yet, under way",
    Event.STATUS_STALE: "a report said nothing new",
    Event.ACK_IGNORED: "an abort was acknowledged that was never sent",
    Event.OFFER_REPEATED: "a language rank sent an offer again, or that a room is queued, because no answer had come",
    Event.ABORT_IGNORED: "a room was aborted by a rank that is not part of it",
    Event.SUBMIT_REPEATED: "rows were handed to the transfer twice",
    Event.QUEUED_REPEATED: "a room that is known to wait for blocks was announced again, or too late",
    Event.INIT_REPEATED: "a first offer came again before its rows were written, as it does while the tower is slow",
    Event.RESUME_IGNORED: "a resume came again before its rows were written, or did not continue where its room is",
    Event.REPORT_REPEATED: "an offer came again whose rows were written: its report was lost, and was sent again",
    Event.PROMISE_IGNORED: "kept rows were promised for a room that is over, or by a rank that is not part of it",
    Event.OFFER_FOR_ENDED_ROOM: "blocks were offered to a room that is over",
    Event.OFFER_TURNED_AWAY: "blocks were offered by a rank that is not registered, or not part of the room",
}


class RelayMetrics:
    """An observer. prometheus_client is imported here and not before: SGLang first says where its files go."""

    def __init__(self, mode: str, labels: Mapping[str, Any], registry: CollectorRegistry | None = None) -> None:
        import prometheus_client as prometheus

        self._labels = {**labels, "mode": mode}
        self._gauges: dict[str, prometheus.Gauge] = {}
        self._counters: dict[str, prometheus.Counter] = {}
        self._histograms: dict[str, prometheus.Histogram] = {}
        self._seen: dict[str | Event | int, float] = {}
        where = registry or prometheus.REGISTRY
        for metric in METRICS:
            if mode not in metric.modes or metric.in_http:
                continue
            names = [*self._labels, *([metric.label] if metric.label else [])]
            about = (PREFIX + metric.name, metric.about, names)
            match metric.kind:
                case "gauge":
                    gauge = prometheus.Gauge(*about, registry=where, multiprocess_mode="mostrecent")
                    self._gauges[metric.source] = gauge.labels(**self._labels)
                case "counter":
                    counter = prometheus.Counter(*about, registry=where)
                    self._counters[metric.source] = counter if metric.label else counter.labels(**self._labels)
                case "histogram":
                    histogram = prometheus.Histogram(*about, registry=where, buckets=metric.buckets)
                    self._histograms[metric.source] = histogram.labels(**self._labels)
        for event in Event:
            # From the start: of a series that begins with its first event, Prometheus' `increase` is 0.
            self._counters[EVENTS.source].labels(**self._labels, event=event.value)

    def counted(self, numbers: Numbers) -> None:
        for name, size in numbers.sizes.items():
            if (gauge := self._gauges.get(name)) is not None:
                gauge.set(size)
        for name, total in numbers.totals.items():
            self._raise(self._counters.get(name), name, total)
        for event, times in numbers.events.items():
            self._raise(self._counters[EVENTS.source].labels(**self._labels, event=event.value), event, times)
        for code, rooms in numbers.failures.items():
            self._raise(self._ended(code), code, rooms)

    def _raise(self, counter: Any, key: str | Event | int, total: float) -> None:
        """Counters can only be incremented: by what has come to the total since it was seen last."""
        if counter is not None and (more := total - self._seen.get(key, 0)) > 0:
            counter.inc(more)
            self._seen[key] = total

    def succeeded(self, summary: Summary) -> None:
        self._ended(200).inc()
        for field, histogram in self._histograms.items():
            histogram.observe(getattr(summary, field))

    def parked(self, tables: Mapping[str, int]) -> None:
        for name, size in tables.items():
            self._gauges[name].set(size)

    def encoded(self, totals: Mapping[str, float]) -> None:
        for name, total in totals.items():
            self._raise(self._counters[name], name, total)

    prefilled = encoded

    def _ended(self, code: int) -> Any:
        return self._counters[REQUESTS.source].labels(**self._labels, status_code=code)


class AdmissionMetrics:
    """Of one HTTP process: `taken` and `waiting` are those of all HTTP processes of the instance together."""

    def __init__(self, mode: str, labels: Mapping[str, Any], registry: CollectorRegistry | None = None) -> None:
        import prometheus_client as prometheus

        self._labels = {**labels, "mode": mode}
        self._by_source: dict[str, Any] = {}
        where, names = registry or prometheus.REGISTRY, [*self._labels, CLASS]
        for metric in ADMISSION:
            about = (PREFIX + metric.name, metric.about, names)
            match metric.kind:
                case "gauge":
                    made: Any = prometheus.Gauge(*about, registry=where, multiprocess_mode="livesum")
                case "counter":
                    made = prometheus.Counter(*about, registry=where)
                case _:
                    made = prometheus.Histogram(*about, registry=where, buckets=metric.buckets)
            self._by_source[metric.source] = made
        for name in CLASSES if mode == ENCODE else CLASSES[-1:]:
            self._of("refused", name)  # from the start, as the events are

    def let_in(self, name: str, waited: float) -> None:
        """`name`: the class of the request."""
        self._of("waited", name).observe(waited)

    def refused(self, name: str) -> None:
        self._of("refused", name).inc()

    def stands(self, name: str, taken: int, waiting: int) -> None:
        self._of("taken", name).set(taken)
        self._of("waiting", name).set(waiting)

    def _of(self, source: str, name: str) -> Any:
        return self._by_source[source].labels(**self._labels, **{CLASS: name})


# ---- the page about them


def page_tables() -> str:
    """The tables of docs/metrics.md."""
    lines = ["| metric | kind | where | what it is |", "| --- | --- | --- | --- |"]
    rows: dict[str, tuple[Metric, set[str]]] = {}
    for metric in METRICS:
        rows.setdefault(metric.name, (metric, set()))[1].update(metric.modes)
    for metric, modes in rows.values():
        kind = f"{metric.kind} by `{metric.label}`" if metric.label else metric.kind
        where = "both" if modes == set(BOTH) else " and ".join(sorted(modes))
        lines.append(f"| `{PREFIX}{metric.name}` | {kind} | {where} | {metric.about} |")
    lines += ["", "| event | what happened |", "| --- | --- |"]
    lines += [f"| `{event.value}` | {about} |" for event, about in EVENTS_ABOUT.items()]
    return "\n".join(lines) + "\n"
