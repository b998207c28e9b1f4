"""Many engines behind one address: each with its model in a process of its own, on Ray Serve.

HTTP stays where it is, in the process of `muse serve`, and so there is one address, one count of
each token's pictures and one place for those that are shown by address. What was asked for goes to
a replica and comes back as events (`painter`), over Ray's handles: its own HTTP proxy would answer
a request whose replica has died with a bare 500, and read bodies without a limit.

Ray chooses the replica with the fewest requests, starts another in the place of one that died, and
more of them where they are asked for. It is started for this process alone, at the loopback
address, without its dashboard and usage statistics, and ends with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from importlib import import_module
from typing import Any

import torch
from prometheus_client import Metric

from ..arguments import shown
from .asked import Asked, Limits
from .capacity import ALONE, MOST
from .engine import Refused
from .metrics import of_replicas
from .painter import About, EnginePainter, Event, refusal

# What Ray reads as it is imported, and its processes as they start.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # not behind all else on the machine
    # no cluster, but this machine alone: it listens at the loopback address, on Linux too
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # whoever talks to its ports needs this; without one it writes one to the home folder
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "OMP_NUM_THREADS": "1",  # of each replica, if nobody says otherwise
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
ray: Any = import_module("ray")  # untyped for whoever has no Ray to check our types with
serve: Any = import_module("ray.serve")
FAILURES = (ray.exceptions.RayError, serve.exceptions.RayServeException)
NAME = "muse"
STORE = 256 * 2**20  # bytes of shared memory for pictures on their way; more goes to the disk
DRAINED = 10.0  # seconds beyond a request's time until a replica that is to end is killed
ASKED_OFTEN = 5.0  # seconds between two looks at whether a replica is well
ANSWERS = 5.0  # seconds for a replica to say how it is


class Lost(Refused):
    """The process that was drawing has died."""

    def __init__(self):
        super().__init__("the process that drew the picture was lost: try again")


def read_count(count: int | str) -> tuple[int, int]:
    """The fewest and the most replicas, of ``2`` or ``"1-4"``.

    Raises:
        ValueError: another form.
    """
    found = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", str(count))
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(
            f"replicas must be a number as 2, or the fewest and the most as 1-4, not {shown(count)}"
        )
    return least, most


def gpus_of(device: str | None, most: int) -> int:
    """GPUs of a replica: one where they draw on GPUs, else none.

    Args:
        device: as asked for; None for a GPU where there is one.
        most: replicas.

    Raises:
        ValueError: a certain GPU for all of them, or fewer GPUs than replicas.
    """
    if device not in (None, "cpu", "cuda", "mps"):
        raise ValueError(
            f"replicas take a GPU each: leave device out, or say cpu, not {shown(device)}"
        )
    if device in ("cpu", "mps") or (device is None and not torch.cuda.is_available()):
        return 0
    if most > (there := torch.cuda.device_count()):
        raise ValueError(
            f"{most} replicas take a GPU each, and there are {there}: take fewer, or device cpu"
        )
    return 1


class Replica:
    """An engine and its model; what Ray starts in each process.

    Args:
        build: makes the painter.
    """

    def __init__(self, build: Callable[[], EnginePainter]):
        self.painter = build()
        self.painter.engine.start()
        self.name = serve.get_replica_context().replica_tag

    async def draw(
        self, asked: Asked, sent: dict[str, bytes], priority: float
    ) -> AsyncGenerator[Event, None]:
        """As `Painter` says."""
        async with aclosing(self.painter.draw(asked, sent, priority)) as events:
            async for event in events:
                yield event

    def about(self) -> About:
        """What it draws with."""
        return self.painter.about

    async def ready(self) -> bool:
        """Whether it takes requests."""
        return await self.painter.ready()

    async def metrics(self) -> tuple[str, list[Metric]]:
        """Its name, and those of its engine."""
        return self.name, await self.painter.metrics()

    async def check_health(self) -> None:
        """Ray asks; a replica that raises is replaced."""
        if not await self.painter.ready():
            raise RuntimeError("the engine has ended")

    def __del__(self):
        with suppress(AttributeError):  # the model could not be read
            self.painter.engine.close()


class Replicas:
    """Draws with whichever replica has the least to do: a `Painter`.

    Args:
        handle: Ray's, of the replicas.
        limits: of one request.
        about: one of them.
    """

    def __init__(self, handle: Any, limits: Limits, about: About):
        self.limits, self.about = limits, about
        self._handle, self._drawing = handle, handle.options(method_name="draw", stream=True)

    async def draw(
        self, asked: Asked, sent: dict[str, bytes], priority: float = 0.0
    ) -> AsyncGenerator[Event, None]:
        """As `Painter` says.

        A request whose replica dies is drawn once more, unless a part of it was shown: without a
        seed, the picture would be another.
        """
        accepted = seen = False
        for last in (False, True):
            events = self._drawing.remote(asked, sent, priority)
            # a replica must have it first: where none is there, one is being started
            wait: float | None = self.limits.timeout + ANSWERS
            try:
                while True:
                    event = await asyncio.wait_for(anext(events), wait)
                    wait = None
                    if event.name != "accepted" or not accepted:
                        yield event
                    accepted, seen = True, seen or event.name == "partial_image"
                    if event.name in ("completed", "refused"):
                        return
            except (*FAILURES, StopAsyncIteration, TimeoutError):
                if last or seen:
                    yield Event("refused", answer=refusal(Lost()))
                    return
            finally:
                events.cancel()

    async def ready(self) -> bool:
        """Whether one of them takes requests."""
        return any(await self._each("ready"))

    async def metrics(self) -> list[Metric]:
        """Of all that answer."""
        return of_replicas(dict(await self._each("metrics")))

    async def _each(self, method: str) -> list[Any]:
        """What the replicas say that answer."""
        try:
            answers = await self._handle.broadcast(method).results_async(
                timeout_s=ANSWERS, return_exceptions=True
            )
        except (*FAILURES, TimeoutError):
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]


@contextmanager
def replicas(
    build: Callable[[], EnginePainter],
    count: tuple[int, int],
    limits: Limits,
    *,
    queue: int,
    rows: int | None = None,
    gpus: int = 0,
) -> Iterator[Replicas]:
    """Start them; at the end, they draw what they have accepted.

    SIGTERM is for whoever listens inside of the block: outside of it, it is ignored, so that the
    end is not cut short.

    Args:
        build: makes a painter, in each process.
        count: the fewest and the most. Between them, Ray starts another where each has more than
            ``rows`` requests for half a minute, and ends one after ten minutes in which fewer would
            do.
        limits: the painters'.
        queue: the engines'.
        rows: the engines'; by default eight, here.
        gpus: of each. Each has ``OMP_NUM_THREADS`` threads of the CPU, by default one.

    Raises:
        ValueError: they do not start; the message has the reason.
    """
    least, most = count
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    scale: dict[str, Any] = {"num_replicas": least}
    if least < most:
        often = {"min_replicas": least, "max_replicas": most}
        scale = {"autoscaling_config": {**often, "target_ongoing_requests": rows or ALONE}}
    deployment = serve.deployment(
        Replica,
        # the engine says when it is full: Ray holds nothing back
        max_ongoing_requests=queue + (rows or MOST) + 16,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        graceful_shutdown_timeout_s=limits.timeout + DRAINED,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=ASKED_OFTEN,
        logging_config=quiet,
        **scale,
    )
    before = signal.getsignal(signal.SIGTERM)  # Ray puts its own
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=STORE,
            logging_level="WARNING",
        )
    except Exception as error:
        raise OSError(f"Ray did not start, its logs are in /tmp/ray: {error}") from error
    try:
        serve.start(proxy_location="Disabled", logging_config=quiet)
        try:
            handle = serve.run(deployment.bind(build), name=NAME, route_prefix=None)
            about = handle.about.remote().result(timeout_s=limits.timeout)
        except RuntimeError as error:
            raise ValueError(f"the replicas did not start: {_why(error)}") from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        yield Replicas(handle, limits, about)
    finally:
        if ray.is_initialized():  # else it would start anew
            with suppress(*FAILURES):
                serve.shutdown()
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _why(error: Exception) -> str:
    """The last line of what Ray says, which has the first error's own words."""
    status = serve.status().applications.get(NAME)
    messages = [d.message for d in status.deployments.values()] if status else []
    lines = [line for text in (str(error), *messages) for line in text.splitlines() if line.strip()]
    return re.sub(r"^\s*(\w+\.)*\w*Error: ", "", lines[-1])
