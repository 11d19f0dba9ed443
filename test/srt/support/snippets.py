"""What each kind of block in a page is checked by. A kind that has no rule here is refused.

Commands are parsed by the programs that they are for (support/command_lines.py) or, for the scripts of this repository,
held against their text. Calls with curl must name a route that the server at that port has. JSON and YAML are parsed.
Output must be made of sentences that our code has. A block that a test runs as it stands names that test
(support/pages.py), and Python always does.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import yaml

from support import command_lines
from support.command_lines import Wrong
from support.pages import Block, Command, code_in, commands
from support.repo import DISTRIBUTION, REPO, our_modules

# Programs whose arguments are not ours to check; the files that they name are, by test_docs.py.
PLAIN: Final = frozenset(
    {
        "base64",
        "cd",
        "chmod",
        "chown",
        "cp",
        "git",
        "grep",
        "ls",
        "mkdir",
        "openssl",
        "scp",
        "sha256sum",
        "source",
        "ssh",
    }
    | {"tail", "umask", "useradd"}
)
DEPLOYING: Final = frozenset({"docker", "helm", "ip", "journalctl", "kubectl", "nft", "promtool", "systemctl"})
# Flags of those, where text names one.
OTHER_FLAGS: Final = frozenset(
    {"--device", "--ipc", "--network", "--shm-size", "--ulimit", "--durations", "--no-deps", "--constraint"}
    | {"--require-hashes", "--check", "--epd-disaggregation", "--pd-disaggregation"}
)
DRAWING: Final = re.compile("[┌└│►▼◄─═]")
ROUTES_OF_THE_ROUTER: Final = frozenset(
    {
        "/generate",
        "/health",
        "/liveness",
        "/readiness",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/workers",
    }
)
MERMAID: Final = ("sequenceDiagram", "stateDiagram-v2", "flowchart ")
ELLIPSIS: Final = "…"


def check(block: Block) -> None:
    """Raises `Wrong` for what a reader could not use."""
    if block.run_by:
        check_test_exists(block)
    if block.language not in RULES:
        raise Wrong(f"no rule for blocks of {block.language!r}")
    RULES[block.language](block)


def check_test_exists(block: Block) -> None:
    path, _, name = block.run_by.partition("::")
    file = REPO / path
    if not file.is_file():
        raise Wrong(f"there is no {path}")
    tree = ast.parse(file.read_text())
    if name not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
        raise Wrong(f"{path} has no {name}")
    if block.page.name not in file.read_text():
        raise Wrong(f"{path} does not read {block.page.name}")


# ---- a shell


def check_shell(block: Block) -> None:
    seen = 0
    for command in commands(block.text):
        seen += 1
        check_command(command)
    if not seen:
        raise Wrong("no command")


def check_command(command: Command) -> None:
    environ = {name: value for name, value in command.environ.items() if name.isupper()}
    of_tests = {name for name in environ if name.startswith("RELAY_")}
    if unknown := of_tests - _settings_of_our_tests():
        raise Wrong(f"nothing here reads {unknown.pop()}")
    elsewhere = of_tests | _settings_of_deployments() | {"SOURCE_DATE_EPOCH"}
    command_lines.check_environment({name: environ[name] for name in environ.keys() - elsewhere})
    words = [re.sub(r"^\S*/bin/", "", word) if at == 0 else word for at, word in enumerate(command.words)]
    if not words or words == ["export"]:
        return
    if command_lines.is_known(words):
        command_lines.check_command(words)
    elif words[0].startswith("scripts/"):
        check_script(words)
    elif words[0] in ("python", "python3", "bash") and len(words) > 1 and (REPO / words[1]).is_file():
        check_script(words[1:])
    elif words[0] not in PLAIN | DEPLOYING:
        if words[0] not in PROGRAMS:
            raise Wrong(f"no rule for the program {words[0]}")
        PROGRAMS[words[0]](words[1:])


def check_script(words: Sequence[str]) -> None:
    """One of this repository, with flags that its text has."""
    script = REPO / words[0]
    if not script.is_file():
        raise Wrong(f"there is no {words[0]}")
    own = words[1 : words.index("--") if "--" in words else None]
    text = script.read_text()
    if script.parent == REPO / "benchmark":
        text += "".join(other.read_text() for other in script.parent.glob("*.py"))
    if words[0] == "scripts/demo":
        command_lines.check_relay(["demo", *own])
        return
    for flag in (word.partition("=")[0] for word in own if word.startswith("-")):
        if not re.search(rf"{flag}(?![\w-])", text):
            raise Wrong(f"{words[0]} knows no {flag}")


def check_pip(words: Sequence[str]) -> None:
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for word in words for found in re.findall(r"\[([\w,-]+)\]", word) for name in found.split(",")}
    if unknown := named - set(extras):
        raise Wrong(f"no extra {', '.join(sorted(unknown))}")
    for word in words:
        if word.startswith("sglang-") and word.partition("[")[0] != DISTRIBUTION:
            raise Wrong(f"{word} is not {DISTRIBUTION}")


def check_apt(words: Sequence[str]) -> None:
    known = (REPO / "scripts/setup").read_text() + " ibverbs-providers python3-venv "
    for package in words[1:]:
        if not package.startswith("-") and not re.search(rf"\b{re.escape(package)}\b", known):
            raise Wrong(f"scripts/setup does not install {package}")


def check_python_command(words: Sequence[str]) -> None:
    if words[:1] == ["-c"]:
        ast.parse(words[1])
    elif words[:2] == ["-m", "sglang.bench_serving"]:
        _check_flags(words[2:], _source_of("sglang.benchmark.serving"), words[1])
    elif words[:2] not in (["-m", "venv"], ["-m", "build"], ["-m", "mkdocs"]):
        raise Wrong(f"no rule for python {' '.join(words[:2])}")


def _source_of(module: str) -> str:
    """Without importing it."""
    found = importlib.util.find_spec(module)
    return Path(str(found and found.origin)).read_text()


def _check_flags(words: Sequence[str], text: str, program: str) -> None:
    if unknown := [word for word in words if word.startswith("--") and f'"{word}"' not in text]:
        raise Wrong(f"{program} knows no {unknown[0]}")


# ---- curl


@dataclass(frozen=True)
class Call:
    method: str
    url: str
    data: str = ""
    form: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    output: str = ""

    @property
    def path(self) -> str:
        return urlsplit(self.url).path or "/"


_PLAIN_OPTIONS: Final = (
    *("-s", "-S", "-sS", "-N", "-f", "-i", "-fsS", "-O", "-J", "-OJ"),
    *("--silent", "--show-error", "--fail", "--retry-all-errors"),
)


def curl(words: Sequence[str]) -> Call:
    """The call that `curl` would make, without the program's name. No other options than these."""
    method = url = data = output = ""
    form: list[str] = []
    headers: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in _PLAIN_OPTIONS:
            continue
        if word in ("--retry", "--retry-delay", "--max-time"):
            next(rest)
            continue
        if word == "-X":
            method = next(rest)
        elif word in ("-d", "--json", "--data"):
            data = next(rest)
            headers += ["Content-Type: application/json"] if word == "--json" else []
        elif word in ("-H", "--header"):
            headers.append(next(rest))
        elif word == "-F":
            form.append(next(rest))
        elif word == "-o":
            output = next(rest)
        elif word.startswith("-") or url:
            raise Wrong(f"no rule for {word} of curl")
        else:
            url = word
    sends = data or form
    return Call(method or ("POST" if sends else "GET"), url, data, tuple(form), tuple(headers), output)


