"""The table of all families of tiny models, by name."""

from __future__ import annotations

from embedding_relay.tools.tiny_families import audio, patches, qwen, tiles

FAMILIES = {**qwen.FAMILIES, **tiles.FAMILIES, **patches.FAMILIES, **audio.FAMILIES}
