"""`sglang-relay trace`: the options, and what is done with them. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from embedding_relay.tools.trace_story import Story

# As many as an instance lists.
_MOST: Final = 50
_UNKNOWN: Final = """\
Each process of an instance remembers its latest moments, some of each request, until it ends
(SGLANG_EMBEDDING_TRACE_EVENTS); requests without a picture, video or audio are not noted.
`--last 10` in place of the room lists what is remembered. The log has the number after `room=`."""


def run(arguments: argparse.Namespace) -> int:
    """0, 1 if nobody knows of the request, 2 if no instance answers or the options are wrong."""
    from embedding_relay.tools.trace_ask import ask_all, latest
    from embedding_relay.tools.trace_story import tell

    try:
        room, urls = _understood(arguments)
        key = arguments.key_file.read_text().strip() if arguments.key_file else None
    except (OSError, ValueError) as error:
        return _complain(str(error), 2)
    silent: dict[str, str] = {}
    rooms = [room] if room is not None else latest(urls, arguments.last, key, silent)
    told = ask_all(urls, rooms, key, silent)
    for url, problem in silent.items():
        _complain(f"{url}: {problem}")
    if len(silent) == len(urls):
        return 2
    stories = [story for one in rooms if (story := tell(one, told)) is not None]
    if not stories:
        asked = f"room {room} is not known to" if room is not None else "no request is remembered by"
        return _complain(f"{asked} {', '.join(urls)}.\n{_UNKNOWN}", 1)
    if arguments.json:
        _print_json(told)
    else:
        _show(stories, every_round=arguments.rounds)
    return _write_svg(arguments.svg, stories[0]) if arguments.svg else 0


def _write_svg(path: Path, story: Story) -> int:
    from embedding_relay.tools import trace_svg

    try:
        path.write_text(trace_svg.drawn(story))
    except OSError as error:
        return _complain(f"--svg {path}: {error.strerror}", 2)
    return 0


def draw(path: Path, room: int, urls: Sequence[str], title: str) -> None:
    """For the demo. Raises OSError if the file cannot be written, LookupError if nobody has noted the request."""
    from embedding_relay.tools import trace_svg
    from embedding_relay.tools.trace_ask import ask_all
    from embedding_relay.tools.trace_story import tell

    silent: dict[str, str] = {}
    if (story := tell(room, ask_all(urls, [room], None, silent))) is None:
        raise LookupError("; ".join(silent.values()) or f"nobody has noted room {room}")
    path.write_text(trace_svg.drawn(story, title))


def _complain(text: str, status: int = 0) -> int:
    print(f"sglang-relay trace: {text}", file=sys.stderr)
    return status


def _understood(arguments: argparse.Namespace) -> tuple[int | None, list[str]]:
    """The room, if there is one, and the instances; ValueError with a sentence."""
    numbers = [word for word in arguments.what if word.isascii() and word.isdigit()]
    urls = [_with_scheme(word) for word in arguments.what if word not in numbers]
    if len(numbers) + (arguments.last is not None) != 1:
        raise ValueError("name one room by its number, or ask for the latest with --last N")
    if arguments.router and arguments.key_file:
        raise ValueError("name the instances yourself: with --router the key would go wherever the router points")
    if arguments.svg and arguments.last not in (None, 1):
        raise ValueError("--svg draws one request: name its room, or --last 1")
    if arguments.router:
        from embedding_relay.tools.top import members_of

        urls += members_of(_with_scheme(arguments.router))
    if not urls:
        raise ValueError("name the instances, such as http://10.0.0.1:30000 http://10.0.0.2:30000, or --router URL")
    return (int(numbers[0]) if numbers else None), list(dict.fromkeys(urls))


def _with_scheme(url: str) -> str:
    return (url if "://" in url else f"http://{url}").rstrip("/")


def _print_json(told: Sequence[object]) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(told)).decode())


def _show(stories: Sequence[Story], *, every_round: bool) -> None:
    from embedding_relay.tools import trace_text

    if len(stories) > 1:
        print("\n".join(map(trace_text.one_line, stories)))
        return
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    print("\n".join(trace_text.lines(stories[0], every_round=every_round, plain=plain)))


# ---- the command


def add_trace_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "trace",
        help="where the time of one request went, across both instances",
        usage="sglang-relay trace (ROOM | --last N) (INSTANCE ... | --router URL) [options]",
        description="Show what the instances have noted of one request: received, processed, tower, each chunk and "
        "resume, copied, handed over, prefill, first token. Without --admin-api-key an instance answers only callers "
        "of its own machine: docs/tracing.md says how to ask from elsewhere, and what each word means.",
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="ROOM INSTANCE",
        help="the number after room= in the logs, and the URLs of an encode and a language instance",
    )
    parser.add_argument("--last", type=_most, metavar="N", help="the latest request (1), or a list of the latest")
    parser.add_argument("--router", metavar="URL", help="ask the instances that this router has")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="a file with the key of --admin-api-key")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the timeline into this file as well")
    parser.add_argument("--rounds", action="store_true", help="tell every round, however many there were")
    parser.add_argument("--json", action="store_true", help="what the instances answered, for a script")
    parser.set_defaults(run=run)


def _most(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:4]) <= _MOST or len(text) > 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {_MOST}")
    return int(text)
