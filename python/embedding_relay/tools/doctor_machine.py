"""What `sglang-relay doctor` looks at on this machine. Each check is a function that returns what it found."""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import enum
import errno
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from packaging.version import Version

from embedding_relay import __version__, config, cores, doors
from embedding_relay.config import RelayConfig
from embedding_relay.protocol.errors import SettingError

_PYTHONS: Final = ((3, 11), (3, 13))
_SGLANG_EXTRA: Final = "pip install 'sglang-embedding-relay[sglang]'"
# All three provide `mooncake.engine`.
WHEELS: Final = (
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
    "mooncake-transfer-engine-non-cuda",
)
_CONFIRMS_WRITES: Final = Version("0.3.12")
_LIBRARIES: Final = {
    "libibverbs.so.1": "libibverbs1",
    "librdmacm.so.1": "librdmacm1",
    "libnuma.so.1": "libnuma1",
}
# Of FFmpeg 4 to 8.
_FFMPEG: Final = tuple(f"libavutil.so.{major}" for major in range(60, 55, -1))
_PORTS: Final = {"--port": 30000, "--disaggregation-bootstrap-port": 8998}
_SMALL_SHM: Final = 64 << 20
# What `adjtimex` answers, or says in its state, when nothing sets this clock.
_NOT_SYNCHRONISED: Final = 5
_TIMEX_BYTES: Final = 512
_TRANSFER_TIMEOUT: Final = 60.0
_IMPORT_TIMEOUT: Final = 180.0
# The hooks are applied as SGLang does it at the start of a server. What it imports may write to stdout as well.
APPLY_HOOKS: Final = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.disaggregation.multimodal import hooks
from embedding_relay.protocol.errors import SettingError
try:
    hooks.verify()
except SettingError as error:
    raise SystemExit(f"doctor: {error}")
"""


class Outcome(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    """Something works now, and may not later, or not for all that somebody may want."""
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found, for a person, and `facts` for a script."""

    name: str
    outcome: Outcome
    said: str
    todo: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def ok(name: str, said: str, **facts: Any) -> Finding:
    return Finding(name, Outcome.OK, said, "", facts)


def warning(name: str, said: str, todo: str, **facts: Any) -> Finding:
    return Finding(name, Outcome.WARNING, said, todo, facts)


def failed(name: str, said: str, todo: str, **facts: Any) -> Finding:
    return Finding(name, Outcome.FAILED, said, todo, facts)


def skipped(name: str, why: str) -> Finding:
    return Finding(name, Outcome.SKIPPED, why)


def guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """A check that fails itself is a finding like any other: the others go on."""
    try:
        return check()
    except Exception as error:
        return failed(name, f"this check failed itself: {error!r}", "report it, with this line")


def settings() -> RelayConfig:
    """Of this environment; the defaults if they are wrong, which is a finding of its own."""
    try:
        return RelayConfig.from_environment()
    except SettingError:
        return RelayConfig()


# ---- software


def check_python() -> Finding:
    here = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    first, last = (".".join(map(str, version)) for version in _PYTHONS)
    if sys.platform != "linux":
        return failed("python", f"{here}: instances run on Linux only", "use a Linux machine")
    if not _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]:
        return failed("python", f"{here}; supported are {first} to {last}", f"make an environment of Python {last}")
    return ok("python", here, version=platform.python_version())


def check_plugin() -> Finding:
    """SGLang finds the plugin by its entry point."""
    names = {entry.name for entry in importlib.metadata.entry_points(group="sglang.srt.plugins")}
    if "embedding_relay" not in names:
        return failed(
            "plugin",
            f"{__version__} can be imported, but is not installed: SGLang finds no entry point of it",
            "pip install it into this environment",
        )
    return ok("plugin", __version__, version=__version__)


def sglang_version() -> str | None:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def _ours(module: str) -> ModuleSpec:
    """Of a module of ours below SGLang's name, without an import of its package, which would import SGLang."""
    doors.open_doors()
    finder = next(one for one in sys.meta_path if type(one).__name__ == doors.DoorFinder.__name__)
    spec = finder.find_spec(f"sglang.srt.disaggregation.multimodal.{module}", None)
    assert spec is not None
    return spec


