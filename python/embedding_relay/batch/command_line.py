"""`sglang-relay batch`: its options, and how they become settings. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedding_relay.batch.settings import Settings

MISSING = "sglang-relay batch: {} is missing: pip install 'sglang-embedding-relay[batch]'"
# They are imported when a workbook needs them; that they are not installed is said at the start.
IMPORTED_LATE = ("openpyxl", "PIL", "tqdm")
RUN_STATUS = """
exit status:
  0    the answered workbook is written, and every row has its answer
  1    nothing was written; the reason is on stderr
  2    wrong options
  3    the answered workbook is written, and rows of it failed: --retry-failed asks these again
  4    gave up: the endpoint did not answer for --give-up-after seconds; the same command goes on from there
  130  stopped by Ctrl-C; the same command goes on from there
"""
PREVIEW_STATUS = """
exit status:
  0    every row that was looked at can be asked, or was answered (--try)
  1    the workbook cannot be used, or the endpoint cannot be reached; the reason is said
  2    wrong options
  3    rows that were tried failed
"""
ENVIRONMENT = """
environment:
  SESSION_CACHE_DIR         where sessions are kept, unless --cache-dir says so
  SESSION_STORE             the store, unless --store says so: its URL may have a password (serve)
  SESSION_API_KEY           the key that this service asks its callers for (serve)
  SESSION_ENDPOINT_API_KEY  the key that the endpoint asks for
