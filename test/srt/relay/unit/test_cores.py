"""How many cores a process may use, on made-up trees of /proc and /sys/fs/cgroup."""

from pathlib import Path

import pytest

from embedding_relay.cores import share, usable_cores

POD = "kubepods/pod1/container2"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def version_2(group: str, **quotas: str) -> dict[str, str]:
    """`quotas` by the directory below the mount; `here` is the mount itself."""
    files = {"proc/self/cgroup": f"0::/{group}\n"}
    for where, quota in quotas.items():
        files[f"sys/fs/cgroup/{'' if where == 'here' else where + '/'}cpu.max"] = f"{quota}\n"
    return files


def version_1(group: str, where: str, quota: int, controllers: str = "cpu,cpuacct") -> dict[str, str]:
    here = f"sys/fs/cgroup/cpu/{where}"
    return {
        "proc/self/cgroup": f"11:memory:/{group}\n4:{controllers}:/{group}\n1:cpuset:/{group}\n0::/\n",
        f"{here}/cpu.cfs_quota_us": f"{quota}\n",
        f"{here}/cpu.cfs_period_us": "100000\n",
    }


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        (version_2("", here="max 100000"), 8),
        (version_2(POD, **{POD: "400000 100000"}), 4),
        (version_2(POD, **{POD: "max 100000", "kubepods/pod1": "300000 100000"}), 3),
        (version_2(POD, **{POD: "400000 100000", "kubepods": "200000 100000"}), 2),
        (version_2(POD, here="250000 100000"), 2),  # a path of the host, seen from within the container
        (version_2(POD, **{POD: "50000 100000"}), 1),
        (version_2(POD, **{POD: "3200000 100000"}), 8),
        (version_2(POD, **{POD: "150000"}), 8),  # without its period: not what the kernel writes
        (version_2(POD, **{POD: "much 100000"}), 8),
        (version_1(POD, POD, 600000), 6),
        (version_1(POD, POD, -1), 8),
        (version_1(POD, "kubepods", 500000), 5),
        (version_1(POD, "", 500000), 5),
        (version_1(POD, POD, 200000, "cpu"), 2),
        (version_1(POD, POD, 200000, "cpuacct"), 8),
        ({"proc/self/cgroup": "nonsense\n::\n0::relative\n"}, 8),
    ],
)
def test_the_tightest_quota_counts(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert usable_cores(affinity=8, root=tree(tmp_path, files)) == cores


def test_no_more_than_the_affinity(tmp_path: Path) -> None:
    assert usable_cores(affinity=2, root=tree(tmp_path, version_2(POD, **{POD: "400000 100000"}))) == 2


def test_of_this_process() -> None:
    assert usable_cores() >= 1


# ---- how they are shared


def test_threads_sleep_while_they_wait() -> None:
    sharing = share({}, affinity=8, cores=8)
    assert sharing.environ == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert sharing.own_threads == 1
    assert sharing.why.startswith("one thread for each of 8 cores; threads sleep while they wait")


def test_there_are_no_more_threads_than_a_quota_allows() -> None:
    sharing = share({}, affinity=64, cores=4)
    assert sharing.environ == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "4"}
    assert "one thread for each of 4 cores, because a quota allows no more of 64;" in sharing.why


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "SGLANG_CPU_OMP_THREADS_BIND"])
def test_the_operators_threads_stay(name: str) -> None:
    sharing = share({name: "6"}, affinity=64, cores=4)
    assert sharing.environ == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert sharing.own_threads is None
    assert f"{name}=6 as it was set" in sharing.why


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_the_operators_way_to_wait_stays(name: str) -> None:
    sharing = share({name: "1000"}, affinity=8, cores=4)
    assert sharing.environ == {"OMP_NUM_THREADS": "4"}
    assert sharing.own_threads is None
    assert f"{name}=1000 as it was set" in sharing.why


def test_an_empty_variable_is_none() -> None:
    assert share({"OMP_NUM_THREADS": "", "OMP_WAIT_POLICY": ""}, affinity=2, cores=2) == share({}, affinity=2, cores=2)


def test_what_is_decided_is_decided_once() -> None:
    """A server that is started in the environment of another one takes it for the operator's word."""
    first = share({}, affinity=64, cores=4)
    assert share(first.environ, affinity=64, cores=4).environ == {}
