"""Pictures for a tokenizer manager, and how it refuses them: for tests of what our modes do around tokenizing."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest
from fastapi import HTTPException

from embedding_relay.tools.chat_client import data_uri, picture
from support.tokenizing import TokenizerManagerWithoutScheduler

GOOD = picture(56, 56, seed=1)
GOOD_URI = data_uri(GOOD)
PNG = base64.b64decode(GOOD_URI.partition(",")[2])


def uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def refusal(manager: TokenizerManagerWithoutScheduler, **request: Any) -> str:
    """The sentence of a 400, which never shows what Python or the disk look like."""
    with pytest.raises(ValueError, match=r".") as refused:
        manager.prepare(**request)
    assert not isinstance(refused.value, HTTPException)
    sentence = str(refused.value)
    assert not re.search(r"<_io|0x[0-9a-f]{6}|Traceback|Errno|Error|\w\(|/etc|/tmp|base64,", sentence), sentence
    return sentence


def fault(manager: TokenizerManagerWithoutScheduler, words: str = "its log says why", **request: Any) -> HTTPException:
    with pytest.raises(HTTPException) as failed:
        manager.prepare(**request)
    assert failed.value.detail.startswith("this encode instance cannot ")
    assert failed.value.detail.endswith(words)
    return failed.value