"""


def add_batch_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    batch = commands.add_parser(
        "batch",
        help="run a workbook of prompts, as a service or from the terminal",
        description="Ask an OpenAI-compatible endpoint about every row of a workbook (.xlsx, .csv, .jsonl, or a .zip "
        "of one of them with its pictures), and get the same workbook back with the answers.",
    )
    verbs = batch.add_subparsers(title="commands", dest="verb", required=True, metavar="COMMAND")
    _add_serve(verbs)
    _add_run(verbs)
    _add_preview(verbs)


def _add_serve(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = verbs.add_parser(
        "serve",
        help="a page, an HTTP API and OpenAI's Batch API",
        description="Serve a page, an HTTP API (see /docs) and OpenAI's Files and Batches API. Runs survive a restart.",
        epilog=ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=_port, default=8600, help="port to listen on (default: %(default)s)")
    serve.add_argument("--workers", type=_positive, default=4, metavar="N", help="processes (default: %(default)s)")
    serve.add_argument(
        "--store", default="", metavar="URL", help="redis://… for workers on several machines (default: a file)"
    )
    serve.add_argument(
        "--files", default="", metavar="URL",
        help="s3://BUCKET/FOLDER when these machines share no file system (default: they share --cache-dir)",
    )  # fmt: skip
    serve.add_argument(
        "--max-runs", type=_positive, default=8, metavar="N",
        help="runs at the same time, of all workers together; others wait for their turn (default: %(default)s)",
    )  # fmt: skip
    serve.add_argument(
        "--max-in-flight", type=_positive, default=0, metavar="N",
        help="requests in flight in all of these runs together (default: --max-runs times --concurrency)",
    )  # fmt: skip
    serve.add_argument(
        "--keep-days", type=_positive_float, default=7, metavar="DAYS",
        help="how long a session is kept after its last change (default: %(default)s)",
    )  # fmt: skip
    serve.add_argument(
        "--lease-seconds", type=_positive_float, default=10, metavar="S",
        help="silence after which others take over what a worker did (default: %(default)s)",
    )  # fmt: skip
    serve.set_defaults(run=_serve)


def _add_run(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = verbs.add_parser(
        "run",
        help="one workbook, from the terminal, with a progress bar",
        description="Answer one workbook and write it, with its answers, to --out. Needs no server. Started again with "
        "the same arguments it goes on where it stopped; Ctrl-C stops it.",
        epilog=RUN_STATUS + ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_question(run)
    run.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the answered workbook")
    _add_common(run)
    again = run.add_mutually_exclusive_group()
    again.add_argument("--fresh", action="store_true", help="forget an earlier run and begin again")
    again.add_argument(
        "--retry-failed", action="store_true",
        help="after a run with the same arguments: ask the rows again that have failed, and only these",
    )  # fmt: skip
    run.add_argument(
        "--give-up-after", type=_positive_float, metavar="S",
        help="end when the endpoint cannot be reached, or answers nothing but errors, for so long (default: never)",
    )  # fmt: skip
    run.set_defaults(run=_run)


def _add_preview(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    preview = verbs.add_parser(
        "preview",
        help="what a run would ask, before it is asked; with --try a few answers and an estimate",
        description="Show which sheet and columns were chosen and why, what the first rows will be asked, and which "
        "endpoint and model will be asked. With --try these rows are asked once, their answers are shown, and the "
        "tokens and the time of the whole workbook are estimated from them. Nothing is kept.",
        epilog=PREVIEW_STATUS + ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_question(preview)
    preview.add_argument("--rows", type=_few, default=5, metavar="N", help="how many rows, up to 20 (default: 5)")
    preview.add_argument("--try", action="store_true", dest="try_them", help="ask these rows, and show their answers")
    _add_common(preview)
    preview.set_defaults(run=_preview)


def _add_question(parser: argparse.ArgumentParser) -> None:
    """The workbook, and what is asked about it."""
    parser.add_argument("workbook", type=Path, metavar="WORKBOOK", help=".xlsx, .csv, .jsonl, or a .zip with pictures")
    parser.add_argument("--template", default="", help="column names in braces: 'Translate {text} into {language}'")
    parser.add_argument("--prompt-column", default="", metavar="NAME", help="the column that is asked (default: found)")
    parser.add_argument(
        "--image-column", action="append", metavar="NAME", dest="image_columns",
        help="a column with pictures, may be repeated; '' for none (default: found)",
    )  # fmt: skip
    parser.add_argument(
        "--sheet", default="", metavar="NAME", help="the sheet to use (default: the first with prompts)"
    )
    parser.add_argument("--model", default="", help="name of the model (default: the first that the endpoint lists)")
    parser.add_argument("--system", default="", help="system prompt for every row")
    parser.add_argument("--max-tokens", type=_positive, metavar="N", help="longest answer (default: the endpoint's)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 to 2 (default: the endpoint's)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", required=True, metavar="URL", help="http://ROUTER:PORT of the pair, or any other")
    parser.add_argument(
        "--concurrency", type=_positive, default=32, metavar="N",
        help="requests in flight for one workbook (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--retries", type=_not_negative, default=5, metavar="N",
        help="more tries for a row after a 5xx answer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--request-seconds", type=_positive_float, default=600, metavar="S",
        help="longest wait for one answer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="where sessions are kept")
    parser.add_argument(
        "--max-upload-mib", type=_positive, default=200, metavar="MIB", help="largest workbook (default: %(default)s)"
    )
    parser.add_argument(
        "--max-expanded-mib", type=_positive, default=2048, metavar="MIB",
        help="the most that a compressed workbook may expand to (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--max-rows", type=_positive, default=1_000_000, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--allow-private-urls", action="store_true", help="pass on picture URLs that lead to private addresses"
    )
    parser.add_argument(
        "--allowed-media-domains",
        nargs="+",
        default=[],
        metavar="HOST",
        help="pass on picture URLs of these only",
    )


# ---- values


def _number(text: str, kind: type[Any], least: float, what: str) -> Any:
    try:
        number = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not number >= least:
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return number


def _positive(text: str) -> int:
    return int(_number(text, int, 1, "positive"))


def _few(text: str) -> int:
    number = _positive(text)
    if number > 20:
        raise argparse.ArgumentTypeError(f"{text} is more than 20")
    return number


def _not_negative(text: str) -> int:
    return int(_number(text, int, 0, "zero or more"))


def _positive_float(text: str) -> float:
    return float(_number(text, float, 0.001, "positive"))


def _port(text: str) -> int:
    port = int(_number(text, int, 0, "a port"))
    if port > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return port


# ---- what they start


def settings_of(arguments: argparse.Namespace, **more: Any) -> Settings:
    from embedding_relay.batch.settings import Settings, default_cache_dir, from_environment

    endpoint = arguments.endpoint.rstrip("/").removesuffix("/v1")
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"--endpoint {arguments.endpoint}: this is no http:// or https:// URL")
    settings = Settings(
        endpoint=endpoint,
        cache_dir=(arguments.cache_dir or default_cache_dir()).absolute(),
        concurrency=arguments.concurrency,
        retries=arguments.retries,
        request_seconds=arguments.request_seconds,
        upload_mib=arguments.max_upload_mib,
        expanded_mib=arguments.max_expanded_mib,
        rows=arguments.max_rows,
        allow_private_urls=arguments.allow_private_urls,
        allowed_media_domains=tuple(arguments.allowed_media_domains),
        **from_environment(),
        **more,
    )
    _ = settings.url_rules  # raises for a domain that is none, so that it is said at the start
    return settings


def _serve(arguments: argparse.Namespace) -> int:
    try:
        _require_installed(IMPORTED_LATE)
        from embedding_relay.batch.http import serve
        from embedding_relay.batch.settings import DAY, default_store

        settings = settings_of(
            arguments,
            host=arguments.host,
            port=arguments.port,
            workers=arguments.workers,
            store=arguments.store or default_store(),
            files=arguments.files,
            max_runs=arguments.max_runs,
            max_in_flight=arguments.max_in_flight,
            keep_seconds=arguments.keep_days * DAY,
            lease_seconds=arguments.lease_seconds,
        )
    except (ModuleNotFoundError, ValueError) as error:
        return _cannot(error)
    return serve.run(settings)


def _run(arguments: argparse.Namespace) -> int:
    try:
        _require_installed(IMPORTED_LATE)
        from embedding_relay.batch import terminal

        settings = settings_of(arguments)
    except (ModuleNotFoundError, ValueError) as error:
        return _cannot(error)
    return terminal.run(settings, arguments)


def _preview(arguments: argparse.Namespace) -> int:
    try:
        _require_installed(IMPORTED_LATE)
        from embedding_relay.batch import terminal_preview

        settings = settings_of(arguments)
    except (ModuleNotFoundError, ValueError) as error:
        return _cannot(error)
    return terminal_preview.preview(settings, arguments)


def _require_installed(names: Iterable[str]) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)


def _cannot(error: Exception) -> int:
    is_missing = isinstance(error, ModuleNotFoundError)
    print(MISSING.format(getattr(error, "name", "")) if is_missing else f"sglang-relay batch: {error}", file=sys.stderr)
    return 1
