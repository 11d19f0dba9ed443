"""The page of all calls: everything that the description says is there, and nothing of it is markup."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from embedding_relay.batch.http.docs_page import render

HOSTILE = "<script>alert('\"&amp;')</script>"


def described(call: dict[str, Any], path: str = "/things", method: str = "post", **parts: Any) -> dict[str, Any]:
    return {"info": {"title": "Things"}, "paths": {path: {method: call}}, **parts}


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_that_is_described_becomes_markup() -> None:
    call = {
        "summary": HOSTILE,
        "parameters": [{"name": HOSTILE, "in": "query", "schema": {"type": "string", "description": HOSTILE}}],
        "requestBody": {"content": {"application/json": {"schema": {"examples": [{"a": HOSTILE}]}}}},
    }
    page = Reader(render(described(call, path=f"/{HOSTILE}") | {"info": {"title": HOSTILE}}, f"http://{HOSTILE}/"))
    assert "script" not in page.tags
    assert page.text.count("<script>") >= 6


def test_the_fields_of_a_form_are_found_where_they_are_described() -> None:
    form = {
        "required": ["file"],
        "properties": {
            "file": {"type": "string", "description": "a workbook"},
            "sheet": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": "first"},
        },
    }
    content = {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/Upload"}}}
    components = {"schemas": {"Upload": form}}
    text = Reader(render(described({"requestBody": {"content": content}}, components=components), "http://h:1/")).text
    assert "body, string, a workbook" in text
    assert 'body, string or null, optional, default "first"' in text
    assert "curl -X POST 'http://h:1/things' -F 'file=@FILE'" in text


def test_a_call_without_anything() -> None:
    text = Reader(render(described({"summary": "All things"}, method="get"), "http://h:1")).text
    assert "GET /things" in text
    assert "curl 'http://h:1/things'" in text
