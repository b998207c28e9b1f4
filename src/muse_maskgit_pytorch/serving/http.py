"""HTTP in front of an engine: the images API that OpenAI's clients speak.

Every answer that is no picture is JSON; an error has OpenAI's form, with one sentence, the
parameter's name, and nothing of the server's insides.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from importlib import resources
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from .asked import FORMATS, Asked, Kind, Limits, Wrong, read_form, schema
from .metrics import HttpMetrics, exposition
from .painter import Answer, Event, Painter, refusal
from .tokens import Token, Tokens, TooMany

KEPT, KEPT_FOR = 64 * 2**20, 3600.0  # bytes and seconds of pictures that are kept for their address
FILES = 17  # parts of a form at most
GONE = 499  # status in the metrics where nobody waited for the answer
PAGE = f"{__package__}.page"
SAFE = {  # of the page: nothing from elsewhere, nowhere within another page
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LOG = logging.getLogger(__name__)


def make_app(painter: Painter, name: str, *, tokens: Tokens | None = None) -> FastAPI:
    """The application.

    Args:
        painter: who draws.
        name: of the model, for clients.
        tokens: who may ask; by default everybody.
    """
    server = _Server(painter, name, tokens or Tokens())
    app = FastAPI(title="muse", docs_url=None, redoc_url=None)
    app.add_middleware(_Edge, server=server)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        ready = await painter.ready()
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        families = [*server.metrics.registry.collect(), *await painter.metrics()]
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(exposition(families), media_type=kind)

    @app.get("/v1/models")
    async def models(http: HttpRequest) -> dict[str, Any]:
        server.client(http)
        return {"object": "list", "data": [server.model]}

    @app.get("/v1/models/{model}")
    async def one_model(http: HttpRequest, model: str) -> dict[str, Any]:
        server.client(http)
        if model != name:
            raise Wrong("there is no such model", "model", 404, "model_not_found")
        return server.model

    @app.post("/v1/images/generations", openapi_extra=_body("generations", painter.limits))
    async def generations(http: HttpRequest) -> Response:
        return await server.serve(http, "generations")

    @app.post("/v1/images/edits", openapi_extra=_body("edits", painter.limits))
    async def edits(http: HttpRequest) -> Response:
        return await server.serve(http, "edits")

    @app.post("/v1/images/variations", openapi_extra=_body("variations", painter.limits))
    async def variations(http: HttpRequest) -> Response:
        return await server.serve(http, "variations")

    @app.get("/v1/images/files/{file}")
    async def picture(file: str) -> Response:
        kept = server.kept.get(file)
        if kept is None:
            raise Wrong("there is no such picture, or it was drawn too long ago", None, 404)
        return Response(kept[0], media_type=kept[1])

    pages = {path.name: path.read_bytes() for path in resources.files(PAGE).iterdir()}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(pages["index.html"], media_type="text/html", headers=SAFE)

    @app.get("/page/{file}", include_in_schema=False)
    async def page_file(file: str) -> Response:
        if file not in pages:
            raise HTTPException(404)
        kind = {"css": "text/css", "js": "text/javascript"}.get(
            file.rpartition(".")[2], "text/html"
        )
        return Response(pages[file], media_type=kind, headers=SAFE)

    for kind in (Wrong, TooMany, HTTPException, _Gone):
        app.add_exception_handler(kind, _refused)
    return app


class _Gone(Exception):
    """The client is not there any more."""


class _Kept:
    """Pictures that are shown at an address for an hour, the oldest going first."""

    def __init__(self):
        self._files: OrderedDict[str, tuple[bytes, str, float]] = OrderedDict()
        self._size = 0

    def put(self, data: bytes, kind: str) -> str:
        """Keep one; returns its name, which nobody can guess."""
        name = f"{secrets.token_hex(16)}.{kind}"
        self._files[name] = data, FORMATS[kind], time.monotonic()
        self._size += len(data)
        self._forget()
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        self._forget()
        found = self._files.get(name)
        return None if found is None else found[:2]

    def _forget(self) -> None:
        while self._files:
            data, _, when = next(iter(self._files.values()))
            if self._size <= KEPT and time.monotonic() - when < KEPT_FOR:
                break
            self._files.popitem(last=False)
            self._size -= len(data)


class _Server:
    """What the routes share; its methods are called by the event loop."""

    def __init__(self, painter: Painter, name: str, tokens: Tokens):
        self.painter, self.name, self.tokens = painter, name, tokens
        self.limits, self.metrics, self.kept = painter.limits, HttpMetrics(), _Kept()
        self.model = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "muse",
            "image_size": painter.about.image_size,
            "presets": painter.about.presets,
        }

    def client(self, http: HttpRequest) -> Token:
        """Who asks.

        Raises:
            Wrong: nobody known.
        """
        token = self.tokens.find(http.headers.get("authorization"))
        if token is None:
            raise Wrong(
                "this server needs a token that it knows: send it as Authorization: Bearer ...",
                *(None, 401, "invalid_api_key"),
            )
        return token

    async def serve(self, http: HttpRequest, kind: Kind) -> Response:
        """Read, draw, answer."""
        began, token = time.monotonic(), self.client(http)
        try:
            fields, sent = await asyncio.wait_for(self._read(http, kind), self.limits.upload)
        except TimeoutError:
            raise Wrong("the request did not arrive in time", None, 408) from None
        asked = Asked.read(kind, fields, self.name, self.limits)
        events = self._events(asked, sent, token)
        if asked.stream:
            # errors before the first step are answers of their own
            first = await anext(events)
            if first.answer is not None:
                return _answer(first.answer)
            return StreamingResponse(
                self._stream(events, first, asked, began),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        drawing, gone = asyncio.ensure_future(_last(events)), asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait({drawing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                raise _Gone
            last = drawing.result()
        finally:
            gone.cancel()
            drawing.cancel()
        if last.answer is not None:
            return _answer(last.answer)
        base = str(http.base_url).rstrip("/")
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": [self._shown(file, asked, base) for file in last.files],
                **_facts(last, asked),
            }
        )

    async def _events(
        self, asked: Asked, sent: dict[str, bytes], token: Token
    ) -> AsyncGenerator[Event, None]:
        """What happens to a request, while its pictures count as the token's.

        Raises:
            TooMany: beyond the token's limit.
        """
        token.take(asked.n)
        try:
            async with aclosing(self.painter.draw(asked, sent, token.priority)) as events:
                async for event in events:
                    yield event
        finally:
            token.give_back(asked.n)

    def _shown(self, file: bytes, asked: Asked, base: str) -> dict[str, str]:
        if asked.url:
            return {"url": f"{base}/v1/images/files/{self.kept.put(file, asked.format)}"}
        return {"b64_json": base64.b64encode(file).decode("ascii")}

    async def _stream(
        self, events: AsyncGenerator[Event, None], event: Event, asked: Asked, began: float
    ) -> AsyncIterator[bytes]:
        """Server-sent events: partial pictures, the picture, or what went wrong."""
        name = "image_generation" if asked.kind == "generations" else "image_edit"
        number = 0
        async with aclosing(events):
            while True:
                if event.answer is not None:
                    yield _sent("error", {"type": "error", **event.answer[1]})
                    return
                if event.files:
                    content: dict[str, Any] = {
                        "type": f"{name}.{event.name}",
                        "b64_json": base64.b64encode(event.files[0]).decode("ascii"),
                        "created_at": int(time.time()),
                        **_facts(event, asked),
                    }
                    if event.name == "partial_image":
                        if number == 0:
                            self.metrics.first_preview.observe(time.monotonic() - began)
                        content["partial_image_index"] = number
                        number += 1
                    yield _sent(content["type"], content)
                if event.name == "completed":
                    return
                event = await anext(events)

    async def _read(self, http: HttpRequest, kind: Kind) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The fields, and the pictures of a form.

        Raises:
            Wrong: neither JSON nor a form, as the kind needs it.
        """
        if kind == "generations":
            try:
                fields = json.loads(await http.body())
            except (ValueError, RecursionError):
                raise Wrong("the body must be JSON") from None
            if not isinstance(fields, dict):
                raise Wrong("the body must be a JSON object")
            return fields, {}
        if not http.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Wrong("the body must be a form (multipart/form-data) with an image")
        fields, sent = {}, {}
        try:
            async with http.form(max_files=FILES, max_fields=200) as form:
                for name, value in form.multi_items():
                    name = name.removesuffix("[]")
                    if name in fields or name in sent:
                        raise Wrong(f"{name[:100]} is given twice: send one", name[:100])
                    if name in ("image", "mask") and not isinstance(value, str):
                        sent[name] = await value.read()
                    elif isinstance(value, str):
                        fields[name] = value
                    else:
                        raise Wrong(f"{name[:100]} must not be a file", name[:100])
        except (MultiPartException, HTTPException) as error:
            raise Wrong("the form cannot be read: it is damaged, or has too many parts") from error
        if "image" not in sent:
            raise Wrong("image is missing: send a picture to edit", "image")
        if kind == "variations" and "mask" in sent:
            raise Wrong("variations take no mask: use /v1/images/edits", "mask")
        return read_form(fields), sent


