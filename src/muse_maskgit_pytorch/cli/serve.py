"""`muse serve`: a model for many clients, over HTTP."""

from __future__ import annotations

from pathlib import Path

from ..data.opening import own_object
from ..loading import open_model
from ..serving.engine import Engine
from ..text import TextCompute
from .drawing import load_loras, note
from .parser import Parser


def serve(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    try:
        import uvicorn

        from ..serving.asked import Limits
        from ..serving.http import make_app
        from ..serving.metrics import Metrics
        from ..serving.tokens import Tokens
    except ImportError as error:
        raise ImportError(
            f"muse serve needs {error.name}: pip install 'muse-maskgit-pytorch[serve]'"
        ) from error
    tokens = Tokens() if config.tokens is None else Tokens.read(config.tokens)
    limits = Limits(n=config.most_n, prompt=config.most_prompt, timeout=config.timeout)
    check = None if config.check is None else own_object("--check", config.check)
    if check is not None and not callable(check):
        raise ValueError(f"--check {config.check} must be a function of a text and pictures")
    model = open_model(config.model, config.device)
    load_loras(model, config.lora)
    model.precision = config.precision
    model.text_compute = TextCompute(config.text_precision, config.text_device)
    metrics = Metrics()
    memory = None if config.memory_gb is None else config.memory_gb * 2**30
    engine = Engine(model, rows=config.rows, memory=memory, queue=config.queue, watch=metrics)
    name = config.name or Path(str(config.model)).stem
    app = make_app(engine, name, tokens=tokens, limits=limits, metrics=metrics, check=check)
    note(
        f"{name} at http://{config.host}:{config.port}/v1, up to {engine.rows} pictures at once, "
        f"{engine.queue} waiting; "
        + ("for whoever has a token" if config.tokens else "for everybody who reaches it")
    )
    with engine:  # what was accepted is answered before the end
        uvicorn.run(
            app,
            host=config.host,
            port=config.port,
            log_level="warning",
            server_header=False,
            limit_concurrency=config.most_connections,
        )
