"""SGLang's own vision towers, with small random weights in bfloat16, and pictures for them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

import torch
from transformers import AutoConfig

from embedding_relay.tools import tiny_model
from sglang.srt.runtime_context import get_parallel

FAMILIES: Final = ("qwen2_5_vl", "qwen3_vl")


class Tower:
    """What a model of SGLang does with items, and what it was called with."""

    def __init__(self, visual: Any, patch: int) -> None:
        self.visual = visual
        self.patch = patch
        self.calls: list[int] = []

    def __call__(self, items: list[Any]) -> torch.Tensor:
        self.calls.append(len(items))
        rows: torch.Tensor = self.visual(
            torch.cat([item.feature for item in items]),
            grid_thw=torch.tensor([item.grid for item in items]),
        )
        return rows

    def picture(self, height: int, width: int) -> Any:
        feature = torch.randn(height * width, 3 * 2 * self.patch**2).to(torch.bfloat16)
        return SimpleNamespace(feature=feature, grid=[1, height, width])


@contextlib.contextmanager
def tower(family: str) -> Iterator[Tower]:
    config = AutoConfig.from_pretrained(tiny_model.cached(family)).vision_config
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as an instance on few cores, and far quicker beside other tests
    pipeline = SimpleNamespace(is_first_rank=True, is_last_rank=True, rank_in_group=0, world_size=1)
    one_rank = dict.fromkeys(("tp_rank", "attn_tp_rank"), 0) | dict.fromkeys(("tp_size", "attn_tp_size"), 1)
    with get_parallel().override(**one_rank, pp_group=pipeline), torch.inference_mode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SGLang's own
                visual = _class_of(family)(config, use_data_parallel=True)
        finally:
            torch.set_default_dtype(torch.float32)
        for name, parameter in visual.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05 + ("norm" in name and name.endswith("weight")))
        yield Tower(visual, config.patch_size)
    torch.set_num_threads(threads)


def _class_of(family: str) -> Any:
    from sglang.srt.models import qwen2_5_vl, qwen3_vl

    return qwen2_5_vl.Qwen2_5_VisionTransformer if family == "qwen2_5_vl" else qwen3_vl.Qwen3VLMoeVisionModel
