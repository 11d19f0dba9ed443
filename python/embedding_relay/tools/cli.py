"""The `sglang-relay` command line. A subcommand imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from embedding_relay import __version__
from embedding_relay.batch.command_line import add_batch_command
from embedding_relay.tools import tiny_model
from embedding_relay.tools.size import add_size_command
from embedding_relay.tools.trace import add_trace_command

# What only SGLang brings along.
MISSING = "sglang-relay {}: {} is missing: pip install 'sglang-embedding-relay[sglang]'"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-relay", description="Tools of sglang-embedding-relay: encode/language disaggregation for SGLang."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    tiny = commands.add_parser(
        "tiny-model",
        help="write a tiny vision-language model with random weights",
        description="Write a vision-language model of a few megabytes: a real architecture and processor, random "
        "weights, meaningless text. Needs no download and no accelerator. Equal arguments give equal files.",
    )
    tiny.add_argument("out", type=Path, metavar="OUT", help="directory to write the model to")
    _add_family(tiny, "architecture")
    tiny.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: %(default)s)")
    tiny.set_defaults(run=_tiny_model)

    secret = commands.add_parser(
        "make-secret",
        help="write a new secret for the instances of one deployment",
        description="Write a new secret to FILE, readable by you only. Every instance of a deployment gets a copy, and "
        "SGLANG_EMBEDDING_SECRET_FILE tells it where. A FILE that exists is not replaced.",
    )
    secret.add_argument("file", type=Path, metavar="FILE", help="where to write it")
    secret.set_defaults(run=_make_secret)

    demo = commands.add_parser(
        "demo",
        help="start everything on this machine and watch one long picture cross over",
        description="Start an encode instance, a language instance and the router on this machine, ask one question "
        "about a picture too long for one transfer, say what crossed over, and stop everything again.",
    )
    _add_demo_arguments(demo)
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser(
        "doctor",
        help="check a machine, and a running instance, before there is trouble",
        description="Check whether this machine can run an instance: versions, wheels, libraries, ports, RDMA, shared "
        "memory, clock and cores, with a test transfer. With --peer also check an instance that runs: how this machine "
        "reaches it, its settings and its clock, with a picture whose rows come here. Each line that is not well says "
        "what to do. Exit status: 0 if nothing failed (whatever was warned of), 1 if something did, 2 for a wrong "
        "option.",
    )
    _add_doctor_arguments(doctor)
    doctor.set_defaults(run=_doctor)

    top = commands.add_parser(
        "top",
        help="watch both halves in a terminal: pool, queues, rates, rounds, planes, quarantine",
        description="Show what instances that run with --enable-metrics are doing, again and again until Ctrl-C. "
        "Rates, rounds and waits are those of the time since the picture before.",
    )
    _add_top_arguments(top)
    top.set_defaults(run=functools.partial(_top, top))
    add_batch_command(commands)
    add_size_command(commands)
    add_trace_command(commands)
    return parser


def _add_family(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--family",
        choices=list(tiny_model.FAMILIES),
        default=tiny_model.DEFAULT_FAMILY,
        help=f"{what} (default: %(default)s)",
    )


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    _add_family(parser, "tiny model to use")
    parser.add_argument("--model", type=Path, metavar="PATH", help="a model of yours instead of a tiny one")
    parser.add_argument("--image", type=Path, metavar="PATH", help="a picture of yours instead of coloured squares")
    parser.add_argument("--prompt", default="What is in this picture?", help="the question (default: %(default)s)")
    parser.add_argument(
        "--default-tokens",
        type=_positive,
        default=128,
        metavar="N",
        help="token rows the language instance has space for: the fewer, the more rounds (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens", type=_positive, default=16, metavar="N", help="length of the answer (default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "accelerator"), default="auto", help="where to run (default: %(default)s)"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the timeline of the request into this file")
    parser.add_argument("--keep", action="store_true", help="leave the servers running until Ctrl-C")


def _add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer",
        type=_server,
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="an instance that runs, by its HTTP port (better) or by its bootstrap port; it is compared with this "
        "environment. Several are compared with each other: name both halves of a pair",
    )
    parser.add_argument("--api-key", metavar="KEY", help="of the peers, if they were started with one")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address of this machine for the test transfer within it (default: %(default)s)",
    )
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="also import SGLang and apply every hook, as a server does at its start, and takes as long",
    )
    parser.add_argument("--json", action="store_true", help="write all findings as one JSON object")


def _add_top_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "instances",
        type=_server,
        nargs="*",
        metavar="HOST:PORT",
        help="an encode or language instance, by its HTTP port",
    )
    parser.add_argument("--router", type=_server, metavar="HOST:PORT", help="also watch all instances of this router")
    parser.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="SECONDS", help="between two looks (default: %(default)g)"
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="look twice, a second apart, print once and end; status 1 if an instance was not seen",
    )


def _server(text: str) -> str:
    """The URL of a server: of `host:port`, or of a URL that has no path."""
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        is_one = parts.scheme in ("http", "https") and parts.hostname and parts.port and parts.path in ("", "/")
    except ValueError:  # a port that is none
        is_one = False
    if not is_one or parts.query or parts.fragment or parts.username:
        raise argparse.ArgumentTypeError(f"{text!r} is no address of a server: it should be like 10.0.0.1:30000")
    return f"{parts.scheme}://{parts.netloc}"


def _seconds(text: str) -> float:
    number = float(text)
    if not 0.1 <= number <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.1 to 3600")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _tiny_model(arguments: argparse.Namespace) -> int:
    try:
        tiny_model.make(arguments.out, arguments.family, arguments.seed)
    except ModuleNotFoundError as error:
        print(MISSING.format(arguments.command, error.name), file=sys.stderr)
        return 1
    print(arguments.out)
    return 0


def _make_secret(arguments: argparse.Namespace) -> int:
    from embedding_relay import keys

    try:
        keys.make_secret(arguments.file)
    except OSError as error:
        print(f"sglang-relay make-secret: {arguments.file}: {error.strerror}", file=sys.stderr)
        return 1
    print(arguments.file)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from embedding_relay.tools import demo

    return demo.run(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from embedding_relay.tools import doctor

    return doctor.run(arguments)


def _top(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if not arguments.instances and not arguments.router:
        parser.error("name the instances to watch, or the --router that has them")
    from embedding_relay.tools import top

    return top.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
