"""The HTTP of the server, as OpenAI's own client and as strangers use it."""

import asyncio
import base64
import io
import json
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import httpx2 as httpx  # what the openai package speaks
import openai
import pytest
import torch
from PIL import Image

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.images import record_of, to_pil
from muse_maskgit_pytorch.serving.asked import Asked, Limits
from muse_maskgit_pytorch.serving.engine import Engine, Late
from muse_maskgit_pytorch.serving.http import make_app
from muse_maskgit_pytorch.serving.metrics import Metrics, exposition, of_replicas
from muse_maskgit_pytorch.serving.painter import EnginePainter, Event, refusal
from muse_maskgit_pytorch.serving.tokens import Token, Tokens

NAMES = ["red apple", "green pear"]
FAST = dict(timesteps=2, superres_timesteps=1)


@pytest.fixture(scope="module")
def muse() -> Muse:
    torch.manual_seed(0)
    text = dict(classes=NAMES, text_embed_dim=None)
    base = tiny.maskgit(tiny.transformer(**text), presets={"fast": {"timesteps": 1}})
    low = dict(vae=tiny.vae(), cond_vae=base.vae)
    superres = tiny.superres(model=tiny.transformer(seq_len=64, **text), **low)
    return Muse(base, superres).eval()


def serve(
    muse: Muse, talk: Callable[[httpx.AsyncClient], Awaitable[Any]], rows: int = 4, queue: int = 8,
    tokens: Tokens | None = None, **how: Any,
) -> Any:  # fmt: skip
    """What somebody gets who talks to a server."""

    async def run() -> Any:
        metrics = Metrics()
        with Engine(muse, rows=rows, queue=queue, watch=metrics) as engine:
            painter = EnginePainter(engine, metrics=metrics, **how)
            transport = httpx.ASGITransport(make_app(painter, "tiny", tokens=tokens))
            async with httpx.AsyncClient(transport=transport, base_url="http://muse") as client:
                return await asyncio.wait_for(talk(client), 120)

    return asyncio.run(run())


def official(http: httpx.AsyncClient, key: str = "none") -> openai.AsyncOpenAI:
    """OpenAI's own client."""
    return openai.AsyncOpenAI(
        api_key=key, base_url="http://muse/v1", http_client=http, max_retries=0
    )


