"""`sglang-relay doctor`: what would go wrong on a machine or between two instances, found before it does."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from typing import Final

from embedding_relay.tools import doctor_machine, doctor_peer
from embedding_relay.tools.doctor_machine import Finding, Outcome, failed, guarded

_MACHINE: Final = "this machine"
_NAME_WIDTH: Final = 15
_NARROWEST: Final = 60
_WIDEST: Final = 120
_COLOURS: Final = {Outcome.OK: "32", Outcome.WARNING: "33", Outcome.FAILED: "31", Outcome.SKIPPED: "2"}
_WORDS: Final = {Outcome.OK: "ok", Outcome.WARNING: "warn", Outcome.FAILED: "FAIL", Outcome.SKIPPED: "-"}


def run(arguments: argparse.Namespace) -> int:
    """0: nothing failed, whatever there is to be warned of. 1: something failed."""
    try:
        return _examine(arguments)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads the lines has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _examine(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    found: list[tuple[str, Finding]] = []
    report = Report(sys.stdout.isatty())
    for about, finding in findings(arguments):
        found.append((about, finding))
        if not arguments.json:
            report.show(about, finding)
    seconds = time.monotonic() - started
    outcomes = Counter(finding.outcome for _, finding in found)
    is_well = not outcomes[Outcome.FAILED]
    if arguments.json:
        told = [{"about": about, **dataclasses.asdict(finding)} for about, finding in found]
        print(json.dumps({"ok": is_well, "seconds": round(seconds, 3), "findings": told}, indent=2))
    else:
        print(f"\n{len(found)} checks in {seconds:.1f} s: {_counted(outcomes)}")
    sys.stdout.flush()
    return 0 if is_well else 1


def _counted(outcomes: Counter[Outcome]) -> str:
    words = {Outcome.OK: "ok", Outcome.WARNING: "warned", Outcome.FAILED: "failed", Outcome.SKIPPED: "skipped"}
    return ", ".join(f"{outcomes[outcome]} {word}" for outcome, word in words.items() if outcomes[outcome])


def findings(arguments: argparse.Namespace) -> Iterator[tuple[str, Finding]]:
    """In the order in which they are shown; what takes long comes last."""
    for name, check in doctor_machine.CHECKS:
        yield _MACHINE, guarded(name, check)
    for finding in _guarded_transfer(arguments.host):
        yield _MACHINE, finding
    if arguments.thorough:
        yield _MACHINE, guarded("import", doctor_machine.apply_hooks)
    yield from doctor_peer.check_peers(arguments.peer, arguments.api_key)


def _guarded_transfer(host: str) -> list[Finding]:
    try:
        return doctor_machine.check_transfer(host)
    except Exception as error:
        return [failed("transfer", f"this check failed itself: {error!r}", "report it, with this line")]


class Report:
    """Findings as lines of a terminal, each as soon as it is there."""

    def __init__(self, coloured: bool) -> None:
        self._coloured = coloured
        self._about = ""
        self._width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))

    def show(self, about: str, finding: Finding) -> None:
        if about != self._about:
            print(about if not self._about else f"\n{about}")
            self._about = about
        word = f"{_WORDS[finding.outcome]:4}"
        if self._coloured:
            word = f"\033[{_COLOURS[finding.outcome]}m{word}\033[0m"
        first, *rest = self._wrapped(finding.said)
        print(f"  {word}  {finding.name:{_NAME_WIDTH}}{first}")
        lines = rest + (self._wrapped(f"-> {finding.todo}") if finding.todo else [])
        for line in lines:
            print(f"{'':{8 + _NAME_WIDTH}}{line}")
        sys.stdout.flush()

    def _wrapped(self, text: str) -> list[str]:
        """What a peer has said may not move the cursor."""
        shown = "".join(character if character.isprintable() else "?" for character in text)
        return textwrap.wrap(shown, self._width - 8 - _NAME_WIDTH, break_on_hyphens=False) or [""]
