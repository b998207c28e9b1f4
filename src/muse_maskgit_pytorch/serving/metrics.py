"""What the server does, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)

from .engine import Watch

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def exposition(families: Iterable[Metric]) -> bytes:
    """Metrics as Prometheus reads them."""
    collected: Any = _Collected(families)
    return generate_latest(collected)


def of_replicas(collected: Mapping[str, Iterable[Metric]]) -> list[Metric]:
    """The metrics of many, by name, as one of each kind: with the label "replica"."""
    families: dict[str, Metric] = {}
    for replica, theirs in collected.items():
        for each in theirs:
            family = Metric(each.name, each.documentation, each.type)
            family = families.setdefault(each.name, family)
            family.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in each.samples
            ]
    return list(families.values())


class HttpMetrics:
    """Of the HTTP in front of an engine."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.answers = Counter(
            "muse_http_requests", "Answers, by path and status", ("path", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.first_preview = _seconds(self.registry, "first_preview", "Until a partial picture")
        self.last_byte = _seconds(self.registry, "last_byte", "Until an answer was sent", ("path",))


class Metrics(Watch):
    """Of one engine."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "muse_drawing_requests", "Requests to draw, by how they ended", ("end",),
            registry=self.registry,
        )  # fmt: skip

        def seconds(name: str, text: str, labels: Sequence[str] = ()) -> Histogram:
            return _seconds(self.registry, name, text, labels)

        self.took = seconds("drawing", "From a request's coming to its end", ("end",))
        self.waited = seconds("queue", "From a request's coming to its first step")
        self.step_seconds = seconds("step", "Of one pass", ("stage",))
        self.batch = Histogram(
            "muse_batch_rows", "Pictures of one pass", ("stage",), registry=self.registry,
            buckets=ROWS,
        )  # fmt: skip
        self.decode_seconds = seconds("decode", "Of a stage's end", ("stage",))

    def follow(self, load: Callable[[], Mapping[str, int]]) -> None:
        """Show an engine's load, read when somebody asks."""
        for name, text in (
            ("waiting", "Pictures in the queue"),
            ("drawn", "Pictures being drawn"),
            ("room", "Pictures that may still wait"),
        ):
            gauge = Gauge(f"muse_pictures_{name}", text, registry=self.registry)
            gauge.set_function(lambda name=name: load()[name])

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


def _seconds(
    registry: CollectorRegistry, name: str, text: str, labels: Sequence[str] = ()
) -> Histogram:
    return Histogram(f"muse_{name}_seconds", text, labels, registry=registry, buckets=SECONDS)


class _Collected:
    """Metrics in the place of a registry."""

    def __init__(self, families: Iterable[Metric]):
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
