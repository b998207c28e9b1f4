"""A load generator: requests at random times, whether the server keeps up or not.

An open loop. Clients who wait for an answer before they ask again (a closed loop) ask less of a
slow server, so that their latencies look better than those of people who come by themselves. Here
requests begin at the times of a Poisson process, and latency counts from the time at which a
request was due. A closed loop measures the capacity that loads are shares of.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..arguments import printable
from ..files import replacing
from ..watching.page import bars, binned, write_page

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Kind:
    """What some of the requests ask for.

    Attributes:
        timesteps: of sampling; None: the model's default.
        size: "256x256"; None: the model's.
    """

    timesteps: int | None = None
    size: str | None = None

    @property
    def name(self) -> str:
        """As tables call it."""
        steps = "default steps" if self.timesteps is None else f"{self.timesteps} steps"
        return steps if self.size is None else f"{steps}, {self.size}"


@dataclass(frozen=True)
class Answer:
    """How a request ended.

    Attributes:
        kind: what it asked for.
        due: seconds after the beginning at which it was due.
        seconds: from then until all of the answer was there.
        status: of HTTP; 0: none came.
        error: what the server, or the connection, said.
    """

    kind: Kind
    due: float
    seconds: float
    status: int
    error: str = ""

    @property
    def outcome(self) -> str:
        """One of "done", "rejected" (the server had no room) and "failed"."""
        return {200: "done", 429: "rejected"}.get(self.status, "failed")


@dataclass(frozen=True)
class Target:
    """A server, and what to ask it for.

    Attributes:
        url: of the server, without a path.
        prompts: one after the other.
        kinds: one at random for each request.
        token: for servers that want one.
        timeout: seconds after which a request is given up.
        seed: of the times, kinds and pictures.
    """

    url: str
    prompts: Sequence[str]
    kinds: Sequence[Kind]
    token: str | None = None
    timeout: float = 120.0
    seed: int = 0


def arrivals(rate: float, seconds: float, dice: np.random.Generator) -> list[float]:
    """Times of a Poisson process, in seconds after its beginning.

    Args:
        rate: per second, above 0.
        seconds: how long.
        dice: where they are drawn from.
    """
    times, now = [], dice.exponential(1 / rate)
    while now < seconds:
        times.append(now)
        now += dice.exponential(1 / rate)
    return times


async def _ask(
    client: Any, target: Target, start: float, number: int, kind: Kind, due: float
) -> Answer:
    """One request, when it is due."""
    wait = start + due - time.perf_counter()
    if wait > 0:
        await asyncio.sleep(wait)
    asked: dict[str, Any] = {
        "prompt": target.prompts[number % len(target.prompts)],
        "seed": target.seed + number,
        "response_format": "b64_json",
    }
    asked |= {key: value for key, value in asdict(kind).items() if value is not None}
    status, error = 0, ""
    try:
        answer = await client.post("/v1/images/generations", json=asked)
        status = answer.status_code
        if status == 200:
            assert answer.json()["data"]
        else:
            error = answer.text[:200]
    except Exception as problem:  # whatever a connection, or an answer, may be
        status, error = 0, f"{type(problem).__name__}: {problem}"
    return Answer(kind, due, time.perf_counter() - start - due, status, printable(error, 200))


def _client(target: Target) -> Any:
    try:
        import httpx2 as httpx
    except ImportError as error:
        raise ImportError("httpx2 is missing: pip install 'muse-maskgit-pytorch[serve]'") from error
    headers = {} if target.token is None else {"Authorization": f"Bearer {target.token}"}
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(
        base_url=target.url, headers=headers, timeout=target.timeout, limits=limits
    )


async def check(target: Target) -> None:
    """Ask for one picture.

    Raises:
        ValueError: the server does not give it; with what it says.
    """
    async with _client(target) as client:
        answer = await _ask(client, target, time.perf_counter(), 0, target.kinds[0], 0.0)
    if answer.outcome != "done":
        said = answer.error or f"status {answer.status}"
        raise ValueError(f"{printable(target.url, 200)} draws nothing: {said}")


async def open_loop(target: Target, rate: float, seconds: float) -> list[Answer]:
    """Requests at the times of a Poisson process; returns when all are answered.

    Args:
        target: the server.
        rate: requests per second.
        seconds: for how long they come.
    """
    dice = np.random.default_rng(target.seed)
    times = arrivals(rate, seconds, dice)
    kinds = [target.kinds[int(dice.integers(len(target.kinds)))] for _ in times]
    with tqdm(total=len(times), desc=f"{rate:.3g} requests/s", unit="answer") as bar:

        async def asked(*request: Any) -> Answer:
            answer = await _ask(client, target, start, *request)
            bar.update()
            return answer

        async with _client(target) as client:
            start = time.perf_counter()
            requests = zip(range(len(times)), kinds, times, strict=True)
            return list(await asyncio.gather(*(asked(*request) for request in requests)))


async def closed_loop(target: Target, clients: int, seconds: float) -> float:
    """Pictures per second that so many clients get who ask again as soon as they are answered."""
    dice, done, numbers = np.random.default_rng(target.seed), 0, count()
    start = time.perf_counter()

    async def ask_again(client: Any) -> None:
        nonlocal done
        while (now := time.perf_counter() - start) < seconds:
            kind = target.kinds[int(dice.integers(len(target.kinds)))]
            answer = await _ask(client, target, start, next(numbers), kind, now)
            done += answer.outcome == "done"

    async with _client(target) as client:
        await asyncio.gather(*(ask_again(client) for _ in range(clients)))
    return done / (time.perf_counter() - start)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that ``share`` percent do not exceed; None without values."""
    ranked = sorted(values)
    place = max(0, -(-len(ranked) * share // 100) - 1)
    return ranked[int(place)] if ranked else None


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Figures of an open loop.

    Args:
        answers: all of them.
        seconds: for how long requests came.

    Returns:
        "requests", "done", "rejected", "failed"; "throughput", pictures per second until the last
        answer; "seconds", the percentiles of the latencies of those that are done, in all and by
        "kinds"; "errors", what the failed ones say, with counts.
    """
    counts = {how: sum(a.outcome == how for a in answers) for how in ("done", "rejected", "failed")}
    until = max([seconds, *(answer.due + answer.seconds for answer in answers)])
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.outcome == "failed":
            errors[answer.error] = errors.get(answer.error, 0) + 1

    def latencies(kind: Kind | None) -> dict[str, float | None]:
        rows = [a.seconds for a in answers if a.outcome == "done" and kind in (None, a.kind)]
        return {f"p{share}": percentile(rows, share) for share in PERCENTILES}

    kinds = sorted({answer.kind for answer in answers}, key=lambda kind: kind.name)
    return {
        "requests": len(answers),
        **counts,
        "throughput": counts["done"] / until,
        "seconds": latencies(None),
        "kinds": {kind.name: latencies(kind) for kind in kinds},
        "errors": errors,
    }


def measure(
    target: Target,
    loads: Sequence[float],
    seconds: float,
    clients: int = 16,
    rate: float | None = None,
) -> dict[str, Any]:
    """Capacity, and the figures of each load.

    Args:
        target: the server.
        loads: shares of the capacity that are asked for.
        seconds: how long each takes.
        clients: that measure the capacity.
        rate: what loads are shares of, in requests per second, where capacity is not measured.

    Raises:
        ValueError: the server draws nothing.
        ImportError: httpx2 is missing.
    """

    async def all_of_it() -> dict[str, Any]:
        await check(target)
        capacity = await closed_loop(target, clients, seconds) if rate is None else rate
        if not capacity:
            raise ValueError(
                f"{printable(target.url, 200)} answered none of {clients} clients in {seconds:g} "
                "seconds: give more --seconds, or fewer --clients"
            )
        found: dict[str, Any] = {"capacity": capacity, "measured": rate is None, "loads": []}
        for load in loads:
            answers = await open_loop(target, load * capacity, seconds)
            figures = {"load": load, "rate": load * capacity, **summary(answers, seconds)}
            found["loads"].append(figures | {"answers": [asdict(answer) for answer in answers]})
        return found

    return asyncio.run(all_of_it())


def lines(found: Mapping[str, Any]) -> list[str]:
    """A table of what `measure` found."""
    how = "measured" if found["measured"] else "given"
    out = [f"capacity {found['capacity']:.3g} pictures/s ({how})", ""]
    out.append(
        f"{'load':>5} {'asked/s':>8} {'done/s':>7} {'done':>6} {'429':>5} {'failed':>6} "
        + " ".join(f"{f'p{share}, s':>8}" for share in PERCENTILES)
    )
    for row in found["loads"]:
        out.append(
            f"{row['load']:>5g} {row['rate']:>8.3g} {row['throughput']:>7.3g} {row['done']:>6} "
            f"{row['rejected']:>5} {row['failed']:>6} "
            + " ".join(f"{_seconds(value):>8}" for value in row["seconds"].values())
        )
        out += [f"      {count} x {error}" for error, count in row["errors"].items()]
    return out


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def write(found: Mapping[str, Any], out: Path) -> list[Path]:
    """Write load.json, with every answer, and load.html, with the latencies of each load."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "load.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    body = [f"<h1>Load</h1><pre>{escape(chr(10).join(lines(found)))}</pre><div class=charts>"]
    for row in found["loads"]:
        done = [each["seconds"] for each in row["answers"] if each["status"] == 200]
        title = f"{row['load']:g} of capacity"
        if done:
            body.append(bars(title, "requests by seconds until the picture", binned(done)))
    return [out / "load.json", write_page(out / "load.html", "Load", "".join([*body, "</div>"]))]