def opened(b64: str | None) -> Image.Image:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def first(answer: Any) -> Any:
    return answer.data[0]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def with_hole(image: Image.Image) -> bytes:
    """The upper half transparent."""
    image = image.convert("RGBA")
    image.putalpha(255)
    image.paste((0, 0, 0, 0), (0, 0, image.width, image.height // 2))
    return png(image)


def test_the_official_client_draws_what_python_draws(muse):
    async def talk(http: httpx.AsyncClient) -> None:
        client = official(http)
        assert [model.id async for model in client.models.list()] == ["tiny"]
        answer = await client.images.generate(
            model="tiny", prompt="red apple", n=2, size="64x32", response_format="b64_json",
            extra_body=dict(seed=7, cond_scale=2.0, negative_texts="green pear", **FAST),
        )  # fmt: skip
        expected = muse(
            ["red apple"] * 2, seeds=7, image_size=(32, 64), cond_scale=2.0,
            negative_texts="green pear", **FAST,
        )  # fmt: skip
        for data, picture in zip(answer.data or [], expected, strict=True):
            drawn = opened(data.b64_json)
            assert drawn.tobytes() == picture.tobytes()
            assert record_of(drawn) == record_of(picture)
        fast = await client.images.generate(prompt="red apple", extra_body=dict(preset="fast"))
        assert opened(first(fast).b64_json).size == (32, 32)
        kept = await client.images.generate(
            prompt="red apple", response_format="url", output_format="webp", extra_body=FAST
        )
        got = await http.get(first(kept).url or "")
        assert got.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(got.content)).format == "WEBP"
        lost = await http.get("/v1/images/files/0.png")
        assert lost.status_code == 404
        text = (await http.get("/metrics")).text
        assert 'muse_drawing_requests_total{end="done"} 3.0' in text
        assert 'muse_http_requests_total{path="/v1/images/generations",status="200"} 3.0' in text
        assert "muse_pictures_waiting 0.0" in text
        assert "muse_step_seconds_count" in text

    serve(muse, talk)


def test_the_official_client_streams_partial_pictures(muse):
    async def talk(http: httpx.AsyncClient) -> list[Any]:
        stream = await official(http).images.generate(
            prompt="red apple", stream=True, partial_images=2,
            extra_body=dict(seed=1, timesteps=4, superres_timesteps=2),
        )  # fmt: skip
        return [event async for event in stream]

    *partial, last = serve(muse, talk)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert last.type == "image_generation.completed"
    [alone] = muse("red apple", seeds=1, timesteps=4, superres_timesteps=2)
    assert opened(last.b64_json).tobytes() == alone.tobytes()
    pictures = [opened(event.b64_json).tobytes() for event in (*partial, last)]
    assert len({*pictures}) == 3
    assert all(opened(event.b64_json).size == (32, 32) for event in partial)


def test_the_official_client_edits_and_varies(muse):
    given = to_pil(tiny.images(1, 32))[0]

    async def talk(http: httpx.AsyncClient) -> None:
        client, how = official(http), dict(seed=3, grow=0, **FAST)
        cases: list[dict[str, Any]] = [
            dict(image=png(given), mask=with_hole(given)),
            dict(image=with_hole(given)),
        ]
        for arguments in cases:
            answer = await client.images.edit(prompt="red apple", extra_body=how, **arguments)
            edited = opened(first(answer).b64_json)
            kept = (0, 16, 32, 32)
            if "mask" in arguments:  # what is below the hole stays as it is
                assert edited.crop(kept).tobytes() == given.crop(kept).tobytes()
            assert edited.tobytes() != given.tobytes()
        stream = await client.images.edit(
            image=png(given), mask=with_hole(given), prompt="red apple", stream=True,
            partial_images=1, extra_body=dict(timesteps=3, superres_timesteps=1),
        )  # fmt: skip
        events = [event.type async for event in stream]
        assert events == ["image_edit.partial_image", "image_edit.completed"]
        same = await client.images.create_variation(
            image=png(given), n=2, extra_body=dict(strength=0, **FAST)
        )
        assert [opened(data.b64_json).tobytes() for data in same.data or []] == [
            given.tobytes()
        ] * 2

    serve(muse, talk)


WRONG = [
    (dict(), "prompt", "prompt is missing"),
    (dict(prompt="  "), "prompt", "prompt is missing"),
    (dict(prompt=["a"]), "prompt", "must be a text"),
    (dict(prompt="x" * 51), "prompt", "has 51 characters"),
    (dict(prompt="blue plum"), "prompt", "blue plum"),
    (dict(prompt="red apple", n=4), "n", "n must be"),
    (dict(prompt="red apple", n=True), "n", "n must be"),
    (dict(prompt="red apple", size="33x32"), "size", "nearest size is"),
    (dict(prompt="red apple", size="9992x9992"), "size", "pixels a side, the limit is 2048: take"),
    (dict(prompt="red apple", size="big"), "size", "256x256"),
    (dict(prompt="red apple", timestep=4), "timestep", "did you mean 'timesteps'"),
    (dict(prompt="red apple", timesteps=0), "timesteps", "timesteps"),
    (dict(prompt="red apple", timesteps="many"), "timesteps", "timesteps"),
    (dict(prompt="red apple", policy="best"), "policy", "policy must be one of"),
    (dict(prompt="red apple", preset="slow"), "preset", "unknown preset"),
    (dict(prompt="red apple", top_k=1000), "top_k", "larger than the codebook"),
    (dict(prompt="red apple", cond_scale=[1, 2]), "cond_scale", "2 values for 1"),
    (dict(prompt="red apple", seed=0.5), "seed", "seed"),
    (dict(prompt="red apple", quality="hd"), "quality", "auto or standard"),
    (dict(prompt="red apple", stream=True, n=2), "n", "a stream shows one picture"),
    (dict(prompt="red apple", stream="yes"), "stream", "true or false"),
    (dict(prompt="red apple", output_format="gif"), "output_format", "png, jpeg or webp"),
    (dict(prompt="red apple", canvases={}), "canvases", "there is no field"),
    (dict(prompt="red apple", large=True), "large", "there is no field"),
]


def test_mistakes_are_named_in_openais_form(muse):
    async def talk(http: httpx.AsyncClient) -> None:
        for fields, param, message in WRONG:
            answer = await http.post("/v1/images/generations", json=fields)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param), (fields, error)
            assert error["type"] == "invalid_request_error"
            assert message in error["message"]
        for body in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000):
            answer = await http.post("/v1/images/generations", content=body)
            assert answer.status_code == 400
            assert "JSON" in answer.json()["error"]["message"]
        other = await http.post("/v1/images/generations", json=dict(prompt="x", model="dall-e"))
        assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
        for path, status in (("/nothing", 404), ("/v1/images/generations", 405)):
            answer = await http.get(path)
            assert (answer.status_code, "error" in answer.json()) == (status, True)

    serve(muse, talk, limits=Limits(n=3, prompt=50))


