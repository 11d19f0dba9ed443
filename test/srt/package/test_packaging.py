"""What is installed: the sdist and the wheel, in an empty environment and beside any SGLang; a checkout; a release."""

import ast
import configparser
import csv
import email
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import types
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import httpx
import pytest

import embedding_relay
from embedding_relay.tools.local_process import LocalProcess, free_ports, stop_all, wait_all_ready
from support.repo import DISTRIBUTION, REPO, SOURCE, SUFFIXES, doors, our_modules
from support.stub_endpoint import answer_to, stub_endpoint

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
DOORS = "embedding_relay/_doors/"
INSIDE = "sglang/srt/disaggregation/"
PATH_FILE = "embedding_relay_doors.pth"
NEEDED_TO_BUILD = ("pyproject.toml", "README.md", "LICENSE")
HATCHLING = ("hatchling", "packaging", "pathspec", "pluggy", "trove_classifiers")
EDITABLE = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "sglang"
version = "0.5.23"
[tool.setuptools.packages.find]
exclude = ["assets*", "benchmark*"]
"""
UPSTREAM = {
    "sglang/__init__.py": "",
    "sglang/srt/server_args.py": "",
    "sglang/srt/disaggregation/utils.py": "",
    "sglang/srt/disaggregation/mooncake/__init__.py": "from .conn import *\n",
    "sglang/srt/disaggregation/mooncake/conn.py": "",
}


def run(*command: str | Path, cwd: Path | None = None) -> str:
    # Nothing of this checkout may be found by accident.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_checkout(to: Path) -> Path:
    """What packaging needs of this checkout; installs and uninstalls are tried on the copy."""
    shutil.copytree(SOURCE, to / "python", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in NEEDED_TO_BUILD:
        shutil.copy(REPO / name, to / name)
    return to


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def modules(clean: Path) -> set[str]:
    """Our files as they are named in the wheel: those with SGLang's name are carried by the package."""
    inside = "sglang/srt/disaggregation/"
    named = {
        name: name.replace(inside, DOORS) if name.startswith(inside) else name for name in our_modules(clean / "python")
    }
    return set(named.values())


@pytest.fixture(scope="module")
def built(clean: Path, modules: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, made of a clean copy, and the wheel, made of that sdist."""
    out = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, clean)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(archive.read(name))


def make_venv(at: Path) -> Path:
    """An environment with this one's pip and what builds packages, and nothing else."""
    run(sys.executable, "-m", "venv", "--without-pip", at)
    for name in ("pip", "setuptools", "_distutils_hack", *HATCHLING):
        for path in Path(sysconfig.get_path("purelib")).glob(f"{name}*"):
            (site_of(at) / path.name).symlink_to(path)
    return at


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """Such an environment, with files where SGLang's would be."""
    venv = make_venv(tmp_path / "venv")
    for name, text in UPSTREAM.items():
        (site_of(venv) / name).parent.mkdir(parents=True, exist_ok=True)
        (site_of(venv) / name).write_text(text)
    return venv


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "checkout").mkdir()
    return copy_checkout(tmp_path / "checkout")


def site_of(venv: Path) -> Path:
    (site,) = venv.glob("lib/python3.*/site-packages")
    return site


def pip(venv: Path, *arguments: str | Path) -> None:
    run(venv / "bin/python", "-m", "pip", "--disable-pip-version-check", *arguments)


def contents(root: Path) -> dict[str, str]:
    """Every file under `root` by the hash of what it says; links to directories are left alone."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def directories(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_dir()}


def modules_in(site: Path) -> set[str]:
    """Our files in an environment: those of the package, and any that lie in SGLang's directories."""
    found = [path for top in ("embedding_relay", "sglang") for path in (site / top).rglob("*.*")]
    found = [path for path in found if path.suffix in SUFFIXES]
    return {str(path.relative_to(site)) for path in found} - UPSTREAM.keys()