def compatibility() -> ModuleType:
    """The module that knows which versions are tested, which imports nothing of SGLang itself."""
    spec = _ours("compatibility")
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_sglang() -> Finding:
    version = sglang_version()
    if version is None:
        return failed("sglang", "SGLang is not installed in this environment", _SGLANG_EXTRA)
    known = compatibility()
    if version in known.TESTED_SGLANG:
        return ok("sglang", f"{version}, which is tested", version=version)
    tested = " and ".join(known.TESTED_SGLANG)
    if known.may_serve():
        said = f"{version}, which nobody has tested; {config.UNTESTED_SGLANG} lets it start"
        return warning("sglang", said, f"install {tested} for anything that matters", version=version)
    todo = f"install one of these, or set {config.UNTESTED_SGLANG}=1 to try this one all the same"
    return failed("sglang", f"{version} is not tested, only {tested} are: the modes refuse to start", todo)


def check_hooks() -> Finding:
    """By SGLang's sources, which takes no time. Whether they apply is known when they are applied: `apply_hooks`."""
    spec = importlib.util.find_spec("sglang") if sglang_version() else None
    if spec is None or spec.origin is None:
        return skipped("hooks", "there is no SGLang to change")
    place = Path(spec.origin).parent.parent
    targets = hook_targets(Path(_ours("hooks").origin or "").read_text())
    if missing := [target for target in targets if not _is_in(place, target)]:
        said = f"this SGLang lacks what these hooks change: {', '.join(missing)}"
        return failed("hooks", said, "install a tested SGLang; see docs/compatibility.md", missing=missing)
    return ok("hooks", f"SGLang has all {len(targets)} functions that they change")


def hook_targets(source: str) -> list[str]:
    """The targets of the table in `hooks.py`, from its text."""
    tree, constants, found = ast.parse(source), {}, []
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant):
            constants[ast.unparse(node.target)] = node.value.value
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "HOOKS":
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and ast.unparse(call.func) == "Hook"]
            found = [eval(ast.unparse(call.args[0]), {"__builtins__": {}}, constants) for call in calls]
    return found


def _is_in(place: Path, target: str) -> bool:
    names = target.split(".")
    while names and not (place.joinpath(*names).with_suffix(".py")).is_file():
        names.pop()
    text = _text(place.joinpath(*names).with_suffix(".py")) if names else ""
    *classes, function = target.split(".")[len(names) :]
    known = [rf"^class {name}\b" for name in classes] + [rf"^\s*(async )?def {function}\b"]
    return bool(text) and all(re.search(pattern, text, re.MULTILINE) for pattern in known)


def apply_hooks() -> Finding:
    """As at the start of a server, in a process of its own: what SGLang imports takes time, and may end its process."""
    if sglang_version() is None:
        return skipped("import", "there is no SGLang to import")
    try:
        ended = _run([sys.executable, "-c", APPLY_HOOKS], _IMPORT_TIMEOUT)
    except subprocess.TimeoutExpired:
        said = f"SGLang was not imported within {_IMPORT_TIMEOUT:g} s"
        return failed("import", said, "look at the load of the machine, and at its disk")
    if not ended.returncode:
        return ok("import", "SGLang can be imported here, and every hook applies")
    last = _last_line(ended.stderr)
    if last.startswith("doctor: "):
        return failed("import", last.removeprefix("doctor: "), "see docs/compatibility.md")
    how = f"status {ended.returncode}" if ended.returncode > 0 else f"signal {-ended.returncode}"
    todo = "run `python -c 'import sglang.srt.managers.scheduler'` and mend what it says"
    return failed("import", f"SGLang cannot be imported ({how}): {last}", todo)


def check_settings() -> Finding:
    try:
        RelayConfig.from_environment()
    except SettingError as error:
        return failed("settings", f"no instance starts in this environment: {error}", "correct that variable")
    if wrong := config.misspelt():
        said = "; ".join(f"{name} is no setting" for name in wrong)
        return warning("settings", said, "did you mean " + ", ".join(wrong.values()) + "?", misspelt=wrong)
    return ok("settings", "all variables of this environment have values that work")


# ---- the transfer engine