def test_pictures_that_cannot_be_read_or_edited(muse):
    given = to_pil(tiny.images(1, 32))[0]
    good = png(given)
    cases: list[tuple[str, dict[str, bytes], str, str]] = [
        ("edits", {}, "image", "image is missing"),
        ("edits", {"image": b"no picture"}, "image", "PNG, JPEG or WebP"),
        ("edits", {"image": good[:-200]}, "image", "damaged"),
        ("edits", {"image": good}, "mask", "nothing says what to repaint"),
        ("edits", {"image": good, "mask": good}, "mask", "nothing says what to repaint"),
        ("edits", {"image": good, "mask": with_hole(given.resize((8, 8)))}, "mask", "equal"),
        ("edits", {"image": png(Image.new("L", (64, 64)))}, "image", "64 x 64"),
        ("variations", {"image": good, "mask": good}, "mask", "take no mask"),
        ("variations", {"image": good, "picture": good}, "picture", "must not be a file"),
    ]

    async def talk(http: httpx.AsyncClient) -> None:
        for kind, files, param, message in cases:
            sent: dict[str, Any] = dict(data=dict(prompt="red apple"), files=files or {"x": b""})
            if not files:
                sent["files"] = {"prompt": (None, "red apple")}
                del sent["data"]
            answer = await http.post(f"/v1/images/{kind}", **sent)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param), error
            assert message in error["message"]
        form = await http.post("/v1/images/edits", json=dict(prompt="red apple"))
        assert (form.status_code, "form" in form.json()["error"]["message"]) == (400, True)
        answer = await http.post(
            "/v1/images/variations", files={"image": good}, data=dict(strength="2")
        )
        assert answer.json()["error"]["param"] == "strength"
        large = await http.post("/v1/images/edits", files={"image": b"0" * 20_000})
        assert (large.status_code, large.json()["error"]["param"]) == (413, None)

    serve(muse, talk, limits=Limits(pixels=2000, body=16_000))


def test_tokens_have_limits_of_their_own(muse):
    tokens = Tokens({"k" * 20: Token("a", per_minute=2), "m" * 20: Token("b", at_once=1)})

    async def talk(http: httpx.AsyncClient) -> None:
        for key in ("", "k" * 19, "z" * 20):
            with pytest.raises(openai.AuthenticationError):
                await official(http, key or "none").models.list()
        assert (await http.get("/healthz")).status_code == 200
        first = official(http, "k" * 20)
        await first.images.generate(prompt="red apple", n=2, extra_body=FAST)
        with pytest.raises(openai.RateLimitError, match="2 pictures a minute") as limited:
            await first.images.generate(prompt="red apple", extra_body=FAST)
        assert 1 <= int(limited.value.response.headers["retry-after"]) <= 61
        with pytest.raises(openai.RateLimitError, match="1 pictures at the same time"):
            await official(http, "m" * 20).images.generate(prompt="red apple", n=2)
        await official(http, "m" * 20).images.generate(prompt="red apple", extra_body=FAST)
        await official(http, "m" * 20).images.generate(prompt="red apple", extra_body=FAST)

    serve(muse, talk, tokens=tokens)


