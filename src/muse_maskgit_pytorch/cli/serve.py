"""`muse serve`: a model for many clients, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.opening import own_object
from ..loading import open_model
from ..serving.capacity import free_memory
from ..serving.engine import Engine
from ..text import TextCompute
from .drawing import load_loras, note
from .parser import Parser

if TYPE_CHECKING:
    from ..serving.asked import Limits
    from ..serving.painter import EnginePainter, Painter, Sign


def serve(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    try:
        import uvicorn

        from ..serving.asked import Limits
        from ..serving.http import make_app
        from ..serving.tokens import Tokens
    except ImportError as error:
        raise ImportError(
            f"muse serve needs {error.name}: pip install 'muse-maskgit-pytorch[serve]'"
        ) from error
    tokens = Tokens() if config.tokens is None else Tokens.read(config.tokens)
    limits = Limits(n=config.most_n, prompt=config.most_prompt, timeout=config.timeout)
    name = config.name or Path(str(config.model)).stem
    with _painter(config, limits) as painter:  # what was accepted is answered before the end
        app = make_app(painter, name, tokens=tokens)
        each = "" if config.replicas is None else f" in each of {config.replicas} replicas"
        note(
            f"{name} at http://{config.host}:{config.port}/v1, up to {painter.about.rows} pictures "
            f"at once, {painter.about.queue} waiting{each}; "
            + ("for whoever has a token" if config.tokens else "for everybody who reaches it")
        )
        uvicorn.run(
            app,
            host=config.host,
            port=config.port,
            log_level="warning",
            server_header=False,
            limit_concurrency=config.most_connections,
        )


@contextmanager
def _painter(config: Any, limits: Limits) -> Iterator[Painter]:
    """Who draws: an engine of this process, or replicas."""
    if config.replicas is None:
        painter = _engine_painter(config, limits)
        with painter.engine:
            yield painter
        return
    try:
        from ..serving.replicas import gpus_of, read_count, replicas
    except ImportError as error:
        raise ImportError(
            f"--replicas needs {error.name}: pip install 'muse-maskgit-pytorch[ray]'"
        ) from error
    _check(config), _sign(config)  # here, where mistakes can be told at once
    least, most = read_count(config.replicas)
    gpus = gpus_of(config.device, most)
    if config.memory_gb is None and not gpus:  # they share the machine's
        config.memory_gb = free_memory(torch.device("cpu")) / 2 / most / 2**30
    with replicas(
        partial(_engine_painter, config, limits),
        (least, most),
        limits,
        gpus=gpus,
        queue=config.queue,
        rows=config.rows,
    ) as painter:
        yield painter


def _engine_painter(config: Any, limits: Limits) -> EnginePainter:
    from ..serving.metrics import Metrics
    from ..serving.painter import EnginePainter

    check, sign = _check(config), _sign(config)
    model = open_model(config.model, config.device)
    load_loras(model, config.lora)
    model.precision = config.precision
    model.text_compute = TextCompute(config.text_precision, config.text_device)
    metrics = Metrics()
    memory = None if config.memory_gb is None else config.memory_gb * 2**30
    engine = Engine(model, rows=config.rows, memory=memory, queue=config.queue, watch=metrics)
    return EnginePainter(engine, limits, metrics=metrics, check=check, sign=sign)


def _check(config: Any) -> Any:
    """The safety checker, if there is one."""
    check = None if config.check is None else own_object("--check", config.check)
    if check is not None and not callable(check):
        raise ValueError(f"--check {config.check} must be a function of a text and pictures")
    return check


def _sign(config: Any) -> Sign | None:
    """What gives pictures credentials, if that was asked for."""
    if config.c2pa is None:
        return None
    try:
        from ..serving.credentials import Credentials
    except ImportError as error:
        raise ImportError(
            f"--c2pa needs {error.name}: pip install 'muse-maskgit-pytorch[c2pa]'"
        ) from error
    return Credentials(*config.c2pa).signed