# Answers -----------------------------------------------------------------------------------------


def _facts(event: Event, asked: Asked) -> dict[str, Any]:
    """What the API says beside a picture."""
    assert event.size is not None
    none = {"text_tokens": 0, "image_tokens": 0}  # they are what OpenAI bills
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    return {
        "size": f"{event.size[1]}x{event.size[0]}",
        "output_format": asked.format,
        "quality": "auto",
        "background": "opaque",
        "usage": {**usage, "input_tokens_details": none},
    }


def _answer(answer: Answer) -> JSONResponse:
    status, body, headers = answer
    return JSONResponse(body, status, headers)


async def _refused(_: HttpRequest | None, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        message = {
            404: "there is nothing at this address",
            405: "this address takes other methods",
        }.get(error.status_code, "the request cannot be understood")
        error = Wrong(message, None, error.status_code)
    elif isinstance(error, _Gone):
        error = Wrong("nobody waits for this answer", None, GONE)
    return _answer(refusal(error))


def _sent(name: str, content: dict[str, Any]) -> bytes:
    """An event of a stream."""
    return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()


async def _last(events: AsyncGenerator[Event, None]) -> Event:
    """The last of them."""
    async with aclosing(events):
        async for event in events:
            if event.name in ("completed", "refused"):
                return event
    raise AssertionError("a request ended without an answer")


async def _gone(http: HttpRequest) -> None:
    """Until the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _body(kind: Kind, limits: Limits) -> dict[str, Any]:
    """What the OpenAPI description says of a body, and of what may be answered."""
    form = "application/json" if kind == "generations" else "multipart/form-data"
    return {
        "requestBody": {"required": True, "content": {form: {"schema": schema(kind, limits)}}},
        "responses": {
            "200": {"description": "pictures; server-sent events of a stream"},
            "400": {"description": "what is wrong, and in which field"},
            "401": {"description": "no token that is known"},
            "404": {"description": "no such model"},
            "408": {"description": "it did not arrive in time"},
            "413": {"description": "too large"},
            "429": {"description": "no room: try again after Retry-After seconds"},
            "503": {"description": "not drawn in time, or shutting down"},
        },
    }


class _TooLarge(Exception):
    pass


class _Edge:
    """Around everything: the body's size, the metrics, and what nobody has foreseen."""

    def __init__(self, app: Any, server: _Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, read, most = time.monotonic(), 0, 0, self.server.limits.body

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise _TooLarge
            return message

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if length.isdigit() and int(length) > most:
                raise _TooLarge
            await self.app(scope, counted, watched)
        except _TooLarge:
            too = Wrong(
                f"the body is larger than the {most} bytes that this server reads", None, 413
            )
            if not status:
                await (await _refused(None, too))(scope, receive, watched)
        except Exception as error:
            if not status:
                LOG.exception("an answer failed")
                await (await _refused(None, error))(scope, receive, watched)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")  # of few values, whatever is asked for
            self.server.metrics.answers.labels(path, status).inc()
            if path.startswith("/v1/images"):
                self.server.metrics.last_byte.labels(path).observe(time.monotonic() - began)
