"""The page /docs: all calls, as plain HTML. FastAPI's own page would load its script from another site."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final

Schema = Mapping[str, Any]

STYLE: Final = """
:root { color-scheme: light dark }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 50rem; margin: 0 auto; padding: 2rem 1rem 4rem }
h2 { margin: 2.5rem 0 0; font-size: 1.05rem; overflow-wrap: anywhere } h2 b { color: light-dark(#1f57c3, #8fb4ff) }
p { margin: .3rem 0 }
dl { margin: .6rem 0; display: grid; grid-template-columns: minmax(8rem, auto) 1fr; gap: .1rem 1rem }
dt, pre, h2 { font-family: ui-monospace, monospace } dt { overflow-wrap: anywhere } dd { margin: 0 }
pre { margin: .6rem 0; padding: .7rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere }
pre { border-radius: .5rem; background: #8881 }
"""


def render(openapi: Schema, base_url: str) -> str:
    """`base_url` is how the reader reaches the service; it is in the command lines to copy."""
    title = escape(openapi["info"]["title"])
    calls = "".join(
        _call(openapi, method, path, call, base_url.rstrip("/"))
        for path, methods in openapi["paths"].items()
        for method, call in methods.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}: all calls</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><main><h1>{title}: all calls</h1>"
        "<p>With an API key, every call needs the header <code>Authorization: Bearer KEY</code>. "
        'The same for programs: <a href="openapi.json">openapi.json</a>. The page for people: <a href="./">here</a>.'
        f"</p>{calls}</main></html>"
    )


def _call(openapi: Schema, method: str, path: str, call: Schema, base_url: str) -> str:
    media_type, body = _body(openapi, call)
    fields = "".join(f"<dt>{escape(name)}</dt><dd>{escape(about)}</dd>" for name, about in _fields(call, body))
    return (
        f"<h2><b>{method.upper()}</b> {escape(path)}</h2><p>{escape(call.get('summary', ''))}</p>"
        f"{f'<dl>{fields}</dl>' if fields else ''}<pre>{escape(_curl(method, base_url + path, media_type, body))}</pre>"
    )


def _body(openapi: Schema, call: Schema) -> tuple[str, Schema]:
    """How the body is sent, and what is in it."""
    for media_type, content in call.get("requestBody", {}).get("content", {}).items():
        schema = content.get("schema", {})
        name = schema.get("$ref", "").rpartition("/")[2]
        return media_type, openapi["components"]["schemas"][name] if name else schema
    return "", {}


def _fields(call: Schema, body: Schema) -> Iterator[tuple[str, str]]:
    for parameter in call.get("parameters", []):
        yield parameter["name"], _about(parameter["schema"], parameter["in"], parameter.get("required", False))
    for name, schema in body.get("properties", {}).items():
        yield name, _about(schema, "body", name in body.get("required", []))


def _about(schema: Schema, where: str, required: bool) -> str:
    kinds = [str(one["type"]) for one in schema.get("anyOf", [schema]) if "type" in one]
    words = [where, " or ".join(kinds), "" if required else "optional", schema.get("description", "")]
    default = schema.get("default")
    if default not in (None, ""):
        words.append(f"default {json.dumps(default)}")
    return ", ".join(word for word in words if word)


def _curl(method: str, url: str, media_type: str, body: Schema) -> str:
    line = ["curl", *([] if method == "get" else ["-X", method.upper()]), f"'{url}'"]
    if media_type == "application/json":
        example = body.get("examples", [{"session_id": "ID"}])[0]
        line += ["-H", "'Content-Type: application/json'", "-d", f"'{json.dumps(example)}'"]
    elif media_type:
        required = body.get("required", [])
        line += [f"-F '{name}={'@FILE' if name == 'file' else name.upper()}'" for name in required]
    return " ".join(line)
