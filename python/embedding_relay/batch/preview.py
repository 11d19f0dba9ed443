"""Before a run: what its first rows will be asked and why, what the endpoint answers to them, and an estimate."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from embedding_relay.batch.asking.endpoint import Endpoint
from embedding_relay.batch.asking.question import Unaskable, chat_request
from embedding_relay.batch.asking.replies import Answered, failure, result_of
from embedding_relay.batch.errors import Refusal, in_words
from embedding_relay.batch.session.folder import Folder
from embedding_relay.batch.session.records import Asking, Session
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.tasks import Outcome, Result, Task
from embedding_relay.batch.workbook.analysis import Analysis, Choices
from embedding_relay.batch.workbook.analyze import analyze
from embedding_relay.batch.workbook.choices import choose
from embedding_relay.batch.workbook.images import FORMATS
from embedding_relay.batch.workbook.naming import PICTURE_WORDS, PROMPT_WORDS, rank
from embedding_relay.batch.workbook.rows import read_tasks

FIRST_ROWS: Final = 5
MOST_ROWS: Final = 20
# Whoever tries a few rows waits for them.
TRY_SECONDS: Final = 120.0
SHOWN_CHARS: Final = 2000
MOST_PICTURES: Final = 8
THUMBNAIL_SIDE: Final = 160
# A picture is decoded for its thumbnail, and a small file may have very many pixels.
MOST_PIXELS: Final = 50_000_000
# Pillow's names of the kinds of pixels whose thumbnails are smallest as JPEG.
OPAQUE: Final = ("RGB", "L", "CMYK", "YCbCr")


# ---- what is asked


def first_tasks(folder: Folder, session: Session, choices: Choices, settings: Settings, most: int) -> list[Task]:
    """The tasks that were saved; before that, those that a split with `choices` would make. Reads files."""
    if session.split.is_ready():
        return list(itertools.islice(folder.tasks(session.split.attempt), most))
    source, analysis = folder.source(session.kind), analysis_with(folder, session, choices, settings)
    limits, urls = settings.limits, settings.url_rules
    tasks = read_tasks(source, session.kind, analysis, choices, folder.path, limits, urls, lambda share: None)
    return list(itertools.islice(tasks, most))


def analysis_with(folder: Folder, session: Session, choices: Choices, settings: Settings) -> Analysis:
    """The analysis under `choices`. The workbook is read again only if they leave open what the analysis must find."""
    analysis = session.analysis
    if analysis is None:
        raise Refusal(400, f"this file could not be used: {session.where()}")
    if choices == session.choices:
        return analysis
    says_prompt = bool(choices.prompt_column or choices.template)
    if not says_prompt or choices.image_columns is None or choices.sheet not in ("", analysis.sheet):
        return analyze(folder.source(session.kind), session.kind, choices, settings.limits)
    chosen = choose(analysis, choices)
    return msgspec.structs.replace(
        analysis, prompt_column=chosen.prompt_column, image_columns=chosen.image_columns, columns=chosen.columns
    )


class Why(msgspec.Struct, frozen=True):
    """What was chosen, and why."""

    what: str  # "sheet", "prompt" or "pictures"
    name: str
    reason: str


def whys(analysis: Analysis, choices: Choices) -> list[Why]:
    if analysis.requests:
        return [Why("prompt", "each line", "it is a whole request in the format of OpenAI's Batch API")]
    found = list[Why]()
    if analysis.sheet:
        of_several = "the first one with something to ask; the others are left as they are"
        only = "the only one with rows" if sum(sheet.rows > 0 for sheet in analysis.sheets) == 1 else of_several
        found.append(Why("sheet", analysis.sheet, "you chose it" if choices.sheet else only))
    if choices.template:
        found.append(Why("prompt", choices.template, "your template"))
    elif name := analysis.prompt_column:
        named = "its name says so" if rank(name, PROMPT_WORDS) else "the only column of texts"
        found.append(Why("prompt", _called(analysis, name), "you chose it" if choices.prompt_column else named))
    for name in analysis.image_columns:
        named = "its name says so" if rank(name, PICTURE_WORDS) else "its cells are pictures, or name some"
        reason = named if choices.image_columns is None else "you chose it"
        found.append(Why("pictures", _called(analysis, name), reason))
    return found


def _called(analysis: Analysis, name: str) -> str:
    """As the sheet shows it: its letter and its name, where these are not the same."""
    letter = next((column.letter for column in analysis.columns if column.name == name), name)
    return name if letter == name else f"{letter} {name}"


# ---- how a row is shown


class Picture(msgspec.Struct, frozen=True):
    """One of them is empty: a picture of a URL is not fetched, neither by this service nor by its page."""

    url: str = ""
    thumbnail: str = ""  # a data URI; empty also when none can be made


class Question(msgspec.Struct, frozen=True):
    row: int
    prompt: str
    pictures: tuple[Picture, ...]
    more_pictures: int  # that are not among `pictures`
    error: str  # why this row cannot be asked


def question_of(task: Task, folder: Path) -> Question:
    """Reads the pictures of the row."""
    prompt, images = (task.prompt, list(task.images)) if task.body is None else _in_body(task.body)
    shown = tuple(_picture(image, folder) for image in images[:MOST_PICTURES])
    return Question(task.row, shortened(prompt), shown, len(images) - len(shown), task.error)


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


def _in_body(body: dict[str, Any]) -> tuple[str, list[str]]:
    """Texts and pictures of a whole request. Its form is its sender's, so anything may be in it."""
    texts, images = list[str](), list[str]()
    for part in _parts(body):
        match part:
            case str() | {"text": str()}:
                texts.append(part if isinstance(part, str) else part["text"])
            case {"image_url": {"url": str() as url}} | {"image_url": str() as url}:
                images.append(url)
    return "\n".join(texts), images


