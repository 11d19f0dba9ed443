"""`sglang-relay size`: what the pictures of a model take on their way, and the settings that follow from it.

Everything comes from the model's configuration, from the code that lays the buffers out, and from what the operator has
measured. Nothing is measured or guessed here, and neither SGLang nor torch is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from embedding_relay.memory.layout import BufferLayout

MIB: Final = 2**20
# As SGLang's --dtype names them.
_DTYPES: Final = {name: name for name in ("bfloat16", "float16", "float32")} | {"half": "float16", "float": "float32"}
# Of SGLang, where nothing else is set (SGLANG_VLM_CACHE_SIZE_MB).
ROW_CACHE_MB: Final = 100
# Beside a model's config.json: what its processor does to a picture. Older models have the first, newer the second.
_PROCESSORS: Final = ("preprocessor_config.json", "processor_config.json")
# Their pictures keep their proportions, and become a grid of patches. The number: how many frames a picture counts as
# where its pixels are compared with the limits.
_GRIDS: Final = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe", "paddleocr_vl"), 1),
    **dict.fromkeys(("glm4v", "glm_ocr"), 2),
}


class CannotSize(ValueError):
    """What is missing, and what to give instead."""


@dataclasses.dataclass(frozen=True)
class Model:
    """What a configuration says about rows."""

    architecture: str
    hidden_size: int
    dtype: str
    deepstack_rows: int
    config: Mapping[str, Any]
    processor: Mapping[str, Any]

    def rows_of_picture(self, width: int, height: int) -> int:
        """Of its embedding. Tokens that mark its beginning, its end and its lines are text."""
        kind, inner = str(self.config.get("model_type")), _inner(self.config)
        if fixed := inner.get("mm_tokens_per_image"):
            return int(fixed)
        vision = inner.get("vision_config") or {}
        patch = int(vision.get("patch_size") or self.processor.get("patch_size") or 14)
        if vision.get("model_type") == "pixtral":
            return _lines(width, height, patch * int(self.config.get("spatial_merge_size") or 1), self._longest())
        if kind not in _GRIDS:
            raise CannotSize(
                f"how many rows a picture becomes is not known for models of type {kind}: give --rows-per-picture "
                "(any server tells: usage.prompt_tokens with a picture, less the same without it)"
            )
        merge = int(vision.get("spatial_merge_size") or self.processor.get("merge_size") or 2)
        least, most = self._pixels()
        return _grid(width, height, patch * merge, least / _GRIDS[kind], most / _GRIDS[kind])

    def _pixels(self) -> tuple[float, float]:
        """The fewest and the most that a picture is scaled to."""
        size = self.processor.get("size") or {}
        least = self.processor.get("min_pixels") or size.get("shortest_edge")
        most = self.processor.get("max_pixels") or size.get("longest_edge")
        return _known(least), _known(most)

    def _longest(self) -> float:
        """Side of a picture, after scaling."""
        return _known((self.processor.get("size") or {}).get("longest_edge"))


def _known(limit: float | None) -> float:
    if not limit:
        raise CannotSize(
            f"the limits for the pixels of a picture are not known: put {' or '.join(_PROCESSORS)} of the model "
            "beside its config.json, or give --rows-per-picture"
        )
    return limit


def _lines(width: int, height: int, unit: int, longest: float) -> int:
    """Squares of `unit` pixels that cover a picture whose sides are no longer than that."""
    scale = max(1.0, width / longest, height / longest)
    return math.prod(math.ceil(math.floor(side / scale) / unit) for side in (width, height))


def _grid(width: int, height: int, unit: int, least: float, most: float) -> int:
    """Squares of `unit` pixels, after each side was rounded to a multiple of it within the limits for the area."""
    sides = [round(side / unit) for side in (width, height)]
    area = sides[0] * sides[1] * unit**2
    if area > most:
        sides = [max(1, math.floor(side / math.sqrt(width * height / most) / unit)) for side in (width, height)]
    elif area < least:
        sides = [math.ceil(side * math.sqrt(least / (width * height)) / unit) for side in (width, height)]
    return sides[0] * sides[1]


# ---- from files


def read_model(name: str, dtype: str = "auto") -> Model:
    """Of a folder, of a config.json, or of a name whose files are in Hugging Face's cache of this machine."""
    path = _config_file(name)
    config = _read_json(path)
    processor: dict[str, Any] = {}
    for beside in (path.with_name(other) for other in _PROCESSORS):
        if beside.exists():
            found = _read_json(beside)
            inside = found.get("image_processor")
            processor = {**found, **(inside if isinstance(inside, dict) else {}), **processor}
    inner = _inner(config)
    text = _text(inner)
    hidden, vision = text.get("hidden_size"), inner.get("vision_config") or {}
    if not isinstance(hidden, int) or hidden < 1:
        raise CannotSize(f"{path} names no hidden_size of its language model")
    deepstack = len(vision.get("deepstack_visual_indexes") or ())
    architecture = str((config.get("architectures") or [config.get("model_type")])[0])
    return Model(architecture, hidden, _dtype(config, inner, text, dtype), deepstack, config, processor)


