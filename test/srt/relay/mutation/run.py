"""Do the tests of the protocol notice what they should? One thing at a time is changed in it, and they are run.

    .venv/bin/python test/srt/relay/mutation/run.py                     all of protocol/: most of an hour
    .venv/bin/python test/srt/relay/mutation/run.py encode/room.py      one module
    .venv/bin/python test/srt/relay/mutation/run.py --every 10 --first 3     mutants 3, 13, 23 … of each module

A mutant is killed if a unit test fails, or a property test, or one of a few random schedules, or if it does not come to
an end. Prints those that survive, and how many there were. Some cannot be killed: they do the same as the original in
another way. Each one is tried in a process of its own, forked from this one, which never imports the protocol itself.
"""

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import hypothesis  # noqa: F401  imported here once, and not in each process
import msgspec  # noqa: F401
import pytest

REPO = Path(__file__).resolve().parents[4]
PROTOCOL = REPO / "python/embedding_relay/protocol"
TESTS = REPO / "test/srt/relay"
UNIT = ("encode_*", "language_*", "codec", "messages", "status", "timing", "scenarios")
PROPERTY = ("blocks", "plan", "codec", "encode_room")
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--assert=plain", "-k", "not hundred_thousand")
SEEDS = 6
PATIENCE_SECONDS = 30
MEMORY_BYTES = 4 << 30

sys.path.insert(0, str(REPO / "test/srt"))

from relay.mutation.mutants import Mutant, mutants  # noqa: E402


class Tried(NamedTuple):
    module: str
    mutant: Mutant
    killed_by: str
    """Empty if it survived."""


class Instead(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """When this module is imported, it is another one."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        self._module, self._path, self._source = module, path, source

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._module:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, self._path, "exec"), module.__dict__)


def test_files(module: str) -> list[str]:
    """The tests that are meant for this module come first."""
    files = [path for pattern in UNIT for path in sorted((TESTS / "unit").glob(f"test_{pattern}.py"))]
    files += [TESTS / f"property/test_{name}.py" for name in PROPERTY]
    own = f"test_{module.removesuffix('.py').replace('/', '_')}.py"
    return [str(path) for path in sorted(files, key=lambda path: path.name != own)]


def random_schedules() -> str:
    """Empty if nothing was seen; else what it was seen by."""
    from support.hostile import Seeded, run_attack, run_attack_with_faults, run_insider_attack
    from support.schedules import (
        run_chaos,
        run_lossy,
        run_offers_and_reports_lost,
        run_one_data_plane_dies,
        run_one_side_dies,
        run_orderly,
        run_slow,
    )

    schedules = [run_chaos, run_one_data_plane_dies, run_orderly, run_lossy, run_offers_and_reports_lost]
    for seed in range(SEEDS):
        for schedule in (*schedules, run_one_side_dies, run_slow):
            try:
                schedule(seed)
            except Exception as error:
                return f"{schedule.__name__}: {error}"
        for attack in (run_attack, run_attack_with_faults, run_insider_attack):
            try:
                attack(Seeded(seed))
            except Exception as error:
                return f"{attack.__name__}: {error}"
    return ""


def try_here(module: str, mutant: Mutant) -> str:
    """In the process of its own: who has killed it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.environ["RELAY_SCHEDULES"] = "50"
    name = "embedding_relay.protocol." + module.removesuffix(".py").replace("/", ".")
    sys.meta_path.insert(0, Instead(name, PROTOCOL / module, mutant.source))
    if pytest.main([*OPTIONS, *test_files(module)]) != 0:
        return "tests"
    return random_schedules()


def try_one(module: str, mutant: Mutant) -> str:
    """Nothing of what the tests print is of interest."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        os.close(reader)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        killed_by = "the module cannot be imported"
        try:
            killed_by = try_here(module, mutant)
        finally:
            os.write(writer, (killed_by or "nobody").encode()[:200])
            os._exit(0)
    os.close(writer)
    if not select.select([reader], [], [], PATIENCE_SECONDS)[0]:
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reader, "rb") as said:
        answer = said.read().decode(errors="replace")
    os.waitpid(pid, 0)
    return "" if answer == "nobody" else answer or "time"


def try_all(modules: Sequence[str], first: int, every: int) -> Iterator[Tried]:
    for module in modules:
        for mutant in itertools.islice(mutants((PROTOCOL / module).read_text()), first, None, every):
            yield Tried(module, mutant, try_one(module, mutant))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = sorted(str(path.relative_to(PROTOCOL)) for path in PROTOCOL.rglob("[!_]*.py"))
    parser.add_argument("modules", nargs="*", default=everything, help="paths below protocol/")
    parser.add_argument("--every", type=int, default=1, help="try one of so many")
    parser.add_argument("--first", type=int, default=0, help="beginning with this one")
    options = parser.parse_args()
    began, tried, survived = time.monotonic(), dict.fromkeys(options.modules, 0), dict.fromkeys(options.modules, 0)
    if try_one(options.modules[0], Mutant(0, "nothing", (PROTOCOL / options.modules[0]).read_text())):
        sys.exit("the tests fail although nothing is changed")
    for module, mutant, killed_by in try_all(options.modules, options.first, options.every):
        tried[module] += 1
        if not killed_by:
            survived[module] += 1
            print(f"survived: {module}:{mutant.line}: {mutant.change}", flush=True)
    for module in options.modules:
        print(f"{module}: {tried[module]} mutants, {tried[module] - survived[module]} killed")
    total, left = sum(tried.values()), sum(survived.values())
    percent = 100 * (total - left) / max(1, total)
    print(f"{total} mutants, {total - left} killed ({percent:.1f} %), in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
