"""Do the tests of a part notice what they should? One thing at a time is changed in it, and they are run.

    .venv/bin/python test/srt/relay/mutation/run.py protocol                    all of protocol/: most of an hour
    .venv/bin/python test/srt/relay/mutation/run.py protocol encode/room.py     one module
    .venv/bin/python test/srt/relay/mutation/run.py memory --every 10 --first 3     mutants 3, 13, 23 … of each module
    .venv/bin/python test/srt/relay/mutation/run.py memory --again FILE      those that survived a run that printed this

A mutant is killed if a test that is meant for its module fails, or (of the protocol) one of a few random schedules, or
if it does not come to an end. Prints those that survive, and how many there were. Some cannot be killed: they do the
same as the original in another way. Each one is tried in a process of its own, forked from this one, which has imported
what takes long and never the part itself. The processes that its tests start are forked from it, and have it too.

A test that fails by chance would kill mutants that nothing notices. So the tests of each module are run with nothing
changed too, before its mutants and after them. With --verbose it says which test has killed which mutant.
"""

import argparse
import contextlib
import gc
import importlib
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
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import resource_tracker, util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import hypothesis  # noqa: F401  imported here once, and not in each process
import msgspec  # noqa: F401
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from relay.mutation.mutants import Mutant, mutants
from relay.mutation.parts import PARTS, Part
from support import forks

OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--assert=plain", "-k", "not hundred_thousand")
MEMORY_BYTES = 8 << 30
# What a mutant may take: so long, and some times what the unchanged module takes, because machines have other things to
# do too.
PATIENCE_SECONDS = 10
PATIENCE_TIMES = 3
LONGEST_SECONDS = 600


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


class Witness:
    """Remembers the first test that failed."""

    failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid.rpartition("/")[2]


# ---- in the process of a mutant


def try_here(part: Part, module: str, source: str) -> str:
    """Who has killed it."""
    os.setsid()  # so that whatever its tests leave behind can be ended together with it
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    os.environ["RELAY_SCHEDULES"] = "50"
    sys.meta_path.insert(0, Instead(part.name_of(module), part.folder / module, source))
    util.spawnv_passfds, forks.LOG = fork_server_from_here, Path(os.devnull)
    for files in part.test_files(module):
        witness = Witness()
        if pytest.main([*OPTIONS, *files], plugins=[witness]) != 0:
            return witness.failed or "a test module that cannot be imported"
    return part.more(module)


def fork_server_from_here(path: bytes, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    """In place of a new interpreter, which would import the module as it is, and everything else anew."""
    if (pid := os.fork()) == 0:
        try:
            exec(arguments[-1], {})
        finally:
            os._exit(0)
    return pid


# ---- in this process


def try_one(part: Part, module: str, source: str, patience: float = LONGEST_SECONDS) -> str:
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
            killed_by = try_here(part, module, source)
        finally:
            os.write(writer, (killed_by or "nobody").encode()[:200])
            os._exit(0)
    os.close(writer)
    is_over = select.select([reader], [], [], patience)[0]
    answer = os.read(reader, 200).decode(errors="replace") if is_over else ""
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):  # nothing is left of its group
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "" if answer == "nobody" else answer or "time"


def import_once(part: Part) -> None:
    """And start nothing that a fork would lose."""
    resource_tracker.ensure_running()
    for name in part.imports:
        importlib.import_module(name)
    if early := [module for module in part.every_module() if part.name_of(module) in sys.modules]:
        sys.exit(f"{early} cannot be changed any more: something that is imported first imports it")
    gc.collect()
    gc.freeze()


def seconds_unchanged(part: Part, module: str) -> float:
    began = time.monotonic()
    if killed_by := try_one(part, module, (part.folder / module).read_text()):
        sys.exit(f"{module}: {killed_by} fails although nothing is changed")
    return time.monotonic() - began


def report(one: Tried) -> str:
    fate = f"killed by {one.killed_by}" if one.killed_by else "survived"
    return f"{fate}: {one.module}:{one.mutant.line}: {one.mutant.change}"


def try_all(part: Part, chosen: Mapping[str, Sequence[Mutant]]) -> Iterator[Tried]:
    seconds = {module: seconds_unchanged(part, module) for module, some in chosen.items() if some}
    for module in seconds:
        print(f"{module}: {len(chosen[module])} mutants, {seconds[module]:.1f} s for each that survives")
    print(f"at most {sum(len(chosen[one]) * seconds[one] for one in seconds) / 60:.0f} minutes for all", flush=True)
    for module in seconds:
        patience = PATIENCE_SECONDS + PATIENCE_TIMES * seconds[module]
        for mutant in chosen[module]:
            yield Tried(module, mutant, try_one(part, module, mutant.source, patience))
        seconds_unchanged(part, module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("modules", nargs="*", help="paths below the folder of the part; without any, all of it")
    parser.add_argument("--every", type=int, default=1, help="try one of so many")
    parser.add_argument("--first", type=int, default=0, help="beginning with this one")
    parser.add_argument("--again", type=argparse.FileType(), metavar="FILE", help="try what survived then")
    parser.add_argument("--verbose", action="store_true", help="say of each mutant what has killed it")
    options = parser.parse_args()
    part = PARTS[options.part]
    modules: Sequence[str] = options.modules or part.every_module()
    import_once(part)
    chosen = {
        module: list(itertools.islice(mutants((part.folder / module).read_text()), options.first, None, options.every))
        for module in modules
    }
    if options.again:
        earlier = {line.rstrip() for line in options.again}
        for module, all_of_them in chosen.items():
            chosen[module] = [mutant for mutant in all_of_them if report(Tried(module, mutant, "")) in earlier]
    began, tried, survived = time.monotonic(), dict.fromkeys(modules, 0), dict.fromkeys(modules, 0)
    for one in try_all(part, chosen):
        tried[one.module] += 1
        survived[one.module] += not one.killed_by
        if options.verbose or not one.killed_by:
            print(report(one), flush=True)
    for module in modules:
        print(f"{module}: {tried[module]} mutants, {tried[module] - survived[module]} killed")
    total, left = sum(tried.values()), sum(survived.values())
    percent = 100 * (total - left) / max(1, total)
    print(f"{total} mutants, {total - left} killed ({percent:.1f} %), in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
