"""Many engines behind one address: one is killed, and the server is told to end, under load."""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch.cli.main import main
from tests.unit.serving.test_http import FAST, muse  # noqa: F401

ray = pytest.importorskip("ray")
from muse_maskgit_pytorch.serving.replicas import gpus_of, read_count  # noqa: E402

SLOW = {"prompt": "red apple", "timesteps": 16, "superres_timesteps": 48}
PATIENCE = 240.0  # seconds for what takes ten on a machine with nothing else to do


def test_how_many():
    assert [read_count(count) for count in (2, "2", "1-4", " 3 - 3 ")] == [
        (2, 2), (2, 2), (1, 4), (3, 3)
    ]  # fmt: skip
    for count in (0, "0", "4-1", "-1", "2-", "many", "1-2-3", ""):
        with pytest.raises(ValueError, match="1-4"):
            read_count(count)


def test_a_gpu_each(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [gpus_of(device, 2) for device in (None, "cuda", "cpu")] == [1, 1, 0]
    with pytest.raises(ValueError, match="3 replicas take a GPU each, and there are 2"):
        gpus_of(None, 3)
    with pytest.raises(ValueError, match="leave device out"):
        gpus_of("cuda:1", 2)


def test_mistakes_are_told_before_anything_starts(muse, tmp_path, monkeypatch, capsys):  # noqa: F811
    command = ["serve", "--model", str(muse.save(tmp_path / "tiny.safetensors")), "--replicas"]
    assert main([*command, "4-1"]) == 2
    assert "replicas must be a number" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "muse_maskgit_pytorch.serving.replicas")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*command, "2"]) == 2
    assert "muse-maskgit-pytorch[ray]" in capsys.readouterr().err


class Serving:
    """`muse serve` as a process, with the processes that it started."""

    def __init__(self, model: Path, log: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "muse_maskgit_pytorch.cli.main", "serve"]
        command += ["--model", str(model), "--port", str(port), *options]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    def running(self, title: str = "") -> list[int]:
        """Ids of its processes that are so called."""
        parents = {}
        for file in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
        found, ours = [], [self.process.pid]
        while ours:
            process = ours.pop()
            ours += [child for child, parent in parents.items() if parent == process]
            with suppress(OSError):
                if Path(f"/proc/{process}/cmdline").read_text().startswith(title):
                    found.append(process)
        return found

    def replicas(self) -> set[str]:
        """Names of those that answer."""
        with suppress(httpx.HTTPError):
            return set(
                re.findall('replica="(.+?)"', httpx.get(f"{self.url}/metrics", timeout=60).text)
            )
        return set()

    def until(self, so: Callable[[], Any]) -> float:
        """Wait for something; returns the seconds that it took."""
        began = time.monotonic()
        while not so():
            if self.process.poll() is not None and "Ray did not start" in self.log.read_text():
                pytest.skip("Ray gives its agents 15 seconds, and this machine needs longer")
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() - began < PATIENCE, self.log.read_text()
            time.sleep(0.1)
        return time.monotonic() - began


@pytest.fixture
def serving(muse: Muse, tmp_path: Path) -> Iterator[Serving]:  # noqa: F811
    started = Serving(
        Path(muse.save(tmp_path / "fruit.safetensors")), tmp_path / "log",
        "--replicas", "2", "--rows", "2", "--device", "cpu",
    )  # fmt: skip
    yield started
    for process in started.running():
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    started.process.wait()


class Load:
    """Clients who ask again and again; each answer's status, and what it was if it was no 200."""

    def __init__(self, url: str, clients: int):
        self.url, self.over = url, threading.Event()
        self.statuses: Counter[int] = Counter()
        self.others: list[httpx.Response] = []
        self.asking = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with httpx.Client(timeout=PATIENCE) as http:
            while not self.over.is_set():
                with self._lock:
                    self.asking += 1
                answer = http.post(f"{self.url}/v1/images/generations", json=SLOW)
                with self._lock:
                    self.asking -= 1
                    self.statuses[answer.status_code] += 1
                    if answer.status_code != 200:
                        self.others.append(answer)

    def end(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.slow
def test_a_replica_is_killed_and_the_server_told_to_end(muse, serving):  # noqa: F811
    def ready() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{serving.url}/readyz", timeout=20).status_code == 200
        return False

    print(f"\nready after {serving.until(ready):.1f} s")
    ask = f"{serving.url}/v1/images/generations"
    answer = httpx.post(ask, json=dict(prompt="red apple", seed=7, **FAST), timeout=60).json()
    drawn = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    [alone] = muse("red apple", seeds=7, **FAST)
    assert drawn.tobytes() == alone.tobytes()
    kept = httpx.post(ask, json=dict(prompt="red apple", response_format="url", **FAST), timeout=60)
    address = kept.json()["data"][0]["url"]
    assert [httpx.get(address).status_code for _ in range(4)] == [200] * 4
    stream = httpx.post(ask, json=dict(SLOW, stream=True, partial_images=2), timeout=60).text
    assert stream.count("event: image_generation.partial_image") == 2
    assert stream.count("event: image_generation.completed") == 1
    wrong = httpx.post(ask, json=dict(prompt="blue plum"), timeout=60)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "prompt")
    names = serving.replicas()
    assert len(names) == 2

    load = Load(serving.url, 6)
    serving.until(lambda: load.statuses.total() >= 10)
    [first, second] = serving.running("ray::ServeReplica:muse")
    os.kill(first, signal.SIGKILL)
    before = load.statuses.total()
    seconds = serving.until(lambda: len(serving.replicas() - names) == 1)
    meanwhile = load.statuses.total() - before
    assert second in serving.running("ray::ServeReplica:muse")
    load.end()
    print(f"another replica answers after {seconds:.1f} s; {meanwhile} answers meanwhile")
    print(f"of {load.statuses.total()} requests: {dict(load.statuses)}")
    assert meanwhile > 0
    for answer in load.others:
        assert answer.status_code in (429, 503), answer.text
        assert int(answer.headers["retry-after"]) >= 1
        assert "try again" in answer.json()["error"]["message"]

    load = Load(serving.url, 6)
    serving.until(lambda: load.asking == 6)
    load.over.set()
    time.sleep(0.2)
    left, began, processes = load.asking, time.monotonic(), serving.running()
    serving.process.send_signal(signal.SIGTERM)
    load.end()
    answered = time.monotonic() - began
    assert serving.process.wait(PATIENCE) == 0, serving.log.read_text()
    print(f"SIGTERM with {left} under way: {dict(load.statuses)} after {answered:.1f} s")
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert left > 0
    assert set(load.statuses) == {200}
    assert not [process for process in processes if Path(f"/proc/{process}").exists()]
