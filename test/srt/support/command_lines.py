"""Command lines and settings of pages and of deployment files, checked by the parsers of the programs that read them.

Nothing is started, no model is looked for, and values that are free text are not checked. `Wrong` says what a program
would refuse. SGLang, its router and Mooncake are imported by the checks that need them: lanes without them can import
this module, and can check our own command and our own settings.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from embedding_relay import config
from embedding_relay.protocol.errors import SettingError
from embedding_relay.tools.cli import build_parser

LAUNCH_ROUTER: Final = "sglang_router.launch_router"
LAUNCH_SERVER: Final = "sglang.launch_server"

# Read by name, without a declaration; the file of SGLang that does it.
_IN_SGLANG: Final = {
    "SGLANG_HOST_IP": "srt/utils/network.py",
    "SGLANG_CPU_OMP_THREADS_BIND": "srt/utils/numa_utils.py",
}
# Of OpenMP, of Hugging Face's libraries, of whoever runs a command.
_OF_OTHERS: Final = frozenset(
    {"CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "HOME", "HOSTNAME", "PATH", "PWD"}
    | {"GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"}
)
# Values that name files of the machine where the command runs.
_FILES: Final = (config.SECRET_FILE, config.ALLOWED_MEDIA_DIR)


class Wrong(ValueError):
    """What a program would refuse, in its own words."""


def check_command(words: Sequence[str]) -> Any:
    """One command as a shell would start it: `sglang serve …`, the router, `sglang-relay …`."""
    for first, check in _PROGRAMS.items():
        if tuple(words[: len(first)]) == first:
            return check(words[len(first) :])
    raise Wrong(f"no known program: {' '.join(words[:3])}")


def is_known(words: Sequence[str]) -> bool:
    """Whether `check_command` has a parser for it."""
    return any(tuple(words[: len(first)]) == first for first in _PROGRAMS)


def check_sglang_serve(argv: Sequence[str]) -> argparse.Namespace:
    """What follows `sglang serve`, by SGLang's own parser with our two modes."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    if argv and not argv[0].startswith("-"):
        argv = ["--model-path", *argv]  # as `sglang serve` does
    parser = _strict_parser()
    ServerArgs.add_cli_args(parser)
    return _parsed(parser, argv)


def check_router(argv: Sequence[str]) -> Any:
    """What follows `python -m sglang_router.launch_router`, by the router's own parser; also its URLs and ports."""
    from sglang_router.router_args import RouterArgs

    parser = _strict_parser()
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    arguments = _parsed(parser, argv)
    try:
        return RouterArgs.from_cli_args(arguments, use_router_prefix=False)
    except ValueError as error:
        raise Wrong(str(error)) from None


def check_relay(argv: Sequence[str]) -> argparse.Namespace:
    """What follows `sglang-relay`."""
    return _parsed(build_parser(), argv)


def check_environment(variables: Mapping[str, str] | Iterable[str]) -> None:
    """Names that somebody reads; of our own settings also the values, if `variables` has them."""
    if unknown := sorted(set(variables) - set(ours()) - _OF_OTHERS):
        unknown = [name for name in unknown if not _is_read_elsewhere(name)]
    if unknown:
        raise Wrong(f"nobody reads {', '.join(unknown)}")
    if isinstance(variables, Mapping):
        values = {name: value for name, value in variables.items() if name not in _FILES}
        try:
            config.RelayConfig.from_environment(values)
        except SettingError as error:
            raise Wrong(str(error)) from None


def ours() -> frozenset[str]:
    """The environment variables that instances and the batch service read by themselves."""
    from embedding_relay.batch import settings

    named = [value for module in (config, settings) for value in vars(module).values() if isinstance(value, str)]
    return frozenset(name for name in named if name.startswith(("SGLANG_", "MC_", "MOONCAKE_", "SESSION_")))


def _strict_parser() -> argparse.ArgumentParser:
    """A flag must be written out: what an abbreviation means may change with the next flag."""
    return argparse.ArgumentParser(allow_abbrev=False)


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return parser.parse_args(list(argv))
    except SystemExit as ended:
        if not ended.code:
            return argparse.Namespace()  # --help, --version
        raise Wrong(said.getvalue().strip().splitlines()[-1]) from None


def _is_read_elsewhere(name: str) -> bool:
    """By SGLang, or by Mooncake's engine, whose names are in its library."""
    if name.startswith("SGLANG_"):
        from sglang.srt.environ import envs

        return hasattr(type(envs), name) or (name in _IN_SGLANG and name in _source_of_sglang(_IN_SGLANG[name]))
    return name.startswith(("MC_", "MOONCAKE_")) and name.encode() in _mooncakes_engine()


def _source_of_sglang(path: str) -> str:
    import sglang

    return (Path(str(sglang.__file__)).parent / path).read_text()


@functools.cache
def _mooncakes_engine() -> bytes:
    found = importlib.util.find_spec("mooncake.engine")
    return Path(found.origin).read_bytes() if found and found.origin else b""


_PROGRAMS: Final[dict[tuple[str, ...], Callable[[Sequence[str]], Any]]] = {
    ("sglang", "serve"): check_sglang_serve,
    ("python", "-m", LAUNCH_SERVER): check_sglang_serve,
    ("python3", "-m", LAUNCH_SERVER): check_sglang_serve,
    ("python", "-m", LAUNCH_ROUTER): check_router,
    ("python3", "-m", LAUNCH_ROUTER): check_router,
    ("sglang-relay",): check_relay,
}
