"""HTTP in front of an engine: the images API that OpenAI's clients speak.

Every answer that is no picture is JSON; an error has OpenAI's form, with one sentence, the
parameter's name, and nothing of the server's insides.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import resources
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from ..arguments import real, whole
from ..editing import free, inpaint, outpaint, vary
from ..film import Film
from ..images import png_bytes
from ..muse import Muse
from ..request import Request
from ..sampling import per_row
from ..structures import SampleStep
from .asked import (
    EDITS,
    FORMATS,
    OWN,
    Asked,
    Kind,
    Limits,
    Wrong,
    flat,
    read_form,
    read_mask,
    read_picture,
    schema,
)
from .engine import Closed, Engine, Full, Late
from .metrics import Metrics
from .tokens import Token, Tokens, TooMany

Check = Callable[[str, Sequence[Image.Image]], str | None]
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


def make_app(
    engine: Engine,
    name: str,
    *,
    tokens: Tokens | None = None,
    limits: Limits | None = None,
    metrics: Metrics | None = None,
    check: Check | None = None,
) -> FastAPI:
    """The application; whoever makes it starts and closes the engine.

    Args:
        engine: what draws.
        name: of the model, for clients.
        tokens: who may ask; by default everybody.
        limits: of one request.
        metrics: the engine's ``watch``, to be shown.
        check: a safety checker. It is asked with a request's text and the pictures that came with
            it, and again with those that were drawn; what it returns is the reason to refuse, None
            for no objection. It is called by several threads.
    """
    server = _Server(engine, name, tokens or Tokens(), limits or Limits(), metrics, check)
    app = FastAPI(title="muse", docs_url=None, redoc_url=None)
    app.add_middleware(_Edge, server=server)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        ready = engine.alive
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    if metrics is not None:
        metrics.follow(lambda: engine.load)

        @app.get("/metrics")
        async def show_metrics() -> Response:
            return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

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

    @app.post("/v1/images/generations", openapi_extra=_body("generations", server.limits))
    async def generations(http: HttpRequest) -> Response:
        return await server.serve(http, "generations")

    @app.post("/v1/images/edits", openapi_extra=_body("edits", server.limits))
    async def edits(http: HttpRequest) -> Response:
        return await server.serve(http, "edits")

    @app.post("/v1/images/variations", openapi_extra=_body("variations", server.limits))
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

    for kind in (Wrong, Full, Closed, Late, TooMany, HTTPException, _Gone):
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

    def __init__(
        self,
        engine: Engine,
        name: str,
        tokens: Tokens,
        limits: Limits,
        metrics: Metrics | None,
        check: Check | None,
    ):
        self.engine, self.name, self.tokens, self.limits = engine, name, tokens, limits
        self.metrics, self.check, self.kept = metrics, check, _Kept()
        self.model = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "muse",
            "image_size": engine.muse.image_size,
            "presets": sorted(engine.muse.base.presets),
        }
        # a thread for each request that the engine may hold
        self.most = engine.queue + engine.rows + 1
        self.threads = ThreadPoolExecutor(self.most, thread_name_prefix="request")
        self.busy = 0

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
        if self.busy >= self.most:
            raise Full(1.0)
        token.take(asked.n)
        self.busy += 1
        work = _Work(self, asked, sent, token, began)

        def over(done: asyncio.Future[Any]) -> None:
            done.exception()  # where nobody waits any more, nobody else asks
            self.busy -= 1
            token.give_back(asked.n)

        drawing = asyncio.get_running_loop().run_in_executor(self.threads, work.run)
        drawing.add_done_callback(over)
        if asked.stream:
            # errors before the first step are answers of their own
            first = await work.events.get()
            if isinstance(first, BaseException):
                raise first
            return StreamingResponse(
                self._stream(work, first),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        gone = asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait({drawing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                raise _Gone
            files = drawing.result()
        finally:
            gone.cancel()
            work.cancel()
        base = str(http.base_url).rstrip("/")
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": [self._shown(file, asked, base) for file in files],
                **work.facts(),
            }
        )

    def _shown(self, file: bytes, asked: Asked, base: str) -> dict[str, str]:
        if asked.url:
            return {"url": f"{base}/v1/images/files/{self.kept.put(file, asked.format)}"}
        return {"b64_json": base64.b64encode(file).decode("ascii")}

    async def _stream(self, work: _Work, event: Any) -> AsyncIterator[bytes]:
        """Server-sent events: partial pictures, the picture, or what went wrong."""
        name = "image_generation" if work.asked.kind == "generations" else "image_edit"
        number = 0
        try:
            while True:
                if isinstance(event, BaseException):
                    yield _event("error", {"type": "error", **_said(event)[1]})
                    return
                what, file = event
                if file is not None:
                    content: dict[str, Any] = {
                        "type": f"{name}.{what}",
                        "b64_json": base64.b64encode(file).decode("ascii"),
                        "created_at": int(time.time()),
                        **work.facts(),
                    }
                    if what == "partial_image":
                        content["partial_image_index"] = number
                        number += 1
                    yield _event(content["type"], content)
                if what == "completed":
                    return
                event = await work.events.get()
        finally:
            work.cancel()

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


class _Work:
    """One request's drawing, by a thread of its own.

    Attributes:
        events: of a stream: ("accepted", None), ("partial_image", file), ("completed", file), or
            an error.
    """

    def __init__(
        self, server: _Server, asked: Asked, sent: dict[str, bytes], token: Token, began: float
    ):
        self.server, self.asked, self.sent, self.token = server, asked, sent, token
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self._loop, self._began = asyncio.get_running_loop(), began
        self._futures: list[Future[Any]] = []
        self._cancelled = False
        self.size: tuple[int, int] | None = None

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._cancelled = True
        for future in self._futures:
            future.cancel()

    def facts(self) -> dict[str, Any]:
        """What the API says beside a picture."""
        assert self.size is not None
        none = {"text_tokens": 0, "image_tokens": 0}  # they are what OpenAI bills
        usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
        return {
            "size": f"{self.size[1]}x{self.size[0]}",
            "output_format": self.asked.format,
            "quality": "auto",
            "background": "opaque",
            "usage": {**usage, "input_tokens_details": none},
        }

    def run(self) -> list[bytes]:
        """Draw; called by a thread."""
        try:
            pictures = self._draw()
            files = [self._file(picture) for picture in pictures]
        except (Wrong, Full, Closed, Late) as error:
            self._tell(error)
            raise
        except CancelledError:
            self._tell(_Gone())
            raise _Gone from None
        except ValueError as error:  # the package's own sentences
            wrong = Wrong(str(error), self.asked.blame(str(error)))
            self._tell(wrong)
            raise wrong from error
        except BaseException as error:
            LOG.exception("a request could not be drawn")
            self._tell(error)
            raise
        self._tell(("completed", files[0]))
        return files

    def _tell(self, event: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def _accepted(self, future: Future[Any]) -> None:
        self._futures.append(future)
        if self._cancelled:
            future.cancel()
        self._tell(("accepted", None))

    def _draw(self) -> list[Image.Image]:
        asked, server = self.asked, self.server
        limits = server.limits
        sent = {name: read_picture(name, data, limits) for name, data in self.sent.items()}
        image, mask = sent.get("image"), None
        if image is not None and asked.kind == "edits" and asked.edit == "inpaint":
            mask = read_mask(image, sent.get("mask"))
        elif "mask" in sent:
            raise Wrong(f"edit={asked.edit} takes no mask", "mask")
        image = image and flat(image)
        self._checked([] if image is None else [image])
        texts = [asked.prompt] * asked.n
        ours = {"strength", *(name for names in EDITS.values() for name in names)} - set(OWN)
        drawing = {name: v for name, v in asked.arguments.items() if name not in ours}
        # complete and checked before it waits
        request = server.engine.muse.request(
            texts,
            image_size=asked.size,
            canvases=None if asked.kind == "generations" else {},
            **drawing,
        )
        try:
            request.check_size("the request", server.engine.muse.image_size)
        except ValueError as error:  # its remedy is not a client's
            what, _, _ = str(error).partition(":")
            param = "timesteps" if "steps" in what else "size"
            raise Wrong(f"{what}: take fewer", param) from None
        self.size = request.image_size
        muse = server.engine.through(
            self._accepted, priority=self.token.priority, timeout=limits.timeout
        )
        callback = self._preview(request) if asked.stream and asked.partial else None
        how: dict[str, Any] = dict(image_size=asked.size, callback=callback, **asked.arguments)
        if image is None:
            pictures = muse.pictures(muse.draw(request, callback))
        elif asked.kind == "variations":
            pictures = vary(muse, image, texts, **how)
        elif mask is not None:
            pictures = inpaint(muse, image, texts, mask, **how)
        elif asked.edit == "outpaint":
            self._check_area(image)
            del how["image_size"]
            pictures = outpaint(muse, image, texts, **how | {"callback": None})
            self.size = pictures[0].height, pictures[0].width
        else:
            pictures = self._free(muse, image, texts, how)
        self._checked(pictures)
        return pictures

    def _check_area(self, image: Image.Image) -> None:
        """Refuse an outpainted picture that would be drawn for minutes.

        Raises:
            Wrong: it would be larger than the limit.
        """
        side, most = self.server.engine.muse.image_size, self.server.limits.area
        sides = {
            name: self.asked.arguments.get(name, 0) for name in ("left", "right", "top", "bottom")
        }
        aspect = self.asked.arguments.get("aspect", 1)
        try:
            left, right, top, bottom = (whole(name, value, 0) for name, value in sides.items())
            aspect = real("aspect", aspect, 1e-3)
        except ValueError as error:
            raise Wrong(str(error), self.asked.blame(str(error))) from None
        scale = side / min(image.size)
        width, height = (scale * each for each in image.size)
        area = (width + left + right) * (height + top + bottom) * max(aspect, 1 / aspect)
        if area > most * side**2:
            raise Wrong(
                f"the picture would be larger than {most} of {side} x {side} pixels: add less to it"
            )

    def _free(
        self, muse: Muse, image: Image.Image, texts: list[str], how: dict[str, Any]
    ) -> list[Image.Image]:
        """A mask-free edit, whose iterations are the caller's own: between the engine's turns.

        Raises:
            Wrong: more iterations than the limit.
            Late: they took longer than a request may.
        """
        turns, limits = self.server.engine.turns, self.server.limits
        at = how.get("at", (100,))
        try:
            at = [whole("at", each, 1, limits.iterations) for each in at]
        except (TypeError, ValueError):
            raise Wrong(
                f"at must be a list of rising iterations, at most {limits.iterations}", "at"
            ) from None
        draw, until = muse.draw, time.monotonic() + limits.timeout

        def between(work: Callable[..., Any], *given: Any) -> Any:
            turns.release()
            try:
                return work(*given)
            finally:
                turns.acquire()

        def after(_: SampleStep) -> bool:
            between(lambda: None)  # whoever waits has a turn
            return self._cancelled or time.monotonic() > until

        patient: Any = copy.copy(muse)
        patient.draw = lambda request, callback=None: between(draw, request, callback)
        with turns:
            stages = free(patient, image, texts, **how | {"at": at, "callback": after})
        if self._cancelled:
            raise CancelledError
        if time.monotonic() > until:
            raise Late(limits.timeout)
        return [stage[0] for stage in stages]

    def _checked(self, pictures: Sequence[Image.Image]) -> None:
        check = self.server.check
        if check is not None and (reason := check(self.asked.prompt, pictures)) is not None:
            raise Wrong(reason, "prompt", 400, "moderation_blocked")

    def _preview(self, request: Request) -> Callable[[SampleStep], None]:
        """A callback that decodes some of the steps, evenly spread."""
        muse, partial = self.server.engine.muse, self.asked.partial
        film = Film(muse, [0], request.image_size)
        steps: list[int] = []
        for name, size in muse.sizes(request.image_size).items():
            height, width = muse.stages[name].geometry.grid(size)
            asked = max(per_row(request.options[name].timesteps, len(request), "timesteps"))
            steps.append(min(asked, height * width))
        wanted = {(k + 1) * sum(steps) // (partial + 1) for k in range(partial)}
        done = 0

        def look(step: SampleStep) -> None:
            nonlocal done
            done += 1
            # a stage's first step and its last are what the film needs of those that are not shown
            if done in wanted or step.step == 1 or not step.mask.any():
                film.add(step)
            if done in wanted and done < sum(steps):
                if self.server.metrics is not None and done == min(wanted):
                    self.server.metrics.first_preview.observe(time.monotonic() - self._began)
                self._tell(("partial_image", self._file(film.frames.pop()[0])))
            film.frames.clear()

        return look

    def _file(self, picture: Image.Image) -> bytes:
        if self.asked.format == "png":
            return png_bytes(picture)
        file = io.BytesIO()
        picture.save(file, self.asked.format.upper(), quality=self.asked.compression)
        return file.getvalue()


# Answers -----------------------------------------------------------------------------------------


def _said(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for what went wrong."""
    status, kind, param, code, headers = 500, "server_error", None, None, {}
    message = "something went wrong in the server: try again later"
    if isinstance(error, Wrong):
        status, kind, param, code = error.status, "invalid_request_error", error.param, error.code
        message = str(error)
    elif isinstance(error, (Full, TooMany)):
        status, kind, code, message = 429, "rate_limit_error", "rate_limit_exceeded", str(error)
        headers = {"Retry-After": str(round(error.retry_after + 0.5))}
    elif isinstance(error, (Closed, Late)):
        status, message, headers = 503, str(error), {"Retry-After": "5"}
    elif isinstance(error, HTTPException):
        status, kind = error.status_code, "invalid_request_error"
        message = {
            404: "there is nothing at this address",
            405: "this address takes other methods",
        }.get(status, "the request cannot be understood")
    elif isinstance(error, _Gone):
        status, message = GONE, "nobody waits for this answer"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return status, body, headers


async def _refused(_: HttpRequest, error: Exception) -> JSONResponse:
    status, body, headers = _said(error)
    return JSONResponse(body, status, headers)


def _event(name: str, content: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()


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
                await (await _refused(None, too))(scope, receive, watched)  # type: ignore[arg-type]
        except Exception as error:
            if not status:
                LOG.exception("an answer failed")
                await (await _refused(None, error))(scope, receive, watched)  # type: ignore[arg-type]
        finally:
            if self.server.metrics is not None:
                route = scope.get("route")
                path = getattr(route, "path", "other")  # of few values, whatever is asked for
                self.server.metrics.answers.labels(path, status).inc()
                if path.startswith("/v1/images"):
                    self.server.metrics.last_byte.labels(path).observe(time.monotonic() - began)