def _config_file(name: str) -> Path:
    path = Path(name).expanduser()
    for candidate in (path / "config.json", path):
        if candidate.is_file():
            return candidate
    cached: object = None
    if not path.exists() and name.count("/") == 1:
        try:
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(name, "config.json")
        except (ImportError, ValueError):
            cached = None
    if isinstance(cached, str):
        return Path(cached)
    raise CannotSize(f"{name}: no config.json there; give the folder of the model, or the file itself")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CannotSize(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CannotSize(f"{path} holds no JSON object")
    return found


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("thinker_config") or config


def _text(inner: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part for the language model; older configurations have it at the top."""
    parts = (inner.get(name) for name in ("llm_config", "language_config", "text_config"))
    return next((part for part in parts if isinstance(part, dict)), inner)


def _dtype(config: Mapping[str, Any], inner: Mapping[str, Any], text: Mapping[str, Any], wanted: str) -> str:
    """As SGLang takes it: of the language model, halved if it is float32."""
    if wanted != "auto":
        return _DTYPES[wanted]
    named = (part.get(key) for part in (text, inner, config) for key in ("dtype", "torch_dtype"))
    found = str(next((name for name in named if name), "float32")).removeprefix("torch.")
    if found != "float32":
        return found
    return "bfloat16" if str(text.get("model_type", "")).startswith("gemma") else "float16"


# ---- what follows


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A request, and how many there are of it."""

    rows_per_picture: int
    pictures: int
    text_tokens: int
    images_per_second: float | None = None
    at_once: int | None = None
    transfer_ms: float | None = None
    encode_per_second: float | None = None
    answers_per_second: float | None = None

    @property
    def media_rows(self) -> int:
        return self.rows_per_picture * self.pictures

    @property
    def rows(self) -> int:
        return self.media_rows + self.text_tokens

    @property
    def requests_per_second(self) -> float | None:
        return None if self.images_per_second is None else self.images_per_second / self.pictures

    def under_way(self) -> int:
        """Requests that hold blocks at the same time: said, or measured, or as many as `auto` keeps room for."""
        from embedding_relay.protocol.language.reserve import AT_ONCE

        if self.at_once is not None:
            return self.at_once
        if self.requests_per_second is not None and self.transfer_ms is not None:
            return max(1, math.ceil(self.requests_per_second * self.transfer_ms / 1000))
        return AT_ONCE


def bytes_of(layout: BufferLayout, rows: int, media_rows: int) -> int:
    """What is written for one request: the aux row once, embeddings for rows of media only."""
    counted = ((c, 1 if c.per_block else media_rows if c.media_only else rows) for c in layout.columns)
    return sum(column.bytes_per_row * number for column, number in counted)


def admitted(layout: BufferLayout, default: int | None, rows: int, encode_instances: int) -> int:
    """Equal requests that hold blocks at the same time, before any of them has its rows. The last may have fewer."""
    from embedding_relay.protocol.language.reserve import DefaultReservation, PeerShare

    reservation = DefaultReservation(default, layout.blocks * layout.block_size, layout.block_size)
    reservation.observe(rows)
    left, number = min(layout.blocks, PeerShare(layout.blocks).most * encode_instances), 0
    while left > 0:
        number += 1
        left -= math.ceil(reservation.rows(number) / layout.block_size)
    return number


def blocks_for(rows: int, at_once: int, block_size: int) -> int:
    """The smallest pool in which so many requests of one encode instance reserve all they need, with `auto`."""
    from embedding_relay.protocol.language.reserve import AT_ONCE, PeerShare

    needed = math.ceil(rows / block_size)
    blocks = needed * at_once
    if needed > 1:  # one block is the least that is reserved
        blocks = max(blocks, math.ceil(rows * max(AT_ONCE, at_once) / block_size))
    while PeerShare(blocks).most < needed * at_once:
        blocks += 1
    return blocks


def work_out(
    model: Model, traffic: Traffic, layout: BufferLayout, default: int | None, cache_mb: int
) -> dict[str, Any]:
    """All figures by name, in the order in which they are told."""
    from embedding_relay import config

    at_once, rows = traffic.under_way(), traffic.rows
    request_bytes = bytes_of(layout, rows, traffic.media_rows)
    recommended = dataclasses.replace(layout, blocks=blocks_for(rows, at_once, layout.block_size))
    settings = {
        config.BLOCK_SIZE: str(recommended.block_size),
        config.CACHE_BLOCKS: str(recommended.blocks),
        config.DEFAULT_ALLOCATE: config.AUTO,
    }
    config.RelayConfig.from_environment(settings)  # a pool that no instance would take is said here
    picture_bytes = traffic.rows_per_picture * layout.columns[0].bytes_per_row * (1 + layout.deepstack_rows)
    figures: dict[str, Any] = {
        "architecture": model.architecture,
        "dtype": layout.dtype,
        "hidden_size": layout.hidden_size,
        "deepstack_rows": layout.deepstack_rows,
        "bytes_per_row": sum(c.bytes_per_row for c in layout.columns if not c.per_block),
        "rows_per_picture": traffic.rows_per_picture,
        "picture_bytes": picture_bytes,
        "rows_per_request": rows,
        "request_bytes": request_bytes,
        "blocks": layout.blocks,
        "block_size": layout.block_size,
        "default_rows": default or config.AUTO,
        "pool_bytes": layout.pool_bytes,
        "admitted": admitted(layout, default, rows, 1),
        "admitted_of_several": admitted(layout, default, rows, 2),
        "row_cache_pictures": cache_mb * MIB // picture_bytes,
        "at_once": at_once,
        "recommended": settings,
        "recommended_pool_bytes": recommended.pool_bytes,
    }
    return figures | _rates(traffic, request_bytes)


def _rates(traffic: Traffic, request_bytes: int) -> dict[str, Any]:
    """What follows from a rate, and from measured ones."""
    figures: dict[str, Any] = {}
    encode, answers, pictures = traffic.encode_per_second, traffic.answers_per_second, traffic.images_per_second
    if pictures is not None and traffic.requests_per_second is not None:
        figures["requests_per_second"] = traffic.requests_per_second
        figures["wire_bytes_per_second"] = traffic.requests_per_second * request_bytes
        if encode is not None:
            figures["encode_instances"] = math.ceil(pictures / encode)
        if answers is not None:
            figures["language_instances"] = math.ceil(traffic.requests_per_second / answers)
    if encode is not None and answers is not None:
        figures["encode_per_language"] = answers * traffic.pictures / encode
    return figures


# ---- how it is told


def report(figures: Mapping[str, Any], traffic: Traffic) -> list[str]:
    one, several = figures["admitted"], figures["admitted_of_several"]
    deepstack = f" and {figures['deepstack_rows']} deepstack rows" if figures["deepstack_rows"] else ""
    lines = [
        f"model     {figures['architecture']}: hidden size {figures['hidden_size']}{deepstack}, {figures['dtype']}",
        f"row       {figures['bytes_per_row']:,} bytes",
        f"picture   {figures['rows_per_picture']:,} rows, {_size(figures['picture_bytes'])}",
        f"request   {figures['rows_per_request']:,} rows, {_size(figures['request_bytes'])} to transfer "
        f"(pictures: {traffic.pictures}, tokens of text: {traffic.text_tokens})",
        "",
        f"pool      {figures['blocks']:,} blocks of {figures['block_size']} rows, default {figures['default_rows']}: "
        f"{_size(figures['pool_bytes'])} of host memory on each instance",
        f"at once   {one} such requests of one encode instance have blocks at a time, {several} of several instances",
        f"row cache {figures['row_cache_pictures']:,} such pictures stay encoded on an encode instance",
        "",
        f"for {figures['at_once']} such requests at a time, each in one round, set on all instances:",
        *(f"  {name}={setting}" for name, setting in figures["recommended"].items()),
        f"That pool takes {_size(figures['recommended_pool_bytes'])} of host memory on each instance.",
        "With less memory requests take more rounds, and none fails.",
    ]
    return [*lines, *_told_rates(figures)]


def _told_rates(figures: Mapping[str, Any]) -> list[str]:
    lines = []
    if (wire := figures.get("wire_bytes_per_second")) is not None:
        rate = f"{wire / 1e6:,.4g} MB/s, {wire * 8e-9:,.3g} Gbit/s"
        lines.append(f"wire      {rate} for {figures['requests_per_second']:,.4g} requests per second")
    for half in ("encode", "language"):
        if (number := figures.get(f"{half}_instances")) is not None:
            lines.append(f"{half:9} {number} instances at the least: with so many, all are busy all the time")
    if (ratio := figures.get("encode_per_language")) is not None:
        lines.append(f"ratio     {ratio:,.3g} encode instances keep one language instance busy")
    elif lines:
        lines.append("How many instances: give --encode-per-second and --answers-per-second, as measured.")
    return ["", *lines] if lines else []


def _size(number: float) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", MIB), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:,.3g} {unit}"
    return f"{number:.0f} bytes"


# ---- the command


def add_size_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "size",
        help="work out rows, memory and settings for a model and your traffic",
        description="Work out, from the configuration of a model, how many rows a picture becomes, what they take on "
        "the way, how large the pool must be, and the settings that follow. Settings that are in the environment, or "
        "given here, are those of the pool that is described. docs/tuning.md says what to do with the figures.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="a folder with config.json, that file, or a name in the cache")
    add("--dtype", default="auto", choices=("auto", *_DTYPES), help="that of the servers (default: %(default)s)")
    add("--side", type=_sides, default=(1024, 1024), metavar="N|WxH", help="pixels of a picture (default: 1024)")
    add("--rows-per-picture", type=_count, metavar="N", help="if you know it, or the model is of another kind")
    add("--per-request", type=_count, default=1, metavar="N", help="pictures of a request (default: %(default)s)")
    add("--text-tokens", type=_count, default=512, metavar="N", help="tokens of its text (default: %(default)s)")
    add("--at-once", type=_count, metavar="N", help="requests that shall be transferred at the same time")
    add("--images-per-second", type=_positive, metavar="R", help="pictures of all clients together")
    add("--transfer-ms", type=_positive, metavar="MS", help="measured: transfer_ms in the language instance's log")
    add("--encode-per-second", type=_positive, metavar="R", help="measured: pictures that one encode instance encodes")
    add("--answers-per-second", type=_positive, metavar="R", help="measured: requests that one language instance ends")
    add("--blocks", type=_count, metavar="N", help="blocks of the pool that is described")
    add("--block-size", type=_count, metavar="N", help="rows of a block")
    add("--default-rows", metavar="N|auto", help="rows that a request reserves")
    add("--row-cache-mb", type=_count, default=ROW_CACHE_MB, metavar="MB", help="SGLANG_VLM_CACHE_SIZE_MB")
    add("--json", action="store_true", help="the same figures as JSON")
    parser.set_defaults(run=run)


def _sides(text: str) -> tuple[int, int]:
    width, by, height = text.lower().partition("x")
    return _count(width), _count(height if by else width)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 0 < int(text[:10]) < 2**31 or len(text) > 10:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def run(arguments: argparse.Namespace) -> int:
    from embedding_relay.protocol.errors import SettingError

    try:
        figures, traffic = _figures(arguments)
    except (CannotSize, SettingError) as error:
        print(f"sglang-relay size: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=2) if arguments.json else "\n".join(report(figures, traffic)))
    return 0


def _figures(arguments: argparse.Namespace) -> tuple[dict[str, Any], Traffic]:
    from embedding_relay.config import BLOCK_SIZE, CACHE_BLOCKS, DEFAULT_ALLOCATE, RelayConfig
    from embedding_relay.memory.layout import BufferLayout

    settings = RelayConfig.from_environment()
    given = {CACHE_BLOCKS: arguments.blocks or settings.cache_blocks, BLOCK_SIZE: arguments.block_size}
    given[BLOCK_SIZE] = given[BLOCK_SIZE] or settings.block_size
    given[DEFAULT_ALLOCATE] = arguments.default_rows or settings.default_allocate_tokens or "auto"
    settings = RelayConfig.from_environment({name: str(value) for name, value in given.items()})
    model = read_model(arguments.model, arguments.dtype)
    layout = BufferLayout(
        hidden_size=model.hidden_size,
        dtype=model.dtype,
        deepstack_rows=model.deepstack_rows,
        block_size=settings.block_size,
        blocks=settings.cache_blocks,
    )
    traffic = Traffic(
        rows_per_picture=arguments.rows_per_picture or model.rows_of_picture(*arguments.side),
        pictures=arguments.per_request,
        text_tokens=arguments.text_tokens,
        images_per_second=arguments.images_per_second,
        at_once=arguments.at_once,
        transfer_ms=arguments.transfer_ms,
        encode_per_second=arguments.encode_per_second,
        answers_per_second=arguments.answers_per_second,
    )
    return work_out(model, traffic, layout, settings.default_allocate_tokens, arguments.row_cache_mb), traffic
