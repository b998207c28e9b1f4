"""What serving costs and brings: the engine's order of work, the first picture, latency, memory.

    OMP_NUM_THREADS=1 python benchmarks/serving.py --model FILE

**Order of work.** The same requests, of 4 to 24 steps, at the same times of a Poisson process, in
one process and by one model in five ways: one at a time; in static batches (whoever waits, up to
``--rows``, until the last of them is done, each row with its own steps); by the engine with one
row, and with ``--rows``; by the engine with joined passes. Once all at once, for the throughput,
and once at 0.9 of what one at a time manages, for the latencies; the ways take turns, and the
medians of the rounds are printed.

**A server.** `muse serve` as a process of its own: seconds from its start to the first picture; a
lone request over HTTP and a bare ``muse(...)`` call in turns; the memory of the server over
``--requests`` requests of ``--clients`` clients (take a small model for many).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import queue
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import torch
from tqdm import tqdm

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch.images import png_bytes
from muse_maskgit_pytorch.loading import open_model
from muse_maskgit_pytorch.serving.engine import Engine
from muse_maskgit_pytorch.serving.load import arrivals, percentile

STEPS = (4, 8, 12, 24)
PROMPT = "a red apple"


@dataclass
class Asked:
    """One request: when it is due, in seconds, its steps, seed, and seconds until it was drawn."""

    due: float
    steps: int
    seed: int
    took: float = 0.0


def asked(times: Sequence[float], seed: int) -> list[Asked]:
    dice = np.random.default_rng(seed)
    return [Asked(due, int(dice.choice(STEPS)), seed + n) for n, due in enumerate(times)]


def request(muse: Muse, rows: Sequence[Asked]) -> Any:
    steps = torch.tensor([row.steps for row in rows])
    return muse.request([PROMPT] * len(rows), seeds=[row.seed for row in rows], timesteps=steps)


def run(rows: Sequence[Asked], submit: Callable[[Asked], Future[Any]], watch: list[float]) -> None:
    """Ask for every row when it is due; ``took`` is from then until it is there."""
    start, futures = time.perf_counter(), []
    for row in rows:
        time.sleep(max(0.0, start + row.due - time.perf_counter()))
        future = submit(row)

        def note(_: Any, row: Asked = row) -> None:
            row.took = time.perf_counter() - start - row.due

        future.add_done_callback(note)
        futures.append(future)
    for future in futures:
        future.result()
    watch.append(time.perf_counter() - start)


class Batches:
    """Draws whoever waits, up to so many, until the last of them is done; then the next."""

    def __init__(self, muse: Muse, most: int):
        self.muse, self.most = muse, most
        self.waiting: queue.Queue[tuple[Asked, Future[Any]] | None] = queue.Queue()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def submit(self, row: Asked) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.put((row, future))
        return future

    def work(self) -> None:
        while (first := self.waiting.get()) is not None:
            batch = [first]
            with suppress(queue.Empty):
                while len(batch) < self.most and (one := self.waiting.get_nowait()) is not None:
                    batch.append(one)
            self.muse.draw(request(self.muse, [row for row, _ in batch]))
            for _, future in batch:
                future.set_result(None)

    def close(self) -> None:
        self.waiting.put(None)
        self.thread.join()


def by_batches(muse: Muse, most: int, rows: Sequence[Asked], watch: list[float]) -> None:
    batches = Batches(muse, most)
    run(rows, batches.submit, watch)
    batches.close()


def by_engine(
    muse: Muse, most: int, joined: bool, rows: Sequence[Asked], watch: list[float]
) -> None:
    with Engine(muse, rows=most, queue=10**6, joined=joined) as engine:
        run(rows, lambda row: engine.submit(request(muse, [row])), watch)


def orders(muse: Muse, most: int, count: int, rounds: int) -> dict[str, Any]:
    """Throughput with all at once, and latencies at 0.9 of what one at a time manages."""
    ways: dict[str, Callable[[Sequence[Asked], list[float]], None]] = {
        "one at a time": lambda rows, watch: by_batches(muse, 1, rows, watch),
        "static batches": lambda rows, watch: by_batches(muse, most, rows, watch),
        "engine, one row": lambda rows, watch: by_engine(muse, 1, False, rows, watch),
        "engine": lambda rows, watch: by_engine(muse, most, False, rows, watch),
        "engine, joined": lambda rows, watch: by_engine(muse, most, True, rows, watch),
    }
    for way in ways.values():  # once, so that nothing is first
        way(asked([0.0] * 2, 0), [])
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            way(asked([0.0] * count, 1000 * number), spent[name])
    throughput = {name: count / statistics.median(each) for name, each in spent.items()}
    rate = 0.9 * throughput["one at a time"]
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        times = arrivals(rate, count / rate, np.random.default_rng(number))
        for name, way in ways.items():
            rows = asked(times, 1000 * number)
            way(rows, [])
            took[name] += [row.took for row in rows]
    lone = statistics.median(each for each in alone(muse, 8))
    print(
        f"\n{count} requests of {', '.join(map(str, STEPS))} steps, up to {most} at once; "
        f"{rounds} rounds; a lone one takes {lone:.3f} s in the median\n"
        f"{'':16} {'pictures/s':>11} {'p50, s':>8} {'p95, s':>8} {'p99, s':>8}"
    )
    found: dict[str, Any] = {"lone": lone, "rate": rate}
    for name, rows in took.items():
        shares = [percentile(rows, share) or 0.0 for share in (50, 95, 99)]
        print(f"{name:16} {throughput[name]:>11.3f} " + " ".join(f"{s:>8.3f}" for s in shares))
        found[name] = {"throughput": throughput[name], "p50_p95_p99": shares}
    return found


def alone(muse: Muse, count: int) -> list[float]:
    seconds = []
    for number in range(count):
        began = time.perf_counter()
        muse.draw(request(muse, [Asked(0.0, STEPS[number % len(STEPS)], number)]))
        seconds.append(time.perf_counter() - began)
    return seconds


class Server:
    """`muse serve` in a process of its own; ``started`` is the seconds until it is ready."""

    def __init__(self, model: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["serve", "--model", model, "--port", str(port)]
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "muse_maskgit_pytorch.cli.main", *command],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300)
        while True:
            with suppress(httpx.HTTPError):
                if self.client.get("/readyz").status_code == 200:
                    break
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}")
            time.sleep(0.01)
        self.ask(0)
        self.started = time.perf_counter() - began

    def ask(self, seed: int, **options: Any) -> None:
        answer = self.client.post(
            "/v1/images/generations",
            json={"prompt": PROMPT, "seed": seed, "response_format": "b64_json", **options},
        )
        answer.raise_for_status()
        base64.b64decode(answer.json()["data"][0]["b64_json"])

    def memory(self) -> float:
        """MB that the process holds."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def latency(server: Server, muse: Muse, count: int) -> dict[str, float]:
    """A lone request over HTTP, a bare call, and a bare call with its PNG, in turns."""

    def bare(seed: int) -> None:
        muse(PROMPT, seeds=seed)

    def with_file(seed: int) -> None:
        png_bytes(muse(PROMPT, seeds=seed)[0])

    ways = {"over HTTP": server.ask, "bare call": bare, "bare call, PNG": with_file}
    took: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(count + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way(seed)
            if seed:
                took[name].append(time.perf_counter() - began)
    found = {name: 1000 * statistics.median(each) for name, each in took.items()}
    more = found["over HTTP"] - found["bare call"]
    print("\n" + ", ".join(f"{name} {ms:.1f} ms" for name, ms in found.items()))
    print(f"over HTTP {more:.1f} ms more than a bare call, the medians of {count}")
    return found


def memory(server: Server, count: int, clients: int) -> list[float]:
    """MB after each tenth of the requests."""
    held, lock, bar = [], threading.Lock(), tqdm(total=count, unit="request")
    numbers = iter(range(count))

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            server.ask(number, timesteps=int(STEPS[number % len(STEPS)]))
            with lock:
                bar.update()
                if bar.n % max(1, count // 10) == 0:
                    held.append(server.memory())

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bar.close()
    print(f"\nMB held after each tenth of {count} requests: " + " ".join(f"{x:.0f}" for x in held))
    return held


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="name or file of a Muse")
    parser.add_argument(
        "--parts", nargs="+", choices=("orders", "server"), default=["orders", "server"]
    )
    parser.add_argument("--rows", type=int, default=8, help="the most at once")
    parser.add_argument("--count", type=int, default=24, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200, help="for the memory")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-serving"))
    args = parser.parse_args()
    muse = open_model(args.model)
    found: dict[str, Any] = {"model": args.model, "fingerprint": muse.fingerprint}
    if "orders" in args.parts:
        found["orders"] = orders(muse, args.rows, args.count, args.rounds)
    if "server" in args.parts:
        server = Server(args.model)
        found["first_picture"] = server.started
        print(f"\nfrom the start of muse serve to its first picture: {server.started:.2f} s")
        found["latency"] = latency(server, muse, 20)
        found["memory"] = memory(server, args.requests, args.clients)
        server.close()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "figures.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
