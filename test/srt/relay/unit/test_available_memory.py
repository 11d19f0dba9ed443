"""How much memory a process may still take, on made-up trees of /proc and /sys/fs/cgroup."""

from pathlib import Path

import pytest

from embedding_relay.available_memory import available_bytes

POD = "kubepods/pod1/container2"
MIB = 2**20


def machine(available: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: {10**7} kB\nMemFree: 1 kB\nMemAvailable:   {available // 1024} kB\n"}


def version_2(where: str, limit: str, used: int, files: int = 0) -> dict[str, str]:
    here = f"sys/fs/cgroup/{where}"
    return {
        "proc/self/cgroup": f"0::/{POD}\n",
        f"{here}/memory.max": f"{limit}\n",
        f"{here}/memory.current": f"{used}\n",
        f"{here}/memory.stat": f"anon 5\ninactive_file {files}\nactive_file 7\n",
    }


def version_1(limit: int, used: int, controllers: str = "memory") -> dict[str, str]:
    here = f"sys/fs/cgroup/memory/{POD}"
    return {
        "proc/self/cgroup": f"9:{controllers}:/{POD}\n4:cpu:/\n",
        f"{here}/memory.limit_in_bytes": f"{limit}\n",
        f"{here}/memory.usage_in_bytes": f"{used}\n",
    }


@pytest.mark.parametrize(
    ("files", "mib"),
    [
        ({}, 0),
        ({"proc/meminfo": "MemAvailable: much kB\nMemAvailable:\n"}, 0),
        (machine(900 * MIB), 900),
        (machine(900 * MIB) | version_2(POD, "max", 5), 900),
        (machine(900 * MIB) | version_2(POD, str(500 * MIB), 200 * MIB), 300),
        (machine(900 * MIB) | version_2("kubepods", str(500 * MIB), 200 * MIB), 300),
        (machine(900 * MIB) | version_2("", str(500 * MIB), 200 * MIB), 300),
        (machine(900 * MIB) | version_2(POD, str(500 * MIB), 500 * MIB, files=100 * MIB), 100),
        (machine(900 * MIB) | version_2(POD, str(500 * MIB), 501 * MIB), 0),
        (machine(100 * MIB) | version_2(POD, str(500 * MIB), 200 * MIB), 100),
        (machine(900 * MIB) | version_1(400 * MIB, 150 * MIB), 250),
        (machine(900 * MIB) | version_1(2**63 - 4096, 150 * MIB), 900),
        (machine(900 * MIB) | version_1(400 * MIB, 150 * MIB, "cpuset"), 900),
        (version_2(POD, str(500 * MIB), 200 * MIB), 300),
    ],
)
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, str], mib: int) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert available_bytes(tmp_path) == mib * MIB


def test_this_machine_has_some() -> None:
    assert available_bytes() > MIB
