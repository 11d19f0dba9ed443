"""Makes multimodal models of a few megabytes: real architectures and processors, random weights, meaningless text.

Made with `transformers` alone, so it needs no download. The same family and seed give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from embedding_relay.tools.tiny_families import tokenizer
from embedding_relay.tools.tiny_families.common import Family, Size
from embedding_relay.tools.tiny_families.table import FAMILIES
from embedding_relay.tools.tiny_families.tokenizer import SPECIAL_TOKENS

__all__ = ["DEFAULT_FAMILY", "FAMILIES", "SPECIAL_TOKENS", "Family", "Size", "cached", "make"]

DEFAULT_FAMILY = "qwen2_5_vl"


def make(out: Path, family: str = DEFAULT_FAMILY, seed: int = 0, size: Size = Size()) -> Path:  # noqa: B008  (frozen)
    """Write the model into `out` and return it."""
    recipe = FAMILIES[family]
    out.mkdir(parents=True, exist_ok=True)
    words = tokenizer.write(out, recipe.prompt)
    _write_weights(out, recipe, words, seed, size)
    recipe.processor(words.tokenizer).save_pretrained(out)
    return out


def cached(family: str = DEFAULT_FAMILY, seed: int = 0) -> Path:
    """The same, made once per machine and per version of these files."""
    here = Path(__file__)
    files = [here, *sorted(here.with_name("tiny_families").glob("*.py"))]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-embedding-relay"
    model = cache / f"{family}-{seed}-{version}"
    if not model.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = make(Path(scratch) / "model", family, seed)
            # Somebody else may have finished first; theirs is the same.
            with contextlib.suppress(OSError):
                made.rename(model)
    return model


def _write_weights(out: Path, recipe: Family, words: tokenizer.Words, seed: int, size: Size) -> None:
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipe.build(words.ids, words.vocabulary, size).bfloat16()
    if recipe.checkpoint is None:
        model.save_pretrained(out)
    else:
        config, weights = recipe.checkpoint(model)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        contiguous = {name: weight.contiguous() for name, weight in weights.items()}
        save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes it readable by its owner alone, which surprises a server that runs as somebody else.
    (out / "model.safetensors").chmod(0o644)