def check_curl(words: Sequence[str]) -> None:
    call = curl(words)
    if call.data.startswith(("{", "[")):
        json.loads(call.data)
        if not any("application/json" in header for header in call.headers):
            raise Wrong("JSON is sent without its content type: use --json")
    port = urlsplit(call.url).port
    if port not in SERVERS:
        raise Wrong(f"no rule for a server at port {port}")
    if not SERVERS[port](call):
        raise Wrong(f"the server at port {port} has no {call.method} {call.path}")


def _router_has(call: Call) -> bool:
    """The program says no list of its routes: these are in it, with no end between one and the next."""
    return call.path in ROUTES_OF_THE_ROUTER and call.path.encode() in _router_program()


@functools.cache
def _router_program() -> bytes:
    import sglang_router

    (program,) = Path(str(sglang_router.__file__)).parent.glob("*.so")
    return program.read_bytes()


def _instance_has(call: Call) -> bool:
    from sglang.srt.entrypoints.http_server import app

    return call.path == "/metrics" or _among(app.routes, call)


def _batch_service_has(call: Call) -> bool:
    from embedding_relay.batch.http.app import create_app
    from embedding_relay.batch.settings import Settings

    return _among(create_app(Settings(endpoint="http://127.0.0.1:1", cache_dir=Path("/nowhere"))).routes, call)


