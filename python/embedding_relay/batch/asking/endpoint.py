"""The OpenAI-compatible server that is asked: one HTTP attempt per call, its outcome always a value, never raised."""

from __future__ import annotations

import io
import logging
import os
import time
from types import TracebackType
from typing import Final

import aiohttp
from yarl import URL

from embedding_relay.batch.asking.replies import Answered, Away, Broken, Refused, Reply, read_reply

logger = logging.getLogger(__name__)

MOST_BYTES: Final = 16 * 2**20
LARGE_BODY: Final = 2**19
CONNECT_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 10.0
# uvicorn closes a connection after 5 idle seconds; a request on one that is just being closed would look like a crash.
IDLE_SECONDS: Final = 3.0


class Endpoint:
    def __init__(self, url: str, *, api_key: str = "", request_seconds: float = 600) -> None:
        self._base = _base(url)
        if not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("the API key of the endpoint has characters that no header can carry")
        # A compressed answer could expand beyond the limit on its size.
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._request_seconds = request_seconds
        self._http: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        return self._base

    async def start(self) -> None:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            auto_decompress=False,
        )

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def __aenter__(self) -> Endpoint:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def ask(self, path: str, body: bytes) -> Reply:
        """Exactly one attempt. Raises nothing that the endpoint could cause."""
        return await self._attempt("POST", path, body, self._request_seconds)

    async def model(self) -> str:
        """The first one that it lists; ConnectionError with a sentence when it cannot be had."""
        reply = await self._attempt("GET", "/v1/models", None, LOOK_SECONDS)
        if isinstance(reply, Away):
            raise ConnectionError(f"cannot reach the endpoint {self.url} ({reply.reason})")
        if not isinstance(reply, Answered):
            raise ConnectionError(f"the endpoint {self.url} does not say which models it has ({reply.reason})")
        match reply.body:
            case {"data": [{"id": str(name)}, *_]}:
                return name
        raise ConnectionError(f"the endpoint {self.url} lists no model: name one")

    async def is_there(self) -> bool:
        return not await self.why_away()

    async def why_away(self) -> str:
        """Why the endpoint cannot be reached; "" when it can."""
        reply = await self._attempt("GET", "/health", None, LOOK_SECONDS)
        # SGLang's own answer to /health is empty; the status is all that counts.
        if isinstance(reply, Answered) or (isinstance(reply, Broken) and 200 <= reply.status < 300):
            return ""
        if isinstance(reply, Refused):
            reply = await self._attempt("GET", "/v1/models", None, LOOK_SECONDS)
        return "" if isinstance(reply, Answered) else reply.reason

    async def _attempt(self, method: str, path: str, body: bytes | None, seconds: float) -> Reply:
        if self._http is None:
            raise RuntimeError("the endpoint was not started, or is closed")
        if not path.startswith("/"):
            raise ValueError(f"{path!r} is no path")  # appended to the URL, it could change the host
        try:
            async with self._http.request(
                method,
                URL(self._base + path, encoded=True),
                data=_payload(body),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS),
            ) as response:
                content = await _content(response)
                if content is None:
                    return Refused(response.status, f"the answer is larger than {MOST_BYTES >> 20} MiB")
                return read_reply(response.status, content, response.headers.get, time.time())
        except aiohttp.ConnectionTimeoutError:
            return Away(f"no connection within {CONNECT_SECONDS:g} s", connected=False)
        except TimeoutError:
            return Broken(0, f"no answer within {seconds:g} s")
        except aiohttp.ClientConnectorError as error:
            return Away(_connection_problem(error), connected=False)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError):
            return Away("the connection broke before the answer was there", connected=True)
        except aiohttp.ClientError as error:
            logger.debug("batch: %s", error)
            return Broken(0, "the answer is not HTTP")


def _base(url: str) -> str:
    try:
        parsed = URL(url.strip())
        usable = parsed.scheme in ("http", "https") and bool(parsed.host)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"the endpoint must be a URL like http://127.0.0.1:8000, not {url!r}")
    if parsed.user is not None or parsed.password is not None:
        raise ValueError("the endpoint's URL must not carry a user or a password: set its API key instead")
    if parsed.query_string or parsed.fragment:
        raise ValueError(f"the endpoint's URL must end with its host or a path: {url!r}")
    # Given with /v1, as the openai client wants it, or without.
    return str(parsed).rstrip("/").removesuffix("/v1")


def _payload(body: bytes | None) -> bytes | io.BytesIO | None:
    # Pictures are large: sent in pieces, they do not block the event loop.
    return io.BytesIO(body) if body is not None and len(body) > LARGE_BODY else body


async def _content(response: aiohttp.ClientResponse) -> bytes | None:
    """None when it is too large."""
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > MOST_BYTES:
            return None
    return bytes(content)


def _connection_problem(error: aiohttp.ClientConnectorError) -> str:
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "its name cannot be resolved"
        case aiohttp.ClientConnectorCertificateError():
            why = getattr(error.certificate_error, "verify_message", "") or "it is that of another host"
            return f"its certificate is not valid: {why}"
        case aiohttp.ClientSSLError():
            why = (getattr(error.os_error, "reason", "") or "the connection was closed").replace("_", " ").lower()
            return f"no TLS with it: {why}"
    return os.strerror(error.os_error.errno).lower() if error.os_error.errno else "no connection can be made"
