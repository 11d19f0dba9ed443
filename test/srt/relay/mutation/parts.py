"""The parts that the mutation tester can try, and which tests are meant for which of their modules."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from support.repo import REPO

_TESTS: Final = REPO / "test/srt/relay"
_SEEDS: Final = 6


def _no_more(module: str) -> str:
    return ""


class Part(NamedTuple):
    package: str
    tests: Callable[[str], Sequence[str]]
    """Of a module: paths below relay/ without `test_` and `.py`. Those that are meant for it, or quick, come first."""
    modules: tuple[str, ...] = ()
    """Paths below the package; all that are there if it names none."""
    imports: tuple[str, ...] = ()
    """What its tests import that takes long, opens nothing, and imports nothing of the part itself."""
    more: Callable[[str], str] = _no_more
    """Run when all tests have passed. Empty if it noticed nothing, else what it noticed."""

    @property
    def folder(self) -> Path:
        return REPO / "python" / self.package.replace(".", "/")

    def every_module(self) -> tuple[str, ...]:
        found = (str(path.relative_to(self.folder)) for path in self.folder.rglob("[!_]*.py"))
        return self.modules or tuple(sorted(found))

    def name_of(self, module: str) -> str:
        return f"{self.package}.{module.removesuffix('.py').replace('/', '.')}"

    def test_files(self, module: str) -> list[list[str]]:
        """One list for each run of pytest: a lane has things to say about its whole process."""
        lanes: dict[str, list[str]] = {}
        for test in self.tests(module):
            lane, _, name = test.partition("/")
            lanes.setdefault(lane, []).append(str(_TESTS / lane / f"test_{name}.py"))
        return list(lanes.values())


# ---- the protocol: everything that needs no thread and no socket


def _protocol_tests(module: str) -> list[str]:
    patterns = ("encode_*", "language_*", "codec", "ended", "messages", "status", "timing", "scenarios")
    files = [path for pattern in patterns for path in sorted((_TESTS / "unit").glob(f"test_{pattern}.py"))]
    own = f"test_{module.removesuffix('.py').replace('/', '_')}.py"
    files.sort(key=lambda path: path.name != own)
    properties = [f"property/{name}" for name in ("blocks", "plan", "codec", "encode_room")]
    return [f"unit/{path.stem.removeprefix('test_')}" for path in files] + properties


def _random_schedules(module: str) -> str:
    from support.hostile import Seeded, run_attack, run_attack_with_faults, run_insider_attack
    from support.schedules import KINDS_OF_SCHEDULES

    for seed in range(_SEEDS):
        for schedule in KINDS_OF_SCHEDULES:
            try:
                schedule(seed)
            except Exception as error:
                return f"{schedule.__name__}: {error}"
        for attack in (run_attack, run_attack_with_faults, run_insider_attack):
            try:
                attack(Seeded(seed), keeps_rows=bool(seed % 2))
            except Exception as error:
                return f"{attack.__name__}: {error}"
    return ""


# ---- the others: whatever mirrors a module, and what else is meant for it


def _mirrors(also: Mapping[str, Sequence[str]]) -> Callable[[str], list[str]]:
    def tests(module: str) -> list[str]:
        own = (f"{lane}/{module.removesuffix('.py')}" for lane in ("unit", "property", "loopback", "sglang_unit"))
        return [*filter(_exists, own), *also.get(module, ())]

    return tests


def _exists(test: str) -> bool:
    lane, _, name = test.partition("/")
    return (_TESTS / lane / f"test_{name}.py").exists()


_MEMORY: Final = {
    "buffers.py": ("loopback/transfer", "loopback/device"),
    "handshake.py": ("unit/engine", "unit/quiet"),
    "layout.py": ("loopback/buffers", "loopback/transfer"),
    "plane.py": ("loopback/buffers",),
    "quiet.py": ("unit/engine", "loopback/engine"),
}
_TRANSPORT: Final = {
    "curve.py": ("loopback/security", "loopback/loop"),
    "encode.py": ("loopback/transfer", "loopback/threads", "loopback/metrics", "loopback/failures"),
    "language.py": ("loopback/transfer", "loopback/threads", "loopback/metrics", "loopback/failures"),
    "loop.py": ("loopback/threads", "loopback/security", "loopback/failures"),
    "manager.py": ("loopback/status_board", "loopback/threads", "loopback/security", "loopback/failures"),
    "sockets.py": ("loopback/loop", "loopback/security", "loopback/hostile"),
    "workers.py": ("loopback/transfer", "loopback/threads", "loopback/failures"),
}
_HALVES: Final = ("multimodal_embedding.py", "multimodal_language.py", "prefix.py", "turns.py")

PARTS: Final[Mapping[str, Part]] = {
    "protocol": Part("embedding_relay.protocol", _protocol_tests, more=_random_schedules),
    "memory": Part("embedding_relay.memory", _mirrors(_MEMORY), imports=("torch", "zmq")),
    "transport": Part("embedding_relay.transport", _mirrors(_TRANSPORT), imports=("torch", "zmq")),
    "halves": Part(
        "sglang.srt.disaggregation.multimodal",
        _mirrors(dict.fromkeys(_HALVES, ("sglang_unit/roles", "sglang_unit/ranks"))),
        _HALVES,
        ("support.scheduler", "support.tokenizing"),
    ),
}
