"""Three rules that the folders show: who may import what. No list of modules is kept here; new ones are covered."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from support.repo import SOURCE, our_modules

PACKAGE = "embedding_relay"
Graph = Mapping[str, set[str]]


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(path): file for path, file in our_modules().items() if path.endswith(".py")}


def imports(path: Path) -> Iterator[str]:
    """Every import of the file, at its top, within a function or for types only. Of `from a import b` a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def is_pythons(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def users(here: str, what: Callable[[str], bool]) -> list[str]:
    return [f"{m} imports {n}" for m, path in MODULES.items() if is_below(m, here) for n in imports(path) if what(n)]


# ---- the three rules


def test_the_package_knows_nothing_of_sglang() -> None:
    assert users(PACKAGE, lambda name: is_below(name, "sglang")) == []


def test_the_protocol_knows_python_and_msgspec() -> None:
    allowed = ("msgspec", f"{PACKAGE}.protocol")
    assert users(f"{PACKAGE}.protocol", lambda name: not is_pythons(name) and not is_below(name, *allowed)) == []


def test_batch_sessions_need_no_torch() -> None:
    """Of the rest of the package they know the protocol's words for what went wrong, and which addresses are public."""
    rest = f"{PACKAGE}.batch", f"{PACKAGE}.protocol", f"{PACKAGE}.public_addresses"
    assert users(f"{PACKAGE}.batch", lambda name: is_below(name, PACKAGE) and not is_below(name, *rest)) == []
    assert users(f"{PACKAGE}.batch", lambda name: is_below(name, "torch", "transformers", "mooncake")) == []


# Narrower than the rules, and by folder: what lies there, and all that it may use of the package.
NARROW = {
    "testing": ("protocol", "testing", "memory.plane"),
    "batch.workbook": ("batch.workbook", "batch.errors", "batch.tasks", "public_addresses"),
    "batch.asking": ("batch.asking", "batch.errors", "batch.tasks", "batch.session.records"),
    "batch.store": ("batch.store", "batch.errors"),
    "memory": ("memory", "protocol", "threads", "cores"),
    "registry": ("registry", "memory.quiet", "protocol", "config", "threads"),
}


@pytest.mark.parametrize("folder", NARROW)
def test_what_a_folder_may_use(folder: str) -> None:
    allowed = [f"{PACKAGE}.{name}" for name in NARROW[folder]]
    parents = {name.rpartition(".")[0] for name in allowed} | {PACKAGE}
    wrong = users(
        f"{PACKAGE}.{folder}",
        lambda name: is_below(name, PACKAGE) and not is_below(name, *allowed) and name not in parents,
    )
    assert wrong == []


def test_only_the_command_knows_batch_sessions() -> None:
    batch = f"{PACKAGE}.batch"
    knows = {name for name, path in MODULES.items() if any(is_below(used, batch) for used in imports(path))}
    assert {name for name in knows if not is_below(name, batch)} == {f"{PACKAGE}.tools.cli"}


# ---- arrows


def module_graph() -> Graph:
    return {
        name: {used for used in imports(path) if used in MODULES and used != name} for name, path in MODULES.items()
    }


def folders(graph: Graph) -> dict[str, dict[str, set[str]]]:
    """For each folder the graph of what lies in it: files, and folders as one thing each."""
    found: dict[str, dict[str, set[str]]] = {}
    for module, used in graph.items():
        for other in used:
            here, there = module.split("."), other.split(".")
            depth = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), None)
            if depth is None:
                continue  # a package's own `__init__`, which says what the package is and imports nothing
            inside = found.setdefault(".".join(here[:depth]), {})
            inside.setdefault(here[depth], set()).add(there[depth])
            inside.setdefault(there[depth], set())
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Groups of two or more that reach each other."""
    reach = {name: reachable(graph, name) for name in graph}
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in graph}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def reachable(graph: Graph, start: str) -> set[str]:
    found, waiting = set(), [*graph[start]]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += graph[name]
    return found


def test_there_is_something_to_look_at() -> None:
    graph = module_graph()
    assert len(graph) > 100
    assert "protocol" in folders(graph)[PACKAGE]["transport"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_two_modules_import_each_other() -> None:
    assert circles(module_graph()) == []


def test_every_arrow_points_down() -> None:
    """In no folder do two things need each other, be they files or folders: so there is a down everywhere."""
    found = {folder: circles(inside) for folder, inside in folders(module_graph()).items()}
    assert {folder: groups for folder, groups in found.items() if groups} == {}


def test_packages_say_what_they_are_and_import_nothing() -> None:
    inits = {name: path for name, path in MODULES.items() if path.name == "__init__.py"}
    assert [name for name, path in inits.items() if list(imports(path))] == []
    assert [name for name, path in inits.items() if ast.get_docstring(ast.parse(path.read_text())) is None] == []


def test_nothing_that_ships_needs_the_simulated_world() -> None:
    graph = module_graph()
    testing = f"{PACKAGE}.testing"
    assert [
        name for name in graph if not is_below(name, testing) and any(is_below(n, testing) for n in graph[name])
    ] == []


# ---- what really happens

IMPORT_ALL = """
import importlib, sys
before = set(sys.modules)
for name in sys.argv[2:]:
    importlib.import_module(name)
