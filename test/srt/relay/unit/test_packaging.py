"""The wheel and the development links: they install next to SGLang's files and go without a trace."""

import ast
import configparser
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from support.repo import REPO, SOURCE, our_modules

UPSTREAM = {
    "sglang/__init__.py": "",
    "sglang/srt/server_args.py": "",
    "sglang/srt/disaggregation/utils.py": "",
    "sglang/srt/disaggregation/mooncake/__init__.py": "from .conn import *\n",
    "sglang/srt/disaggregation/mooncake/conn.py": "",
}


def run(*command: str | Path, **environ: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environ)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_checkout(to: Path) -> Path:
    """What packaging needs of this checkout; links and uninstalls are tried on the copy."""
    shutil.copytree(SOURCE, to / "python", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (to / "scripts").mkdir()
    for name in ("pyproject.toml", "scripts/link", "README.md", "LICENSE"):
        if (REPO / name).exists():
            shutil.copy(REPO / name, to / name)
    return to


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "checkout").mkdir()
    return copy_checkout(tmp_path / "checkout")


@pytest.fixture
def wheel(checkout: Path) -> Path:
    build = "import setuptools.build_meta, sys; setuptools.build_meta.build_wheel(sys.argv[1])"
    out = checkout / "wheels"
    out.mkdir()
    subprocess.run([sys.executable, "-c", build, out], cwd=checkout, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment with this one's pip and setuptools, and with files where SGLang's would be."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    site = site_of(tmp_path / "venv")
    for name in ("pip", "setuptools", "_distutils_hack"):
        for path in Path(sysconfig.get_path("purelib")).glob(f"{name}*"):
            (site / path.name).symlink_to(path)
    for name, text in UPSTREAM.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    return tmp_path / "venv"


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


def modules_of(checkout: Path) -> set[str]:
    return set(our_modules(checkout / "python"))


def modules_in(site: Path) -> set[str]:
    found = [path for kind in ("*.py", "*.html") for path in (site / "sglang").rglob(kind)]
    return {str(path.relative_to(site)) for path in found} - UPSTREAM.keys()


def test_the_wheel_has_our_modules_and_nothing_of_sglangs(wheel: Path, checkout: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert set(names) == modules_of(checkout)
    for name in names:
        directory, _, file = name.removeprefix("sglang/srt/disaggregation/").partition("/")
        assert directory == "multimodal" or (directory == "mooncake" and file.endswith("_multimodal.py")), name


def test_every_entry_point_names_a_function_in_the_wheel(wheel: Path) -> None:
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
            source = archive.read(module.replace(".", "/") + ".py")
            assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def test_an_installed_wheel_goes_without_a_trace(wheel: Path, checkout: Path, venv: Path) -> None:
    before, directories_before = contents(venv), directories(venv)
    pip(venv, "install", "--no-deps", "--no-index", wheel)
    assert modules_in(site_of(venv)) == modules_of(checkout)
    assert (venv / "bin/sglang-relay").exists()
    pip(venv, "uninstall", "--yes", "sglang-embedding-relay")
    assert contents(venv) == before
    assert directories(venv) - directories_before == set()


class TestLinks:
    def link(self, checkout: Path, venv: Path) -> str:
        return run(sys.executable, checkout / "scripts/link", venv)

    def test_each_installed_module_is_a_link_to_the_checkout(self, checkout: Path, venv: Path) -> None:
        self.link(checkout, venv)
        site = site_of(venv)
        assert modules_in(site) == modules_of(checkout)
        for name in modules_of(checkout):
            assert os.readlink(site / name) == str(checkout / "python" / name)
            assert not (site / name).parent.is_symlink()
        assert (site / "sglang/srt/disaggregation/mooncake/conn.py").exists()
        assert self.link(checkout, venv) == "", "the second time there is nothing to do"

    def test_added_and_removed_modules_are_followed(self, checkout: Path, venv: Path) -> None:
        self.link(checkout, venv)
        ours, site = checkout / "python/sglang/srt/disaggregation", site_of(venv)
        (ours / "multimodal/protocol/status.py").unlink()
        (ours / "multimodal/added").mkdir()
        (ours / "multimodal/added/__init__.py").write_text("")
        (ours / "mooncake").mkdir(exist_ok=True)
        (ours / "mooncake/added_multimodal.py").write_text("")
        self.link(checkout, venv)
        there = site / "sglang/srt/disaggregation"
        assert not (there / "multimodal/protocol/status.py").is_symlink()
        assert (there / "multimodal/added/__init__.py").is_symlink()
        assert (there / "mooncake/added_multimodal.py").is_symlink()
        shutil.rmtree(ours / "multimodal/added")
        self.link(checkout, venv)
        assert not (there / "multimodal/added").exists()

    def test_changed_entry_points_are_installed_again(self, checkout: Path, venv: Path) -> None:
        self.link(checkout, venv)
        project = checkout / "pyproject.toml"
        project.write_text(project.read_text().replace("[project.scripts]", '[project.scripts]\nsecond-name = "m:f"'))
        self.link(checkout, venv)
        assert (venv / "bin/second-name").exists()
        assert modules_in(site_of(venv)) == modules_of(checkout)
        assert all((site_of(venv) / name).is_symlink() for name in modules_of(checkout))

    def test_pip_uninstall_takes_the_links_and_leaves_the_checkout(self, checkout: Path, venv: Path) -> None:
        site, ours = site_of(venv), contents(checkout)
        before, directories_before = contents(site), directories(site)
        self.link(checkout, venv)
        added = checkout / "python/sglang/srt/disaggregation/multimodal/added_later.py"
        added.write_text("later = True\n")
        self.link(checkout, venv)
        # Importing leaves byte code beside the links; it must go too.
        run(venv / "bin/python", "-c", "import sglang.srt.disaggregation.multimodal.added_later")
        pip(venv, "uninstall", "--yes", "sglang-embedding-relay")
        added.unlink()
        assert contents(checkout) == ours
        assert contents(site) == before
        left = {str(path.relative_to(site)) for path in directories(site) - directories_before}
        # Python made these itself, beside SGLang's own files when it imported them.
        assert {name for name in left if not name.endswith("sglang/__pycache__")} == set()
