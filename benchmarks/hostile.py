"""A running server against strangers: odd fields, odd pictures, half requests, clients who leave.

    muse serve --model FILE --port 8000
    python benchmarks/hostile.py --requests 2000

Counts the answers by status. It fails if one is 500 or above but for 503 (not drawn in time), is
not in the form of an error, or shows a stack trace, or if the server does not draw at the end.
A description of the API is at /openapi.json, for programs that make up requests from it.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import socket
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

ODD: list[Any] = [
    None, "", " ", "x" * 5000, "\x00", "\ud83c", "🍎" * 300, "../../etc/passwd", "{{7*7}}",
    "<script>", "' OR 1=1", -1, 0, 1e308, float("nan"), 2**70, True, [], {}, [[[]]], {"a": {}},
    "NaN", "1e9", "auto", "٣", "0x10", [1, "a"], "\n\r\n",
]  # fmt: skip
FIELDS = (
    *("prompt", "n", "size", "seed", "response_format", "output_format", "output_compression"),
    *("stream", "partial_images", "model", "user", "quality", "preset", "negative_texts"),
    *("timesteps", "cond_scale", "temperature", "policy", "top_k", "remask", "noise_schedule"),
    *("superres_timesteps", "edit", "left", "at", "strength", "aspect", "no_such_field"),
)


def bomb(side: int) -> bytes:
    """A PNG of so many black pixels a side, in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    squeeze, rows = zlib.compressobj(9), b""
    for _ in range(min(side, 3000)):
        rows += squeeze.compress(bytes(1 + side))
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", rows + squeeze.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def png(size: tuple[int, int], mode: str = "RGBA") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


class Strangers:
    """Makes requests; each kind returns the status of its answer, 0 where there is none."""

    def __init__(self, url: str, seed: int):
        self.url, self.dice = url.rstrip("/"), np.random.default_rng(seed)
        self.client = httpx.Client(base_url=self.url, timeout=180)
        whole = png((48, 48))
        self.pictures = [
            whole, whole[:60], b"", b"GIF89a", b"<svg/>", bomb(20_000), bomb(60_000), png((1, 1)),
            png((1, 4000)), png((48, 48), "L"), bytes(self.dice.bytes(5000)), whole + b"rubbish",
        ]  # fmt: skip

    def one(self, among: Any) -> Any:
        return among[int(self.dice.integers(len(among)))]

    def fields(self) -> dict[str, Any]:
        count = int(self.dice.integers(0, 4))
        return {"prompt": "a red apple", "timesteps": 2} | {
            self.one(FIELDS): self.one(ODD) for _ in range(count)
        }

    def checked(self, answer: Any) -> int:
        text = answer.text
        if "Traceback" in text or 'File "' in text:
            raise AssertionError(f"an answer shows the server's insides: {text[:300]}")
        if answer.status_code >= 400 and "message" not in json.loads(text)["error"]:
            raise AssertionError(f"an error in another form: {text[:300]}")
        if answer.status_code >= 500 and answer.status_code != 503:
            raise AssertionError(f"{answer.status_code}: {text[:300]}")
        return answer.status_code

    def odd_json(self) -> int:
        body = json.dumps(self.fields()).encode()
        cut = self.one([body, body, body, body[: len(body) // 2], b"", b"[" * 100_000, b"\xff"])
        head = {"Content-Type": self.one(["application/json", "text/plain", "multipart/form-data"])}
        return self.checked(self.client.post("/v1/images/generations", content=cut, headers=head))

    def odd_form(self) -> int:
        data = {
            name: str(value).encode("utf-8", "replace") for name, value in self.fields().items()
        }
        files = {"image": ("a.png", self.one(self.pictures))}
        if self.dice.random() < 0.6:
            files[self.one(["mask", "mask", "prompt", "x"])] = ("b.png", self.one(self.pictures))
        path = self.one(["/v1/images/edits", "/v1/images/edits", "/v1/images/variations"])
        return self.checked(self.client.post(path, data=data, files=files))

    def odd_address(self) -> int:
        path = self.one(["/v1", "/v1/models/x", "/page/../http.py", "/v1/images/files/a", "/%00"])
        return self.checked(self.client.request(self.one(["GET", "PUT", "DELETE"]), path))

    def leaving(self) -> int:
        """A client who reads a part of the answer, or sends a part of the request, and goes."""
        place = urlsplit(self.url)
        asked = {"prompt": "a red apple", "stream": True, "partial_images": 9, "timesteps": 12}
        body = json.dumps(asked).encode()
        head = (
            "POST /v1/images/generations HTTP/1.1\r\nHost: muse\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        whole = head + body
        with socket.create_connection((place.hostname or "", place.port or 80), 10) as connection:
            connection.sendall(
                self.one([whole, whole, whole[:-5], whole[:40], b"\r\n\r\n", b"\x16\x03"])
            )
            connection.settimeout(float(self.dice.random()) * 0.3 + 0.01)
            with suppress(OSError):
                connection.recv(int(self.dice.integers(1, 2000)))
        return 0


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts: Counter[tuple[str, int]] = Counter()
    wrong: list[str] = []
    bar = tqdm(total=args.requests, unit="request")

    def work(number: int) -> None:
        strangers = Strangers(args.url, args.seed + number)
        kinds: list[Callable[[], int]] = [
            strangers.odd_json, strangers.odd_form, strangers.odd_form, strangers.odd_address,
            strangers.leaving,
        ]  # fmt: skip
        for _ in range(args.requests // args.clients):
            kind = strangers.one(kinds)
            try:
                counts[kind.__name__, kind()] += 1
            except Exception as error:
                wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}"[:400])
            bar.update()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(args.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bar.close()
    for (kind, status), count in sorted(counts.items()):
        print(f"{kind:12} {status or 'left':>5} {count:>7,}")
    began = time.perf_counter()
    answer = httpx.post(
        f"{args.url}/v1/images/generations", json={"prompt": "a red apple"}, timeout=180
    )
    [drawn] = answer.json()["data"]
    Image.open(io.BytesIO(base64.b64decode(drawn["b64_json"]))).load()
    print(f"a picture after all of it: {time.perf_counter() - began:.1f} s")
    for line in wrong[:20]:
        print(line)
    sys.exit(f"{len(wrong)} went wrong" if wrong else 0)


if __name__ == "__main__":
    main()
