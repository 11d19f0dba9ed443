"""Around tokenizing on the encode half: which media are loaded, and that the rest is as without us.

SGLang's tokenizer manager, processor and loaders are real; support/tokenizing.py says what is not there.
"""

from __future__ import annotations

import asyncio
import contextvars
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedding_relay.media_sources import MediaSources, NotAccepted
from sglang.srt.disaggregation.multimodal import admitting, preparation, request_notes, small_tensors
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.multimodal.processors.executor import MultimodalProcessorExecutor
from sglang.srt.utils import ImageData
from support.preparing import GOOD, GOOD_URI, PNG, refusal, uri
from support.tokenizing import IMAGE, VIDEO, TokenizerManagerWithoutScheduler

MODE = "encode"


def test_small_requests_pass_large_ones_that_wait_for_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own executor, with one thread; what a request costs is what admission has guessed."""
    served: list[str] = []
    costs = {"large": 1 << 30, "small": 1 << 20}
    asking = contextvars.ContextVar[str]("asking")
    monkeypatch.setattr(admitting, "cost_of_this", lambda: costs[asking.get().split()[0]])

    def process(name: str, processor: object) -> str:
        served.append(name)
        return name

    async def ask(executor: MultimodalProcessorExecutor, name: str) -> str:
        asking.set(name)
        return await preparation.process_in_turn(MultimodalProcessorExecutor.run, executor, process, name)

    async def work() -> None:
        executor = MultimodalProcessorExecutor(dict, 1)
        names = [*(f"large {number}" for number in range(8)), "small"]
        assert await asyncio.gather(*(ask(executor, name) for name in names)) == names
        executor.shutdown()

    asyncio.run(work())
    # One is in the thread and one behind it when the others come.
    assert served == ["large 0", "large 1", "small", *(f"large {number}" for number in range(2, 8))]


def test_a_processor_that_stops_an_iteration_fails_its_request() -> None:
    def process(processor: object) -> None:
        raise StopIteration

    async def work() -> None:
        executor = MultimodalProcessorExecutor(dict, 1)
        with pytest.raises(RuntimeError, match="came to an end of its media too early"):
            await preparation.process_in_turn(MultimodalProcessorExecutor.run, executor, process)
        executor.shutdown()

    asyncio.run(work())


@pytest.mark.parametrize("medium", ["image", "video", "audio"])
@pytest.mark.parametrize("path", [__file__, f"file://{__file__}", "/etc/nothing.png", "FILE:///etc/passwd", "~/a.png"])
def test_files_are_refused_in_the_same_words_whether_or_not_they_exist(
    manager: TokenizerManagerWithoutScheduler, medium: str, path: str
) -> None:
    placeholder = {"image": IMAGE, "video": VIDEO, "audio": ""}[medium]
    for media in (path, [path], [ImageData(path)], [{"url": path}]):
        assert refusal(manager, text=f"{placeholder}a", **{f"{medium}_data": media}) == str(NotAccepted())


def test_a_file_of_the_allowed_directory_is_the_picture_itself(
    manager: TokenizerManagerWithoutScheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setattr(preparation, "_sources", lambda: MediaSources(tmp_path))
    of_file = manager.prepare(text=f"{IMAGE}a", image_data=[ImageData(f"file://{tmp_path}/a.png")])
    of_data = manager.prepare(text=f"{IMAGE}a", image_data=[GOOD_URI])
    assert [item.hash for item in of_file.mm_inputs.mm_items] == [item.hash for item in of_data.mm_inputs.mm_items]
    assert torch.equal(of_file.mm_inputs.mm_items[0].feature, of_data.mm_inputs.mm_items[0].feature)


@pytest.mark.parametrize("given", [GOOD_URI, GOOD_URI.partition(",")[2], ImageData(GOOD_URI), PNG, GOOD])
def test_all_that_names_no_file_is_loaded_as_before(manager: TokenizerManagerWithoutScheduler, given: Any) -> None:
    prepared = manager.prepare(text=f"{IMAGE}a", image_data=[given])
    assert len(prepared.mm_inputs.mm_items) == 1


def test_a_picture_is_prepared_as_without_us(manager: TokenizerManagerWithoutScheduler) -> None:
    buffer = io.BytesIO()
    GOOD.save(buffer, "PNG")
    prepared = manager.prepare(text=f"{IMAGE}a", image_data=[uri(buffer.getvalue())])
    assert prepared.input_ids.count(manager.mm_processor.mm_tokens.image_token_id) == 4


def test_what_the_processor_says_beside_the_pixels_goes_as_bytes(manager: TokenizerManagerWithoutScheduler) -> None:
    inputs = manager.prepare(text=f"{IMAGE}a", image_data=[GOOD_URI]).mm_inputs
    item = inputs.mm_items[0]
    assert {type(item.image_grid_thw), type(inputs.mrope_positions)} == {small_tensors.SmallTensor}
    assert type(item.feature) is torch.Tensor


def test_the_scheduler_hears_how_many_no_larger_ones_are_behind_a_request(
    manager: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may let them share a pass. One that fails is behind nobody any more."""
    cost = contextvars.ContextVar("cost", default=0)
    monkeypatch.setattr(admitting, "cost_of_this", cost.get)

    async def begin(own: int, outcome: asyncio.Future[Any]) -> int:
        async def as_long_as_the_test_says(*_: Any) -> Any:
            return await outcome

        cost.set(own)
        obj = GenerateReqInput(text=f"{IMAGE}a", image_data=[GOOD_URI])
        return request_notes.read(await preparation.tokenize(as_long_as_the_test_says, manager, obj)).behind

    async def work() -> None:
        loop = asyncio.get_running_loop()
        outcomes = [loop.create_future() for _ in range(4)]
        first, second, large, fails = (
            asyncio.create_task(begin(own, outcome)) for own, outcome in zip((5, 5, 9, 5), outcomes, strict=True)
        )
        await asyncio.sleep(0)
        outcomes[0].set_result(SimpleNamespace(mm_inputs=None))
        assert await first == 2
        outcomes[3].set_exception(ValueError("no picture"))
        with pytest.raises(ValueError, match="no picture"):
            await fails
        outcomes[2].set_result(SimpleNamespace(mm_inputs=None))
        assert await large == 1
        outcomes[1].set_result(SimpleNamespace(mm_inputs=None))
        assert await second == 0

    asyncio.run(work())


