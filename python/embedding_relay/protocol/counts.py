"""What both sides count besides their tables: unusual events by name, and failed rooms by status code."""

from __future__ import annotations

import collections
import enum


class Event(enum.Enum):
    """What a healthy pair rarely meets. The value is the label of the metric; docs/metrics.md explains each."""

    # ---- the control connections and the engines
    UNDECODABLE = "undecodable"
    REFUSED_CLIENTS = "refused_clients"
    ENGINES_RENEWED = "engines_renewed"
    # ---- the encode side
    HANDSHAKE_REFUSED = "handshake_refused"
    REGISTRATION_REFUSED = "registration_refused"
    SESSION_DISPLACED = "session_displaced"
    ABORT_IGNORED = "abort_ignored"
    SUBMIT_REPEATED = "submit_repeated"
    QUEUED_REPEATED = "queued_repeated"
    INIT_REPEATED = "init_repeated"
    RESUME_IGNORED = "resume_ignored"
    OFFER_FOR_ENDED_ROOM = "offer_for_ended_room"
    OFFER_TURNED_AWAY = "offer_turned_away"
    REPORT_REPEATED = "report_repeated"
    PROMISE_IGNORED = "promise_ignored"
    # ---- the language side
    MESSAGE_FOR_UNKNOWN_ROOM = "message_for_unknown_room"
    STATUS_STALE = "status_stale"
    ACK_IGNORED = "ack_ignored"
    OFFER_REPEATED = "offer_repeated"


class Counts:
    """Since the start of one side."""

    def __init__(self) -> None:
        self.events: collections.Counter[Event] = collections.Counter()
        self.failures: collections.Counter[int] = collections.Counter()
        """Rooms that failed, by the status code that their clients got."""
