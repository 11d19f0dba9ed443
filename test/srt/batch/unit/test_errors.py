"""Errors that are not ours, in words of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from embedding_relay.batch.errors import in_words, wrong_field
from embedding_relay.batch.session.records import Asking
from embedding_relay.batch.workbook.analysis import Choices


def test_the_system_says_its_reason_alone() -> None:
    with pytest.raises(FileNotFoundError) as raised:
        Path("/nowhere/at/all").read_bytes()
    assert in_words(raised.value) == "no such file or directory"
    assert in_words(OSError("a sentence of ours")) == "a sentence of ours"
    assert in_words(ValueError("a sentence of ours")) == "a sentence of ours"


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        (Asking, {"max_tokens": "many"}, "max_tokens: it must be a whole number, not a text"),
        (Asking, {"temperature": [1]}, "temperature: it must be a number, not a list"),
        (Asking, {"max_tokens": 0}, "max_tokens must be at least 1"),
        (Choices, {"image_columns": [7]}, "image_columns[0]: it must be a text, not a whole number"),
        (Choices, {"image_columns": "a"}, "image_columns: it must be a list, not a text"),
        (Choices, {"sheet": None}, "sheet: it must be a text, not nothing"),
    ],
)
def test_what_is_wrong_with_options(kind: type[Any], given: dict[str, Any], says: str) -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.convert(given, kind)
    assert wrong_field(raised.value) == says
