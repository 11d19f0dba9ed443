"""The imports that must not exist. Arrows point one way: scheduler -> mooncake -> around the protocol -> protocol."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.repo import SOURCE

PACKAGES = SOURCE / "sglang/srt/disaggregation"
PREFIX = "sglang.srt.disaggregation"

PROTOCOL = f"{PREFIX}.multimodal.protocol"
TESTING = f"{PREFIX}.multimodal.testing"
BATCH = f"{PREFIX}.multimodal.batch_session"
# Pure data and logic that the protocol's shell, its tests and the scheduler share.
PURE = tuple(f"{PREFIX}.multimodal.{name}" for name in ("blocks", "config", "data_plane", "keys", "layout"))
# What runs inside SGLang's scheduler and knows its classes: on top of everything.
SCHEDULER = tuple(
    f"{PREFIX}.multimodal.{name}"
    for name in (
        *("front", "halves", "hooks", "instance", "media", "modes", "multimodal_embedding", "multimodal_language"),
        *("roles", "server_settings", "tower"),
    )
)


def modules() -> dict[str, Path]:
    names = {}
    for path in PACKAGES.rglob("*.py"):
        relative = path.relative_to(SOURCE).with_suffix("")
        names[".".join(relative.parts).removesuffix(".__init__")] = path
    return names


def imports(path: Path) -> Iterator[str]:
    """Every import of the file, at its top or within a function. Of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def foreign(name: str) -> bool:
    """Neither Python's own nor ours."""
    return name.split(".")[0] not in sys.stdlib_module_names and not name.startswith(f"{PREFIX}.m")


def offences(here: tuple[str, ...], allowed: tuple[str, ...]) -> list[str]:
    """Imports of modules below `here` that are neither Python's own nor below `allowed`."""
    found = []
    for module, path in modules().items():
        if not is_below(module, here):
            continue
        for name in imports(path):
            if name.split(".")[0] in sys.stdlib_module_names or is_below(name, allowed):
                continue
            # `from sglang.srt.disaggregation.multimodal import x` names the package too, and then the module itself.
            if name != f"{PREFIX}.multimodal":
                found.append(f"{module} imports {name}")
    return found


def test_there_is_something_to_look_at() -> None:
    names = modules()
    assert f"{PROTOCOL}.encode_side" in names
    assert f"{PREFIX}.mooncake.conn_multimodal" in names
    assert any(name.startswith(PROTOCOL) for name in imports(names[f"{PREFIX}.mooncake.conn_multimodal"]))
    assert set(SCHEDULER) | set(PURE) <= set(names)


def test_the_protocol_knows_python_msgspec_and_itself() -> None:
    allowed = ("msgspec", PROTOCOL, f"{PREFIX}.multimodal.blocks")
    assert offences((PROTOCOL, f"{PREFIX}.multimodal.blocks"), allowed) == []


def test_the_parts_around_the_protocol_are_pure_too() -> None:
    assert offences(PURE, ("msgspec", PROTOCOL, *PURE)) == []


def test_the_simulated_world_needs_nothing_but_pure_parts() -> None:
    assert offences((TESTING,), ("msgspec", PROTOCOL, TESTING, *PURE)) == []


def test_nothing_that_ships_needs_the_simulated_world() -> None:
    users = [name for name, path in modules().items() if any(is_below(i, (TESTING,)) for i in imports(path))]
    assert [name for name in users if not is_below(name, (TESTING,))] == []


# What the batch service is made of, besides Python: nothing of SGLang, and nothing as heavy.
BATCH_LIBRARIES = (
    *("aiohttp", "diskcache", "fastapi", "msgspec", "openpyxl", "PIL", "prometheus_client", "redis"),
    *("starlette", "tqdm", "uvicorn", "yarl"),
)


def test_the_batch_service_stands_apart() -> None:
    """It runs without SGLang and torch; of the rest of this package it knows two words for what went wrong."""
    errors = f"{PREFIX}.multimodal.protocol"
    allowed = (*BATCH_LIBRARIES, BATCH, f"{errors}.errors", f"{PREFIX}.multimodal.cli")
    assert [offence for offence in offences((BATCH,), allowed) if not offence.endswith(errors)] == []


def test_a_workbook_knows_no_session() -> None:
    here = tuple(f"{BATCH}.{name}" for name in ("workbook", "refusals", "tasks"))
    assert offences((f"{BATCH}.workbook",), ("msgspec", "openpyxl", "PIL", *here)) == []


def test_asking_knows_neither_files_nor_stores() -> None:
    here = tuple(f"{BATCH}.{name}" for name in ("asking", "records", "tasks", "refusals"))
    assert offences((f"{BATCH}.asking",), ("aiohttp", "msgspec", "yarl", *here)) == []


def test_only_the_command_knows_the_batch_service() -> None:
    users = [name for name, path in modules().items() if any(is_below(i, (BATCH,)) for i in imports(path))]
    assert [name for name in users if not is_below(name, (BATCH,))] == [f"{PREFIX}.multimodal.cli"]


def test_the_transport_does_not_know_the_scheduler() -> None:
    """SGLang above it calls it; it calls nobody there, and nothing of SGLang either."""
    for module, path in modules().items():
        if is_below(module, (f"{PREFIX}.mooncake",)):
            wrong = [
                name for name in imports(path) if is_below(name, SCHEDULER) or is_below(name, ("sglang.srt.managers",))
            ]
            assert wrong == [], module


def test_only_the_scheduler_part_knows_sglang() -> None:
    knows = set()
    for module, path in modules().items():
        if any(name.startswith("sglang.") and foreign(name) and name != PREFIX for name in imports(path)):
            knows.add(module)
    allowed = (*SCHEDULER, f"{PREFIX}.multimodal.cpu_platform_class", f"{PREFIX}.multimodal.metrics")
    assert [module for module in sorted(knows) if not is_below(module, allowed)] == []


def test_one_module_uses_the_hook_registry() -> None:
    users = [name for name, path in modules().items() if any("hook_registry" in i for i in imports(path))]
    assert users == [f"{PREFIX}.multimodal.hooks"]


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
    allowed = {f"{PREFIX}.multimodal.config", f"{PREFIX}.multimodal.tiny_model"}
    assert {name for name, path in modules().items() if environment_reads(path)} <= allowed


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
