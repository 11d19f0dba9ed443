"""This lane runs without SGLang, as the protocol does, and needs atheris."""

from support.bare import use_bare_sglang

use_bare_sglang()