def _among(routes: Sequence[Any], call: Call) -> bool:
    return any(
        call.method in (getattr(route, "methods", None) or ()) and route.path_regex.fullmatch(_filled(call.path))
        for route in _flat(routes)
    )


def _flat(routes: Sequence[Any]) -> Iterator[Any]:
    """FastAPI keeps included routers apart in some versions."""
    for route in routes:
        if hasattr(route, "path_regex"):
            yield route
        elif inner := getattr(getattr(route, "original_router", route), "routes", None):
            yield from _flat(inner)


def _filled(path: str) -> str:
    """Something in place of a shell's variables."""
    return re.sub(r"\$\{?\w+\}?", "0123456789abcdef", path)


SERVERS: Final[dict[int | None, Callable[[Call], bool]]] = {
    8000: _router_has,
    29000: lambda call: call.path == "/metrics",  # the router's own, where --prometheus-port says so
    30000: _instance_has,
    30001: _instance_has,
    8600: _batch_service_has,
}
PROGRAMS: Final[dict[str, Callable[[Sequence[str]], None]]] = {
    "pip": check_pip,
    "apt-get": check_apt,
    "curl": check_curl,
    "python": check_python_command,
    "python3": check_python_command,
    "mkdocs": lambda words: None,
}


# ---- other languages


def check_python(block: Block) -> None:
    ast.parse(block.text)
    if not block.run_by:
        raise Wrong("no test runs this: name it in the line above")


def check_json(block: Block) -> None:
    json.loads(block.text)


def check_json_lines(block: Block) -> None:
    for line in block.text.splitlines():
        json.loads(line)


def check_yaml(block: Block) -> None:
    list(yaml.safe_load_all(block.text))


def check_mermaid(block: Block) -> None:
    if not block.text.lstrip().startswith(MERMAID):
        raise Wrong(f"no diagram of {', '.join(MERMAID)}")


def check_promql(block: Block) -> None:
    if unknown := set(re.findall(r"sglang:embedding_relay_\w+", block.text)) - metrics():
        raise Wrong(f"no metric {unknown.pop()}")


def check_output(block: Block) -> None:
    """A drawing, or lines that our code writes."""
    if block.run_by or DRAWING.search(block.text):
        return
    for line in filter(str.strip, block.text.splitlines()):
        if not any(_follow(pieces, line) for pieces in _sentences()):
            raise Wrong(f"nothing here writes: {line}")


def check_screen(block: Block) -> None:
    """What a command shows, in columns: all words of it are in the texts of our code."""
    known = {word for pieces in _texts() for piece in pieces for word in re.findall("[a-z]{4,}", piece)}
    if unknown := set(re.findall("[a-z]{4,}", block.text)) - known:
        raise Wrong(f"nothing here writes: {', '.join(sorted(unknown))}")


@functools.cache
def _texts() -> list[list[str]]:
    """Those of our code: of each what stands still between its values."""
    trees = [ast.parse(path.read_text()) for path in our_modules().values() if path.suffix == ".py"]
    return [pieces for tree in trees for node in ast.walk(tree) if (pieces := _pieces(node))]


@functools.cache
def _sentences() -> list[list[str]]:
    """Those that are long enough to be recognised."""
    return [pieces for pieces in _texts() if sum(map(len, pieces)) >= 20]


