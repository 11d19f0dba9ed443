"""A LoRA adapter for a tiny model: random weights, large enough to change what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

RANK: Final = 8
MODULES: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
SPREAD: Final = 0.05


def make(out: Path, model: Path, seed: int = 0) -> Path:
    """Write an adapter for the attention of each layer of `model` into `out`, in PEFT's format, and return it."""
    import torch
    from safetensors.torch import save_file

    text = json.loads((model / "config.json").read_text())["text_config"]
    dice = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(text["num_hidden_layers"]):
        for module in MODULES:
            inputs, outputs = _sizes(module, text)
            name = f"base_model.model.model.language_model.layers.{layer}.self_attn.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, inputs, generator=dice).mul(SPREAD).bfloat16()
            weights[f"{name}.lora_B.weight"] = torch.randn(outputs, RANK, generator=dice).mul(SPREAD).bfloat16()
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4 * RANK, "target_modules": list(MODULES), "bias": "none"}
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return out


def _sizes(module: str, text: dict[str, Any]) -> tuple[int, int]:
    hidden, head = int(text["hidden_size"]), int(text["head_dim"])
    queries, values = head * int(text["num_attention_heads"]), head * int(text["num_key_value_heads"])
    match module:
        case "q_proj":
            return hidden, queries
        case "o_proj":
            return queries, hidden
        case _:
            return hidden, values
