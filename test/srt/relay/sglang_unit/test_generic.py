"""SGLang's wrapper around models of transformers: rows stand where their placeholders were, text is as it was.

The wrapper is a stand-in that returns what it was given; how rows get to their places is SGLang's own routine.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch

from sglang.srt.disaggregation.multimodal import generic, media
from sglang.srt.managers.schedule_batch import MultimodalInputs
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from support.columns import LIMITS, columns
from support.received import TABLE, WIDTH, ModelWithoutLayers, received

MODE = "language"
pytestmark = pytest.mark.usefixtures("mode")

ROWS: Final = (-1, 0, 0, -1, 1, -1)


class Wrapper(ModelWithoutLayers):
    def __init__(self, scale: float | None = None, *, mrope: bool = False) -> None:
        self.model = SimpleNamespace(get_input_embeddings=lambda: TABLE)
        self.embed_scale = scale
        self.mrope = mrope

    def _uses_mrope_positions(self) -> bool:
        return self.mrope

    def _forward_hidden_states(
        self, input_ids: Any, positions: Any, forward_batch: Any, input_embeds: Any = None
    ) -> tuple[Any, Any]:
        return positions, input_embeds


def batch(mode: ForwardMode, *inputs: Any) -> Any:
    lengths = [len(ROWS)] * len(inputs)
    return SimpleNamespace(
        forward_mode=mode,
        mm_inputs=list(inputs),
        contains_mm_inputs=lambda: any(inputs),
        extend_prefix_lens_cpu=[0] * len(inputs),
        extend_seq_lens_cpu=lengths,
        input_embeds=None,
        spec_algorithm=None,
        mrope_positions="in three dimensions",
    )


def forward(part: Wrapper, mode: ForwardMode, *, with_media: bool = True) -> tuple[Any, Any, Any]:
    rows = received(columns(*ROWS))
    _, output = media.request_inputs(rows, LIMITS)
    inputs = MultimodalInputs.from_processor_output(output) if with_media else None
    generic.take_rows(part)
    ids = torch.tensor(output.padded_input_ids)
    return (rows, *part._forward_hidden_states(ids, "in one", batch(mode, inputs)))


@pytest.mark.parametrize("scale", [None, 3.0])
def test_rows_stand_where_their_placeholders_were(scale: float | None) -> None:
    rows, positions, embeddings = forward(Wrapper(scale), ForwardMode.EXTEND)
    expected = TABLE(torch.arange(len(ROWS))) * (scale or 1.0)
    media_rows = [row for row, item in enumerate(ROWS) if item >= 0]
    expected[media_rows] = rows.embeddings[media_rows]
    assert torch.equal(embeddings, expected)
    assert embeddings.shape == (len(ROWS), WIDTH)
    assert positions == "in one"


def test_a_model_with_positions_in_three_dimensions_gets_those() -> None:
    assert forward(Wrapper(mrope=True), ForwardMode.EXTEND)[1] == "in three dimensions"


@pytest.mark.parametrize(("mode", "with_media"), [(ForwardMode.DECODE, True), (ForwardMode.EXTEND, False)])
def test_text_alone_takes_the_way_that_it_always_took(mode: ForwardMode, with_media: bool) -> None:
    assert forward(Wrapper(), mode, with_media=with_media)[1:] == ("in one", None)