def _follow(pieces: Sequence[str], line: str) -> bool:
    at = 0
    for piece in pieces:
        at = line.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def _pieces(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
        return re.split(r"%(?:\.\d+)?[a-z]", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(one.value if isinstance(one, ast.Constant) else "\0" for one in node.values).split("\0")
    return []


RULES: Final[dict[str, Callable[[Block], None]]] = {
    "bash": check_shell,
    "python": check_python,
    "json": check_json,
    "jsonl": check_json_lines,
    "yaml": check_yaml,
    "mermaid": check_mermaid,
    "promql": check_promql,
    "markdown": lambda block: None,
    "text": check_output,
    "console": check_screen,
    "": check_output,
}


# ---- what stands in back-ticks


def check_code(text: str) -> None:
    """Commands, flags, settings and metrics that a page names in its sentences."""
    for code in code_in(text):
        for name in re.findall(r"\b(?:SGLANG|MC|MOONCAKE|SESSION|OMP|GOMP|HF)_[A-Z0-9_]*[A-Z0-9]\b", code):
            if ELLIPSIS not in code:
                command_lines.check_environment([name])
        for name in re.findall(r"\bRELAY_[A-Z_]*[A-Z]\b", code):
            if name not in _settings_of_our_tests():
                raise Wrong(f"nothing here reads {name}")
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", code):
            if flag not in flags() | OTHER_FLAGS:
                raise Wrong(f"nothing here knows {flag}")
        for name in re.findall(r"\bsglang:embedding_relay_\w+[a-z]", code):
            if name not in metrics():
                raise Wrong(f"no metric {name}")
        if code.startswith("sglang-relay "):
            _check_verbs(code.split()[1:])


def _check_verbs(words: Sequence[str]) -> None:
    """The commands that a mention names: what follows may be left out."""
    parser = command_lines.build_parser()
    for word in words:
        below = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
        if not below or not word.isascii() or not word.islower() or word.startswith("-"):
            return
        if word not in below[0].choices:
            raise Wrong(f"sglang-relay knows no {word}")
        parser = below[0].choices[word]


@functools.cache
def flags() -> frozenset[str]:
    """Of all programs that pages speak of."""
    from sglang_router.router_args import RouterArgs

    from sglang.srt.server_args import ServerArgs

    known: set[str] = set()
    parsers = [command_lines.build_parser()]
    for add in (ServerArgs.add_cli_args, functools.partial(RouterArgs.add_cli_args, use_router_prefix=False)):
        parsers.append(argparse.ArgumentParser())
        add(parsers[-1])
    while parsers:
        for action in parsers.pop()._actions:
            known |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    for path in _scripts_and_tests():
        known |= set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", path.read_text()))
    return frozenset(known)


@functools.cache
def metrics() -> frozenset[str]:
    """Those that instances publish; the page of metrics is written from the code. Histograms have three of each."""
    named = set(re.findall(r"`(sglang:embedding_relay_\w+)`", (REPO / "docs/metrics.md").read_text()))
    return frozenset(named | {f"{name}_{part}" for name in named for part in ("bucket", "count", "sum")})


@functools.cache
def _settings_of_our_tests() -> frozenset[str]:
    return frozenset(
        name for path in _scripts_and_tests() for name in re.findall(r"\bRELAY_[A-Z_]*[A-Z]\b", path.read_text())
    )


@functools.cache
def _settings_of_deployments() -> frozenset[str]:
    """What their files take from the environment of who starts them."""
    files = [path for path in (REPO / "deploy").rglob("*") if path.suffix in (".yaml", ".yml", ".env", ".service")]
    return frozenset(name for path in files for name in re.findall(r"\$\{([A-Z_]+)", path.read_text()))


def _scripts_and_tests() -> list[Path]:
    """Without the tests of this module, which plant what nobody knows."""
    tests = [path for path in (REPO / "test/srt").rglob("*.py") if path.name != "test_snippets.py"]
    return [
        *tests,
        *(path for place in ("scripts", "benchmark") for path in (REPO / place).iterdir() if path.is_file()),
    ]