def wheels() -> dict[str, str]:
    """Which of the wheels are installed, and their versions."""
    found = {}
    for name in WHEELS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_wheel() -> Finding:
    if settings().data_plane == config.SHARED_MEMORY:
        return skipped("wheel", f"{config.DATA_PLANE}={config.SHARED_MEMORY} uses no Mooncake")
    found = wheels()
    said = ", ".join(f"{name} {version}" for name, version in found.items())
    if len(found) > 1:
        todo = f"pip uninstall {' '.join(found)}; then install one of them again"
        return failed("wheel", f"{said}: they provide the same module, and overwrite each other's files", todo)
    if not found:
        if importlib.util.find_spec("mooncake") is None:
            return failed("wheel", "no transfer engine is installed", "pip install 'sglang-embedding-relay[cpu]'")
        return ok("wheel", "mooncake is there, but of no wheel: see the test transfer")
    [(name, version)] = found.items()
    if Version(version) < _CONFIRMS_WRITES:
        text = f"{said} confirms no writes over TCP: an instance with it does not start there"
        return failed("wheel", text, f"pip install --upgrade '{name}>={_CONFIRMS_WRITES}'")
    return ok("wheel", f"{said}, which confirms writes", wheel=name, version=version)


def check_libraries() -> Finding:
    """What Mooncake's wheels link and do not bring along."""
    if settings().data_plane == config.SHARED_MEMORY:
        return skipped("libraries", "they are Mooncake's")
    missing = [package for name, package in _LIBRARIES.items() if not _loads(name)]
    if missing:
        todo = f"apt-get install {' '.join(missing)}"
        return failed("libraries", f"the transfer engine lacks {', '.join(missing)}", todo, missing=missing)
    return ok("libraries", f"{', '.join(_LIBRARIES.values())}: all that the transfer engine links")


def check_ffmpeg() -> Finding:
    if any(map(_loads, _FFMPEG)):
        return ok("ffmpeg", "its libraries are there: an encode instance can decode videos")
    said = "its libraries are missing: an encode instance answers requests with videos with 500"
    return warning("ffmpeg", said, "apt-get install ffmpeg, if your encode instances are to take videos")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


# ---- the machine


def check_ports(ports: Mapping[str, int] = _PORTS) -> Finding:
    taken = {flag: port for flag, port in ports.items() if _is_taken(port)}
    if not taken:
        free = " and ".join(map(str, ports.values()))
        return ok("ports", f"{free}, the defaults of {' and '.join(ports)}, are free")
    said = "; ".join(f"{port} is taken" for port in taken.values())
    todo = f"if not by the instance that you are about, give yours another {' and another '.join(taken)}"
    return warning("ports", said, todo, taken=list(taken.values()))


def _is_taken(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def check_devices(root: Path = Path("/")) -> Finding:
    """An instance takes RDMA where there is a device, and does not start if that does not come up."""
    ports = {path.parent: _text(path) for path in sorted(root.glob("sys/class/infiniband/*/ports/*/state"))}
    devices = sorted({path.parent.parent.name for path in ports})
    asked = settings().transport
    if not devices:
        if asked not in (None, "tcp"):
            said = f"{config.MOONCAKE_PROTOCOL}={asked} is set, and there is no device in /sys/class/infiniband"
            return failed("rdma", said, f"unset it, or set {config.MOONCAKE_FORCE_TCP}=1, to go over TCP")
        return ok("rdma", "there is no device: rows for other hosts go over TCP", devices=[])
    if asked == "tcp":
        return ok("rdma", f"{', '.join(devices)}; not used, because TCP was asked for", devices=devices)
    if flaws := list(_flaws_of_devices(root, ports)):
        todo = f"mend that, or set {config.MOONCAKE_FORCE_TCP}=1 to go over TCP; see docs/operations.md, RDMA or TCP"
        return failed("rdma", f"{', '.join(devices)}: {'; '.join(flaws)}", todo, devices=devices)
    return ok("rdma", f"{', '.join(devices)}, with a port that is up", devices=devices)


def _flaws_of_devices(root: Path, ports: Mapping[Path, str]) -> Iterator[str]:
    if not any("ACTIVE" in state for state in ports.values()):
        yield "no port is up"
    if not any((root / "dev/infiniband").glob("uverbs*")):
        yield "/dev/infiniband has no device file (a container gets them with --device /dev/infiniband)"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY:
        yield f"only {limit >> 10} KiB may be locked in memory (a container needs --ulimit memlock=-1)"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def check_shm(path: str = "/dev/shm") -> Finding:
    """Not for our rows, which need none of it."""
    try:
        facts = os.statvfs(path)
    except OSError as error:
        said = f"{path}: {error.strerror}; processes of SGLang that share memory by name need it"
        return warning("/dev/shm", said, "mount a tmpfs there")
    size, free = facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize
    said = f"{free >> 20} of {size >> 20} MiB are free"
    if free < _SMALL_SHM or size <= _SMALL_SHM:
        todo = "docker run --shm-size 8g, or a larger emptyDir of medium Memory"
        text = f"{said}: enough for the relay, which uses none, and little for several ranks of SGLang"
        return warning("/dev/shm", text, todo, bytes=size, free=free)
    return ok("/dev/shm", f"{said} (the relay uses none)", bytes=size, free=free)


def check_clock() -> Finding:
    """With a secret, the clocks of all machines must agree to within a minute."""
    state = _clock_state()
    if state is None:
        return skipped("clock", "the kernel does not say whether anything sets this clock")
    if state == _NOT_SYNCHRONISED:
        said = "nothing sets this clock; with a secret, instances whose clocks are a minute apart refuse each other"
        return warning("clock", said, "run chrony or systemd-timesyncd on this machine (or on its host)")
    return ok("clock", "something keeps this clock in step")


def _clock_state() -> int | None:
    state = int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))  # zeros: change nothing
    return None if state < 0 else state