class TestWheel:
    def test_it_has_our_modules_and_no_directory_of_sglangs(self, wheel: Path, modules: set[str]) -> None:
        names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        assert names == modules | {PATH_FILE}
        assert {"embedding_relay/batch/http/page.js", f"{DOORS}mooncake/conn_multimodal.py"} <= names

    def test_it_makes_no_package_of_a_directory_that_is_sglangs(self, wheel: Path) -> None:
        packages = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(DOORS) and "__init__" in name}
        assert packages == {f"{DOORS}multimodal/__init__.py"}

    def test_the_sdist_has_all_that_the_wheel_is_made_of(self, built: Path, modules: set[str]) -> None:
        (sdist,) = built.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        ours = {f"python/{name}" for name in [*our_modules(), PATH_FILE]}
        assert ours | set(NEEDED_TO_BUILD) <= names

    def test_every_entry_point_names_a_function_in_it(self, wheel: Path) -> None:
        archive = zipfile.ZipFile(wheel)
        (entry_points,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        groups = configparser.ConfigParser(delimiters=("=",))
        groups.read_string(archive.read(entry_points).decode())
        assert {group: set(groups[group]) for group in groups.sections()} == {
            "sglang.srt.plugins": {"embedding_relay"},
            "sglang.srt.platforms": {"relay_cpu"},
            "console_scripts": {"sglang-relay"},
        }
        for group in groups.sections():
            for target in groups[group].values():
                module, _, function = target.partition(":")
                module = module.replace("sglang.srt.disaggregation.", DOORS.replace("/", "."))
                source = archive.read(module.replace(".", "/") + ".py")
                assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}

    def test_its_version_is_the_package_s(self, metadata: Message) -> None:
        assert metadata["Version"] == embedding_relay.__version__

    def test_sglang_mooncake_and_the_router_are_extras(self, metadata: Message) -> None:
        required = metadata.get_all("Requires-Dist") or []
        always = [line for line in required if "extra ==" not in line]
        assert len(always) == len(PROJECT["dependencies"])
        assert not [line for line in always if line.startswith(("sglang", "torch", "mooncake"))]
        extras = set(metadata.get_all("Provides-Extra") or [])
        assert extras == {"sglang", "cpu", "cuda12", "cuda13", "router", "batch", "s3", "dev"}

    def test_the_sglang_that_is_installed_is_one_that_is_tested(self) -> None:
        source = ast.parse((SOURCE / "sglang/srt/disaggregation/multimodal/compatibility.py").read_text())
        (tested,) = (
            ast.literal_eval(node.value)
            for node in source.body
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TESTED_SGLANG" and node.value
        )
        assert PROJECT["optional-dependencies"]["sglang"] == [f"sglang>={tested[0]},<={tested[-1]}"]
        for version in tested[:-1]:
            assert f"sglang=={version}" in (REPO / f"constraints-sglang-{version}.txt").read_text().splitlines()
        assert f"sglang=={tested[-1]}" in (REPO / "constraints.txt").read_text().splitlines()

    def test_it_goes_without_a_trace(self, wheel: Path, modules: set[str], venv: Path) -> None:
        before, directories_before = contents(venv), directories(venv)
        pip(venv, "install", "--no-deps", "--no-index", wheel)
        assert modules_in(site_of(venv)) == modules
        assert (site_of(venv) / PATH_FILE).exists()
        assert (venv / "bin/sglang-relay").exists()
        pip(venv, "uninstall", "--yes", DISTRIBUTION)
        assert contents(venv) == before
        assert directories(venv) - directories_before == set()


