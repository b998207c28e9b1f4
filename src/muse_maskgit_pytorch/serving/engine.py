"""The engine: requests of many clients, drawn by one model a step at a time.

A request joins what is being drawn between two steps, and leaves when it is done. The base, the
super-resolution and decoding are stages of a pipeline, each with rows of its own.

What a request gives is what `Muse.draw` gives for it alone:

- Not *joined* (the default on a CPU), every request is computed in passes of its own, in the shapes
  of a lone call: ids and pixels are the same bit for bit. A CPU is busy with one row already, so
  this costs next to nothing; and since several at once would only make all of them wait, each turn
  goes to the request that has the least left to do, if no other has waited for long.
- *Joined* (the default on a GPU), the rows of all requests of a stage and size share one pass,
  whatever their step counts, guidance, policies and canvases, and each turn advances every stage.
  The arithmetic is that of a larger batch: every row has the same noise and plan, and sums are
  rounded in another order, as they are between two lone calls on a GPU.

Decoding is done request by request, since the rounding of a decoder depends on its batch, and the
record in a PNG promises the pixels of a lone call.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from ..arguments import real, whole
from ..muse import Drawing, Muse
from ..request import Drawn, Request
from ..sampling import Callback, Sampling, per_row
from .capacity import MOST, most_rows

PATIENCE = 10.0  # seconds of waiting that count as much as one level of priority
WORTH = 60.0  # passes of a row that weigh as much as one level of priority


class Refused(Exception):
    """A request that was not, or not entirely, drawn; the message is for the client."""


class Full(Refused):
    """The queue is full.

    Attributes:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, retry_after: float):
        super().__init__("the server is busy and its queue is full: try again later")
        self.retry_after = retry_after


class Late(Refused):
    """The request's time was over before it was drawn."""

    def __init__(self, seconds: float):
        super().__init__(f"the picture was not drawn within {seconds:g} seconds: try again later")


class Closed(Refused):
    """The engine takes no more requests."""

    def __init__(self):
        super().__init__("the server is shutting down: try again later")


class Watch:
    """Is told what the engine does; this one does nothing with it. Called by its thread."""

    def joined(self, waited: float) -> None:
        """A request left the queue after so many seconds."""

    def advanced(self, stage: str, rows: int, seconds: float) -> None:
        """A pass: of which stage, of how many rows that were not done, and how long."""

    def decoded(self, stage: str, rows: int, seconds: float) -> None:
        """A stage of a request ended: how long decoding, and starting the next one, took."""

    def ended(self, how: str, seconds: float) -> None:
        """A request ended: "done", "cancelled", "late" or "failed", seconds after it came."""


class Turns:
    """Who has the model to himself: the engine for a turn, and others between two turns.

    A lock that is had in the order of asking. Of an ordinary one the engine, which asks again as
    soon as it has let go, would leave nothing to others.
    """

    def __init__(self):
        self._change, self._asked, self._served = threading.Condition(), 0, 0

    def acquire(self) -> None:
        """Wait until all who asked before have had their turn."""
        with self._change:
            number, self._asked = self._asked, self._asked + 1
            self._change.wait_for(lambda: number == self._served)

    def release(self) -> None:
        """Let the next one have it."""
        with self._change:
            self._served += 1
            self._change.notify_all()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: Any) -> None:
        self.release()


@dataclass(eq=False)
class _Job:
    """A request on its way.

    Attributes:
        size: rows of the trained size that take about as much memory.
        work: passes that its rows have before them, of all stages.
        stopped: whether its callback ended a stage early.
    """

    request: Request
    callback: Callback | None
    priority: float
    timeout: float | None
    arrived: float
    size: int
    work: int
    future: Future[Drawn] = field(default_factory=Future)
    drawing: Drawing | None = None
    stopped: bool = False

    def urgency(self, now: float) -> float:
        return self.priority + (now - self.arrived) / PATIENCE

    def late(self, now: float) -> bool:
        return self.timeout is not None and now - self.arrived > self.timeout


