"""scripts/sglang-compatibility: what it finds in a small SGLang, and that its lists are those of our own sources."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from support.repo import REPO

SCRIPT = REPO / "scripts/sglang-compatibility"
SCHEDULER = """
from sglang.srt.parts import Messages
from sglang.srt.words import Request

class Scheduler(Messages):
    def __init__(self):
        self.limit = 1

    def take(self, req: Request, *, late: bool = False):
        return self.limit
"""
SGLANG = {
    "scheduler.py": SCHEDULER,
    "parts.py": "class Messages:\n    def send(self, what):\n        self.sent = what\n",
    "words/__init__.py": "from .inner import *\n\ndef spoken(word, loud=False):\n    return word\n",
    "words/inner.py": "if True:\n    class Request:\n        rid: str\n\n        def finish(self): ...\n",
    "arg_groups/resolution_hooks.py": "_KNOWN = frozenset({'handle_all', 'handle_none'})\n",
}
HOOKS = """
_SCHEDULER: Final = "sglang.srt.scheduler.Scheduler"

def take(original, scheduler, req, **kwargs):
    scheduler.send(scheduler.limit)
    req.finish()
    if hasattr(scheduler, "send_fast"):
        scheduler.send_fast(req.rid)
    scheduler.made_by_us = 1

HOOKS: Final = (Hook(f"{_SCHEDULER}.take", take, HookType.AROUND), Hook("torch.empty", take, HookType.AROUND))
RESOLUTION_STEPS: Final = {"handle_all": take}
"""
OURS = {
    "hooks.py": HOOKS,
    "role.py": """
from sglang.srt.words import Request, spoken

class Role:
    def say(self, manager: Manager):
        manager.limit_of_ours
        spoken("word", loud=True)
        return self.scheduler.sent
""",
}


def written(place: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return place


def compared(tmp_path: Path, **changes: tuple[str, str]) -> tuple[int, str]:
    """The exit status and the report for an SGLang in which, by file, one text is replaced by another."""
    changed = dict(SGLANG)
    for file, (old, new) in changes.items():
        name = next(name for name in SGLANG if name.rpartition("/")[2].removesuffix(".py") == file)
        assert old in SGLANG[name]
        changed[name] = changed[name].replace(old, new)
    known = written(tmp_path / "known/sglang/srt", SGLANG).parents[1]
    other = written(tmp_path / "other/sglang/srt", changed).parents[1]
    return script(other, "--against", known, "--ours", written(tmp_path / "ours", OURS))


def script(*arguments: str | Path) -> tuple[int, str]:
    """In this process: a Python that starts takes longer than all of the rest."""
    module = types.ModuleType("sglang_compatibility")
    module.__dict__["__file__"] = str(SCRIPT)
    exec(compile(SCRIPT.read_text(), SCRIPT, "exec"), module.__dict__)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = module.main(list(map(str, arguments)))
    return status, said.getvalue()


def test_the_same_sglang_has_everything(tmp_path: Path) -> None:
    status, said = compared(tmp_path)
    assert status == 0
    assert said.splitlines()[1:] == [
        "hooks and resolution steps: 2, all are there",
        "imported names and calls: 2, all are there",
        "attributes: 5, all are there",
    ]


WRONG = {
    "a hook's target": ({"scheduler": ("def take", "def took")}, "missing", "Scheduler.take"),
    "a resolution step": ({"resolution_hooks": ("handle_all", "handle_any")}, "missing", "handle_all"),
    "an argument that the hook does not take": ({"scheduler": ("*, late", "late")}, "OTHER ARGUMENTS", "late"),
    "an argument by another name": ({"scheduler": ("*, late", "*args, late")}, "OTHER ARGUMENTS", "*args"),
    "an imported function": ({"__init__": ("def spoken", "def whispered")}, "missing", "words.spoken (role.py:2)"),
    "an imported class": ({"inner": ("class Request", "class Question")}, "missing", "words.Request (role.py:2)"),
    "an argument that we give": ({"__init__": ("loud", "quiet")}, "OTHER ARGUMENTS", "takes no loud"),
    "an argument that we do not give": ({"__init__": ("word, loud", "word, to, loud")}, "OTHER ARGUMENTS", "wants to"),
    "a method of what a hook is given": (
        {"inner": ("def finish", "def end")},
        "missing",
        "Request.finish (hooks.py:6)",
    ),
    "an attribute of a base": ({"parts": ("self.sent", "self.last")}, "missing", "Scheduler.sent (role.py:8)"),
    "an attribute that a method assigns": ({"scheduler": ("limit", "most")}, "missing", "Scheduler.limit (hooks.py:5)"),
}


@pytest.mark.parametrize(("changes", "how", "what"), WRONG.values(), ids=WRONG)
def test_what_would_not_work_is_named(tmp_path: Path, changes: dict[str, tuple[str, str]], how: str, what: str) -> None:
    status, said = compared(tmp_path, **changes)
    assert status == 1
    assert [line for line in said.splitlines() if line.strip().startswith(how) and what in line], said


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"scheduler": ("return self.limit", "return self.limit + 1")}, "other body         sglang.srt.scheduler"),
        ({"scheduler": ("late: bool", "fast: bool")}, "Scheduler.take: +fast -late"),
        ({"__init__": ("return word", "return word.upper()")}, "other body         sglang.srt.words.spoken"),
    ],
)
def test_what_works_but_is_to_be_read_again(tmp_path: Path, changes: dict[str, tuple[str, str]], line: str) -> None:
    status, said = compared(tmp_path, **changes)
    assert status == 0
    assert line in said


def test_its_lists_are_those_of_our_own_sources(tmp_path: Path) -> None:
    """In an empty SGLang everything is missing: each hook, each step, and what is imported if another has it."""
    empty = written(tmp_path, {"sglang/__init__.py": ""})
    status, said = script(empty, "--against", empty)
    assert status == 1
    table = (REPO / "python/sglang/srt/disaggregation/multimodal/hooks.py").read_text()
    number = len(re.findall(r'\bHook\(\s*f?"(?!torch)', table))
    missing = [line for line in said.splitlines() if line.strip().startswith("missing")]
    assert len([line for line in missing if "resolution step" not in line]) == number
    assert sum("resolution step handle_" in line for line in missing) == 2


def test_a_version_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, str(tmp_path / "absent.whl")]
    ended = subprocess.run(command, capture_output=True, text=True, env={"PIP_NO_INDEX": "1", "PATH": "/usr/bin:/bin"})
    assert ended.returncode != 0
    assert "neither a place nor a release" in ended.stderr