def test_pictures_whose_hash_the_caller_names_are_a_tenant_of_their_own(
    manager: TokenizerManagerWithoutScheduler,
) -> None:
    """By its extra key: a hash that a stranger names is not taken for one that was made of the pixels."""
    plain = manager.prepare(text=f"{IMAGE}a", image_data=[GOOD_URI], extra_key="me")
    named = manager.prepare(text=f"{IMAGE}a", image_data=[GOOD_URI], extra_key="me", mm_hashes=["5"])
    assert plain.extra_key == "me"
    assert named.extra_key not in ("me", None)
    assert named.mm_inputs.mm_items[0].hash == 5


# ---- what clients call their pictures


def sources(**fields: Any) -> tuple[str, ...]:
    return preparation.sources_of(GenerateReqInput(text="a", **fields))


def test_equal_media_have_equal_names_in_their_order() -> None:
    one, two = sources(image_data=["http://a/1.png", GOOD_URI])
    assert sources(image_data=[GOOD_URI, "http://a/1.png"]) == (two, one)
    assert sources(image_data="http://a/1.png") == (one,)
    assert len({one, two, *sources(image_data=[PNG, "http://a/2.png"])}) == 4


def test_media_of_other_kinds_options_or_tenants_have_other_names() -> None:
    names = [
        *sources(image_data=["x"]),
        *sources(video_data=["x"]),
        *sources(audio_data=["x"]),
        *sources(image_data=["x"], extra_key="a"),
        *sources(image_data=["x"], cache_salt="a"),
        *sources(image_data=[ImageData("x", detail="low")]),
        *sources(image_data=[ImageData("x", detail="high")]),
    ]
    assert len(set(names)) == 7


@pytest.mark.parametrize("at", [0, 200_000, 399_999])
def test_long_data_is_told_apart_by_its_beginning_middle_and_end(at: int) -> None:
    data = "a" * 400_000
    changed = data[:at] + "b" + data[at + 1 :]
    assert len({*sources(image_data=[data, changed, data + "a", data])}) == 3


def test_items_of_all_kinds_count() -> None:
    request = GenerateReqInput(text="", image_data=[GOOD_URI, GOOD_URI], audio_data=["a"], video_data="v")
    assert preparation.items_of(request) == 4
    assert preparation.items_of(GenerateReqInput(text="", image_data=GOOD_URI)) == 1


def test_what_nobody_can_name_has_no_name() -> None:
    assert sources(image_data=[{"format": "processor_output"}, GOOD]) == ("", "")
    assert sources(image_data=["x"], video_data=["y"]) == ()
    assert sources() == ()
    assert len(sources(image_data=["\ud800"])) == 1
