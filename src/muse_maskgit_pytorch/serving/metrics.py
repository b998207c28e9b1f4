"""What the server does, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .engine import Watch

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics(Watch):
    """Of one engine and the HTTP in front of it."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, labels: tuple[str, ...] = (), buckets=SECONDS):
            return Histogram(f"muse_{name}", text, labels, registry=self.registry, buckets=buckets)

        self.answers = Counter(
            "muse_http_requests", "Answers, by path and status", ("path", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.requests = Counter(
            "muse_drawing_requests", "Requests to draw, by how they ended", ("end",),
            registry=self.registry,
        )  # fmt: skip
        self.took = histogram("drawing_seconds", "From a request's coming to its end", ("end",))
        self.waited = histogram("queue_seconds", "From a request's coming to its first step")
        self.step_seconds = histogram("step_seconds", "Of one pass", ("stage",))
        self.batch = histogram("batch_rows", "Pictures of one pass", ("stage",), ROWS)
        self.decode_seconds = histogram("decode_seconds", "Of a stage's end", ("stage",))
        self.first_preview = histogram("first_preview_seconds", "Until the first partial picture")
        self.last_byte = histogram("last_byte_seconds", "Until an answer was sent", ("path",))

    def follow(self, load: Callable[[], Mapping[str, int]]) -> None:
        """Show an engine's load, read when somebody asks."""
        for name, text in (
            ("waiting", "Pictures in the queue"),
            ("drawn", "Pictures being drawn"),
            ("room", "Pictures that may still wait"),
        ):
            gauge = Gauge(f"muse_pictures_{name}", text, registry=self.registry)
            gauge.set_function(lambda name=name: load()[name])

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)

    # What the engine tells ----------------------------------------------------------------------

    def joined(self, waited: float) -> None:
        self.waited.observe(waited)

    def advanced(self, stage: str, rows: int, seconds: float) -> None:
        self.step_seconds.labels(stage).observe(seconds)
        self.batch.labels(stage).observe(rows)

    def decoded(self, stage: str, rows: int, seconds: float) -> None:
        self.decode_seconds.labels(stage).observe(seconds)

    def ended(self, how: str, seconds: float) -> None:
        self.requests.labels(how).inc()
        self.took.labels(how).observe(seconds)