@dataclass(eq=False)
class _Batch:
    """Jobs of one stage whose rows are advanced together, in their order."""

    stage: str
    key: Hashable
    sampling: Sampling
    jobs: list[_Job]

    def places(self) -> Iterable[tuple[_Job, slice]]:
        """Each job and its rows."""
        start = 0
        for job in self.jobs:
            yield job, slice(start, start := start + len(job.request))

    def without(self, gone: set[_Job]) -> _Batch | None:
        """The batch of the other jobs; None if there are none."""
        kept = [(job, rows) for job, rows in self.places() if job not in gone]
        if not kept:
            return None
        every = torch.arange(len(self.sampling), device="cpu")
        rows = torch.cat([every[rows] for _, rows in kept])
        return _Batch(self.stage, self.key, self.sampling.rows(rows), [job for job, _ in kept])


class Engine:
    """Draws the requests of many clients with one model.

    A thread of its own does the work, from `start` to `close`; as a context manager, within the
    block. Without the thread, `turn` does a turn of it.

    Args:
        muse: the model; nobody may change it meanwhile.
        rows: the most pictures of the trained size that are drawn at once; by default as many as
            ``memory`` has room for and as make each faster, by measurement.
        memory: bytes of the device that drawing may take; by default half of what is free.
        queue: the most pictures that may wait.
        joined: whether requests share passes (see above); by default on a GPU.
        watch: is told what happens.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        muse: Muse,
        *,
        rows: int | None = None,
        memory: float | None = None,
        queue: int = 64,
        joined: bool | None = None,
        watch: Watch | None = None,
    ):
        self.muse = muse.eval()
        self.joined = muse.device.type != "cpu" if joined is None else joined
        self.queue, self.watch = whole("queue", queue, 0), watch or Watch()
        self.turns = Turns()
        budget = None if memory is None else real("memory", memory, 1)
        if rows is None:
            rows = most_rows(muse, budget, by_speed=self.joined)
        self.rows = whole("rows", rows, 1, MOST)
        self._spent, self._pace = 0.0, 1.0  # seconds, and seconds for a picture, for `Full`
        self._waiting: list[_Job] = []
        self._batches: list[_Batch] = []
        self._decoding: deque[tuple[_Job, Tensor]] = deque()  # what a stage has sampled
        self._change = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self.fingerprint = muse.fingerprint  # reads all weights, once

    # For clients ---------------------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        callback: Callback | None = None,
        *,
        priority: float = 0.0,
        timeout: float | None = None,
    ) -> Future[Drawn]:
        """Put a request in the queue.

        Args:
            request: what to draw.
            callback: as in `Muse.draw`, of this request's rows; called by the engine's thread,
                which waits for it.
            priority: the higher the sooner; ten seconds of waiting count as much as 1.
            timeout: seconds from now after which nobody wants it any more.

        Returns:
            what will be `Muse.draw`'s result; to cancel it frees the request's place at once.

        Raises:
            Full: so many pictures wait already.
            Closed: the engine was told to end.
            ValueError: more than one request may ask for (`Request.check_size`, ``rows``).
        """
        request.check_size(trained=self.muse.image_size)
        area = math.prod(request.image_size) / self.muse.image_size**2
        size = len(request) * max(1, math.ceil(area))
        if size > self.rows:
            raise ValueError(
                f"the request asks for {len(request)} pictures of {request.image_size[0]} x "
                f"{request.image_size[1]} pixels, this server draws at most {self.rows} of "
                f"{self.muse.image_size} x {self.muse.image_size} at once: take fewer or smaller"
            )
        priority = real("priority", priority)
        timeout = None if timeout is None else real("timeout", timeout, 0)
        stages = request.options.values()
        work = sum(sum(per_row(each.timesteps, len(request), "timesteps")) for each in stages)
        job = _Job(request, callback, priority, timeout, time.monotonic(), size, work)
        with self._change:
            if self._closing:
                raise Closed
            waiting = sum(job.size for job in self._waiting)
            busy = waiting or self._running_rows() + size > self.rows
            if busy and waiting + size > self.queue:
                raise Full(max(1.0, waiting * self._pace))
            self._waiting.append(job)
            self._change.notify_all()
        return job.future

    def through(
        self, accept: Callable[[Future[Drawn]], Any] = lambda future: None, **how: Any
    ) -> Muse:
        """The model, drawing by this engine: what takes a `Muse`, such as an edit, is served.

        Args:
            accept: is given the future of every request, to cancel it.
            **how: ``priority`` and ``timeout``, as in `submit`.
        """

        def draw(request: Request, callback: Callback | None = None) -> Drawn:
            future = self.submit(request, callback, **how)
            accept(future)
            return future.result()

        muse: Any = copy.copy(self.muse)
        muse.draw = draw
        return muse

    @property
    def load(self) -> dict[str, int]:
        """Pictures "waiting", being "drawn", and "room" for more that wait."""
        with self._change:
            waiting = sum(job.size for job in self._waiting)
            drawn = self._running_rows()
        return {"waiting": waiting, "drawn": drawn, "room": max(0, self.queue - waiting)}

    # Its thread ----------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin to work."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()
        return self

    def close(self, drain: bool = True) -> None:
        """End: take no more requests, and return when the accepted ones are answered.

        Args:
            drain: draw them; if False, they are cancelled.
        """
        with self._change:
            self._closing = True
            if not drain:
                jobs = [*self._waiting, *(job for batch in self._batches for job in batch.jobs)]
                for job in [*jobs, *(job for job, _ in self._decoding)]:
                    job.future.cancel()
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join()
        else:
            while self.turn():
                pass

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: Any) -> None:
        self.close(drain=error[0] is None)

    @property
    def alive(self) -> bool:
        """Whether it works, and takes requests."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    def _work(self) -> None:
        while True:
            with self._change:
                while not (self._waiting or self._batches or self._decoding):
                    if self._closing:
                        return
                    self._change.wait()
            with self.turns:
                self.turn()

    @torch.no_grad()
    def turn(self) -> bool:
        """Admit, advance by a step, decode a request; False if nothing is left."""
        began = time.monotonic()
        self._let_go()
        while (job := self._next()) is not None:
            self._guarded([job], self._begin, job)
        for batch in list(self._batches) if self.joined else self._nearest():
            self._guarded(batch.jobs, self._advance, batch)
        if self._decoding:
            job, ids = self._decoding.popleft()
            self._guarded([job], self._decode, job, ids)
        self._spent += time.monotonic() - began
        return bool(self._waiting or self._batches or self._decoding)

    # A turn --------------------------------------------------------------------------------------

    def _running_rows(self) -> int:
        jobs = [job for batch in self._batches for job in batch.jobs]
        return sum(job.size for job in [*jobs, *(job for job, _ in self._decoding)])

    def _let_go(self) -> None:
        """Of requests that nobody waits for any more, or whose time is over."""
        now = time.monotonic()

        def over(job: _Job) -> bool:
            if job.late(now) and not job.future.done():
                assert job.timeout is not None
                self._end(job, "late", Late(job.timeout))
            elif job.future.cancelled():
                self._end(job, "cancelled")
            return job.future.done()

        with self._change:
            self._waiting = [job for job in self._waiting if not over(job)]
            self._decoding = deque(each for each in self._decoding if not over(each[0]))
        for batch in list(self._batches):
            self._leave(batch, {job for job in batch.jobs if over(job)})

    def _next(self) -> _Job | None:
        """The most urgent of those that wait, if there is room for it: nothing overtakes it."""
        with self._change:
            now = time.monotonic()
            job = max(self._waiting, key=lambda job: job.urgency(now), default=None)
            if job is None or self._running_rows() + job.size > self.rows:
                return None
            self._waiting.remove(job)
        self.watch.joined(now - job.arrived)
        return job

    def _nearest(self) -> list[_Batch]:
        """Of requests with passes of their own, the one that ends first if it is not disturbed.

        In the mean nobody waits less (Schrage 1968); those who have waited for long come before.
        """
        now = time.monotonic()

        def left(batch: _Batch) -> float:
            [job] = batch.jobs
            return job.work - WORTH * job.urgency(now)

        return sorted(self._batches, key=left)[:1]

    def _begin(self, job: _Job) -> None:
        job.drawing = Drawing(self.muse, job.request)
        self._go_on(job)

    def _join(self, job: _Job) -> None:
        """Put a job's rows beside those that they can share passes with."""
        assert job.drawing is not None
        drawing, sampling = job.drawing, job.drawing.sampling
        assert sampling is not None
        model = sampling.denoiser
        key = drawing.stage, drawing.sizes[drawing.stage], id(model.network), model.critic is None
        for batch in self._batches if self.joined else ():
            if batch.key == key:
                batch.sampling, batch.jobs = batch.sampling.cat(sampling), [*batch.jobs, job]
                return
        self._batches.append(_Batch(drawing.stage, key, sampling, [job]))

    def _advance(self, batch: _Batch) -> None:
        began = time.monotonic()
        before = batch.sampling.finished
        batch.sampling.advance()
        finished = batch.sampling.finished
        if self.muse.device.type == "cuda":  # steps that are asked for too early let others wait
            torch.cuda.synchronize(self.muse.device)
        self.watch.advanced(batch.stage, int((~before).sum()), time.monotonic() - began)
        ended = set()
        for job, rows in batch.places():
            job.work -= int((~before[rows]).sum())
            stop = False
            if job.callback is not None and not before[rows].all():
                try:
                    stop = bool(job.callback(batch.sampling.seen(rows)))
                except Exception as error:
                    self._end(job, "failed", error)
                    ended.add(job)
                    continue
            job.stopped = job.stopped or stop
            if stop or finished[rows].all():
                ended.add(job)
                self._decoding.append((job, batch.sampling.state.ids[rows]))
        self._leave(batch, ended)

    def _leave(self, batch: _Batch, gone: set[_Job]) -> None:
        """Take jobs out of their batch."""
        if not gone:
            return
        at, rest = self._batches.index(batch), batch.without(gone)
        self._batches[at : at + 1] = [] if rest is None else [rest]

    def _decode(self, job: _Job, ids: Tensor) -> None:
        """End a job's stage, and start the next one."""
        assert job.drawing is not None
        began, drawing = time.monotonic(), job.drawing
        stage = drawing.stage
        drawing.proceed(ids)
        self.watch.decoded(stage, len(ids), time.monotonic() - began)
        self._go_on(job)

    def _go_on(self, job: _Job) -> None:
        """To the next stage, or to the end."""
        assert job.drawing is not None
        if job.drawing.sampling is not None:
            return self._join(job)
        drawn = job.drawing.drawn
        self._pace += 0.1 * (self._spent / job.size - self._pace)
        self._spent = 0.0
        self._end(job, "done", Drawn(drawn.images, drawn.request, drawn.base_images, job.stopped))

    def _guarded(self, jobs: list[_Job], work: Callable[..., Any], *arguments: Any) -> None:
        """Whatever goes wrong with some requests ends these alone."""
        try:
            work(*arguments)
        except Exception as error:
            for job in jobs:
                self._end(job, "failed", error)
            self._batches = [b for b in self._batches if not set(b.jobs) & set(jobs)]

    def _end(self, job: _Job, how: str, result: Drawn | BaseException | None = None) -> None:
        with suppress(InvalidStateError):  # it was cancelled in this moment
            if isinstance(result, BaseException):
                job.future.set_exception(result)
            elif result is not None:
                job.future.set_result(result)
        self.watch.ended(how, time.monotonic() - job.arrived)
