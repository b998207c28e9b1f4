"""What was asked for, drawn: pictures of texts, edits and variations as files, with previews.

It stands between HTTP, which reads a request, and the engine. What they say to each other is plain
data, so that the engine may run in another process than HTTP (see `replicas`).
"""

from __future__ import annotations

import asyncio
import copy
import io
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL import Image
from prometheus_client import Metric

from ..arguments import real, whole
from ..editing import free, inpaint, outpaint, vary
from ..film import Film
from ..geometry import Size
from ..images import png_bytes
from ..muse import Muse
from ..request import Request
from ..sampling import per_row
from ..structures import SampleStep
from .asked import EDITS, OWN, Asked, Limits, Wrong, flat, read_mask, read_picture
from .engine import Closed, Engine, Full, Late, Refused
from .metrics import Metrics
from .tokens import TooMany

Check = Callable[[str, Sequence[Image.Image]], str | None]
Sign = Callable[[bytes, str, bytes | None], bytes]
Answer = tuple[int, dict[str, Any], dict[str, str]]  # status, body, headers
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """What happened to a request.

    Attributes:
        name: the last one of a request is "completed" or "refused".
        files: the pictures of "partial_image", which is one, and of "completed".
        size: their height and width, in pixels.
        answer: what the client is told of "refused".
    """

    name: Literal["accepted", "partial_image", "completed", "refused"]
    files: tuple[bytes, ...] = ()
    size: Size | None = None
    answer: Answer | None = None


@dataclass(frozen=True)
class About:
    """What a painter draws with.

    Attributes:
        image_size: the model's side, in pixels.
        presets: its names of options.
        rows: pictures at once.
        queue: pictures that may wait.
    """

    image_size: int
    presets: list[str]
    rows: int
    queue: int


class Painter(Protocol):
    """What HTTP asks of whoever draws."""

    limits: Limits
    about: About

    def draw(
        self, asked: Asked, sent: dict[str, bytes], priority: float = 0.0
    ) -> AsyncGenerator[Event, None]:
        """Draw; whoever closes the generator early wants the pictures no more.

        Args:
            asked: the fields.
            sent: the files of "image" and "mask", as far as there are.
            priority: see `Engine.submit`.

        Yields:
            what happens, up to "completed" or "refused"; nothing is raised.
        """
        ...

    async def ready(self) -> bool:
        """Whether it takes requests."""
        ...

    async def metrics(self) -> list[Metric]:
        """Of its engine or engines."""
        ...


def refusal(error: BaseException) -> Answer:
    """What a client is told of what went wrong: OpenAI's form, and nothing of the insides."""
    status, kind, param, code, headers = 500, "server_error", None, None, {}
    message = "something went wrong in the server: try again later"
    if isinstance(error, Wrong):
        status, kind, param, code = error.status, "invalid_request_error", error.param, error.code
        message = str(error)
    elif isinstance(error, (Full, TooMany)):
        status, kind, code, message = 429, "rate_limit_error", "rate_limit_exceeded", str(error)
        headers = {"Retry-After": str(round(error.retry_after + 0.5))}
    elif isinstance(error, Refused):
        status, message, headers = 503, str(error), {"Retry-After": "5"}
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return status, body, headers