# What a process finds, and what one that it spawns finds. `modes` needs nothing of SGLang to be imported.
LOOK = """
import multiprocessing, sys
from importlib.util import find_spec

def look():
    import sglang.srt.disaggregation.multimodal.modes as modes
    import sglang.srt.disaggregation.utils as upstream
    for module in (modes, upstream):
        print(module.__file__, flush=True)
    print(find_spec("sglang.srt.disaggregation.mooncake.conn_multimodal").origin, flush=True)
    assert find_spec("sglang.srt.disaggregation.of_nobody") is None

if __name__ == "__main__":
    look()
    child = multiprocessing.get_context("spawn").Process(target=look)
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""


def sglang_from_source(tmp_path: Path) -> tuple[Path, Path]:
    """As official images have it, and with the same kind of project file, which makes setuptools use a finder."""
    source, venv = tmp_path / "source", make_venv(tmp_path / "venv")
    for name, text in UPSTREAM.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    (source / "pyproject.toml").write_text(EDITABLE)
    pip(venv, "install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", source)
    assert list(site_of(venv).glob("__editable___sglang_*finder.py"))
    return source, venv


class TestDoors:
    """The modules with SGLang's name are found beside any SGLang, and never in place of one."""

    def check(self, venv: Path, upstream: Path, tmp_path: Path) -> None:
        (tmp_path / "look.py").write_text(LOOK)
        ours = site_of(venv) / DOORS
        expected = [ours / "multimodal/modes.py", upstream / "sglang/srt/disaggregation/utils.py"]
        expected.append(ours / "mooncake/conn_multimodal.py")
        found = run(venv / "bin/python", tmp_path / "look.py").splitlines()
        assert found == 2 * [str(path) for path in expected]

    def test_beside_an_ordinary_sglang(self, wheel: Path, venv: Path, tmp_path: Path) -> None:
        pip(venv, "install", "--no-deps", "--no-index", wheel)
        self.check(venv, site_of(venv), tmp_path)

    def test_beside_an_sglang_that_is_installed_from_its_source(self, wheel: Path, tmp_path: Path) -> None:
        source, venv = sglang_from_source(tmp_path)
        pip(venv, "install", "--no-deps", "--no-index", wheel)
        self.check(venv, source, tmp_path)
        pip(venv, "uninstall", "--yes", DISTRIBUTION)
        where = run(venv / "bin/python", "-c", "import sglang; print(sglang.__file__)")
        assert where == f"{source}/sglang/__init__.py\n"

    def test_without_sglang_there_is_none(self, empty: Path) -> None:
        look = "import sys; from importlib.util import find_spec; print(find_spec('sglang'), 'torch' in sys.modules)"
        assert run(empty / "bin/python", "-c", look) == "None False\n"

    def test_no_start_of_python_pays_for_them(self, empty: Path) -> None:
        assert run(empty / "bin/python", "-c", "import sys; print('embedding_relay.doors' in sys.modules)") == "True\n"
        heavy = {"typing", "re", "importlib.util", "contextlib"}
        look = f"import sys; print(sorted({heavy} & sys.modules.keys()))"
        others = run(empty / "bin/python", "-S", "-c", look)
        assert run(empty / "bin/python", "-c", look) == others

    def test_without_the_path_file_the_entry_point_opens_them(self, wheel: Path, venv: Path) -> None:
        pip(venv, "install", "--no-deps", "--no-index", wheel)
        (site_of(venv) / PATH_FILE).unlink()
        found = "from importlib.util import find_spec; print(find_spec('sglang.srt.disaggregation.multimodal'))"
        assert run(venv / "bin/python", "-c", found) == "None\n"
        opened = "from embedding_relay.doors import open_doors; open_doors(); open_doors()"
        assert "multimodal/__init__.py" in run(venv / "bin/python", "-c", f"{opened}; {found}")

    def test_a_package_that_is_gone_spoils_no_start_of_python(self, wheel: Path, venv: Path) -> None:
        pip(venv, "install", "--no-deps", "--no-index", wheel)
        shutil.rmtree(site_of(venv) / "embedding_relay")
        done = subprocess.run([venv / "bin/python", "-c", "print(1)"], capture_output=True, text=True)
        assert (done.stdout, done.stderr, done.returncode) == ("1\n", "", 0)


@pytest.fixture(scope="module")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    venv = make_venv(tmp_path_factory.mktemp("empty") / "venv")
    pip(venv, "install", "--constraint", REPO / "constraints.txt", f"{wheel}[batch]")
    return venv


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with stub_endpoint(tmp_path_factory.mktemp("stub")) as stub:
        yield stub.url


