"""The checks of one machine: each with a machine that is well, and with one that is not."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embedding_relay import __version__, config, cores
from embedding_relay.tools import doctor_machine
from embedding_relay.tools.doctor_machine import Finding, Outcome
from embedding_relay.tools.local_process import free_ports
from support.repo import doors


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SGLANG_", "MC_", "MOONCAKE_", "OMP_")):
            monkeypatch.delenv(name)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Of SGLang and the wheels exactly these versions are installed."""

    def versions(**found: str) -> None:
        known = {name.replace("_", "-"): version for name, version in found.items()}
        real = importlib.metadata.version

        def version(name: str) -> str:
            if name not in (*doctor_machine.WHEELS, "sglang"):
                return real(name)
            if name not in known:
                raise importlib.metadata.PackageNotFoundError(name)
            return known[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return versions


def is_well(finding: Finding) -> None:
    assert finding.outcome is Outcome.OK, finding
    assert finding.said
    assert not finding.todo


def is_wrong(finding: Finding, outcome: Outcome, said: str, todo: str) -> None:
    assert finding.outcome is outcome, finding
    assert said in finding.said
    assert todo in finding.todo


# ---- software


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    is_well(doctor_machine.check_python())
    monkeypatch.setattr(sys, "version_info", (3, 10, 1, "final", 0))
    is_wrong(doctor_machine.check_python(), Outcome.FAILED, "3.11 to 3.13", "3.13")
    monkeypatch.setattr(sys, "platform", "darwin")
    is_wrong(doctor_machine.check_python(), Outcome.FAILED, "Linux only", "Linux")


def test_the_plugin_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = doctor_machine.check_plugin()
    is_well(finding)
    assert finding.facts["version"] == __version__
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    is_wrong(doctor_machine.check_plugin(), Outcome.FAILED, "not installed", "pip install")


def test_sglang_is_missing(installed: Callable[..., None]) -> None:
    installed()
    is_wrong(doctor_machine.check_sglang(), Outcome.FAILED, "not installed", "[sglang]")
    assert doctor_machine.check_hooks().outcome is doctor_machine.apply_hooks().outcome is Outcome.SKIPPED


@pytest.mark.parametrize("version", ["0.5.22", "0.5.23"])
def test_a_tested_sglang(installed: Callable[..., None], version: str) -> None:
    installed(sglang=version)
    is_well(doctor_machine.check_sglang())


def test_an_untested_sglang(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(sglang="0.5.99")
    is_wrong(doctor_machine.check_sglang(), Outcome.FAILED, "0.5.99", config.UNTESTED_SGLANG)
    monkeypatch.setenv(config.UNTESTED_SGLANG, "1")
    is_wrong(doctor_machine.check_sglang(), Outcome.WARNING, "0.5.99", "0.5.22 and 0.5.23")


def test_hooks(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of an SGLang that is a folder with the functions that are changed, and then lacks one of them."""
    targets = doctor_machine.hook_targets((doors()["sglang/srt/disaggregation/multimodal/hooks.py"]).read_text())
    assert len(targets) > 20
    assert "sglang.srt.managers.scheduler.Scheduler.get_internal_state" in targets
    for target in targets:
        parts = target.split(".")
        path = tmp_path.joinpath(*[part for part in parts[:-1] if part.islower()]).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("".join(f"class {part}:\n" for part in parts if not part.islower()))
            file.write(f"    def {parts[-1]}(self): ...\n")
    (tmp_path / "sglang/__init__.py").touch()
    installed(sglang="0.5.23")
    spec = SimpleNamespace(origin=str(tmp_path / "sglang/__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    is_well(doctor_machine.check_hooks())
    scheduler = tmp_path / "sglang/srt/managers/scheduler.py"
    scheduler.write_text(scheduler.read_text().replace("def on_idle(", "def when_idle("))
    is_wrong(doctor_machine.check_hooks(), Outcome.FAILED, "Scheduler.on_idle", "compatibility.md")
    scheduler.unlink()
    assert "Scheduler.flush_cache" in str(doctor_machine.check_hooks().facts["missing"])


@pytest.fixture
def import_ends(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The process that imports SGLang ends like this. What it really does, the lanes with SGLang show."""

    def end(status: int, stderr: str = "") -> None:
        installed(sglang="0.5.23")
        ended = subprocess.CompletedProcess([], status, "", stderr)
        monkeypatch.setattr(doctor_machine, "_run", lambda *_: ended)

    return end


def test_the_import_of_sglang(import_ends: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    import_ends(0)
    is_well(doctor_machine.apply_hooks())
    import_ends(1, "a log line\ndoctor: the hook on sglang.srt.x did not apply\n")
    is_wrong(doctor_machine.apply_hooks(), Outcome.FAILED, "the hook on sglang.srt.x did not", "compatibility.md")
    import_ends(1, "Traceback\nImportError: libcudart.so.13: cannot open shared object file\n\n")
    is_wrong(doctor_machine.apply_hooks(), Outcome.FAILED, "libcudart.so.13", "python -c")
    import_ends(-11)
    is_wrong(doctor_machine.apply_hooks(), Outcome.FAILED, "signal 11", "python -c")

    def too_slow(command: list[str], timeout: float) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(doctor_machine, "_run", too_slow)
    is_wrong(doctor_machine.apply_hooks(), Outcome.FAILED, "was not imported within", "load")


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    is_well(doctor_machine.check_settings())
    monkeypatch.setenv("SGLANG_EMBEDDING_CACHE_BUFER_SIZE", "12")
    monkeypatch.setenv("SGLANG_EMBEDDING_POOL_SIZE_MB", "12")  # SGLang's own
    is_wrong(doctor_machine.check_settings(), Outcome.WARNING, "BUFER_SIZE is no setting", config.CACHE_BLOCKS)
    monkeypatch.setenv(config.BLOCK_SIZE, "many")
    is_wrong(doctor_machine.check_settings(), Outcome.FAILED, config.BLOCK_SIZE, "correct")
    assert doctor_machine.settings().block_size == 128, "the other checks go on with the defaults"


# ---- the transfer engine


def test_one_wheel_that_confirms_writes(installed: Callable[..., None]) -> None:
    installed(mooncake_transfer_engine="0.3.12")
    is_well(doctor_machine.check_wheel())


def test_two_wheels_at_once(installed: Callable[..., None]) -> None:
    installed(mooncake_transfer_engine="0.3.13", mooncake_transfer_engine_cuda13="0.3.13")
    finding = doctor_machine.check_wheel()
    is_wrong(finding, Outcome.FAILED, "the same module", "uninstall mooncake-transfer-engine mooncake-transfer")


def test_a_wheel_without_write_confirmation(installed: Callable[..., None]) -> None:
    installed(mooncake_transfer_engine_non_cuda="0.3.11.post2")
    finding = doctor_machine.check_wheel()
    is_wrong(finding, Outcome.FAILED, "confirms no writes", "'mooncake-transfer-engine-non-cuda>=0.3.12'")


def test_no_wheel(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    is_wrong(doctor_machine.check_wheel(), Outcome.FAILED, "no transfer engine", "[cpu]")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())  # built from its source
    is_well(doctor_machine.check_wheel())
    monkeypatch.setenv(config.DATA_PLANE, config.SHARED_MEMORY)
    assert doctor_machine.check_wheel().outcome is Outcome.SKIPPED
    assert doctor_machine.check_libraries().outcome is Outcome.SKIPPED


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def only(*names: str) -> None:
        def load(name: str) -> None:
            if name not in names:
                raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(ctypes, "CDLL", load)

    return only


def test_system_libraries(libraries: Callable[..., None]) -> None:
    libraries("libibverbs.so.1", "librdmacm.so.1", "libnuma.so.1")
    is_well(doctor_machine.check_libraries())
    libraries("librdmacm.so.1")
    is_wrong(doctor_machine.check_libraries(), Outcome.FAILED, "lacks", "apt-get install libibverbs1 libnuma1")


def test_the_libraries_that_videos_need(libraries: Callable[..., None]) -> None:
    libraries("libavutil.so.58")
    is_well(doctor_machine.check_ffmpeg())
    libraries()
    is_wrong(doctor_machine.check_ffmpeg(), Outcome.WARNING, "videos", "apt-get install ffmpeg")


# ---- the machine


def test_ports() -> None:
    ports = {"--port": free_ports(1)[0]}
    is_well(doctor_machine.check_ports(ports))
    with closing(socket.create_server(("", ports["--port"]))):
        finding = doctor_machine.check_ports(ports)
    is_wrong(finding, Outcome.WARNING, f"{ports['--port']} is taken", "another --port")
    assert finding.facts["taken"] == [ports["--port"]]


class Devices:
    """What the kernel shows of RDMA devices, below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, name: str, state: str = "4: ACTIVE") -> None:
        place = self.root / f"sys/class/infiniband/{name}/ports/1"
        place.mkdir(parents=True)
        (place / "state").write_text(f"{state}\n")
        (self.root / "dev/infiniband").mkdir(parents=True, exist_ok=True)
        (self.root / "dev/infiniband/uverbs0").touch()

    def check(self) -> Finding:
        return doctor_machine.check_devices(self.root)


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Devices:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return Devices(tmp_path)


def test_without_a_device(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    is_well(devices.check())
    assert "TCP" in devices.check().said
    monkeypatch.setenv(config.MOONCAKE_PROTOCOL, "rdma")
    is_wrong(devices.check(), Outcome.FAILED, "no device", config.MOONCAKE_FORCE_TCP)


def test_a_device_that_is_ready(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    devices.add("mlx5_0")
    devices.add("mlx5_1", "1: DOWN")
    is_well(devices.check())
    assert devices.check().facts["devices"] == ["mlx5_0", "mlx5_1"]


def test_a_device_that_an_instance_would_not_get(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    devices.add("mlx5_0", "1: DOWN")
    is_wrong(devices.check(), Outcome.FAILED, "no port is up", config.MOONCAKE_FORCE_TCP)
    (devices.root / "dev/infiniband/uverbs0").unlink()
    is_wrong(devices.check(), Outcome.FAILED, "/dev/infiniband", config.MOONCAKE_FORCE_TCP)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64 << 10, 64 << 10))
    is_wrong(devices.check(), Outcome.FAILED, "64 KiB may be locked", config.MOONCAKE_FORCE_TCP)
    monkeypatch.setenv(config.MOONCAKE_FORCE_TCP, "1")
    is_well(devices.check())


def test_shared_memory_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_machine.check_shm("/nowhere").outcome is Outcome.WARNING
    for mebibytes, outcome in ((64, Outcome.WARNING), (8192, Outcome.OK)):
        facts = SimpleNamespace(f_blocks=mebibytes, f_bavail=mebibytes, f_frsize=1 << 20)
        monkeypatch.setattr(os, "statvfs", lambda path, facts=facts: facts)
        assert doctor_machine.check_shm().outcome is outcome


@pytest.mark.parametrize(("state", "outcome"), [(0, Outcome.OK), (5, Outcome.WARNING), (None, Outcome.SKIPPED)])
def test_a_clock_that_nothing_sets(state: int | None, outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "_clock_state", lambda: state)
    assert doctor_machine.check_clock().outcome is outcome


def test_the_kernel_is_asked_about_the_clock() -> None:
    assert doctor_machine._clock_state() in (None, *range(6))


@pytest.mark.parametrize(
    ("usable", "environ", "outcome"),
    [
        (8, {}, Outcome.OK),
        (8, {"OMP_NUM_THREADS": "8"}, Outcome.OK),
        (8, {"OMP_NUM_THREADS": "9"}, Outcome.WARNING),
        (1, {}, Outcome.WARNING),
    ],
)
def test_cores_against_threads(
    usable: int, environ: Mapping[str, str], outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: usable)
    finding = doctor_machine.check_cores(environ)
    assert finding.outcome is outcome
    assert finding.facts["usable"] == usable


# ---- the test transfer


@pytest.fixture
def transfer_says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The process that transfers says this, and ends with that status."""

    def says(stdout: str, status: int = 0, stderr: str = "") -> None:
        ended = subprocess.CompletedProcess([], status, stdout, stderr)
        monkeypatch.setattr(doctor_machine, "_run", lambda *_: ended)

    return says


def found(*findings: Finding) -> dict[str, Outcome]:
    return {finding.name: finding.outcome for finding in findings}


def test_a_transfer_with_its_rate(transfer_says: Callable[..., None]) -> None:
    one: dict[str, Any] = {"over": "Mooncake (TCP)", "bytes": 5e8, "seconds": 0.5, "bytes_per_s": 1e9}
    transfer_says("a line of Mooncake's\n" + json.dumps({"mooncake": one, "shared_memory": one}) + "\n")
    mooncake, shared = doctor_machine.check_transfer()
    assert found(mooncake, shared) == {"mooncake": Outcome.OK, "shared memory": Outcome.OK}
    assert mooncake.said == "500 MB over Mooncake (TCP), 1 GB/s"
    assert mooncake.facts["bytes_per_s"] == 1e9


def test_a_transfer_that_comes_to_nothing(transfer_says: Callable[..., None]) -> None:
    flaw = {"error": "no such address"}
    transfer_says(json.dumps({"mooncake": flaw, "shared_memory": flaw}))
    # Rows take the other way where memory cannot be shared; without Mooncake no other host gets any.
    expected = {"mooncake": Outcome.FAILED, "shared memory": Outcome.WARNING}
    assert found(*doctor_machine.check_transfer()) == expected
    transfer_says("", -11, "a line\nlibibverbs.so.1: cannot open shared object file\n")
    mooncake, _ = doctor_machine.check_transfer()
    is_wrong(mooncake, Outcome.FAILED, "ended with -11: libibverbs.so.1", "docs/operations.md")


def test_only_the_planes_that_may_be_used_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def process(job: Mapping[str, Any]) -> dict[str, Any]:
        asked.append(job["local"]["planes"])
        return {"error": "nothing moves here"}

    monkeypatch.setattr(doctor_machine, "transfer_process", process)
    for plane in (config.MOONCAKE, config.SHARED_MEMORY, config.AUTO):
        monkeypatch.setenv(config.DATA_PLANE, plane)
        assert len(doctor_machine.check_transfer()) == len(asked[-1])
    assert asked == [[config.MOONCAKE], [config.SHARED_MEMORY], [config.MOONCAKE, config.SHARED_MEMORY]]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (558208, "558 kB"), (3e9, "3 GB"), (5e12, "5000 GB")],
)
def test_bytes_as_a_person_reads_them(count: float, text: str) -> None:
    assert doctor_machine.shown_bytes(count) == text