def check_cores(environ: Mapping[str, str] = os.environ) -> Finding:
    """Where an instance computes on the CPU, threads that wait for a core hold up those that have one."""
    affinity, usable = len(os.sched_getaffinity(0)), cores.usable_cores()
    said = f"{usable} usable" + (f", because a quota allows no more of {affinity}" if usable < affinity else "")
    threads = environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > usable:
        text = f"OMP_NUM_THREADS={threads}, and {said}: on the CPU, threads would wait for each other"
        return warning("cores", text, "unset it: an instance on the CPU finds the right number", usable=usable)
    if usable < 2:
        todo = "give the instance at least two: one computes, one receives rows and answers clients"
        return warning("cores", said, todo, usable=usable)
    return ok("cores", said, usable=usable)


# ---- the test transfer


def check_transfer(host: str = "127.0.0.1") -> list[Finding]:
    """From this machine to itself, by every way that rows may take here. What may crash is in a process of its own."""
    asked = settings()
    planes = [plane for plane in (config.MOONCAKE, config.SHARED_MEMORY) if asked.data_plane in (config.AUTO, plane)]
    job = {"local": {"host": host, "transport": asked.transport, "planes": planes}}
    answer = transfer_process(job)
    return [_finding_of(plane, answer.get(plane, answer)) for plane in planes]


def transfer_process(job: Mapping[str, Any], timeout: float = _TRANSFER_TIMEOUT) -> dict[str, Any]:
    """What `doctor_transfer` says; `error` if it came to nothing."""
    command = [sys.executable, "-m", "embedding_relay.tools.doctor_transfer"]
    try:
        ended = _run(command, timeout, json.dumps(job))
    except subprocess.TimeoutExpired:
        return {"error": f"it did not end within {timeout:g} s"}
    try:
        answer = json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"its process ended with {ended.returncode}: {_last_line(ended.stderr)}"}
    return answer if isinstance(answer, dict) else {"error": "its process said nothing that makes sense"}


def _finding_of(plane: str, answer: Mapping[str, Any]) -> Finding:
    name = plane.replace("_", " ")
    if "error" in answer:
        if plane == config.SHARED_MEMORY:
            todo = "rows between instances of this host go over Mooncake then; docs/operations.md, On one host"
            return warning(name, answer["error"], todo)
        return failed(name, answer["error"], "see the lines above; docs/operations.md, RDMA or TCP")
    return ok(name, f"{shown_bytes(answer['bytes'])} over {answer['over']}, {shown_rate(answer)}", **answer)


def shown_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"


def shown_rate(answer: Mapping[str, Any]) -> str:
    return f"{shown_bytes(answer['bytes_per_s'])}/s"


def _run(command: list[str], timeout: float, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=said, capture_output=True, text=True, errors="replace", timeout=timeout)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"


CHECKS: Final[tuple[tuple[str, Callable[[], Finding]], ...]] = (
    ("python", check_python),
    ("plugin", check_plugin),
    ("sglang", check_sglang),
    ("hooks", check_hooks),
    ("settings", check_settings),
    ("wheel", check_wheel),
    ("libraries", check_libraries),
    ("ffmpeg", check_ffmpeg),
    ("ports", check_ports),
    ("rdma", check_devices),
    ("/dev/shm", check_shm),
    ("clock", check_clock),
    ("cores", check_cores),
)
"""What takes no time. Beside these: `check_transfer` and `apply_hooks`."""
