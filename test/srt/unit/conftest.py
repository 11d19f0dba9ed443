"""This lane needs no SGLang and must not find one."""

from support.bare import use_bare_sglang

use_bare_sglang()