class TestEmptyEnvironment:
    """`pip install 'sglang-embedding-relay[batch]'` where there was nothing: a table is answered without SGLang."""

    def test_neither_sglang_nor_torch_is_installed(self, empty: Path) -> None:
        installed = {found.name.lower() for found in importlib.metadata.distributions(path=[str(site_of(empty))])}
        assert DISTRIBUTION in installed
        assert not [name for name in installed if name.startswith(("torch", "mooncake", "nvidia", "transformers"))]
        assert [name for name in installed if name.startswith("sglang")] == [DISTRIBUTION]

    def test_the_command_says_what_it_can_do_and_its_version(self, empty: Path) -> None:
        relay = empty / "bin/sglang-relay"
        assert "usage: sglang-relay" in run(relay, "--help")
        assert "usage: sglang-relay batch" in run(relay, "batch", "--help")
        assert run(relay, "--version") == f"sglang-relay {embedding_relay.__version__}\n"

    def test_what_needs_sglang_says_so_in_one_line(self, empty: Path, tmp_path: Path) -> None:
        for command in (["demo"], ["tiny-model", tmp_path / "model"]):
            done = subprocess.run([empty / "bin/sglang-relay", *command], capture_output=True, text=True)
            assert done.returncode != 0
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert "missing" in done.stderr
            assert "sglang" in done.stderr

    @pytest.mark.parametrize("folder", ["protocol", "registry", "batch"])
    def test_modules_can_be_imported(self, empty: Path, modules: set[str], folder: str) -> None:
        names = [name for name in modules if name.startswith(f"embedding_relay/{folder}/") and name.endswith(".py")]
        assert names
        dotted = (name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names)
        run(empty / "bin/python", "-I", "-c", f"import {', '.join(dotted)}")

    def test_a_table_is_answered_from_the_terminal(self, empty: Path, endpoint: str, tmp_path: Path) -> None:
        prompts = ["What is a relay?", "And who runs it?"]
        (tmp_path / "prompts.csv").write_text("\n".join(["prompt", *prompts, ""]))
        options = ["--endpoint", endpoint, "--cache-dir", tmp_path / "cache", "--out", tmp_path / "answers.csv"]
        run(empty / "bin/sglang-relay", "batch", "run", tmp_path / "prompts.csv", *options, cwd=tmp_path)
        with (tmp_path / "answers.csv").open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["prompt"] for row in rows] == prompts
        assert all(answer_to(row["prompt"]) in row.values() for row in rows)

    def test_the_service_shows_its_page(self, empty: Path, endpoint: str, tmp_path: Path) -> None:
        (port,) = free_ports(1)
        command = [str(empty / "bin/sglang-relay"), "batch", "serve", "--endpoint", endpoint, "--port", str(port)]
        command += ["--workers", "1", "--cache-dir", str(tmp_path / "cache")]
        service = LocalProcess("service", command, f"http://127.0.0.1:{port}", tmp_path / "service.log")
        service.start()
        try:
            wait_all_ready([service], 60)
            assert "<html" in httpx.get(service.url, trust_env=False).text
        finally:
            stop_all([service])


class TestCheckout:
    """`pip install --editable`, as scripts/setup does it."""

    def install(self, checkout: Path, venv: Path) -> None:
        pip(venv, "install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", checkout)

    def found(self, venv: Path, *names: str) -> list[str]:
        """Where a process of this environment finds each of them."""
        look = "for name in sys.argv[1:]: print(getattr(importlib.util.find_spec(name), 'origin', None))"
        return run(venv / "bin/python", "-c", f"import importlib.util, sys\n{look}", *names).splitlines()

    def test_everything_is_found_in_the_checkout(self, checkout: Path, venv: Path) -> None:
        self.install(checkout, venv)
        assert modules_in(site_of(venv)) == set(), "nothing is copied"
        names = [name for name in doors(checkout / "python") if name.endswith(".py") and "/mooncake/" not in name]
        names += ["embedding_relay/__init__.py", "embedding_relay/doors.py", "embedding_relay/protocol/codec.py"]
        dotted = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]
        assert self.found(venv, *dotted) == [str(checkout / "python" / name) for name in names]
        ours, upstream = checkout / "python" / INSIDE, site_of(venv) / INSIDE
        mooncake = "sglang.srt.disaggregation.mooncake"
        found = self.found(venv, f"{mooncake}.conn_multimodal", f"{mooncake}.conn", mooncake)
        assert found == [
            str(ours / "mooncake/conn_multimodal.py"),
            str(upstream / "mooncake/conn.py"),
            str(upstream / "mooncake/__init__.py"),
        ]

    def test_it_does_not_hide_an_sglang_that_is_installed_from_its_source(self, checkout: Path, tmp_path: Path) -> None:
        source, venv = sglang_from_source(tmp_path)
        self.install(checkout, venv)
        inside = "sglang.srt.disaggregation"
        found = self.found(venv, "sglang", f"{inside}.utils", f"{inside}.multimodal.modes")
        assert found == [
            str(source / "sglang/__init__.py"),
            str(source / INSIDE / "utils.py"),
            str(checkout / "python" / INSIDE / "multimodal/modes.py"),
        ]

    def test_added_and_removed_modules_need_nothing(self, checkout: Path, venv: Path) -> None:
        self.install(checkout, venv)
        ours = checkout / "python" / INSIDE
        (ours / "multimodal/modes.py").unlink()
        (ours / "mooncake/added_multimodal.py").write_text("")
        gone, added = (
            "sglang.srt.disaggregation.multimodal.modes",
            "sglang.srt.disaggregation.mooncake.added_multimodal",
        )
        assert self.found(venv, gone, added) == ["None", str(ours / "mooncake/added_multimodal.py")]

    def test_it_goes_without_a_trace_and_leaves_the_checkout(self, checkout: Path, venv: Path) -> None:
        before, ours = contents(venv), contents(checkout)
        self.install(checkout, venv)
        assert (venv / "bin/sglang-relay").exists()
        pip(venv, "uninstall", "--yes", DISTRIBUTION)
        assert contents(checkout) == ours
        assert contents(venv) == before

    def test_a_wheel_over_it_takes_its_place(self, checkout: Path, venv: Path, wheel: Path) -> None:
        self.install(checkout, venv)
        pip(venv, "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
        ours = site_of(venv) / DOORS
        assert self.found(venv, "sglang.srt.disaggregation.multimodal.modes") == [str(ours / "multimodal/modes.py")]


class Release:
    """scripts/release as a module, at work on a repository of its own with this checkout's files in one commit."""

    def __init__(self, checkout: Path, changelog: str) -> None:
        self.repo = checkout
        for name in ("constraints.txt", ".gitignore"):
            shutil.copy(REPO / name, checkout / name)
        (checkout / "CHANGELOG.md").write_text(changelog)
        self.git("init", "--quiet", "--initial-branch", "main")
        self.commit()
        self.script: Any = types.ModuleType("release")
        self.script.__file__ = str(checkout / "scripts/release")
        exec(compile((REPO / "scripts/release").read_text(), "scripts/release", "exec"), self.script.__dict__)

    def git(self, *words: str) -> str:
        identity = ("-c", "user.name=Tester", "-c", "user.email=tester@example.org", "-c", "commit.gpgsign=false")
        return run("git", *identity, *words, cwd=self.repo)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "A commit")

    @property
    def changelog(self) -> str:
        return (self.repo / "CHANGELOG.md").read_text()


