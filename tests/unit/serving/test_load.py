"""The load generator, against a server that takes a known time for each picture."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.serving.load import (
    Answer,
    Kind,
    Target,
    arrivals,
    measure,
    percentile,
    summary,
)

SECONDS = 0.05  # of the server, for a picture; it draws one at a time


class Server(ThreadingHTTPServer):
    """Draws one picture after the other, with room for so many that wait."""

    daemon_threads = True
    request_queue_size = 128
    room = 10**6

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.waiting, self.busy, self.change = 0, threading.Lock(), threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.change:
            server.asked.append(asked | {"token": self.headers.get("Authorization")})
            full = server.waiting >= server.room
            server.waiting += not full
        if not full:
            with server.busy:
                time.sleep(SECONDS)
            with server.change:
                server.waiting -= 1
        body = b'{"data": [{"b64_json": ""}]}' if not full else b"no room"
        self.send_response(429 if full else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any):
        pass


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def target(server: Server, **changes) -> Target:
    given: Any = dict(prompts=["a", "b"], kinds=[Kind(4), Kind(8)], seed=3)
    return Target(f"http://127.0.0.1:{server.server_port}", **(given | changes))


def test_requests_come_by_a_poisson_process():
    times = arrivals(50.0, 200.0, np.random.default_rng(0))
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 200
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.05)  # that of an exponential distribution


def test_percentiles():
    assert [percentile(range(1, 101), share) for share in (50, 95, 99)] == [50, 95, 99]
    assert [percentile([3.0, 1.0, 2.0], share) for share in (50, 99)] == [2.0, 3.0]
    assert percentile([], 50) is None


def test_figures_of_known_answers():
    few, many = Kind(4), Kind(8)
    answers = [
        *(Answer(few, 0.0, 1.0, 200) for _ in range(3)), Answer(many, 2.0, 4.0, 200),
        Answer(few, 0.0, 0.1, 429), Answer(few, 0.0, 9.0, 500, "broken"),
    ]  # fmt: skip
    found = summary(answers, 5.0)
    assert [found[key] for key in ("requests", "done", "rejected", "failed")] == [6, 4, 1, 1]
    assert found["throughput"] == 4 / 9  # until the last answer, whatever it was
    assert found["seconds"] == {"p50": 1.0, "p95": 4.0, "p99": 4.0}
    assert found["kinds"]["8 steps"]["p50"] == 4.0
    assert found["errors"] == {"broken": 1}


def test_capacity_and_an_overload(server: Server):
    """Beyond its capacity the queue grows, and so do latencies that count from when it was due."""
    found = measure(target(server, token="t"), [0.3, 2.0], seconds=1.5, clients=4)
    assert 0.4 / SECONDS < found["capacity"] <= 1.02 / SECONDS
    calm, crowded = found["loads"]
    for row in (calm, crowded):
        assert row["done"] == row["requests"] == len(row["answers"]) > 0
    assert crowded["seconds"]["p95"] > 0.5 > 4 * SECONDS
    assert crowded["seconds"]["p95"] > 2 * calm["seconds"]["p50"]
    assert crowded["throughput"] <= 1.02 / SECONDS
    assert {asked["timesteps"] for asked in server.asked} == {4, 8}
    assert {asked["prompt"] for asked in server.asked} == {"a", "b"}
    assert {asked["token"] for asked in server.asked} == {"Bearer t"}
    assert all("size" not in asked for asked in server.asked)


def test_a_full_queue_rejects_and_is_counted(server: Server, tmp_path: Path, capsys):
    server.room = 2
    url = f"--url=http://127.0.0.1:{server.server_port}"
    run = ["bench-serve", url, "--rate=60", "--loads", "1", "--seconds=0.8", f"--out={tmp_path}"]
    assert main(run) == 0
    found = json.loads((tmp_path / "load.json").read_text())
    (row,) = found["loads"]
    assert row["rejected"] > 0 < row["done"]
    assert row["failed"] == 0
    printed = capsys.readouterr().out
    assert "60 pictures/s (given)" in printed
    assert "requests by seconds" in (tmp_path / "load.html").read_text()


def test_a_server_that_is_not_there(tmp_path: Path, capsys):
    assert main(["bench-serve", "--url=http://127.0.0.1:9", f"--out={tmp_path}"]) == 2
    assert "http://127.0.0.1:9 draws nothing: ConnectError" in capsys.readouterr().err
    assert main(["bench-serve", "--seconds=0", f"--out={tmp_path}"]) == 2
    assert "--seconds" in capsys.readouterr().err