def _parts(body: dict[str, Any]) -> Iterator[Any]:
    if "messages" not in body:
        yield body.get("prompt")
        return
    messages = body["messages"]
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        yield from content if isinstance(content, list) else (content,)


def _picture(image: str, folder: Path) -> Picture:
    if image[:8].lower().startswith(("http://", "https://")):
        return Picture(url=image if len(image) <= SHOWN_CHARS else "")
    try:
        content = base64.b64decode(image.partition(",")[2]) if image.startswith("data:") else _read(folder, image)
    except (OSError, ValueError):
        return Picture()
    return Picture(thumbnail=_thumbnail(content))


def _read(folder: Path, name: str) -> bytes:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is not in the folder of the session")
    return path.read_bytes()


def _thumbnail(content: bytes) -> str:
    from PIL import Image

    try:
        Image.init()
        known = [kind for kind in FORMATS if kind in Image.OPEN]
        with Image.open(io.BytesIO(content), formats=known) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                return ""
            picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            out = io.BytesIO()
            mode, kind = ("RGB", "JPEG") if picture.mode in OPAQUE else ("RGBA", "PNG")
            picture.convert(mode).save(out, kind)
    except Exception:  # Pillow's readers raise anything at a malformed file
        return ""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


# ---- the endpoint, and a few answers of it


def endpoint_of(settings: Settings) -> Endpoint:
    seconds = min(settings.request_seconds, TRY_SECONDS)
    return Endpoint(settings.endpoint, api_key=settings.endpoint_api_key, request_seconds=seconds)


class EndpointView(msgspec.Struct, frozen=True):
    url: str
    model: str  # the first that it lists
    error: str  # why it cannot be asked; "" when it can


async def look_at_endpoint(settings: Settings) -> EndpointView:
    async with endpoint_of(settings) as endpoint:
        try:
            return EndpointView(endpoint.url, await endpoint.model(), "")
        except ConnectionError as away:
            return EndpointView(endpoint.url, "", str(away))


class Tried(msgspec.Struct, frozen=True):
    result: Result
    seconds: float


class Trial(msgspec.Struct, frozen=True):
    model: str
    rows: tuple[Tried, ...]


async def try_tasks(settings: Settings, session: Session, tasks: Sequence[Task], asking: Asking, folder: Path) -> Trial:
    """Ask these rows once each. Their answers are shown and not kept: the run asks these rows as well."""
    path = session.order.endpoint if session.order else ""
    async with endpoint_of(settings) as endpoint:
        try:
            model = asking.model or await endpoint.model()
        except ConnectionError as away:
            raise Refusal(502, str(away)) from None

        async def tried(task: Task) -> Tried:
            began = time.monotonic()
            result = await _try(endpoint, task, asking, model, folder, path)
            return Tried(result, time.monotonic() - began)

        return Trial(model, tuple(await asyncio.gather(*map(tried, tasks))))


async def _try(endpoint: Endpoint, task: Task, asking: Asking, model: str, folder: Path, path: str) -> Result:
    if task.error:
        return failure(task, task.error)
    try:
        path, body = await asyncio.to_thread(chat_request, task, asking, model, folder, path)
    except (OSError, Unaskable) as error:
        return failure(task, f"this row cannot be asked: {in_words(error)}")
    reply = await endpoint.ask(path, msgspec.json.encode(body))
    if isinstance(reply, Answered):
        return result_of(task, reply)
    return failure(task, reply.reason, getattr(reply, "status", 0))


class Estimate(msgspec.Struct, frozen=True):
    """Of the whole run, if all rows are like those that were answered."""

    rows: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float  # if the endpoint answers no slower with `in_flight` requests at a time
    in_flight: int


def estimate(trial: Trial, rows: int, in_flight: int) -> Estimate | None:
    """None when no row was answered."""
    answered = [one for one in trial.rows if one.result.outcome is Outcome.DONE]
    if not answered:
        return None
    in_flight = min(in_flight, rows)
    share = rows / len(answered)
    return Estimate(
        rows=rows,
        prompt_tokens=round(share * sum(one.result.prompt_tokens for one in answered)),
        completion_tokens=round(share * sum(one.result.completion_tokens for one in answered)),
        seconds=share * sum(one.seconds for one in answered) / in_flight,
        in_flight=in_flight,
    )