class EnginePainter:
    """Draws with an engine of this process; whoever makes it starts and closes the engine.

    Args:
        engine: what draws.
        limits: of one request.
        metrics: the engine's ``watch``.
        check: a safety checker. It is asked with a request's text and the pictures that came with
            it, and again with those that were drawn; what it returns is the reason to refuse, None
            for no objection. It is called by several threads.
        sign: gives each picture's file credentials, as `Credentials.signed` does.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        *,
        metrics: Metrics | None = None,
        check: Check | None = None,
        sign: Sign | None = None,
    ):
        self.engine, self.limits, self.check = engine, limits or Limits(), check
        self.sign = sign
        self.watch = metrics
        if metrics is not None:
            metrics.follow(lambda: engine.load)
        muse = engine.muse
        self.about = About(muse.image_size, sorted(muse.base.presets), engine.rows, engine.queue)
        # a thread for each request that the engine may hold
        self._most = engine.queue + engine.rows + 1
        self._threads = ThreadPoolExecutor(self._most, thread_name_prefix="request")
        self._busy = 0

    async def draw(
        self, asked: Asked, sent: dict[str, bytes], priority: float = 0.0
    ) -> AsyncGenerator[Event, None]:
        """As `Painter` says."""
        if self._busy >= self._most:
            yield Event("refused", answer=refusal(Full(1.0)))
            return
        self._busy += 1
        work = _Work(self, asked, sent, priority)

        def over(_: asyncio.Future[None]) -> None:
            self._busy -= 1

        drawing = asyncio.get_running_loop().run_in_executor(self._threads, work.run)
        drawing.add_done_callback(over)
        try:
            while True:
                event = await work.events.get()
                yield event
                if event.name in ("completed", "refused"):
                    return
        finally:
            work.cancel()

    async def ready(self) -> bool:
        """Whether the engine takes requests."""
        return self.engine.alive

    async def metrics(self) -> list[Metric]:
        """Of the engine."""
        return [] if self.watch is None else list(self.watch.registry.collect())


class _Work:
    """One request's drawing, by a thread of its own.

    Attributes:
        events: for the event loop that made it.
    """

    def __init__(
        self, painter: EnginePainter, asked: Asked, sent: dict[str, bytes], priority: float
    ):
        self.painter, self.asked, self.sent, self.priority = painter, asked, sent, priority
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._futures: list[Future[Any]] = []
        self._cancelled = False
        self._size: Size | None = None

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._cancelled = True
        for future in self._futures:
            future.cancel()

    def run(self) -> None:
        """Draw; called by a thread."""
        try:
            files = tuple(self._file(picture) for picture in self._draw())
            self._tell(Event("completed", files, self._size))
        except BaseException as error:
            self._tell(Event("refused", answer=refusal(self._blamed(error))))

    def _blamed(self, error: BaseException) -> BaseException:
        """What is the client's mistake, as such; what is ours, in the log."""
        if isinstance(error, ValueError) and not isinstance(error, Wrong):
            return Wrong(str(error), self.asked.blame(str(error)))  # the package's own sentences
        if isinstance(error, CancelledError):  # by the client, or by the engine's end
            return Closed()
        if not isinstance(error, (Wrong, Refused)):
            LOG.error("a request could not be drawn", exc_info=error)
        return error

    def _tell(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def _accepted(self, future: Future[Any]) -> None:
        self._futures.append(future)
        if self._cancelled:
            future.cancel()
        self._tell(Event("accepted"))

    def _draw(self) -> list[Image.Image]:
        asked, engine, limits = self.asked, self.painter.engine, self.painter.limits
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
        request = engine.muse.request(
            texts,
            image_size=asked.size,
            canvases=None if asked.kind == "generations" else {},
            **drawing,
        )
        try:
            request.check_size("the request", engine.muse.image_size)
        except ValueError as error:  # its remedy is not a client's
            what, _, _ = str(error).partition(":")
            param = "timesteps" if "steps" in what else "size"
            raise Wrong(f"{what}: take fewer", param) from None
        self._size = request.image_size
        muse = engine.through(self._accepted, priority=self.priority, timeout=limits.timeout)
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
            self._size = pictures[0].height, pictures[0].width
        else:
            pictures = self._free(muse, image, texts, how)
        self._checked(pictures)
        return pictures

    def _check_area(self, image: Image.Image) -> None:
        """Refuse an outpainted picture that would be drawn for minutes.

        Raises:
            Wrong: it would be larger than the limit.
        """
        side, most = self.painter.engine.muse.image_size, self.painter.limits.area
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
        turns, limits = self.painter.engine.turns, self.painter.limits
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
        check = self.painter.check
        if check is not None and (reason := check(self.asked.prompt, pictures)) is not None:
            raise Wrong(reason, "prompt", 400, "moderation_blocked")

    def _preview(self, request: Request) -> Callable[[SampleStep], None]:
        """A callback that decodes some of the steps, evenly spread."""
        muse, partial = self.painter.engine.muse, self.asked.partial
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
                file = self._file(film.frames.pop()[0])
                self._tell(Event("partial_image", (file,), self._size))
            film.frames.clear()

        return look

    def _file(self, picture: Image.Image) -> bytes:
        asked, sign, file = self.asked, self.painter.sign, io.BytesIO()
        if asked.format == "png":
            file.write(png_bytes(picture))
        else:
            picture.save(file, asked.format.upper(), quality=asked.compression)
        if sign is None:
            return file.getvalue()
        return sign(file.getvalue(), asked.format, self.sent.get("image"))