loaded = {name.partition(".")[0] for name in sys.modules}
print(*sorted(loaded & set(sys.argv[1].split(","))))
"""


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        (f"{PACKAGE}.protocol", "sglang,torch,numpy,zmq"),
        (f"{PACKAGE}.testing", "sglang,torch,numpy,zmq"),
        (f"{PACKAGE}.memory.layout", "sglang,torch,numpy,zmq"),
        (f"{PACKAGE}.memory.plane", "sglang,torch,numpy,zmq"),
        (f"{PACKAGE}.config", "sglang,torch,numpy,zmq"),
        (f"{PACKAGE}.batch", "sglang,torch,zmq"),
        (f"{PACKAGE}.registry", "sglang,torch"),
        (f"{PACKAGE}.tools.cli", "sglang,torch,transformers,aiohttp,openpyxl"),
    ],
)
def test_what_is_loaded_with_a_folder(folder: str, forbidden: str) -> None:
    names = [name for name in MODULES if is_below(name, folder)]
    command = [sys.executable, "-c", IMPORT_ALL, forbidden, *names]
    ended = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(SOURCE)})
    assert ended.returncode == 0, ended.stderr
    found = set(ended.stdout.split())
    assert found == set(), f"{folder} brings {found}"


# ---- one door each


def test_one_module_uses_the_hook_registry() -> None:
    knows = [name for name, path in MODULES.items() if any("hook_registry" in used for used in imports(path))]
    assert knows == ["sglang.srt.disaggregation.multimodal.hooks"]


def environment_reads(path: Path) -> list[int]:
    """Lines that look something up in the environment. Handing it on whole, to a child or to config.py, is none."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ImportFrom(module="os") if {"environ", "getenv"} & {alias.name for alias in node.names}:
                lines.append(node.lineno)
            case ast.Attribute(value=ast.Name(id="os"), attr="getenv"):
                lines.append(node.lineno)
            case ast.Subscript(value=ast.Attribute(attr="environ"), ctx=ast.Load()):
                lines.append(node.lineno)
            case ast.Attribute(value=ast.Attribute(attr="environ"), attr="get" | "items" | "keys" | "copy"):
                lines.append(node.lineno)
            case ast.Compare(ops=[ast.In() | ast.NotIn()], comparators=[ast.Attribute(value=ast.Name("os"))]):
                lines.append(node.lineno)
    return lines


def test_one_module_reads_the_environment() -> None:
    # The tiny model asks where this user's caches are, which is no setting of the server.
    allowed = {f"{PACKAGE}.config", f"{PACKAGE}.tools.tiny_model"}
    assert {name for name, path in MODULES.items() if environment_reads(path)} <= allowed


@pytest.mark.parametrize(
    ("code", "reads"),
    [
        ("import os\nx = os.environ['A']", 1),
        ("import os\nos.environ['A'] = 'b'", 0),
        ("import os\nx = os.environ.get('A')", 1),
        ("import os\nx = 'A' in os.environ", 1),
        ("import os\nx = os.getenv('A')", 1),
        ("from os import environ", 1),
        ("import os\nrun(env=os.environ | {'A': 'b'})", 0),
        ("import os\nos.environ.setdefault('A', 'b')", 0),
    ],
)
def test_reading_is_told_from_handing_on(tmp_path: Path, code: str, reads: int) -> None:
    path = tmp_path / "some.py"
    path.write_text(code)
    assert len(environment_reads(path)) == reads