HERE = embedding_relay.__version__
OPEN = f"# Changelog\n\n## {HERE} — unreleased\n\n- New\n\n### Mended\n\n- This\n\n## 0.0.1 — 2025-01-02\n\n- Old\n"
CUT = OPEN.replace("unreleased", "2026-11-27")


@pytest.fixture
def release(checkout: Path) -> Release:
    return Release(checkout, CUT)


class TestRelease:
    def test_the_changelog_begins_with_the_version_of_the_package(self, release: Release) -> None:
        newest = release.script.sections((REPO / "CHANGELOG.md").read_text())[0]
        assert newest.version == HERE
        assert newest.text.strip()

    def test_what_is_in_the_way_is_said_with_what_to_do(self, release: Release) -> None:
        assert release.script.in_the_way(HERE) == []
        release.git("tag", "v99.0")
        (release.repo / "CHANGELOG.md").write_text("# Changelog\n\n## 0.0.1 — unreleased\n")
        assert release.script.in_the_way(HERE) == [
            "the tree is not clean: commit or remove CHANGELOG.md",
            f"{HERE} is not above 99.0, which has a tag: scripts/release --open VERSION",
            f"CHANGELOG.md begins with 0.0.1, and the package is {HERE}: they must be one",
            "CHANGELOG.md says that 0.0.1 is unreleased: scripts/release --cut",
            "CHANGELOG.md says nothing about 0.0.1",
        ]

    def test_a_version_is_opened_and_cut(self, release: Release, capsys: pytest.CaptureFixture[str]) -> None:
        main = release.script.main
        assert main(["--cut"]) == 1, "it has its date"
        assert main(["--open", "0.0.9"]) == 1, "an older one"
        assert main(["--open", "next"]) == 1
        assert main(["--open", "2.0rc1"]) == 0
        assert release.changelog == CUT.replace(f"## {HERE}", f"## 2.0rc1 — unreleased\n\n## {HERE}")
        assert release.script.version_here() == "2.0rc1"
        assert main(["--open", "3.0"]) == 1, "one at a time"
        assert main(["--cut"]) == 0
        assert re.search(r"## 2\.0rc1 — \d{4}-\d\d-\d\d\n", release.changelog)
        assert "is not how a version is written" in capsys.readouterr().err

    def test_two_builds_of_one_commit_are_alike(self, release: Release, tmp_path: Path) -> None:
        """They differ in place, time of the files, and umask. What is not in the commit gets into neither."""
        (release.repo / "python/embedding_relay/stray.py").write_text("")
        commit, epoch = release.git("rev-parse", "HEAD").strip(), 1_700_000_000
        release.script.build_twice(commit, epoch, tmp_path, tmp_path / "out")
        (wheel,), (sdist,) = ([*(tmp_path / "out").glob(kind)] for kind in ("*.whl", "*.tar.gz"))
        assert {member.date_time for member in zipfile.ZipFile(wheel).infolist()} == {time.gmtime(epoch)[:6]}
        with tarfile.open(sdist) as archive:
            assert {member.mtime for member in archive.getmembers()} == {epoch}
        assert "embedding_relay/stray.py" not in zipfile.ZipFile(wheel).namelist()

    def test_builds_that_differ_are_named(
        self, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def build(what: str, command: list[Any], **options: Any) -> None:
            out = command[command.index("--outdir" if "--outdir" in command else "--directory") + 1]
            out.mkdir()
            (out / "same.tar.gz").write_text("same")
            (out / "other.whl").write_text(what)

        monkeypatch.setattr(release.script, "call", build)
        with pytest.raises(release.script.InTheWay, match=r"differ in other\.whl: "):
            release.script.build_twice("HEAD", 1, tmp_path, tmp_path / "out")

    def test_its_papers(
        self, release: Release, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """All but the builds, which have a test of their own, and the hashes, which only the package index knows."""
        extras = release.script.EXTRAS if importlib.util.find_spec("torch") else ("batch",)
        bill = release.script.bill_of_materials(HERE, 1_700_000_000, extras)
        hashed = "".join(f"{name}=={version} \\\n    --hash=…\n" for name, version in self.parts(bill))
        monkeypatch.setattr(release.script, "bill_of_materials", lambda version, epoch: bill)
        monkeypatch.setattr(release.script, "build_twice", lambda commit, epoch, folder, out: out.mkdir())
        monkeypatch.setattr(release.script, "write_hashed", lambda path: path.write_text(hashed))
        assert release.script.main(["--no-tests"]) == 0
        assert f"git tag --annotate v{HERE} " in capsys.readouterr().out
        dist = release.repo / "dist"
        assert (dist / "release-notes.md").read_text() == f"{DISTRIBUTION} {HERE}\n\n- New\n\n### Mended\n\n- This\n"
        run("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=dist)
        assert len((dist / "SHA256SUMS").read_text().splitlines()) == len(list(dist.iterdir())) - 1
        assert json.loads((dist / f"{DISTRIBUTION}-{HERE}.cdx.json").read_text()) == bill
        self.check_bill(bill)
        hashed = hashed.replace("==", "==0", 1)
        assert release.script.main(["--no-tests"]) == 1
        assert "scripts/setup" in capsys.readouterr().err

    def parts(self, bill: dict[str, Any]) -> set[tuple[str, str]]:
        return {(part["name"], part["version"]) for part in bill["components"]}

    def check_bill(self, bill: dict[str, Any]) -> None:
        pinned = {re.sub("[-_.]+", "-", line.lower()) for line in (REPO / "constraints.txt").read_text().splitlines()}
        names = {name for name, _ in self.parts(bill)}
        assert {re.sub("[-_.]+", "-", f"{name}=={version}") for name, version in self.parts(bill)} <= pinned
        assert {"aiohttp", "msgspec", "fastapi", "starlette", "diskcache"} <= names
        assert not names & {"pytest", "mypy", "ruff", DISTRIBUTION}
        licenses = {part["name"]: part.get("licenses") for part in bill["components"]}
        assert licenses["fastapi"] == [{"expression": "MIT"}]
        needs = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
        assert needs.keys() == {part["bom-ref"] for part in (*bill["components"], bill["metadata"]["component"])}
        assert {child for children in needs.values() for child in children} <= needs.keys()

    def test_nothing_is_built_while_something_is_in_the_way(
        self, release: Release, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (release.repo / "CHANGELOG.md").write_text(OPEN)
        release.commit()
        assert release.script.main(["--no-tests"]) == 1
        assert "scripts/release --cut" in capsys.readouterr().out
        assert not (release.repo / "dist").exists()