def test_tokens_are_read_from_a_file(tmp_path):
    file = tmp_path / "tokens.yaml"
    file.write_text("secret-secret-secret: {name: a, at_once: 3}\n")
    found = Tokens.read(file).find("bearer secret-secret-secret")
    assert found is not None
    assert (found.name, found.at_once) == ("a", 3)
    for text, message in (
        ("[]", "must list tokens"),
        ("short: {}", "16 characters"),
        ("secret-secret-secret: {speed: 3}", "must be among"),
        ("secret-secret-secret: {at_once: 0}", "at_once"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message) as wrong:
            Tokens.read(file)
        assert "secret-" not in str(wrong.value)


def test_a_full_queue_is_429_and_who_leaves_frees_it(muse):
    slow = dict(prompt="red apple", timesteps=16, superres_timesteps=64)

    async def talk(http: httpx.AsyncClient) -> None:
        async def ask() -> int:
            answer = await http.post("/v1/images/generations", json=slow)
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
            return answer.status_code

        statuses = await asyncio.gather(*(ask() for _ in range(6)))
        assert sorted(statuses) == [200] * 2 + [429] * 4
        streamed = await http.post(
            "/v1/images/generations",
            json=dict(slow, stream=True, timesteps=1, superres_timesteps=1),
        )
        assert "image_generation.completed" in streamed.text

    serve(muse, talk, rows=1, queue=1)


def test_a_safety_checker_may_refuse_texts_and_pictures(muse):
    seen = []

    def check(prompt: str, pictures: Any) -> str | None:
        seen.append(len(pictures))
        return "no pears here" if "pear" in prompt else None

    async def talk(http: httpx.AsyncClient) -> None:
        refused = await http.post("/v1/images/generations", json=dict(prompt="green pear"))
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "moderation_blocked"
        assert refused.json()["error"]["message"] == "no pears here"
        answer = await http.post("/v1/images/generations", json=dict(prompt="red apple", **FAST))
        assert answer.status_code == 200

    serve(muse, talk, check=check)
    assert seen == [0, 0, 1]


def test_what_goes_wrong_inside_stays_inside(muse):
    def check(prompt: str, pictures: Any) -> str | None:
        raise RuntimeError("/secret/path")

    async def talk(http: httpx.AsyncClient) -> None:
        for stream in (False, True):
            asked = dict(prompt="red apple", stream=stream)
            answer = await http.post("/v1/images/generations", json=asked)
            assert answer.status_code == 500
            assert "secret" not in answer.text
            assert "try again" in json.loads(answer.text)["error"]["message"]
        ready = await http.get("/readyz")
        assert ready.status_code == 200

    serve(muse, talk, check=check)


def test_muse_serve(muse, tmp_path, monkeypatch, capsys):
    """The command, without the loop that listens."""
    seen = []

    def run(app: Any, **how: Any) -> None:
        async def talk() -> None:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://muse") as http:
                assert (await http.get("/readyz")).status_code == 200
                assert [m.id async for m in official(http, "k" * 16).models.list()] == ["fruit"]

        asyncio.run(talk())
        seen.append((how["host"], how["port"]))

    monkeypatch.setattr("uvicorn.run", run)
    (tmp_path / "tokens.yaml").write_text(f"{'k' * 16}: {{name: a}}\n")
    file = str(muse.save(tmp_path / "fruit.safetensors"))
    where = ["serve", "--model", file, "--port", "9000"]
    assert main([*where, "--rows", "2", "--tokens", str(tmp_path / "tokens.yaml")]) == 0
    assert seen == [("127.0.0.1", 9000)]
    assert "fruit at http://127.0.0.1:9000/v1, up to 2 pictures at once" in capsys.readouterr().err
    assert main([*where, "--rows", "0"]) == 2
    assert "rows" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(where) == 2
    assert "muse-maskgit-pytorch[serve]" in capsys.readouterr().err


class Losing(EnginePainter):
    """Loses the request after a partial picture, as when a replica dies."""

    async def draw(
        self, asked: Asked, sent: dict[str, bytes], priority: float = 0.0
    ) -> AsyncGenerator[Event, None]:
        async with aclosing(super().draw(asked, sent, priority)) as events:
            async for event in events:
                if event.name == "completed":
                    yield Event("refused", answer=refusal(Late(1.0)))
                    return
                yield event


def test_what_is_lost_on_the_way_is_said(muse):
    token = Token("a", at_once=1)

    async def run() -> None:
        with Engine(muse, rows=1) as engine:
            app = make_app(Losing(engine), "tiny", tokens=Tokens({"k" * 20: token}))
            transport = httpx.ASGITransport(app)
            how = dict(base_url="http://muse", headers={"Authorization": f"Bearer {'k' * 20}"})
            async with httpx.AsyncClient(transport=transport, **how) as http:
                asked = dict(prompt="red apple", timesteps=4, superres_timesteps=2)
                answer = await http.post("/v1/images/generations", json=asked)
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
                asked |= dict(stream=True, partial_images=1)
                stream = await http.post("/v1/images/generations", json=asked)
                partial, error, rest = stream.text.split("\n\n")
                assert partial.startswith("event: image_generation.partial_image")
                name, data = error.split("\ndata: ")
                assert (name, rest) == ("event: error", "")
                assert "try again" in json.loads(data)["error"]["message"]
                token.take(1)  # its place is free again

    asyncio.run(run())


def test_metrics_of_replicas_are_told_apart():
    engines = {name: Metrics() for name in ("a", "b")}
    for count, metrics in enumerate(engines.values(), 1):
        metrics.advanced("base", count, 0.1)
        metrics.ended("done", 1.0)
    families = of_replicas({name: list(m.registry.collect()) for name, m in engines.items()})
    lines = exposition(families).decode().splitlines()
    assert lines.count("# TYPE muse_batch_rows histogram") == 1
    for count, name in enumerate("ab", 1):
        assert f'muse_batch_rows_sum{{replica="{name}",stage="base"}} {count}.0' in lines
        assert f'muse_drawing_requests_total{{end="done",replica="{name}"}} 1.0' in lines


def test_a_server_that_ends_says_so(muse):
    async def run() -> None:
        engine = Engine(muse, rows=1).start()
        transport = httpx.ASGITransport(make_app(EnginePainter(engine), "tiny"))
        async with httpx.AsyncClient(transport=transport, base_url="http://muse") as http:
            engine.close()
            assert (await http.get("/readyz")).status_code == 503
            answer = await http.post("/v1/images/generations", json=dict(prompt="red apple"))
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")

    asyncio.run(run())


def test_the_description_has_every_field(muse):
    async def talk(http: httpx.AsyncClient) -> None:
        paths = (await http.get("/openapi.json")).json()["paths"]
        for kind in ("generations", "edits", "variations"):
            described = paths[f"/v1/images/{kind}"]["post"]
            [content] = described["requestBody"]["content"].values()
            fields = content["schema"]["properties"]
            assert {"prompt", "timesteps", "superres_policy", "seed"} <= fields.keys()
            assert ("strength" in fields) == (kind == "variations")
            assert ("edit" in fields) == (kind == "edits")
            assert ("image" in fields) == (kind != "generations")
            assert {"200", "400", "429", "503"} <= described["responses"].keys()
        fields = paths["/v1/images/generations"]["post"]["requestBody"]["content"]
        given = {"prompt": "red apple", "no_such": 1}
        answer = await http.post("/v1/images/generations", json=given)
        assert answer.json()["error"]["param"] == "no_such"
        assert fields["application/json"]["schema"]["additionalProperties"] is False

    serve(muse, talk)
